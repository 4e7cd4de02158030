"""The weights of a model cut by a plan, read from the original's own files: no copy on disk."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from sleb.checkpoints.checkpoint import (
    Checkpoint,
    check_fingerprint,
    fingerprint,
    identity,
)
from sleb.checkpoints.cut import Cut
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.plan import Plan
from sleb.core.progress import Progress
from sleb.models.pruned_config import check_structure, pruned_config
from sleb.models.source import ModelSource
from sleb.models.stack import BlockStack, decoder_config

__all__ = ["weights_from_plan"]


def weights_from_plan(
    source: ModelSource,
    config: Any,
    plan: Plan,
    *,
    depth: int | None,
    repaired: str | Path | None,
    check: bool,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The cut model without weights (on the meta device), and its tensors by the names that they
    would have in its checkpoint: on the CPU, mapped from the files that ``source`` has.

    Arguments are those of :func:`sleb.load`.

    Raises:
        InputError: the plan is for another model, ``depth`` is outside it, or the repaired tensors
            are not at hand.
        UnsupportedModel: this model cannot be cut exactly, or its weights are quantized.
    """
    from sleb.models.load import empty_model

    checkpoint = Checkpoint.open(source.path)
    if checkpoint.config.get("quantization_config"):
        raise UnsupportedModel(
            f"{source.ref} is quantized, and is not cut while it loads: write a checkpoint with "
            "sleb apply and load that"
        )
    cut = Cut.of(plan, depth, repaired)
    if cut.record and cut.record.tensors and cut.repair is None:
        raise InputError(
            "the plan is of a repaired cut, and has only the hashes of the repaired tensors: give "
            "repaired=FOLDER, the checkpoint that was written with it, or a smaller depth"
        )
    n = decoder_config(config).num_hidden_layers
    if check:
        with progress.stage("checking the model against the plan", checkpoint.nbytes) as tick:
            found = fingerprint(checkpoint, n, tick)
    else:
        unread = {"weights_sha256": plan.model.weights_sha256}
        found = identity(checkpoint, n, {}).model_copy(update=unread)
    check_fingerprint(plan.model, found, source.ref)

    stack = BlockStack(empty_model(config, trust_remote_code=trust_remote_code))
    empty = empty_model(pruned_config(config, cut.removed), trust_remote_code=trust_remote_code)
    check_structure(stack, cut.kept, empty)
    prefix, others = checkpoint.block_prefix(n, stack.path), cut.repair or {}
    names = {old: new for old in checkpoint.tensors if (new := cut.rename(old, prefix)) is not None}
    with ExitStack() as opened:
        files = {
            shard: opened.enter_context(safe_open(source.path / shard, framework="pt"))
            for shard in {checkpoint.tensors[name].shard for name in names}
        }
        tensors = {
            new: others[name] if name in others else files[shard].get_tensor(name)
            for name, new in names.items()
            if (shard := checkpoint.tensors[name].shard)
        }
    return empty, tensors
