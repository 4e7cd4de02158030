"""Files and folders appear whole or not at all, and --force replaces only what it should."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli_tools import tree
from sleb.core import files as files
from sleb.core.errors import InputError, ResourceError
from sleb.core.files import (
    disk_errors,
    enough_space,
    shown_size,
    staged_dir,
    writable_target,
    write_text,
)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def checkpoint(path: Path, content: str = "old") -> Path:
    """What --force may replace."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(content)
    (path / "model.safetensors").write_text(content)
    return path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_file_is_written_with_its_folders_and_is_readable_by_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(Path("a/b/plan.json"), "néw\n")
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/plan.json": "néw\n".encode()}
    assert mode(tmp_path / "a/b/plan.json") == 0o644
    write_text(Path("a/b/plan.json"), "newer")
    assert tree(tmp_path)["a/b/plan.json"] == b"newer"


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    stages = "import os, sys, pathlib; from sleb.core.files import staged_dir\n"
    stages += "with staged_dir(pathlib.Path(sys.argv[1]), force=False) as stage:\n"
    stages += "    (stage / 'half').write_text('x')\n    os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", stages, str(tmp_path / "out")], check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "half").is_file()
    with staged_dir(tmp_path / "other", force=False):
        assert left.exists(), "of another result"
    with staged_dir(tmp_path / "out", force=False) as mine:
        assert not left.exists()
        with staged_dir(tmp_path / "out", force=False):
            assert mine.exists(), "of a process that lives"
        (tmp_path / "out").rmdir()


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("failure", "raised"), [(full, ResourceError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_a_file_that_cannot_be_finished_leaves_the_old_one(
    tmp_path, monkeypatch, call, failure, raised
):
    (tmp_path / "plan.json").write_text("old")
    before = tree(tmp_path)

    def fail(*args):
        if failure is full:
            full()
        raise failure

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(raised) as info:
        write_text(tmp_path / "plan.json", "new")
    with pytest.raises(raised):
        write_text(tmp_path / "not/yet/there.json", "new")
    assert tree(tmp_path) == before
    if raised is ResourceError:
        assert str(info.value) == (
            f"disk full while writing {tmp_path / 'plan.json'}; free some space and repeat the "
            "command"
        )


def test_a_file_replaces_a_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "elsewhere").write_text("theirs")
    (tmp_path / "plan.json").symlink_to("elsewhere")
    write_text(tmp_path / "plan.json", "ours")
    assert (tmp_path / "elsewhere").read_text() == "theirs"
    assert not (tmp_path / "plan.json").is_symlink()


def test_a_folder_appears_only_when_it_is_complete(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with staged_dir(Path("deep/out"), force=False) as stage:
        (stage / "config.json").write_text("new")
        assert not Path("deep/out").exists()
        assert stage.parent == tmp_path / "deep"  # on the same disk, so that a rename is enough
    assert tree(tmp_path) == {"deep": None, "deep/out": None, "deep/out/config.json": b"new"}
    assert mode(tmp_path / "deep/out") == 0o755


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, ResourceError])
def test_a_folder_that_fails_leaves_no_trace(tmp_path, raised):
    checkpoint(tmp_path / "out")
    before = tree(tmp_path)

    def write(out: str):
        with staged_dir(tmp_path / out, force=True) as stage:
            (stage / "half").write_text("half")
            if raised is ResourceError:
                full()
            raise raised

    for out in ("out", "new", "made/on/the/way"):
        with pytest.raises(raised):
            write(out)
    assert tree(tmp_path) == before


def test_force_replaces_a_checkpoint_or_an_empty_folder(tmp_path):
    checkpoint(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    for name in ("out", "empty"):
        with staged_dir(tmp_path / name, force=True) as stage:
            (stage / "config.json").write_text("new")
            if name == "out":
                assert (tmp_path / "out/config.json").read_text() == "old"
    assert tree(tmp_path) == {
        "empty": None,
        "empty/config.json": b"new",
        "out": None,
        "out/config.json": b"new",
    }


@pytest.mark.parametrize("failing", [1, 2])
def test_if_the_exchange_fails_the_old_folder_is_back(tmp_path, monkeypatch, failing):
    checkpoint(tmp_path / "out")
    before, real, calls = tree(tmp_path), os.replace, []

    def replace(a, b):
        calls.append(a)
        if len(calls) == failing:
            raise KeyboardInterrupt
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt), staged_dir(tmp_path / "out", force=True) as stage:
        (stage / "config.json").write_text("new")
    assert len(calls) >= failing
    assert tree(tmp_path) == before


def test_a_folder_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    writing = staged_dir(tmp_path / "out", force=False)
    stage = writing.__enter__()
    (stage / "config.json").write_text("ours")
    checkpoint(tmp_path / "out", "theirs")
    with pytest.raises(InputError, match="out exists; choose another -o"):
        writing.__exit__(None, None, None)
    assert sorted(tree(tmp_path)) == ["out", "out/config.json", "out/model.safetensors"]
    assert (tmp_path / "out/config.json").read_text() == "theirs"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("target", ["checkpoint", "nowhere"])
def test_a_link_is_neither_followed_nor_replaced(tmp_path, monkeypatch, target, force):
    checkpoint(tmp_path / "checkpoint")
    (tmp_path / "out").symlink_to(tmp_path / target)
    before = tree(tmp_path / "checkpoint")
    reason = f"is a symbolic link to .*{target}; choose another -o, or remove it yourself"
    with pytest.raises(InputError, match=reason if force else "out exists; choose another -o"):
        staged_dir(tmp_path / "out", force=force).__enter__()
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "checkpoint") == before


def test_what_may_be_replaced(tmp_path, monkeypatch):
    out = checkpoint(tmp_path / "model")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for name, options, reason in [
        ("model", {"force": False}, "exists; .* --force"),
        ("notes", {"force": True}, "holds no checkpoint"),
        ("file", {"force": True}, "is a file, not a folder"),
        ("model", {"force": True, "folder": False}, "is a folder, not a file"),
    ]:
        with pytest.raises(InputError, match=f"{name} {reason}"):
            writable_target(tmp_path / name, **options)
    writable_target(out, force=True)
    writable_target(tmp_path / "file", force=True, folder=False)
    with pytest.raises(InputError, match=r"cannot write .*xxx: File name too long"):
        write_text(tmp_path / ("x" * 250), "")
    with pytest.raises(InputError, match=r"cannot write .*xxx: File name too long"):
        staged_dir(tmp_path / ("x" * 250), force=False).__enter__()

    def forbidden(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", forbidden)
    with pytest.raises(InputError, match=r"cannot write .*b/out: Permission denied"):
        write_text(tmp_path / "b/out", "")


@pytest.mark.parametrize("out", [".", "..", "/", "", "a/.."])
def test_an_output_needs_a_name(out):
    with pytest.raises(InputError, match=r"-o '.*' is not a name for something new; give one"):
        writable_target(Path(out), force=True)


def test_the_folder_above_must_be_a_folder_that_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"out cannot be created: .*file is not a directory"):
        writable_target(tmp_path / "file/a/out", force=False)
    monkeypatch.setattr(os, "access", lambda path, how: False)  # root may write anywhere
    with pytest.raises(InputError, match=rf"out cannot be created: {tmp_path} is not writable"):
        writable_target(tmp_path / "a/out", force=False)
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_may_not_be_read_is_not_blamed_on_the_output(tmp_path):
    secret = str(tmp_path / "model" / "weights")
    with pytest.raises(InputError, match=rf"cannot open {secret}: Permission denied"):
        with disk_errors(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied", secret)
    with pytest.raises(InputError, match=rf"cannot write {tmp_path}/out: Permission denied"):
        with disk_errors(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "x", f"{tmp_path}/.out.part-1/config.json")
    with pytest.raises(OSError, match="odd"), disk_errors(tmp_path):
        raise OSError(errno.EIO, "odd")


def test_too_small_a_disk_is_seen_early(tmp_path, monkeypatch):
    enough_space(tmp_path / "not" / "yet", 1)
    usage = type("Usage", (), {"free": 5_000_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ResourceError, match=rf"needs 7 MB, but the disk of {tmp_path} has 5 MB free; free some"
    ):
        enough_space(tmp_path / "not" / "yet", 7_000_000)
    assert files.enough_space(tmp_path, 4_000_000) is None


def test_a_size_has_three_digits_in_every_unit():
    sizes = (0, 999, 1000, 68_432, 999_499, 999_500, 98_362_432, 1_234_567_890, 2 * 10**12)
    shown = ["0 B", "999 B", "1 kB", "68.4 kB", "999 kB", "1 MB", "98.4 MB", "1.23 GB", "2 TB"]
    assert [*map(shown_size, sizes)] == shown
