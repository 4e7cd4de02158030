"""A checkpoint in which blocks lack their attention or MLP, as ``nemotron-nas``.

That is Llama with a table of what each block has, made by NVIDIA (DeciLMForCausalLM); vLLM, SGLang,
TensorRT-LLM and mlx-lm have code for it. Tensors keep their bytes and Llama's names, and what a
block lacks has no norm either. Most of these runtimes read the table as attributes, which JSON does
not give: so a small configuration class lies in the folder, which they run with
``--trust-remote-code``. It is ours, and has no model code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sleb.checkpoints.checkpoint import Checkpoint, check_fingerprint, fingerprint, read_json
from sleb.checkpoints.checksums import write_sums
from sleb.checkpoints.cut import Cut
from sleb.core.errors import UnsupportedModel
from sleb.core.files import enough_space, staged_dir
from sleb.core.plan import Plan
from sleb.core.progress import Progress, silent
from sleb.core.units import ATTENTION, MLP, Unit
from sleb.models.source import resolve
from sleb.surgery.apply import carry, refuse_source, write_shards

FORMAT = "nemotron-nas"
PREFIX = "model.layers."
CLASS_FILE = "configuration_nemotron_nas.py"
ROUNDED = 256
"""Widths of MLPs are multiples of it, since the table holds a ratio that is rounded up."""
TYPES = ("llama", "mistral", "qwen2")
OWNERS = {
    "self_attn": ATTENTION,
    "input_layernorm": ATTENTION,
    "mlp": MLP,
    "post_attention_layernorm": MLP,
}
"""What of a block goes with which part."""

CLASS = '''"""Configuration of a Llama whose blocks may lack attention or MLP; no model code."""

from transformers import LlamaConfig


class Block(dict):
    """A dict whose keys are attributes as well."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def block(fields):
    """What a block has, and what its parts are."""
    return Block({name: Block(value) for name, value in fields.items()})


class DeciLMConfig(LlamaConfig):
    """Llama's fields, and ``block_configs``: for each block ``attention`` and ``ffn``."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **fields):
        super().__init__(**fields)
        self.block_configs = [block(each) for each in block_configs]
'''


def write_nemotron_nas(
    plan: Plan,
    model: str | Path,
    out: str | Path,
    *,
    cut: Cut,
    force: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write a ``cut`` of ``plan`` of ``model`` in this format, with the plan as far as it was used.
    The source is only read.

    Raises:
        InputError: the plan is for another model, tensors of its repair lack, ``out`` exists.
        UnsupportedModel: runtimes would not compute this model in this format.
        DataError: the source is corrupt.
        ResourceError: the disk is full.
    """
    out = Path(out)
    cut.check_whole("give the folder that was written with the plan")
    source = resolve(model, progress)
    refuse_source(out, source.path)
    checkpoint = Checkpoint.open(source.path)
    fields = config_json(checkpoint, cut)
    with progress.stage("checking the model against the plan", checkpoint.nbytes) as tick:
        check_fingerprint(plan.model, fingerprint(checkpoint, cut.blocks, tick), source.ref)
    names = {old: new for old in checkpoint.tensors if (new := renamed(old, cut)) is not None}
    nbytes = sum(checkpoint.tensors[name].nbytes for name in names)
    enough_space(out.absolute().parent, nbytes)
    with staged_dir(out, force=force) as stage:
        with progress.stage("writing the checkpoint", nbytes) as tick:
            write_shards(checkpoint, names, cut.repair or {}, stage, tick)
        (stage / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        (stage / CLASS_FILE).write_text(CLASS, encoding="utf-8")
        for path in sorted(source.path.iterdir()):
            carry(path, stage)
        (stage / "plan.json").write_text(cut.used(plan).to_json(), encoding="utf-8")
        write_sums(stage, progress)
    return out


def is_one(folder: Path) -> bool:
    """Whether a folder is in this format."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") == FORMAT


def renamed(name: str, cut: Cut) -> str | None:
    """What a tensor is called in the cut; None if it goes."""
    new = cut.rename(name, PREFIX)
    match = re.match(rf"{re.escape(PREFIX)}(\d+)\.(\w+)\.", new or "")
    if match and Unit.of(int(match[1]), OWNERS[match[2]]) in cut.parts:
        return None
    return new


def config_json(checkpoint: Checkpoint, cut: Cut) -> dict[str, Any]:
    """The fields of config.json.

    Raises:
        UnsupportedModel: see :func:`write_nemotron_nas`.
    """
    config = checkpoint.config
    if why := _unlike_llama(checkpoint, cut):
        raise UnsupportedModel(
            f"{checkpoint.path} cannot be written as {FORMAT}: {why}; sleb.load(MODEL, plan=PLAN) "
            "runs it in transformers"
        )
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    shared = config.get("num_key_value_heads") or heads
    ratio = 3 * (config["intermediate_size"] - ROUNDED // 4) / (2 * hidden)

    def entry(block: int) -> dict[str, Any]:
        without = {kind: Unit.of(block, kind) in cut.parts for kind in (ATTENTION, MLP)}
        attention = {"n_heads_in_group": None if without[ATTENTION] else heads // shared}
        ffn = {"ffn_mult": None if without[MLP] else ratio}
        return {
            "attention": {"no_op": without[ATTENTION], "replace_with_linear": False, **attention},
            "ffn": {"no_op": without[MLP], "replace_with_linear": False, **ffn},
        }

    more: dict[str, Any] = {"qkv_bias": True} if config["model_type"] == "qwen2" else {}
    rope = dict(config.get("rope_parameters") or {})
    if rope:  # in the words of older readers too
        more["rope_theta"] = rope.pop("rope_theta", 10000.0)
        if rope.get("rope_type", "default") != "default":
            more["rope_scaling"] = rope
    dropped = {"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"}
    return {
        **{key: value for key, value in config.items() if key not in dropped},
        "architectures": ["DeciLMForCausalLM"],
        "model_type": FORMAT,
        "auto_map": {"AutoConfig": f"{Path(CLASS_FILE).stem}.DeciLMConfig"},
        "attention_bias": False,
        **more,
        "num_hidden_layers": len(cut.kept),
        "block_configs": [entry(block) for block in range(len(cut.kept))],
    }


def _unlike_llama(checkpoint: Checkpoint, cut: Cut) -> str:
    """Why the model is no Llama with parts missing; empty if it is one."""
    config = checkpoint.config
    if config.get("model_type") not in TYPES:
        return f"it is Llama's form, and this is a {config.get('model_type')}"
    if config.get("quantization_config"):
        return "quantized weights are not tried"
    if config.get("attention_bias") or config.get("mlp_bias"):
        return "it has biases that the format has not"
    if _windows(config):
        return "some of its blocks have windows"
    if config["intermediate_size"] % ROUNDED:
        return f"the MLP's width is no multiple of {ROUNDED}"
    if Unit.of(0, ATTENTION) in cut.parts:
        return "the first block needs its attention in vLLM"
    if not any(name.startswith(PREFIX) for name in checkpoint.tensors):
        return f"its blocks are not called {PREFIX}"
    odd = [n for n in checkpoint.tensors if n.startswith(PREFIX) and n.split(".")[3] not in OWNERS]
    return f"what becomes of {odd[0]} is not known" if odd else ""


def _windows(config: Mapping[str, Any]) -> bool:
    """Whether any block attends to a window alone."""
    kinds = config.get("layer_types")
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return bool(config.get("sliding_window")) and config.get("use_sliding_window") is not False
