"""Cut blocks out of a checkpoint on disk, shard by shard, without loading the model.

Tensor bytes are copied, never decoded, so every dtype survives and memory stays at one buffer.
Block ids in names are renumbered, the index and the config are rewritten, and everything else that
belongs to the model (tokenizer, chat template, generation config, licence) is carried over.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
import struct
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb.checkpoint import INDEX, SINGLE, Checkpoint, fingerprint, tensor_bytes
from sleb.depthfields import depth_fields, reindex
from sleb.errors import InputError, UnsupportedModel
from sleb.files import enough_space, staged_dir
from sleb.models.source import resolve
from sleb.plan import Fingerprint, Plan
from sleb.progress import Progress, Tick, silent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sleb.models.stack import BlockStack
    from sleb.repair import Repair

__all__ = ["apply", "cut_checkpoint", "pruned_config", "renamer"]

logger = logging.getLogger(__name__)

# Weights in other formats describe the uncut model, and must not travel with the cut one.
_OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|gguf|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|tflite|ot)|.*\.index\.json"
)
# params.json is the config, number of blocks included, of another format
_SKIPPED_FILES = frozenset({"config.json", "params.json", "README.md", "plan.json", "run.json"})


def apply(
    plan: Plan,
    model: str | Path,
    out: str | Path,
    *,
    depth: int | None = None,
    repair: Repair | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    finish: Callable[[Path], None] | None = None,
    progress: Progress = silent,
) -> Path:
    """Write the model cut by ``plan`` (by its first ``depth`` removals) as a new checkpoint.

    ``finish(stage)`` may add files to the staging folder before it becomes ``out``; if it raises,
    nothing is written. ``out`` gets the plan as far as it was used. The source is only read. No
    tensor is held in memory, only a few buffers of 2 MiB and what ``repair`` has changed.

    Raises:
        InputError: the plan is for another model, ``depth`` is outside the plan, ``repair`` is of
            another cut, ``out`` exists.
        UnsupportedModel: this model cannot be cut exactly.
        DataError: the source is corrupt.
        ResourceError: the disk is full.
    """
    from sleb.models.load import load_config
    from sleb.models.stack import decoder_config

    out = Path(out)
    removed = plan.at_depth(depth)
    used = plan.model_copy(
        update={
            "removed": removed,
            "order": plan.order[: len(removed)],
            "repair": repair.record if repair else None,
        }
    )
    if repair and repair.record.removed != removed:
        raise InputError(
            f"the repair is of a cut of blocks {list(repair.record.removed)}, and this one is of "
            f"{list(removed)}"
        )
    source = resolve(model, progress)
    refuse_source(out, source.path)
    with staged_dir(out, force=force) as stage:
        checkpoint = Checkpoint.open(source.path)
        config = load_config(source.path, trust_remote_code=trust_remote_code)
        blocks = decoder_config(config).num_hidden_layers
        with progress.stage("checking the model against the plan", checkpoint.nbytes) as tick:
            check_fingerprint(plan.model, fingerprint(checkpoint, blocks, tick), source.ref)
        cut_checkpoint(
            checkpoint,
            removed,
            stage,
            replaced=repair.tensors if repair else None,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        (stage / "plan.json").write_text(used.to_json(), encoding="utf-8")
        if finish:
            finish(stage)
    return out


def refuse_source(out: Path, source: Path) -> None:
    """Raise InputError if replacing ``out`` would replace the model in ``source``."""
    if source.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out} is the model itself, or holds it; choose another -o")


def check_fingerprint(expected: Fingerprint, found: Fingerprint, ref: str) -> None:
    """Raise InputError, naming the difference, unless the two are the same checkpoint."""
    if expected == found:
        return
    for name in ("model_type", "blocks", "weights_sha256", "config_sha256"):
        a, b = getattr(expected, name), getattr(found, name)
        if a != b:
            a, b = (str(v)[:12] + "…" if name.endswith("sha256") else v for v in (a, b))
            raise InputError(
                f"the plan was made for another model: {name} is {a} in the plan and {b} in {ref}; "
                "search again on this model"
            )


def cut_checkpoint(
    checkpoint: Checkpoint,
    removed: Collection[int],
    stage: Path,
    *,
    replaced: Mapping[str, Tensor] | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> None:
    """Write ``checkpoint`` without the blocks ``removed``, and with the tensors ``replaced`` by
    others of the same dtype and shape, into the folder ``stage``."""
    from sleb.models.load import empty_model, load_config
    from sleb.models.stack import BlockStack, decoder_config

    config = load_config(checkpoint.path, trust_remote_code=trust_remote_code)
    stack = BlockStack(empty_model(config, trust_remote_code=trust_remote_code))
    n = decoder_config(config).num_hidden_layers
    cut = pruned_config(config, removed)
    kept = [i for i in range(n) if i not in set(removed)]
    _check_structure(stack, kept, empty_model(cut, trust_remote_code=trust_remote_code))
    rename = renamer(checkpoint.block_prefix(n, stack.path), removed)
    _refuse_block_names(checkpoint.config.get("quantization_config"), stack.path)

    names = {name: new for name in checkpoint.tensors if (new := rename(name)) is not None}
    kept_bytes = sum(checkpoint.tensors[name].nbytes for name in names)
    enough_space(stage.parent, kept_bytes)
    with progress.stage("writing the checkpoint", kept_bytes) as tick:
        _write_shards(checkpoint, names, replaced or {}, stage, tick)
    cut.save_pretrained(stage)
    for path in sorted(checkpoint.path.iterdir()):
        _carry(path, stage)


def pruned_config(config: Any, removed: Collection[int]) -> Any:
    """A transformers config re-indexed for the model without ``removed``; the given one unchanged.

    Raises:
        UnsupportedModel: a depth-dependent field cannot follow this cut.
    """
    from sleb.models.stack import decoder_config

    text = decoder_config(config)
    n = text.num_hidden_layers
    kept = [i for i in range(n) if i not in set(removed)]
    field = (getattr(text, "attribute_map", None) or {}).get(
        "num_hidden_layers", "num_hidden_layers"
    )
    fields = text.to_dict()
    new_text = reindex(fields, kept, n, field)
    changed = {k: v for k, v in new_text.items() if k not in fields or fields[k] != v}
    # what transformers writes to config.json; some types (dbrx) refuse to read all of to_dict()
    new = config.to_diff_dict()
    if text is config:
        new.update(changed)
    else:
        key = next(k for k in config.sub_configs if getattr(config, k, None) is text)
        new[key] = {**new.get(key, {}), **changed}
    try:
        cut = type(config).from_dict(copy.deepcopy(new))
    except Exception as error:  # transformers validates with several exception types
        raise UnsupportedModel(
            f"transformers refuses the config of this cut: {' '.join(str(error).split())}"
        ) from error
    check = decoder_config(cut)
    if check.num_hidden_layers != len(kept):
        raise UnsupportedModel(f"config field `{field}` does not set the number of blocks")
    read_back = check.to_dict()
    for name in (known.name for known in depth_fields(new_text, len(kept))):
        if read_back.get(name) != new_text[name]:
            raise UnsupportedModel(
                f"transformers does not accept config field `{name}` = {new_text[name]!r} for this "
                f"cut: it becomes {read_back.get(name)!r}"
            )
    return cut


def _check_structure(stack: BlockStack, kept: list[int], cut: nn.Module) -> None:
    """Raise UnsupportedModel unless each kept block is built alike in the cut model: some models
    build the first or the last place differently (rwkv, gpt_neox_japanese)."""
    from sleb.models.stack import BlockStack

    for old, block in zip(kept, BlockStack(cut).blocks, strict=True):
        before, after = (
            {name: tuple(tensor.shape) for name, tensor in b.state_dict().items()}
            for b in (stack.blocks[old], block)
        )
        if different := sorted(dict(before.items() ^ after.items())):
            raise UnsupportedModel(
                f"block {old} would move to a place where {stack.name} builds blocks differently "
                f"({different[0]}): protect the block that has this place now"
            )


def renamer(prefix: str, removed: Collection[int]) -> Callable[[str], str | None]:
    """New name of a tensor, or None if it goes. Blocks numbered past the last (multi-token
    prediction) move down by the number removed."""
    gone = frozenset(removed)

    def rename(name: str) -> str | None:
        if not name.startswith(prefix):
            return name
        match = re.match(r"(\d+)(\..*)", name[len(prefix) :])
        if not match:
            return name
        block = int(match[1])
        if block in gone:
            return None
        return f"{prefix}{block - sum(b < block for b in gone)}{match[2]}"

    return rename


def _write_shards(
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
        members.sort(
            key=lambda name: (-checkpoint.tensors[name].width, checkpoint.tensors[name].start)
        )
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
    header: dict[str, Any] = {"__metadata__": checkpoint.metadata[shard] or {"format": "pt"}}
    offset = 0
    for old, new in names.items():
        info = checkpoint.tensors[old]
        header[new] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the format aligns tensor data to 8 bytes
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        for old in names:
            own = replaced.get(old)
            for piece in checkpoint.chunks(old) if own is None else [tensor_bytes(own)]:
                stream.write(piece)
                tick(len(piece))


def _carry(path: Path, stage: Path) -> None:
    """Copy what belongs to the model but is not weights, config or an earlier card."""
    if path.name.startswith(".") or _OTHER_WEIGHTS.fullmatch(path.name):
        return
    if path.is_file() and path.name not in _SKIPPED_FILES:
        shutil.copyfile(path, stage / path.name)
    elif path.is_dir() and path.name == "additional_chat_templates":
        shutil.copytree(path, stage / path.name, symlinks=False)
    elif path.is_dir():
        logger.info("not carried over: folder %s", path)


def _refuse_block_names(quantization: Any, path: str) -> None:
    """Refuse a quantization config that names single blocks: they would be the wrong ones."""
    last = path.rpartition(".")[2]
    if found := re.search(
        rf"[\w.]*\b{re.escape(last)}\\?\.\d+[\w.]*", json.dumps(quantization or {})
    ):
        raise UnsupportedModel(
            f"quantization_config names single blocks ({found[0]}), which sleb does not renumber "
            "yet: cut the model before quantizing it"
        )
