"""A GGUF file cut in one command: written, read back and checked, and only then there; and checked
again later."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from sleb.checkpoints.cut import Cut
from sleb.checkpoints.gguf_fields import GGUFModel, architecture_of
from sleb.checkpoints.gguf_file import GGUFFile
from sleb.checkpoints.gguf_repaired import stored_name
from sleb.core.errors import InputError
from sleb.core.files import staged_files, writable_target
from sleb.core.plan import Plan
from sleb.core.progress import Progress, silent
from sleb.surgery.gates import Check, check_blocks, check_reload, check_repair, check_weights
from sleb.surgery.gguf_cut import SOURCE, CutGGUF, cut_gguf, imatrices, plan_beside
from sleb.surgery.verification import Verification


def check_files(source: str | Path, out: Path, also: Path, *, force: bool) -> GGUFModel:
    """Find out before a search what would stop :func:`prune_gguf` in the end; the uncut model.

    Raises:
        InputError: ``source`` is no GGUF file, or an output exists.
        UnsupportedModel: it is not known how llama.cpp runs such a file.
    """
    if Path(source).suffix != ".gguf":
        raise InputError(
            f"-o {out} is a GGUF file, and {source} is not: give a folder, or convert the uncut "
            "model with llama.cpp's convert_hf_to_gguf.py and prune that file"
        )
    for target in (out, plan_beside(out), also):
        writable_target(target, force=force, folder=False)
    model = GGUFModel.of(GGUFFile.open(Path(source).expanduser()))
    architecture_of(model)
    return model


def prune_gguf(
    plan: Plan,
    source: str | Path,
    out: Path,
    cut: Cut,
    also: Path,
    *,
    finish: Callable[[CutGGUF, Verification], str],
    force: bool = False,
    progress: Progress = silent,
) -> CutGGUF:
    """As :func:`sleb.surgery.gguf_cut.cut_gguf`, and write ``also`` beside it: the text that
    ``finish`` makes of what was written and checked. All appear together, or nothing does.

    Raises:
        VerificationFailed: the file that was written is not the original without these blocks.
        InputError, UnsupportedModel, DataError, ResourceError: see there.
    """
    file = GGUFFile.open(Path(source).expanduser())
    along = [out.with_name(f"{out.stem}.{one.path.name}") for one in imatrices(file)]
    with staged_files(*along, also, plan_beside(out), out, force=force) as staged:
        done = cut_gguf(plan, source, staged[-1], cut=cut, progress=progress)
        again = {tensor.name: _digest([tensor.content]) for tensor in done.requantized}
        with progress.stage("checking what was written", done.nbytes) as tick:
            checks = _checks(file, GGUFFile.open(done.out), cut, again, tick)
        checked = Verification(checkpoint=str(out), removed=cut.removed, checks=checks)
        checked.require()
        staged[len(along)].write_text(finish(done, checked), encoding="utf-8")
    return replace(done, out=out, plan=plan_beside(out), imatrices=tuple(along))


def verify_gguf(
    out: Path, source: Path, plan: Plan, depth: int | None, progress: Progress = silent
) -> Verification:
    """Check that the GGUF file ``out`` is ``source`` without the plan's first ``depth`` removals:
    every tensor that stays has the original's bytes, or is the plan's repair, quantized again. Of a
    file without parts of blocks, the tensors are not compared.

    Raises:
        InputError: it was cut from another file than ``source``.
        UnsupportedModel, DataError: one is not of a kind that is read, or is damaged.
    """
    file, written, cut = GGUFFile.open(source), GGUFFile.open(out), Cut.of(plan, depth, parts=True)
    if written.value(SOURCE) != file.sha256():
        raise InputError(f"{out} was not cut from {source}: give the file that it was cut from")
    checks, again = list[Check](), dict[str, str]()
    if cut.record:
        check, cut = check_repair(cut, plan, out)
        checks.append(check)
        model = GGUFModel.of(file)
        for name in cut.repair or ():
            own = stored_name(model, name) or ""
            info = written.tensors[cut.rename(own, "blk.") or ""]
            again[own] = _digest(written.chunks(info.start, info.nbytes))
    if all(check.passed for check in checks):
        size = out.stat().st_size
        with progress.stage("comparing both", size) as tick:
            checks.extend(_checks(file, written, cut, again, tick))
    return Verification(checkpoint=str(out), removed=cut.removed, checks=tuple(checks))


def _checks(
    file: GGUFFile,
    written: GGUFFile,
    cut: Cut,
    again: Mapping[str, str],
    tick: Callable[[int], None],
) -> tuple[Check, ...]:
    """Whether every tensor that stays has the original's bytes, or those of ``again``, SHA-256 of
    the repaired by their names in the original."""
    expected = {}
    for name, info in file.tensors.items():
        if (new := cut.rename(name, "blk.")) is not None:
            expected[new] = again.get(name) or _digest(file.chunks(info.start, info.nbytes))
    found = {}
    for name, info in written.tensors.items():
        found[name] = _digest(written.chunks(info.start, info.nbytes))
        tick(info.nbytes)
    checks = [check_reload(), check_blocks(GGUFModel.of(written).blocks, len(cut.kept))]
    if not cut.parts:  # else tensors get other names and rows, see gguf_parts
        checks.append(check_weights(found, expected, len(again)))
    return tuple(checks)


def _digest(pieces: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece)
    return sha.hexdigest()
