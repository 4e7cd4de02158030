"""The `sleb` command: dispatch, and errors turned into one line and an exit code."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sleb import __version__
from sleb.cli.argument import HELP
from sleb.cli.verbs import VERBS, Interrupted, command
from sleb.core.errors import SHELL, SlebError, out_of_memory
from sleb.core.printable import LONGEST_MESSAGE, printable
from sleb.core.process_group import Group, joined, reports_errors

BY_NAME = {verb.name: verb for verb in VERBS}
EPILOG = """\
Exit codes: 0 done; 1 a bug; 2 bad input; 3 verification failed; 4 model not supported;
5 corrupt data, NaN or inf; 6 out of disk, memory or network; 130 interrupted.
"""


class _Verbs(TyperGroup):
    """The verbs in order of use. Only the one that is called is built: a page of help, or a word
    for the shell to complete, needs none of their options."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.commands: Any = dict.fromkeys(BY_NAME)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb of that name; None if there is none."""
        if cmd_name in BY_NAME and self.commands[cmd_name] is None:
            self.commands[cmd_name] = command(BY_NAME[cmd_name])
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write what each verb does, under headings."""
        for title, verbs in groupby(VERBS, key=lambda verb: verb.group):
            with formatter.section(title):
                formatter.write_dl([(f"{verb.name:<10}", verb.summary) for verb in verbs])


app = typer.Typer(
    name="sleb",
    cls=_Verbs,
    help="Make language models faster and smaller by removing redundant transformer blocks.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)

_MALLOC = {-3: 2**25, -1: 2**31 - 1}
"""glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD: the most that it takes, so that what is freed is
used again. Else every large tensor on a CPU is of pages new from the system, each of which has to
be cleared: a tenth to a quarter of the time that a block takes."""

_CHATTY = ("torchao", "torch.utils._pytree")
"""Loggers that warn about torchao's build whenever transformers is imported beside it."""


class _PrintableFormatter(logging.Formatter):
    """Of warnings, which may name files."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), LONGEST_MESSAGE, lines=True)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sleb {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


COMMAND = typer.main.get_command(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code instead of raising."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars; the process is ours
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # the search for some takes time
    _keep_freed_memory()
    if logging.lastResort:
        logging.lastResort.setFormatter(_PrintableFormatter())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    given = sys.argv[1:] if arguments is None else list(arguments)
    obj = (shlex.join(["sleb", *given]), None if arguments is None else time.time())
    told = SHELL.set(True)
    try:
        with _terminated_as_interrupted(), joined() as here, _quiet_but_for_first(here):
            result = COMMAND(args=given, prog_name="sleb", standalone_mode=False, obj=obj)
    except SlebError as error:
        return _fail(str(error), error.exit_code)
    except Interrupted as error:
        return _fail(str(error), 130)
    except Exception as error:
        if type(error).__name__ == "Abort":  # click's, for Ctrl-C before a verb runs
            return _fail("interrupted; nothing was written", 130)
        if hasattr(error, "format_message"):
            return _usage(error)
        if out_of_memory(error):
            return _fail("out of memory; try fewer or shorter windows, or --dtype bfloat16", 6)
        if isinstance(error, OSError) and error.errno:
            return _system_error(error)
        raise
    finally:
        SHELL.reset(told)
    return result if isinstance(result, int) else 0


def _keep_freed_memory() -> None:
    """See ``_MALLOC``; nothing where the user's environment says how memory is allocated, or where
    the C library is another."""
    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if told or sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return
    for option, value in _MALLOC.items():
        library.mallopt(option, value)


def _usage(error: Exception) -> int:
    """click's errors, known by their shape: some versions of typer carry a copy of click."""
    text = str(error.format_message())  # type: ignore[attr-defined]
    text = text.replace(": Value error, ", ": ")  # pydantic's, by which typer checks values
    if "\n" in text:  # `sleb` alone: the help
        print(text, file=sys.stderr)  # noqa: T201
        return 2
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "sleb"
    return _fail(f"{text}{'.' if text[-1].isalnum() else ''} See: {command} --help", 2)


def _system_error(error: OSError) -> int:
    what = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _fail("disk full; free some space and repeat the command", 6)
    if isinstance(error, (PermissionError, FileNotFoundError, NotADirectoryError)):
        return _fail(f"{what}; check the path and its permissions", 2)
    return _fail(f"{what}; the system refused, check the disk and repeat the command", 6)


def _fail(message: str, code: int) -> int:
    if reports_errors():
        line = printable(" ".join(message.split("\n")), LONGEST_MESSAGE, ending=400)
        print(f"sleb: {line}", file=sys.stderr)  # noqa: T201
    return code


@contextlib.contextmanager
def _quiet_but_for_first(here: Group) -> Iterator[None]:
    """Of several processes only the first prints results."""
    if here.is_main:
        yield
        return
    logging.disable(logging.WARNING)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A polite kill, as of `timeout` or a batch system, cleans up like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
