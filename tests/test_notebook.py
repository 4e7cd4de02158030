"""What a program or a notebook sees: results that show themselves, messages in Python's words."""

import json
import os
import re
from pathlib import Path

import pytest

import sleb
from report_tools import plan as report_plan
from sleb.config import in_python
from sleb.core.errors import SHELL
from sleb.core.plan import Target

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


@pytest.fixture
def in_a_program():
    told = SHELL.set(False)
    yield
    SHELL.reset(told)


@pytest.fixture
def drawn_nowhere(monkeypatch):
    import matplotlib

    matplotlib.use("agg")


def ran(model, folder, monkeypatch) -> dict:
    """The names that the notebook's cells leave, run one after the other."""
    monkeypatch.setenv("SLEB_MODEL", str(model))
    monkeypatch.chdir(folder)
    scope: dict = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
    return scope


@pytest.mark.usefixtures("in_a_program", "drawn_nowhere")
def test_the_notebook_runs(tiny_dir, tmp_path, monkeypatch, capsys):
    scope = ran(tiny_dir, tmp_path, monkeypatch)
    assert len(scope["done"].plan.removed) == len(scope["plan"].removed) == 3
    assert (tmp_path / "smaller" / "config.json").is_file()
    said = capsys.readouterr().out
    assert "remove 0.2" in said
    assert "20%" in said


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("in_a_program", "drawn_nowhere")
def test_the_notebook_runs_on_a_real_model(real_model, tmp_path, monkeypatch):
    from sleb.models.source import resolve

    scope = ran(resolve(real_model).path, tmp_path, monkeypatch)
    assert len(scope["plan"].removed) == 3


@pytest.mark.usefixtures("drawn_nowhere")
def test_results_are_tables_pictures_and_a_few_lines(tiny_dir, tmp_path):
    plan = sleb.search(
        tiny_dir, remove=3, curve=True, windows=4, length=16, device="cpu", dtype="float32"
    )
    found = sleb.evaluate(tiny_dir, 4, length=16, device="cpu")
    plan.save(tmp_path / "plan.json")
    alike = sleb.similarity(tiny_dir, windows=4, length=16, device="cpu")
    (tmp_path / "p.jsonl").write_text('"one"\n"two"\n"three"\n')
    asked = {"prompts": (str(tmp_path / "p.jsonl"),), "new_tokens": 4, "device": "cpu"}
    kept = sleb.evaluate(tiny_dir, plan=plan, **asked)
    tables = [(plan, 3), (plan.curve, 3), (found, 1), (report_plan(), None)]
    for result, rows in (*tables, (alike, len(alike.blocks)), (kept, 4)):
        frame = result.to_pandas()
        assert rows is None or len(frame) == rows
        assert list(frame.columns) == list(result.rows()[0])
        assert result._repr_html_().count("<tr>") == 1 + len(frame)
        assert result.plot().lines
        text = str(result)
        assert len(text.splitlines()) <= 20
        assert all(len(line) <= 80 for line in text.splitlines())
    assert plan.to_pandas()["removed"].tolist() == [str(b) for b in plan.order]
    assert sleb.Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.usefixtures("drawn_nowhere")
def test_what_has_no_table_is_a_line(tiny_dir, tmp_path):
    """And no dump of all that it holds."""
    plan = sleb.search(tiny_dir, remove=2, windows=4, length=16, device="cpu", dtype="float32")
    out = sleb.apply(plan, tiny_dir, tmp_path / "out")
    fixed = sleb.repair(tiny_dir, plan, length=16, repair_tokens=300, prompts=("none",))
    (tmp_path / "p.jsonl").write_text('"one"\n"two"\n')
    answers = sleb.compare(tiny_dir, out, tmp_path / "p.jsonl", new_tokens=4, device="cpu")
    for result, said in [
        (sleb.load(tiny_dir, device="cpu"), f"LoadedModel({tiny_dir}: "),
        (sleb.verify(out, model=tiny_dir), f"{out}: 8 of 8 checks of exactness passed"),
        (fixed, "tensors around"),
        (answers, "of 2 answers are identical"),
        (sleb.describe(tiny_dir), f"{tiny_dir}: 6 blocks of a llama, 0.2523 MB"),
        (sleb.restore(out, tmp_path / "back"), f"{tmp_path / 'back'}: 6 blocks"),
    ]:
        text = " ".join(str(result).split())  # what is wide is wrapped
        assert said in text
        assert len(text) < 240


@pytest.mark.usefixtures("drawn_nowhere")
def test_figures_of_results_have_few_digits_and_lines_80_columns(tiny_dir, tmp_path):
    kinds = {"remove": "2", "speedup": "1.234", "size": "123.5 MB", "keep-answers": "0.9877"}
    plan = report_plan()
    for kind, said in kinds.items():
        value = {"remove": 2.0, "speedup": 1.23412, "size": 123456789}.get(kind, 0.98765432)
        target = Target(kind=kind, limit=value, reached=value)
        told = str(plan.model_copy(update={"target": target}))
        assert f"\nasked for {kind} {said}, reached {said}\n" in told
    many = plan.model_copy(update={"order": tuple(range(1, 60))})
    done = sleb.prune(tiny_dir, tmp_path / "out", remove=2, windows=4, length=16, device="cpu")
    took = sleb.estimate(tiny_dir, tmp_path / "next", remove=2, windows=4, length=16, device="cpu")
    timed = sleb.bench(tiny_dir, done.path, quick=True, runs=2, device="cpu")
    assert str(timed).splitlines()[0].startswith("speed on cpu, float32, ")
    assert len(re.findall(r"generate-1 [\d.]{1,5}x", str(timed))) == 1
    assert "GB of memory" in str(took)
    for result in (many, done.record, took):
        lines = str(result).replace(str(tiny_dir), "MODEL").splitlines()
        assert len(lines) <= 20
        assert max(map(len, lines)) <= 80
        assert not re.search(r"\d\.\d{5}", str(result))


def test_a_hostile_name_is_no_html():
    plan = report_plan().model_copy(update={"unit": "<script>alert(1)</script>"})
    assert "<script>" not in plan._repr_html_()


@pytest.mark.usefixtures("in_a_program")
def test_messages_have_the_names_of_keywords(tiny_dir, tmp_path):
    (tmp_path / "there").touch()
    for call, said in [
        (lambda: sleb.search(tiny_dir), "give one of remove, max_loss_increase"),
        (lambda: sleb.search(tiny_dir, remove=0.2), "remove 0.2"),
        (lambda: sleb.prune(tiny_dir, tmp_path / "there", remove=1), "choose another out"),
        (lambda: sleb.evaluate(tiny_dir, depth=1), "give the plan with plan"),
        (lambda: sleb.load(tiny_dir, stream=True, device_map="auto"), "stream and device_map"),
    ]:
        with pytest.raises(sleb.InputError, match=re.escape(said)) as info:
            call()
        assert "--" not in str(info.value)
    assert in_python("give --no-repair, or --repair-tokens 9") == (
        "give repair=False, or repair_tokens 9"
    )
    other = "join them with: llama-gguf-split --merge FIRST WHOLE"
    assert in_python(other) == other
    assert os.sep  # paths are as they are
    assert in_python("a--remove b") == "a--remove b"
