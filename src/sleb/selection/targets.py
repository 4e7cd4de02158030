"""Targets people think in: so many blocks, so much loss, so much faster, so small.

A target becomes a largest number of removals and a test of an order of removals, so that strategies
need to know nothing of it. What is held out here never takes part in the choice of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from sleb.calibration import Windows
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import InputError, VerificationFailed
from sleb.core.plan import Curve, Point, Target, blocks_to_remove
from sleb.core.statistics import interval, standard_error
from sleb.models.stack import BlockStack
from sleb.selection.objective import DENSE, BlockSet, Objective, Values
from sleb.selection.racing import baseline
from sleb.selection.request import Goal, parse_bytes

__all__ = ["Costs", "HeldoutEvaluation", "StoppingRule", "nothing_within_limit", "upper_bound"]

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Bytes on disk: of all weights, of those read per generated token, and of each block."""

    total: int
    read: int
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, stack: BlockStack) -> Costs:
        """Every weight is read for each token, except an input embedding that is not also the
        output head: of that only one row."""
        sizes = checkpoint.block_sizes(len(stack), stack.path)
        model = stack.model
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        looked_up = 0
        if not getattr(model.config, "tie_word_embeddings", False):
            name = next(name for name, module in model.named_modules() if module is embedding)
            ending = name.split(".")[-1] + ".weight"
            shape = tuple(embedding.weight.shape)
            looked_up = next(
                (
                    info.nbytes
                    for tensor, info in checkpoint.tensors.items()
                    if tensor.endswith(ending) and info.shape == shape
                ),
                0,
            )
        return cls(
            total=checkpoint.nbytes,
            read=checkpoint.nbytes - looked_up,
            blocks=tuple(nbytes for _, nbytes in sizes),
        )

    def size(self, removed: Sequence[int]) -> int:
        """Bytes on disk without ``removed``."""
        return self.total - sum(self.blocks[b] for b in removed)

    def speedup(self, removed: Sequence[int]) -> float:
        """Bytes read per generated token, dense over pruned."""
        return self.read / (self.read - sum(self.blocks[b] for b in removed))


class HeldoutEvaluation:
    """Loss of the model on held-out windows as blocks go: the evidence for a depth. ``losses``
    scores sets as plain cuts, or after a repair that is ``fitted`` on so many tokens."""

    def __init__(
        self, losses: Objective, windows: Windows, costs: Costs, fitted: int | None = None
    ) -> None:
        self._losses, self.windows, self._costs, self._fitted = losses, windows, costs, fitted

    def point(self, order: Sequence[int]) -> Point:
        """The model without ``order``, against the dense one."""
        dense, pruned = self._losses.scores([DENSE, BlockSet(order)])
        increase = pruned - dense
        found, bound = interval(increase), upper_bound(increase)
        return Point(
            depth=len(order),
            block=order[-1],
            increase=_rounded(found.value),
            low=None if found.low is None else _rounded(found.low),
            high=None if found.high is None else _rounded(found.high),
            bound=None if bound is None else _rounded(bound),
            nbytes=self._costs.size(order),
            speedup=_rounded(self._costs.speedup(order)),
        )

    def curve(self, order: Sequence[int]) -> Curve:
        """All depths of ``order``, in one sweep where they are plain cuts."""
        prefixes = [tuple(order[: i + 1]) for i in range(len(order))]
        dense = self._losses.scores([DENSE, *map(BlockSet, prefixes)])[0]
        return Curve(
            heldout=self.windows.record,
            baseline=baseline(dense),
            fitted=self._fitted,
            points=tuple(self.point(p) for p in prefixes),
        )


def upper_bound(increase: Values) -> float | None:
    """One-sided 95 % bound of the mean of paired increases [windows]; None of a single one."""
    error = standard_error(increase)
    if error is None:
        return None
    return float(increase.mean() + stats.t.ppf(CONFIDENCE, increase.size - 1) * error)


def nothing_within_limit(
    limit: float, block: int, bound: float, windows: int, after: str = ""
) -> VerificationFailed:
    """The error that not even one block can go."""
    return VerificationFailed(
        f"nothing can be removed within --max-loss-increase {limit:g}: without block {block} alone "
        f"the held-out loss rises by up to {bound:.4f} nats/token{after} (95 % bound on {windows} "
        "windows); more text tightens the bound"
    )


class StoppingRule:
    """A goal for one model: how many removals at most, when to stop, and what was reached."""

    def __init__(
        self, goal: Goal, costs: Costs, candidates: Sequence[int], heldout: HeldoutEvaluation | None
    ) -> None:
        self.goal, self._costs, self._heldout = goal, costs, heldout
        self.most = self._most(candidates)
        self.known = goal.max_loss_increase is None  # whether ``most`` is about what it takes

    def _most(self, candidates: Sequence[int]) -> int:
        """Removals that surely reach the goal, or all that are possible."""
        blocks = len(self._costs.blocks)
        if self.goal.remove is not None:
            return blocks_to_remove(self.goal.remove, blocks)
        possible = min(len(candidates), blocks - 1)
        if self.goal.max_loss_increase is not None:
            return possible
        cheapest = sorted(candidates, key=lambda b: self._costs.blocks[b])
        for n in range(1, possible + 1):
            if self._small_or_fast_enough(cheapest[:n]):
                return n
        all_gone = cheapest[-possible:]
        if self.goal.size is not None:
            raise InputError(
                f"--size {self.goal.size} is not within reach: without all {possible} candidates "
                f"the weights still take {self._costs.size(all_gone) / 1e6:,.1f} MB"
            )
        raise InputError(
            f"--speedup {self.goal.speedup} is not within reach: without all {possible} candidates "
            f"it is {self._costs.speedup(all_gone):.2f}"
        )

    def _small_or_fast_enough(self, order: Sequence[int]) -> bool:
        if self.goal.size is not None:
            return self._costs.size(order) <= parse_bytes(self.goal.size, "--size")
        assert self.goal.speedup is not None
        return self._costs.speedup(order) >= self.goal.speedup

    def enough(self, order: Sequence[int]) -> bool:
        """Whether the search may stop after removing ``order``: the target is reached, or it is
        just exceeded and the last removal has to be taken back."""
        if self.goal.remove is not None:
            return len(order) >= self.most
        if self.goal.max_loss_increase is not None:
            return self._bound(order) > self.goal.max_loss_increase
        return self._small_or_fast_enough(order)

    def settle(self, order: Sequence[int]) -> tuple[tuple[int, ...], Target]:
        """How much of ``order`` to use, and the record of it.

        With a limit on loss, depths are tested one after the other until the first whose bound is
        above it. Testing in a fixed order and stopping at the first failure keeps the probability
        of any wrong step at 5 % without further correction.

        Raises:
            VerificationFailed: not even the first removal is within the limit on loss.
        """
        limit = self.goal.max_loss_increase
        depth = next((d for d in range(1, len(order) + 1) if self.enough(order[:d])), len(order))
        if limit is not None:
            if self._bound(order[:depth]) > limit:
                depth -= 1
            if depth == 0:
                assert self._heldout
                windows = len(self._heldout.windows.ids)
                raise nothing_within_limit(limit, order[0], self._bound(order[:1]), windows)
            reached = self._bound(order[:depth])
            return tuple(order[:depth]), Target(
                kind="max-loss-increase", limit=limit, reached=reached
            )
        used = tuple(order[:depth])
        if self.goal.speedup is not None:
            reached = _rounded(self._costs.speedup(used))
            return used, Target(kind="speedup", limit=self.goal.speedup, reached=reached)
        if self.goal.size is not None:
            size = parse_bytes(self.goal.size, "--size")
            return used, Target(kind="size", limit=size, reached=self._costs.size(used))
        return used, Target(kind="remove", limit=self.most, reached=depth)

    def _bound(self, order: Sequence[int]) -> float:
        assert self._heldout
        bound = self._heldout.point(order).bound
        assert bound is not None  # at least two windows, see search
        return bound


def _rounded(value: float) -> float:
    return round(value, 6)
