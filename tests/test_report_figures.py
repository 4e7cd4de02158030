"""Every figure on the page is the record's: a changed record changes the page, and where."""

from __future__ import annotations

import re

import pytest
from sleb.views.summary import SERVERS

from report_plan import HEX, plan, repaired_gap, repaired_plan
from report_record import complete, repaired
from report_tools import page, put, seen

# What is changed in the record, to what, in which part it shows, and how.
RECORD = [
    ("removed", (8, 7, 4), "sum-removed", "8, 7, 4"),
    (
        "parameters",
        (1_500_000_000, 750_000_000),
        "sum-removed",
        "1.50 billion → 750.0 million (−50.0 %)",
    ),
    ("nbytes", (3_000_000_000, 2_700_000_000), "sum-removed", "3.00 GB → 2.70 GB (−10.0 %)"),
    ("verification.checks.0.passed", False, "sum-removed", "5 of 6 passed"),
    ("evaluation.perplexity_ratio.value", 1.777, "sum-quality", "1.777× (1.087 to 1.123)"),
    ("evaluation.perplexity_ratio.low", 0.777, "texts", "1.105× (0.777 to 1.123)"),
    (
        "evaluation.domains.mail.perplexity_ratio.high",
        1.333,
        "sum-quality",
        "1.040× (0.990 to 1.333)",
    ),
    (
        "evaluation.domains.mail.perplexity_ratio.low",
        1.011,
        "sum-quality",
        "1.040× (1.011 to 1.090) worse",
    ),
    ("evaluation.divergence.value", 0.0666, "texts", "0.0666 (0.0731 to 0.0893)"),
    ("evaluation.agreement.high", 0.9, "texts", "87.1 % (86.2 to 90.0)"),
    ("evaluation.pruned_perplexity.value", 444.44, "texts", "444.4 (18.17 to 22.20)"),
    ("evaluation.tokens", 12_345, "texts", "predicted tokens: 12,345."),
    ("tasks.0.flips.lost", 47, "sum-quality", "47 lost, 12 won of 400"),
    ("tasks.0.flips.p_value", 0.2, "sum-quality", "41 lost, 12 won of 400 within noise"),
    ("tasks.0.flips.p_value", 0.03, "tasks", "p = 0.030 clear"),
    ("tasks.0.pruned.value", 0.111, "sum-quality", "60.0 % → 11.1 %"),
    ("tasks.1.flips.difference.low", -0.222, "tasks", "−1.0 points (−22.2 to +3.0)"),
    ("tasks.1.chance", 0.5, "tasks", "acc 200 50.0 %"),
    ("answers.pruned.repetitive.value", 0.321, "answers", "32.1 % (0.0 to 15.0)"),
    ("answers.identical.value", 0.5, "answers", "Identical answers: 50.0 % (13.0 to 42.0)."),
    ("answers.agreed_median", 77.0, "answers", "part, median: 77."),
    ("answers.seconds_per_token_ratio.value", 1.99, "answers", "original over pruned: 1.99×"),
    ("answers.languages", False, "answers", "Languages of one script were not told apart."),
    ("answers.pairs.4.pruned.tokens", 8_765, "answers", "tokens: 8765, in"),
    ("answers.pairs.4.agreed", 3, "answers", "Tokens until the answers part: 3."),
    ("answers.pairs.3.pruned.script", "Greek", "answers", "another language or script (Greek)."),
    ("speed.ratios.0.ratio.low", 1.111, "sum-saved", "1.31× (1.11 to 1.34)"),
    ("speed.ratios.0.ratio.low", 0.9, "sum-saved", "1.31× (0.90 to 1.34) within noise"),
    ("speed.ratios.0.ratio.high", 9.9, "speed", "1.31× (1.28 to 9.90)"),
    ("speed.ratios.0.ideal", 1.57, "speed", "1.57×"),
    ("speed.ratios.0.possible", None, "speed", "1.33× – better"),
    ("speed.models.1.peak_bytes", 1_500_000_000, "sum-saved", "3.00 GB → 1.50 GB (−50.0 %)"),
    ("speed.models.1.load_seconds", 7.77, "speed", "7.77 s"),
    ("speed.models.0.runs.3.tokens_per_second", 123.0, "sum-servers", "1,230 tokens per second"),
    ("speed.models.0.runs.3.tokens_per_second", 123.0, "speed", "123.0"),
    ("speed.ratios.3.ratio.value", 2.0, "sum-servers", "about 5.0 (7.8 to 8.3) busy"),
    ("speed.ratios.3.ratio.low", 0.5, "sum-servers", "within noise: a saving was not shown"),
    ("speed.device", "Xeon 8480", "sum-servers", "on Xeon 8480;"),
    ("speed.skipped", ("a100: broken",), "sum-untested", "Left out of the timing: a100: broken"),
    ("transfer.plans.0.increase.1.value", 0.55, "transfer", "0.5500 (0.1900 to 0.2300) *"),
    ("transfer.plans.1.away", ("mail",), "transfer", "0.1200 (0.1000 to 0.1400) *"),
    ("transfer.overlap", ((1.0, 0.25, 1.0),) * 3, "transfer", "25.0 %"),
    ("transfer.recommended", "manuals", "transfer", "the blocks chosen on manuals."),
    ("gate.rows.2.measured", 1.99, "summary", "1.99× at most 1.2×"),
    ("gate.rows.0.limit", 1.1999, "gate", "1.1234× at most 1.1999× yes"),
    ("verification.checks.0.measured", "none found", "exact", "passed none found re-indexed"),
    ("similarity.7", (0.1,) * 8 + (0.123,) * 5, "why", "input and output: 0.123."),
    ("similarity.7", (0.1,) * 8 + (0.123,) * 5, "similarity", "least those of block 7 (0.123)"),
    ("environment.device", "TPU", "provenance", "device TPU"),
    ("seconds.searching", 99.0, "provenance", "searching 99.00 s"),
    ("command", "sleb run", "provenance", "command sleb run"),
    ("started", "2027-01-02T03:04:05+00:00", "summary", "Run started 2027-01-02 03:04 UTC"),
    ("model", "other/model", "sum-rollback", "serve other/model again"),
]
PLAN = [
    ("rounds.0.scores.0.mean", 2.9301, "why", "round 1; score 2.9301. That is +0.0301 against"),
    ("rounds.0.scores.1.mean", 2.9555, "why", "block 6, was 0.0255 worse: more than noise."),
    ("baseline.mean", 2.8, "why", "round 1; score 2.9300. That is +0.1300 against the original."),
    ("baseline.mean", 2.8, "provenance", "2.8000 nats/token"),
    ("order", (8, 4, 7), "provenance", "order of removal 8, 4, 7"),
    ("protected", (1, 2), "provenance", "not candidates 1, 2"),
    ("metric", "kl", "why", "the divergence from the original’s predictions"),
    ("strategy", "beam", "provenance", "strategy beam"),
    ("dtype", "float16", "provenance", "precision float16"),
    (
        "curve.points.2.increase",
        0.1777,
        "curve",
        "3 (this) 8 0.1777 (0.1440 to 0.2040) 0.1980 1.194×",
    ),
    ("curve.points.2.nbytes", 7_770_000_000, "curve", "7.77 GB"),
    ("curve.points.2.speedup", 3.33, "curve", "3.33×"),
    ("curve.baseline.mean", 2.7777, "curve", "(loss 2.7777 nats per token)"),
    ("curve.heldout.windows", 99, "curve", "Windows: 99, of 256 tokens each"),
    ("target.limit", 0.4, "curve", "at most 0.4000 nats/token, with 95 % confidence"),
    ("target.reached", 0.3999, "curve", "Upper bound reached: 0.3999."),
    ("calibration.sources.0.sha256", "e" * 64, "provenance", "e" * 64),
    ("calibration.seed", 12, "provenance", "of 256 tokens each; seed 12."),
    ("versions.torch", "9.9", "provenance", "torch 9.9"),
    ("model.weights_sha256", "f" * 64, "provenance", "f" * 64),
]


SECOND = repaired_gap((7, 8), 10.0, (9,), mail=(2.93, 2.92), manuals=(3.16, 3.16))

# The same for a repaired cut: in the record, and in its plan.
REPAIRED_RECORD = [
    ("evaluation.unrepaired.perplexity_ratio.value", 1.777, "texts", "it is 1.777× (1.358 to"),
    (
        "evaluation.unrepaired.perplexity_ratio.high",
        1.666,
        "texts",
        "1.123) 1.432× (1.358 to 1.666",
    ),
    ("evaluation.perplexity_ratio.low", 1.011, "texts", "all texts is 1.105× (1.011 to 1.123)."),
    (
        "evaluation.unrepaired.domains.manuals.perplexity_ratio.low",
        1.222,
        "texts",
        "1.210× (1.150 to 1.270) 1.520× (1.222 to 1.630) 0.0812",
    ),
    ("verification.checks.0.passed", False, "sum-removed", "6 of 7 passed"),
    ("verification.checks.0.measured", "1 of 6 differ", "exact", "plan records passed 1 of 6 dif"),
]
REPAIRED_PLAN = [
    ("repair.gaps.1", SECOND, "sum-removed", "repair 8 matrices re-fitted; gaps repaired: 2 of 2"),
    ("repair.gaps.1", SECOND, "exact", "with the re-fitted matrices (8) of the repair"),
    ("repair.gaps.1", SECOND, "texts", "7, 8 2 10 2.9300 → 2.9200 3.1600 → 3.1600"),
    ("repair.gaps.0.ridge", 1.0, "texts", "4 6 1 2.9700 → 2.9300 3.2100 → 3.1600"),
    ("repair.gaps.0.before.mail", 2.9876, "texts", "4 6 0.1 2.9876 → 2.9300 3.2100 → 3.1600"),
    ("repair.gaps.0.after.manuals", 3.0987, "texts", "4 6 0.1 2.9700 → 2.9300 3.2100 → 3.0987"),
    ("repair.gaps.1.removed", (8,), "texts", "3.1600 8 0 kept none 2.9300"),
    ("repair.heldout.windows", 99, "texts", "on these windows (99, of 256 tokens each)"),
    ("repair.heldout.length", 64, "provenance", "Windows: 14, of 64 tokens each; seed 0."),
    ("repair.heldout.sha256", "c" * 64, "provenance", "c" * 64),
    ("repair.calibration.windows", 777, "provenance", "Windows: 777, of 256 tokens each"),
    ("repair.calibration.sources.1.tokens", 54_321, "provenance", f"{HEX} 40 54,321 12"),
    ("repair.calibration.sources.1.sha256", "d" * 64, "provenance", "d" * 64),
]


@pytest.fixture(scope="module")
def usual():
    return seen()


@pytest.fixture(scope="module")
def usual_repaired():
    return seen(repaired(), repaired_plan())


@pytest.mark.parametrize(("path", "new", "place", "shown"), RECORD)
def test_a_figure_of_the_record_is_on_the_page(usual, path, new, place, shown):
    assert shown not in usual.text(place)
    record = put(complete(), path, new)
    assert shown in seen(record).text(place)


@pytest.mark.parametrize(("path", "new", "place", "shown"), PLAN)
def test_a_figure_of_the_plan_is_on_the_page(usual, path, new, place, shown):
    assert shown not in usual.text(place)
    assert shown in seen(complete(), put(plan(), path, new)).text(place)


@pytest.mark.parametrize(("path", "new", "place", "shown"), REPAIRED_RECORD)
def test_a_figure_of_a_repaired_cuts_record_is_on_the_page(usual_repaired, path, new, place, shown):
    assert shown not in usual_repaired.text(place)
    assert shown in seen(put(repaired(), path, new), repaired_plan()).text(place)


@pytest.mark.parametrize(("path", "new", "place", "shown"), REPAIRED_PLAN)
def test_a_figure_of_the_repair_is_on_the_page(usual_repaired, path, new, place, shown):
    assert shown not in usual_repaired.text(place)
    assert shown in seen(repaired(), put(repaired_plan(), path, new)).text(place)


def numbers(text):
    return [
        float(n.replace(",", "").replace("−", "-"))
        for n in re.findall(r"[−+]?\d[\d,]*\.?\d*", text)
    ]


def test_the_first_page_has_no_number_that_is_not_worked_out_from_the_record(usual):
    r = complete()
    ratios = [x.ratio for x in r.speed.ratios]
    rate = r.speed.models[0].runs[3].tokens_per_second
    parts = {
        "sum-removed": [
            *(3, 12, 100 * 3 / 12, 0, 4, 7, 8),
            *(1.2, 945, 100 * (945 / 1200 - 1), 2.4, 1.89, 100 * (1.89 / 2.4 - 1), 6, 6),
        ],
        "sum-quality": [
            1,  # in the caption: no loss
            *(
                x
                for q in (*r.evaluation.domains.values(), r.evaluation)
                for x in ends(q.perplexity_ratio)
            ),
            *(60, 52.8, 41, 12, 400, 75, 74, 9, 7, 200),
        ],
        "sum-saved": [
            *(1, 512, *ends(ratios[0]), 1, 512, *ends(ratios[1])),
            *(1, 64, 128, *ends(ratios[2]), 8, 64, 128, *ends(ratios[3])),
            *(3.0, 2.52, -16.0),
        ],
        "sum-servers": [
            *(SERVERS * rate, SERVERS, rate, SERVERS / 1.25, SERVERS / 1.28, SERVERS / 1.2),
            *(8, 64, 128, 100, 80, 3),  # the case; H100 80GB HBM3
        ],
        "sum-rollback": [1, 2, 1],  # clerk-1b, up to depth 2
    }
    for place, expected in parts.items():
        found = numbers(usual.text(place).replace("clerk-1b", "clerk 1"))
        if place == "sum-rollback":
            found = found[:3]
        if place == "sum-quality":
            assert len(found) == len(expected)
        assert found == pytest.approx(expected, abs=0.06), place


def ends(found):
    return found.value, found.low, found.high


def test_numbers_of_charts_are_those_of_the_record():
    charts = {i.name: i.chart for s in page().sections for i in s.items if i.kind == "figure"}
    p, r = plan(), complete()
    assert charts["curve"].y == tuple(x.increase for x in p.curve.points)
    assert charts["curve"].low == tuple(x.low for x in p.curve.points)
    assert charts["curve"].high == tuple(x.high for x in p.curve.points)
    assert charts["curve"].chosen == 3
    assert charts["similarity"].values == r.similarity
    heat = charts["rounds"]
    for i, found in enumerate(p.rounds):
        best = min(s.mean for s in found.scores)
        for s in found.scores:
            assert heat.values[i][s.block] == pytest.approx(max(s.mean - best, 1e-4))
    assert heat.crosses == ((0, 7), (1, 4), (2, 8))
    assert set(heat.dots) == {
        (i, s.block) for i, x in enumerate(p.rounds) for s in x.scores if s.windows == 9
    }
    assert charts["speed"].values == tuple(x.ratio.value for x in r.speed.ratios)
    assert [name for name, _ in charts["speed"].references] == ["ideal", "possible"]
    assert charts["speed"].references[0][1] == tuple(x.ideal for x in r.speed.ratios)
    assert charts["memory"].series[1][1] == (3e9, 2.52e9)
    assert charts["memory"].marks[1] == (None, 3e9 - 2.4e9 + 1.89e9)
