"""Cutting a GGUF file: what stays is the same bytes, in the same order, and runs as it did."""

import hashlib
import os
import shutil
import stat
from contextlib import nullcontext
from pathlib import Path

import gguf
import pytest
import torch

import sleb
from cli_tools import tree
from gguf_tools import GEMMA3, plan_for, plan_of, readable, write_imatrix, write_tiny  # noqa: F401
from sleb.checkpoints.cut import Cut
from sleb.core.errors import InputError, ResourceError
from sleb.core.plan import Plan
from sleb.surgery.gguf_cut import cut_gguf
from sleb.verbs import applied

CPU = {"dtype": "float32", "device": "cpu"}


def entries(path: Path) -> dict[str, tuple]:
    """Every field as the gguf package reads it: types and values."""
    reader = gguf.GGUFReader(path)
    own = ("GGUF.tensor_count", "GGUF.kv_count")
    return {k: (f.types, f.contents()) for k, f in reader.fields.items() if k not in own}


def raw(path: Path) -> dict[str, tuple]:
    """Every tensor as the gguf package reads it, in order: type, shape, bytes."""
    return {
        t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes())
        for t in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("alignment", [None, 64, 4096])
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "F32"])
def test_what_stays_is_the_same_bytes_in_the_same_order(tmp_path, kind, alignment):
    model = write_tiny(
        tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType[kind], alignment=alignment
    )
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    model.chmod(0o444)
    cut = cut_gguf(plan_of("llama", 8, 3, 6), model, tmp_path / "cut.gguf", other_weights=True)
    assert hashlib.sha256(model.read_bytes()).hexdigest() == digest
    assert (cut.blocks, cut.removed, cut.nbytes) == (6, (3, 6), cut.out.stat().st_size)

    before, after = entries(model), entries(cut.out)
    assert after.pop("sleb.source_sha256")[1] == digest
    assert after.pop("sleb.removed_blocks")[1] == [3, 6]
    assert after.pop("llama.block_count") == (before.pop("llama.block_count")[0], 6)
    assert list(after.items()) == list(before.items())

    new = {0: 0, 1: 1, 2: 2, 4: 3, 5: 4, 7: 5}
    expected = []
    for name, tensor in raw(model).items():
        parts = name.split(".")
        if parts[0] == "blk":
            if int(parts[1]) not in new:
                continue
            parts[1] = str(new[int(parts[1])])
        expected.append((".".join(parts), tensor))
    assert list(raw(cut.out).items()) == expected


def test_an_importance_matrix_of_the_older_form_is_named(tmp_path, caplog):
    model = write_tiny(tmp_path / "m.gguf")
    older = tmp_path / "m.imatrix.dat"
    older.write_bytes(b"")
    cut = cut_gguf(plan_of("llama", 8, 3), model, tmp_path / "cut.gguf", other_weights=True)
    assert cut.imatrices == ()
    (warning,) = [one for one in caplog.records if one.levelname == "WARNING"]
    assert str(older) in warning.getMessage()
    assert "llama-imatrix --in-file" in warning.getMessage()


def test_an_importance_matrix_beside_the_model_goes_along(tmp_path):
    model = write_tiny(tmp_path / "m.gguf")
    own = write_imatrix(tmp_path / "m-imatrix.gguf", model)
    (tmp_path / "other").mkdir()
    other = write_tiny(tmp_path / "other/m.gguf", blocks=9)
    write_imatrix(tmp_path / "imatrix-of-another.gguf", other)
    cut = cut_gguf(plan_of("llama", 8, 3, 6), model, tmp_path / "cut.gguf", other_weights=True)
    assert cut.imatrices == (tmp_path / "cut.m-imatrix.gguf",)
    before, after = raw(own), raw(cut.imatrices[0])
    new = {0: 0, 1: 1, 2: 2, 4: 3, 5: 4, 7: 5}
    for name in raw(cut.out):
        if name.startswith("blk.") and "norm" not in name:
            _, block, part = name.split(".", 2)
            (old,) = [old for old, now in new.items() if now == int(block)]
            for kind in ("in_sum2", "counts"):
                assert after.pop(f"{name}.{kind}") == before[f"blk.{old}.{part}.{kind}"]
    assert after == {}
    kept = entries(own)
    assert {k: v for k, v in entries(cut.imatrices[0]).items() if k in kept} == kept
    cut.out.unlink()
    cut.plan.unlink()
    with pytest.raises(InputError, match="imatrix"):  # what is there is not overwritten
        cut_gguf(plan_of("llama", 8, 3), model, cut.out, other_weights=True)


def test_every_depth_is_the_first_removals_of_the_order(tmp_path):
    model = write_tiny(tmp_path / "m.gguf")
    plan = plan_of("llama", 8, 5, 2, 6)
    for depth, removed in ((1, (5,)), (2, (2, 5)), (3, (2, 5, 6)), (None, (2, 5, 6))):
        out = tmp_path / f"{depth}.gguf"
        cut_gguf(plan, model, out, cut=Cut.of(plan, depth), other_weights=True)
        used = Plan.load(tmp_path / f"{depth}.plan.json")
        assert (used.removed, used.order) == (removed, plan.order[: len(removed)])
        assert entries(out)["sleb.removed_blocks"][1] == list(removed)
    with pytest.raises(InputError, match=r"--depth 4 is outside this plan's 1\.\.3"):
        applied(plan, model, tmp_path / "4.gguf", depth=4, other_weights=True)


def test_a_cut_of_a_cut_is_the_cut_of_both(tmp_path):
    model = write_tiny(tmp_path / "m.gguf")
    cut_gguf(plan_of("llama", 8, 2), model, tmp_path / "a.gguf", other_weights=True)
    cut_gguf(plan_of("llama", 7, 4), tmp_path / "a.gguf", tmp_path / "b.gguf", other_weights=True)
    cut_gguf(plan_of("llama", 8, 2, 5), model, tmp_path / "c.gguf", other_weights=True)
    assert raw(tmp_path / "b.gguf") == raw(tmp_path / "c.gguf")
    last = hashlib.sha256((tmp_path / "a.gguf").read_bytes()).hexdigest()
    assert entries(tmp_path / "b.gguf")["sleb.source_sha256"][1] == last


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize(
    ("architecture", "type", "options", "removed"),
    [
        ("llama", "llama", {}, (0, 3)),
        ("gemma3", "gemma3_text", GEMMA3, (1, 2)),
        pytest.param("gemma3", "gemma3_text", GEMMA3, (5,), marks=pytest.mark.slow),
    ],
)
def test_the_cut_file_is_the_model_with_blocks_bypassed(
    tmp_path, architecture, type, options, removed
):
    """Also for the plan of this very file, in float32, bit for bit."""
    model = write_tiny(tmp_path / "m.gguf", architecture, 12, **options)
    dense = sleb.load(model, **CPU)
    cut = cut_gguf(plan_for(dense, *removed), model, tmp_path / "cut.gguf")
    assert Plan.load(cut.plan).model.model_type == type
    assert not cut.other_weights
    pruned = sleb.load(cut.out, **CPU)
    ids = torch.randint(0, 259, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = dense.model(ids, use_cache=False).logits
        found = pruned.model(ids, use_cache=False).logits
        with sleb.bypassed(dense.model, list(removed)):
            want = dense.model(ids, use_cache=False).logits
    assert torch.equal(found, want)
    assert not torch.allclose(found, whole, atol=1e-2)
    kinds = getattr(pruned.model.config, "layer_types", None)
    if architecture == "gemma3":
        assert kinds != type_of_uncut(pruned.model.config), "the pattern must be irregular"


def type_of_uncut(config) -> list[str]:
    """The sliding windows that an uncut Gemma 3 of this depth has."""
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    return [kinds[i % 6] for i in range(config.num_hidden_layers)]


@pytest.mark.usefixtures("readable")
def test_a_plan_for_another_model_is_refused_with_the_way_out(tmp_path):
    model = write_tiny(tmp_path / "m.gguf")
    before = tree(tmp_path)
    for plan, message in [
        (plan_of("llama", 9, 3), "blocks is 9 in the plan and 8 in .* search again"),
        (
            plan_of("qwen2", 8, 3),
            r"model_type is qwen2 in the plan and llama or mistral or mixtral or internlm3 in ",
        ),
        (
            plan_of("mistral", 8, 3),
            r"another model: model_type is mistral in the plan and llama in .*m\.gguf; .*, or pass "
            r"--other-weights if the plan is of the same model in another form",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            cut_gguf(plan, model, tmp_path / "cut.gguf")
        kept = {name: data for name, data in tree(tmp_path).items() if "cache" not in name}
        assert kept == before


def test_existing_files_and_the_model_itself_are_not_replaced(tmp_path):
    model = write_tiny(tmp_path / "m.gguf")
    plan = plan_of("llama", 8, 3)
    before = tree(tmp_path)
    link = tmp_path / "link.gguf"
    link.hardlink_to(model)
    for out in (model, link):
        with pytest.raises(InputError, match="is the model itself; choose another -o"):
            cut_gguf(plan, model, out, other_weights=True, force=True)
    link.unlink()
    (tmp_path / "cut.plan.json").write_text("mine")
    with pytest.raises(InputError, match=r"cut\.plan\.json exists; choose another -o, or pass --f"):
        cut_gguf(plan, model, tmp_path / "cut.gguf", other_weights=True)
    (tmp_path / "cut.plan.json").unlink()
    assert tree(tmp_path) == before
    first = cut_gguf(plan, model, tmp_path / "cut.gguf", other_weights=True)
    again = cut_gguf(
        plan_of("llama", 8, 3, 4), model, tmp_path / "cut.gguf", other_weights=True, force=True
    )
    assert (first.blocks, again.blocks) == (7, 6)
    assert entries(again.out)["llama.block_count"][1] == 6
    assert Plan.load(again.plan).removed == (3, 4)
    assert stat.S_IMODE(again.out.stat().st_mode) == 0o666 & ~current_umask()
    assert sorted(os.listdir(tmp_path)) == ["cut.gguf", "cut.plan.json", "m.gguf"]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("where", ["tensor", "plan", "space"])
def test_a_disk_that_fills_up_leaves_no_trace(tmp_path, monkeypatch, where):
    model = write_tiny(tmp_path / "m.gguf")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if where == "plan":
        monkeypatch.setattr(Plan, "to_json", full)
    elif where == "space":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: type("U", (), {"free": 1000}))
    before = tree(tmp_path)

    class Progress:
        def stage(self, title, total):
            return nullcontext(full if where == "tensor" else lambda n=1: None)

    options = {"other_weights": True, "progress": Progress()}
    for out in ("cut.gguf", "new/folder/cut.gguf"):
        with pytest.raises(ResourceError, match=r"disk full while .*cut|has 1 kB free"):
            cut_gguf(plan_of("llama", 8, 3), model, tmp_path / out, **options)
        assert tree(tmp_path) == before
