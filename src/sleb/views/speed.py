"""Speed and memory against what is possible, drafting, and the runtimes that take a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sleb.core.finding import Finding
from sleb.runtimes.bench import Case, Measured, Ratio, Skipped, Speed
from sleb.runtimes.compatibility import RuntimeReport, Verdict
from sleb.runtimes.rules import phrase
from sleb.runtimes.speculative import Drafting
from sleb.views.locale import DASH, Locale, names
from sleb.views.model import Bars, Dots, Figure, Item, Listing, Table, Text

SERVERS = 10  # the example's load, as a number of servers that it now keeps busy
UNSTEADY = 0.2  # between quartiles, as a share of the median
Columns = dict[str, Callable[[Any], str]]


def case(t: Locale, s: Speed | None, name: str) -> str:
    """What a timed case is, in words."""
    found: Case | None = next((c for c in s.cases if c.name == name), None) if s else None
    if found is None:
        return name
    kind = {0: "prompt", 1: "first"}.get(found.new_tokens, "generate")
    counts = {"batch": found.batch, "prompt": found.prompt_tokens, "new": found.new_tokens}
    return t.plain(f"cases.{kind}", **{key: t.count(n) for key, n in counts.items()})


def speed(t: Locale, s: Speed) -> list[Item]:
    """Charts, and tables of ratios, of models and of runs."""
    setting = t("speed.text", device=s.device, dtype=s.dtype, threads=s.threads)
    items: list[Item] = [Text(setting)]
    if not t.markup:
        paths = {x.path: _name(t, s, x.path, "") for x in s.models}
        items.append(Listing(tuple(f"{name}: {path}" for path, name in paths.items())))
    if s.ratios:
        items += [_ratio_chart(t, s), _ratio_table(t, s)]
        if s.ratios[0].ratio.low is None:
            items.append(Text(t("speed.more_runs")))
    if s.models:
        items += [_memory_chart(t, s), _model_table(t, s), _run_table(t, s)]
        if busy := [case(t, s, c.name) for c in s.cases if _spread(s, c) > UNSTEADY]:
            share = t.percent(UNSTEADY)
            items.append(Text(t("speed.busy", cases=t.join(busy), share=share)))
    if s.skipped:
        items.append(Listing(tuple(skipped(t, what) for what in s.skipped)))
    return items


def skipped(t: Locale, what: Skipped) -> str:
    """What was not timed, or not as planned."""
    called = names((*what.models, *what.others))
    what = replace(
        what,
        models=tuple(called[path] for path in what.models),
        others=tuple(called[path] for path in what.others),
    )
    about = {
        name: t.join(value) if isinstance(value, tuple) else value
        for name, value in asdict(what).items()
    }
    said = t(f"skipped.{what.reason}", **about)
    if what.others:
        said = t("skipped.enough", what=said, others=about["others"])
    if what.runtime != "transformers":
        said = t("skipped.under", what=said, runtime=what.runtime)
    return t("untested.skipped", what=said)


def _spread(s: Speed, of: Case) -> float:
    """The widest gap between quartiles of a case, as a share of its median."""
    runs = (run for m in s.models for run in m.runs if run.case == of.name)
    return max(((run.high - run.low) / run.median for run in runs), default=0.0)


def _name(t: Locale, s: Speed, path: str, runtime: str) -> str:
    """A timed model in words: the original, this checkpoint, or another one by its path."""
    if s.models and path == s.models[0].path:
        name = t.plain("speed.dense")
    else:
        alone = len({r.path for r in s.ratios}) <= 1
        name = t.plain("speed.pruned") if alone else names(x.path for x in s.models)[path]
    several = len({x.runtime for x in s.models} | {r.runtime for r in s.ratios}) > 1
    return t.plain("saved.under", case=name, runtime=runtime) if several and runtime else name


def in_memory(t: Locale, s: Speed, x: Measured) -> str:
    """By what a GGUF file's memory was measured: llama.cpp alone does not dequantize it. Empty for
    a folder, whose weights all runtimes hold as they are."""
    if not x.path.endswith(".gguf"):
        return ""
    key = "as_stored" if x.runtime == "llama.cpp" else "unpacked"
    return t.plain(f"memory.{key}", runtime=x.runtime, dtype=s.dtype)


def pruned_in_memory(t: Locale, s: Speed, path: str, runtime: str) -> str:
    """The same of the model that a limit on memory is held against; of the only pruned one where
    none is named."""
    found = (
        x
        for x in s.models
        if ((x.path, x.runtime) == (path, runtime) if path else x.blocks < s.models[0].blocks)
    )
    return next((in_memory(t, s, x) for x in found), "")


def _loaded(t: Locale, s: Speed, x: Measured) -> str:
    """A timed model where its memory is told."""
    if how := in_memory(t, s, x):
        return t.plain("saved.under", case=_name(t, s, x.path, ""), runtime=how)
    return _name(t, s, x.path, x.runtime)


def _ratio_name(t: Locale, s: Speed, r: Ratio) -> str:
    """The case of a ratio, with the model and the runtime where there are several."""
    who, of = _name(t, s, r.path, r.runtime), case(t, s, r.case)
    return of if who == t.plain("speed.pruned") else t.plain("speed.of", case=of, who=who)


def _ratio_chart(t: Locale, s: Speed) -> Figure:
    best = max(s.ratios, key=lambda r: r.ratio.value)
    words = {"case": case(t, s, best.case), "runtime": best.runtime}
    return Figure(
        name="speed",
        title=t("speed.chart"),
        text=t("speed.chart_text"),
        alt=t.plain("speed.alt", most=t.times(best.ratio.value), **words),
        chart=Dots(
            rows=tuple(_ratio_name(t, s, r) for r in s.ratios),
            values=tuple(r.ratio.value for r in s.ratios),
            low=tuple(r.ratio.low for r in s.ratios),
            high=tuple(r.ratio.high for r in s.ratios),
            measured=t.plain("speed.measured"),
            references=(
                (t.plain("speed.ideal"), tuple(r.ideal for r in s.ratios)),
                (t.plain("speed.possible"), tuple(r.possible for r in s.ratios)),
            ),
            label=t.plain("speed.axis"),
        ),
    )


def _ratio_table(t: Locale, s: Speed) -> Table:
    columns: Columns = {
        "col_case": lambda r: _ratio_name(t, s, r),
        "col_ratio": lambda r: t.interval(r.ratio, t.times),
        "col_ideal": lambda r: DASH if r.ideal is None else t.times(r.ideal),
        "col_possible": lambda r: DASH if r.possible is None else t.times(r.possible),
        "col_reading": lambda r: t.reading(r.ratio, 1.0, "high"),
    }
    return t.table("speed", columns, s.ratios, words=["col_reading"])


def _memory_chart(t: Locale, s: Speed) -> Figure:
    """Weights and peak of each model, with the peak to expect if only the weights shrank."""
    first, last = s.models[0], s.models[-1]
    base = {x.runtime: x for x in reversed(s.models) if x.path == first.path}

    def held(x: Measured) -> int:
        """Bytes of the weights in memory: llama.cpp alone does not dequantize a GGUF file."""
        if x.runtime == "llama.cpp" or not x.path.endswith(".gguf"):
            return x.file_bytes
        return x.parameters * (4 if s.dtype == "float32" else 2)

    def expected(x: Measured) -> float | None:
        dense = base.get(x.runtime)
        if dense is None or x is dense:
            return None
        return max(0.0, dense.peak_bytes - held(dense) + held(x))

    ends = {"before": t.size(first.peak_bytes), "after": t.size(last.peak_bytes)}
    return Figure(
        name="memory",
        title=t("memory.chart"),
        text=t("memory.text"),
        alt=t.plain("memory.alt", **ends),
        chart=Bars(
            groups=tuple(_loaded(t, s, x) for x in s.models),
            series=(
                (t.plain("memory.weights"), tuple(float(x.file_bytes) for x in s.models)),
                (t.plain("memory.peak"), tuple(float(x.peak_bytes) for x in s.models)),
            ),
            shown=(
                tuple(t.size(x.file_bytes) for x in s.models),
                tuple(t.size(x.peak_bytes) for x in s.models),
            ),
            marks=((None,) * len(s.models), tuple(map(expected, s.models))),
            mark_label=t.plain("memory.expected"),
            label=t.plain("memory.axis"),
        ),
    )


def _model_table(t: Locale, s: Speed) -> Table:
    columns: Columns = {
        "col_model": lambda x: _loaded(t, s, x),
        "col_blocks": lambda x: str(x.blocks),
        "col_parameters": lambda x: t.large(x.parameters),
        "col_weights": lambda x: t.size(x.file_bytes),
        "col_peak": lambda x: t.size(x.peak_bytes),
        "col_load": lambda x: t.seconds(x.load_seconds),
    }
    return t.table("memory", columns, s.models)


def _run_table(t: Locale, s: Speed) -> Table:
    one = {c.name for c in s.cases if c.new_tokens == 1}  # of which a rate means nothing
    columns: Columns = {
        "col_case": lambda r: case(t, s, r[1].case),
        "col_model": lambda r: _name(t, s, r[0].path, r[0].runtime),
        "col_runs": lambda r: str(len(r[1].seconds)),
        "col_median": lambda r: t.seconds(r[1].median),
        "col_quartiles": lambda r: t(
            "speed.between", low=t.seconds(r[1].low), high=t.seconds(r[1].high)
        ),
        "col_throughput": lambda r: (
            DASH if r[1].case in one else t.number(r[1].tokens_per_second, 1)
        ),
    }
    rows = [(model, run) for model in s.models for run in model.runs]
    caption = t("speed.runs_caption")
    return t.table("speed", columns, rows, words=["col_model"], caption=caption)


# -- page one ------------------------------------------------------------------------------------


def ratios(s: Speed | None, checkpoint: str) -> tuple[Ratio, ...]:
    """How many times as fast: this checkpoint, or all if none is named as this one is."""
    found = s.ratios if s else ()
    return tuple(r for r in found if Path(r.path) == Path(checkpoint)) or found


def _model(s: Speed, runtime: str, path: str) -> Measured | None:
    return next((m for m in s.models if (m.path, m.runtime) == (path, runtime)), None)


def servers(t: Locale, s: Speed | None, found: tuple[Ratio, ...]) -> list[Item]:
    """What the measured ratio of one case means for a load that keeps SERVERS servers busy.

    The case is the one that generates most tokens at once, which is how servers work. Nothing is
    claimed but of a ratio that is above 1 at its worse end too; nothing said where none is known.
    """
    sizes: Mapping[str, Any] = (
        {c.name: (c.new_tokens > 1, c.batch, c.new_tokens) for c in s.cases} if s else {}
    )
    known = [r for r in found if r.case in sizes and r.ratio.value > 0]
    if s is None or not known or not s.models:
        return []
    chosen = max(known, key=lambda r: sizes[r.case])
    dense = _model(s, chosen.runtime, s.models[0].path)
    run = next((x for x in dense.runs if x.case == chosen.case), None) if dense else None
    if run is None:
        return []

    def needed(ratio: float) -> str:
        return t.number(SERVERS / ratio, 1)

    low, high = chosen.ratio.low, chosen.ratio.high
    if low is None or high is None or not low > 1:
        told = {"case": case(t, s, chosen.case), "ratio": t.interval(chosen.ratio, t.times)}
        return [Text(t("servers.unclear", **told))]
    words = {
        "load": t.count(round(SERVERS * run.tokens_per_second)),
        "each": t.number(run.tokens_per_second, 1),
        "now": SERVERS,
        "then": needed(chosen.ratio.value),
    }
    ends = {"low": needed(high), "high": needed(low)}  # the larger the ratio, the fewer servers
    setting = {"case": case(t, s, chosen.case), "runtime": chosen.runtime, "device": s.device}
    return [
        Text(t("servers.interval", **words, **ends)),
        Text(t("servers.assumption", **setting)),
    ]


# -- runtimes and drafts -------------------------------------------------------------------------


def runtimes(t: Locale, r: RuntimeReport) -> list[Item]:
    """Which runtimes take the checkpoint, and how far off they are."""

    def deviation(value: float | None) -> str:
        return DASH if value is None else f"{value:.2g}"

    def named(key: str) -> str:
        return t.named("runtimes", key.replace(" ", "-"))

    columns: Columns = {
        "runtime": lambda v: v.runtime,
        "version": lambda v: v.version or DASH,
        "verdict": lambda v: named(v.verdict),
        "how": lambda v: named(v.how),
        "dense": lambda v: deviation(v.dense),
        "pruned": lambda v: deviation(v.pruned),
        "limit": lambda v: deviation(v.limit),
    }
    words = ["version", "verdict", "how"]
    items: list[Item] = []
    if r.moved is not None:
        about = {"tokens": r.tokens, "dtype": r.dtype, "moved": f"{r.moved:.2g}"}
        items.append(Text(t("runtimes.text", **about)))
    bad = {id(v) for v in r.verdicts if v.verdict == "refused"}
    items.append(t.table("runtimes", columns, r.verdicts, words=words, bad=lambda v: id(v) in bad))
    if why := tuple(_why(t, v, v.why) for v in r.verdicts if v.why):
        items.append(Listing(why))
    if any(v.how != "loaded" for v in r.verdicts):
        items.append(Text(t("runtimes.rule")))
    return items


def _why(t: Locale, v: Verdict, found: Finding) -> str:
    """What a verdict goes by."""
    words = {"rule": t.named("rules", str(found.values.get("rule"))), "phrase": phrase(found)}
    said = t.said("rules", replace(found, values={**found.values, **words}))
    why = t("runtimes.no_file", why=said) if v.no_file else said
    return t("runtimes.why", runtime=v.runtime, why=why)


def drafting(t: Locale, d: Drafting) -> list[Item]:
    """Pruned models as drafts of the original."""
    heads = ("draft", "accepted", "rate", "ratio", "ceiling", "identical", "reading")
    called = names(one.path for one in d.drafts)
    none = (t("draft.none"), DASH, t.number(d.tokens_per_second, 1), t.times(1), *[DASH] * 3)
    rows = [
        (
            called[one.path],
            t.interval(one.acceptance, t.percent),
            t.number(one.tokens_per_second, 1),
            t.interval(one.ratio, t.times),
            t.times(one.ceiling),
            t("draft.of", same=one.identical, prompts=d.prompts),
            t.reading(one.ratio, 1.0, "high"),
        )
        for one in d.drafts
    ]
    setting = {name: getattr(d, name) for name in ("device", "dtype", "prompts", "runs")}
    setting |= {"tokens": d.tokens, "drafted": d.draft_tokens}
    return [
        Text(t("draft.text", **setting)),
        Table(
            caption=t("draft.caption"),
            columns=tuple(t(f"draft.{head}") for head in heads),
            rows=(none, *rows),
            words=frozenset({0, 6}),
            note=t("draft.note"),
        ),
    ]
