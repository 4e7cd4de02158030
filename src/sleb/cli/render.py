"""Results as tables for a person, or as JSON for a program."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from math import exp
from typing import Any

import numpy as np
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "applied",
    "curve",
    "description",
    "domains",
    "evaluation",
    "note",
    "percent",
    "plan",
    "record",
    "result",
    "similarity",
    "verification",
]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line, which ends quietly; rich would exit with 1."""
        raise BrokenPipeError


def result(value: Any, as_json: bool, draw: Callable[[Console, Any], None]) -> None:
    """Print ``value`` on stdout: JSON, or drawn by ``draw``."""
    if as_json:
        sys.stdout.write(json_module.dumps(_plain(value), ensure_ascii=False, indent=1) + "\n")
    else:
        width = None if sys.stdout.isatty() else 100
        # no markup: names of models and folders may hold brackets
        draw(_Console(width=width, highlight=False, markup=False, emoji=False), value)


def note(text: str, as_json: bool) -> None:
    """A last line that says what to do next: on stderr if stdout is for a program."""
    print(text, file=sys.stderr if as_json else sys.stdout)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f} M"


def _blocks(blocks: Any) -> str:
    return ", ".join(map(str, blocks))


def bounds(interval: Any, digits: int = 2) -> str:
    """``value (low to high)``, or the value alone."""
    if interval.low is None:
        return f"{interval.value:.{digits}f}"
    return f"{interval.value:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def description(console: Console, d: Any) -> None:
    """`sleb inspect`."""
    facts = _table("", "")
    facts.columns[1].justify = "left"
    facts.show_header = False
    facts.add_row("model", d.model)
    facts.add_row("architecture", f"{d.architecture} ({d.model_type})")
    facts.add_row("supported", "yes" if d.supported else f"no: {d.reason}")
    if d.supported:
        low, high = min(d.block_bytes), max(d.block_bytes)
        each = _mb(low) if low == high else f"{_mb(low)} to {_mb(high)}"
        facts.add_row("blocks", f"{d.blocks} x {d.block_class} at {d.block_path}, {each} each")
        facts.add_row(
            "parameters",
            f"{_millions(d.parameters)} stored as {', '.join(d.dtypes)}, {_mb(d.nbytes)}",
        )
        facts.add_row("tied weights", "yes: the head is the embedding" if d.tied_weights else "no")
        for field in d.depth_fields:
            facts.add_row(f"config {field.name}", field.kind)
        if not d.depth_fields:
            facts.add_row("config", "nothing depends on depth but the number of blocks")
    console.print(facts)
    if d.savings:
        savings = _table("removed", "blocks", "parameters", "weights", "ideal speed-up")
        for s in d.savings:
            savings.add_row(
                f"{s.percent} %",
                str(s.blocks),
                _millions(s.parameters),
                _mb(s.nbytes),
                f"{s.ideal_speedup:.2f}x",
            )
        console.print()
        console.print(savings)


def similarity(console: Console, s: Any) -> None:
    """`sleb similarity`: each block's input against its output, with a bar."""
    middle = float(np.median([b.mean for b in s.blocks]))
    low = max(0.0, 1 - 5 * (1 - middle))  # blocks far below the others get no bar
    table = _table(
        "block", s.measure, "token std", "window se", title="input and output of each block"
    )
    table.add_column("")
    for i, b in enumerate(s.blocks):
        share = max(0.0, (b.mean - low) / max(1e-9, 1 - low))
        table.add_row(
            str(i),
            f"{b.mean:.4f}",
            "-" if b.token_std is None else f"{b.token_std:.4f}",
            "-" if b.window_se is None else f"{b.window_se:.4f}",
            "█" * round(30 * share),
        )
    console.print(table)
    console.print(f"bars run from {low:.2f} to 1; every pair of states is in the output of --json")


def plan(console: Console, p: Any) -> None:
    """`sleb search`: the removals in order."""
    table = _table("removed", p.metric, "± se", "margin to the next", "")
    for r in p.rounds:
        rival = r.runner_up()
        for block in r.removed:
            own = next(s for s in r.scores if s.block == block)
            last = rival is not None and block == r.removed[-1]
            more = len(p.order) - 1 if p.of_runs else 0
            table.add_row(
                _named(block, more),
                f"{own.mean:.4f}",
                "-" if own.se is None else f"{own.se:.4f}",
                f"{rival[1]:.4f} ({_named(rival[0].block, more)})" if last else "-",
                "within noise" if last and rival[2] else "",
            )
    console.print(table)
    dense = f"; dense {p.baseline.mean:.4f}" if p.baseline else ""
    console.print(
        f"{p.metric} in {p.unit}{dense}; removed {_blocks(p.removed)} of {p.model.blocks} blocks"
    )
    if p.finals:
        console.print(_finals(p.finals))
    c = p.calibration
    if c:
        console.print(f"measured on {c.windows} windows of {c.length} tokens, {p.dtype}")
    curve(console, p)


def _named(block: int, more: int) -> str:
    """A block, or the run that begins with it."""
    return f"blocks {block} to {block + more}" if more else f"block {block}"


def _finals(f: Any) -> str:
    """Which sets were compared in the end."""
    best, other = f.sets[:2]
    doubt = "" if other.excess_se is None else f" ± {other.excess_se:.4f}"
    own = f", {f.own} of them the model's own text" if f.own else ""
    return (
        f"after a quick repair {best.strategy} {_blocks(best.order)} costs {best.increase:.4f} "
        f"nats/token, {other.strategy} {_blocks(other.order)} costs {other.increase:.4f} "
        f"({other.excess:.4f}{doubt} more), on {f.windows} windows{own}"
    )


def curve(console: Console, p: Any) -> None:
    """The part of a plan about depths and its target; nothing without one."""
    if p.curve:
        table = _table(
            "depth",
            "without",
            "loss increase, nats/token",
            "95 % bound",
            "perplexity ratio",
            "weights",
            "speed-up",
        )
        for q in p.curve.points:
            ratio = (
                "-" if q.bound is None else f"{exp(q.increase):.2f} (at most {exp(q.bound):.2f})"
            )
            mark = "" if q.depth <= len(p.order) else " *"
            table.add_row(
                f"{q.depth}{mark}",
                f"block {q.block}",
                f"{q.increase:.4f}" + ("" if q.low is None else f" ({q.low:.4f} to {q.high:.4f})"),
                "-" if q.bound is None else f"{q.bound:.4f}",
                ratio,
                _mb(q.nbytes),
                f"{q.speedup:.2f}x",
            )
        console.print(table)
        h = p.curve.heldout
        console.print(
            f"on {h.windows} held-out windows of {h.length} tokens; dense "
            f"{p.curve.baseline.mean:.4f} nats/token; speed-up of generation estimated from the "
            "weights that are read per token"
        )
        if p.curve.fitted:
            console.print(
                f"every depth after a quick repair, fitted on {p.curve.fitted:,} tokens; the "
                "target is tested again with the whole one"
            )
        if len(p.curve.points) > len(p.order):
            console.print("* beyond the target: not in the plan")
    if p.target and p.target.kind != "remove":
        t = p.target
        shown = _mb if t.kind == "size" else "{:g}".format
        console.print(
            f"target --{t.kind} {shown(t.limit)}: reached {shown(t.reached)} with "
            f"{len(p.order)} of {p.model.blocks} blocks removed"
        )


def applied(console: Console, a: Any) -> None:
    """`sleb apply`."""
    console.print(f"{a['out']}: {a['blocks']} blocks; removed {_blocks(a['removed'])}")
    if "repair" in a:
        repair(console, a["repair"])


def repair(console: Console, r: Any) -> None:
    """A repair: a line per gap, with the loss on the windows that judged it."""
    texts = list(r["gaps"][0]["before"])
    table = _table("gap", "re-fitted", "ridge", *texts, title="loss on held-out text, nats/token")
    for gap in r["gaps"]:
        changes = [f"{gap['before'][name]:.4f} → {gap['after'][name]:.4f}" for name in texts]
        ridge = "none kept" if gap["ridge"] is None else f"{gap['ridge']:g}"
        table.add_row(_blocks(gap["removed"]), str(len(gap["tensors"])), ridge, *changes)
    console.print(table)


def verification(console: Console, v: Any) -> None:
    """`sleb verify`: a line per gate."""
    table = _table("", "gate", "measured")
    for column in table.columns:
        column.justify = "left"
        column.overflow = "fold"
    for c in v.checks:
        mark = Text("pass", "green") if c.passed else Text("FAIL", "red")
        table.add_row(mark, c.name, c.measured if c.passed else f"{c.measured}; must be {c.limit}")
    console.print(table)


def evaluation(console: Console, e: Any) -> None:
    """`sleb eval`."""
    table = _table("95 % intervals", "loss, nats/token", "perplexity")
    table.add_row("dense", bounds(e.loss, 4), bounds(e.perplexity))
    if e.pruned_loss:
        table.add_row(
            f"without {_blocks(e.removed)}", bounds(e.pruned_loss, 4), bounds(e.pruned_perplexity)
        )
        table.add_row(
            "increase, ratio (paired)", bounds(e.loss_increase, 4), bounds(e.perplexity_ratio)
        )
    console.print(table)
    if e.unrepaired:
        plain = e.unrepaired
        console.print(
            f"pruned is the cut with its repair; the plain cut's perplexity is "
            f"{bounds(plain.pruned_perplexity)}, its ratio {bounds(plain.perplexity_ratio)}"
        )
    if e.divergence:
        console.print(
            f"divergence from the dense model {bounds(e.divergence, 4)} nats/token; the likeliest "
            f"token is the same for {percent(e.agreement)}"
        )
    if len(e.domains) > 1:
        console.print()
        domains(console, e)
    console.print(f"{e.windows} windows of {e.length} tokens, {e.tokens:,} tokens scored")


def domains(console: Console, e: Any) -> None:
    """Quality by text."""
    table = _table("text", "windows", "perplexity", *(["pruned", "ratio"] if e.removed else []))
    for name, q in e.domains.items():
        pruned = [bounds(q.pruned_perplexity), bounds(q.perplexity_ratio)] if e.removed else []
        table.add_row(name, str(q.windows), bounds(q.perplexity), *pruned)
    console.print(table)


def percent(share: Any) -> str:
    """A share with its interval, in per cent."""
    if share.low is None:
        return f"{share.value:.1%}"
    return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def record(console: Console, r: Any) -> None:
    """`sleb prune` and `sleb demo`: the summary. The plain cut and the repaired one stand apart."""
    from sleb.views.card import evaluated_on, repair_told

    left = r.blocks - len(r.removed)
    e = r.evaluation
    cuts = [e.unrepaired, e] if e and e.unrepaired else [e]
    table = _table("", "original", *(["cut", "repaired"] if len(cuts) > 1 else ["pruned"]))
    table.add_row("blocks", str(r.blocks), *[str(left)] * len(cuts))
    for name, (dense, pruned), show in (
        ("parameters", r.parameters, _millions),
        ("weights", r.nbytes, _mb),
    ):
        table.add_row(name, show(dense), *[show(pruned)] * len(cuts))
    if e and e.pruned_perplexity:
        table.add_row(
            "perplexity, 95 % interval",
            bounds(e.perplexity),
            *(bounds(cut.pruned_perplexity) for cut in cuts),
        )
        table.add_row("perplexity ratio", "1", *(bounds(cut.perplexity_ratio) for cut in cuts))
    table.add_row("ideal speed-up", "1", *[f"{r.blocks / left:.2f}x"] * len(cuts))
    console.print(table)
    if e and len(e.domains) > 1:
        console.print()
        domains(console, e)
        console.print()
    console.print(f"removed blocks {_blocks(r.removed)}; perplexity: {evaluated_on(r)}")
    if told := repair_told(r):
        console.print(f"repair: {told}")
    passed = sum(c.passed for c in r.verification.checks)
    console.print(f"verified: {passed} of {len(r.verification.checks)} gates passed")
    total = sum(r.seconds.values())
    console.print(f"took {total:.0f} s, of which searching {r.seconds.get('searching', 0):.0f} s")
