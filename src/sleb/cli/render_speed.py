"""`sleb bench` in the terminal: sizes, seconds, and the ratio next to what is possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from sleb.cli.render import _mb, _millions, _table, bounds

if TYPE_CHECKING:
    from sleb.runtimes.bench import Case, Measured, Ratio, Runs, Speed

__all__ = ["speed"]

UNSTEADY = 0.2


def speed(console: Console, s: Speed) -> None:
    """`sleb bench`."""
    names = _names(s)
    for runtime in dict.fromkeys(m.runtime for m in s.models):
        models = [m for m in s.models if m.runtime == runtime]
        console.print(Text(f"with {runtime}", "bold underline"))
        _models(console, models, names)
        console.print()
        _seconds(console, s.cases, models, names)
        console.print()
        _ratios(console, s, [r for r in s.ratios if r.runtime == runtime], names)
    runs = len(s.models[0].runs[0].seconds)
    threads = f", {s.threads} threads" if s.device == "cpu" else ""
    console.print(
        f"{s.device}, {s.dtype}{threads}; medians of {runs} runs in turn after one to warm up, "
        "with quartiles"
    )
    if s.ratios:
        console.print(
            "ratios with 95 % interval"
            + ("" if s.ratios[0].ratio.low is not None else " from 6 runs on: --runs 6")
            + "; possible: what the measured time of blocks and of all else allows; ideal: if "
            "blocks were all"
        )
    if noisy := [_case(c) for c in s.cases if _spread(s, c) > UNSTEADY]:
        console.print(
            f"the machine was busy or unsteady: quartiles of {', '.join(noisy)} are more than "
            f"{UNSTEADY:.0%} apart; repeat when nothing else runs, or with more --runs"
        )
    for what in s.skipped:
        console.print(Text(f"- {what}"))


def _spread(s: Speed, case: Case) -> float:
    """The widest gap between quartiles of a case, as a share of its median."""
    runs = (run for m in s.models for run in m.runs if run.case == case.name)
    return max((run.high - run.low) / run.median for run in runs)


def _names(s: Speed) -> dict[str, str]:
    """What each model is called in a column: dense and pruned, or pruned 1, pruned 2, ..."""
    paths = list(dict.fromkeys(m.path for m in s.models))
    several = len(paths) > 2
    return {
        path: "dense" if i == 0 else f"pruned {i}" if several else "pruned"
        for i, path in enumerate(paths)
    }


def _models(console: Console, models: Sequence[Measured], names: dict[str, str]) -> None:
    table = _table("", *(names[m.path] for m in models))
    rows = {
        "blocks": [str(m.blocks) for m in models],
        "parameters": [_millions(m.parameters) for m in models],
        "weights on disk": [_mb(m.file_bytes) for m in models],
        "memory at the peak": [_mb(m.peak_bytes) for m in models],
        "time to load": [f"{m.load_seconds:.2f} s" for m in models],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    for m in models:
        console.print(Text(f"{names[m.path]}: {m.path}"), soft_wrap=True)
    console.print(table)


def _seconds(
    console: Console, cases: Sequence[Case], models: Sequence[Measured], names: dict[str, str]
) -> None:
    table = _table("case", "model", "seconds", "quartiles", "tokens/s")
    table.columns[1].justify = "left"
    words = {case.name: _case(case) for case in cases}
    for case in cases:
        shown = words[case.name]
        for m in models:
            for run in m.runs:
                if run.case == case.name:
                    table.add_row(shown, names[m.path], *_cells(case, run))
                    shown = ""
    console.print(table)


def _cells(case: Case, run: Runs) -> tuple[str, str, str]:
    rate = "" if case.new_tokens == 1 else f"{run.tokens_per_second:,.1f}"
    return f"{run.median:.4g}", f"{run.low:.4g} to {run.high:.4g}", rate


def _ratios(console: Console, s: Speed, ratios: Sequence[Ratio], names: dict[str, str]) -> None:
    if not ratios:
        return
    words = {case.name: _case(case) for case in s.cases}
    table = _table("times as fast", "measured", "possible", "ideal")
    several = len({r.path for r in ratios}) > 1
    for r in ratios:
        name = f"{names[r.path]}, {words[r.case]}" if several else words[r.case]
        allowed = "-" if r.possible is None else f"{r.possible:.2f}"
        table.add_row(name, bounds(r.ratio), allowed, f"{r.ideal:.2f}")
    console.print(table)
    console.print()


def _case(case: Case) -> str:
    """A case as a person says it."""
    if case.new_tokens == 0:
        return f"prompt of {case.prompt_tokens}"
    if case.new_tokens == 1:
        return f"first token after {case.prompt_tokens}"
    return f"{case.batch} x ({case.prompt_tokens} + {case.new_tokens})"
