"""The model that is trained: which of its weights, as what they are stored, and how they are put
back into a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from sleb.checkpoints.checkpoint import TORCH_DTYPES, Checkpoint
from sleb.core.errors import InputError, UnsupportedModel
from sleb.models.stack import BlockStack

__all__ = ["Student", "check_adapters", "recomputed"]


class Student:
    """``model``, loaded from ``checkpoint``, with what is to be trained set to be.

    Without ``rank`` that is every weight of the blocks, and of the norms outside of them. The
    embedding and the head stay, tied or not. With ``rank``, low-rank adapters (LoRA, 2106.09685) of
    all linear layers of the blocks are trained instead, and merged at the end.

    Raises:
        UnsupportedModel: a weight is quantized, or stored under a name that is not its own.
    """

    def __init__(
        self, model: nn.Module, checkpoint: Checkpoint, *, rank: int | None, seed: int
    ) -> None:
        self.model, self.checkpoint = model, checkpoint
        stack = BlockStack(model)
        prefix = checkpoint.block_prefix(len(stack), stack.path)
        parts = {name: p for name, p in model.named_parameters() if _trained(name, p, stack)}
        self.names = {name: self._stored(name, p, stack.path, prefix) for name, p in parts.items()}
        self._adapted: Any = None
        if rank is None:
            model.requires_grad_(False)
            for parameter in parts.values():
                parameter.requires_grad_(True)
        else:
            self._adapted = _adapters(model, stack, rank, seed)
        self.trained: dict[str, nn.Parameter] = {
            name: p for name, p in model.named_parameters() if p.requires_grad
        }

    def _stored(self, name: str, parameter: Tensor, path: str, prefix: str) -> str:
        """The parameter's name in the checkpoint, whose modules may have other parents."""
        there, here = (p.rstrip(".").rpartition(".")[0] for p in (prefix, path))
        rest = name.removeprefix(here).lstrip(".") if here else name
        candidates = (name, f"{there}.{rest}" if there else rest)
        known = next((c for c in candidates if c in self.checkpoint.tensors), None)
        if known is None:
            raise UnsupportedModel(
                f"{name} has another name in {self.checkpoint.path}, so it cannot be healed"
            )
        info = self.checkpoint.tensors[known]
        if info.dtype not in TORCH_DTYPES or info.shape != tuple(parameter.shape):
            raise UnsupportedModel(
                f"{known} is stored as {info.dtype} {list(info.shape)}: heal a model before it is "
                "quantized"
            )
        return known

    def finish(self) -> dict[str, Tensor]:
        """Merge adapters, round the weights to what they are stored as, in place, and return them
        by their names in the checkpoint. Nothing can be trained after that."""
        if self._adapted is not None:
            device = BlockStack(self.model).input_device
            self.model.to("cpu", torch.float32)  # sums in float32, and where there is room
            self._adapted.merge_and_unload()
            self.model.to(device)
        found = {}
        with torch.no_grad():
            parameters = dict(self.model.named_parameters())
            for name, known in self.names.items():
                dtype = getattr(torch, TORCH_DTYPES[self.checkpoint.tensors[known].dtype])
                rounded = parameters[name].to(dtype)
                parameters[name].copy_(rounded)
                found[known] = rounded.cpu()
        return found


def _trained(name: str, parameter: Tensor, stack: BlockStack) -> bool:
    if name.startswith(f"{stack.path}."):
        if not parameter.is_floating_point():
            raise UnsupportedModel(f"{name} is quantized: heal a model before it is quantized")
        return True
    ends = (stack.model.get_input_embeddings(), stack.model.get_output_embeddings())  # type: ignore[operator]
    fixed = {id(p) for module in ends if module is not None for p in module.parameters()}
    return parameter.dim() == 1 and id(parameter) not in fixed


def check_adapters() -> None:
    """Raise InputError unless LoRA is installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError("--lora needs PEFT; install it with: pip install 'sleb[heal]'") from None


def _adapters(model: nn.Module, stack: BlockStack, rank: int, seed: int) -> Any:
    """PEFT's wrapper of ``model``, whose linear layers it replaces in place."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    linear = [
        f"{stack.path}.{name}"
        for name, module in stack.blocks.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, lora_dropout=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


@contextlib.contextmanager
def recomputed(stack: BlockStack, wanted: bool) -> Iterator[None]:
    """While this is open, a block keeps only its input for the backward pass, and runs twice."""
    before = {block: vars(block).get("forward") for block in stack.blocks if wanted}
    try:
        for block in before:
            block.forward = partial(recompute, block.forward, use_reentrant=False)
        yield
    finally:
        for block, old in before.items():
            del block.forward
            if old is not None:
                block.forward = old
