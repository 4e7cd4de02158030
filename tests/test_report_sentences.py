"""Sentences say what the figures are, and no more: verdicts, reasons, gaps and exceptions."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from report_plan import bare_plan, plan, repaired_plan, run_plan
from report_record import complete, gate, repaired, sparse, speed
from report_tools import page, put, seen
from sleb.core.plan import Target
from sleb.core.statistics import Interval

NAN = float("nan")


@pytest.fixture(scope="module")
def usual():
    return seen()


def test_why_tells_noise_from_a_clear_margin(usual):
    said = re.findall(r"Block \d+ ranked.*?(?=Block \d+ ranked|$)", usual.text("why"))
    assert ["within noise" in s for s in said] == [False, True, False]
    assert "Rounds in which the choice was within noise: 1 of 3." in usual.text("rounds")


def test_why_names_what_a_rival_became():
    first = plan().rounds[0]
    scores = [s for s in first.scores if s.block != 6]
    without = put(plan(), "rounds.0.scores", tuple(scores))
    without = put(without, "rounds.0.scores.1.block", 4)
    assert "Block 4 was removed too, in round 2." in seen(chosen=without).text("why")
    worse = put(plan(), "rounds.0.scores.0.mean", 2.95)
    assert "Block 6 was 0.0080 better in this round;" in seen(chosen=worse).text("why")
    assert "Block 7 ranked 2 of 10" in seen(chosen=worse).text("why")
    early = put(worse, "rounds.0.scores.1.windows", 9)
    assert "given up early, is estimated to be 0.0080 better" in seen(chosen=early).text("why")


def test_a_run_of_neighbours_and_one_shot_are_told_as_such():
    only = plan().rounds[0]
    run = run_plan((only,))
    text = seen(complete(removed=(7, 8, 9)), run).text("why")
    assert text.count("the run of blocks 7 to 9 ranked 1 of 10;") == 1
    assert "The runner-up, the run that begins with block 6, was 0.0120 worse" in text
    for key, value, said in (
        ("mean", 2.95, "The run that begins with block 6 was 0.0080 better."),
        ("windows", 9, "The run that begins with block 6, which was given up early, is estimated"),
    ):
        run = put(run, f"rounds.0.scores.{1 if key == 'windows' else 0}.{key}", value)
        assert said in seen(complete(removed=(7, 8, 9)), run).text("why")
    assert "begins there" in seen(complete(removed=(7, 8, 9)), run).text("rounds")
    shot = plan(
        strategy="one-shot", rounds=(only.choosing(7, 6, 5),), order=(7, 6, 5), removed=(5, 6, 7)
    )
    text = seen(complete(removed=(5, 6, 7)), shot).text("why")
    assert [f"ranked {n} of 10 in round 1" in text for n in (1, 2, 3, 4)] == [True] * 3 + [False]
    assert text.count("runner-up") == 1
    ordered = plan(
        strategy="refine",
        rounds=tuple(
            put(r, "scores", tuple(s for s in r.scores if s.block in (4, 7, 8)))
            for r in plan().rounds
        ),
    )
    assert "found by swapping" in seen(chosen=ordered).text("why")
    assert "found by swapping" not in seen(chosen=plan(strategy="refine")).text("why")


def test_what_was_compared_in_the_end_is_told():
    whole = complete(removed=(7, 8, 9))
    text = seen(whole, run_plan(plan().rounds[:1])).text("why")
    assert "the best run of neighbouring blocks, and the blocks that were removed one" in text
    assert "(blocks 8, 7, 4). On 36 windows, of which the model had written 12 itself" in text
    assert "0.3000 and 0.5000 nats per token above the original: a difference of more" in text
    close = seen(whole, run_plan(plan().rounds[:1], excess=0.01)).text("why")
    assert "0.3000 and 0.3100 nats per token above the original: a difference within noise" in close
    assert "compared in the end" not in seen().text("why")


@pytest.mark.parametrize(
    ("kind", "limit", "reached", "shown"),
    [
        ("remove", 3, 3, "remove this many blocks: 3. Removed: 3."),
        ("speedup", 1.2, 1.27, "Target: 1.20× as fast at writing text, estimated. Reached: 1.27×."),
        ("size", 2e9, 1.89e9, "weights of at most 2.00 GB. Reached: 1.89 GB."),
    ],
)
def test_every_kind_of_target_is_told(kind, limit, reached, shown):
    target = Target(kind=kind, limit=limit, reached=reached)
    assert shown in seen(chosen=plan(target=target)).text("curve")


def test_what_was_not_measured_says_how_to_measure_it():
    found = seen(sparse(), bare_plan())
    for place, command in {
        "texts": "sleb eval models/clerk-1b --plan smaller/plan.json --text FILE --record smaller",
        "tasks": "sleb eval models/clerk-1b --plan smaller/plan.json --task FILE.jsonl",
        "answers": "sleb compare models/clerk-1b smaller --prompts FILE.jsonl --record smaller",
        "speed": "sleb bench models/clerk-1b smaller --record smaller",
        "transfer": "sleb transfer models/clerk-1b --text FILE1 --text FILE2 --remove N",
    }.items():
        assert "not measured" in found.text(place)
        assert command in found.text(place)
        assert command in found.text("sum-untested")
    assert "sleb run sleb.toml" in found.text("similarity")
    assert "sleb search models/clerk-1b --curve" in found.text("curve")
    assert "holds no scores" in found.text("rounds")
    assert "Block 7: the plan holds no score for it." in found.text("why")
    assert "Not known without a measurement of speed." in found.text("sum-servers")
    assert "No limits were set" in found.text("summary")
    assert "sleb verify smaller --model models/clerk-1b --gate gate.toml" in found.text("gate")
    everything = seen().text("sum-untested")
    assert "not measured" not in everything
    assert "Texts, languages and tasks other than those named" in everything


@pytest.mark.parametrize("nothing", [None, NAN])
def test_one_measurement_has_no_interval_and_says_so(nothing):
    alone = Interval(value=1.5, low=nothing, high=nothing)
    record = complete(evaluation=replace(complete().evaluation, perplexity_ratio=alone))
    for i in range(4):
        record = put(record, f"speed.ratios.{i}.ratio", alone)
    found = seen(record)
    assert "all texts 1.500× one measurement: no interval" in found.text("sum-quality")
    assert "1.50× one measurement: no interval" in found.text("sum-saved")
    assert "about 6.7 busy; no interval can be given." in found.text("sum-servers")
    assert "nan" not in found.text("summary").lower()
    assert "None" not in found.source
    seen(record, charts=True)
    bent = put(record, "similarity.3", (NAN,) * 13)
    assert "most alike are those of block 7" in seen(bent, charts=True).text("similarity")


def test_figures_that_are_not_finite_are_not_numbers_on_the_page():
    ratio = Interval(value=float("inf"), low=2.0, high=float("inf"))
    text = seen(put(complete(), "evaluation.perplexity_ratio", ratio)).text("texts")
    assert "∞× (2.000 to ∞)" in text
    assert "–×" in seen(put(complete(), "speed.ratios.0.ideal", NAN)).text("speed")


@pytest.mark.parametrize(
    ("judged", "tone", "headline", "text"),
    [
        (None, "none", "No limits were set", "does not judge"),
        (gate(passed=True), "good", "Passed", "Limits kept: 2 of 2."),
        (gate(), "bad", "Not passed", "Limits not kept: 2 of 4."),
    ],
)
def test_the_verdict_is_the_gates(judged, tone, headline, text):
    verdict = page(complete(gate=judged)).verdict
    assert (verdict.tone, verdict.headline) == (tone, headline)
    assert text in verdict.text
    assert (verdict.table is not None) == (tone == "bad")


def test_rows_of_the_gate_are_named_and_judged(usual):
    rows = usual.rows["gate"][1:]
    assert [row[0] for row in rows] == [
        "perplexity ratio, all texts",
        "speed, writing 8 × 64 tokens after 128",
        "perplexity ratio, manuals",
        "score kept, law",
    ]
    assert [row[3] for row in rows] == ["yes", "yes", "no", "no"]
    assert [row[2] for row in rows] == [
        "at most 1.2×",
        "at least 1.15×",
        "at most 1.2×",
        "at least 90.0 %",
    ]
    command = "sleb eval models/clerk-1b --plan smaller/plan.json --task NAME --record smaller"
    assert rows[3][1] == f"not measured; run {command}"
    failed = [row[0] for row in usual.rows["summary"][1:3]]
    assert failed == ["perplexity ratio, manuals", "score kept, law"]


@pytest.mark.parametrize(
    ("name", "missing", "shown"),
    [
        ("answers, switched", "", "answers, in another language or script"),
        ("perplexity ratio, answers", "", "perplexity ratio, answers"),
        ("perplexity ratio, all texts", "", "perplexity ratio, all texts"),
        (
            "speed-up, generate-8, small with vllm",
            "",
            "speed, writing 8 × 64 tokens after 128, small with vllm",
        ),
        (
            "memory",
            "the record has no 'x'; did you mean y?; run: sleb bench MODEL OUT",
            "the record has no “x”; run sleb bench models/clerk-1b smaller",
        ),
    ],
)
def test_a_name_in_the_gate_is_told_in_words_but_a_users_own_is_left_alone(name, missing, shown):
    record = put(complete(), "gate.rows.3.name", name)
    if missing:
        record = put(record, "gate.rows.3.missing", missing)
    cells = seen(record).rows["gate"][4]
    assert shown in cells[:2]


def test_more_texts_than_page_one_has_room_for_are_the_worst_ones():
    usual = complete().evaluation
    values = (1.5, 1.1, 1.9, 1.2, 1.7, 1.3, 1.6)
    domains = {
        f"t{i}": put(usual.domains["mail"], "perplexity_ratio.value", v)
        for i, v in enumerate(values)
    }
    found = seen(put(complete(), "evaluation.domains", domains))
    assert [row[0] for row in found.rows["sum-quality"][1:6]] == [
        "t2",
        "t4",
        "t6",
        "t0",
        "all texts",
    ]
    assert "3 more below; the worst are shown here." in found.text("sum-quality")
    assert len(found.rows["texts"]) == 1 + 7 + 1


def test_text_that_was_not_held_out_is_not_called_so(usual):
    assert "held-out text" in usual.text("sum-quality")
    assert "the same held-out text" in usual.text("texts")
    other = seen(complete(evaluation_note="9 windows of 256 tokens from mail.jsonl, b.txt"))
    assert "held-out" not in other.text("sum-quality") + other.text("texts")
    assert "given for this measurement: mail.jsonl, b.txt. That it took no part" in other.text(
        "texts"
    )


def test_a_repair_is_told_and_nothing_is_said_of_one_that_was_not(usual):
    """What is true of a plain cut alone is not said of a repaired one, and the other way round."""
    found = seen(repaired(), repaired_plan())
    without = "All figures of this section are of cuts without repair."
    for place, told in {
        "sum-removed": "repair 6 matrices re-fitted; gaps repaired: 1 of 2",
        "exact": "every other weight equals the original’s",
        "sum-rollback": "That cut has no repair;",
        "curve": without,
        "transfer": without,
        "texts": "Without the repair it is 1.432× (1.358 to 1.515), on the same windows.",
        "provenance": "Text that decided which fits of the repair stay",
    }.items():
        assert told in found.text(place), place
        assert told not in usual.text(place), place
    assert "repair none" in usual.text("sum-removed")
    assert "repair none" not in found.text("sum-removed")
    assert "repair" not in usual.text("texts") + usual.text("exact") + usual.text("provenance")
    names = [row[0] for row in found.rows["exact"]]
    assert "The weights that remain equal the original’s, but for the re-fitted matrices" in names
    assert "The weights that remain equal the original’s" not in names
    assert "The weights that remain equal the original’s" in [r[0] for r in usual.rows["exact"]]
    assert [len(row) for row in found.rows["texts"]] == [8] * 4 + [5] * 3
    assert [len(row) for row in usual.rows["texts"]] == [7] * 4
    heads = ["ratio", "ratio without repair"], ["removed blocks", "matrices re-fitted", "ridge"]
    assert found.rows["texts"][0][4:6] == heads[0]
    assert found.rows["texts"][4] == [*heads[1], "mail", "manuals"]
    assert "As they have chosen the fits, they flatter them" in found.text("texts")


def test_a_repair_of_which_no_fit_stayed_is_none():
    refused = repaired_plan()
    refused = put(
        refused,
        "repair.gaps.0",
        refused.repair.gaps[0].model_copy(
            update={"ridge": None, "tensors": (), "after": refused.repair.gaps[0].before}
        ),
    )
    found = seen(chosen=refused)
    assert "repair none" in found.text("sum-removed")
    assert "4 0 kept none 2.9700 → 2.9700" in found.text("texts")
    assert "every other weight" not in found.text("exact")
    assert "without repair" not in found.text("curve")


def test_the_gains_of_a_repair_are_shown_without_a_measurement_too():
    found = seen(repaired(evaluation=None), repaired_plan())
    assert "not measured" in found.text("texts")
    assert "4 6 0.1 2.9700 → 2.9300" in found.text("texts")
    one = put(repaired(), "evaluation.unrepaired.domains", {})
    mail = seen(one, repaired_plan()).rows["texts"][1]
    assert mail[4:6] == ["1.040× (0.990 to 1.090)", "–"]


def test_a_matrix_and_its_bias_are_one_matrix():
    chosen = repaired_plan()
    tensors = chosen.repair.gaps[0].tensors
    bias = put(tensors[0], "name", tensors[0].name.replace(".weight", ".bias"))
    both = put(chosen, "repair.gaps.0.tensors", (*tensors, bias))
    assert "6 matrices re-fitted" in seen(repaired(), both).text("sum-removed")


def test_the_worst_answers_come_first_and_equal_ones_are_not_shown(usual):
    shown = re.findall(r"Prompt (q\d)", usual.text("answers"))
    assert shown == ["q5", "q2", "q4", "q6", "q7", "q3"]
    same = tuple(p for p in complete().answers.pairs if p.identical)
    text = seen(put(complete(), "answers.pairs", same)).text("answers")
    assert "All answers are identical" in text


def test_a_case_that_is_neither_first_token_nor_slow_has_its_rate():
    rows = [row for row in seen().rows["speed"] if row[0].startswith("first token")]
    assert [row[-1] for row in rows[1:]] == ["–", "–"]


def test_several_pruned_models_are_told_apart():
    both = speed()
    both = put(both, "models", (*both.models, replace(both.models[1], path="tiny")))
    both = put(both, "ratios", (*both.ratios, *(replace(r, path="tiny") for r in both.ratios)))
    found = seen(complete(speed=both))
    assert len([r for r in found.rows["sum-saved"][1:] if r]) == 4  # this checkpoint's alone
    assert "writing 8 × 64 tokens after 128: tiny" in found.text("speed")
