"""`sleb push` against a hub on this machine: what arrives there, and what is refused."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

import sleb
from cli_tools import refused, run, tree
from hub_server import TOKEN, Hub, serving


@pytest.fixture(scope="module")
def cut(tiny_dir, tiny_plan, tmp_path_factory) -> Path:
    """A cut of the tiny model in two shards or more, with its side-car. Read it only."""
    from conftest import save_tiny

    folder = tmp_path_factory.mktemp("push")
    source = save_tiny(folder / "source", shard="60KB")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [en, no]\n---\n# The model\n")
    plan = sleb.search(source, remove=2, windows=2, length=16, dtype="float32", device="cpu")
    out = sleb.apply(plan, source, folder / "cut")
    assert len(list(out.glob("*.safetensors"))) > 1
    return out


@pytest.fixture
def hub(monkeypatch):
    """A hub that huggingface_hub finds, and a token for it."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    disable_progress_bars()  # in a process of its own, the command line does so
    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        yield found
    enable_progress_bars()


def sent(hub: Hub, repo: str = "me/small", branch: str = "main") -> dict[str, bytes]:
    return {path: body for (r, b, path), body in hub.files.items() if (r, b) == (repo, branch)}


def local(folder: Path) -> dict[str, bytes]:
    return {name: body for name, body in tree(folder).items() if body is not None}


def copy(cut: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cut, tmp_path / "out"))


def test_the_bytes_that_arrive_are_those_of_the_folder(cut, hub, capsys, tmp_path):
    before = tree(cut)
    done = run(capsys, "push", cut, "me/small", "--json")
    assert (done.code, done.err) == (0, "")
    expected = {n: b for n, b in local(cut).items() if not n.startswith("rollback/")}
    assert sent(hub) == expected
    assert done.json["files"] == sorted(expected)
    assert done.json["nbytes"] == sum(map(len, expected.values()))
    assert (done.json["repo"], done.json["commit"]) == ("me/small", "abc123")
    assert done.json["url"] == f"{hub.url}/me/small"
    assert (hub.repos, hub.tokens) == ({"me/small": False}, {TOKEN})
    assert "license: mit" in hub.cards[0]
    assert tree(cut) == before
    for name, body in sent(hub).items():
        (tmp_path / name).write_bytes(body)
    checked = subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.count(": OK") == len(sent(hub)) - 2  # the list and the card
    assert run(capsys, "push", cut, "me/small", "--with-rollback").code == 0
    assert sent(hub) == local(cut)


def test_a_branch_and_a_private_repository_are_made(cut, hub, capsys):
    done = run(capsys, "push", cut, "small", "--private", "--revision", "depth-2")
    assert done.code == 0, done.err
    assert hub.repos == {"me/small": True}
    assert hub.branches == {("me/small", "depth-2")}
    assert sent(hub, branch="depth-2").keys() == {n for n in local(cut) if "rollback/" not in n}
    assert sent(hub) == {}
    assert f"uploaded to {hub.url}/me/small/tree/depth-2, commit abc123" in done.out


def test_a_dry_run_sends_nothing_and_needs_no_token(cut, hub, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    done = run(capsys, "push", cut, "me/small", "--dry-run")
    assert done.code == 0
    assert done.out.splitlines()[0] == "README.md"
    assert "would go to me/small, branch main" in done.out
    assert not hub.repos
    assert not hub.tokens


def test_leftovers_and_hidden_files_stay(cut, hub, capsys, tmp_path):
    out = copy(cut, tmp_path)
    for name in (".netrc", "x.journal", "y.heal", "z.lock"):
        (out / name).write_text("mine")
    (out / ".cache").mkdir()
    (out / ".cache" / "key").write_text("mine")
    (out / "report [1].html").write_text("a report")
    assert run(capsys, "push", out, "me/small").code == 0
    new = {name: body for name, body in sent(hub).items() if name not in local(cut)}
    assert new == {"report [1].html": b"a report"}


def damaged(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))


SPOILT = {  # what is done to the folder, the exit code, and what is said
    "a link to a file": (lambda f: (f / "notes.txt").symlink_to(f.parent), 2, "notes.txt is a sym"),
    "a link in a folder": (
        lambda f: (f / "more").symlink_to(f.parent),
        2,
        "more is a symbolic link",
    ),
    "a pickle": (lambda f: (f / "optimizer.PT").write_bytes(b""), 2, "optimizer.PT may run code"),
    "a shard": (
        lambda f: damaged(sorted(f.glob("*.safetensors"))[0]),
        5,
        ".safetensors is changed",
    ),
    "a file less": (lambda f: (f / "tokenizer.json").unlink(), 5, "tokenizer.json is missing"),
    "no plan": (lambda f: (f / "plan.json").unlink(), 2, "has no plan.json"),
    "no checksums": (lambda f: (f / "SHA256SUMS").unlink(), 2, "has no SHA256SUMS"),
    "a side-car": (lambda f: damaged(f / "rollback/removed.safetensors"), 5, "removed.safetensors"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_folder_is_refused_and_nothing_is_sent(cut, hub, capsys, tmp_path, how):
    out, (spoil, code, said) = copy(cut, tmp_path), SPOILT[how]
    spoil(out)
    assert said in refused(capsys, code, "push", out, "me/small", "--with-rollback")
    assert not hub.repos
    assert not hub.tokens
    if how == "a side-car":  # which stays here
        assert run(capsys, "push", out, "me/small").code == 0


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "me/", "-x", "me/na me"])
def test_odd_names_are_refused(cut, hub, capsys, name):
    assert "is not a repository" in refused(capsys, 2, "push", "--", cut, name)
    if name and name != "a/b/c":
        words = ["push", cut, "me/small", f"--revision={name}"]
        assert name == "me/" or "is not the name of a branch" in refused(capsys, 2, *words)
    assert not hub.tokens


@pytest.mark.parametrize(
    "route", ["/repos/create", "/preupload/", "/objects/batch", "/commit/", "/store/"]
)
@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, 2, "the hub does not know the token (401)"),
        (403, 2, "the token may not write to me/small (403)"),
        (409, 6, "me/small changed meanwhile (409)"),
        (422, 2, "the hub refuses the upload to me/small (422)"),
        (503, 6, "the hub failed (503)"),
    ],
)
def test_a_refusal_is_one_line_without_the_token(cut, hub, capsys, route, status, code, said):
    hub.fail = (route, status, f"bad request of {TOKEN}")
    if (route, status) == ("/repos/create", 409):
        hub.fail = None
        hub.repos["me/small"] = False
        assert run(capsys, "push", cut, "me/small").code == 0  # it is there: that is no failure
        assert "is there already and public" in refused(
            capsys, 2, "push", cut, "me/small", "--private"
        )
        return
    found = refused(capsys, code, "push", cut, "me/small")
    assert found.startswith(said)
    assert "secret" not in found
    assert not hub.files


def test_without_a_token_or_a_network(cut, hub, capsys, monkeypatch, tmp_path):
    constants = huggingface_hub.constants
    with monkeypatch.context() as patch:
        patch.delenv("HF_TOKEN")
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        assert "hf auth login" in refused(capsys, 2, "push", cut, "me/small")
        assert not hub.tokens
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE" in refused(capsys, 6, "push", cut, "me/small")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert "the hub cannot be reached" in refused(capsys, 6, "push", cut, "me/small")


@pytest.mark.slow
def test_the_environment_chooses_the_hub(cut, tmp_path):
    """HF_ENDPOINT and a stored token, as a user has them, in a process of its own."""
    with serving() as hub:
        (tmp_path / "token").write_text(TOKEN)
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_HOME": str(tmp_path),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-m", "sleb", "push", str(cut), "me/small"]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert hub.tokens == {TOKEN}
        assert sent(hub).keys() == {n for n in local(cut) if "rollback/" not in n}
        weights = sorted(cut.glob("*.safetensors"))
        assert {hashlib.sha256(p.read_bytes()).hexdigest() for p in weights} == set(hub.stored)
        assert TOKEN not in ran.stdout
