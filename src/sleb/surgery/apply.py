"""Cut blocks out of a checkpoint on disk, shard by shard, without loading the model.

Tensor bytes are copied, never decoded, so every dtype survives and memory stays at one buffer.
Block ids in names are renumbered, the index and the config are rewritten, and everything else that
belongs to the model (tokenizer, chat template, generation config, licence) is carried over.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb.checkpoints.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    check_fingerprint,
    identity,
    shard_head,
    tensor_bytes,
    tensor_lines,
)
from sleb.checkpoints.checksums import write_sums
from sleb.checkpoints.cut import Cut
from sleb.config import WriteConfig, takes
from sleb.core.card import cut_card, rebuilt
from sleb.core.errors import InputError
from sleb.core.files import enough_space, staged_dir
from sleb.core.plan import Plan
from sleb.core.progress import Progress, Tick, silent
from sleb.models.load import empty_model, load_config
from sleb.models.pruned_config import (
    both_spellings,
    check_structure,
    pruned_config,
    pruned_json,
    write_json,
)
from sleb.models.quantization_names import renumber_metadata, renumber_quantization
from sleb.models.source import resolve
from sleb.models.stack import BlockStack, decoder_config
from sleb.models.stored_names import block_prefix
from sleb.surgery.rollback_keep import keep_original
from sleb.surgery.rollback_manifest import FOLDER, REWRITTEN, Written

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# Weights in other formats describe the uncut model, and must not travel with the cut one.
_OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|gguf|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|tflite|ot)|.*\.index\.json"
)


@takes(WriteConfig)
def apply(
    plan: Plan,
    model: str | Path,
    out: str | Path,
    config: WriteConfig,
    *,
    cut: Cut | None = None,
    finish: Callable[[Path], None] | None = None,
    progress: Progress = silent,
) -> Path:
    """Write a ``cut`` of ``plan``, by default the whole, of ``model`` as a new checkpoint.

    ``finish(stage)`` may add files to the staging folder before it becomes ``out``; if it raises,
    nothing is written. ``out`` gets the plan as far as it was used, a model card unless ``finish``
    has written one, and the checksums of its files. The source is only read. No
    tensor is held in memory, only a few buffers of 2 MiB and what the repair has changed.

    With ``config.keep``, ``out`` also gets what :func:`sleb.restore` rebuilds the original from:
    the folder rollback/, with the removed blocks and all else that the cut changed or left out.

    Raises:
        InputError: the plan is for another model, tensors of its repair lack, ``out`` exists.
        UnsupportedModel: this model cannot be cut exactly.
        DataError: the source is corrupt.
        ResourceError: the disk is full.
    """
    out = Path(out)
    cut = cut or Cut.of(plan)
    cut.check_whole("give a cut with these, or one without_repair()")
    used = cut.used(plan)
    source = resolve(model, progress)
    refuse_source(out, source.path)
    with staged_dir(out, force=config.force) as stage:
        checkpoint = Checkpoint.open(source.path)
        fields = load_config(source.path, trust_remote_code=config.trust_remote_code)
        blocks = decoder_config(fields).num_hidden_layers
        with progress.stage("checking the model against the plan", checkpoint.nbytes) as tick:
            lines = tensor_lines(checkpoint, tick)
        check_fingerprint(plan.model, identity(checkpoint, blocks, lines), source.ref)
        cut_checkpoint(
            checkpoint,
            cut,
            stage,
            used=used,
            lines=lines if config.keep else None,
            spell_both=source.is_gguf,
            trust_remote_code=config.trust_remote_code,
            progress=progress,
        )
        if finish:
            finish(stage)
        if not (stage / "README.md").exists():
            how = "Written by `sleb apply`."
            card = cut_card(
                used,
                source.path,
                how=how,
                kept=rebuilt(config.keep, gguf=source.is_gguf),
                model=source.ref,
            )
            (stage / "README.md").write_text(card, encoding="utf-8")
        write_sums(stage, progress)
    return out


def refuse_source(out: Path, source: Path) -> None:
    """Raise InputError if replacing ``out`` would replace the model in ``source``."""
    if source.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out} is the model itself, or holds it; choose another -o")


def cut_checkpoint(
    checkpoint: Checkpoint,
    cut: Cut,
    stage: Path,
    *,
    used: Plan | None = None,
    lines: Mapping[str, str] | None = None,
    spell_both: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> None:
    """Write the ``cut`` of ``checkpoint``, whose repaired tensors have the dtypes and shapes of the
    original's, into the folder ``stage``; with the plan as far as it was ``used``, and with the
    checkpoint's :func:`tensor_lines` also what is needed to restore it. ``spell_both``: see
    :func:`sleb.models.pruned_config.both_spellings`."""
    config = load_config(checkpoint.path, trust_remote_code=trust_remote_code)
    stack = BlockStack(empty_model(config, trust_remote_code=trust_remote_code))
    after = pruned_config(config, cut.removed)
    check_structure(stack, cut.kept, empty_model(after, trust_remote_code=trust_remote_code))
    prefix = block_prefix(checkpoint, stack)
    fields = cut_config(checkpoint, stack, cut, config, after)
    if spell_both:
        fields = both_spellings(fields, after)

    def rename(name: str) -> str | None:
        return cut.rename(name, prefix)

    metadata = {shard: renumber_metadata(m, rename) for shard, m in checkpoint.metadata.items()}
    renumbered = replace(checkpoint, metadata=metadata)
    names = {name: new for name in checkpoint.tensors if (new := rename(name)) is not None}
    kept_bytes = sum(checkpoint.tensors[name].nbytes for name in names)
    replaced = cut.repair or {}
    gone = set(checkpoint.tensors).difference(names).union(replaced) if lines else ()
    spared = sum(checkpoint.tensors[name].nbytes for name in gone)
    enough_space(stage.parent, kept_bytes + spared)
    with progress.stage("writing the checkpoint", kept_bytes) as tick:
        write_shards(renumbered, names, replaced, stage, tick)
    write_json(fields, checkpoint.path / "config.json", stage / "config.json")
    carried = [name for path in sorted(checkpoint.path.iterdir()) for name in carry(path, stage)]
    if used is None:
        return
    (stage / "plan.json").write_text(used.to_json(), encoding="utf-8")
    if lines is not None:
        done = Written(prefix=prefix, names=names, replaced=frozenset(replaced), carried=carried)
        keep_original(checkpoint, done, used, lines, stage, progress)


def write_shards(
    checkpoint: Checkpoint,
    names: dict[str, str],
    replaced: Mapping[str, Tensor],
    stage: Path,
    tick: Tick,
) -> None:
    """Copy the tensors ``names`` (old to new) into shards of ``stage``; write the index."""
    by_shard: dict[str, list[str]] = {}
    for name in names:
        by_shard.setdefault(checkpoint.tensors[name].shard, []).append(name)
    total = len(by_shard)
    weight_map = {}
    for i, (shard, members) in enumerate(sorted(by_shard.items()), 1):
        target = SINGLE if total == 1 else f"model-{i:05d}-of-{total:05d}.safetensors"
        # wide elements first, as safetensors' own writer does: every tensor stays aligned
        members.sort(key=lambda name: -checkpoint.tensors[name].width)
        own = {m: names[m] for m in members}
        _write_shard(checkpoint, own, replaced, stage / target, shard, tick)
        weight_map.update({names[m]: target for m in members})
    if total > 1:
        size = sum(checkpoint.tensors[name].nbytes for name in names)
        params = sum(checkpoint.tensors[name].numel for name in names)
        index = {
            "metadata": {"total_size": size, "total_parameters": params},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (stage / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    checkpoint: Checkpoint,
    names: dict[str, str],
    replaced: Mapping[str, Tensor],
    path: Path,
    shard: str,
    tick: Tick,
) -> None:
    tensors = {new: checkpoint.tensors[old] for old, new in names.items()}
    with open(path, "wb") as stream:
        stream.write(shard_head(tensors, checkpoint.metadata[shard]))
        for old in names:
            own = replaced.get(old)
            for piece in checkpoint.chunks(old) if own is None else [tensor_bytes(own)]:
                stream.write(piece)
                tick(len(piece))


def carry(path: Path, stage: Path) -> list[str]:
    """Copy what belongs to the model but is not weights, config or an earlier card; the names of
    the files, relative to the folder."""
    if path.name.startswith(".") or _OTHER_WEIGHTS.fullmatch(path.name):
        return []
    if path.is_file() and path.name not in REWRITTEN:
        shutil.copyfile(path, stage / path.name)
        return [path.name]
    if path.is_dir() and path.name == "additional_chat_templates":
        shutil.copytree(path, stage / path.name, symlinks=False)
        copies = (stage / path.name).rglob("*")
        return sorted(copy.relative_to(stage).as_posix() for copy in copies if copy.is_file())
    if path.is_dir() and path.name != FOLDER:
        logger.info("not carried over: folder %s", path)
    return []


def cut_config(
    checkpoint: Checkpoint, stack: BlockStack, cut: Cut, config: Any, after: Any
) -> dict[str, Any]:
    """config.json of the ``cut`` of ``checkpoint``. ``config``: what transformers reads of the
    checkpoint's, ``after``: the same, cut; ``stack``: of the uncut model, with or without weights.

    Raises:
        UnsupportedModel: a field cannot follow the cut exactly.
    """
    fields = pruned_json(checkpoint.config, config, after, cut.removed)
    if cut.removed and (quantization := fields.get("quantization_config")):
        prefix = block_prefix(checkpoint, stack)
        fields["quantization_config"] = _renumbered(quantization, checkpoint, stack, prefix, cut)
    return fields


def _renumbered(
    quantization: Mapping[str, Any],
    checkpoint: Checkpoint,
    stack: BlockStack,
    prefix: str,
    cut: Cut,
) -> dict[str, Any]:
    """The quantization config after the cut. It names modules as the model has them, or as the
    tensors are named on disk."""
    paths = {f"{stack.path}.", prefix}
    names = {name for name, _ in stack.model.named_modules()}
    names |= {name.rpartition(".")[0] for name in checkpoint.tensors}

    def rename(name: str) -> str | None:
        for path in paths:
            if name.startswith(path):
                new = cut.rename(f"{name}.", path)  # a block itself has nothing behind it
                return None if new is None else new[:-1]
        return name

    return renumber_quantization(quantization, names, stack.path, rename)
