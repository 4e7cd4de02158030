"""Builders of plans for the report's tests. Every figure is made up."""

from __future__ import annotations

from sleb.core.plan import (
    Baseline,
    Calibration,
    Curve,
    FinalComparison,
    Finalist,
    Fingerprint,
    Plan,
    Point,
    RepairedGap,
    RepairedTensor,
    RepairRecord,
    Round,
    Score,
    SourceRecord,
    Target,
)

BLOCKS = 12
ORDER = (7, 4, 8)
HEX = "0123456789abcdef" * 4


def scored(removed: int, gone: tuple[int, ...], base: float, excess_se: float) -> Round:
    """A round: without ``removed`` the score is ``base``; each other block costs more, and those
    that cost much are out of the race early."""
    live = [b for b in range(1, BLOCKS - 1) if b not in gone and b != removed]
    order = sorted(live, key=lambda b: (b - 6) ** 2 + b / 10)
    scores = [Score(block=removed, mean=base, se=0.05, excess_se=0.0, windows=24)]
    scores += [
        Score(
            block=b,
            mean=round(base + 0.012 * (i + 1) ** 2, 6),
            se=0.05,
            excess_se=excess_se * (i + 1),
            windows=24 if i < 3 else 9,
        )
        for i, b in enumerate(order)
    ]
    return Round(removed=(), scores=tuple(scores)).choosing(removed)


def calibration(*names: str) -> Calibration:
    return Calibration(
        sources=tuple(
            SourceRecord(spec=name, sha256=HEX, documents=40, tokens=61_440, windows=12)
            for name in names
        ),
        windows=24,
        length=256,
        seed=0,
        sha256=HEX,
    )


def plan(**changes) -> Plan:
    """Round 1 is clear (0.012 against 2 x 0.002), round 2 within noise, round 3 clear."""
    points = tuple(
        Point(
            depth=d,
            block=block,
            increase=round(0.03 * d**1.6, 6),
            low=round(0.03 * d**1.6 - 0.01 * d, 6),
            high=round(0.03 * d**1.6 + 0.01 * d, 6),
            bound=round(0.03 * d**1.6 + 0.008 * d, 6),
            nbytes=2_400_000_000 - d * 170_000_000,
            speedup=round(2.4 / (2.4 - 0.17 * d), 6),
        )
        for d, block in enumerate((*ORDER, 3, 5), 1)
    )
    given = {
        "model": Fingerprint(
            model_type="llama",
            architecture="LlamaForCausalLM",
            blocks=BLOCKS,
            config_sha256=HEX,
            weights_sha256=HEX[::-1],
        ),
        "removed": tuple(sorted(ORDER)),
        "order": ORDER,
        "protected": (0, 11),
        "metric": "loss",
        "unit": "nats/token",
        "strategy": "greedy",
        "racing": True,
        "dtype": "bfloat16",
        "target": Target(kind="max-loss-increase", limit=0.25, reached=0.198),
        "baseline": Baseline(mean=2.9, se=0.05),
        "rounds": (
            scored(7, (), 2.93, 0.002),
            scored(4, (7,), 2.98, 0.02),
            scored(8, (7, 4), 3.05, 0.002),
        ),
        "calibration": calibration("mail=mail.jsonl", "manuals=manuals.txt@2"),
        "curve": Curve(
            heldout=calibration("mail=mail.jsonl", "manuals=manuals.txt@2"),
            baseline=Baseline(mean=2.88, se=0.06),
            points=points,
        ),
        "versions": {
            "sleb": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.17.0",
            "python": "3.11.7",
        },
    }
    return Plan(**{**given, **changes})


def repaired_gap(removed: tuple[int, ...], ridge: float | None, blocks: tuple[int, ...], **change):
    """A gap, with two matrices of each of ``blocks`` re-fitted, and (before, after) by text."""
    kinds = ("self_attn.o_proj", "mlp.down_proj")
    return RepairedGap(
        removed=removed,
        ridge=ridge,
        tensors=tuple(
            RepairedTensor(name=f"model.layers.{b}.{kind}.weight", sha256=HEX)
            for b in blocks
            for kind in kinds
        ),
        before={text: pair[0] for text, pair in change.items()},
        after={text: pair[1] for text, pair in change.items()},
    )


def repaired_plan(**changes) -> Plan:
    """A plan whose first gap has 6 re-fitted matrices, while no fit of the second one stayed."""
    texts = calibration("mail=mail.jsonl", "manuals=manuals.txt@2")
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
    return plan(
        target=None,
        baseline=None,
        rounds=(),
        calibration=None,
        curve=None,
        versions={},
        protected=(),
    )


def run_plan(rounds: tuple[Round, ...], excess: float = 0.2) -> Plan:
    """A plan for blocks 7 to 9, which won against the greedy ones by ``excess`` nats/token."""
    best = Finalist(strategy="window", order=(7, 8, 9), increase=0.3, excess=0, excess_se=0)
    other = Finalist(
        strategy="greedy", order=(8, 7, 4), increase=0.3 + excess, excess=excess, excess_se=0.01
    )
    return plan(
        order=(7, 8, 9),
        removed=(7, 8, 9),
        strategy="window",
        rounds=rounds,
        final_comparison=FinalComparison(
            sets=(best, other), fitted=8192, windows=36, self_generated=12
        ),
    )
