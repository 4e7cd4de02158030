"""Cuts with a side-car, for the tests of rollback."""

import hashlib
from pathlib import Path

import torch

import sleb
from cli_tools import tree
from conftest import save_tiny
from plan_tools import plan_of
from sleb.checkpoints.checkpoint import Checkpoint, tensor_bytes
from sleb.core.plan import Calibration, Plan, RepairedGap, RepairedTensor, RepairRecord
from sleb.repairs import Repair

CARD = "---\nlicense: mit\nlanguage: en\n---\nThe card of the original.\n"
CARRIED = {
    "LICENSE": b"do as you like\n",
    "tokenizer.json": b"{}",
    "additional_chat_templates/rag.jinja": b"{{ x }}",
}


def small(path: Path, **options) -> Path:
    """A tiny Llama of 6 blocks with a card and other files beside it."""
    save_tiny(path, **options)
    for name, content in CARRIED.items():
        (path / name).parent.mkdir(exist_ok=True)
        if not (path / name).exists():
            (path / name).write_bytes(content)
    (path / "README.md").write_text(CARD)
    (path / "params.json").write_text('{"n_layers": 6}')
    return path


def any_repair(folder: Path, removed: tuple[int, ...], *names: str, change=torch.neg) -> Repair:
    """A repair that turns the tensors ``names`` round, or changes them so; not a good one."""
    checkpoint = Checkpoint.open(folder)
    tensors = {name: change(checkpoint.tensor(name)) for name in names}
    changed = tuple(
        RepairedTensor(name=name, sha256=hashlib.sha256(tensor_bytes(tensor)).hexdigest())
        for name, tensor in tensors.items()
    )
    text = Calibration(sources=(), windows=1, length=2, seed=0, sha256="0" * 64)
    gap = RepairedGap(removed=removed, ridge=1.0, tensors=changed, before={}, after={})
    record = RepairRecord(gaps=(gap,), reach=1, calibration=text, heldout=text)
    return Repair(record=record, tensors=tensors, prefix="model.layers.")


def repaired_cut(folder: Path, out: Path, *order: int) -> tuple[Plan, Repair]:
    """A repaired cut of :func:`small` in ``out``, and its plan."""
    names = ("model.layers.5.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight")
    repair = any_repair(folder, tuple(sorted(order)), *names)
    plan = plan_of(folder, *order)
    sleb.apply(plan, folder, out, repair=repair)
    assert not torch.equal(
        Checkpoint.open(out).tensor(f"model.layers.{5 - len(order)}.mlp.down_proj.weight"),
        Checkpoint.open(folder).tensor(names[0]),
    )
    return Plan.load(out / "plan.json"), repair


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder but its card and its checksums, which say how it came about."""
    return {k: v for k, v in tree(folder).items() if k not in ("README.md", "SHA256SUMS")}
