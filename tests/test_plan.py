"""The plan: round trips, depth, and nothing that an untrusted file could do."""

import json
import re
from pathlib import Path

import pytest

from plan_tools import minimal
from sleb.core.errors import InputError
from sleb.core.plan import Plan, Round, Score, blocks_to_remove, parse_blocks
from sleb.selection.goal import Goal


def write(tmp_path, value):
    path = tmp_path / "plan.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_save_and_load_is_the_identity(tiny_plan, tmp_path):
    tiny_plan.save(tmp_path / "a.json")
    again = Plan.load(tmp_path / "a.json")
    assert again == tiny_plan
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_plan_of_schema_1_is_upgraded(tmp_path):
    """A real one, and the parts that it has none of."""
    old = json.loads((Path(__file__).parent / "data/plan-schema-1.json").read_text())
    plan = Plan.load(write(tmp_path, old))
    assert (old["strategy"], plan.strategy, plan.racing) == ("window, racing", "window", True)
    assert not plan.compiled
    assert plan.of_runs
    assert plan.repair is not None
    new = json.loads(plan.to_json())
    old["curve"]["fitted"] = None  # fields of later plans
    old["repair"]["healed"] = []
    changed = ("schema_version", "strategy", "racing", "compiled", "finals", "final_comparison")
    rest = [
        {k: v for k, v in p.items() if k not in (*changed, "split", "origin")} for p in (old, new)
    ]
    assert rest[0] == rest[1]
    assert (new["schema_version"], Plan.load(write(tmp_path, new))) == (3, plan)
    pair = [{"strategy": "greedy", "order": [b], "increase": 0.1, "excess": 0.0} for b in (1, 2)]
    finals = {"sets": pair, "fitted": 8192, "windows": 20, "own": 8}
    old |= {"strategy": "greedy, compiled", "finals": finals}
    plan = Plan.load(write(tmp_path, old))
    assert plan.strategy_label == "greedy, compiled"
    assert (plan.final_comparison.windows, plan.final_comparison.self_generated) == (20, 8)


def test_a_score_is_one_line_so_that_plans_diff_well(tiny_plan):
    lines = tiny_plan.to_json().splitlines()
    scores = sum(len(r.scores) for r in tiny_plan.rounds)
    assert sum('"block":' in line for line in lines) == scores
    assert max(map(len, lines)) <= 110


def test_every_round_and_the_calibration_are_recorded(tiny_plan):
    assert [len(r.scores) for r in tiny_plan.rounds] == [4, 3, 2]
    assert [r.removed for r in tiny_plan.rounds] == [(b,) for b in tiny_plan.order]
    assert tiny_plan.calibration.windows == 4
    assert tiny_plan.calibration.length == 16
    assert set(tiny_plan.versions) == {"sleb", "torch", "transformers", "python"}


def test_depth_is_the_first_removals():
    plan = Plan.model_validate(minimal())
    assert plan.at_depth(1) == (4,)
    assert plan.at_depth(2) == (1, 4)
    assert plan.at_depth(3) == plan.at_depth(None) == (1, 2, 4)
    for depth in (0, 4, -1):
        with pytest.raises(InputError, match=rf"--depth {depth} is outside this plan's 1..3"):
            plan.at_depth(depth)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"removed": [1, 2]}, "`removed` must be `order`, sorted"),
        ({"order": [4, 1, 1]}, "`removed` must be `order`, sorted"),
        ({"removed": [1, 2, 6], "order": [1, 2, 6]}, "removes block 6, but the model has 0..5"),
        ({"removed": [*range(6)], "order": [*range(6)]}, "removes every block"),
        ({"protected": [2]}, r"removes protected blocks \[2\]"),
        ({"removed": [-1], "order": [-1]}, "removed.0: Input should be greater"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"schema_version": 4}, "has plan schema 4, this sleb reads 1 to 3: upgrade sleb"),
        ({"baseline": {"mean": float("nan")}}, "baseline.mean: Input should be a finite number"),
        ({"metric": "x" * 5000}, "metric: String should have at most 4096"),
        ({"model": None}, "model: Input should be"),
    ],
)
def test_an_inconsistent_plan_is_refused_with_the_field(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        Plan.load(write(tmp_path, minimal(**changes)))
    assert "\n" not in str(error.value)


def test_a_missing_huge_or_unreadable_plan_is_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"no plan at .*; make one with: sleb search MODEL -o"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="not a valid plan: file: Invalid JSON"):
        Plan.load(write(tmp_path, "{"))
    with pytest.raises(InputError, match="not a valid plan"):
        Plan.load(write(tmp_path, "[" * 100_000))
    monkeypatch.setattr("sleb.core.plan.MAX_BYTES", 10)
    with pytest.raises(InputError, match="not a plan"):
        Plan.load(write(tmp_path, minimal()))


@pytest.mark.parametrize(
    ("target", "blocks", "want"),
    [(6, 30, 6), ("6", 30, 6), ("20%", 30, 6), ("10%", 32, 4), ("20%", 32, 7), ("20 %", 80, 16),
     ("7%", 100, 7), ("0.5%", 30, 1), ("12.5%", 32, 4)],
)  # fmt: skip
def test_targets_round_up_as_in_the_paper(target, blocks, want):
    assert blocks_to_remove(target, blocks) == want


@pytest.mark.parametrize(
    ("target", "message"),
    [("0", "removes nothing"), ("30", "is 30 of the model's 30 blocks; at most 29 can go"),
     ("100%", "at most 29"), ("six", "neither a number of blocks nor a percentage"),
     ("-1", "neither"), ("", "neither"), ("1e3", "neither"), ("nan%", "neither")],
)  # fmt: skip
def test_impossible_targets_are_refused(target, message):
    with pytest.raises(InputError, match=message):
        blocks_to_remove(target, 30)


def test_the_number_that_is_named_as_possible_is():
    for protect in ("", "0", "0,-1", "0-29"):
        with pytest.raises(InputError) as refused:
            Goal(remove=31).check_depth(30, protect)
        most = int(re.search(r"at most (\d+) can go", str(refused.value))[1])
        if most:
            Goal(remove=most).check_depth(30, protect)
        with pytest.raises(InputError):
            Goal(remove=most + 1).check_depth(30, protect)


def test_block_lists():
    assert parse_blocks("0,5-7,-1", 10) == {0, 5, 6, 7, 9}
    assert parse_blocks("", 10) == frozenset()
    assert parse_blocks(" 3 , ", 10) == {3}
    for text in ("x", "5-", "10", "-11", "7-5", "1.5"):
        with pytest.raises(InputError, match=r"is not a block|is outside the model's blocks 0..9"):
            parse_blocks(text, 10)


def test_a_margin_is_within_noise_below_two_paired_errors():
    def verdict(margin, se):
        scores = (Score(block=1, mean=1.0), Score(block=2, mean=1.0 + margin, excess_se=se))
        return Round(removed=(1,), scores=scores).runner_up()

    assert verdict(0.1, 0.04)[2] is False
    assert verdict(0.1, 0.06)[2] is True
    assert verdict(0.1, None)[2] is True
    assert Round(removed=(1,), scores=(Score(block=1, mean=1.0),)).runner_up() is None
