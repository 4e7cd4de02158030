"""Keeping what a cut takes away or changes, so that it can be taken back. Needs no torch."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from sleb.checkpoints.checkpoint import INDEX, Checkpoint, shard_head
from sleb.core.errors import InputError
from sleb.core.files import file_sha256
from sleb.core.plan import Plan
from sleb.core.progress import Progress, Tick, silent
from sleb.surgery.rollback_manifest import (
    FILES,
    FOLDER,
    HEADERS,
    MANIFEST,
    REMOVED,
    REWRITTEN,
    TENSORS,
    Manifest,
    Written,
)


def keep_original(
    original: Checkpoint,
    cut: Written,
    used: Plan,
    lines: Mapping[str, str],
    stage: Path,
    progress: Progress = silent,
) -> None:
    """Write the side-car of the cut ``used`` of ``original`` into ``stage``, which holds the cut;
    ``lines`` are the original's :func:`sleb.checkpoints.checkpoint.tensor_lines`.

    Memory: one buffer of 2 MiB, and the headers.
    """
    folder = stage / FOLDER
    for part in ("", HEADERS, FILES):
        (folder / part).mkdir()
    files = {}
    gone = [name for name in original.tensors if name not in cut.names or name in cut.replaced]
    with progress.stage("keeping what the cut removed", _size(original, gone)) as tick:
        files[REMOVED] = _write_tensors(original, gone, folder / REMOVED, tick)
    (folder / TENSORS).write_bytes("".join(lines.values()).encode())
    for shard, header in original.headers.items():
        (folder / HEADERS / f"{shard}.json").write_bytes(header)
        files[f"{HEADERS}{shard}.json"] = hashlib.sha256(header).hexdigest()
    for name in sorted({*REWRITTEN, INDEX}):
        if (original.path / name).is_file():
            shutil.copyfile(original.path / name, folder / FILES / name)
            files[FILES + name] = file_sha256(folder / FILES / name)
    headers = Checkpoint.open(stage).headers
    try:
        manifest = Manifest(
            model=used.model,
            removed=used.removed,
            prefix=cut.prefix,
            repaired=used.repair.tensors if used.repair else {},
            files={**files, TENSORS: used.model.weights_sha256},
            carried={name: file_sha256(stage / name) for name in cut.carried},
            written={
                name: file_sha256(stage / name)
                for name in ("config.json", "plan.json", INDEX)
                if (stage / name).is_file()
            },
            shards={name: hashlib.sha256(raw).hexdigest() for name, raw in headers.items()},
        )
    except ValidationError as error:  # odd names, which restoring would refuse
        raise InputError(
            f"{original.path} cannot be kept for a rollback: {error.errors()[0]['msg']}; rename "
            "it, or pass --no-keep"
        ) from None
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8", newline="\n")


def _size(checkpoint: Checkpoint, names: list[str]) -> int:
    return sum(checkpoint.tensors[name].nbytes for name in names)


def _write_tensors(checkpoint: Checkpoint, names: list[str], path: Path, tick: Tick) -> str:
    """Copy tensors under their own names into one file; its SHA-256."""
    tensors = checkpoint.tensors
    # wide elements first, as safetensors' own writer does: every tensor stays aligned
    names = sorted(names, key=lambda name: (-tensors[name].width, tensors[name].shard, name))
    head = shard_head({name: tensors[name] for name in names}, {})
    sha = hashlib.sha256(head)
    with open(path, "wb") as stream:
        stream.write(head)
        for name in names:
            for piece in checkpoint.chunks(name):
                stream.write(piece)
                sha.update(piece)
                tick(len(piece))
    return sha.hexdigest()
