"""Cut blocks out of a GGUF file: the twin of `sleb.surgery.apply` for what llama.cpp runs.

Tensor bytes are copied, never decoded, so every quantization survives; `gguf_fields` says which
fields change, and `gguf_parts` what becomes of blocks that lose their attention or MLP alone. Only
a repair's tensors are quantized again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sleb.checkpoints.checkpoint import Checkpoint, check_fingerprint, fingerprint
from sleb.checkpoints.cut import Cut
from sleb.checkpoints.gguf_fields import GGUFModel, architecture_of, block_of, recut
from sleb.checkpoints.gguf_file import (
    ARRAY,
    INT32,
    STRING,
    GGUFFile,
    NewTensor,
    Value,
    write_gguf,
)
from sleb.checkpoints.gguf_repaired import FIELD, repaired_sha256
from sleb.core.errors import InputError
from sleb.core.files import enough_space, staged_files, writable_target
from sleb.core.plan import Plan
from sleb.core.progress import Progress, silent
from sleb.core.units import parts_in
from sleb.models.source import resolve
from sleb.surgery.gguf_parts import as_deci, check_parts, without_parts
from sleb.surgery.gguf_repair import Requantized, quantize_again

logger = logging.getLogger(__name__)

SOURCE = "sleb.source_sha256"
"""Field of a cut file: SHA-256 of the whole file that it was cut from."""


@dataclass(frozen=True, kw_only=True)
class CutGGUF:
    """What was written. ``nbytes``: size of the file. ``other_weights``: the plan's quality was
    measured on other weights. ``requantized``: the repaired tensors, and what that cost.
    ``imatrices``: the importance matrices that were cut along."""

    out: Path
    plan: Path
    removed: tuple[int, ...]
    blocks: int
    nbytes: int
    other_weights: bool
    requantized: tuple[Requantized, ...] = ()
    imatrices: tuple[Path, ...] = ()


def plan_beside(out: Path) -> Path:
    """Where the plan of a cut file goes: ``pruned.plan.json`` for ``pruned.gguf``."""
    return out.with_suffix(".plan.json")


def cut_gguf(
    plan: Plan,
    source: str | Path,
    out: str | Path,
    *,
    cut: Cut | None = None,
    other_weights: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> CutGGUF:
    """Write a ``cut`` of ``plan``, by default the whole, of the GGUF file ``source`` as ``out``,
    with the plan as far as it was used beside it.

    The plan must be of this very file, as sleb dequantizes it; with ``other_weights`` it may be of
    another form of the model, such as the Hugging Face checkpoint that the file was made from: then
    type and number of blocks are compared, and that is all that a plan knows besides hashes.
    Tensors of a repair are quantized again, to the type that the tensor had if the gguf package can
    write it, else to Q8_0. Importance matrices beside ``source`` (:func:`imatrices`) are cut along:
    from ``imatrix.gguf`` comes ``pruned.imatrix.gguf`` for ``pruned.gguf``. The source is only
    read; no tensor but the repaired is held in memory.

    Raises:
        InputError: the plan is of another model, tensors of its repair lack, or ``out`` exists.
        UnsupportedModel: llama.cpp would not run this cut exactly.
        DataError: the file is corrupt.
        ResourceError: the disk is full.
    """
    source, out = Path(source).expanduser(), Path(out)
    cut = cut or Cut.of(plan, parts=True)
    cut.check_whole("give a cut with these, or one without_repair()")
    model, values = check_gguf(plan, source, out, cut=cut, force=force)
    file, beside = model.file, plan_beside(out)
    original = None
    if not other_weights:
        original = _check_identity(plan, model, source, progress)
    elif cut.repair and cut.record != plan.repair:  # fitted to the dequantized file
        original = Checkpoint.open(resolve(source, progress).path)
    requantized: tuple[Requantized, ...] = ()
    if cut.repair is not None:
        requantized = quantize_again(model, cut.repair, original)
    values |= _provenance(file, cut)
    tensors, names = _renumbered(file, cut, requantized), dict[str, str]()
    if cut.parts:
        values, tensors, names = as_deci(model, cut, values, tensors)
    if cut.record and cut.repair:
        written = {
            tensor.name: tensor.content for tensor in tensors if isinstance(tensor.content, bytes)
        }
        contents = {
            name: written[cut.rename(new.name, "blk.") or ""]
            for name, new in zip(cut.repair, requantized, strict=True)
        }
        data = repaired_sha256(cut.record.tensors, contents)
        values[FIELD] = Value(kind=STRING, data=data)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    enough_space(out.parent, nbytes)
    importance = imatrices(file)
    along = tuple(out.with_name(f"{out.stem}.{one.path.name}") for one in importance)
    with staged_files(beside, *along, out, force=force) as (staged_plan, *others, staged):
        with progress.stage(f"writing {out.name}", nbytes) as tick:
            write_gguf(file, staged, values=values, tensors=tensors, tick=tick, names=names)
        for one, place in zip(importance, others, strict=True):
            own, kept = _provenance(one, cut), without_parts(_renumbered(one, cut, ()), cut)
            write_gguf(one, place, values=own, tensors=kept, tick=lambda _: None)
        there = GGUFModel.of(GGUFFile.open(staged))  # every offset and block, checked again
        staged_plan.write_text(cut.used(plan).to_json(), encoding="utf-8")
        size = staged.stat().st_size
    return CutGGUF(
        out=out,
        plan=beside,
        removed=cut.removed,
        blocks=there.blocks,
        nbytes=size,
        other_weights=other_weights,
        requantized=requantized,
        imatrices=along,
    )


def imatrices(source: GGUFFile) -> list[GGUFFile]:
    """The importance matrices (llama-imatrix, as GGUF) that lie beside a model with ``imatrix`` in
    their names and are of it: each entry is of a matrix of the model, and has its columns. Those of
    the older form are named in a warning.

    Raises:
        DataError: one is corrupt.
    """
    found = []
    for path in sorted(source.path.parent.glob("*imatrix*.gguf")):
        file = GGUFFile.open(path)
        if file.value("general.type") != "imatrix":
            continue
        if _fits(file, source):
            found.append(file)
        else:
            logger.info("not cut along: %s is of another model", path)
    for path in sorted(source.path.parent.glob("*imatrix*.dat")):
        convert = f"llama-imatrix --in-file {path} -o {path.with_suffix('.gguf')}"
        logger.warning("not cut along: %s is of an older form; first run %s", path, convert)
    return found


def _fits(imatrix: GGUFFile, source: GGUFFile) -> bool:
    """Whether the entries, sums of squared inputs, are of matrices of the model's blocks."""
    for name, info in imatrix.tensors.items():
        matrix = source.tensors.get(name.removesuffix(".in_sum2"))
        summed = name.endswith(".in_sum2") and block_of(name) is not None
        if summed and (matrix is None or matrix.shape[0] != info.shape[0]):
            return False
    return True


def check_gguf(
    plan: Plan, source: str | Path, out: str | Path, *, cut: Cut, force: bool
) -> tuple[GGUFModel, dict[str, Value]]:
    """All that `cut_gguf` checks without reading tensors: the model, and its fields as they will
    be. Raises what `cut_gguf` raises."""
    source, out = Path(source).expanduser(), Path(out)
    for target in (out, plan_beside(out)):
        writable_target(target, force=force, folder=False)
    if out.exists() and source.exists() and os.path.samefile(out, source):
        raise InputError(f"{out} is the model itself; choose another -o")
    model = GGUFModel.of(GGUFFile.open(source))
    _check_shape(plan, model, source)
    if cut.parts:
        check_parts(model, cut)
    return model, recut(model, cut.whole)


def _check_shape(plan: Plan, model: GGUFModel, source: Path) -> None:
    """Raise InputError unless type and number of blocks are the plan's."""
    types = architecture_of(model).types
    for name, expected, found in (
        ("model_type", plan.model.model_type, types),
        ("blocks", plan.model.blocks, (model.blocks,)),
    ):
        if expected not in found:
            of = f"{' or '.join(map(str, found))} in {source} ({model.name})"
            raise InputError(
                f"the plan was made for another model: {name} is {expected} in the plan and {of}; "
                "search again on this model"
            )


def _check_identity(plan: Plan, model: GGUFModel, source: Path, progress: Progress) -> Checkpoint:
    """The dequantized file; raises InputError unless it is what the plan was searched on."""
    checkpoint = Checkpoint.open(resolve(source, progress).path)
    with progress.stage("checking the model against the plan", checkpoint.nbytes) as tick:
        found = fingerprint(checkpoint, model.blocks, tick)
    try:
        check_fingerprint(plan.model, found, str(source))
    except InputError as error:
        raise InputError(
            f"{error}, or pass --other-weights if the plan is of the same model in another form"
        ) from None
    return checkpoint


def _renumbered(file: GGUFFile, cut: Cut, requantized: Collection[Requantized]) -> list[NewTensor]:
    """The tensors that stay, by their new names, in the file's order."""
    again = {tensor.name: tensor for tensor in requantized}
    tensors = []
    for name, info in file.tensors.items():
        new = cut.rename(name, "blk.")
        if new is not None:
            other = again.get(name)
            tensors.append(
                NewTensor(
                    name=new,
                    source=info,
                    kind=other.kind if other else info.kind,
                    content=other.content if other else None,
                )
            )
    return tensors


def _provenance(file: GGUFFile, cut: Cut) -> dict[str, Value]:
    """Fields of our own, which llama.cpp passes over."""
    values = {SOURCE: Value(kind=STRING, data=file.sha256())}
    if cut.whole:
        values["sleb.removed_blocks"] = Value(kind=ARRAY, item=INT32, data=list(cut.whole))
    if parts := parts_in(cut.removed):
        values["sleb.removed_parts"] = Value(kind=STRING, data=",".join(map(str, parts)))
    return values
