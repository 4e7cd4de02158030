"""MODEL as a user writes it: folders, hub ids and GGUF files, and what each mistake says."""

import errno
import fnmatch
import json
import shutil
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import transformers
from huggingface_hub import errors as hub

import sleb
from cli_tools import run, tree
from conftest import save_tiny
from gguf_tools import write_tiny
from sleb.core.errors import DataError, InputError, ResourceError, UnsupportedModel
from sleb.models import source
from sleb.models.source import cache_dir, resolve


@pytest.fixture
def copy(tiny_dir, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "copy"))


def test_a_folder_is_taken_as_it_is_written(tiny_dir, monkeypatch):
    assert resolve(tiny_dir).path == tiny_dir
    monkeypatch.setenv("HOME", str(tiny_dir.parent))
    found = resolve(f"~/{tiny_dir.name}")
    assert (found.ref, found.path, found.is_gguf) == (f"~/{tiny_dir.name}", tiny_dir, False)


def test_a_wrong_path_is_refused_with_a_suggestion(tiny_dir, tmp_path):
    (tmp_path / "model.bin").write_text("")
    for ref, said in {
        "": "MODEL is empty",
        "/nowhere/at/all": "no model at /nowhere/at/all",
        str(tiny_dir.with_name("tinny")): r"tinny \(did you mean 'tiny'\?\)",
        "missing.gguf": r"no model at missing\.gguf",
        str(tmp_path / "model.bin"): r"model\.bin is a file",
    }.items():
        with pytest.raises(InputError, match=said):
            resolve(ref)


def test_a_folder_that_is_no_checkpoint_says_why(copy, tmp_path):
    def refused(said, use=sleb.load, folder=copy):
        with pytest.raises(InputError, match=said):
            use(folder)

    (tmp_path / "empty").mkdir()
    refused(r"empty has no config\.json", resolve, tmp_path / "empty")
    (copy / "model.safetensors").unlink()
    refused(r"copy has no model\.safetensors or model\.safetensors\.index")
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    refused("only pickled weights")
    (copy / "adapter_config.json").write_text("{}")
    refused(r"copy is an adapter \(PEFT\)")
    (copy / "config.json").unlink()
    refused(r"copy is an adapter \(PEFT\)")


def answer(cls, status: int):
    request = httpx.Request("GET", "https://hub.invalid")
    return cls("long explanation", response=httpx.Response(status, request=request))


def test_a_hub_id_is_fetched_without_pickles(tiny_dir, monkeypatch):
    asked = []

    def download(repo, revision, allow_patterns, **options):
        asked.append((repo, revision, allow_patterns))
        return str(tiny_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve("someone/small-model")
    assert (found.ref, found.path) == ("someone/small-model", tiny_dir)
    ((repo, revision, patterns),) = asked
    assert (repo, revision) == ("someone/small-model", None)

    def wanted(name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    assert all(map(wanted, [p.name for p in tiny_dir.iterdir()]))
    assert all(map(wanted, ["model-00001-of-00002.safetensors", "tokenizer.model", "LICENSE.md"]))
    assert not any(map(wanted, ["pytorch_model.bin", "model.onnx", "m.gguf", "x.pth", "x.h5"]))
    twice = ["original/model.safetensors", "consolidated.safetensors", "lora/adapter.safetensors"]
    assert not any(map(wanted, twice))


def test_shards_of_other_names_are_fetched_as_the_index_says(tmp_path, monkeypatch):
    config = {"model.safetensors.index.json": {"weight_map": {"a": "part-1.safetensors"}}}
    files = {"config.json": {}, **config, "part-1.safetensors": {}, "part-2.safetensors": {}}

    def download(repo, revision, allow_patterns, **options):
        for name, content in files.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("a/b")
    assert (tmp_path / "part-1.safetensors").exists()
    assert not (tmp_path / "part-2.safetensors").exists()


OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def in_cache(tmp_path, monkeypatch):
    """someone/small in the hub's cache, at two commits, the newer one being main."""
    root = tmp_path / "hub" / "models--someone--small"
    for commit in (OLD, NEW):
        save_tiny(root / "snapshots" / commit, seed=int(commit == OLD))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(NEW)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return root / "snapshots"


def test_a_revision_is_found_and_told_in_plan_and_card(in_cache, tmp_path):
    assert resolve("someone/small").path == in_cache / NEW
    assert resolve(f"someone/small@{OLD}").path == in_cache / OLD
    few = {"windows": 2, "heldout": 0, "length": 32, "device": "cpu"}
    plan = sleb.search(f"someone/small@{OLD}", remove=1, **few)
    assert (plan.origin.repository, plan.origin.revision) == ("someone/small", OLD)
    sleb.apply(plan, f"someone/small@{OLD}", tmp_path / "cut")
    card = (tmp_path / "cut" / "README.md").read_text()
    assert OLD in card
    assert "base_model: someone/small\n" in card
    with pytest.raises(InputError, match="another model"):
        sleb.apply(plan, "someone/small", tmp_path / "newer")


def test_the_revision_is_an_option_too(in_cache, capsys):
    ran = run(capsys, "inspect", "someone/small", "--revision", OLD, "--json")
    assert ran.json["model"] == f"someone/small@{OLD}"


def test_only_the_hub_has_revisions(tiny_dir):
    with pytest.raises(InputError, match="only a model on the hub has revisions"):
        resolve(f"{tiny_dir}@main")


NOT_REACHED = r"no folder named a/b here, and the hub cannot be reached for it \({}\); check the pa"
DISK_FULL = "disk full while fetching a/b; free some space and repeat the command"
NO_SUCH = r"no folder named a/b here and no such model on the hub; check the name, and for a priva"


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (answer(hub.GatedRepoError, 403), InputError, "a/b is gated: accept its terms on the hub"),
        (answer(hub.RepositoryNotFoundError, 404), InputError, NO_SUCH),
        (hub.HFValidationError("bad name"), InputError, NO_SUCH),
        (hub.LocalEntryNotFoundError("no"), ResourceError, NOT_REACHED.format("LocalEntryNotFo.*")),
        (hub.OfflineModeIsEnabled("no"), ResourceError, NOT_REACHED.format("OfflineModeIsEnabled")),
        (answer(hub.HfHubHTTPError, 500), ResourceError, NOT_REACHED.format("HfHubHTTPError")),
        (httpx.ReadTimeout("slow"), ResourceError, NOT_REACHED.format("ReadTimeout")),
        (hub.XetDownloadError("broken"), ResourceError, NOT_REACHED.format("XetDownloadError")),
        (OSError(errno.ENOSPC, "full"), ResourceError, DISK_FULL),
        (RuntimeError("I/O error: x (os error 28)"), ResourceError, DISK_FULL),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_failure_of_the_hub_is_one_line(monkeypatch, error, raised, message):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(raised, match=message) as info:
        resolve("a/b")
    assert "\n" not in str(info.value)


@pytest.fixture
def gguf(tmp_path, monkeypatch) -> Path:
    """A file that looks like GGUF from its first bytes, and a cache of the test's own."""
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return path


def stand_in(tiny_dir, calls, fail=None):
    """What takes the place of the conversion: copies a checkpoint, or fails half way."""

    def convert(path, out):
        calls.append(path.name)
        shutil.copyfile(tiny_dir / "config.json", out / "config.json")
        if fail:
            raise fail
        shutil.copyfile(tiny_dir / "model.safetensors", out / "model.safetensors")

    return convert


def test_a_gguf_file_is_converted_once_by_content(gguf, tiny_dir, tmp_path, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(source, "_convert", stand_in(tiny_dir, calls))
    first = resolve(gguf)
    assert (first.ref, first.is_gguf, calls) == (str(gguf), True, ["model.gguf"])
    assert first.path.parent == tmp_path / "cache" / "gguf"
    assert resolve(gguf).path == first.path
    copy = shutil.copyfile(gguf, tmp_path / "same.gguf")
    assert resolve(copy).path == first.path
    assert len(calls) == 1
    copy.write_bytes(b"GGUF" + bytes(99))
    assert resolve(copy).path != first.path
    assert calls == ["model.gguf", "same.gguf"]


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "full"), ResourceError),
        (DataError("corrupt"), DataError),
    ],
)
def test_a_conversion_that_fails_leaves_no_entry(
    gguf, tiny_dir, tmp_path, monkeypatch, failure, raised
):
    calls: list[str] = []
    monkeypatch.setattr(source, "_convert", stand_in(tiny_dir, calls, failure))
    with pytest.raises(raised):
        resolve(gguf)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(source, "_convert", stand_in(tiny_dir, calls))
    assert sorted(tree(resolve(gguf).path)) == ["config.json", "model.safetensors"]
    assert len(calls) == 2


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    for name in ("SLEB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "sleb"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "sleb"
    monkeypatch.setenv("SLEB_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"


def test_a_missing_gguf_package_is_named(gguf, monkeypatch):
    write_tiny(gguf)

    def missing(*args, **kwargs):
        raise ImportError("gguf>=0.10.0 is needed")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(
        InputError, match=r"reading model\.gguf needs the gguf package: pip install"
    ):
        resolve(gguf)


def test_a_full_disk_while_saving_the_conversion_is_one_line(gguf, tiny_dir, monkeypatch):
    """The writer of safetensors reports it as an error of its own type."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir)
    write_tiny(gguf)
    monkeypatch.setattr(source, "check_tensors", lambda *a: None)
    monkeypatch.setattr(source, "corrections", lambda *a: {})

    def save(path):
        from safetensors import SafetensorError

        raise SafetensorError("Error while serializing: I/O error: No space (os error 28)")

    monkeypatch.setattr(model, "save_pretrained", save)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    monkeypatch.setattr(source, "correct_tokens", lambda *a: None)
    with pytest.raises(
        ResourceError, match=r"disk full while writing .*cache/gguf/\w{32}-\d; free"
    ):
        resolve(gguf)


def test_a_tokenizer_that_is_not_converted_faithfully_is_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from conftest import byte_tokenizer

    right = byte_tokenizer()
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])), unk_token="a"
    )
    likely = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0)], unk_id=0)), unk_token="<unk>"
    )
    stated = {"tokenizer": "llama", "add_bos": None}
    source._check_tokenizer(tmp_path, right, right, stated)
    for converted, reloaded, said, message in (
        (right, other, stated, "saved and loaded again it gives other tokens"),
        (likely, likely, stated, "merges pieces by rank in the file"),
        (right, right, {**stated, "add_bos": True}, "starts every text with BOS, this one does"),
    ):
        with pytest.raises(UnsupportedModel, match=message):
            source._check_tokenizer(tmp_path, converted, reloaded, said)
