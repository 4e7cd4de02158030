"""`sleb export` and `sleb push`: a plan for other tools, a checkpoint for other people."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sleb.cli import show
from sleb.cli.options import Depth, Force, Json, PlanFile, Trust
from sleb.cli.progress import terminal_progress
from sleb.core.files import writable_target, write_text

if TYPE_CHECKING:
    pass

__all__ = ["export", "push"]


def export(
    plan: PlanFile,
    form: Annotated[
        str,
        typer.Option(
            "--as", metavar="FORM", help="mergekit, llama-cpp, modelopt-list, vllm-args, layer-map."
        ),
    ],
    model: Annotated[str | None, typer.Option("--model", help="The original model.")] = None,
    depth: Depth = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="File to write. Default: stdout.")
    ] = None,
    force: Force = False,
    trust_remote_code: Trust = False,
) -> int:
    """Put a plan in the words of another tool, on stdout or in a file."""
    if out:
        writable_target(Path(out), force=force, folder=False)
    from sleb.formats.exports import export_plan

    done = export_plan(
        plan,
        form,
        model=model,
        depth=depth,
        trust_remote_code=trust_remote_code,
        progress=terminal_progress(),
    )
    if out:
        write_text(Path(out), done.text)
    else:
        sys.stdout.write(done.text)
    for note in done.notes:
        show.note(f"note: {note}", True)
    return 0


def push(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The pruned checkpoint.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private; refuse a public one.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", "--branch", metavar="NAME", help="Branch. Default: main."),
    ] = None,
    with_rollback: Annotated[
        bool, typer.Option("--with-rollback", help="Upload the removed blocks as well.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder and list the files; send nothing.")
    ] = False,
    json: Json = False,
) -> int:
    """Upload a checkpoint, checked against its checksums, to the Hugging Face hub."""
    from sleb.formats.hub import push as upload

    done = upload(
        out,
        repo,
        private=private,
        revision=revision,
        with_rollback=with_rollback,
        dry_run=dry_run,
        progress=terminal_progress(),
    )
    show.result(done, json)
    return 0
