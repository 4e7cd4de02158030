"""A GGUF file cut in one command: written, read back and checked, and only then there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from sleb.checkpoints.cut import Cut
from sleb.checkpoints.gguf_fields import GGUFModel, architecture_of
from sleb.checkpoints.gguf_file import GGUFFile
from sleb.core.errors import InputError
from sleb.core.files import staged_files, writable_target
from sleb.core.plan import Plan
from sleb.core.progress import Progress, silent
from sleb.surgery.gates import check_blocks, check_reload, check_weights
from sleb.surgery.gguf_cut import CutGGUF, cut_gguf, imatrices, plan_beside
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
        with progress.stage("checking what was written", done.nbytes) as tick:
            checked = _checked(file, done, cut, tick)
        checked = replace(checked, checkpoint=str(out))
        checked.require()
        staged[len(along)].write_text(finish(done, checked), encoding="utf-8")
    return replace(done, out=out, plan=plan_beside(out), imatrices=tuple(along))


def _checked(file: GGUFFile, done: CutGGUF, cut: Cut, tick: Callable[[int], None]) -> Verification:
    """The file read back: every tensor that stays has the original's bytes, or the repair's."""
    written = GGUFFile.open(done.out)
    repaired = {tensor.name: tensor.content for tensor in done.requantized}
    expected = {}
    for name, info in file.tensors.items():
        if (new := cut.rename(name, "blk.")) is not None:
            again = repaired.get(name)
            kept = file.chunks(info.start, info.nbytes)
            expected[new] = _digest(kept if again is None else [again])
    found = {}
    for name, info in written.tensors.items():
        found[name] = _digest(written.chunks(info.start, info.nbytes))
        tick(info.nbytes)
    checks = [check_reload(), check_blocks(GGUFModel.of(written).blocks, len(cut.kept))]
    if not cut.parts:  # else tensors get other names and rows, see gguf_parts
        checks.append(check_weights(found, expected, len(repaired)))
    return Verification(checkpoint=str(done.out), removed=cut.removed, checks=tuple(checks))


def _digest(pieces: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece)
    return sha.hexdigest()
