"""Writing that is all or nothing: a reader never sees half a file or half a checkpoint."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sleb.errors import InputError, ResourceError

__all__ = ["disk_errors", "staged_dir", "writable_target", "write_text"]


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into one clear line about ``target``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"disk full while writing {target}; nothing was kept, free some space and repeat"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"cannot write {target}: {os.strerror(error.errno)}") from error
        raise


def writable_target(out: Path, *, force: bool) -> None:
    """Refuse early, before any work, what could not be written at the end.

    Raises:
        InputError: ``out`` exists and ``force`` is false, or its parent is not a directory.
    """
    if out.exists() and not force:
        raise InputError(f"{out} exists; choose another -o, or pass --force to replace it")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{out} cannot be created: {parent} is not a directory")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{out} cannot be created: {parent} is not writable")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` through a temporary file beside it and a rename."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


@contextlib.contextmanager
def staged_dir(out: Path, *, force: bool) -> Iterator[Path]:
    """A directory that becomes ``out`` only if the block exits cleanly; else it leaves no trace.

    With ``force`` an existing ``out`` is replaced, and only after the new one is complete.

    Raises:
        InputError: see :func:`writable_target`.
        ResourceError: the disk is full.
    """
    writable_target(out, force=force)
    with disk_errors(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}.part-"))
        try:
            os.chmod(stage, 0o755)
            yield stage
            if out.is_dir() and not out.is_symlink():
                old = Path(tempfile.mkdtemp(dir=stage.parent, prefix=f".{out.name}.old-"))
                os.replace(out, old / out.name)
                os.replace(stage, out)
                shutil.rmtree(old)
            else:
                os.replace(stage, out) if not out.exists() else _replace_file(stage, out)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


def _replace_file(stage: Path, out: Path) -> None:
    out.unlink()
    os.replace(stage, out)
