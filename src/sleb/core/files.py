"""Writing that is all or nothing: a reader never sees half a file or half a checkpoint."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sleb.core.errors import InputError, ResourceError

CHUNK = 2 * 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into one clear line about ``target``, or about the
    file that was read meanwhile."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(
                f"disk full while writing {target}; free some space and repeat the command"
            ) from error
        if error.errno in _FORBIDDEN:
            known = isinstance(error.filename, (str, bytes))
            named = Path(os.fsdecode(error.filename)) if known else target
            action = f"write {target}" if _belongs(named, target) else f"open {named}"
            raise InputError(f"cannot {action}: {os.strerror(error.errno)}") from error
        raise


def _belongs(path: Path, target: Path) -> bool:
    """Whether ``path`` is the target, a folder above it, or a temporary file for it."""
    parent = target.absolute().parent
    if not path.absolute().is_relative_to(parent):
        return parent.is_relative_to(path.absolute())
    first = [*path.absolute().relative_to(parent).parts, target.name][0]
    return first == target.name or first.startswith(f".{target.name}.")


def writable_target(out: Path, *, force: bool, folder: bool = True) -> None:
    """Refuse early, before any work, what could not be written at the end.

    ``force`` allows to replace a file by a file, or a checkpoint by a checkpoint; nothing else,
    because a slip of the hand in ``-o`` must not cost a folder of other things.

    Raises:
        InputError: ``out`` exists and may not be replaced, is no name for a ``folder`` (or file),
            or its parent is not a directory that can be written.
    """
    if out.name in ("", ".."):
        raise InputError(f"-o '{out}' is not a name for something new; give one")
    if folder and out.suffix == ".gguf":
        raise InputError(f"{out} would be a folder, as this writes no file: give {out.stem}")
    if os.path.lexists(out):
        if not force:
            raise InputError(f"{out} exists; choose another -o, or pass --force to replace it")
        if reason := _irreplaceable(out, folder):
            raise InputError(f"{out} {reason}; choose another -o, or remove it yourself")
    parent = out.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{out} cannot be created: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{out} cannot be created: {parent} is not writable")


def _irreplaceable(out: Path, folder: bool) -> str | None:
    """Why ``--force`` does not replace ``out``, if so."""
    if out.is_symlink():
        return f"is a symbolic link to {os.readlink(out)}"
    if not folder:
        return "is a folder, not a file" if out.is_dir() else None
    if not out.is_dir():
        return "is a file, not a folder"
    names = os.listdir(out)
    configs = {"config.json", "adapter_config.json"}.intersection(names)
    if not names or (configs and any(".safetensors" in name for name in names)):
        return None
    return "holds no checkpoint, so --force does not replace it"


def shown_size(nbytes: int) -> str:
    """Bytes with three digits, in the units of disks (1 MB is a million)."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= 0.9995 * scale:  # what is rounded to 1000 has the next unit
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes} B"


def enough_space(folder: Path, nbytes: int) -> None:
    """Refuse early what cannot fit into ``folder``, which need not exist yet.

    Raises:
        ResourceError: its disk has less than ``nbytes`` free.
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ResourceError(
            f"the checkpoint needs {shown_size(nbytes)}, but the disk of {folder} has "
            f"{shown_size(free)} free; free some space or choose another -o"
        )


def record_path(out: Path) -> Path:
    """Where the record of a result is: in a checkpoint's folder, or beside a GGUF file."""
    return out.with_suffix(".run.json") if out.suffix == ".gguf" else out / "run.json"


def existing_record(out: Path) -> Path:
    """Raise InputError unless there is a record of the result ``out``; its path."""
    path = record_path(out)
    if not path.is_file():
        raise InputError(f"no run record at {path}; sleb prune and sleb run write one")
    return path


def check_folder(out: Path, hint: str = "make one with: sleb apply") -> None:
    """Raise InputError, which ends with ``hint``, unless there is a folder ``out``."""
    if not out.is_dir():
        raise InputError(f"no checkpoint folder at {out}; {hint}")


def check_demo(out: Path) -> None:
    """Raise InputError if a demo would replace ``out``, and that is not of an earlier one."""
    if out.exists() and not (out / "run.json").is_file():
        raise InputError(f"{out} exists and is not from an earlier demo; choose another -o")


def file_sha256(path: Path, tick: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes, hexadecimal; ``tick`` gets bytes as they are hashed."""
    sha = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(CHUNK):
            sha.update(piece)
            if tick:
                tick(len(piece))
    return sha.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` through a temporary file beside it and a rename."""
    with disk_errors(path), _parents(path):
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

    With ``force`` an existing ``out`` is replaced, and only after the new one is complete. Files in
    it get the mode 0644, folders 0755.

    Raises:
        InputError: see :func:`writable_target`.
        ResourceError: the disk is full.
    """
    writable_target(out, force=force)
    out = out.absolute()
    with disk_errors(out), _parents(out):
        stage = _stage_beside(out)
        try:
            os.chmod(stage, 0o755)
            yield stage
            for path in stage.rglob("*"):  # copies and temporary files have modes of their own
                os.chmod(path, 0o755 if path.is_dir() else 0o644)
            writable_target(out, force=force)  # again: another process may have written it
            _swap(stage, out)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


@contextlib.contextmanager
def staged_files(*outs: Path, force: bool) -> Iterator[tuple[Path, ...]]:
    """Places for files of one folder, which become ``outs`` only if the block exits cleanly.

    Raises:
        InputError: see :func:`writable_target`.
        ResourceError: the disk is full.
    """
    outs = tuple(out.absolute() for out in outs)
    for out in outs:
        writable_target(out, force=force, folder=False)
    with disk_errors(outs[0]), _parents(outs[0]):
        stage = _stage_beside(outs[0])
        try:
            staged = tuple(stage / out.name for out in outs)
            yield staged
            for out in outs:
                writable_target(out, force=force, folder=False)  # again, as in staged_dir
            for new, out in zip(staged, outs, strict=True):
                os.replace(new, out)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _stage_beside(out: Path) -> Path:
    """A new folder beside ``out``. What processes of this machine left there that were killed goes:
    it may be as large as a model, and nobody else knows of it."""
    import psutil

    machine = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    prefix = f".{out.name}.part-{machine}-"
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):
        process = left.name.removeprefix(prefix).partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=out.parent, prefix=f"{prefix}{os.getpid()}-"))


def _swap(stage: Path, out: Path) -> None:
    """Put ``stage`` in the place of ``out``; if that fails, ``out`` is what it was."""
    if not out.exists():
        os.replace(stage, out)
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old-"))
    try:
        os.replace(out, old / out.name)
        os.replace(stage, out)
    except BaseException:
        if not out.exists():
            os.replace(old / out.name, out)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make the folders above ``path``; if the block fails, remove those that were made."""
    made: list[Path] = []
    try:
        for folder in reversed(path.absolute().parents):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                made.append(folder)
        yield
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
