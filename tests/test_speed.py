"""Paired timing: order, medians, the bound, and what is left out with the reason."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter

import conftest
import sleb
from cli_tools import refused, run
from plan_tools import edit_config
from runtime_tools import ALONE, CPU, MODELS, PROMPT, WRITE, Costs, bench_model, bench_of
from sleb.core.errors import InputError, ResourceError
from sleb.core.progress import silent
from sleb.record import Stopwatch
from sleb.runtimes import worker
from sleb.runtimes.bench import (
    FULL,
    QUICK,
    Skipped,
    Speed,
    amdahl_bound,
    bench,
    fitting,
    gguf_file,
    median_ratio,
    random_prompts,
)
from sleb.runtimes.worker import Failed

out = conftest.cut


@pytest.fixture
def costs(monkeypatch):
    """No model is loaded: what is timed has known costs."""
    for name, value in (("log", []), ("loaded", []), ("full", set()), ("fails", {})):
        monkeypatch.setattr(Costs, name, value)
    monkeypatch.setattr(Costs, "at_load", None)
    monkeypatch.setattr(Costs, "live", 0)
    monkeypatch.setattr(worker, "Child", Costs)
    return Costs


def test_models_take_turns_there_and_back(costs):
    found = bench_of(*MODELS, runs=3).run([PROMPT, WRITE])
    there = [(10, False), (8, False), (10, True)]
    rounds = [turn for one in [there, there[::-1]] * 2 for turn in one]
    assert [(blocks, few) for blocks, _, few, _ in costs.log] == rounds * 2
    # memory is watched in the round that is not timed, and in no other
    assert [(b, n) for b, n, _, watched in costs.log if watched] == [
        (blocks, tokens) for tokens in (16, 16) for blocks in (10, 8)
    ]
    dense, pruned = found.models
    assert [one.seconds for one in dense.runs] == [(6.0,) * 3] * 2
    assert [one.seconds for one in pruned.runs] == [(5.0,) * 3] * 2
    assert (dense.peak_bytes, pruned.peak_bytes) == (10_000, 8_000)
    assert [one.tokens_per_second for one in dense.runs] == [16 / 6, 24 / 6]


def test_ratios_are_against_the_first_model_and_follow_from_the_costs(costs):
    found = bench_of(*MODELS, bench_model("smaller", 4)).run([PROMPT, WRITE])
    assert [(r.path, r.case, r.ideal) for r in found.ratios] == [
        ("pruned", "prompt", 1.25),
        ("pruned", "generate-2", 1.25),
        ("smaller", "prompt", 2.5),
        ("smaller", "generate-2", 2.5),
    ]
    for r in found.ratios:  # a machine without noise reaches the bound
        expected = pytest.approx(6 / (5 if r.path == "pruned" else 3))
        assert r.ratio.value == expected
        assert r.possible == expected


def test_one_model_has_no_ratios_and_no_bound(costs):
    found = bench_of(MODELS[0]).run([PROMPT])
    assert found.ratios == ()
    assert not any(fewest for _, _, fewest, _ in costs.log)


def test_a_median_ratio_has_an_interval_from_six_rounds_on():
    dense, halves = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], [2.0] * 9
    found = [median_ratio(dense[:n], halves[:n]) for n in (5, 6, 9)]
    assert [(one.value, one.low, one.high) for one in found] == [
        (1.5, None, None),
        (1.75, 0.5, 3.0),  # all but 2 in 64 orders
        (2.5, 1.0, 4.0),  # second and second to last
    ]
    # paired: a machine at half its pace in some rounds changes nothing
    drift = median_ratio([3.0, 6.0, 3.0, 6.0, 3.0, 6.0], [2.0, 4.0, 2.0, 4.0, 2.0, 4.0])
    assert (drift.value, drift.low, drift.high) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(
    ("dense", "fewest", "bound"),
    [  # 12 blocks of 1 s, 2 of which run in the shortest pass, 3 removed
        ([15.0], [5.0], 15 / 12),  # 3 s of overhead
        ([15.0, 30.0, 15.0], [5.0, 10.0, 5.0], 15 / 12),
        ([12.0], [2.0], 12 / 9),  # no overhead: ideal
        ([12.0], [0.5], 12 / 9),  # never more than ideal
        ([12.0], [12.0], None),
        ([12.0], [13.0], None),
        ([12.0], [float("nan")], None),
    ],
)
def test_the_bound_of_amdahls_law(dense, fewest, bound):
    found = amdahl_bound(dense, fewest, blocks=12, ran=2, removed=3)
    assert found == (bound if bound is None else pytest.approx(bound))


def test_a_case_without_memory_is_left_out_for_all_with_the_reason(costs):
    skipped: list[Skipped] = []
    costs.full = {(10, 8)}
    models = (bench_model("dense", 10), bench_model("pruned", 8))
    found = bench_of(*models, note=skipped.append).run([PROMPT, ALONE])
    assert [case.name for case in found.cases] == ["prompt"]
    assert [one.case for one in found.models[0].runs] == ["prompt"]
    assert {r.case for r in found.ratios} == {"prompt"}
    (memory,) = [one for one in skipped if one.reason == "out-of-memory"]
    assert (memory.cases, memory.models, memory.others) == (
        ("generate-1",),
        ("dense",),
        ("pruned",),
    )
    assert costs.log.count((8, 8, False, True)) == 1  # tried once, not in every round
    costs.full |= {(8, 8)}
    with pytest.raises(ResourceError, match="--quick"):
        bench_of(*models, note=skipped.append).run([ALONE])
    assert skipped[-1].models == ("dense", "pruned")


@pytest.mark.parametrize("why", ["at load", "by size"])
def test_models_that_do_not_fit_together_run_one_after_the_other(costs, why):
    skipped: list[Skipped] = []
    models = MODELS
    if why == "at load":
        costs.at_load = 1
    else:
        models = tuple(replace(m, parameters=10**15) for m in MODELS)
    found = bench_of(*models, note=skipped.append).run([PROMPT])
    assert [one.reason for one in skipped] == ["apart"]
    blocks = [blocks for blocks, *_ in costs.log]
    assert blocks == sorted(blocks, reverse=True)  # all of dense, then all of pruned
    (ratio,) = found.ratios
    assert (ratio.ratio.value, ratio.possible) == pytest.approx((6 / 5, 6 / 5))
    assert costs.live == 0


def test_a_model_that_does_not_fit_alone(costs):
    costs.at_load = 0
    for models in (MODELS[:1], MODELS):
        with pytest.raises(ResourceError, match="dense does not fit in memory"):
            bench_of(*models, note=lambda _: None).run([PROMPT])


def test_a_pass_with_fewest_blocks_that_fails_costs_only_the_bound(costs):
    skipped: list[Skipped] = []
    costs.fails = {"fewest": "KeyError: 'no state'"}
    (ratio,) = bench_of(*MODELS, note=skipped.append).run([PROMPT]).ratios
    assert (ratio.ratio.value, ratio.possible) == (6 / 5, None)
    assert [(one.reason, one.detail) for one in skipped] == [("no-bound", "KeyError: 'no state'")]


def test_another_runtime_that_fails_spoils_nothing_but_transformers_must_run(costs):
    skipped: list[Skipped] = []
    costs.fails = dict.fromkeys(("vllm", "transformers"), "RuntimeError: no kernel for this CPU")
    assert bench_of(*MODELS, runtime="vllm", note=skipped.append).run([PROMPT]) is None
    assert [(one.reason, one.runtime) for one in skipped] == [("unusable", "vllm")]
    assert "no kernel" in skipped[0].detail
    with pytest.raises(Failed, match="no kernel"):
        bench_of(*MODELS).run([PROMPT])


def test_llama_cpp_needs_a_file_of_each_model_and_runs_one_sequence(costs, tmp_path):
    skipped: list[Skipped] = []
    assert bench_of(*MODELS, runtime="llama.cpp", note=skipped.append).run([PROMPT]) is None
    assert [(one.reason, one.models) for one in skipped] == [("no-gguf", ("dense", "pruned"))]
    (file := tmp_path / "m.gguf").write_bytes(b"12345")
    models = [replace(model, gguf=file) for model in MODELS]
    found = bench_of(*models, runtime="llama.cpp", note=skipped.append).run([PROMPT, WRITE])
    assert found.cases == (PROMPT,)
    assert [m.file_bytes for m in found.models] == [5, 5]
    assert costs.loaded[0]["path"] == str(file)
    assert (skipped[-1].reason, skipped[-1].cases) == ("one-sequence", ("generate-2",))


def test_the_gguf_file_of_a_model(tmp_path):
    (folder := tmp_path / "m").mkdir()
    assert gguf_file(folder, folder) is None
    (folder / "a.gguf").touch()
    assert gguf_file("hub/name", folder) == gguf_file(folder, folder) == folder / "a.gguf"
    (folder / "b.gguf").touch()
    assert gguf_file(folder, folder) is None
    (beside := tmp_path / "m.gguf").touch()
    assert gguf_file(folder, folder) == gguf_file(beside, folder) == beside


def test_cases_are_clipped_to_what_every_model_reads():
    models = [bench_model("long", 10, longest=4096), bench_model("short", 8, longest=100)]
    fit, skipped = fitting(FULL, models)
    assert [(c.name, c.prompt_tokens) for c in fit] == [("prompt", 99), ("first-token", 99)]
    first = skipped[0]
    assert (first.reason, first.asked, first.used, first.limit) == ("shortened", 2048, 99, 100)
    assert [one.reason for one in skipped].count("too-long") == 4
    assert all(one.models == ("short",) for one in skipped)
    assert fitting(FULL, [bench_model("any", 10, longest=None)]) == (list(FULL), [])
    assert fitting(QUICK, models[:1]) == (list(QUICK), [])
    assert fitting([WRITE], [bench_model("exact", 10, longest=20)]) == ([WRITE], [])
    with pytest.raises(InputError, match="tiny reads only 1 token"):
        fitting(QUICK, [bench_model("tiny", 10, longest=1)])


def test_prompts_are_the_same_for_every_model():
    case = replace(PROMPT, batch=64, prompt_tokens=64)
    ids = random_prompts(case, 50)
    assert ids == random_prompts(case, 50)
    assert [len(row) for row in ids] == [64] * 64
    assert {token for row in ids for token in row} == set(range(50))


def test_what_was_skipped_is_facts(costs, tiny_dir, out):
    watch = Stopwatch(silent)
    found = bench(tiny_dir, [out], quick=True, **CPU, progress=watch)
    assert f"loading {tiny_dir.name} (transformers)" in watch.seconds
    given = json.loads(json.dumps(asdict(found)))
    assert given["skipped"][0]["reason"] == "shortened"
    assert TypeAdapter(Speed).validate_python(given) == found


def test_the_dtype_is_the_dense_models_for_all(costs, tiny_dir, out):
    bench(tiny_dir, [out], quick=True, dtype="bfloat16", device="cpu")
    assert [one["dtype"] for one in costs.loaded] == ["bfloat16"] * 2


def test_mistakes_are_found_before_anything_is_loaded(place, out, capsys, monkeypatch):
    monkeypatch.setattr(worker, "Child", lambda *_: pytest.fail("a model was loaded"))
    Path("empty").mkdir()
    shutil.copytree(out, "other")
    shutil.copytree(out, "wide")
    edit_config(Path("other"), vocab_size=300)
    edit_config(Path("wide"), hidden_size=64)
    for words, said in {
        "MODEL MODEL": "twice",
        f"{out} MODEL": "dense model first",
        "MODEL empty": "config.json",
        "MODEL ./gone": "./gone",
        "MODEL other": "its vocab_size is 300",
        "MODEL wide": "its hidden_size is 64",
        "MODEL --device gpu": "device",
        "MODEL --dtype float12": "dtype",
        "MODEL --runs 0": "--runs",
        "MODEL --threads 0": "--threads",
        "MODEL --draft": "pruned checkpoint",
    }.items():
        assert said in refused(capsys, 2, "bench", *words.split())
    with pytest.raises(InputError, match="its hidden_size is 64"):
        sleb.bench("MODEL", "wide")  # one, and not its letters


def test_the_command_line_shows_every_figure_or_prints_json(place, out, capsys, costs):
    command = ["bench", "MODEL", out, "--quick", "--device", "cpu"]
    ran = run(capsys, *command, "--runs", "2", "--json")
    assert ran.code == 0
    assert TypeAdapter(Speed).validate_python(ran.json).models[1].path == str(out)
    assert len(ran.json["models"][0]["runs"][0]["seconds"]) == 2
    ran = run(capsys, *command)
    assert ran.code == 0
    for figure in (str(out), "1.60", "2.00", "63.8"):
        assert figure in ran.out
