"""`sleb heal`, and its result as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sleb.cli import render
from sleb.cli.options import Device, Dtype, Force, Json, Seed, Text, Trust
from sleb.cli.progress import terminal_progress

if TYPE_CHECKING:
    from sleb.distillation.record import Healed

__all__ = ["draw", "heal"]


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
    render.result(done, json, draw)
    render.note(f"checkpoint written to {out}", json)
    return 0


def draw(console: Console, h: Healed) -> None:
    """Dense, cut and healed side by side, on every text."""
    cut = "repaired" if h.repaired else "cut"
    table = render._table(
        "text", "windows", "dense", cut, "healed", "divergence", title="perplexity on held-out text"
    )
    for name, text in [*h.texts.items(), ("all", h.overall)]:
        if name == "all" and len(h.texts) == 1:
            continue
        old, new = text.cut_divergence.value, text.healed_divergence.value
        table.add_row(
            name,
            str(text.windows),
            f"{text.perplexity.value:.2f}",
            render.bounds(text.cut_ratio),
            render.bounds(text.healed_ratio),
            f"{old:.3f} to {new:.3f}",
        )
    console.print(table)
    console.print(
        f"{cut} and healed: ratio to dense with 95 % interval, paired; divergence from the dense "
        f"model in nats/token. Windows of {h.heldout.length} tokens, none of them trained on"
    )
    more = f", {h.passes:.1f} times through the text" if h.passes > 1 else ""
    best = "" if h.best_step == h.steps else f"; the weights are those of step {h.best_step}"
    console.print(
        f"trained {h.trained_parameters:,} parameters for {h.steps} steps in "
        f"{h.seconds:,.0f} s on {h.tokens:,} tokens{more}; {h.stopped}{best}"
    )
