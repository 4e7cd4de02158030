"""The benchmark of performance and the cost model: the parts that decide what a figure means."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import sleb
from sleb.core.errors import InputError
from sleb.models.compiled import CompiledStack
from sleb.models.stack import BlockStack
from sleb.selection.objective import DENSE, BlockSet

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import perf_speed  # noqa: E402
import performance  # noqa: E402
import scale  # noqa: E402
from perf_core import OutOfTime, Run  # noqa: E402
from perf_render import render  # noqa: E402
from perf_shapes import SHAPES, random_llama, shape_of, shortened  # noqa: E402
from race_model import Losses, Spread, fit  # noqa: E402


@pytest.fixture(scope="module")
def tiny():
    return random_llama(SHAPES["tiny"], torch.device("cpu"))


def test_parameters_and_operations_of_a_block_are_those_of_the_model(tiny):
    shape = shape_of(tiny.config)
    linear = [m for m in tiny.model.layers[0].modules() if isinstance(m, torch.nn.Linear)]
    assert shape.block_parameters == sum(m.weight.numel() for m in linear)
    tokens = 3
    products = 2 * tokens * shape.block_parameters
    # token t sees t tokens: a product of its query with each key, and of each weight with a value
    attention = sum(2 * 2 * seen * shape.width for seen in (1, 2, 3))
    assert shape.block_flops(tokens) == products + attention


def test_a_shortened_model_is_the_bypassed_one_and_shares_its_weights(tiny):
    gone = frozenset({2, 5})
    short = shortened(tiny, gone)
    ids = torch.randint(0, 256, (2, 16))
    with torch.inference_mode(), BlockStack(tiny).bypassed(gone):
        whole = tiny(input_ids=ids, use_cache=False).logits
    with torch.inference_mode():
        torch.testing.assert_close(short(input_ids=ids, use_cache=False).logits, whole)
    mine = short.model.layers[2].mlp.up_proj.weight
    assert mine.data_ptr() == tiny.model.layers[3].mlp.up_proj.weight.data_ptr()
    steps = perf_speed.generated(short, ids, 3)  # with a cache: layers must be renumbered
    assert steps.shape == (2, 19)


def test_the_line_says_what_a_cut_could_reach():
    blocks = {"dense": 32, "10%": 28, "20%": 25, "half": 16, "quarter": 8}
    times = {name: [1.0 + 0.5 * n] * 3 for name, n in blocks.items()}
    times["20%"] = [1.05 * t for t in times["20%"]]
    found = perf_speed.against_line(times, blocks)["cuts"]
    assert found["10%"]["over_ideal"] == pytest.approx(0, abs=1e-4)
    assert found["20%"]["over_ideal"] == pytest.approx(0.05, abs=1e-4)
    assert found["10%"]["speedup_at_best"] == pytest.approx(17 / 15, abs=1e-4)


def test_a_failing_section_is_recorded_and_the_next_one_runs(tmp_path):
    run = Run(tmp_path / "out.json", 100, torch.device("cpu"), {})

    def fails(row):
        row["before"] = 1
        raise ValueError("broken")

    def ends(row):
        raise OutOfTime("late")

    run.section("a", fails, 0)
    run.section("b", ends, 0)
    run.section("c", lambda row: row.update(x=2), 0)
    run.section("d", lambda row: row.update(x=2), 1e6)
    found = json.loads((tmp_path / "out.json").read_text())["sections"]
    assert found["a"]["before"] == 1
    assert "broken" in found["a"]["error"]
    assert found["b"]["stopped"] == "late"
    assert found["c"]["x"] == 2
    assert "skipped" in found["d"]
    assert "x" not in found["d"]


def test_the_benchmark_runs_and_its_page_shows_it(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    sections = "machine,7b.search,7b.exact,7b.repair,7b.speed,70b"
    monkeypatch.setattr(
        sys,
        "argv",
        ["performance.py", "--shape", "tiny", "-o", str(out), "--sections", sections],
    )
    performance.main()
    report = json.loads(out.read_text())
    bad = {
        name: row
        for name, row in report["sections"].items()
        if row.keys() & {"error", "skipped", "stopped"}
    }
    assert not bad
    search = report["sections"]["7b.search"]
    assert len(search["order"]) == 2
    assert search["block_forwards"] == sum(c["block_forwards"] for c in search["calls"])
    assert search["heads"] >= search["windows_times_candidates"] > 0
    assert not any("error" in c for c in report["sections"]["7b.speed"]["cases"].values())
    page = render([out])
    assert "no figures" in page  # of tiny shapes
    for heading in ("### Search", "### Repair", "### Prompt and generation", "### 70B shape"):
        assert heading in page
    capsys.readouterr()


def test_the_committed_page_is_the_rendered_one():
    """By the results that are committed, if any; nothing on it is written by hand."""
    results = sorted((ROOT / "benchmarks/results").glob("performance*.json"))
    assert (ROOT / "docs/performance.md").read_text() == render(results)


@pytest.mark.slow
def test_full_batches_run_compiled_and_agree(tiny):
    stack = BlockStack(tiny)
    fused = CompiledStack(tiny, 4)
    ids = torch.randint(0, 256, (4, 32))
    hidden, calls = stack.enter(ids)
    torch._dynamo.utils.counters.clear()
    for i in (1, 2, 3):
        found, own = fused.run(i, hidden, calls[i]), stack.run(i, hidden, calls[i])
        torch.testing.assert_close(found, own, atol=2e-2, rtol=2e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for all blocks
    part, calls = stack.enter(ids[:2])
    assert torch.equal(fused.run(1, part, calls[1]), stack.run(1, part, calls[1]))


def test_streamed_blocks_are_not_compiled(tiny, monkeypatch):
    refused = r"streamed blocks cannot be compiled: leave out --compile or --stream"
    with pytest.raises(InputError, match=refused):
        sleb.search("nowhere", remove=1, compile=True, stream=True)  # before it looks for a model
    monkeypatch.setattr(BlockStack, "streamed", True)
    with pytest.raises(InputError, match=refused):
        CompiledStack(tiny, 4)


@pytest.mark.slow
def test_a_compiled_search_finds_the_same_and_says_so(tiny_dir, monkeypatch):
    ran, own = [], CompiledStack.run

    def run(self, i, hidden, call):
        ran.append(len(hidden) == self.windows)
        return own(self, i, hidden, call)

    monkeypatch.setattr(CompiledStack, "run", run)
    options = {"remove": 2, "windows": 8, "length": 32, "batch": 4, "dtype": "float32"}
    plain = sleb.search(tiny_dir, device="cpu", **options)
    assert not ran
    fused = sleb.search(tiny_dir, device="cpu", compile=True, **options)
    assert any(ran)
    assert fused.order == plain.order
    assert (plain.strategy_label, fused.strategy_label) == (
        "greedy, racing",
        "greedy, racing, compiled",
    )


SPREAD = Spread(
    damages=(0.1, 0.2, 0.4), own_floor=0.03, own_slope=0.2, fresh=0.02, joint=0.01, level=0.4
)


def test_drawn_losses_have_the_spread_that_they_are_drawn_from():
    losses = Losses(SPREAD, 24, 4000, seed=1)
    sets = [DENSE, *(BlockSet([b]) for b in range(24))]
    best = min(range(24), key=lambda b: losses.damage[b])
    sets += [BlockSet([best, b]) for b in range(24) if b != best]
    values = dict(zip(sets, losses(sets, 0, 4000), strict=True))
    again = fit(values)
    assert again.fresh == pytest.approx(SPREAD.fresh, rel=0.05)
    assert again.own_floor == pytest.approx(SPREAD.own_floor, rel=0.1)
    assert again.own_slope == pytest.approx(SPREAD.own_slope, rel=0.1)
    assert again.level == pytest.approx(SPREAD.level, rel=0.05)
    assert again.joint == pytest.approx(SPREAD.joint, rel=0.6)  # of 23 sets
    np.testing.assert_array_equal(losses(sets[:3], 5, 9), losses(sets[:3], 0, 9)[:, 5:])


def test_more_ranks_never_take_longer_and_two_halve_the_work():
    race = scale.Simulated(12, 2, 32, 1, Losses(SPREAD, 12, 32, seed=0))
    times = [race.busiest(n)[0] for n in (1, 2, 4, 8, 64)]
    assert times[0] == race.forwards
    assert times == sorted(times, reverse=True)
    assert times[1] < 0.65 * times[0]
    # more ranks than calls share a call by its candidates
    whole = sum(max(scale.block_forwards(s, 12) * (b - a) for s, a, b in x) for x in race.steps)
    assert times[4] < 0.8 * whole
    assert race.by_formula() == pytest.approx(race.forwards, rel=0.25)


def test_a_model_too_large_for_all_gpus_is_streamed():
    race = scale.Simulated(12, 1, 8, 1, Losses(SPREAD, 12, 8, seed=0))
    rates = scale.rates([])
    large = scale.MODELS[1]
    few, many = (scale.predict(large, n, 1, [race], rates) for n in (8, 64))
    assert few["streamed"]
    assert few["seconds"]["fetch"] > 0
    assert not many["streamed"]
    assert many["group"] == 16
    assert many["replicas"] == 4
    assert few["seconds"]["total"] > many["seconds"]["total"]


def test_examples_for_clusters_start_the_search_with_torchrun():
    job = yaml.safe_load((ROOT / "examples/pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    policy = job["spec"]["elasticPolicy"]
    assert policy["minReplicas"] == policy["maxReplicas"] == worker["replicas"]
    container = worker["template"]["spec"]["containers"][0]
    assert container["name"] == "pytorch"
    assert container["command"][0] == "torchrun"
    each = int(container["command"][container["command"].index("--nproc-per-node") + 1])
    assert each == container["resources"]["limits"]["nvidia.com/gpu"]
    batch = (ROOT / "examples/slurm.sbatch").read_text()
    for text in (" ".join(container["command"]), batch.replace(" \\\n", " ")):
        assert "-m sleb search" in text
        assert "--remove 10% --windows 128 --length 2048 --dtype bfloat16" in text
