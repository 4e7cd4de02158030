"""Which matrices of a block write into the residual stream, found by probing the block.

Adding a vector to the output of such a matrix adds that vector, times a constant, to the block's
output (``final``: a Llama's ``down_proj``; attention's output too, where it runs beside the MLP)
or to the stream between attention and MLP (``inner``: ``o_proj``). Whatever else a block does, a
least-squares fit of these matrices is then exact, so no architecture needs a class of its own. A
matrix whose output goes through an RMS norm first (Gemma 2 and 3, OLMo 2) is re-fitted in another
way, see ``normed``. Routed experts have none.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sleb.models.overrides import full_input, whole
from sleb.models.stack import BlockStack

PROBE_TOKENS = 8
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Norm:
    """An RMS norm: it multiplies by its weights plus ``offset``."""

    path: str
    offset: float


@dataclass(frozen=True, kw_only=True)
class ResidualWriters:
    """Modules of one block that add to the stream, by path in the block, and the factor with which
    each does. ``final`` and ``inner`` are matrices that can be re-fitted; ``last`` are the modules
    whose outputs, taken off the block's output, leave the stream between attention and MLP.
    ``norms``: what stands between some of these matrices and the stream."""

    final: Mapping[str, float]
    inner: Mapping[str, float]
    last: Mapping[str, float]
    norms: Mapping[str, Norm]

    @property
    def fitted(self) -> bool:
        """Whether there is anything to re-fit."""
        return bool(self.final or self.inner)


class Outputs:
    """Inputs and outputs of named modules during a forward pass of ``block``."""

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        self.block, self.names = block, names
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.calls: Counter[str] = Counter()

    @contextlib.contextmanager
    def recorded(self) -> Iterator[Outputs]:
        """Record while the context lasts; each pass overwrites the one before."""

        def keep(name: str, args: tuple[Any, ...], output: Any) -> None:
            if args:
                self.inputs[name] = args[0]
            self.outputs[name] = output
            self.calls[name] += 1

        handles = [
            self.block.get_submodule(name).register_forward_hook(
                lambda _, args, output, name=name: keep(name, args, output)
            )
            for name in self.names
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def given(self, name: str) -> Tensor:
        """What a linear module was given [B, T, in], also where processes have only parts of it."""
        return full_input(self.block.get_submodule(name), self.inputs[name])


def weight_of(module: nn.Module) -> Tensor:
    """The matrix [out, in] of a linear module, or the vector of a norm."""
    weight = whole(module.weight)  # type: ignore[arg-type]
    return weight.T if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """What a linear module adds after its product [out]; None without it."""
    bias: Tensor | None = getattr(module, "bias", None)  # some norms have not even the name
    return None if bias is None else whole(bias)


@contextlib.contextmanager
def _computing_in_float32(block: nn.Module) -> Iterator[None]:
    """A block with its weights in float32. (A copy of it would have the hooks of accelerate, with
    all that they fetch from, and the original's tensor parallelism.)"""
    slots: list[dict[str, Any]] = []
    for module in block.modules():
        slots += [module._parameters, module._buffers]
    before = [(slot, name, x) for slot in slots for name, x in slot.items() if x is not None]
    try:
        with torch.inference_mode(False), torch.no_grad():  # in which no DTensor can be a Parameter
            for slot, name, x in before:
                if x.is_floating_point() and x.dtype != torch.float32:
                    new = x.detach().float()
                    slot[name] = nn.Parameter(new, False) if isinstance(x, nn.Parameter) else new
        yield
    finally:
        for slot, name, x in before:
            slot[name] = x


@torch.inference_mode()
def find_residual_writers(
    stack: BlockStack, i: int, without: Collection[int] = ()
) -> ResidualWriters:
    """Probe block ``i`` of ``stack``, in float32, ``without`` parts of it. One that looks at images
    alone has none."""
    if i not in stack.used:
        return ResidualWriters(final={}, inner={}, last={}, norms={})
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(stack.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    length = min(PROBE_TOKENS, stack.max_length or PROBE_TOKENS)
    ids = torch.randint(0, vocabulary, (1, length), generator=generator)
    hidden, calls = stack.enter(ids)
    bypassed = stack.bypassed(without)  # asks for the block's parts in its own dtype
    with bypassed, stack.holding(i), _computing_in_float32(stack.blocks[i]):
        return _probed(stack.blocks[i], hidden.float(), _in_float32(calls[i][:2]), generator)


def _probed(
    block: nn.Module, hidden: Tensor, call: tuple[Any, Any], generator: torch.Generator
) -> ResidualWriters:
    args, kwargs = call

    def run() -> Tensor:
        out = block(hidden.clone(), *args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    names = [n for n, module in block.named_modules() if n and not isinstance(module, nn.Dropout)]
    seen = Outputs(block, names)
    with seen.recorded():
        out = run()
    seen.outputs = {n: x for n, x in seen.outputs.items() if seen.calls[n] == 1 and _fits(x, out)}
    places = list(seen.outputs)
    shift = torch.randn(out.shape, generator=generator).to(out) * out.std()

    def factor(name: str, last: Mapping[str, float]) -> float | None:
        """How many times ``shift``, added to a module's output, shows in the stream; None if it
        shows in another way."""
        recorded = Outputs(block, list(last))

        def add(_: nn.Module, args: Any, output: Any) -> Any:
            return output + shift.view(output.shape)

        before = stream_before(out, seen, last)
        handle = block.get_submodule(name).register_forward_hook(add)
        try:
            with recorded.recorded():
                moved = run()
        finally:
            handle.remove()
        moved = stream_before(moved, recorded, last) - before
        constant = float((moved * shift).sum() / (shift * shift).sum())
        off = float((moved - constant * shift).norm() / shift.norm())
        shows = abs(constant) > TOLERANCE and off < TOLERANCE * abs(constant)
        return round(constant, 5) if shows else None

    adding = {n: c for n in places if (c := factor(n, {})) is not None}
    # of modules within each other, the innermost: what a whole MLP adds may hold the stream itself
    last = {n: c for n, c in adding.items() if not any(m.startswith(n + ".") for m in adding)}
    norms = {n: found for n in places if (found := _normed(block, n, seen)) is not None}
    behind = {norm.path: matrix for matrix, norm in norms.items()}
    inner = {
        behind.get(n, n): c
        for n in places
        if n not in last
        and (n in behind or _linear(block, n))
        and (c := factor(n, last)) is not None
    }
    final = {behind.get(n, n): c for n, c in last.items() if n in behind or _linear(block, n)}
    return ResidualWriters(
        final=final,
        inner=inner,
        last=last,
        norms={n: norm for n, norm in norms.items() if n in final or n in inner},
    )


def stream_before(out: Tensor, seen: Outputs, last: Mapping[str, float]) -> Tensor:
    """The stream [B, T, D] between attention and MLP: a block's output without what the modules
    ``last`` have added to it."""
    for name, factor in last.items():
        out = out - factor * seen.outputs[name].view(out.shape)
    return out


def _normed(block: nn.Module, matrix: str, seen: Outputs) -> Norm | None:
    """The RMS norm that the output of a matrix goes through, if it does."""
    if not _linear(block, matrix):
        return None
    x = seen.outputs[matrix]
    for name, y in seen.outputs.items():
        given, module = seen.inputs.get(name), block.get_submodule(name)
        weight = getattr(module, "weight", None)
        if name == matrix or not isinstance(weight, Tensor) or weight.shape != x.shape[-1:]:
            continue
        weight = whole(weight)
        if given is None or given.shape != x.shape or not torch.equal(given, x):
            continue
        eps: float = getattr(module, "eps", getattr(module, "variance_epsilon", None)) or 0.0
        unit = (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(0, -2)
        flat = y.flatten(0, -2)
        gain = (flat * unit).sum(0) / unit.square().sum(0)
        for offset in (0.0, 1.0):
            alike = (gain - weight - offset).norm() < TOLERANCE * gain.norm()
            if alike and (flat - gain * unit).norm() < TOLERANCE * flat.norm():
                return Norm(path=name, offset=offset)
    return None


def _fits(output: Any, stream: Tensor) -> bool:
    return (
        isinstance(output, Tensor)
        and output.numel() == stream.numel()
        and output.shape[-1] == stream.shape[-1]
    )


def _linear(block: nn.Module, name: str) -> bool:
    return isinstance(block.get_submodule(name), (nn.Linear, Conv1D))


def _in_float32(value: Any) -> Any:
    """The same arguments with every floating-point tensor in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _in_float32(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_in_float32(item) for item in value)
    return value
