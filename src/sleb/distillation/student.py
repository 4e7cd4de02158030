"""Which weights are trained, in what precision, and by which optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from sleb.checkpoints.checkpoint import TORCH_DTYPES, Checkpoint
from sleb.config import Optimizer
from sleb.core.errors import InputError, UnsupportedModel
from sleb.models.stack import BlockStack
from sleb.models.stored_names import block_prefix, pieces

HOST = torch.device("cpu")
DITHER = -1_640_531_527
"""2^32 over the golden ratio, as int32: multiples of it are spread evenly over all numbers."""


class Student:
    """``model``, loaded from ``checkpoint``, with what is to be trained set to require gradients.

    Without ``rank`` that is every weight of the blocks. What stands before and behind them stays,
    and so do towers for images. With ``rank``, low-rank adapters (LoRA, 2106.09685) of all linear
    layers of the blocks are trained instead, and merged at the end.

    ``trained``: what the optimizer changes, float32. Where the model computes in another dtype
    these are copies, which gather the gradients of its parameters (mixed precision, 1710.03740);
    :meth:`rounded` hands what they became back to the model, see :func:`dithered`. With
    ``optimizer`` "adamw-host" they are in the machine's memory; with "adamw-8bit" it changes the
    model's own, in their dtype.

    Raises:
        UnsupportedModel: a weight is quantized, or stored under a name that is not its own.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        *,
        rank: int | None,
        seed: int,
        optimizer: Optimizer = "adamw",
    ) -> None:
        self.model, self.checkpoint, self.rank = model, checkpoint, rank
        stack = BlockStack(model)
        prefix = block_prefix(checkpoint, stack)
        parts = {name: p for name, p in model.named_parameters() if _trained(name, p, stack)}
        there, here = (p.rstrip(".").rpartition(".")[0] for p in (prefix, stack.path))
        self._homes = (f"{here}." if here else "", f"{there}." if there else "")
        self.stored = {name: self._stored(name, p) for name, p in parts.items()}
        self._adapted: Any = None
        if rank is None:
            model.requires_grad_(False)
            for parameter in parts.values():
                parameter.requires_grad_(True)
        else:
            self._adapted = _adapters(model, stack, rank, seed)
        self._computing = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.trained = dict(self._computing)
        if optimizer != "adamw-8bit":
            self.trained = {
                name: self._master(name, p, HOST if optimizer == "adamw-host" else p.device)
                for name, p in self._computing.items()
            }

    def _master(self, name: str, parameter: nn.Parameter, place: torch.device) -> nn.Parameter:
        """The float32 copy of a parameter, in full precision; itself, if it is that and there."""
        if parameter.dtype == torch.float32 and parameter.device == place:
            return parameter
        stored = parameter.detach()
        if len(self.stored.get(name, ())) == 1:  # whose precision may be more
            stored = self.checkpoint.tensor(self.stored[name][0])
        master = nn.Parameter(stored.to(place, torch.float32, copy=True))

        def gather(computed: Tensor) -> None:
            assert computed.grad is not None
            if master.grad is None:
                master.grad = computed.grad.to(place, torch.float32)
            else:
                master.grad += computed.grad.to(place)
            computed.grad = None

        parameter.register_post_accumulate_grad_hook(gather)  # type: ignore[no-untyped-call]
        return master

    @torch.no_grad()
    def rounded(self) -> None:
        """Give the model the trained weights, in its own dtype."""
        for name, parameter in self._computing.items():
            if (master := self.trained[name]) is not parameter:
                parameter.copy_(dithered(master.to(parameter.device), parameter.dtype))

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Set what is trained, or some of it."""
        for name, weight in weights.items():
            self.trained[name].copy_(weight)
        self.rounded()

    @property
    def count(self) -> int:
        """Parameters that are trained."""
        return sum(p.numel() for p in self.trained.values())

    def _pieces(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A parameter's tensor by names in the checkpoint, whose modules may have other parents."""
        here, there = self._homes
        for known in (name, there + name.removeprefix(here)):
            if known in self.checkpoint.tensors:
                return {known: tensor}
        return pieces(self.model, name, tensor)

    def _stored(self, name: str, parameter: Tensor) -> tuple[str, ...]:
        """The names of a parameter's pieces."""
        found = self._pieces(name, parameter.detach().to("meta"))
        for known, piece in found.items():
            if known not in self.checkpoint.tensors:
                raise UnsupportedModel(
                    f"{name} has another name in {self.checkpoint.path}, so it cannot be healed"
                )
            info = self.checkpoint.tensors[known]
            if info.dtype not in TORCH_DTYPES or info.shape != tuple(piece.shape):
                raise UnsupportedModel(
                    f"{known} is stored as {info.dtype} {list(info.shape)}: heal a model before it "
                    "is quantized"
                )
        return tuple(found)

    def finish(self) -> dict[str, Tensor]:
        """Merge adapters, round the weights to what they are stored as, in place, and return them
        by their names in the checkpoint. Nothing can be trained after that."""
        if self._adapted is not None:
            device = BlockStack(self.model).input_device
            self.model.to("cpu", torch.float32)  # sums in float32, and where there is room
            self._adapted.merge_and_unload()
            self.model.to(device)
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            parameters = dict(self.model.named_parameters())
            for name, (known, *_) in self.stored.items():
                dtype = getattr(torch, TORCH_DTYPES[self.checkpoint.tensors[known].dtype])
                rounded = dithered(self.trained.get(name, parameters[name]), dtype)
                parameters[name].copy_(rounded)
                stored = self._pieces(name, rounded.cpu())
                found |= {each: piece.contiguous() for each, piece in stored.items()}
        return found


def dithered(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in ``dtype``; from float32 to bfloat16 it goes up or down, each weight from a
    point of its own, which are spread evenly. So the mean of many moves as far as they do. To the
    nearest number none would: a step of training is much smaller than half of what lies between two
    numbers, and the weights of a checkpoint are all at one.
    """
    if (weight.dtype, dtype) != (torch.float32, torch.bfloat16):
        return weight.to(dtype)
    points = torch.arange(weight.numel(), dtype=torch.int32, device=weight.device) * DITHER
    bits = weight.contiguous().view(torch.int32) + ((points >> 16) & 0xFFFF).view(weight.shape)
    return (bits & ~0xFFFF).view(torch.float32).to(dtype)


def _trained(name: str, parameter: Tensor, stack: BlockStack) -> bool:
    if not name.startswith(f"{stack.path}."):
        return False
    if not parameter.is_floating_point():
        raise UnsupportedModel(f"{name} is quantized: heal a model before it is quantized")
    return True


def check_installed(lora: int | None, optimizer: Optimizer) -> None:
    """Raise InputError unless what these need is installed."""
    needed = {"peft": lora and "--lora", "torchao": optimizer == "adamw-8bit" and "--optimizer"}
    for package, option in needed.items():
        if option and not find_spec(package):
            raise InputError(f"{option} needs {package}; install it with: pip install {package}")


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


def optimizer_of(weights: Iterable[Tensor], kind: Optimizer) -> torch.optim.Optimizer:
    """One that has seen nothing."""
    weights = [*weights]
    how: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    if kind != "adamw-8bit":
        fused = weights[0].device.type == "cuda" or kind == "adamw-host" or None
        return torch.optim.AdamW(weights, fused=fused, **how)
    from torchao.optim import AdamW8bit

    rounding = weights[0].dtype == torch.bfloat16
    found: torch.optim.Optimizer = AdamW8bit(weights, bf16_stochastic_round=rounding, **how)
    return found


def step_at(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """A step at a learning rate. Nothing in it waits for a GPU."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    optimizer.step()
