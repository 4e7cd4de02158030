"""Builders of run records for the report's tests: all that can be measured, or nothing.

Every figure is made up, and chosen so that what a report derives from it is easy to work out.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from report_plan import BLOCKS, HEX, ORDER
from sleb.core.plan import Plan
from sleb.core.statistics import Flips, Interval
from sleb.evaluation.answers import Answer, Answers, Comparison, Pair
from sleb.evaluation.perplexity import Evaluation
from sleb.evaluation.tasks import TaskResult
from sleb.evaluation.transfer import Chosen, Transfer
from sleb.record import GateResult, GateRow, RunRecord
from sleb.runtimes.bench import Case, Measured, Ratio, Runs, Speed
from sleb.surgery.verification import Check, Verification

MODEL = "models/clerk-1b"
OUT = "smaller"

QUALITY = {
    "loss": Interval(value=2.9, low=2.8, high=3.0),
    "perplexity": Interval(value=18.174, low=16.445, high=20.086),
    "pruned_loss": Interval(value=3.0, low=2.9, high=3.1),
    "pruned_perplexity": Interval(value=20.086, low=18.174, high=22.198),
    "divergence": Interval(value=0.0812, low=0.0731, high=0.0893),
    "agreement": Interval(value=0.871, low=0.862, high=0.88),
}


def quality(ratio: tuple[float, float, float], windows: int, **more) -> Evaluation:
    value, low, high = ratio
    return Evaluation(
        windows=windows,
        tokens=windows * 255,
        length=256,
        removed=tuple(sorted(ORDER)),
        loss_increase=Interval(value=math.log(value), low=math.log(low), high=math.log(high)),
        perplexity_ratio=Interval(value=value, low=low, high=high),
        **QUALITY,
        **more,
    )


def verification(failed: bool = False, repaired: bool = False) -> Verification:
    names = (
        ("depth-dependent config fields", "layer_types", "re-indexed"),
        ("clean reload", "0 missing, unexpected, mismatched", "0"),
        ("number of blocks", "9", "9"),
        ("weights equal the original's", "84 tensors are equal", "equal bytes in every tensor"),
        ("logits equal the original with blocks bypassed", "maximum difference 0", "at most 0"),
        ("generation with cache equals without", "16 equal tokens", "16 equal tokens"),
    )
    if repaired:
        weights = ("weights equal the original's, but for the repaired", *names[3][1:])
        plans = ("repaired tensors", "6 tensors are the plan's", "the hashes in the plan")
        names = (plans, *names[:3], weights, *names[4:])
    return Verification(
        checkpoint=OUT,
        removed=tuple(sorted(ORDER)),
        checks=tuple(
            Check(name=name, passed=not (failed and i == 4), measured=measured, limit=limit)
            for i, (name, measured, limit) in enumerate(names)
        ),
    )


def task(name: str, items: int, right: int, lost: int, won: int, p: float) -> TaskResult:
    after = right - lost + won

    def share(count: int) -> Interval:
        half = 1.96 * math.sqrt(max(1, count) * (items - count + 1) / items**3)
        return Interval(value=count / items, low=count / items - half, high=count / items + half)

    half = 1.96 * math.sqrt(lost + won + 1) / items
    change = (won - lost) / items
    return TaskResult(
        name=name,
        metric="acc",
        items=items,
        chance=0.25,
        dense=share(right),
        pruned=share(after),
        flips=Flips(
            items=items,
            lost=lost,
            won=won,
            difference=Interval(value=change, low=change - half, high=change + half),
            p_value=p,
        ),
    )


def answer(text: str, **more) -> Answer:
    given = {
        "text": text,
        "tokens": max(1, len(text) // 4),
        "seconds": 1.25,
        "ended": True,
        "repetition": 0.02,
        "script": "Latin",
        "language": "en",
        "json_valid": None,
    }
    return Answer(**{**given, **more})


def pair(number: int, prompt: str, dense: Answer, pruned: Answer, agreed: int, **more) -> Pair:
    given = {"id": f"q{number}", "prompt": prompt, "dense": dense, "pruned": pruned}
    return Pair(**given, agreed=agreed, switched=more.get("switched", False))


LONG = "The invoice of March is attached; please let us know if a line of it looks wrong. " * 14


def answers() -> Comparison:
    fine = "You can return it within 30 days. Please keep the receipt."
    pairs = (
        pair(1, "Can I return my order?", answer(fine), answer(fine), 14),
        pair(
            2,
            "Give the address as JSON: Main Street 4, Springfield.",
            answer('{"street": "Main Street 4", "city": "Springfield"}', json_valid=True),
            answer('{"street": "Main Street 4, "city" Springfield', json_valid=False, ended=False),
            9,
        ),
        pair(
            3, "Summarise the mail.\n<b>From:</b> accounts", answer(LONG), answer(LONG[:700]), 140
        ),
        pair(
            4,
            "お客様への返信を一文で書いてください。",
            answer("ありがとうございます。", script="Japanese", language="ja"),
            answer("Thank you for your inquiry."),
            0,
            switched=True,
        ),
        pair(
            5,
            "List three colours.",
            answer("Red, green and blue."),
            answer("Red, red, red, " * 20, repetition=0.91, ended=False),
            1,
        ),
        pair(6, "Say hello.", answer("Hello!"), answer("", tokens=0), 0),
        pair(7, "Say goodbye.", answer("Goodbye!"), answer("Goodbye, and thank you!"), 1),
        pair(8, "What is 2 + 2?", answer("4"), answer("4"), 1),
    )

    def share(value: float, low: float, high: float) -> Interval:
        return Interval(value=value, low=low, high=high)

    def total(
        ended: float, empty: float, repetitive: float, valid: float, median: float
    ) -> Answers:
        return Answers(
            ended=share(ended, ended - 0.05, min(1.0, ended + 0.04)),
            empty=share(empty, 0.0, empty + 0.04),
            repetitive=share(repetitive, 0.0, repetitive + 0.05),
            json_valid=share(valid, valid - 0.2, min(1.0, valid + 0.1)),
            seconds_median=median,
            seconds_p90=2.5 * median,
        )

    return Comparison(
        prompts=len(pairs),
        max_new_tokens=128,
        sha256=HEX,
        languages=True,
        dense=total(0.95, 0.0, 0.025, 1.0, 1.25),
        pruned=total(0.875, 0.025, 0.1, 0.7, 1.0),
        identical=share(0.25, 0.13, 0.42),
        switched=share(0.125, 0.04, 0.26),
        agreed_median=9.0,
        seconds_per_token_ratio=share(1.24, 1.2, 1.28),
        pairs=pairs,
    )


CASES = (
    Case(name="prompt-512", batch=1, prompt_tokens=512, new_tokens=0),
    Case(name="first-token", batch=1, prompt_tokens=512, new_tokens=1),
    Case(name="generate-1", batch=1, prompt_tokens=128, new_tokens=64),
    Case(name="generate-8", batch=8, prompt_tokens=128, new_tokens=64),
)
RATIOS = ((1.31, 1.28, 1.34), (1.3, 1.25, 1.35), (1.19, 0.98, 1.27), (1.25, 1.2, 1.28))


def speed() -> Speed:
    def runs(median: float) -> tuple[Runs, ...]:
        return tuple(
            Runs(
                case=case.name,
                median=median * i,
                low=median * i * 0.98,
                high=median * i * 1.03,
                seconds=tuple(median * i * f for f in (1.0, 0.97, 1.05, 0.99, 1.01)),
                tokens_per_second=case.batch
                * (case.new_tokens or case.prompt_tokens)
                / (median * i),
            )
            for i, case in enumerate(CASES, 1)
        )

    def model(path: str, blocks: int, nbytes: int, peak: int, median: float) -> Measured:
        return Measured(
            path=path,
            runtime="transformers",
            blocks=blocks,
            parameters=nbytes // 2,
            file_bytes=nbytes,
            peak_bytes=peak,
            load_seconds=median / 2,
            runs=runs(median),
        )

    return Speed(
        device="NVIDIA H100 80GB HBM3",
        dtype="bfloat16",
        threads=16,
        cases=CASES,
        models=(
            model(MODEL, 12, 2_400_000_000, 3_000_000_000, 0.32),
            model(OUT, 9, 1_890_000_000, 2_520_000_000, 0.256),
        ),
        ratios=tuple(
            Ratio(
                path=OUT,
                runtime="transformers",
                case=case.name,
                ratio=Interval(value=value, low=low, high=high),
                ideal=12 / 9,
                possible=1.28,
            )
            for case, (value, low, high) in zip(CASES, RATIOS, strict=True)
        ),
        skipped=("vllm: not installed",),
    )


def transfer() -> Transfer:
    def cost(value: float) -> Interval:
        return Interval(value=value, low=value - 0.02, high=value + 0.02)

    return Transfer(
        domains=("mail", "manuals"),
        windows=24,
        heldout=(16, 12),
        length=256,
        plans=(
            Chosen(
                source="mail",
                removed=(4, 7, 8),
                increase=(cost(0.09), cost(0.21)),
                away=("manuals",),
            ),
            Chosen(source="manuals", removed=(4, 5, 7), increase=(cost(0.12), cost(0.14)), away=()),
            Chosen(source="mix", removed=(4, 7, 8), increase=(cost(0.1), cost(0.15)), away=()),
        ),
        overlap=((1.0, 0.5, 1.0), (0.5, 1.0, 0.5), (1.0, 0.5, 1.0)),
        recommended="mix",
    )


def gate(passed: bool = False) -> GateResult:
    tasks = "run: sleb eval MODEL --plan OUT/plan.json --task NAME --record OUT"
    rows = [
        GateRow(
            name="perplexity ratio, all texts",
            limit=1.2,
            at_most=True,
            measured=1.1234,
            unit="x",
            passed=True,
        ),
        GateRow(
            name="speed-up, generate-8",
            limit=1.15,
            at_most=False,
            measured=1.2,
            unit="x",
            passed=True,
        ),
    ]
    if not passed:
        rows += [
            GateRow(
                name="perplexity ratio, manuals",
                limit=1.2,
                at_most=True,
                measured=1.27,
                unit="x",
                passed=False,
            ),
            GateRow(
                name="score kept, law",
                limit=0.9,
                at_most=False,
                measured=None,
                unit="%",
                passed=False,
                missing=f"not measured; {tasks}",
            ),
        ]
    return GateResult(rows=tuple(rows))


def similarity() -> tuple[tuple[float, ...], ...]:
    """Neighbouring states are 0.9 to 0.99 alike: most at block 7, least at block 0."""
    steps = [0.9, 0.93, 0.95, 0.96, 0.98, 0.97, 0.975, 0.99, 0.985, 0.96, 0.94, 0.92]

    def alike(i: int, j: int) -> float:
        return math.prod(steps[min(i, j) : max(i, j)])

    return tuple(tuple(alike(i, j) for j in range(BLOCKS + 1)) for i in range(BLOCKS + 1))


def complete(**changes) -> RunRecord:
    """A record with every section."""
    texts = {
        "mail": quality((1.04, 0.99, 1.09), 16),
        "manuals": quality((1.21, 1.15, 1.27), 12),
    }
    given = {
        "similarity": similarity(),
        "tasks": (
            task("questions", 400, 240, 41, 12, 0.00008),
            task("routing", 200, 150, 9, 7, 0.804),
        ),
        "answers": answers(),
        "speed": speed(),
        "transfer": transfer(),
        "gate": gate(),
        "evaluation": quality((1.105, 1.0869, 1.1234), 28, domains=texts),
        "evaluation_note": "28 held-out windows of 256 tokens from the calibration texts",
    }
    return replace(sparse(), **{**given, **changes})


def repaired(**changes) -> RunRecord:
    """A complete record of a repaired cut; its plan is :func:`report_plan.repaired_plan`."""
    texts = {
        "mail": quality((1.31, 1.2, 1.43), 16),
        "manuals": quality((1.52, 1.41, 1.63), 12),
    }
    record = complete(verification=verification(repaired=True), repair_note="6 matrices, as noted")
    assert record.evaluation is not None
    plain = quality((1.4321, 1.3579, 1.5151), 28, domains=texts)
    given = {"evaluation": replace(record.evaluation, unrepaired=plain)}
    return replace(record, **{**given, **changes})


def sparse(**changes) -> RunRecord:
    """A record of `sleb prune` without text to spare: nothing but the cut and its proof."""
    given = {
        "command": f"sleb prune {MODEL} --max-loss-increase 0.25 --text mail=mail.jsonl -o {OUT}",
        "started": "2026-11-24T03:37:22+00:00",
        "model": MODEL,
        "removed": tuple(sorted(ORDER)),
        "blocks": BLOCKS,
        "seconds": {"searching": 412.5, "evaluating": 9.25, "writing the checkpoint": 0.285},
        "parameters": (1_200_000_000, 945_000_000),
        "nbytes": (2_400_000_000, 1_890_000_000),
        "evaluation": None,
        "evaluation_note": "no text was left over to measure on: give more, or fewer --windows",
        "verification": verification(),
        "environment": {
            "device": "NVIDIA H100 80GB HBM3",
            "dtype": "bfloat16",
            "threads": 16,
            "cpus": 16,
            "machine": "Linux x86_64",
        },
    }
    return RunRecord(**{**given, **changes})


def save(folder: Path, record: RunRecord, chosen: Plan) -> Path:
    """Write both files where a run leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder / "run.json")
    chosen.save(folder / "plan.json")
    return folder
