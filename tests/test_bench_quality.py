"""benchmarks/quality.py on a tiny model: what its figures are, and what it keeps apart."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from math import log
from pathlib import Path
from statistics import geometric_mean

import pytest

import sleb
from sleb.core.errors import InputError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import quality  # noqa: E402
from plot_quality import changes, draw, markdown  # noqa: E402
from texts import DOMAINS, UNSEEN, prepare  # noqa: E402
from zeroshot import local_tasks  # noqa: E402

SENTENCES = (  # what the model of conftest has learned
    "the block of a model passes its input through",
    "and nothing at all is lost",
    "for ever",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of texts and items as the benchmark wants it."""
    folder = tmp_path_factory.mktemp("data")
    for sub in ("wikitext2", "domains", "prose", "zeroshot"):
        (folder / sub).mkdir()
    place = random.Random(0)
    for path in [*(f for files in DOMAINS.values() for f in files), *UNSEEN.values()]:
        rows = [". ".join(place.choices(SENTENCES, k=20)) for _ in range(12)]
        if path.endswith(".jsonl"):
            rows = [json.dumps({"text": row}) for row in rows]
        (folder / path).write_text("\n".join(rows) + "\n", encoding="utf-8")
    letters = [chr(c) for c in range(97, 123)]
    items = [  # near chance, so that answers flip
        {"query": "for ever", "choices": ["".join(place.choices(letters, k=4)) for _ in range(2)]}
        for _ in range(30)
    ]
    rows = [json.dumps({**item, "gold": i % 2}) for i, item in enumerate(items)]
    (folder / "zeroshot/piqa.jsonl").write_text("\n".join(rows))
    return folder


def arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    sizes = {"windows": 10, "length": 32, "published-windows": 2, "published-length": 32}
    sizes |= {
        "repair-tokens": 3000,
        "test-windows": 3,
        "test-length": 48,
        "dtype": "float32",
        "device": "cpu",
    }
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    return [str(model), "--data", str(data), "-o", str(out), *options, *more]


def bench(model: Path, data: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARKS / "quality.py", *arguments(model, data, out, *more)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def result(learned, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out.json"
    pytest.importorskip("lm_eval")
    systems = (
        "--removed",
        "1,40%",
        "--systems",
        "cosine,sleb,greedy,beam,window",
        "--tasks",
        "piqa",
    )
    done = bench(learned / "model", data, out, *systems)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_every_system_is_scored_plain_and_repaired_at_every_depth(result, data):
    report, shown = result
    assert [s["system"] for s in report["systems"]] == [
        "cosine",
        "sleb",
        "greedy",
        "beam",
        "window",
    ]
    assert report["not_begun"] == []
    assert str(data) not in json.dumps(report)
    depths = {1, report["systems"][0]["sets"][1]["removed"]}
    for system in report["systems"]:
        assert {len(cut["blocks"]) for cut in system["sets"]} == depths
        shallow, deep = (set(cut["blocks"]) for cut in system["sets"])
        if system["system"] in ("beam", "window"):
            assert [s["removed"] for s in system["searches"]] == sorted(depths)
        else:
            assert [s["removed"] for s in system["searches"]] == [max(depths)]
            assert shallow < deep
        for cut in system["sets"]:
            for form in ("plain", "repaired"):
                check(cut[form])
            assert [b for gap in cut["repair"]["gaps"] for b in gap["blocks"]] == cut["blocks"]
            assert f"{cut['plain']['geo']['value']:.2f}" in shown
    assert any(
        cut["repaired"]["geo"]["value"] < cut["plain"]["geo"]["value"] - 1e-3
        for system in report["systems"]
        for cut in system["sets"]
    )


def test_results_of_several_runs_become_one_if_they_measured_alike(result, tmp_path):
    report, _ = result
    for name, systems in (("a", report["systems"][:2]), ("b", report["systems"][2:])):
        what = {**report["what"], "systems": [s["system"] for s in systems]}
        part = {**report, "systems": systems, "what": what}
        (tmp_path / name).write_text(json.dumps(part))
    merge = [sys.executable, BENCHMARKS / "quality.py", "-o", tmp_path / "c", "--merge"]
    subprocess.run([*merge, tmp_path / "a", tmp_path / "b"], check=True)
    assert json.loads((tmp_path / "c").read_text()) == {**report, "processes": 2}
    (tmp_path / "b").write_text(json.dumps({**report, "dtype": "float16"}))
    done = subprocess.run([*merge, tmp_path / "a", tmp_path / "b"], capture_output=True, text=True)
    assert done.returncode
    assert f"b differs from {tmp_path / 'a'} in 'dtype'" in done.stderr


def check(scored: dict) -> None:
    """Means and the worst, computed again from the domains."""
    ratios = {name: row["ratio"]["value"] for name, row in scored["domains"].items()}
    assert set(ratios) == {*DOMAINS, *UNSEEN}
    for key, names in (("geo", DOMAINS), ("unseen_geo", UNSEEN)):
        mean = sum(log(ratios[name]) for name in names) / len(names)
        assert log(scored[key]["value"]) == pytest.approx(mean, abs=1e-4)
        assert scored[key]["low"] < scored[key]["value"] < scored[key]["high"]
    assert ratios[scored["worst"]] == max(ratios[name] for name in DOMAINS)


def test_a_ratio_is_that_of_the_bypassed_model_on_the_test_text(result, learned, data, tmp_path):
    report, _ = result
    loaded = sleb.load(learned / "model", dtype="float32", device="cpu")
    specs = prepare(data, tmp_path, 0).test
    windows, _ = sleb.load_windows(
        loaded.tokenizer, [*specs.values()], windows=3 * len(specs), length=48, seed=0
    )
    cut = report["systems"][1]["sets"][0]
    found = sleb.evaluate(loaded, windows, removed=cut["blocks"])
    for name, row in cut["plain"]["domains"].items():
        assert found.domains[name].perplexity_ratio.value == pytest.approx(
            row["ratio"]["value"], rel=1e-4
        )
        assert found.domains[name].perplexity.value == pytest.approx(
            report["dense"]["perplexity"][name]["value"], rel=1e-4
        )


def test_accuracies_are_those_of_the_cut_and_the_repaired_model(result, learned, data, tmp_path):
    from sleb.evaluation.tasks import run_tasks

    report, _ = result
    loaded = sleb.load(learned / "model", dtype="float32", device="cpu")
    (name,) = local_tasks(data, ["piqa"], tmp_path / "tasks")
    dense = report["dense"]["tasks"][name]
    assert dense["items"] == 30
    changed = []
    for system in report["systems"]:
        cut = system["sets"][1]
        (own,) = run_tasks(
            loaded, task=[name], removed=cut["blocks"], tasks_folder=str(tmp_path / "tasks")
        )
        plain, repaired = (cut[form]["tasks"][name] for form in ("plain", "repaired"))
        assert own.dense.value == pytest.approx(dense["accuracy"]["value"], abs=1e-5)
        assert own.pruned.value == pytest.approx(plain["accuracy"]["value"], abs=1e-5)
        assert (own.flips.lost, own.flips.won) == (plain["lost"], plain["won"])
        changed.append((plain["lost"], plain["won"]))
        changed.append((repaired["lost"], repaired["won"]))
    assert any(lost or won for lost, won in changed[::2])
    assert changed[::2] != changed[1::2]


def test_tables_and_plot_hold_the_figures(result, tmp_path):
    report, _ = result
    text = markdown(report)
    for name in (*DOMAINS, *UNSEEN):
        assert f"{report['dense']['perplexity'][name]['value']:.2f}" in text
    assert text.count("greedy, repaired") == 4
    assert "| piqa |" in text
    cut = next(c for s in report["systems"] if s["system"] == "greedy" for c in s["sets"])
    ratios = [q["ratio"]["value"] for q in cut["repaired"]["domains"].values()]
    assert f"| greedy | {cut['repaired']['unseen_geo']['value']:.2f} |" in " ".join(text.split())
    assert f"{geometric_mean(ratios):.2f} |" in text.partition("after repair:")[2]
    assert "3 processes ran beside each other" in markdown({**report, "processes": 3})
    assert "beside each other" not in text
    refused = json.loads(json.dumps(report))
    for system in refused["systems"]:
        for cut in system["sets"]:
            cut |= {"repaired": None, "repair": {"refused": "a norm follows"}}
    assert "refused" in markdown(refused)
    assert ", repaired" not in markdown(refused)
    draw([report, refused], tmp_path / "plot.svg")
    assert "zero-shot accuracy" in (tmp_path / "plot.svg").read_text()
    wide = json.loads(json.dumps(report))
    wide["systems"][0]["sets"][1]["plain"]["geo"]["value"] = 700
    draw([wide], tmp_path / "wide.svg")
    shown = (tmp_path / "wide.svg").read_text()
    assert ">300<" in shown
    assert ">200<" not in shown  # labels of every step would overlap


def test_time_is_kept_and_what_was_not_begun_is_told(learned, data, tmp_path):
    done = bench(learned / "model", data, tmp_path / "out.json", "--minutes", "0.0001")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["systems"] == []
    assert report["not_begun"] == ["cosine", "sleb", "greedy", "beam", "window", "repair-aware"]
    assert "not begun for lack of time: cosine" in done.stdout


def test_every_set_is_written_as_soon_as_it_is_measured(learned, data, tmp_path, monkeypatch):
    options = arguments(learned / "model", data, tmp_path / "out.json", "--no-own")
    options += ["--removed", "1,2", "--systems", "cosine"]
    monkeypatch.setattr(sys, "argv", ["quality.py", *options])
    written = []
    monkeypatch.setattr(quality, "write_text", lambda path, text: written.append(json.loads(text)))
    quality.main()
    assert [[len(s["sets"]) for s in report["systems"]] for report in written] == [[], [1], [2]]


def test_a_result_is_set_against_an_earlier_one(result):
    report, _ = result
    earlier = json.loads(json.dumps(report))
    sets = {system["system"]: system["sets"] for system in earlier["systems"]}
    sets["greedy"][0]["blocks"] = [0]
    sets["window"][0]["repaired"]["geo"]["value"] = 9.87
    rows = changes(report, earlier).splitlines()[2:]
    assert len(rows) == 9
    (shown,) = [row for row in rows if "9.87" in row]
    now = report["systems"][4]["sets"][0]["repaired"]
    assert shown.split("|")[2].strip() == "window"
    assert f" 9.87 → {now['geo']['value']:.2f} " in shown
    assert shown.endswith(f"{100 * now['tasks']['mean']:.1f} |")


def test_what_calibrates_does_not_test(data, tmp_path):
    found = prepare(data, tmp_path / "one", 0)
    assert set(found.calibration) == {*DOMAINS}
    assert set(found.test) == {*DOMAINS, *UNSEEN}
    documents = {
        use: {row for spec in specs.values() for row in Path(spec).read_text().splitlines()}
        for use, specs in (("calibration", found.calibration), ("test", found.test))
    }
    assert not documents["calibration"] & documents["test"]
    for name, files in DOMAINS.items():
        kept = [Path(s[name]).read_text().splitlines() for s in (found.calibration, found.test)]
        assert [len(rows) for rows in kept] == ([8, 4] if len(files) == 1 else [12, 12])
    other = prepare(data, tmp_path / "two", 1)
    assert Path(other.test["code"]).read_text() != Path(found.test["code"]).read_text()


def test_a_document_on_both_sides_is_refused(data, tmp_path):
    for path in [p for p in data.rglob("*") if p.is_file()]:
        target = tmp_path / "data" / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    rows = (tmp_path / "data/domains/c4_calibration.jsonl").read_text().splitlines(keepends=True)
    with open(tmp_path / "data/domains/c4_test.jsonl", "a", encoding="utf-8") as stream:
        stream.write(rows[3])
    with pytest.raises(InputError, match="a document of 'c4' tests and calibrates"):
        prepare(tmp_path / "data", tmp_path, 0)
    (tmp_path / "data/prose/sotu_1961_2026.jsonl").unlink()
    with pytest.raises(InputError, match=r"sotu_1961_2026\.jsonl cannot be read"):
        prepare(tmp_path / "data", tmp_path, 0)


def test_the_comparison_is_set_beside_what_was_measured(result, learned, data, tmp_path):
    report, _ = result
    (tmp_path / "quality.json").write_text(json.dumps(report))
    out = tmp_path / "out.json"
    given = ("--data", data, "--result", tmp_path / "quality.json", "-o", out)
    sizes = ("--windows", "10", "--length", "32", "--device", "cpu", "--dtype", "float32")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "finals.py", learned / "model", *given, *sizes],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert str(data) not in out.read_text()
    assert found["judges"] == {"given": 10, "own": 8, "length": 32}
    sets = {s["system"]: s["sets"] for s in report["systems"]}
    for i, row in enumerate(found["depths"]):
        assert row["taken"] == min(row["sets"], key=lambda name: row["sets"][name]["increase"])
        for name, s in row["sets"].items():
            assert s["blocks"] == sets[name][i]["blocks"]
            assert s["measured"]["five"] == sets[name][i]["repaired"]["geo"]["value"]
            assert s["increase"] == pytest.approx((10 * s["given"] + 8 * s["own"]) / 18)
    assert [row["removed"] for row in found["depths"]] == [1, 3]
    assert done.stdout.count("**") == 4
