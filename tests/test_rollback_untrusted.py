"""A cut and its side-car may come from anywhere: what is damaged, foreign or malicious is refused,
and then nothing was written."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sleb
from cli_tools import refused, tree
from fuzz_tools import changed
from rollback_tools import files, plan_of, repaired_cut, sha, small
from sleb.checkpoints.checkpoint import Checkpoint, fingerprint
from sleb.core.errors import DataError, InputError, SlebError
from sleb.core.plan import Plan
from sleb.surgery.rollback_manifest import Manifest

FREE = {"README.md", "run.json", "SHA256SUMS", "rollback/SHA256SUMS"}
"""Files of a cut that restoring does not read: they may change."""
SIDE = "rollback/rollback.json"
fuzz = settings(max_examples=150)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small model, and its repaired cut in several shards. Copy before you change it."""
    folder = tmp_path_factory.mktemp("made")
    source = small(folder / "source", shard="90KB")
    repaired_cut(source, folder / "out", 3, 4)
    return folder


@pytest.fixture
def out(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "out", tmp_path / "out"))


def read(folder: Path) -> list[str]:
    """The files that a restore depends on."""
    return sorted(k for k, v in tree(folder).items() if v is not None and k not in FREE)


def refuse(out: Path, kind: type[SlebError], match: str, **options) -> None:
    before = tree(out.parent)
    with pytest.raises(kind, match=match):
        sleb.restore(out, out.parent / "back", **options)
    assert tree(out.parent) == before


def rewrite(out: Path, change) -> None:
    """Change the list of the side-car as its writer would: in its form."""
    value = json.loads((out / SIDE).read_text())
    change(value)
    (out / SIDE).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def test_the_list_is_written_as_it_is_read(out):
    before = (out / SIDE).read_bytes()
    rewrite(out, lambda value: None)
    assert (out / SIDE).read_bytes() == before
    sleb.restore(out, out.parent / "back")


@fuzz
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_refused(made, data):
    out = made / "out"
    name = data.draw(st.sampled_from(read(out)))
    raw = (out / name).read_bytes()
    place = data.draw(st.integers(0, len(raw) - 1))
    bad = bytearray(raw)
    bad[place] ^= 1 << data.draw(st.integers(0, 7))
    before = sorted(os.listdir(made))
    try:
        (out / name).write_bytes(bad)
        with pytest.raises(SlebError) as caught:
            sleb.restore(out, made / "back")
        if name.startswith("rollback/") and name != SIDE:
            assert caught.value.exit_code == 5
            assert name in str(caught.value)
    finally:
        (out / name).write_bytes(raw)
    assert sorted(os.listdir(made)) == before


def test_every_file_counts(made):
    """The first and the last byte of each; and each may not be missing."""
    out = made / "out"
    for name in read(out):
        raw = (out / name).read_bytes()
        for bad in (bytes([raw[0] ^ 1]) + raw[1:], raw[:-1] + bytes([raw[-1] ^ 1]), raw[:-1], None):
            (out / name).unlink()
            if bad is not None:
                (out / name).write_bytes(bad)
            with pytest.raises(SlebError):
                sleb.restore(out, made / "back")
            (out / name).write_bytes(raw)
    assert sorted(os.listdir(made)) == ["out", "source"]


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "config.json", "plan.json", "model.safetensors.index.json"),
        *("rollback/removed.safetensors", "rollback/tensors.tsv", "rollback/files/config.json"),
    ],
)
def test_a_changed_file_is_named(out, name):
    with open(out / name, "ab") as stream:
        stream.write(b" ")
    refuse(out, DataError, rf"{Path(name).name} is (changed|damaged)")


def test_a_changed_tensor_and_a_changed_header_are_named(out, capsys):
    """Of a block that stays, of one that moved, and of the repair. Metadata is in no hash."""
    checkpoint = Checkpoint.open(out)
    for block, part, named in (
        (1, "mlp.up_proj", r"layers\.1\.mlp.up_proj.* SHA-256"),
        (3, "mlp.up_proj", r"layers\.5\.mlp\.up_proj"),
        (3, "mlp.down_proj", r"layers\.5\.mlp\.down_proj.weight is not the repaired"),
    ):
        name = f"model.layers.{block}.{part}.weight"
        raw = checkpoint.file(name).read_bytes()
        with open(checkpoint.file(name), "r+b") as stream:
            stream.seek(checkpoint.tensors[name].start)
            stream.write(b"\xff\xfe")
        refuse(out, DataError, named)
        refused(capsys, 5, "restore", out, "-o", out.parent / "back")
        checkpoint.file(name).write_bytes(raw)
    shard = out / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"format":"pt"', b'"format":"pu"', 1))
    refuse(out, DataError, "header of .*model-00002-of-00003.safetensors")


def test_notes_may_change(out, made):
    for name in ("README.md", "run.json", "notes.txt"):
        (out / name).write_text("mine")
    sleb.restore(out, out.parent / "back")
    assert tree(out.parent / "back") == tree(made / "source")


def test_a_side_car_of_another_cut_is_refused(out, made, tmp_path, capsys):
    other = small(tmp_path / "other", seed=1)
    for plan, source, said in [
        (plan_of(other, 3, 4), other, "is of another model"),
        (plan_of(made / "source", 1, 4), made / "source", "is of the cut of blocks [1, 4], not of"),
        (plan_of(made / "source", 3, 4), made / "source", "is of another repair of this cut"),
    ]:
        foreign = sleb.apply(plan, source, tmp_path / "foreign", force=True)
        shutil.rmtree(out / "rollback")
        shutil.copytree(foreign / "rollback", out / "rollback")
        message = refused(capsys, 2, "restore", out, "-o", tmp_path / "back")
        assert said in message
        assert message.startswith(f"{out / 'rollback'} is of ")
    assert not (tmp_path / "back").exists()


def test_a_plan_of_another_model_is_refused(out, tmp_path):
    plan = Plan.load(out / "plan.json")
    wrong = plan.model.model_copy(update={"weights_sha256": "0" * 64})
    plan.model_copy(update={"model": wrong}).save(out / "plan.json")
    refuse(out, InputError, "is of another model")
    # and if the side-car says the same, its tensors do not
    rewrite(out, lambda value: value["model"].update(weights_sha256="0" * 64))
    rewrite(out, lambda value: value["written"].update({"plan.json": sha(out / "plan.json")}))
    refuse(out, DataError, "does not make the model that .*plan.json was made for")


NAMES = ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", ".x", "a/../b", "x\n", "C:\\x"]


@pytest.mark.parametrize(
    ("field", "name"),
    [
        *(("carried", name) for name in (*NAMES, "x.safetensors", "config.json", "README.md")),
        *(("files", name) for name in (*NAMES, "files/../../x", "files/x.py", "headers/x", "x.py")),
        *(("shards", f"{name}.safetensors") for name in NAMES[:3]),
        ("shards", "x.bin"),
        ("files", "headers/../x.safetensors.json"),
    ],
)
def test_names_lead_nowhere_else(out, field, name):
    (out.parent / "x").write_text("outside")
    rewrite(out, lambda value: value[field].update({name: "0" * 64}))
    refuse(out, DataError, rf"rollback.json is damaged: {field}.* is no ")


@pytest.mark.parametrize(
    ("name", "size"), [(SIDE, 5 * 2**20), ("rollback/files/README.md", 65 * 2**20)]
)
def test_sizes_are_checked_before_reading(out, name, size):
    with open(out / name, "r+b") as stream:
        stream.truncate(size)
    refuse(out, DataError, f"{Path(name).name} is larger than")


@pytest.mark.parametrize(
    "name",
    [
        *("rollback", "rollback/files", "rollback/removed.safetensors", SIDE, "plan.json"),
        *("LICENSE", "model-00002-of-00003.safetensors", "config.json"),
        "additional_chat_templates",
    ],
)
def test_links_that_lead_out_are_refused(out, name):
    place = out.parent / "elsewhere"
    shutil.move(out / name, place)
    (out / name).symlink_to(place)
    refuse(out, DataError, "is a link that leads out of .*out")


def test_links_within_the_folder_and_into_a_cache_are_followed(out, made):
    """A snapshot of the hub's cache is a folder of links to its blobs."""
    snapshot = out.parent / "models--x/snapshots/0123"
    blobs = out.parent / "models--x/blobs"
    blobs.mkdir(parents=True)
    for path in [p for p in out.rglob("*") if p.is_file()]:
        blob = blobs / sha(path)
        link = snapshot / path.relative_to(out)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    sleb.restore(snapshot, out.parent / "back")
    assert tree(out.parent / "back") == tree(made / "source")
    assert not any(p.is_symlink() for p in (out.parent / "back").rglob("*"))
    (out / "LICENSE").rename(out / "LICENSE.own")
    (out / "LICENSE").symlink_to("LICENSE.own")
    sleb.restore(out, out.parent / "again")


def harmless(made: Path) -> None:
    """Restoring is refused, with nothing written; or its result is the model of the plan."""
    back, said = made / "back", None
    try:
        sleb.restore(made / "out", back)
    except SlebError as error:
        said = str(error)
    if said is not None:
        assert len(said.splitlines()) == 1
        assert sorted(os.listdir(made)) == ["out", "source"]
        return
    plan = Plan.load(made / "out/plan.json")
    assert fingerprint(Checkpoint.open(back), plan.model.blocks) == plan.model
    shutil.rmtree(back)


@fuzz
@given(data=st.data())
def test_any_list_plan_header_or_bytes_do_no_harm(made, data):
    """Also where whoever changed it has put the hashes right."""
    out = made / "out"
    header = "rollback/headers/model-00001-of-00003.safetensors.json"
    name = data.draw(st.sampled_from([SIDE, "plan.json", header, "rollback/files/config.json"]))
    raws = {n: (out / n).read_bytes() for n in (name, SIDE)}
    try:
        if data.draw(st.integers(0, 3)):
            value = data.draw(changed(json.loads(raws[name])))
            text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
            new = text.encode("utf-8", errors="replace")
        else:
            start = data.draw(st.integers(0, len(raws[name])))
            new = raws[name][:start] + data.draw(st.binary(max_size=64)) + raws[name][start + 9 :]
        (out / name).write_bytes(new)
        if name == "plan.json":
            rewrite(out, lambda v: v["written"].update({name: sha(out / name)}))
        elif name != SIDE:
            rewrite(out, lambda v: v["files"].update({name.partition("/")[2]: sha(out / name)}))
        harmless(made)
    finally:
        for n, raw in raws.items():
            (out / n).write_bytes(raw)


def test_fuzzing_left_the_cut_as_it_was(made, tmp_path):
    assert Manifest.load(made / "out" / SIDE)
    sleb.restore(made / "out", tmp_path / "back")
    assert files(tmp_path / "back") == files(made / "source")
