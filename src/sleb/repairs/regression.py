"""Closed-form re-fit of the matrices around each gap: the stream becomes the dense model's again.

For every gap the last block before it takes over what the missing blocks added, as far as that is
linear in what its matrices see; the ``reach`` blocks after the gap correct what is left. Each fit
is ridge regression towards the original weights on the residual to the dense stream, in float64.
Every token is weighted by the inverse of its mean square, as the next norm will divide by it; else
the few tokens of massive activation would count for all. They may not be left out either: a fit
that has not seen them ruins the attention sink that they are.

A matrix whose output goes through an RMS norm before it is added to the stream needs more: what is
added is g * y / rms(y), with y = W x and the norm's gains g. A change of W turns y, and its length
is divided away again; how much is added is in the gains alone. So both are fitted in turn, to the
residual to the dense stream: W for the directions, by damped gain-weighted ridge regression on
x / rms(y), where rows with small gains, which show little of any change, take little of it; then
each gain by itself.

Related: ReplaceMe (2505.02819), which fits one linear map per gap; here nothing is added, and
shapes and runtime stay those of the plain cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sleb.calibration.windows import unpadded, used_length
from sleb.checkpoints.cut import consecutive_runs
from sleb.core.errors import UnsupportedModel
from sleb.core.process_group import group
from sleb.core.progress import Tick
from sleb.core.units import block_of, canonical, part_of, parts_in, parts_of
from sleb.models.overrides import WeightOverrides, whole
from sleb.models.stack import BlockStack, decoder_config
from sleb.repairs.residual_writers import (
    Outputs,
    ResidualWriters,
    bias_of,
    find_residual_writers,
    stream_before,
    weight_of,
)
from sleb.selection.resources import room_bytes

REACH = 2
ROWS = 8192  # tokens that enter a product at once
ROUNDS = 2  # of a matrix and the norm behind it
DAMPING = 0.1  # of the mean square of a norm's gains
TOKENS = {"cuda": 400_000, "cpu": 100_000}
"""What a fit sees by default, in all: the more, the better (docs/quality.md), and the longer."""
STREAMS = 6
"""Hidden states that a fit holds of each token, at most."""

Rounded = Callable[[int, str, Tensor], Tensor]
"""Gives new values of a block's parameter, by its path, the precision that it is stored with."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Neighbouring units that are removed, and the kept blocks that make up for them, in order."""

    removed: tuple[int, ...]
    blocks: tuple[int, ...]


def gaps(removed: Collection[int], n_blocks: int, reach: int = REACH) -> tuple[Gap, ...]:
    """The gaps of a cut. A run of blocks is made up for from the last block before it on, a part of
    a block from that block on. A kept block belongs to the gap right behind it, else to one before.
    """
    gone = canonical(removed)
    runs = consecutive_runs(unit for unit in gone if not part_of(unit))
    kept = [b for b in range(n_blocks) if b not in gone]
    begun: dict[int, list[int]] = {}  # units by the first block that makes up for them
    for unit in parts_in(gone):
        begun.setdefault(block_of(unit), []).append(unit)
    for start, stop in runs:
        begun.setdefault(start - 1, []).extend(range(start, stop))
    found = []
    for first, units in sorted(begun.items()):
        before = [first] if first >= 0 else []
        after = [b for b in kept if b > block_of(units[-1])][:reach]
        nearer = takewhile(lambda b: b not in begun, after)  # the rest is the next gap's
        found.append(Gap(removed=tuple(units), blocks=(*before, *nearer)))
    return tuple(found)


class Regression:
    """Walks the dense and the cut model side by side over windows of tokens. ids [N, T]; what is
    behind the last token that is ``scored`` [N, T] is padding, and not fitted on.

    Weights of the model change as fits are made; :meth:`restore` puts all of them back. Memory:
    both streams, here and where the gap's fit began, and two targets of one block, [N, T, D] each;
    and the Gram matrix of what the block's widest matrix sees. Of offloaded blocks there are two,
    the one at hand and the next, and a third while the dense stream passes a gap. The fit of a gap
    reads each of its blocks once for each ridge, those in front of it once.

    In a job of several ranks each walks its share of the windows, and Gram matrices are summed.
    Processes that hold a model together solve alike and write their own parts. ``writers``: the
    residual writers that are known already, by block; more are added. ``rounded`` gives new values
    the precision that they are stored with. ``tick(n)`` hears of n block forwards of a window.
    ``dense``: streams of the dense model behind blocks, from fits on the same windows; more are
    added.
    """

    def __init__(
        self,
        stack: BlockStack,
        removed: Collection[int],
        ids: Tensor,
        batch: int,
        writers: dict[tuple[int, ...], ResidualWriters] | None = None,
        rounded: Rounded = lambda block, path, new: new,
        *,
        scored: Tensor | None = None,
        dense: dict[int, list[Tensor]] | None = None,
    ) -> None:
        self.stack, self.removed, self.rounded = stack, frozenset(canonical(removed)), rounded
        self.tick: Tick = lambda n, note="": None
        here = group()
        mine = slice(len(ids) * here.rank // here.size, len(ids) * (here.rank + 1) // here.size)
        self.parts = torch.split(ids[mine], batch) if len(ids[mine]) else ()
        self.real: list[Any] = [None] * len(self.parts)  # which tokens are no padding, [B, T]
        if scored is not None and self.parts:
            real = torch.split(unpadded(scored[mine]), batch)
            self.real = [part[:, : used_length(part)] for part in real]
            lengths = [part.shape[1] for part in self.real]
            self.parts = tuple(p[:, :n] for p, n in zip(self.parts, lengths, strict=True))
        entered = [stack.enter(part) for part in self.parts]
        self.calls = [calls for _, calls in entered]
        self.dense = [hidden for hidden, _ in entered]
        self.cut = list(self.dense)
        self.same = True  # whether the cut stream still is the dense one
        self.at = 0  # the next block of both
        self.end = 0  # the first block that the pass under way does not need
        self.changes = WeightOverrides(stack)
        self._writers = {} if writers is None else writers
        self._dense = dense
        self.leave_out: tuple[int, ...] = ()  # the half of a block that a pass is not about
        self._halves: dict[int, tuple[int, ...]] = {}
        self._parts: dict[int, tuple[int, ...]] = {}  # that blocks are without, by block
        for unit in parts_in(self.removed):
            self._parts[block_of(unit)] = (unit,)

    def restore(self) -> None:
        """Give every changed matrix its original values."""
        self.changes.undo()

    def module(self, block: int, name: str) -> nn.Module:
        """A module of a block, by its path in it."""
        return self.stack.blocks[block].get_submodule(name)

    def writers(self, block: int) -> ResidualWriters:
        """What of a block can be re-fitted."""
        key = (block, *self._parts.get(block, ()))
        if key not in self._writers:
            self._writers[key] = find_residual_writers(
                self.stack, block, self._parts.get(block, ())
            )
        return self._writers[key]

    def write(self, block: int, path: str, new: Tensor) -> None:
        """Give a parameter new values, with the precision that it is stored and computed with.
        Matrices are [out, in]."""
        name, _, _ = path.rpartition(".")
        if isinstance(self.module(block, name), Conv1D) and new.dim() == 2:
            new = new.T
        old = whole(self.stack.blocks[block].get_parameter(path))
        new = self.rounded(block, path, new).to(old.dtype)
        if (block, path) in self.changes.values or not torch.equal(new, old):
            self.changes.put(block, path, new)

    @torch.inference_mode()
    def fit(
        self,
        gap: Gap,
        ridges: Sequence[float],
        accept: Callable[[], bool] = lambda: True,
    ) -> float | None:
        """Re-fit the blocks of ``gap``, the next one in order, with the first of ``ridges`` that
        ``accept()``, asked with the new weights in place, agrees to. Gives the ridge, or None if
        all were refused: then the weights are as before. A gap without blocks of its own has
        nothing to fit.
        """
        if not gap.blocks:
            return None
        self.end = self._behind(gap.blocks[-1])
        self._advance_to(gap.blocks[0])
        start, known = (self.dense, self.cut, self.same, self.at), len(self.changes)
        for ridge in ridges:
            for block in gap.blocks:
                self._advance_to(block)
                self._fit_block(block, ridge)
            if accept():
                return ridge
            self.changes.undo(keep=known)
            self.dense, self.cut, self.same, self.at = start
        return None

    @contextmanager
    def _held(self, block: int) -> Iterator[None]:
        """Hold a block for all that is done with it, while the next one of a pass is fetched."""
        with self.stack.holding(block, block + 1 if block + 1 < self.end else None):
            yield

    def _behind(self, block: int) -> int:
        """The next kept block."""
        behind = block + 1
        while behind in self.removed:
            behind += 1
        return behind

    def _advance_to(self, block: int) -> None:
        """Take both streams to the input of ``block``."""
        for i in range(self.at, block):
            if i in self.removed or i in self._parts:
                self.same = False
            with self._held(i):
                self.dense = self._dense_behind(i)
                if self.same:
                    self.cut = list(self.dense)
                elif i not in self.removed:
                    self.cut = list(self.run_cut(i))
        self.at = max(self.at, block)

    def run(
        self,
        i: int,
        streams: Sequence[Tensor],
        without: Collection[int] = (),
        *,
        counted: bool = True,
    ) -> Iterator[Tensor]:
        """The streams [B, T, D] behind block i. What is not ``counted`` is no work to tell of."""
        for hidden, calls in zip(streams, self.calls, strict=True):
            with self.stack.bypassed(without):
                out = self.stack.run(i, hidden, calls[i])
            yield out
            if counted:
                self.tick(len(hidden) * group().size)  # the others do as much meanwhile

    def _dense_behind(self, i: int) -> list[Tensor]:
        """The dense streams behind block i, which nothing is fitted in."""
        known = {} if self._dense is None else self._dense
        if i in known:
            self.tick(sum(map(len, known[i])) * group().size)
        else:
            known[i] = list(self.run(i, self.dense))
        return known[i]

    def run_cut(self, i: int, *, counted: bool = True) -> Iterator[Tensor]:
        """The cut's streams behind block i, without the parts of it that are removed, or those
        that a pass is not about."""
        return self.run(i, self.cut, self._parts.get(i, self.leave_out), counted=counted)

    def _fit_block(self, block: int, ridge: float) -> None:
        """Fit one block towards the dense stream at the next kept block, and step over it."""
        with self._held(block):
            writers = self.writers(block)
            seen = Outputs(self.stack.blocks[block], [*writers.last])
            before_last: list[Tensor] = []
            after: list[Tensor] = []
            with seen.recorded():
                for out in self.run(block, self.dense):
                    before_last.append(stream_before(out, seen, writers.last))
                    after.append(out)
            self.dense = after
            for gone in range(block + 1, self._behind(block)):
                with self._held(gone):
                    self.dense = self._dense_behind(gone)
            apart = self._apart(block)
            if writers.inner and not (self.same and writers.final):  # nothing is lost yet
                if not writers.final:  # attention has to make up for the gap as well
                    before_last = [
                        mid + (target.to(out.device) - out)
                        for mid, target, out in zip(before_last, self.dense, after, strict=True)
                    ]
                self.leave_out = apart[1:]
                self._solve(block, writers.inner, before_last, ridge)
            del before_last, after  # their memory is needed
            if apart:
                self.leave_out = apart[1:]
                self.cut = list(self.run_cut(block, counted=False))
                self.leave_out = apart[:1]
            if writers.final:
                self._solve(block, writers.final, self.dense, ridge)
            self.cut = list(self.run_cut(block))
            self.leave_out = ()
        self.at, self.same = self._behind(block), False

    def _last(self, writers: ResidualWriters) -> Mapping[str, float]:
        """What the pass at hand adds to the stream behind attention."""
        return {} if self.leave_out else writers.last

    def _apart(self, block: int) -> tuple[int, ...]:
        """Attention and MLP of a block, where the one can be run and then the other, so that a pass
        that is about one need not compute both. Empty where the block is of another kind: on the
        first windows both ways have to agree to the bit."""
        if block in self._parts or not self.parts or group().tp > 1:
            return ()
        if block not in self._halves:
            attention, mlp = parts_of(block)
            hidden, call = self.cut[0], self.calls[0][block]
            try:
                with self.stack.bypassed([mlp]):
                    middle = self.stack.run(block, hidden, call)
                with self.stack.bypassed([attention]):
                    found = self.stack.run(block, middle, call)
            except UnsupportedModel:
                same = False
            else:
                same = torch.equal(found, self.stack.run(block, hidden, call))
            self._halves[block] = (attention, mlp) if same else ()
        return self._halves[block]

    def _solve(
        self,
        block: int,
        maps: Mapping[str, float],
        targets: Sequence[Tensor],
        ridge: float,
    ) -> None:
        """Ridge regression of the residual on the inputs of all ``maps`` together."""
        writers = self.writers(block)
        inner = maps is writers.inner
        for name in maps:
            if name in writers.norms:
                self.fit_before_norm(block, name, targets, ridge)
        maps = {name: factor for name, factor in maps.items() if name not in writers.norms}
        if not maps:
            return
        names, last = list(maps), self._last(writers)
        seen = Outputs(self.stack.blocks[block], [*dict.fromkeys([*names, *last])])
        weights = [weight_of(self.module(block, name)) for name in names]
        seen_width = sum(weight.shape[1] for weight in weights) + 1
        gram = torch.zeros(
            (seen_width, seen_width),
            dtype=torch.float64,
            device=float64_device(weights[0]),
        )
        cross = gram.new_zeros((weights[0].shape[0], seen_width))
        with seen.recorded():
            outs = zip(self.run_cut(block), targets, self.real, strict=True)
            for out, target, real in outs:
                value = stream_before(out, seen, last) if inner else out
                for x, y in _weighted(seen, names, target, value, real):
                    self._add_products(gram, cross, x, y)
        group().sum_(gram, cross)
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        change = torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram)).T  # [D, inputs + 1]
        group().from_first_(change := change.contiguous())
        column = 0
        for name, factor in maps.items():
            module = self.module(block, name)
            weight, bias = weight_of(module), bias_of(module)
            width = weight.shape[1]
            new = weight.double() + (change[:, column : column + width] / factor).to(weight.device)
            self.write(block, f"{name}.weight", new)
            column += width
            if bias is not None:
                share = change[:, -1].to(bias.device) / (factor * len(maps))
                self.write(block, f"{name}.bias", bias.double() + share)

    def _add_products(self, gram: Tensor, cross: Tensor, x: Tensor, y: Tensor) -> None:
        """Add x.T x to ``gram`` and y.T x to ``cross``. x [R, in], y [R, D], in float32; of a model
        in 16 bits they are multiplied in TF32 on a GPU, whose sums are float32 all the same."""
        matmul = torch.backends.cuda.matmul
        kept, matmul.allow_tf32 = matmul.allow_tf32, self.stack.dtype.itemsize == 2
        try:
            gram += (x.T @ x).to(gram)
            cross += (y.T @ x).to(gram)
        finally:
            matmul.allow_tf32 = kept

    def fit_before_norm(
        self, block: int, name: str, targets: Sequence[Tensor], ridge: float
    ) -> None:
        """Fit matrix ``name`` of a block, and the norm behind it, so that the stream [B, T, D]
        behind the block (or, for an inner one, between attention and MLP) becomes ``targets``."""
        writers = self.writers(block)
        norm = writers.norms[name]
        factor = {**writers.inner, **writers.final}[name]
        matrix, gain_of = self.module(block, name), self.module(block, norm.path)
        last = self._last(writers)
        seen = Outputs(self.stack.blocks[block], [*dict.fromkeys([name, *last])])

        def rows() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            """Inputs x / rms(y) [R, in], directions y / rms(y) [R, D] and residuals [R, D], in
            float32, all times the root of the token's weight."""
            with seen.recorded():
                outs = zip(self.run_cut(block), targets, self.real, strict=True)
                for out, target, real in outs:
                    value = stream_before(out, seen, last) if name in writers.inner else out
                    wanted = real_rows(target.to(value.device), real).float()
                    root = gain_weight(wanted)
                    y = real_rows(seen.outputs[name], real).float()
                    scale = root * y.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
                    x = real_rows(seen.given(name), real).float()
                    yield x * scale, y * scale, (wanted - real_rows(value, real).float()) * root

        for _ in range(ROUNDS):
            weight, gains = weight_of(matrix), weight_of(gain_of)
            gram = torch.zeros(
                2 * weight.shape[1:], dtype=torch.float64, device=float64_device(weight)
            )
            cross = gram.new_zeros(weight.shape)
            for x, _, residual in rows():
                self._add_products(gram, cross, x, residual)
            group().sum_(gram, cross)
            gram.diagonal().add_(ridge * gram.diagonal().mean())
            change = torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram)).T.contiguous()
            group().from_first_(change)
            gain = gains.to(change) + norm.offset
            share = gain / (gain.square() + DAMPING * gain.square().mean()) / factor
            new = weight.double() + (share[:, None] * change).to(weight.device)
            self.write(block, f"{name}.weight", new)

            along, size = gram.new_zeros((2, len(gains)))
            for _, unit, residual in rows():
                along += (unit * residual).sum(0).to(gram)
                size += unit.square().sum(0).to(gram)
            group().sum_(along, size)
            step = along / factor / (size + ridge * size.mean())
            group().from_first_(step)
            new = gains.double() + step.to(gains.device)
            self.write(block, f"{norm.path}.weight", new)


def real_rows(x: Tensor, real: Tensor | None) -> Tensor:
    """The real tokens of x [B, T, D] -> [R, D]."""
    return x.flatten(0, -2) if real is None else x[real.to(x.device)]


def _weighted(
    seen: Outputs, names: Sequence[str], target: Tensor, value: Tensor, real: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs with a one behind them [rows, inputs + 1] and residuals [rows, D], in float32, both
    times the root of the token's weight; at most ``ROWS`` rows at a time."""
    columns = [real_rows(seen.given(name), real) for name in names]
    target, value = real_rows(target, real), real_rows(value, real)
    for a in range(0, len(target), ROWS):
        rows = slice(a, a + ROWS)
        wanted = target[rows].to(value.device).float()
        root = gain_weight(wanted)
        x = torch.cat([c[rows].float() for c in columns] + [torch.ones_like(root)], -1)
        yield x * root, (wanted - value[rows].float()) * root


def gain_weight(wanted: Tensor) -> Tensor:
    """Root of a token's weight [R, 1]: the inverse root mean square of what the stream is to be."""
    return wanted.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def float64_device(x: Tensor) -> torch.device:
    """Where float64 is possible: not on mps."""
    return torch.device("cpu") if x.device.type == "mps" else x.device


def default_tokens(stack: BlockStack) -> int:
    """How many tokens a repair is to see: many on a GPU, as long as their hidden states fit
    there; and not where blocks are offloaded."""
    least = TOKENS["cpu"]
    if stack.input_device.type != "cuda" or stack.streamed:
        return least
    each = STREAMS * int(decoder_config(stack.model.config).hidden_size) * stack.dtype.itemsize
    room = room_bytes(stack) // each
    room = min(int(found) for found in group().exchange(str(room).encode()))
    return max(least, min(TOKENS["cuda"], room))
