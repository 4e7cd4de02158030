"""The benchmarks on tiny models: each script runs, and its figures are what they say."""

import importlib
import json
import random
import re
import sys
from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
import yaml

import sleb
from sleb.core.errors import InputError
from sleb.models.stack import BlockStack
from sleb.repairs.regression import Regression, gaps
from sleb.selection.objective import BlockSet

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import choosing  # noqa: E402
import plot  # noqa: E402
import quality  # noqa: E402
import scale  # noqa: E402
from latency import against_line, generated  # noqa: E402
from merging import Merging  # noqa: E402
from pages import render  # noqa: E402
from race_model import Losses, Spread, fit  # noqa: E402
from shapes import SHAPES, random_llama, shape_of, shortened  # noqa: E402
from texts import DOMAINS, UNSEEN, prepare  # noqa: E402

SENTENCES = (  # what the model of conftest has learned
    "the block of a model passes its input through",
    "and nothing at all is lost",
    "for ever",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of texts and items as the benchmarks want it."""
    folder, place = tmp_path_factory.mktemp("data"), random.Random(0)
    for path in [*(f for files in DOMAINS.values() for f in files), *UNSEEN.values()]:
        rows = [". ".join(place.choices(SENTENCES, k=20)) for _ in range(12)]
        if path.endswith(".jsonl"):
            rows = [json.dumps({"text": row}) for row in rows]
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "answers").mkdir()
    for kind, judged in (("code", {"tests": "assert True"}), ("math", {"regex": "."})):
        item = {"prompt": "for ever", **judged}
        (folder / f"answers/{kind}_dev.jsonl").write_text(json.dumps(item) + "\n")
    asked = [json.dumps({"prompt": f"the block of a model {n}"}) for n in range(12)]
    (folder / "answers/code_fit.jsonl").write_text("\n".join(asked) + "\n")
    return folder


@pytest.fixture
def run(monkeypatch):
    """Run a script in this process: its name, then its arguments, of which "out.json" is kept."""

    def ran(name: str, *arguments: object):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        importlib.import_module(name).main()
        return json.loads(Path(arguments[-1]).read_text())

    return ran


SIZES = ["--windows", 10, "--length", 32, "--dtype", "float32", "--device", "cpu"]
SMALL = ["--published-windows", 2, "--published-length", 32, "--repair-tokens", 3000]
SMALL += ["--test-windows", 3, "--test-length", 48, "--removed", "1,40%", "--no-own"]


def test_quality_scores_every_system_and_its_page_shows_it(run, learned, data, tmp_path, capsys):
    model, out = learned / "model", tmp_path / "out.json"
    common = [model, "--data", data, *SIZES, *SMALL]
    report = run("quality", *common, "--systems", "sleb,greedy,window", "-o", out)
    assert str(data) not in json.dumps(report)
    loaded = sleb.load(model, dtype="float32", device="cpu")
    specs = prepare(data, tmp_path / "texts", 0).test
    windows, _ = sleb.load_windows(
        loaded.tokenizer, [*specs.values()], windows=3 * len(specs), length=48, seed=0
    )
    for system in report["systems"]:
        assert [s["removed"] for s in system["sets"]] == [1, 3]
        for cut in system["sets"]:
            for form in ("plain", "repaired"):
                ratios = {n: q["ratio"]["value"] for n, q in cut[form]["domains"].items()}
                mean = sum(log(ratios[name]) for name in DOMAINS) / len(DOMAINS)
                assert log(cut[form]["geo"]["value"]) == pytest.approx(mean, abs=1e-4)
    cut = report["systems"][1]["sets"][0]
    found = sleb.evaluate(loaded, windows, removed=cut["blocks"])
    for name, row in cut["plain"]["domains"].items():
        ratio = found.domains[name].perplexity_ratio.value
        assert ratio == pytest.approx(row["ratio"]["value"], rel=1e-4)
    text = plot.markdown(report)
    for name in (*DOMAINS, *UNSEEN):
        assert f"{report['dense']['perplexity'][name]['value']:.2f}" in text
    plot.draw([report], tmp_path / "plot.svg")
    assert len(plot.changes(report, report).splitlines()) == 2 + 6
    # a result of two runs is that of one, if they measured alike
    for name, systems in (("a", report["systems"][:1]), ("b", report["systems"][1:])):
        what = {**report["what"], "systems": [s["system"] for s in systems]}
        (tmp_path / name).write_text(json.dumps({**report, "systems": systems, "what": what}))
    assert quality.merged([tmp_path / "a", tmp_path / "b"]) == {**report, "processes": 2}
    (tmp_path / "b").write_text(json.dumps({**report, "dtype": "float16"}))
    with pytest.raises(InputError, match="dtype"):
        quality.merged([tmp_path / "a", tmp_path / "b"])
    # the quick comparison of its sets
    pair = ["--systems", "greedy,window", "--finals", out, "-o", tmp_path / "finals.json"]
    compared = run("quality", model, "--data", data, *SIZES, *pair)
    for row in compared["depths"]:
        assert row["taken"] == min(row["sets"], key=lambda n: row["sets"][n]["increase"])
    assert plot.finals(compared).count("**") == 4
    late = run("quality", *common, "--minutes", 0.0001, "-o", tmp_path / "late.json")
    assert late["systems"] == []
    assert "Not begun for lack of time: cosine" in capsys.readouterr().out


def test_the_page_of_methods_is_made_of_the_results():
    """After a new result: python benchmarks/choosing.py -o docs/choosing.md"""
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert choosing.render() == page
    for file in re.findall(r"`([\w.-]+\.json)`", page):
        assert (ROOT / "benchmarks" / "results" / file).is_file()


def test_what_calibrates_does_not_test(data, tmp_path):
    found = prepare(data, tmp_path / "one", 0)
    documents = [
        {row for spec in specs.values() for row in Path(spec).read_text().splitlines()}
        for specs in (found.calibration, found.test)
    ]
    assert not documents[0] & documents[1]
    twice = (data / "domains/c4_calibration.jsonl").read_text()
    path = data / "domains/c4_test.jsonl"
    kept = path.read_text()
    path.write_text(kept + twice)
    with pytest.raises(InputError, match="c4"):
        prepare(data, tmp_path / "two", 0)
    path.write_text(kept)


@pytest.mark.slow
def test_answers_of_cuts_are_counted_beside_the_dense_models(run, learned, data, tmp_path):
    asked = ["--new", 4, "--removed", 1, "--heal", 0.05, *SIZES[:4]]
    asked += ["--test-windows", 2, "--device", "cpu"]
    asked = [learned / "model", "--data", data, *asked, "--systems"]
    run("answers", *asked, "window", "-o", tmp_path / "o.json")
    report = run("answers", *asked, "window,default,merged", "-o", tmp_path / "o.json")
    systems = ["window", "default", "default, healed", "merged", "merged, healed"]
    assert [cut["system"] for cut in report["cuts"]] == systems, "what was there stays"
    for cut in report["cuts"]:
        assert len(cut["removed"]) == 1
        assert (cut["code"]["items"], cut["math"]["items"], cut["math"]["kept"]) == ("0", "1", 1)
        assert set(cut["loss"]) == {*DOMAINS, *UNSEEN}
    plot.draw_answers(report, tmp_path / "plot.svg")
    assert "default, healed" in (tmp_path / "plot.svg").read_text()
    window, default, healed, merged, _ = (cut["perplexity_ratio"] for cut in report["cuts"])
    assert healed < default * 1.01
    assert window >= default, "the same block, bypassed or cut"
    assert merged not in (window, default)


def test_blocks_are_chosen_in_every_way(run, learned, data, tmp_path, monkeypatch):
    choices = importlib.import_module("choices")
    where = [learned / "model", "--data", data, "--device", "cpu", "--windows", 10, "--length", 32]
    where += ["--fitted", 500, "--new-tokens", 8, "--remove", 2, "-o", tmp_path / "out.json"]

    def rows():
        found = run("choices", *where)["rows"]
        return {(row["way"], row.get("on")): row for row in found}

    monkeypatch.setattr(choices, "DECIDED", 0.0)
    found = rows()
    ways = {way: {on for one, on in found if one == way} for way in choices.CHOICES}
    on = {"texts", "answers", "both"}
    more = {way: {*which} for way, which in choices.ON.items()}
    assert ways == dict.fromkeys(choices.CHOICES, on) | more
    assert found["greedy", "decided"]["plain"] == found["greedy", "answers"]["plain"]
    model = sleb.load(learned / "model", device="cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = model.model(input_ids=ids).logits.detach()
    likeliest = logits[0, :-1].softmax(-1).amax(-1)
    monkeypatch.setattr(choices, "DECIDED", float(likeliest.max()))
    assert choices.decided(model, ids)[0, 1:].tolist() == (likeliest == likeliest.max()).tolist()
    assert not choices.decided(model, ids)[0, 0], "nothing is read before it"


def test_a_repair_that_merges_takes_channels_of_the_blocks_that_are_gone(learned):
    stack, ids = sleb.load(learned / "model").stack, torch.randint(3, 250, (8, 32))
    block, gone = (dict(stack.blocks[i].named_parameters()) for i in (1, 2))
    before = {name: value.clone() for name, value in block.items()}
    rows, norm = "mlp.gate_proj.weight", "post_attention_layernorm.weight"
    left, (gap,) = {}, gaps([2], len(stack))
    for kind in (Regression, Merging):
        fitter = kind(stack, [2], ids, 4)
        fitter.fit(replace(gap, blocks=(1,)), (1e-3,))
        left[kind] = (_behind(stack, ids, 3, [2]) - _behind(stack, ids, 3, [])).norm()
        found = dict(stack.blocks[1].named_parameters())[rows].clone()
        fitter.restore()
    assert all(torch.equal(p, before[n]) for n, p in stack.blocks[1].named_parameters())
    assert found.shape == before[rows].shape
    candidates = before[rows], gone[rows] * gone[norm] / before[norm]
    own, taken = ((found[:, None] - each).abs().amax(2).amin(1) < 1e-6 for each in candidates)
    assert (own ^ taken).all()
    assert own.any()
    assert taken.any()
    assert left[Merging] < left[Regression]


def _behind(stack, ids, block, removed):
    hidden, calls = stack.enter(ids)
    for i in range(block):
        hidden = hidden if i in removed else stack.run(i, hidden, calls[i])
    return hidden


@pytest.mark.slow
def test_units_are_compared_at_equal_time(run, learned, data, tmp_path):
    asked = ["--removed", 1, "--systems", "blocks,attention,any", "--limit", 1, "--new", 4]
    asked += [*SIZES[:4], "--test-windows", 2, "--prompt-length", 32]
    asked += ["--sequences", 2, "--prompts", 16, 100, 400, "--batches", 2, "--repair-tokens", 400]
    report = run("units", learned / "model", "--data", data, *asked, "-o", tmp_path / "o.json")
    blocks, attention, both = report["systems"]
    assert len(blocks["removed"]) == 1
    dense, cut = (row["cache_bytes_a_token"] for row in (report["dense"], attention))
    if "error" not in attention:
        assert dense - cut == len(attention["removed"]) * dense // 6
        assert all(unit.endswith(".attention") for unit in attention["removed"])
    assert {"kept", "right"} <= both["code"].keys()
    short, _, long = report["cases"]
    assert {*short["writing_ms"]} >= {"dense", "blocks"}
    assert "reads" in long["skipped"]


def test_searches_are_timed_against_the_published_one(run, tiny_dir, tmp_path):
    report = run("search", tiny_dir, *SIZES, "--remove", 2, "-o", tmp_path / "out.json")
    published, exact = (
        next(s for s in report["systems"] if s["system"] == name) for name in ("published", "exact")
    )
    assert exact["same_order_as_published"]
    assert exact["block_forwards"] < published["block_forwards"]


def test_the_work_of_a_random_llama_is_that_of_the_model():
    model = random_llama(SHAPES["tiny"], torch.device("cpu"))
    shape = shape_of(model.config)
    linear = [m for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear)]
    assert shape.block_parameters == sum(m.weight.numel() for m in linear)
    # token t sees t tokens: a product of its query with each key, and of each weight with a value
    attention = sum(2 * 2 * seen * shape.width for seen in (1, 2, 3))
    assert shape.block_flops(3) == 2 * 3 * shape.block_parameters + attention
    short = shortened(model, frozenset({2, 5}))
    ids = torch.randint(0, 256, (2, 16))
    with torch.inference_mode(), BlockStack(model).bypassed({2, 5}):
        whole = model(input_ids=ids, use_cache=False).logits
    with torch.inference_mode():
        torch.testing.assert_close(short(input_ids=ids, use_cache=False).logits, whole)
    assert generated(short, ids, 3).shape == (2, 19)  # with a cache: layers are renumbered


def test_the_line_says_what_a_cut_could_reach():
    blocks = {"dense": 32, "10%": 28, "20%": 25, "half": 16, "quarter": 8}
    times = {name: [1.0 + 0.5 * n] * 3 for name, n in blocks.items()}
    times["20%"] = [1.05 * t for t in times["20%"]]
    found = against_line(times, blocks)["cuts"]
    assert found["10%"]["over_ideal"] == pytest.approx(0, abs=1e-4)
    assert found["20%"]["over_ideal"] == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize(
    ("sections", "shown"),
    [
        ("machine,7b.search,7b.repair,70b", ["Search", "Repair", "70B shape"]),
        pytest.param("7b.exact,7b.speed", ["Search", "Prompt and gen"], marks=pytest.mark.slow),
    ],
)
def test_performance_runs_and_its_page_shows_it(run, tmp_path, sections, shown):
    out = tmp_path / "results.json"
    report = run("performance", "--shape", "tiny", "--sections", sections, "-o", out)
    bad = {"error", "skipped", "stopped"}
    assert not [name for name, row in report["sections"].items() if row.keys() & bad]
    page = render([out])
    assert "no figures" in page
    assert all(f"### {part}" in page for part in shown)


def test_commands_of_two_builds_are_timed_side_by_side(run, learned, tmp_path):
    source, out = ROOT / "src", tmp_path / "end-to-end.json"
    builds = ["--build", f"old={source}", "--build", f"new={source}"]
    report = run("end_to_end", learned / "model", *builds, "--tasks", "refused,help", "-o", out)
    rows = report["commands"]
    assert [(row["task"], row["build"]) for row in rows] == [
        (task, build) for task in ("refused", "help") for build in ("old", "new")
    ]
    assert [row["code"] for row in rows] == [2, 2, 0, 0]
    assert all(row["wall_s"] > 0 and row["rss_gb"] > 0 for row in rows)
    assert "| help |" in render([out])


def test_the_committed_page_is_the_rendered_one():
    """Nothing on it is written by hand."""
    found = (ROOT / "benchmarks/results").glob("*.json")
    results = sorted(p for p in found if p.name.startswith(("performance", "end-to-end")))
    assert (ROOT / "docs/performance.md").read_text() == render(results)


SPREAD = Spread(
    damages=(0.1, 0.2, 0.4), own_floor=0.03, own_slope=0.2, fresh=0.02, joint=0.01, level=0.4
)


def test_drawn_losses_have_the_spread_that_they_are_drawn_from():
    losses = Losses(SPREAD, 24, 4000, seed=1)
    best = min(range(24), key=lambda b: losses.damage[b])
    sets = [BlockSet(), *(BlockSet([b]) for b in range(24))]
    sets += [BlockSet([best, b]) for b in range(24) if b != best]
    again = fit(dict(zip(sets, losses(sets, 0, 4000), strict=True)))
    for name in ("fresh", "own_slope", "level"):
        assert getattr(again, name) == pytest.approx(getattr(SPREAD, name), rel=0.1)


def test_more_ranks_never_take_longer_and_large_models_are_streamed():
    race = scale.Simulated(12, 2, 32, 1, Losses(SPREAD, 12, 32, seed=0))
    times = [race.busiest(n)[0] for n in (1, 2, 4, 8, 64)]
    assert times[0] == race.forwards
    assert times == sorted(times, reverse=True)
    assert times[1] < 0.65 * times[0]
    few, many = (
        scale.predict(scale.MODELS[1], n, 1, [race], scale.rates(scale.PERFORMANCE))
        for n in (8, 64)
    )
    assert (few["streamed"], many["streamed"]) == (True, False)
    assert few["seconds"]["total"] > many["seconds"]["total"]


def test_examples_for_clusters_start_the_search_with_torchrun():
    job = yaml.safe_load((ROOT / "examples/pytorchjob.yaml").read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    container = worker["template"]["spec"]["containers"][0]
    assert container["command"][0] == "torchrun"
    each = int(container["command"][container["command"].index("--nproc-per-node") + 1])
    assert each == container["resources"]["limits"]["nvidia.com/gpu"]
    batch = (ROOT / "examples/slurm.sbatch").read_text()
    for text in (" ".join(container["command"]), batch.replace(" \\\n", " ")):
        assert "-m sleb search" in text
        assert "--remove 10% --windows 128 --length 2048 --dtype bfloat16" in text


@pytest.mark.slow
def test_variants_of_healing_are_measured_and_what_is_done_is_kept(
    run, learned, data, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"{start} {i}"} for i in range(6) for start in ("for ever", "lost", "the")]
    (data / "answers/some_fit.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model, cut, out = learned / "model", tmp_path / "cut", tmp_path / "o.json"
    monkeypatch.setattr("sleb.config.NEW_TOKENS", {"cpu": 8})
    sleb.prune(model, cut, remove=1, windows=4, length=16, prompts=["none"], device="cpu")
    asked = ["--data", data, "--device", "cpu", "--tokens", "4000", "--limit", 1, "--new", 4]
    asked += ["--test-windows", 2, "--length", 48]
    three = ["--variant", "as it is", "--variant", "texts: mix=texts, lr=1e-3, OWN=1"]
    three += ["--variant", "wrong: lr=1e9", "--variant", "unknown: PASES=2", "-o", out]
    report = run("heal", model, cut, *asked, *three)
    assert [row["name"] for row in report["healed"]] == ["as it is", "texts", "wrong", "unknown"]
    *done, wrong, unknown = report["healed"]
    assert "constant PASES" in unknown["error"]
    files = {"answers: code_fit.jsonl", "answers: some_fit.jsonl"}
    assert [{*row["healing"]["passes"]} for row in done] == [{"texts", *files}, {"texts"}]
    assert done[1]["healing"]["lr"] == 1e-3
    for row in done:
        assert row["perplexity_ratio"] < report["cut"]["perplexity_ratio"]
        assert row["healing"]["tokens_per_second"] > 0
        assert row["phases"]["healing"] > 0
    assert "was not written" in wrong["error"]
    assert run("heal", model, cut, *asked, *three) == report, "no run is done twice"
    late = run("heal", model, cut, *asked, "--budget", 0, "-o", tmp_path / "other.json")
    assert late["healed"] == [], "none is begun that would not be done in time"


@pytest.mark.slow
def test_steps_of_healing_are_timed_at_a_model_s_size(run, tmp_path, monkeypatch):
    asked = ["--shape", "tiny", "--batch", 2, "--length", 32, "--steps", 2, "--device", "cpu"]
    report = run("heal_size", *asked, "--ways", "adamw,lora+recompute", "-o", tmp_path / "o.json")
    assert report["product_teraflops"] > 0
    for row in report["ways"].values():
        assert row["tokens_per_second"] == pytest.approx(64 / row["step_seconds"], rel=0.01)
        assert row["blocks"] == 6
    shape = SHAPES["tiny"]
    whole, adapters = (row["trained"] for row in report["ways"].values())
    assert whole == 6 * (shape.block_parameters + 2 * shape.width)
    assert adapters < whole

    def full(*_):
        raise torch.OutOfMemoryError("out of memory\nin many lines")

    monkeypatch.setattr("heal_size.random_llama", full)
    report = run("heal_size", *asked, "--ways", "adamw", "-o", tmp_path / "o.json")
    assert report["ways"] == {"adamw": {"error": "out of memory"}}
