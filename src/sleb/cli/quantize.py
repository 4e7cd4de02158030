"""`sleb quantize`, and its result as a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sleb.cli import show
from sleb.cli.options import Force, Json, Model, Seed, Text, Trust
from sleb.cli.progress import terminal_progress
from sleb.core.files import writable_target

if TYPE_CHECKING:
    from sleb.formats.quantize import Quantized

__all__ = ["Scheme", "check_quantized", "quantize", "quantized"]

Scheme = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="SCHEME",
        help="Also write OUT-SCHEME, quantized: w4a16, w8a16, awq or int8. See sleb quantize.",
    ),
]


def quantize(
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the new checkpoint.")],
    scheme: Annotated[
        str,
        typer.Option(help="w4a16 or w8a16 (GPTQ, calibrated on --text), awq (on a GPU), or int8."),
    ] = "w4a16",
    text: Text = None,
    windows: Annotated[
        int | None, typer.Option(help="Windows to calibrate on. Default: at most 32.", min=1)
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 512,
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
    trust_remote_code: Trust = False,
) -> int:
    """Round the weights of a model, pruned or not, to 4 or 8 bits."""
    from sleb.formats.quantize import quantize as run

    done = run(
        model,
        out,
        scheme=scheme,
        text=text or (),
        windows=windows,
        length=length,
        seed=seed,
        force=force,
        trust_remote_code=trust_remote_code,
        progress=terminal_progress(),
    )
    if done.twice:
        show.note(
            f"{Path(model).name} is a GGUF file: its weights had been rounded before, and now are "
            "twice; a model in its original precision gives a better result",
            json,
        )
    show.result(done, json)
    show.note(f"checkpoint written to {out}", json)
    return 0


def check_quantized(out: str, scheme: str, *, force: bool) -> None:
    """Refuse early what `--quantize` could not do once OUT is written."""
    from sleb.formats.quantize import check_scheme

    check_scheme(scheme)
    writable_target(_beside(out, scheme), force=force)


def quantized(out: str, scheme: str, options: dict[str, Any], *, force: bool) -> Quantized:
    """The checkpoint ``out`` quantized, beside it; on the windows that the search saw."""
    from sleb.formats.quantize import SCHEMES
    from sleb.formats.quantize import quantize as run

    of_text = {name: options[name] for name in ("windows", "length", "seed")}
    return run(
        out,
        _beside(out, scheme),
        scheme=scheme,
        text=(options["text"] or ()) if SCHEMES[scheme].calibrated else (),
        **of_text,
        force=force,
        trust_remote_code=options["trust_remote_code"],
        progress=terminal_progress(),
    )


def _beside(out: str, scheme: str) -> Path:
    path = Path(out)
    return path.with_name(f"{path.name}-{scheme}")
