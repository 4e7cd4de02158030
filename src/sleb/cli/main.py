"""The `sleb` command: dispatch, and errors turned into one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import typer

from sleb.cli.verbs import Interrupted, register
from sleb.errors import SlebError

__all__ = ["app", "main"]

EPILOG = """\
Exit codes: 0 done; 1 a bug; 2 bad input; 3 verification failed; 4 model not supported;
5 corrupt data, NaN or inf; 6 out of disk, memory or network; 130 interrupted.
"""

app = typer.Typer(
    name="sleb",
    help="Make language models faster and smaller by removing redundant transformer blocks.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
register(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code instead of raising."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars; the process is ours
    try:
        result = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except SlebError as error:
        return _fail(str(error), error.exit_code)
    except Interrupted:
        return _fail("interrupted; a search keeps its scores: repeat the command to go on", 130)
    except MemoryError:
        return _fail("out of memory; try fewer or shorter windows, or --dtype bfloat16", 6)
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail("disk full; free some space and repeat", 6)
        raise
    except Exception as error:
        # usage errors are click's, of which some versions of typer carry a copy of their own
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        text = describe()
        return _fail(text if "\n" in text else f"{text} See: sleb --help", 2)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    print(f"sleb: {message}", file=sys.stderr)  # noqa: T201
    return code
