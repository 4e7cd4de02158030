"""Speed and memory of the original and of what was made of it, against what is possible."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sleb.views.context import Material
from sleb.views.page import Bars, Dots, Figure, Item, Listing, Missing, Table, Text

if TYPE_CHECKING:
    from sleb.runtimes.bench import Measured, Speed

__all__ = ["speed"]


def speed(m: Material) -> list[Item]:
    """The section's charts and tables."""
    say, s = m.say, m.record.speed
    if s is None:
        return [Missing(text=m.missing("speed"))]
    setting = say("speed.text", device=s.device, dtype=s.dtype, threads=s.threads)
    items: list[Item] = [Text(text=setting)]
    if s.ratios:
        items += [_ratio_chart(m, s), _ratio_table(m, s)]
    if s.models:
        items += [_memory_chart(m, s), _model_table(m, s), _run_table(m, s)]
    if s.skipped:
        lines = tuple(say("untested.skipped", what=what) for what in s.skipped)
        items.append(Listing(lines=lines))
    return items


def _name(m: Material, s: Speed, path: str, runtime: str) -> str:
    """A timed model in words: the original, this checkpoint, or another one by its path."""
    pruned = {r.path for r in s.ratios}
    if s.models and path == s.models[0].path:
        name = m.say.plain("speed.dense")
    else:
        name = m.say.plain("speed.pruned") if len(pruned) <= 1 else path
    several = len({x.runtime for x in s.models} | {r.runtime for r in s.ratios}) > 1
    return m.say.plain("saved.under", case=name, runtime=runtime) if several else name


def _ratio_names(m: Material, s: Speed) -> tuple[str, ...]:
    """The case of each ratio, with the model and the runtime where there are several."""
    plain = m.say.plain("speed.pruned")
    who = [_name(m, s, r.path, r.runtime) for r in s.ratios]
    return tuple(
        m.case(r.case) if w == plain else m.say.plain("speed.of", case=m.case(r.case), who=w)
        for w, r in zip(who, s.ratios, strict=True)
    )


def _ratio_chart(m: Material, s: Speed) -> Figure:
    say = m.say
    best = max(s.ratios, key=lambda r: r.ratio.value)
    return Figure(
        name="speed",
        title=say("speed.chart"),
        text=say("speed.chart_text"),
        alt=say.plain(
            "speed.alt",
            most=say.times(best.ratio.value),
            case=m.case(best.case),
            runtime=best.runtime,
        ),
        chart=Dots(
            rows=_ratio_names(m, s),
            values=tuple(r.ratio.value for r in s.ratios),
            low=tuple(r.ratio.low for r in s.ratios),
            high=tuple(r.ratio.high for r in s.ratios),
            measured=say.plain("speed.measured"),
            references=(
                (say.plain("speed.ideal"), tuple(r.ideal for r in s.ratios)),
                (say.plain("speed.possible"), tuple(r.possible for r in s.ratios)),
            ),
            label=say.plain("speed.axis"),
        ),
    )


def _ratio_table(m: Material, s: Speed) -> Table:
    say = m.say
    columns = ("case", "ratio", "ideal", "possible", "reading")
    return Table(
        caption=say("speed.caption"),
        columns=tuple(say(f"speed.col_{c}") for c in columns),
        rows=tuple(
            (
                name,
                say.interval(r.ratio, say.times),
                say.times(r.ideal),
                "–" if r.possible is None else say.times(r.possible),
                m.reading(r.ratio, 1.0, "high"),
            )
            for name, r in zip(_ratio_names(m, s), s.ratios, strict=True)
        ),
        words=frozenset({0, 4}),
    )


def _memory_chart(m: Material, s: Speed) -> Figure:
    """Weights and peak of each model, with the peak to expect if only the weights shrank."""
    say, first = m.say, s.models[0]
    base = {x.runtime: x for x in reversed(s.models) if x.path == first.path}

    def expected(x: Measured) -> float | None:
        dense = base.get(x.runtime)
        if dense is None or x is dense:
            return None
        return max(0.0, dense.peak_bytes - dense.file_bytes + x.file_bytes)

    last = s.models[-1]
    return Figure(
        name="memory",
        title=say("memory.chart"),
        text=say("memory.text"),
        alt=say.plain(
            "memory.alt", before=say.size(first.peak_bytes), after=say.size(last.peak_bytes)
        ),
        chart=Bars(
            groups=tuple(_name(m, s, x.path, x.runtime) for x in s.models),
            series=(
                (say.plain("memory.weights"), tuple(float(x.file_bytes) for x in s.models)),
                (say.plain("memory.peak"), tuple(float(x.peak_bytes) for x in s.models)),
            ),
            shown=(
                tuple(say.size(x.file_bytes) for x in s.models),
                tuple(say.size(x.peak_bytes) for x in s.models),
            ),
            marks=((None,) * len(s.models), tuple(map(expected, s.models))),
            mark_label=say.plain("memory.expected"),
            label=say.plain("memory.axis"),
        ),
    )


def _model_table(m: Material, s: Speed) -> Table:
    say = m.say
    columns = ("model", "blocks", "parameters", "weights", "peak", "load")
    return Table(
        caption=say("memory.caption"),
        columns=tuple(say(f"memory.col_{c}") for c in columns),
        rows=tuple(
            (
                _name(m, s, x.path, x.runtime),
                str(x.blocks),
                say.large(x.parameters),
                say.size(x.file_bytes),
                say.size(x.peak_bytes),
                say.seconds(x.load_seconds),
            )
            for x in s.models
        ),
    )


def _run_table(m: Material, s: Speed) -> Table:
    say = m.say
    one = {c.name for c in s.cases if c.new_tokens == 1}  # of which a rate means nothing
    columns = ("case", "model", "runs", "median", "quartiles", "throughput")
    return Table(
        caption=say("speed.runs_caption"),
        columns=tuple(say(f"speed.col_{c}") for c in columns),
        rows=tuple(
            (
                m.case(run.case),
                _name(m, s, x.path, x.runtime),
                str(len(run.seconds)),
                say.seconds(run.median),
                say("speed.between", low=say.seconds(run.low), high=say.seconds(run.high)),
                "–" if run.case in one else say.number(run.tokens_per_second, 1),
            )
            for x in s.models
            for run in x.runs
        ),
        words=frozenset({0, 1}),
    )
