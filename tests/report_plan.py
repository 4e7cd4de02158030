"""Plans for the tests of views. Every figure of data/plan.json is made up: round 1 is clear (0.012
against 2 x 0.002), round 2 within noise, round 3 clear."""

from pathlib import Path

from sleb.core.plan import (
    FinalComparison,
    Finalist,
    Plan,
    RepairedGap,
    RepairedTensor,
    RepairRecord,
    Round,
)

MADE_UP = Plan.load(Path(__file__).parent / "data" / "plan.json")
HEX = MADE_UP.model.config_sha256


def plan(**changes) -> Plan:
    """3 of 12 blocks, one after the other."""
    return Plan(**{**dict(MADE_UP), **changes})


def repaired_gap(removed: tuple[int, ...], ridge: float | None, blocks: tuple[int, ...], **change):
    """A gap, with two matrices of each of ``blocks`` re-fitted, and (before, after) by text."""
    kinds = ("self_attn.o_proj", "mlp.down_proj")
    names = [f"model.layers.{b}.{kind}.weight" for b in blocks for kind in kinds]
    return RepairedGap(
        removed=removed,
        ridge=ridge,
        tensors=tuple(RepairedTensor(name=name, sha256=HEX) for name in names),
        before={text: pair[0] for text, pair in change.items()},
        after={text: pair[1] for text, pair in change.items()},
    )


def repaired_plan(**changes) -> Plan:
    """A plan whose first gap has 6 re-fitted matrices, while no fit of the second one stayed."""
    texts = MADE_UP.calibration
    repair = RepairRecord(
        gaps=(
            repaired_gap((4,), 0.1, (3, 5, 6), mail=(2.97, 2.93), manuals=(3.21, 3.16)),
            repaired_gap((7, 8), None, (), mail=(2.93, 2.93), manuals=(3.16, 3.16)),
        ),
        reach=2,
        calibration=texts.model_copy(update={"windows": 390, "sha256": "a" * 64}),
        heldout=texts.model_copy(update={"windows": 14, "sha256": "b" * 64}),
    )
    return plan(**{"repair": repair, **changes})


def bare_plan() -> Plan:
    """A plan without evidence, as one written by hand."""
    nothing = dict.fromkeys(("target", "baseline", "calibration", "curve"))
    return plan(**nothing, rounds=(), versions={}, protected=())


def run_plan(rounds: tuple[Round, ...], excess: float = 0.2, **by_kind: float) -> Plan:
    """A plan for blocks 7 to 9, which won against the greedy ones by ``excess`` nats/token."""
    same = {"excess": excess, "excess_se": 0.01, "by_kind": by_kind}
    best = Finalist(**{**same, "excess": 0}, strategy="window", order=(7, 8, 9), increase=0.3)
    other = Finalist(**same, strategy="greedy", order=(8, 7, 4), increase=0.3 + excess)
    compared = {"fitted": 8192, "windows": 36, "self_generated": 12}
    return plan(
        order=(7, 8, 9),
        removed=(7, 8, 9),
        strategy="window",
        rounds=rounds,
        final_comparison=FinalComparison(sets=(best, other), **compared),
    )
