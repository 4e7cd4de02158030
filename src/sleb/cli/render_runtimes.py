"""`sleb verify --runtime` and `sleb bench --draft` in the terminal, and their options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from sleb.cli.render import _table, bounds, percent
from sleb.core.errors import InputError

if TYPE_CHECKING:
    from sleb.runtimes.compatibility import RuntimeReport, Verdict
    from sleb.runtimes.speculative import Drafting

__all__ = ["Python", "Runtime", "RuntimeDtype", "asked_runtimes", "drafting", "runtimes"]

Runtime = Annotated[
    str | None,
    typer.Option(
        "--runtime",
        metavar="NAMES",
        help="Try it there too: transformers, vllm, llama-cpp; several with commas.",
    ),
]
Python = Annotated[
    list[str] | None,
    typer.Option(
        "--python",
        metavar="NAME=PATH",
        help="Interpreter that has a runtime, as vllm=/venv/bin/python; repeat for several.",
    ),
]

RuntimeDtype = Annotated[
    str | None,
    typer.Option(help="What runtimes compute in, and are compared in. Default: that of --dtype."),
]


def asked_runtimes(
    names: str | None, pythons: list[str] | None
) -> tuple[tuple[str, ...], dict[str, str]] | None:
    """--runtime and --python, checked before anything is loaded; None without --runtime."""
    if names is None:
        if pythons:
            raise InputError("--python is for --runtime; give that too, or leave it out")
        return None
    from sleb.runtimes.compatibility import parse_pythons, parse_runtimes

    asked = parse_runtimes(names)
    return asked, parse_pythons(pythons or (), asked)


def runtimes(console: Console, r: RuntimeReport) -> None:
    """Which runtimes take the checkpoint."""
    table = _table("runtime", "version", "verdict", "how", "dense", "pruned", "at most")
    for column in table.columns[1:4]:
        column.justify = "left"
    for v in r.verdicts:
        figures = ["-" if x is None else f"{x:.2g}" for x in (v.dense, v.pruned, v.limit)]
        table.add_row(v.runtime, v.version or "-", _verdict(v), v.how, *figures)
    console.print()
    console.print(table)
    if r.moved is not None:
        console.print(
            f"deviation of log-probabilities from transformers', nats per token, on {r.tokens} "
            f"tokens in {r.dtype}; the cut itself moves them by {r.moved:.2g}"
        )
    for v in r.verdicts:
        if v.why:
            console.print(Text(f"- {v.runtime}: {v.why}"))
    if any(v.how == "by rule" for v in r.verdicts):
        console.print("by rule: judged by its source code, not run; no proof")


def _verdict(v: Verdict) -> Text:
    sure = v.how == "loaded"
    style = {"accepted": "green", "refused": "red"}.get(v.verdict, "yellow") if sure else "yellow"
    return Text(v.verdict, style)


def drafting(console: Console, d: Drafting) -> None:
    """`sleb bench --draft`."""
    table = _table("draft", "accepted", "tokens/s", "times as fast", "at best", "same answers")
    table.add_row("none", "-", f"{d.tokens_per_second:,.1f}", "1", "-", "-")
    for one in d.drafts:
        table.add_row(
            Text(one.path),
            percent(one.acceptance),
            f"{one.tokens_per_second:,.1f}",
            bounds(one.ratio),
            f"{one.ceiling:.2f}",
            f"{one.identical} of {d.prompts}",
        )
    console.print(table)
    console.print(
        f"{d.device}, {d.dtype}; {d.prompts} prompts, {d.tokens} new tokens, greedy, "
        f"{d.draft_tokens} drafted at a time; medians of {d.runs} rounds in turn, with 95 % "
        "intervals" + ("" if d.runs > 5 else " from 6 rounds on: --runs 6")
    )
    console.print(
        "at best: if every drafted token were accepted, and a block cost the same in both models"
    )
    for one in d.drafts:
        console.print(Text(f"- {one.path}: {one.says}"))
