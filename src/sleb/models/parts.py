"""The attention and the MLP of a block, found by structure: two modules, each of which adds what it
computes to the stream. One mixes tokens, the other does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sleb.core.errors import UnsupportedModel
from sleb.core.units import ATTENTION, MLP

MIXES = 1e-3
"""Share of an output that has to change where one token mixes into another."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A module of a block by its name there. ``width``: length of the tuple that it returns, None
    for a bare tensor."""

    name: str
    width: int | None

    def nothing(self, *args: Any, **kwargs: Any) -> Any:
        """What the module would return if it added nothing to the stream, for the same call."""
        zero = torch.zeros_like(_given(args, kwargs))
        return zero if self.width is None else (zero,) + (None,) * (self.width - 1)


class Nothing(nn.Module):
    """In the place of a part: computes nothing, has no weights, and caches no keys and values."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`Part.nothing`."""
        return self.part.nothing(*args, **kwargs)


@dataclass
class _Call:
    """A module's call while its block ran."""

    args: Any
    kwargs: Any
    out: Any
    times: int = 1


def find_parts(where: str, block: nn.Module, run: Callable[[], Tensor]) -> dict[str, Part]:
    """Attention and MLP of ``block``, which ``run()`` runs once, giving its output [1, T, D].
    ``where`` names the block.

    Raises:
        UnsupportedModel: there are not these two and no other modules with matrices, or without
            them the block changes what passes through it.
    """
    children = {
        name: child
        for name, child in block.named_children()
        if any(parameter.dim() > 1 for parameter in child.parameters())
    }
    stream: list[Tensor] = []
    calls = _recorded(block, children, stream, run)
    found: dict[str, Part] = {}
    for name, child in children.items():
        call = calls.get(name)
        if call is None or call.times != 1 or not _adds(call, stream[0]):
            raise _unclear(where, f"{name} is neither")
        kind = ATTENTION if _mixes(child, call) else MLP
        if kind in found:
            raise _unclear(where, f"{found[kind].name} and {name} are both {kind}")
        width = None if isinstance(call.out, Tensor) else len(call.out)
        found[kind] = Part(name=name, width=width)
    if len(found) < 2:
        raise _unclear(where, f"it has {', '.join(found) or 'neither'}")
    if not _passes(block, found, stream[0], run):
        raise UnsupportedModel(
            f"{where} without its attention and MLP does not pass on what it is given, so neither "
            "can be removed alone: use --unit block"
        )
    return found


def _unclear(where: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{where} is not made of one attention and one MLP ({why}): use --unit block"
    )


def _recorded(
    block: nn.Module, children: dict[str, nn.Module], stream: list[Tensor], run: Callable[[], Any]
) -> dict[str, _Call]:
    """The children's calls in a run of the block; ``stream`` gets what the block is given."""
    calls: dict[str, _Call] = {}

    def keep(name: str, args: Any, kwargs: Any, out: Any) -> None:
        times = calls[name].times + 1 if name in calls else 1
        calls[name] = _Call(args=args, kwargs=kwargs, out=out, times=times)

    handles = [
        child.register_forward_hook(
            lambda _, args, kwargs, out, name=name: keep(name, args, kwargs, out), with_kwargs=True
        )
        for name, child in children.items()
    ]
    handles.append(
        block.register_forward_pre_hook(
            lambda _, args, kwargs: stream.append(_given(args, kwargs)), with_kwargs=True
        )
    )
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _given(args: Any, kwargs: Any) -> Tensor:
    """The hidden state among a call's arguments."""
    if "hidden_states" in kwargs:
        found: Tensor = kwargs["hidden_states"]
        return found
    return next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))


def _first(out: Any) -> Any:
    return out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else None


def _adds(call: _Call, stream: Tensor) -> bool:
    """Whether a call's input and output have the shape of the stream."""
    out = _first(call.out)
    return isinstance(out, Tensor) and out.shape == _given(call.args, call.kwargs).shape == (
        stream.shape
    )


def _mixes(child: nn.Module, call: _Call) -> bool:
    """Whether another first token changes the output at the last."""
    given = _given(call.args, call.kwargs)
    other = given.clone()
    other[:, 0] = given[:, 0].flip(-1) + given.float().std().to(given)
    args = tuple(other if x is given else x for x in call.args)
    kwargs = {key: other if x is given else x for key, x in call.kwargs.items()}
    before, after = (_first(out)[:, -1].float() for out in (call.out, child(*args, **kwargs)))
    return bool((after - before).norm() > MIXES * before.norm())


def _passes(
    block: nn.Module, parts: dict[str, Part], stream: Tensor, run: Callable[[], Tensor]
) -> bool:
    """Whether the block without both parts gives back what it is given."""
    own = {part.name: getattr(block, part.name) for part in parts.values()}
    try:
        for part in parts.values():
            setattr(block, part.name, Nothing(part))
        return torch.equal(run(), stream)
    finally:
        for name, module in own.items():
            setattr(block, name, module)
