"""What comes from others does no harm: no code runs, no path leads out, files have hashes."""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

import sleb
from cli_tools import run, tree
from conftest import save_tiny
from sleb.checkpoints.checksums import SUMS, check_sums, covered, read_sums, write_sums
from sleb.config import LoadOptions
from sleb.core.errors import DataError

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def calls(tree: ast.AST):
    """Every call, with the dotted name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def open_to_code(source: str) -> list[str]:
    """Calls that may run code of a model because they do not say that they must not."""
    found = []
    for call, name in calls(ast.parse(source)):
        loads = name.rpartition(".")[2] in ("from_pretrained", "from_config", "pipeline")
        if not loads or not (name.startswith("Auto") or name == "pipeline"):
            continue
        given = [k.value for k in call.keywords if k.arg == "trust_remote_code"]
        if not given or (isinstance(given[0], ast.Constant) and given[0].value is not False):
            found.append(f"line {call.lineno}: {name}")
    return found


def test_no_call_leaves_it_to_others_whether_code_runs():
    for path in SOURCES:
        assert not open_to_code(path.read_text(encoding="utf-8")), path
    assert open_to_code("AutoModel.from_pretrained(path)")
    assert open_to_code("AutoConfig.from_pretrained(path, trust_remote_code=True)")
    assert not open_to_code("AutoModel.from_pretrained(path, trust_remote_code=trust)")
    assert LoadOptions().trust_remote_code is False


def test_code_of_a_model_is_copied_and_not_run(tmp_path, capsys):
    """A cut carries the original's .py files over, since the cut needs them as the original does;
    without --trust-remote-code they are text."""
    source = save_tiny(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (source / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Own: ...\n"
    (source / "own.py").write_text(code)
    plan = sleb.search(source, remove=2, windows=2, length=16, dtype="float32", device="cpu")
    out = sleb.apply(plan, source, tmp_path / "out")
    assert run(capsys, "verify", out, "--model", source).code == 0
    assert (out / "own.py").read_text() == code
    assert "own.py" in read_sums(out / SUMS)
    assert not ran.exists()


def sha256sum(folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["sha256sum", "-c", "--strict", SUMS]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")


def test_apply_lists_every_file_but_those_that_are_meant_to_change(cut):
    listed = read_sums(cut / SUMS)
    files = {p.relative_to(cut).as_posix() for p in cut.rglob("*") if p.is_file()}
    own = {name for name in files if not name.startswith("rollback/")}
    assert set(listed) == own - {SUMS, "README.md"}
    assert {"model.safetensors", "config.json", "plan.json"} <= set(listed)
    for name, digest in listed.items():
        assert hashlib.sha256((cut / name).read_bytes()).hexdigest() == digest
    assert sha256sum(cut).returncode == 0
    assert sha256sum(cut).stdout.count(": OK") == len(listed)


def test_what_later_verbs_add_does_not_break_it(cut, tmp_path, capsys, tiny_dir):
    out = Path(shutil.copytree(cut, tmp_path / "out"))
    (out / "run.json").write_text("{}")
    (out / "README.md").write_text("a better card")
    (out / "report.html").write_text("a report")
    assert sha256sum(out).returncode == 0
    assert run(capsys, "verify", out, "--model", tiny_dir).code == 0
    (out / SUMS).unlink()  # without which it is verified all the same
    ran = run(capsys, "verify", out, "--model", tiny_dir, "--json")
    assert ran.code == 0
    assert "checksums" not in {check["key"] for check in ran.json["checks"]}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_verify_names_the_file_that_is_another(cut, tmp_path, capsys, tiny_dir, name):
    out = Path(shutil.copytree(cut, tmp_path / "out"))
    raw = bytearray((out / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (out / name).write_bytes(raw)
    ran = run(capsys, "verify", out, "--model", tiny_dir)
    assert ran.code == 3
    assert f"changed {name}" in ran.err
    assert sha256sum(out).returncode == 1
    (out / name).unlink()
    if name != "config.json":  # without which it is no checkpoint
        ran = run(capsys, "verify", out, "--model", tiny_dir)
        assert (ran.code, f"missing {name}" in ran.err) == (3, True)


def test_a_cut_of_a_cut_has_its_own_checksums(cut, tmp_path):
    plan = sleb.search(
        cut, remove=1, windows=2, length=16, dtype="float32", device="cpu", protect=""
    )
    out = sleb.apply(plan, cut, tmp_path / "out")
    assert sha256sum(out).returncode == 0
    assert read_sums(out / SUMS)["plan.json"] != read_sums(cut / SUMS)["plan.json"]


def test_odd_names_are_written_as_sha256sum_reads_them(tmp_path):
    names = ["a b", "back\\slash", "line\nbreak", "\\", "日本", "*star", " lead", "sub/x"]
    names += ["sub/SHA256SUMS"]
    (tmp_path / "sub").mkdir()
    for name in [*names, ".hidden", "run.json"]:
        (tmp_path / name).write_text(name)
    (tmp_path / "bytes\udcff").write_text("not UTF-8")
    write_sums(tmp_path)
    assert set(read_sums(tmp_path / SUMS)) == {*names, "bytes\udcff"} == set(covered(tmp_path))
    assert check_sums(tmp_path) == (len(names) + 1, {})
    assert sha256sum(tmp_path).returncode == 0, sha256sum(tmp_path).stderr
    (tmp_path / "line\nbreak").write_text("other")
    assert check_sums(tmp_path)[1] == {"line\nbreak": "changed"}


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a//b", "a/../../b"])
def test_a_list_that_leads_elsewhere_is_refused(tmp_path, name):
    zeros = "0" * 64
    for line in (f"{zeros}  {name}", rf"\{zeros}  a\n/../b/..", f"{zeros[1:]}  a", f"{zeros} a"):
        (tmp_path / SUMS).write_text(line + "\n")
        with pytest.raises(DataError, match="SHA256SUMS, line 1, is not"):
            check_sums(tmp_path)


def test_a_list_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / SUMS, "wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(DataError, match="larger than 4 MiB"):
        check_sums(tmp_path)


@settings(max_examples=60)
@given(st.binary(max_size=200))
def test_any_bytes_as_a_list_are_read_or_refused(tmp_path, raw):
    (tmp_path / SUMS).write_bytes(raw)
    try:
        names = read_sums(tmp_path / SUMS)
    except DataError:
        return
    for name in names:
        inside = os.path.normpath(os.path.join("/x", os.fsencode(name).decode("latin-1")))
        assert inside.startswith("/x/")


def test_a_snapshot_of_the_hubs_cache_is_cut_and_the_copy_holds_no_links(
    tmp_path, tiny_plan, tiny_dir
):
    home = tmp_path / "models--a--b"
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, path in enumerate(sorted(tiny_dir.iterdir())):
        shutil.copyfile(path, home / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    before = tree(home)
    out = sleb.apply(tiny_plan, snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert tree(home) == before
    assert ModelCard.load(out / "README.md").data.base_model == "a/b"


def test_nobody_is_told_to_install_a_stranger_of_that_name():
    """The name is not ours on any index: sleb is installed from its clone."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*"), *SOURCES]
    for path in pages:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"pip install [^\n`]*(?<![\w/.-])sleb(?![\w/-])", text), path
