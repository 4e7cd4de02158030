"""Timing in turn: order, medians, what is possible, and what is left out with the reason."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from rich.console import Console

import sleb
from cli_tools import refused, run
from sleb.cli.render_speed import speed as render
from sleb.core.errors import InputError, ResourceError
from sleb.runtimes import bench as speed
from sleb.runtimes import bench_runs as benching
from sleb.runtimes.bench import Speed, bench
from sleb.runtimes.bench_runs import fitting, median_ratio, possible
from sleb.runtimes.paired import Entry, interleaved
from sleb.runtimes.worker import Failed
from speed_tools import ALONE, CPU, MODELS, PROMPT, WRITE, Fake, bench_of, settings, subject


@pytest.fixture(scope="module")
def out(tiny_dir, tiny_plan, tmp_path_factory) -> Path:
    return sleb.apply(tiny_plan, tiny_dir, tmp_path_factory.mktemp("cut") / "out")


@pytest.fixture
def fakes(monkeypatch):
    """No model is loaded: workers are fakes."""
    Fake.log, Fake.out_of, Fake.at_load, Fake.live = [], {}, None, 0
    monkeypatch.setattr(benching, "Worker", Fake)


# -- turns -----------------------------------------------------------------------------------------


def test_models_take_turns_there_and_back(fakes):
    part = bench_of(*MODELS, runs=3).under("transformers", [PROMPT, WRITE])
    there = [("dense", False), ("pruned", False), ("dense", True)]
    rounds = [there, there[::-1], there, there[::-1]]
    for case in ("prompt", "generate-2"):
        order = [(name, short) for name, of, short, _ in Fake.log if of == case]
        assert order == [turn for one in rounds for turn in one]
    # memory is watched in the round that is not timed, and in no other
    watched = [(name, case) for name, case, _, watched in Fake.log if watched]
    assert watched == [(n, c) for c in ("prompt", "generate-2") for n in ("dense", "pruned")]
    dense, pruned = part.models
    assert [run.seconds for run in dense.runs] == [(6.0,) * 3] * 2
    assert [run.seconds for run in pruned.runs] == [(5.0,) * 3] * 2
    assert (dense.peak_bytes, pruned.peak_bytes) == (10_000, 8_000)
    assert [run.tokens_per_second for run in dense.runs] == [16 / 6, 24 / 6]


def test_ratio_ideal_and_possible_follow_from_the_costs(fakes):
    ratios = bench_of(*MODELS).under("transformers", [WRITE]).ratios
    (ratio,) = ratios
    assert (ratio.path, ratio.runtime, ratio.case) == ("pruned", "transformers", "generate-2")
    assert ratio.ratio.value == pytest.approx(6 / 5)
    assert ratio.ideal == 10 / 8
    assert ratio.possible == pytest.approx(6 / 5)  # what the costs of Fake are


def test_every_pruned_model_is_held_against_the_first(fakes):
    models = (*MODELS, subject("smaller", 4))
    part = bench_of(*models).under("transformers", [PROMPT, WRITE])
    assert [(r.path, r.case, r.ideal) for r in part.ratios] == [
        ("pruned", "prompt", 1.25),
        ("pruned", "generate-2", 1.25),
        ("smaller", "prompt", 2.5),
        ("smaller", "generate-2", 2.5),
    ]
    assert part.ratios[-1].possible == pytest.approx(2.0)


def test_one_model_has_no_ratios_and_is_not_shortened(fakes):
    part = bench_of(MODELS[0]).under("transformers", [PROMPT])
    assert part.ratios == ()
    assert not any(short for _, _, short, _ in Fake.log)


def test_a_median_ratio_has_an_interval_from_six_rounds_on():
    dense = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    halves = [2.0] * 9
    five = median_ratio(dense[:5], halves[:5])
    assert (five.value, five.low, five.high) == (1.5, None, None)
    six = median_ratio(dense[:6], halves[:6])
    assert (six.value, six.low, six.high) == (1.75, 0.5, 3.0)  # all but 2 in 64 orders
    nine = median_ratio(dense, halves)
    assert (nine.value, nine.low, nine.high) == (2.5, 1.0, 4.0)  # second and second to last
    # paired: a machine at half its pace in some rounds changes nothing
    drift = median_ratio([3.0, 6.0, 3.0, 6.0, 3.0, 6.0], [2.0, 4.0, 2.0, 4.0, 2.0, 4.0])
    assert (drift.value, drift.low, drift.high) == (1.5, 1.5, 1.5)


def test_what_is_possible():
    def of(dense: list[float], shortened: list[float], removed: int) -> float | None:
        return possible(dense, shortened, blocks=12, kept=2, removed=removed)

    # 3 s for all else, 1 s a block
    assert of([15.0], [5.0], 3) == pytest.approx(15 / 12)
    assert of([15.0, 30.0, 15.0], [5.0, 10.0, 5.0], 3) == pytest.approx(15 / 12)
    assert of([12.0], [2.0], 3) == pytest.approx(12 / 9)  # all else is free: ideal
    assert of([12.0], [0.5], 3) == pytest.approx(12 / 9)  # never more than ideal
    assert of([12.0], [12.0], 3) is None
    assert of([12.0], [13.0], 3) is None
    assert of([12.0], [float("nan")], 3) is None


# -- memory that ends ------------------------------------------------------------------------------


def test_a_case_without_memory_is_left_out_with_the_reason(fakes):
    said: list[str] = []
    Fake.out_of = {"dense": {"generate-2"}}
    part = bench_of(*MODELS, note=said.append).under("transformers", [PROMPT, WRITE, ALONE])
    assert [case.name for case in part.cases] == ["prompt", "generate-1"]
    assert [run.case for run in part.models[0].runs] == ["prompt", "generate-1"]
    assert {r.case for r in part.ratios} == {"prompt", "generate-1"}
    assert "generate-2: out of memory with dense, though pruned had enough" in said
    # and it is tried once, not in every round
    assert len([1 for n, c, s, _ in Fake.log if (n, c, s) == ("pruned", "generate-2", False)]) == 1


def test_no_case_fits(fakes):
    said: list[str] = []
    Fake.out_of = {"dense": {"generate-2"}, "pruned": {"generate-2"}}
    with pytest.raises(ResourceError, match="no case fits in memory; try --quick"):
        bench_of(*MODELS, note=said.append).under("transformers", [WRITE])
    assert "generate-2: out of memory with dense, pruned" in said


@pytest.mark.parametrize("why", ["at load", "by size"])
def test_models_that_do_not_fit_together_run_one_after_the_other(fakes, monkeypatch, why):
    said: list[str] = []
    models = MODELS
    if why == "at load":
        Fake.at_load = 1
    else:
        models = tuple(replace(m, parameters=10**15) for m in MODELS)
    part = bench_of(*models, note=said.append).under("transformers", [PROMPT])
    assert [line for line in said if "one after the other" in line] == said
    assert len(said) == 1
    names = [name for name, *_ in Fake.log]
    assert names == sorted(names)  # all of dense, then all of pruned
    assert part.ratios[0].ratio.value == pytest.approx(6 / 5)
    assert part.ratios[0].possible == pytest.approx(6 / 5)
    assert Fake.live == 0


def test_a_model_that_does_not_fit_alone(fakes):
    Fake.at_load = 0
    with pytest.raises(ResourceError, match="dense: out of memory"):
        bench_of(MODELS[0]).under("transformers", [PROMPT])
    with pytest.raises(ResourceError, match="dense: out of memory"):
        bench_of(*MODELS, note=lambda _: None).under("transformers", [PROMPT])


def test_a_shortened_model_that_fails_costs_only_what_is_possible(fakes):
    class Fragile(Fake):
        def run(self, case, *, shortened=False, watched=False):
            if shortened:
                raise Failed("KeyError: 'no state'")
            return super().run(case, watched=watched)

    said: list[str] = []
    one = Fragile("dense", settings(Path("x")))
    entries = [Entry(model=0, worker=one), Entry(model=0, worker=one, shortened=True)]
    found = interleaved(entries, PROMPT, 2, lambda *_: None, said.append)
    assert set(found) == {(0, False)}
    assert len(found[0, False].seconds) == 2
    assert said == ["what is possible for prompt: not measured (KeyError: 'no state')"]


def test_a_failure_that_is_no_want_of_memory_ends_the_bench(fakes):
    class Broken(Fake):
        def run(self, case, *, shortened=False, watched=False):
            raise Failed("ValueError: a bug")

    entries = [Entry(model=0, worker=Broken("dense", settings(Path("x"))))]
    with pytest.raises(Failed, match="a bug"):
        interleaved(entries, PROMPT, 2, lambda *_: None, pytest.fail)


# -- lengths ---------------------------------------------------------------------------------------


def test_cases_are_clipped_to_what_every_model_reads():
    short = subject("short", 8, longest=100)
    kept, notes = fitting(speed.FULL, [subject("long", 10, longest=4096), short])
    assert [(c.name, c.prompt_tokens) for c in kept] == [("prompt", 99), ("first-token", 99)]
    assert notes[0] == "prompt: prompts of 2048 tokens, shortened to 99, as short reads 100"
    assert "generate-8: 128 new tokens are more than the 100 that short reads" in notes
    assert len(notes) == 6
    assert fitting(speed.FULL, [subject("any", 10, longest=None)]) == (list(speed.FULL), [])
    assert fitting(speed.QUICK, [subject("long", 10, longest=4096)]) == (list(speed.QUICK), [])
    exact = fitting([WRITE], [subject("exact", 10, longest=20)])
    assert exact == ([WRITE], [])
    with pytest.raises(InputError, match="tiny reads only 1 tokens; there is no case for it"):
        fitting(speed.QUICK, [subject("tiny", 10, longest=1)])


def test_cases_are_those_that_the_documentation_names():
    sizes = {c.name: (c.batch, c.prompt_tokens, c.new_tokens) for c in speed.FULL}
    assert sizes["prompt"] == (1, 2048, 0)
    assert sizes["first-token"][2] == 1
    for n in (1, 8, 32, 64):
        assert sizes[f"generate-{n}"] == (n, 64, 128)


# -- other runtimes -------------------------------------------------------------------------------


@pytest.fixture
def pretending(monkeypatch, tmp_path, fakes):
    monkeypatch.setattr(
        "sleb.runtimes.adapters.find_spec", lambda module: None if module == "vllm" else module
    )


def test_llama_cpp_needs_files_of_every_model(tiny_dir, out, pretending):
    found = bench(tiny_dir, [out], quick=True, **CPU)
    assert f"llama.cpp: there is no .gguf file of {tiny_dir}, {out}" in found.skipped
    assert {m.runtime for m in found.models} == {"transformers"}


def test_a_runtime_that_fails_is_said_and_spoils_nothing(fakes, monkeypatch):
    class Broken(Fake):
        def __init__(self, name, given):
            if given.runtime == "vllm":
                raise Failed("RuntimeError: no kernel for this CPU")
            super().__init__(name, given)

    monkeypatch.setattr(benching, "Worker", Broken)
    said: list[str] = []
    assert bench_of(*MODELS, note=said.append).under("vllm", [PROMPT]) is None
    assert said == ["vllm: installed, but cannot be used: RuntimeError: no kernel for this CPU"]


# -- mistakes --------------------------------------------------------------------------------------


def test_mistakes_are_found_before_anything_is_loaded(place, out, capsys, monkeypatch):
    monkeypatch.setattr(benching, "Worker", lambda *_: pytest.fail("a model was loaded"))
    said = refused(capsys, 2, "bench", "MODEL", "MODEL")
    assert said == "MODEL is given twice; give each model once, the dense one first"
    said = refused(capsys, 2, "bench", out, "MODEL")
    assert said == (
        f"MODEL has 6 blocks and {out} 3; give the dense model first, and then what was made of it"
    )
    Path("empty").mkdir()
    assert "empty has no config.json" in refused(capsys, 2, "bench", "MODEL", "empty")
    assert "no model at ./gone" in refused(capsys, 2, "bench", "MODEL", "./gone")
    config = json.loads((out / "config.json").read_text())
    shutil.copytree(out, "other")
    for field, value in (("vocab_size", 300), ("hidden_size", 64)):
        Path("other/config.json").write_text(json.dumps({**config, field: value}))
        assert refused(capsys, 2, "bench", "MODEL", "other") == (
            f"other is not MODEL with blocks removed: its {field} is {value}, not {config[field]}"
        )
    assert "is not a device" in refused(capsys, 2, "bench", "MODEL", "--device", "gpu")
    assert "unknown dtype" in refused(capsys, 2, "bench", "MODEL", "--dtype", "float12")
    for name in ("runs", "threads"):
        with pytest.raises(InputError, match=f"--{name} 0 is not possible; give at least 1"):
            bench("MODEL", **{**CPU, name: 0})


def test_the_dtype_is_the_dense_models_for_all(tiny_dir, out, fakes, monkeypatch):
    seen: list[str] = []

    class Seeing(Fake):
        def __init__(self, name, given):
            seen.append(given.dtype)
            super().__init__(name, given)

    monkeypatch.setattr(benching, "Worker", Seeing)
    bench(tiny_dir, [out], quick=True, dtype="bfloat16", device="cpu")
    assert seen == ["bfloat16"] * 2


# -- the terminal ----------------------------------------------------------------------------------


def drawn(found: Speed, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    render(console, found)
    return console.file.getvalue()


def test_the_terminal_shows_everything_in_80_columns(fakes, tiny_dir, out):
    found = bench(tiny_dir, [out], quick=True, **CPU)
    text = drawn(replace(found, skipped=("generate-64: out of memory with [dense]",)))
    lines = text.splitlines()
    assert max(map(len, (line for line in lines if str(tiny_dir) not in line))) <= 80
    assert f"dense: {tiny_dir}" in text
    assert "- generate-64: out of memory with [dense]" in text
    for line in (
        "prompt of 255         dense           4       4 to 4      63.8",
        "first token after 64  dense           4       4 to 4",
        "4 x (32 + 16)         dense           4       4 to 4      16.0",
        "4 x (32 + 16)         1.60 (1.60 to 1.60)      1.60   2.00",
    ):
        assert any(" ".join(line.split()) in " ".join(shown.split()) for shown in lines), line
    assert "unsteady" not in text
    wild = replace(found.models[0].runs[1], high=5.0)
    model = replace(found.models[0], runs=(found.models[0].runs[0], wild))
    said = " ".join(drawn(replace(found, models=(model, *found.models[1:]))).split())
    assert "unsteady: quartiles of first token after 64 are more than 20% apart; repeat" in said
    few = bench(tiny_dir, [out], quick=True, runs=3, **CPU)
    assert "95 % interval from 6 runs on: --runs 6" in " ".join(drawn(few).split())
    alone = drawn(bench(tiny_dir, quick=True, **CPU))
    assert "times as fast" not in alone
    assert "ratio" not in alone


def test_several_pruned_models_are_numbered(fakes, tiny_dir, out, tmp_path):
    other = shutil.copytree(out, tmp_path / "other")
    text = drawn(bench(tiny_dir, [out, other], quick=True, **CPU))
    assert f"pruned 1: {out}" in text
    assert f"pruned 2: {other}" in text
    assert "pruned 2, 4 x (32 + 16)" in text


def test_the_command_line_prints_json(place, out, capsys, fakes):
    ran = run(capsys, "bench", "MODEL", out, "--quick", "--runs", "2", "--device", "cpu", "--json")
    assert ran.code == 0
    assert TypeAdapter(Speed).validate_python(ran.json).models[1].path == str(out)
    assert len(ran.json["models"][0]["runs"][0]["seconds"]) == 2
