"""A repair in a GGUF file: the tensors of the fit, in a type that can be written."""

import hashlib

import gguf
import numpy as np
import pytest
import torch

import sleb
from gguf_tools import GEMMA3, plan_for, plan_of, readable, write_tiny  # noqa: F401 (a fixture)
from rollback_tools import any_repair
from sleb.checkpoints.checkpoint import Checkpoint, tensor_bytes
from sleb.checkpoints.cut import Cut
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.plan import Plan, RepairRecord
from sleb.core.units import parse_unit
from sleb.repairs import Repair
from sleb.surgery import gguf_repair
from sleb.verbs import applied

CPU = {"dtype": "float32", "device": "cpu"}
NAMES = {
    "model.layers.2.self_attn.o_proj.weight": ("blk.2.attn_output.weight", 2),
    "model.layers.4.mlp.down_proj.weight": ("blk.4.ffn_down.weight", 3),
}


def repair_of(folder, *names: str, removed=(3,)) -> Repair:
    """A repair that moves these tensors of a checkpoint by a tenth of their size."""
    generator = torch.Generator().manual_seed(1)

    def moved(old):
        noise = torch.randn(old.shape, generator=generator)
        return (old.float() + 0.1 * old.float().std() * noise).to(old.dtype)

    return any_repair(folder, removed, *names, change=moved)


def cut_gguf(plan, source, out, **options):
    """What is known of the GGUF file that is written."""
    return applied(plan, source, out, **options).gguf


def decoded(path, name: str) -> tuple[str, np.ndarray]:
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    return tensor.tensor_type.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize(
    ("kind", "written", "limit"),
    [
        ("F32", "F32", 0),
        ("F16", "F16", 1e-3),
        ("BF16", "BF16", 1e-9),
        ("Q8_0", "Q8_0", 0.01),
        ("Q5_1", "Q5_1", 0.05),
        ("Q4_0", "Q4_0", 0.12),
        ("Q4_1", "Q4_1", 0.1),
    ],
)
def test_repaired_tensors_are_stored_in_their_own_type(tmp_path, kind, written, limit):
    model = write_tiny(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType[kind])
    dense = sleb.load(model, **CPU)
    repair = repair_of(dense.source.path, *NAMES)
    plan = plan_for(dense, 3)
    plain = cut_gguf(plan, model, tmp_path / "plain.gguf")
    cut = cut_gguf(plan, model, tmp_path / "cut.gguf", repair=repair)
    assert {t.name: (t.was, t.type) for t in cut.requantized} == {
        gguf_name: (kind, written) for gguf_name, _ in NAMES.values()
    }
    for name, (own, new) in NAMES.items():
        want = repair.tensors[name].float().numpy()
        found_kind, found = decoded(cut.out, own.replace(own.split(".")[1], str(new)))
        error = np.linalg.norm(found - want) / np.linalg.norm(want)
        stated = next(t.error for t in cut.requantized if t.name == own)
        assert found_kind == written
        assert error == pytest.approx(stated, abs=1e-7)
        assert error <= limit
    changed = [
        a.name
        for a, b in zip(
            gguf.GGUFReader(plain.out).tensors, gguf.GGUFReader(cut.out).tensors, strict=True
        )
        if a.data.tobytes() != b.data.tobytes()
    ]
    assert changed == ["blk.2.attn_output.weight", "blk.3.ffn_down.weight"]
    assert Plan.load(cut.plan).repair == repair.record
    assert Plan.load(plain.plan).repair is None


@pytest.mark.usefixtures("readable")
def test_a_type_that_cannot_be_written_becomes_one_that_can(tmp_path, monkeypatch):
    model = write_tiny(tmp_path / "m.gguf")
    dense = sleb.load(model, **CPU)
    monkeypatch.setattr(gguf_repair, "WRITABLE", ("F32", "F16"))  # Q4_1 as if it were Q4_K
    repair = repair_of(dense.source.path, *NAMES)
    cut = cut_gguf(plan_for(dense, 3), model, tmp_path / "cut.gguf", repair=repair)
    assert {(t.was, t.type) for t in cut.requantized} == {("Q4_1", "Q8_0")}
    assert max(t.error for t in cut.requantized) < 0.01
    pruned = sleb.load(cut.out, **CPU).model
    with torch.no_grad():
        stored = pruned.model.layers[3].mlp.down_proj.weight
    want = repair.tensors["model.layers.4.mlp.down_proj.weight"].float()
    assert (stored - want).norm() / want.norm() < 0.01


@pytest.mark.usefixtures("readable")
def test_a_repair_comes_from_the_folder_of_the_repaired_cut(tmp_path):
    model = write_tiny(tmp_path / "m.gguf")
    dense = sleb.load(model, **CPU)
    repair = repair_of(dense.source.path, *NAMES)
    folder = sleb.apply(plan_for(dense, 3), model, tmp_path / "folder", repair=repair)
    plan = Plan.load(folder / "plan.json")
    fitted = cut_gguf(plan_for(dense, 3), model, tmp_path / "a.gguf", repair=repair)
    for other in (False, True):
        taken = cut_gguf(
            plan, model, tmp_path / "b.gguf", repaired=folder, other_weights=other, force=True
        )
        assert taken.out.read_bytes() == fitted.out.read_bytes()
    plain = sleb.apply(plan_for(dense, 3), model, tmp_path / "plain")
    for arguments, message in [
        ({"plan": plan, "repaired": plain}, "is not the repaired tensor"),
        ({"plan": plan_for(dense, 3), "repaired": folder}, "records no repair"),
        ({"plan": plan, "repaired": tmp_path / "none"}, "holds no checkpoint"),
        ({"plan": plan}, "--repaired"),
        ({"plan": plan, "repaired": folder, "repair": repair}, "a cut has one repair"),
        (
            {"plan": plan_for(dense, 3, 5), "repair": repair},
            r"the repair is of a cut of blocks \[3\], and this one is of \[3, 5\]",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            cut_gguf(source=model, out=tmp_path / "c.gguf", **arguments)
        assert not (tmp_path / "c.gguf").exists()


QUERIES = tuple(f"model.layers.4.self_attn.{name}_proj.weight" for name in "qkv")


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("gone", [3, "2.attention"])
def test_queries_and_keys_get_the_order_of_their_rows(tmp_path, architecture, gone):
    """Llama's have their rows in pairs, in GGUF; so does what Qwen2's become without a part."""
    extra = {}
    if architecture == "qwen2":
        wide = {"q": 64, "k": 32, "v": 32}
        extra = {
            f"blk.{i}.attn_{name}.bias": np.zeros(n, np.float32)
            for i in range(8)
            for name, n in wide.items()
        }
    q8 = gguf.GGMLQuantizationType.Q8_0
    model = write_tiny(tmp_path / "m.gguf", architecture, kind=q8, extra=extra)
    dense = sleb.load(model, **CPU)
    unit = gone if isinstance(gone, int) else parse_unit(gone)
    repair = repair_of(dense.source.path, *QUERIES, removed=(unit,))
    cut = cut_gguf(plan_for(dense, unit), model, tmp_path / "cut.gguf", repair=repair)
    plan = Plan.load(cut.plan)
    found = Cut.of(plan, folder=cut.out, parts=True).repair
    block = 3 if isinstance(gone, int) else 4
    for name, letter in zip(QUERIES, "qkv", strict=True):
        want, (_, rows) = (
            repair.tensors[name].float(),
            decoded(cut.out, f"blk.{block}.attn_{letter}.weight"),
        )
        assert (found[name].float() - want).norm() < 0.01 * want.norm()
        paired = letter != "v" and (architecture == "llama" or block == 4)
        order = [
            16 * h + i + 8 * half
            for h in range(len(want) // 16)
            for i in range(8)
            for half in (0, 1)
        ]
        want = want[order] if paired else want
        assert np.linalg.norm(rows - want.numpy()) < 0.01 * want.norm()
    assert "attn_q.weight" in str([t.name for t in cut.requantized])


@pytest.mark.usefixtures("readable")
def test_a_folder_of_another_model_is_not_mistaken_for_the_file(tmp_path):
    """With other weights a tensor can only be much like the file's: a transposed one is not."""
    model = write_tiny(tmp_path / "m.gguf")
    dense = sleb.load(model, **CPU)
    name = "model.layers.2.self_attn.o_proj.weight"
    right = repair_of(dense.source.path, name)
    turned = {name: right.tensors[name].T.contiguous()}
    record = right.record.model_dump(mode="json")
    digest = hashlib.sha256(tensor_bytes(turned[name])).hexdigest()
    record["gaps"][0]["tensors"][0]["sha256"] = digest
    wrong = Repair(
        record=RepairRecord.model_validate(record), tensors=turned, prefix="model.layers."
    )
    for repair, fits in ((right, True), (wrong, False)):
        folder = sleb.apply(plan_for(dense, 3), model, tmp_path / str(fits), repair=repair)
        plan = plan_of("llama", 8, 3).model_copy(update={"repair": repair.record})
        arguments = {"repaired": folder, "other_weights": True}
        if fits:
            assert cut_gguf(plan, model, tmp_path / "cut.gguf", **arguments).requantized
        else:
            with pytest.raises(UnsupportedModel, match="is stored in another form"):
                cut_gguf(plan, model, tmp_path / "no.gguf", **arguments)


@pytest.mark.usefixtures("readable")
def test_gains_of_gemmas_norms_are_one_more_in_the_file(tmp_path):
    model = write_tiny(tmp_path / "m.gguf", "gemma3", 12, **GEMMA3)
    dense = sleb.load(model, **CPU)
    names = ("post_feedforward_layernorm.weight", "mlp.down_proj.weight")
    repair = repair_of(dense.source.path, *(f"model.layers.4.{name}" for name in names))
    cut = cut_gguf(plan_for(dense, 3), model, tmp_path / "cut.gguf", repair=repair)
    again = Checkpoint.open(sleb.load(cut.out, **CPU).source.path)
    for name, limit in zip(names, (1e-2, 0.1), strict=True):
        want = repair.tensors[f"model.layers.4.{name}"].float()
        found = again.tensor(f"model.layers.3.{name}").float()
        assert (found - want).norm() <= limit * want.norm(), name
