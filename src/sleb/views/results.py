"""What every result of the library is shown as on a terminal, by its type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import singledispatch
from statistics import median
from typing import Any, get_args

from sleb.core.plan import Plan, RepairRecord
from sleb.distillation.record import Healed
from sleb.evaluation.agreement import AnswersKept
from sleb.evaluation.answers import Comparison
from sleb.evaluation.perplexity import Evaluation
from sleb.evaluation.tasks import TaskResult
from sleb.evaluation.transfer import Transfer
from sleb.formats.hub import Pushed
from sleb.formats.quantize import Quantized
from sleb.models.describe import Description
from sleb.record import BETWEEN, GateResult, RepairStatus, RunRecord
from sleb.runtimes.bench import Speed
from sleb.runtimes.compatibility import RuntimeReport
from sleb.runtimes.speculative import Drafting
from sleb.selection.similarity import Similarity
from sleb.surgery.gguf_repair import Stored
from sleb.surgery.restore import Restored
from sleb.surgery.verification import Verification
from sleb.views import description, proof, quality, selection, speed, terminal
from sleb.views.locale import Locale
from sleb.views.model import Item, Table, Text

T = Locale("en")


def show(value: Any, *, json: bool = False) -> None:
    """Print a result on stdout: as JSON, or as tables and sentences."""
    if json:
        terminal.write_json(value)
    else:
        terminal.draw(items(value), terminal.console())


@singledispatch
def items(value: Any) -> list[Item]:
    """What to show of a result."""
    raise TypeError(f"nothing shows a {type(value).__name__}")


def _register(kind: type, view: Callable[[Locale, Any], list[Item]]) -> None:
    items.register(kind, lambda value: view(T, value))


_register(Evaluation, quality.evaluation)
_register(Comparison, quality.answers)
_register(AnswersKept, quality.answers_kept)
_register(Transfer, quality.transfer)
_register(Speed, speed.speed)
_register(Drafting, speed.drafting)
_register(RuntimeReport, speed.runtimes)
_register(Description, description.description)
_register(Verification, proof.verification)
_register(GateResult, lambda t, g: proof.gate(t, g.rows))
for kind in get_args(Item):
    _register(kind, lambda t, item: [item])


@items.register
def _(value: tuple) -> list[Item]:  # type: ignore[type-arg]
    """Tasks, or results one after the other."""
    if all(isinstance(one, TaskResult) for one in value):
        return quality.tasks(T, value)
    return [item for one in value for item in items(one)]


@items.register
def _(p: Plan) -> list[Item]:
    return [*selection.plan_table(T, p), *depths(p)]


def depths(p: Plan) -> list[Item]:
    """The part of a plan about depths and its target; nothing without one."""
    curve = selection.curve(T, p.curve, len(p.order)) if p.curve and p.curve.points else []
    asked = selection.target(T, p) if p.target and p.target.kind != "remove" else []
    return [*curve, *asked]


@items.register
def _(s: Similarity) -> list[Item]:
    """Each block's input against its output, with a bar."""
    middle = median(b.mean for b in s.blocks)
    low = max(0.0, 1 - 5 * (1 - middle))  # blocks far below the others get no bar

    def bar(mean: float) -> str:
        return "█" * round(30 * max(0.0, (mean - low) / max(1e-9, 1 - low)))

    def spread(value: float | None) -> str:
        return "-" if value is None else T.nats(value)

    rows = tuple(
        (str(i), T.nats(b.mean), spread(b.token_std), spread(b.window_se), bar(b.mean))
        for i, b in enumerate(s.blocks)
    )
    heads = ("block", s.measure, "token std", "window se", "")
    caption = "input and output of each block"
    words = frozenset({0, 4})
    told = f"bars run from {low:.2f} to 1; every pair of states is in the output of --json"
    return [Table(caption=caption, columns=heads, rows=rows, words=words), Text(told)]


@items.register
def _(r: RunRecord) -> list[Item]:
    """The summary of a run."""
    found: list[Item] = [sizes(T, r), *quality.warning(T, r.prompts)]
    if r.healed:
        found += items(r.healed)
    elif r.evaluation and len(r.evaluation.domains) > 1:
        found.append(quality.by_text(T, r.evaluation))
    lines = [f"removed {selection.called(T, r.removed)}"]
    lines += [quality.prompts_told(T, r.prompts)] if r.prompts else []
    lines += [T.said("unasked", r.unasked)] if r.unasked and not r.prompts else []
    lines.append(f"perplexity: {evaluated_on(r)}")
    if r.repair:
        lines.append(f"repair: {repair_told(r.repair)}")
    passed, checks = sum(c.passed for c in r.verification.checks), len(r.verification.checks)
    lines += requantized_told(r.requantized)
    lines.append(f"exact cut, which says nothing of quality: {passed} of {checks} checks passed")
    stages = ((title, seconds) for title, seconds in r.seconds.items() if title != BETWEEN)
    longest = sorted(stages, key=lambda item: -item[1])
    named = [f"{title} {seconds:.0f} s" for title, seconds in longest if seconds >= 1][:5]
    lines += [f"longest: {T.join(named)}"] if named else []
    return [*found, *map(Text, lines)]


def sizes(t: Locale, r: RunRecord) -> Table:
    """Answers, perplexity, blocks and size before and after. The plain cut and the repaired one
    stand apart."""
    left, e = r.blocks - len(r.removed) + len(r.parts), r.evaluation
    cuts = [e.unrepaired, e] if e and e.unrepaired else [e]
    n = len(cuts)
    rows = quality.answer_rows(t, r.prompts, n) if r.prompts else []
    before, after = proof.on_disk(t, r)
    rows += [
        ("blocks", str(r.blocks), *[str(left)] * n),
        ("parameters", t.large(r.parameters[0]), *[t.large(r.parameters[1])] * n),
        ("weights", before, *[after] * n),
    ]
    if e and e.pruned_perplexity:
        levels = (t.interval(cut.pruned_perplexity, t.level) for cut in cuts if cut)
        ratios = (t.interval(cut.perplexity_ratio, t.ratio) for cut in cuts if cut)
        rows.append(("perplexity, 95 % interval", t.interval(e.perplexity, t.level), *levels))
        rows.append(("perplexity ratio", "1", *ratios))
    if not r.parts:
        rows.append(("ideal speed-up", "1", *[t.times(r.blocks / left)] * n))
    last = "healed" if r.healed else "repaired" if n > 1 else "pruned"
    heads = ("", "original", *["cut"][: n - 1], last)
    return Table(columns=heads, rows=tuple(rows))


def evaluated_on(r: RunRecord) -> str:
    """What perplexity was measured on, in words."""
    text = r.evaluation_text
    if text is None:
        return "no text was left over to measure on: give more, or fewer --windows"
    if text.note:
        return text.note
    if text.source == "held-out":
        told = f"{text.windows} held-out windows of {text.length} tokens from the calibration texts"
        return f"{told}{', ' + T('texts.shared', count=text.shared) if text.shared else ''}"
    return f"{text.windows} windows of {text.length} tokens from {', '.join(text.texts)}"


def repair_told(r: RepairStatus) -> str:
    """What became of the repair, in words."""
    if r.note:
        return r.note
    if r.status != "repaired":
        words = {"not-asked": "not asked for", "no-gain": "no fit was better on every text"}
        why = T.said("found", r.why) if r.why else ""
        return words.get(r.status, f"not possible: {why}")
    parts = ["given texts", *(["the model's own text"] if r.self_generated else [])]
    parts += [f"its answers to {r.answers} prompts"] if r.answers else []
    return (
        f"{r.tensors} matrices around {r.gaps} of {r.gaps_total} gaps, fitted on {r.tokens:,} "
        f"tokens ({', '.join(parts)}), and judged on {r.validation_windows} other windows"
    )


ENDS = {
    "steps": "all steps done",
    "time": "time is up",
    "no-gain": "no better on held-out text in several checks",
}


@items.register
def _(h: Healed) -> list[Item]:
    """Original, cut and healed side by side, on every text."""
    cut = "repaired" if h.repaired else "cut"
    rows = tuple(
        (
            name,
            str(text.windows),
            T.level(text.perplexity.value),
            T.interval(text.cut_ratio, T.ratio),
            T.interval(text.healed_ratio, T.ratio),
            f"{text.cut_divergence.value:.3f} to {text.healed_divergence.value:.3f}",
        )
        for name, text in h.texts.items()
    )
    heads = ("text", "windows", "original", cut, "healed", "divergence")
    about = (
        f"{cut} and healed: ratio to the original with 95 % interval, paired; divergence from the "
        "original in nats/token. On windows that were not trained on"
    )
    often = [f"{n:.1f} times through the {kind}" for kind, n in h.passes.items() if n > 1]
    more = "".join(f", {one}" for one in often)
    best = "" if h.best_step == h.steps else f"; the weights are those of step {h.best_step}"
    trained = (
        f"trained {h.trained_parameters:,} parameters for {h.steps} steps in {h.seconds:,.0f} s on "
        f"{h.tokens:,} tokens{more}, at a learning rate of {h.lr:.0e}; {ENDS[h.stopped]}{best}"
    )
    fast = (
        f"{h.tokens_per_second:,.0f} tokens/s; {h.teraflops:.3g} TFLOP/s, "
        f"{h.teraflops / h.product_teraflops:.0%} of a large matrix product's"
    )
    table = Table(caption="perplexity on held-out text", columns=heads, rows=rows)
    return [table, Text(about), Text(trained), Text(fast)]


@items.register
def _(q: Quantized) -> list[Item]:
    """Sizes, and how it was made."""
    sizes = ("weights", *map(T.size, q.nbytes))
    how = f"in groups of {q.group} columns" if q.group else "row by row"
    c = q.calibration
    text = f", calibrated on {c.windows} windows of {c.length} tokens" if c else ""
    told = f"{q.matrices} matrices in the blocks rounded {how}{text}, in {q.seconds:,.0f} s"
    read = (
        f"read back, logits differ from those in memory by {q.difference:.2g} of the largest "
        f"(at most {q.limit:.2g})"
    )
    heads, caption = ("", "before", "after"), f"quantized to {q.scheme}"
    return [Table(caption=caption, columns=heads, rows=(sizes,)), Text(told), Text(read)]


@items.register
def _(done: Pushed) -> list[Item]:
    size = f"{len(done.files)} files, {T.size(done.nbytes)}"
    told = f"{size} uploaded to {done.url}, commit {done.commit}"
    if done.commit is None:
        told = f"{size} would go to {done.repo}, branch {done.revision}"
    return [*map(Text, done.files), Text(told)]


@items.register
def _(r: Restored) -> list[Item]:
    """What was restored, and what is no longer in it."""
    whole = "the original"
    if r.from_gguf:
        whole = "the folder of 16-bit weights that the .gguf file was read as"
    what = f"removed {selection.called(T, r.removed)}" if r.removed else f"{whole}, byte for byte"
    lines = [f"{r.path}: {r.blocks} blocks, {T.size(r.nbytes)}; {what}"]
    if r.repair_undone and r.removed:
        lines.append(
            "without the repair, which belongs to the full cut; fit one for this depth with: "
            "sleb apply --repair"
        )
    return list(map(Text, lines))


@items.register
def _(done: dict) -> list[Item]:  # type: ignore[type-arg]
    """A cut of a checkpoint or of a GGUF file; or results by name, one after the other."""
    if "out" not in done:
        return [item for value in done.values() for item in items(value)]
    removed = selection.called(T, done["removed"])
    found: list[Item] = [Text(f"{done['out']}: {done['blocks']} blocks; removed {removed}")]
    if "repair" in done:
        found.append(quality.by_gap(T, RepairRecord.model_validate(done["repair"])))
    if "nbytes" in done:
        found.append(Text(f"{T.size(done['nbytes'])}; every other tensor is the original's bytes"))
    return [*found, *map(Text, requantized_told(done.get("requantized", ())))]


def requantized_told(tensors: Sequence[Stored]) -> list[str]:
    """Which repaired tensors of a GGUF file are stored how, and what that rounds off."""
    lines = []
    for was, now in dict.fromkeys((x.was, x.type) for x in tensors):
        of = [x for x in tensors if (x.was, x.type) == (was, now)]
        blocks: dict[str, list[str]] = {}
        for x in of:
            parts = x.name.split(".")
            inside = parts[0] == "blk" and len(parts) > 3
            name = ".".join(parts[2:]).removesuffix(".weight") if inside else x.name
            blocks.setdefault(name, []).extend(parts[1:2] if inside else [])
        named = [f"{name} of {T.join(at)}" if at else name for name, at in blocks.items()]
        stored = f"as {now}, as before" if was == now else f"as {now} instead of {was}"
        low, high = min(x.error for x in of), max(x.error for x in of)
        lines.append(
            f"{len(of)} repaired tensors are stored {stored} ({'; '.join(named)}): rounding error "
            f"{low:.2%} to {high:.2%} of their norm"
        )
    return lines
