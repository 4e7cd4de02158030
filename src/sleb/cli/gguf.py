"""`sleb apply` from GGUF to GGUF: its checks, and what it says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sleb.cli import show
from sleb.cli.progress import terminal_progress
from sleb.core.errors import InputError

if TYPE_CHECKING:
    from sleb.core.plan import Plan
    from sleb.repairs import Repair

__all__ = ["OtherWeights", "Repaired", "apply", "wanted"]

OtherWeights = Annotated[
    bool,
    typer.Option(
        "--other-weights",
        help="From GGUF to GGUF: the plan is of the same model in another form, such as the "
        "checkpoint that the file was made from.",
    ),
]
Repaired = Annotated[
    str | None,
    typer.Option(
        "--repaired",
        metavar="FOLDER",
        help="From GGUF to GGUF: take the plan's repair from this checkpoint.",
    ),
]


def wanted(
    plan: Plan,
    written: str,
    model: str,
    out: str,
    *,
    depth: int | None,
    repair: bool,
    repaired: str | None,
    other_weights: bool,
    force: bool,
) -> bool:
    """Whether GGUF is asked for; if so, all is checked that needs no model in memory. ``written``
    is the file that ``plan`` was read from.

    Raises:
        InputError, UnsupportedModel, DataError: see `sleb.surgery.gguf_cut.cut_gguf`.
    """
    if Path(out).suffix != ".gguf":
        for option, given in (("--other-weights", other_weights), ("--repaired", repaired)):
            if given:
                raise InputError(f"{option} is for GGUF files: give -o a name that ends in .gguf")
        return False
    if Path(model).suffix != ".gguf":
        raise InputError(
            f"-o {out} is a GGUF file, and {model} is not: convert the uncut model with "
            "llama.cpp's convert_hf_to_gguf.py, then cut that file with this plan and "
            "--other-weights"
        )
    if repair and repaired:
        raise InputError("--repair fits a repair, --repaired brings one: give one of them")
    from sleb.surgery.gguf_cut import check_gguf, plan_beside

    beside = plan_beside(Path(out))
    if beside.exists() and beside.samefile(written):
        raise InputError(
            f"the plan that goes beside {out} would replace {written}; choose another -o"
        )
    check_gguf(plan, model, out, depth=depth, force=force)
    return True


def apply(
    plan: Plan,
    model: str,
    out: str,
    *,
    depth: int | None,
    repair: Repair | None,
    repaired: str | None,
    other_weights: bool,
    force: bool,
    json: bool,
) -> int:
    """Cut the file, and say what was written."""
    from sleb.surgery.gguf_cut import cut_gguf

    cut = cut_gguf(
        plan,
        model,
        out,
        depth=depth,
        repair=repair,
        repaired=repaired,
        other_weights=other_weights,
        force=force,
        progress=terminal_progress(),
    )
    done: dict[str, Any] = {
        "out": out,
        "plan": str(cut.plan),
        "removed": cut.removed,
        "blocks": cut.blocks,
        "nbytes": cut.nbytes,
        "other_weights": cut.other_weights,
        "requantized": [
            {key: value for key, value in asdict(tensor).items() if key not in ("kind", "content")}
            for tensor in cut.requantized
        ],
    }
    if repair:
        done["repair"] = repair.record.model_dump(mode="json")
    show.result(done, json)
    if cut.other_weights:
        show.note(
            "the plan's blocks were chosen, and their cost measured, on other weights of this "
            "model: measure this file before you ship it",
            json,
        )
    show.note(f"plan as used: {cut.plan}; next: llama-cli -m {out}", json)
    return 0
