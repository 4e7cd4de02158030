"""`sleb restore`, and its result in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sleb.cli import show
from sleb.cli.options import Force, Json, Trust
from sleb.cli.progress import terminal_progress
from sleb.core.files import writable_target

if TYPE_CHECKING:
    pass

__all__ = ["restore"]


def restore(
    cut: Annotated[
        str, typer.Argument(metavar="OUT", help="The pruned checkpoint, from prune or apply.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the restored model.")],
    depth: Annotated[
        int | None,
        typer.Option(help="Cut again, by the plan's first DEPTH removals. Default: the original."),
    ] = None,
    force: Force = False,
    json: Json = False,
    trust_remote_code: Trust = False,
) -> int:
    """Take a cut back, bit for bit: the original, or a smaller cut, from OUT and OUT/rollback."""
    writable_target(Path(out), force=force)
    from sleb.surgery.restore import restore as run

    done = run(
        cut,
        out,
        depth=depth,
        force=force,
        trust_remote_code=trust_remote_code,
        progress=terminal_progress(),
    )
    show.result(done, json)
    return 0
