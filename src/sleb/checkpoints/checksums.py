"""SHA256SUMS of a checkpoint folder, as `sha256sum -c SHA256SUMS` reads it.

Not in it: itself, ``run.json``, which later verbs extend, the model card, which is there to be
edited, hidden files, and the side-car ``rollback/``, which may be left out of a copy and has hashes
of its own. Needs no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sleb.core.errors import DataError
from sleb.core.files import file_sha256
from sleb.core.progress import Progress, silent

SUMS = "SHA256SUMS"
ROLLBACK = "rollback"
"""The side-car's folder in a checkpoint folder."""
MAX_BYTES = 4 * 2**20
_NOT_COVERED = frozenset({SUMS, "run.json", "README.md"})
# sha256sum's form: "\" in front if the name is escaped, then text (" ") or binary ("*") mode
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")


def covered(folder: Path) -> list[str]:
    """The files that ``folder``/SHA256SUMS is about, sorted, with ``/`` between their parts."""
    return sorted(_walk(folder, folder))


def _walk(folder: Path, top: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if folder != top or entry.name != ROLLBACK:
                    yield from _walk(Path(entry.path), top)
            elif folder != top or entry.name not in _NOT_COVERED:
                yield Path(entry.path).relative_to(top).as_posix()


def write_sums(folder: Path, progress: Progress = silent) -> None:
    """Write ``folder``/SHA256SUMS over all that is there now."""
    names = covered(folder)
    sums = _digests(folder, names, "adding checksums", progress)
    text = "".join(_line(name, digest) for name, digest in zip(names, sums, strict=True))
    (folder / SUMS).write_bytes(os.fsencode(text))  # names need not be Unicode


def check_sums(folder: Path, progress: Progress = silent) -> tuple[int, dict[str, str]]:
    """Hash again what ``folder``/SHA256SUMS lists. Returns how many files that is, and those that
    are ``missing`` or ``changed``, by name.

    Raises:
        DataError: the list is not in sha256sum's form, or leads out of the folder.
    """
    listed = read_sums(folder / SUMS)
    there = [name for name in listed if (folder / name).is_file()]
    sums = _digests(folder, there, "checking the checksums", progress)
    found = dict(zip(there, sums, strict=True))
    wrong = {
        name: "changed" if name in found else "missing"
        for name, digest in listed.items()
        if found.get(name) != digest
    }
    return len(listed), wrong


def read_sums(path: Path) -> dict[str, str]:
    """SHA-256 by name, as a SHA256SUMS states them. The file is untrusted.

    Raises:
        DataError: too large, not in sha256sum's form, or a name that leads out of the folder.
    """
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is larger than {MAX_BYTES >> 20} MiB: not a list of checksums")
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line:
            continue
        match = _LINE.fullmatch(os.fsdecode(line))
        name = _unescape(match[3]) if match and match[1] else match[3] if match else ""
        parts = name.split("/")
        if not match or "\0" in name or os.path.isabs(name) or {"", ".", ".."} & set(parts):
            raise DataError(
                f"{path}, line {number}, is not '<sha256>  <file in this folder>': fetch it again"
            )
        found[name] = match[2]
    return found


def _digests(folder: Path, names: list[str], title: str, progress: Progress) -> list[str]:
    """SHA-256 of each file; hashing lets go of the interpreter, so files go side by side."""
    total = sum((folder / name).stat().st_size for name in names)
    with progress.stage(title, total) as tick:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(lambda name: file_sha256(folder / name, tick), names))


def _line(name: str, digest: str) -> str:
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
    return f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n"


def _unescape(name: str) -> str:
    return re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r"}.get(m[1], m[1]), name)
