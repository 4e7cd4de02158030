"""Take a cut back: whole, or as far as a smaller depth. The original model is not needed."""

from __future__ import annotations

import shutil
import struct
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.checksums import write_sums
from sleb.checkpoints.cut import Cut
from sleb.config import RestoreConfig, takes
from sleb.core.card import cut_card, rebuilt
from sleb.core.errors import DataError
from sleb.core.files import disk_errors, enough_space, staged_dir, writable_target
from sleb.core.progress import Progress, Tick, silent
from sleb.surgery.apply import cut_checkpoint, refuse_source
from sleb.surgery.rollback_original import Original, open_original


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What :func:`restore` wrote: ``removed`` blocks are still out of it, ``blocks`` are in it.
    ``repair_undone``: the cut was repaired, and what was written is not. ``from_gguf``: the
    original was a GGUF file, and what was written is the folder of 16-bit weights that it was read
    as."""

    path: str
    removed: tuple[int, ...]
    blocks: int
    nbytes: int
    repair_undone: bool
    from_gguf: bool = False

    def __str__(self) -> str:
        gone = f", without {', '.join(map(str, self.removed))}" if self.removed else ""
        return f"{self.path}: {self.blocks} blocks{gone}"


@takes(RestoreConfig)
def restore(
    cut: str | Path, out: str | Path, config: RestoreConfig, *, progress: Progress = silent
) -> Restored:
    """Rebuild the original of the checkpoint ``cut`` from it and its side-car, byte for byte; or,
    with ``depth``, the cut by the first ``depth`` removals of its plan, as `apply` would write it.

    All that goes into the result is checked first, against the hashes in the side-car and the
    fingerprint in the plan. Memory: one buffer of 2 MiB, and the headers. A shallower cut has a
    side-car of its own. A repair belongs to the cut that it was made for, so a shallower one is
    without it.

    Raises:
        InputError: ``cut`` has no side-car, or that of another cut; ``depth`` is outside its plan;
            ``out`` exists, or is named as a file.
        DataError: a file or tensor is damaged; nothing was written.
        UnsupportedModel: the model cannot be cut exactly at this depth.
        ResourceError: the disk is full.
    """
    cut, out, depth = Path(cut), Path(out), config.depth
    writable_target(out, force=config.force)
    with disk_errors(out):
        refuse_source(out, cut)
        original = open_original(cut, progress)
        plan = original.plan
        removed = plan.at_depth(depth) if depth is not None else ()
        if depth is None:
            enough_space(out.absolute().parent, original.nbytes)
        with staged_dir(out, force=config.force) as stage:
            if depth is None:
                _write_whole(original, stage, progress)
            else:
                _write_cut(original, depth, stage, config.trust_remote_code, progress)
            nbytes = Checkpoint.open(stage).nbytes
    return Restored(
        path=str(out),
        removed=removed,
        blocks=plan.model.blocks - len(removed),
        nbytes=nbytes,
        repair_undone=plan.repair is not None and removed != plan.removed,
        from_gguf=original.spelled_twice,
    )


def _write_whole(original: Original, stage: Path, progress: Progress) -> None:
    checkpoint = original.checkpoint
    _write_files(original, stage)
    with progress.stage("writing the original", checkpoint.nbytes) as tick:
        for shard, names in original.layout.items():
            _write_shard(checkpoint, shard, names, stage / shard, tick)
    written = Checkpoint.open(stage)
    if written.headers != checkpoint.headers or set(written.tensors) != set(checkpoint.tensors):
        raise DataError(
            "the index of the original and its shards do not go together: the side-car is damaged"
        )


def _write_shard(
    checkpoint: Checkpoint, shard: str, names: tuple[str, ...], path: Path, tick: Tick
) -> None:
    header = checkpoint.headers[shard]
    with open(path, "xb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for name in names:
            for piece in checkpoint.chunks(name):
                stream.write(piece)
                tick(len(piece))


def _write_files(original: Original, folder: Path) -> None:
    for name, path in original.files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(path, folder / name)


def _write_cut(
    original: Original, depth: int, stage: Path, trust_remote_code: bool, progress: Progress
) -> None:
    cut = Cut.of(original.plan, depth)
    if cut.record is not None:
        cut = original.cut
    used = cut.used(original.plan)
    with tempfile.TemporaryDirectory(prefix="sleb-") as folder:
        _write_files(original, Path(folder))  # all of the original but its weights
        cut_checkpoint(
            replace(original.checkpoint, path=Path(folder)),
            cut,
            stage,
            used=used,
            lines=original.lines,
            spell_both=original.spelled_twice,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        how = (
            f"Written by `sleb restore --depth {depth}` from a deeper cut and what it had kept of "
            "the original."
        )
        kept = rebuilt(True, gguf=original.spelled_twice)
        card = cut_card(used, Path(folder), how=how, kept=kept)
        (stage / "README.md").write_text(card, encoding="utf-8")
    write_sums(stage, progress)
