"""The original of a cut, as byte ranges in the cut and in its side-car. Needs no torch.

Both are untrusted. Everything is checked here, down to the last byte that a restore would copy,
before anything is written: names and links, sizes, hashes, layout, and the plan's fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sleb.checkpoints.checkpoint import (
    Checkpoint,
    TensorInfo,
    identity,
    read_json,
    read_shard,
    refuse_plan_alone,
    tensor_lines,
)
from sleb.checkpoints.cut import Cut
from sleb.core.errors import DataError, InputError
from sleb.core.files import check_folder, file_sha256
from sleb.core.plan import Plan
from sleb.core.printable import printable
from sleb.core.progress import Progress, silent
from sleb.surgery.rollback_manifest import (
    FILES,
    FOLDER,
    HEADERS,
    HEALED,
    MANIFEST,
    REMOVED,
    TENSORS,
    Manifest,
)

MAX_HEADER = 100_000_000
"""Longest header of a safetensors file, in bytes; the format's own limit."""
MAX_TEXT = 256 * 2**20
MAX_FILE = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Original:
    """A checked original. ``checkpoint`` has its tensors, each with the file that holds it; its
    ``path`` holds the original's config and card, but not what the cut carried over, which is in
    ``files``: where each file beside the weights is now, by its name in the original. ``layout``:
    tensors of each shard in the order of their bytes. ``cut``: the cut, with its repair.
    ``spelled_twice``: the cut's config.json has
    the words of transformers 4 beside those of 5, since the original came from a GGUF file."""

    plan: Plan
    cut: Cut
    checkpoint: Checkpoint
    lines: Mapping[str, str]
    files: Mapping[str, Path]
    layout: Mapping[str, tuple[str, ...]]
    spelled_twice: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        headers = sum(8 + len(raw) for raw in self.checkpoint.headers.values())
        small = sum(path.stat().st_size for path in self.files.values())
        return self.checkpoint.nbytes + headers + small


def open_original(out: Path, progress: Progress = silent) -> Original:
    """Find the original of the cut in ``out`` and check all of it.

    Raises:
        InputError: no cut, or one without a side-car; the side-car is of another cut.
        DataError: something in the cut or in the side-car is not what the cut wrote; says what.
    """
    side = out / FOLDER
    _refuse_without(out, side)
    manifest = Manifest.load(_inside(out, f"{FOLDER}/{MANIFEST}"))
    plan = Plan.load(_inside(out, "plan.json"))
    manifest.check_plan(plan, side)
    _check_files(out, manifest)
    cut = Checkpoint.open(out)
    _check_headers(cut, manifest)

    tensors, metadata, headers, layout = _tensors(out, cut, manifest)
    checkpoint = Checkpoint(
        path=side / FILES,
        config=read_json(side / FILES / "config.json"),
        tensors=tensors,
        metadata=metadata,
        headers=headers,
    )
    try:
        made = Cut.of(plan, folder=out)
    except InputError as error:
        raise DataError(str(error)) from None
    with progress.stage("checking the original against the plan", checkpoint.nbytes) as tick:
        lines = tensor_lines(checkpoint, tick)
    kept = (side / TENSORS).read_bytes()
    if "".join(lines.values()).encode() != kept:
        wanted = set(kept.decode(errors="replace").splitlines(keepends=True))
        wrong = next((name for name, line in lines.items() if line not in wanted), None)
        what = (
            f"{printable(wrong)} in {checkpoint.file(wrong)}" if wrong else f"the tensors of {out}"
        )
        raise DataError(f"tensor {what} is damaged: its SHA-256 is not that of the original's")
    if identity(checkpoint, plan.model.blocks, lines) != plan.model:
        raise DataError(f"{side} does not make the model that {out / 'plan.json'} was made for")
    files = {name: out / name for name in manifest.carried}
    files |= {n.removeprefix(FILES): side / n for n in manifest.files if n.startswith(FILES)}
    return Original(
        plan=plan,
        cut=made,
        checkpoint=checkpoint,
        lines=lines,
        files=files,
        layout=layout,
        spelled_twice="torch_dtype" in cut.config and "torch_dtype" not in checkpoint.config,
    )


def _refuse_without(out: Path, side: Path) -> None:
    if out.suffix == ".gguf" and out.is_file():
        raise InputError(
            f"{out} is a GGUF file, beside which nothing is kept: the file that it was cut from is "
            "unchanged, so go back to that"
        )
    check_folder(out, "give one that sleb apply or prune wrote")
    if (out / HEALED).is_file():
        raise InputError(
            f"{out} is healed: its weights were trained after the cut, and it has no {FOLDER}/; "
            "restore the cut that it was made from"
        )
    refuse_plan_alone(out)
    if not (side / MANIFEST).is_file():
        raise InputError(
            f"{out} has no {FOLDER}/{MANIFEST}: it was written with --no-keep, or not by sleb "
            "apply or prune; only a cut with its side-car can be taken back"
        )
    if not (out / "plan.json").is_file():
        raise InputError(f"{out} has no plan.json, so it is not known what its original was")


def _inside(out: Path, name: str) -> Path:
    """The file ``name`` of ``out``. A link must stay in the folder, or lead to the blobs of the
    cache of the hub that the folder is a snapshot in.

    Raises:
        DataError: it is missing, or leads elsewhere.
    """
    path, home = out / name, out.resolve()
    found = path.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parents[1] / "blobs")
    if not any(found.is_relative_to(root) for root in roots):
        raise DataError(f"{path} is a link that leads out of {out}: put the file itself there")
    if not path.is_file():
        raise DataError(f"{path} is missing; {out} is incomplete, fetch or copy it again")
    return path


def _check_files(out: Path, manifest: Manifest) -> None:
    """Every file that the side-car lists, by its hash."""
    side = {f"{FOLDER}/{name}": digest for name, digest in manifest.files.items()}
    for name in manifest.shards:
        _inside(out, name)
    for name, digest in (side | manifest.carried | manifest.written).items():
        path = _inside(out, name)
        limit = MAX_TEXT if name.endswith(TENSORS) else MAX_HEADER if HEADERS in name else MAX_FILE
        if path.stat().st_size > limit and name.startswith(f"{FOLDER}/") and REMOVED not in name:
            raise DataError(f"{path} is larger than {limit / 1e6:.0f} MB: it is not of a side-car")
        if file_sha256(path) != digest:
            where = "damaged" if name in side else "changed since the cut"
            raise DataError(
                f"{path} is {where}: its SHA-256 is not the one in {FOLDER}/{MANIFEST}; put back "
                "the file that was written with the cut"
            )


def _check_headers(cut: Checkpoint, manifest: Manifest) -> None:
    found = {name: hashlib.sha256(raw).hexdigest() for name, raw in cut.headers.items()}
    for name in sorted({*found, *manifest.shards}):
        if found.get(name) != manifest.shards.get(name):
            raise DataError(
                f"the header of {cut.path / name} is not the one that the cut wrote; fetch or "
                "copy the file again"
            )


def _tensors(
    out: Path, cut: Checkpoint, manifest: Manifest
) -> tuple[
    dict[str, TensorInfo],
    dict[str, dict[str, str]],
    dict[str, bytes],
    dict[str, tuple[str, ...]],
]:
    """Tensors by their original names, each where it is now; metadata, headers and layout of the
    original's shards."""
    side = out / FOLDER
    removed, _, _ = read_shard(side / REMOVED)
    removal = Cut(blocks=manifest.model.blocks, removed=manifest.removed)
    tensors: dict[str, TensorInfo] = {}
    metadata, headers, layout = {}, {}, {}
    for file in sorted(name for name in manifest.files if name.startswith(HEADERS)):
        shard = file.removeprefix(HEADERS).removesuffix(".json")
        headers[shard] = (side / file).read_bytes()
        entries, metadata[shard] = _parsed(headers[shard], side / file)
        order = []
        for name, wanted in _in_order(entries, side / file):
            stored, path = name, side / REMOVED
            info = removed.get(name)
            if info is None:
                stored = removal.rename(name, manifest.prefix) or ""
                info = cut.tensors.get(stored)
                path = out / info.shard if info else out
            if info is None or name in tensors:
                problem = "a second time" if info else "which neither the cut nor the side-car has"
                raise DataError(
                    f"{side / file} lists tensor {printable(name)}, {problem}: it is damaged"
                )
            form = (info.dtype, info.shape, info.nbytes)
            if form != wanted:
                raise DataError(
                    f"{side / file}: tensor {printable(name)} is {form} in {path}, not {wanted}"
                )
            tensors[name] = replace(info, shard=shard, file=path, key=stored)
            order.append(name)
        layout[shard] = tuple(order)
    return tensors, metadata, headers, layout


def _parsed(raw: bytes, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Entries of a header, and its metadata."""
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): it is damaged") from None
    metadata = header.pop("__metadata__", None) or {} if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DataError(f"{path} is not the header of a shard: it is damaged")
    return header, metadata


def _in_order(
    entries: dict[str, Any], path: Path
) -> Iterator[tuple[str, tuple[str, tuple[int, ...], int]]]:
    """Names, and dtype, shape and size in bytes of a header's tensors, in the order of their bytes,
    which must follow one another without a gap."""
    rows = []
    for name, entry in entries.items():
        try:
            (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
            numbers = (start, stop, *shape)
            if not all(isinstance(n, int) and n >= 0 for n in numbers):
                raise ValueError
            rows.append((start, stop, name, str(entry["dtype"]), shape))
        except (TypeError, KeyError, ValueError):
            raise DataError(
                f"{path}: tensor {printable(name)} is not described as in a header"
            ) from None
    end = 0
    for start, stop, name, dtype, shape in sorted(rows):
        if start != end or stop < start:
            raise DataError(
                f"{path}: tensor {printable(name)} does not begin where the one before it ends"
            )
        end = stop
        yield name, (dtype, shape, stop - start)
