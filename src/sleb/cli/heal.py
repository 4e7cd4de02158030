"""`sleb heal`, and its result as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sleb.cli import show
from sleb.cli.options import Device, Dtype, Force, Json, Seed, Text, Trust
from sleb.cli.progress import terminal_progress

if TYPE_CHECKING:
    pass

__all__ = ["heal"]


def heal(
    cut: Annotated[
        str, typer.Argument(metavar="OUT", help="The pruned checkpoint, from prune or apply.")
    ],
    model: Annotated[str, typer.Option("--model", help="The original model, the teacher.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the healed checkpoint.")],
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Tokens to train on in all.", min=1)] = 1_000_000,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens per window. Default: 1024, or what the model reads.", min=2),
    ] = None,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 6e-4,
    batch: Annotated[int, typer.Option(help="Windows per step.", min=1)] = 8,
    at_once: Annotated[
        int | None,
        typer.Option(
            help="Windows per pass; fewer need less memory. Default: 8192 tokens, on a CPU 1024.",
            min=1,
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Train for so long at most; fewer tokens then.")
    ] = None,
    heldout: Annotated[int, typer.Option(help="Windows to set aside for judging.", min=1)] = 32,
    lora: Annotated[
        int | None,
        typer.Option(metavar="RANK", help="Train adapters only, for a large model.", min=1),
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Less memory, a third more time.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    json: Json = False,
    trust_remote_code: Trust = False,
) -> int:
    """Optional second stage: train the cut model to predict what the original predicts."""
    from sleb.distillation import heal as train

    done = train(
        cut,
        model,
        out,
        text=text or (),
        tokens=tokens,
        length=length,
        lr=lr,
        batch=batch,
        at_once=at_once,
        minutes=minutes,
        heldout=heldout,
        lora=lora,
        recompute=recompute,
        seed=seed,
        device=device,
        dtype=dtype,
        force=force,
        trust_remote_code=trust_remote_code,
        progress=terminal_progress(),
    )
    show.result(done, json)
    show.note(f"checkpoint written to {out}", json)
    return 0
