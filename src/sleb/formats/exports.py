"""A plan in the words of other tools.

What another tool does less than :func:`sleb.apply` is said in :attr:`Export.notes`; where it would
write a model that computes something else, the export is refused.
"""

from __future__ import annotations

import bisect
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sleb.checkpoints.checkpoint import TORCH_DTYPES, Checkpoint, read_json
from sleb.checkpoints.cut import Cut, consecutive_runs
from sleb.checkpoints.depth_fields import depth_fields
from sleb.config import ExportConfig, takes
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.files import writable_target, write_text
from sleb.core.plan import Plan
from sleb.core.progress import Progress, silent
from sleb.core.registry import Registry
from sleb.models.load import load_config
from sleb.models.pruned_config import pruned_config
from sleb.models.source import ModelSource, resolve
from sleb.models.stack import decoder_config

DRAFT_TOKENS = 4
"""Tokens that a draft proposes at a time; a start, to be tuned on the user's own load."""
# Fields that only derive others, which are written out, and which the tool does not read.
_HARMLESS = frozenset({"max_window_layers"})


@dataclass(frozen=True, kw_only=True)
class Export:
    """What goes to the other tool, and what its user must know."""

    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """One export: the plan, the cut, and the original as the user named it."""

    plan: Plan
    place: Path | None
    cut: Cut
    model: str | None
    trust: bool
    progress: Progress


class _Format(Protocol):
    def __call__(self, asked: _Asked) -> Export: ...


FORMATS: Registry[_Format] = Registry("format")
"""The tools that a plan can be put in the words of."""


@takes(ExportConfig)
def export(
    plan: Plan | str | Path,
    form: str,
    config: ExportConfig,
    *,
    model: str | None = None,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> Export:
    """The cut of ``plan``, a plan or a file (its first ``depth`` removals) in the words of the
    tool ``form``, also written to ``out`` if that is given.

    ``mergekit``: a passthrough merge as YAML. ``llama-cpp``: the argument of `llama-quantize`.
    ``modelopt-list``: that of NVIDIA's pruning script. ``vllm-args``: commands that serve the
    checkpoint which the plan lies in. ``layer-map``: blocks of student and teacher as JSON.
    ``model``, the original, is needed for mergekit and makes checks possible for llama-cpp.

    Raises:
        InputError: unknown ``form``, ``model`` missing or of another plan, ``depth`` outside it, or
            ``out`` cannot be written.
        UnsupportedModel: the tool would write another model than `sleb apply` does.
    """
    if out:
        writable_target(Path(out), force=config.force, folder=False)
    writer, file = FORMATS[form], None if isinstance(plan, Plan) else Path(plan)
    loaded = plan if isinstance(plan, Plan) else Plan.load(plan)
    asked = _Asked(
        plan=loaded,
        place=file and file.absolute().parent,
        cut=Cut.of(loaded, config.depth),
        model=model,
        trust=config.trust_remote_code,
        progress=progress,
    )
    if not asked.cut.removed:
        raise InputError(f"{file or 'the plan'} removes no block, so there is nothing to export")
    done = writer(asked)
    if out:
        write_text(Path(out), done.text)
    return done


@FORMATS.register("mergekit")
def _mergekit(asked: _Asked) -> Export:
    """YAML of a passthrough merge (mergekit 0.1.5: ``slices``, half-open ``layer_range``).

    mergekit's ``dtype`` casts every tensor, so it is given only where all have it already.
    """
    if not asked.model:
        raise InputError("--as mergekit needs the original: give --model")
    if asked.model.endswith(".gguf"):
        raise InputError(
            f"mergekit does not read GGUF; cut {asked.model} itself with: sleb apply PLAN MODEL -o "
            "OUT.gguf"
        )
    source = resolve(asked.model, asked.progress)
    checkpoint = Checkpoint.open(source.path)
    if fields := _rewritten(asked, source):
        raise UnsupportedModel(
            "mergekit changes only the number of blocks in the config, and this cut needs "
            f"{_listed(fields)} re-indexed too: use sleb apply"
        )
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    if strange := sorted(dtypes - set(TORCH_DTYPES)):
        raise UnsupportedModel(
            f"{asked.model} has tensors of type {strange[0]}, which mergekit does not carry over: "
            "use sleb apply"
        )
    lines = ["merge_method: passthrough"]
    if len(dtypes) == 1:
        lines.append(f"dtype: {TORCH_DTYPES[dtypes.pop()]}")
    lines.append("slices:")
    # a JSON string is a YAML string, whatever is in it; mergekit splits a plain one at @ and +
    name = json.dumps(asked.model, ensure_ascii=False)
    if {"@", "+"} & set(name):
        name = f"{{model: {{path: {name}}}}}"
    for start, stop in consecutive_runs(asked.cut.kept):
        lines += [
            "  - sources:",
            f"      - model: {name}",
            f"        layer_range: [{start}, {stop}]",
        ]
    return Export(text="\n".join(lines) + "\n", notes=_repair_note(asked))


@FORMATS.register("llama-cpp")
def _llama_cpp(asked: _Asked) -> Export:
    """``--prune-layers L0,L1,L2`` of llama.cpp's llama-quantize (tools/quantize/quantize.cpp:
    numbers from 0, split at commas).

    It renumbers the tensors and sets ``{arch}.block_count``; arrays with one entry per block, and
    patterns that the runtime derives from the number of a block, stay as they were.
    """
    notes = list(_repair_note(asked))
    if asked.model:
        if fields := _rewritten(asked, resolve(asked.model, asked.progress), skip_uniform=True):
            notes.append(
                f"llama-quantize would write a wrong {asked.plan.model.model_type} model: it does "
                f"not re-index what becomes of {_listed(fields)}; use: sleb apply PLAN MODEL.gguf "
                "-o OUT.gguf"
            )
    else:
        notes.append(
            "give --model to have it checked whether llama-quantize can cut this architecture"
        )
    numbers = ",".join(map(str, asked.cut.removed))
    return Export(text=f"--prune-layers {numbers}\n", notes=tuple(notes))


@FORMATS.register("modelopt-list")
def _modelopt(asked: _Asked) -> Export:
    """``--layers-to-drop N N ...``, numbers from 1, of the script prune.py in Megatron-LM's
    examples/post_training/modelopt, which hands them to NVIDIA Model Optimizer:
    ``modelopt.torch.prune.plugins.mcore_minitron.drop_mcore_language_model_layers(model, *,
    layers_to_drop: list[int])`` (nvidia-modelopt 0.47)."""
    numbers = " ".join(str(block + 1) for block in asked.cut.removed)
    counted = "Model Optimizer counts layers from 1, sleb from 0"
    return Export(text=f"--layers-to-drop {numbers}\n", notes=(counted, *_repair_note(asked)))


@FORMATS.register("vllm-args")
def _vllm(asked: _Asked) -> Export:
    """Commands for the checkpoint that the plan lies in, by itself and as the draft of the dense
    model. vLLM has no option that leaves out blocks of the dense checkpoint: ``--hf-overrides``
    can lower the number of blocks, which cuts at the end only."""
    out = asked.place
    if out is None or not (out / "config.json").is_file():
        raise InputError(
            "vllm-args are of a checkpoint: give the plan inside it, OUT/plan.json; sleb apply "
            "writes one"
        )
    if asked.cut.removed != asked.plan.removed:
        raise InputError("--depth makes another checkpoint: cut it with sleb apply --depth first")
    checkpoint = Checkpoint.open(out)
    text = checkpoint.config.get("text_config", checkpoint.config)
    dtypes = {info.dtype for info in checkpoint.tensors.values()} & set(TORCH_DTYPES)
    args = ["--dtype", TORCH_DTYPES[dtypes.pop()] if len(dtypes) == 1 else "auto"]
    longest = text.get("max_position_embeddings")
    if isinstance(longest, int) and longest > 0:
        args += ["--max-model-len", str(longest)]
    lines = ["# the pruned model", shlex.join(["vllm", "serve", str(out), *args])]
    if asked.model:
        draft = {
            "method": "draft_model",
            "model": str(out),
            "num_speculative_tokens": DRAFT_TOKENS,
        }
        lines += [
            "# the dense model, with the pruned one as its draft: the dense model's answers",
            shlex.join(
                ["vllm", "serve", asked.model, *args, "--speculative-config", json.dumps(draft)]
            ),
        ]
    notes = []
    if "auto_map" in checkpoint.config:
        notes.append("the model brings code of its own: vLLM needs --trust-remote-code to run it")
    if not asked.model:
        notes.append("give --model for a command with the pruned model as the dense one's draft")
    return Export(text="\n".join(lines) + "\n", notes=tuple(notes))


@FORMATS.register("layer-map")
def _layer_map(asked: _Asked) -> Export:
    """JSON for distillation. ``student_to_teacher[i]``: the teacher's block that student block i
    is. ``teacher_output[i]``: the teacher's block whose output stands where student block i's
    does, so behind a gap's removed blocks; what to compare hidden states with."""
    kept, blocks = asked.cut.kept, asked.plan.model.blocks
    ends = [*(old - 1 for old in kept[1:]), blocks - 1]
    gaps = []
    for start, stop in consecutive_runs(asked.cut.removed):
        behind = bisect.bisect_left(kept, start)
        gaps.append(
            {
                "removed": list(range(start, stop)),
                "student_block_before": behind - 1 if behind else None,
                "student_block_behind": behind if behind < len(kept) else None,
            }
        )
    value = {
        "teacher": {
            "model": asked.model,
            "blocks": blocks,
            "weights_sha256": asked.plan.model.weights_sha256,
        },
        "student": {"blocks": len(kept)},
        "student_to_teacher": kept,
        "teacher_output": ends,
        "gaps": gaps,
    }
    return Export(text=json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def _rewritten(asked: _Asked, source: ModelSource, *, skip_uniform: bool = False) -> list[str]:
    """Config fields besides the number of blocks that the cut changes; with ``skip_uniform``
    without lists in which all entries are alike.

    Raises:
        InputError: the plan is for another model, as far as the config tells.
        UnsupportedModel: the model cannot be cut exactly at all.
    """
    config = load_config(source.path, trust_remote_code=asked.trust)
    _check_config(asked, read_json(source.path / "config.json"), decoder_config(config))
    text, cut = (
        decoder_config(found).to_dict()
        for found in (config, pruned_config(config, asked.cut.removed))
    )
    known = [*depth_fields(text, asked.plan.model.blocks), *depth_fields(cut, len(asked.cut.kept))]
    names = {field.name for field in known} - _HARMLESS
    changed = sorted(name for name in names if text.get(name) != cut.get(name))
    if skip_uniform:
        return [name for name in changed if not _uniform(text.get(name))]
    return changed


def _check_config(asked: _Asked, raw: dict[str, Any], text: Any) -> None:
    """Raise InputError if the plan is for another kind of model. Weights are not read for it."""
    plan = asked.plan.model
    planned = " ".join(plan.model_type.split())[:80]  # a plan may hold any text
    found = (str(raw.get("model_type", "")), text.num_hidden_layers)
    if found != (plan.model_type, plan.blocks):
        raise InputError(
            f"the plan was made for another model: a {planned} of {plan.blocks} blocks, "
            f"and {asked.model} is a {found[0]} of {found[1]}"
        )


def _uniform(value: Any) -> bool:
    return isinstance(value, list) and all(item == value[0] for item in value)


def _repair_note(asked: _Asked) -> tuple[str, ...]:
    """That another tool cuts, but does not repair."""
    repair = asked.cut.record
    if repair is None or not repair.tensors:
        return ()
    return (
        f"the plan's repair ({len(repair.tensors)} matrices) is not part of this: the result is "
        "the plain cut",
    )


def _listed(fields: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in fields)
