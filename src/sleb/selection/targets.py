"""Targets people think in: so many blocks, so much loss, so much faster, so small.

A target becomes a largest number of removals and a test of an order of removals, so that strategies
need to know nothing of it. What is held out here never takes part in the choice of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from scipy import stats

from sleb.calibration.windows import Windows
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.gguf_fields import GGUFModel
from sleb.core.errors import InputError, VerificationFailed
from sleb.core.plan import Curve, Point, Saving, Target, blocks_to_remove
from sleb.core.statistics import Values, interval, standard_error
from sleb.core.units import block_of, canonical, part_of, parts_in
from sleb.models.stack import BlockStack
from sleb.models.stored_names import block_prefix
from sleb.selection.goal import Goal, check_larger, parse_bytes
from sleb.selection.objective import DENSE, BlockSet, Objective
from sleb.selection.racing import baseline, rounded

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Bytes on disk: of all weights, of those read per generated token, of each block, and shares
    of these that are the parts of a block, by unit."""

    total: int
    read: int
    blocks: tuple[int, ...]
    shares: Mapping[int, float] = field(default_factory=dict)
    saving: Saving | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, stack: BlockStack, parts: Sequence[int] = ()) -> Costs:
        """Of blocks, and of those ``parts`` of blocks.

        Every weight is read for each token, except what is beside the decoder (towers for images
        and sound), and an input embedding that is not also the output head: of that only one row.
        """
        sizes = checkpoint.block_sizes(len(stack), block_prefix(checkpoint, stack))
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
            read=checkpoint.nbytes - looked_up - _beside(checkpoint, stack),
            blocks=tuple(nbytes for _, nbytes in sizes),
            shares=_shares(stack, parts),
        )

    def in_file(self, model: GGUFModel) -> Costs:
        """The same of the .gguf file that the checkpoint was made of."""
        total, blocks = model.file.path.stat().st_size, [size for _, size in model.block_sizes()]
        share = (total - sum(blocks)) / max(1, self.total - sum(self.blocks))
        beside = int((self.total - self.read) * share)
        return replace(self, total=total, read=total - beside, blocks=tuple(blocks))

    def size(self, removed: Sequence[int]) -> int:
        """Bytes on disk without ``removed``."""
        return self.total - self.of_units(removed)

    def saved(self, unit: int) -> float:
        """What a unit saves: of time where that was measured, else bytes."""
        timed = self.saving is not None and self.saving.of == "time"
        return self.saving.share([unit]) if self.saving and timed else self.of_units([unit])

    def of_units(self, units: Sequence[int]) -> int:
        """Bytes of blocks and parts."""
        return sum(
            int(self.blocks[block_of(u)] * (self.shares[u] if part_of(u) else 1))
            for u in canonical(units)
        )

    def speedup(self, removed: Sequence[int]) -> float:
        """Bytes read per generated token, dense over pruned; or seconds, where units were timed."""
        if self.saving and self.saving.of == "time":
            return 1 / (1 - self.saving.share(removed))
        return self.read / (self.read - self.of_units(removed))


def _shares(stack: BlockStack, parts: Sequence[int]) -> dict[int, float]:
    """Of a block's parameters, those of a part."""
    found = {}
    for unit in parts:
        block = stack.blocks[block_of(unit)]
        part = block.get_submodule(stack.parts(block_of(unit))[part_of(unit)].name)
        sizes = [sum(p.numel() for p in module.parameters()) for module in (part, block)]
        found[unit] = sizes[0] / sizes[1]
    return found


def _beside(checkpoint: Checkpoint, stack: BlockStack) -> int:
    """Bytes of a wrapper's other parts than the decoder. On disk these keep the last of their
    modules' names, whatever stands before it."""
    decoder = stack.path.split(".")[:-1]
    head, others = stack.model.get_output_embeddings(), set()  # type: ignore[operator]
    for depth, within in enumerate(decoder):
        parent = stack.model.get_submodule(".".join(decoder[:depth]))
        children = [(name, m) for name, m in parent.named_children() if name != within]
        others |= {name for name, m in children if head not in {*m.modules()}}
    return sum(
        info.nbytes for name, info in checkpoint.tensors.items() if others & {*name.split(".")}
    )


class HeldoutEvaluation:
    """Loss of the model on held-out windows as blocks go, or what else ``losses`` scores there: the
    evidence for a depth. It scores sets as plain cuts, or after a repair that is ``fitted`` on so
    many tokens."""

    def __init__(
        self, losses: Objective, windows: Windows, costs: Costs, fitted: int | None = None
    ) -> None:
        self._losses, self.windows, self._costs, self._fitted = losses, windows, costs, fitted

    def point(self, order: Sequence[int]) -> Point:
        """The model without ``order``, against the dense one."""
        dense, pruned = self._losses.scores([DENSE, BlockSet(order)])
        increase = pruned - dense
        found = interval(increase)
        return Point(
            depth=len(order),
            block=order[-1],
            increase=round(found.value, 6),
            low=rounded(found.low),
            high=rounded(found.high),
            bound=rounded(upper_bound(increase)),
            nbytes=self._costs.size(order),
            speedup=round(self._costs.speedup(order), 6),
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
    goal: Goal, block: int, bound: float, windows: int, after: str = ""
) -> VerificationFailed:
    """The error that not even one block can go."""
    if goal.keep_answers is not None:
        return VerificationFailed(
            f"nothing can be removed within --keep-answers {goal.keep_answers:g}: without block "
            f"{block} alone as few as {1 - bound:.3f} of the tokens are kept{after} (95 % bound on "
            f"{windows} answers); more --prompts tighten the bound"
        )
    return VerificationFailed(
        f"nothing can be removed within --max-loss-increase {goal.max_loss_increase:g}: without "
        f"block {block} alone "
        f"the held-out loss rises by up to {bound:.3g} nats/token{after} (95 % bound on {windows} "
        "windows); more text tightens the bound"
    )


class StoppingRule:
    """A goal for one model: how many removals at most, when to stop, and what was reached."""

    def __init__(
        self, goal: Goal, costs: Costs, candidates: Sequence[int], heldout: HeldoutEvaluation | None
    ) -> None:
        self.goal, self._costs, self._heldout = goal, costs, heldout
        self.most = self._most(candidates)

    def _most(self, candidates: Sequence[int]) -> int:
        """Removals that surely reach the goal, or all that are possible."""
        goal, costs = self.goal, self._costs
        if goal.remove is not None:
            return blocks_to_remove(goal.remove, len(costs.blocks))
        possible = len(candidates)
        if not parts_in(candidates):
            possible = min(possible, len(costs.blocks) - 1)
        if goal.limit is not None:
            return possible
        if goal.size is not None:
            check_larger(goal.size, costs.total)
        cheapest = sorted(candidates, key=costs.saved)
        for n in range(1, possible + 1):
            if self.enough(cheapest[:n]):
                return n
        gone = cheapest[-possible:]
        if goal.speedup is not None:
            asked, left = f"--speedup {goal.speedup:g}", f"it is {costs.speedup(gone):.2f}"
        else:
            asked = f"--size {goal.size}"
            left = f"the weights still take {costs.size(gone) / 1e6:,.1f} MB"
        raise InputError(f"{asked} is not within reach: without all {possible} candidates {left}")

    def enough(self, order: Sequence[int]) -> bool:
        """Whether the search may stop after removing ``order``: the target is reached, or it is
        just exceeded and the last removal has to be taken back."""
        goal = self.goal
        if goal.remove is not None:
            return len(order) >= self.most
        if goal.limit is not None:
            return self._bound(order) > goal.limit
        if goal.size is not None:
            return self._costs.size(order) <= parse_bytes(goal.size, "--size")
        assert goal.speedup is not None
        return self._costs.speedup(order) >= goal.speedup

    def settle(self, order: Sequence[int]) -> tuple[tuple[int, ...], Target]:
        """How much of ``order`` to use, and the record of it.

        With a limit on loss, depths are tested one after the other until the first whose bound is
        above it. Testing in a fixed order and stopping at the first failure keeps the probability
        of any wrong step at 5 % without further correction.

        Raises:
            VerificationFailed: not even the first removal is within the limit on loss.
        """
        goal = self.goal
        depth = next((d for d in range(1, len(order) + 1) if self.enough(order[:d])), len(order))
        used = tuple(order[:depth])
        if (limit := goal.limit) is not None:
            if self._bound(used) > limit:
                used = used[:-1]
            if not used:
                assert self._heldout
                windows = len(self._heldout.windows.ids)
                raise nothing_within_limit(goal, order[0], self._bound(order[:1]), windows)
            return used, goal.reached(self._bound(used))
        if goal.speedup is not None:
            reached = round(self._costs.speedup(used), 6)
            return used, Target(kind="speedup", limit=goal.speedup, reached=reached)
        if goal.size is not None:
            size = parse_bytes(goal.size, "--size")
            return used, Target(kind="size", limit=size, reached=self._costs.size(used))
        return used, Target(kind="remove", limit=self.most, reached=depth)

    def _bound(self, order: Sequence[int]) -> float:
        assert self._heldout
        bound = self._heldout.point(order).bound
        assert bound is not None  # at least two windows, see search
        return bound
