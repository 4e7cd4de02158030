"""Quality: perplexity by text, the repair, tasks, answers to prompts, and choices on other text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from sleb.core.plan import RepairedGap, RepairRecord
from sleb.core.statistics import Flips, Interval, items_to_tell
from sleb.distillation.record import Healed
from sleb.evaluation.agreement import FLOOR, AnswersKept, Example, RightAnswers
from sleb.evaluation.answers import Answer, Comparison, Pair
from sleb.evaluation.grading import Judged
from sleb.evaluation.perplexity import Evaluation, Quality
from sleb.evaluation.tasks import TaskResult
from sleb.evaluation.transfer import Chosen, Transfer
from sleb.views.locale import DASH, Locale, names
from sleb.views.model import (
    Answered,
    Facts,
    Figure,
    Folded,
    Item,
    Line,
    Listing,
    SideBySide,
    Table,
    Text,
)
from sleb.views.proof import needed
from sleb.views.selection import called

BLANK = re.compile(r"\A(?:[^\S\n]*\n)+|\s+\Z")
"""Blank lines before a text, whose first line keeps its indent, and what is blank after it."""
PAIRS = 6
"""Pairs of answers on a page; a terminal shows half as many."""
ROWS = 5  # of a table, and of one limit, that page one has room for
Columns = dict[str, Callable[[Any], str]]


# -- perplexity ----------------------------------------------------------------------------------


def evaluation(t: Locale, e: Evaluation) -> list[Item]:
    """Perplexity by text and of all, and then the loss and what else was compared."""
    whose = "the original" if e.removed else "this model"
    lines = [f"loss of {whose} {t.interval(e.loss, t.nats)} nats/token"]
    if e.loss_increase:
        increase = t.interval(e.loss_increase, t.nats)
        lines[0] += f"; increase without {called(t, e.removed)} {increase}"
    if e.unrepaired:
        ratio = t.interval(e.unrepaired.perplexity_ratio, t.ratio)
        level = t.interval(e.unrepaired.pruned_perplexity, t.level)
        about = f"the plain cut's perplexity is {level}, its ratio {ratio}"
        lines.append(f"pruned is the cut with its repair; {about}")
    if e.divergence:
        lines.append(
            f"divergence from the original {t.interval(e.divergence, t.nats)} nats/token; the "
            f"likeliest token is the same for {t.interval(e.agreement, t.percent)}"
        )
    scored = f"{e.windows} windows of {e.length} tokens, {t.count(e.tokens)} tokens scored"
    paired = ", ratios paired" if e.removed else ""
    return [by_text(t, e), *map(Text, [*lines, f"{scored}; 95 % intervals{paired}"])]


def by_text(t: Locale, e: Evaluation) -> Table:
    """Perplexity by text and of all texts. What does not fit a terminal is on a page alone."""
    plain = e.unrepaired
    before: dict[str, Quality] = dict(plain.domains) if plain else {}
    rows: list[tuple[str, Quality, Quality | None]] = [
        (name, q, before.get(name)) for name, q in e.domains.items()
    ]
    if len(rows) != 1:
        rows.append((t("quality.all"), e, plain))
    columns: Columns = {
        "text": lambda r: t.called(r[0]),
        "windows": lambda r: t.count(r[1].windows),
        "dense" if e.removed else "alone": lambda r: t.interval(r[1].perplexity, t.level),
    }
    if e.removed:
        columns["pruned"] = lambda r: t.interval(r[1].pruned_perplexity, t.level)
        columns["ratio"] = lambda r: t.interval(r[1].perplexity_ratio, t.ratio)
    if t.markup:
        if plain:
            columns["unrepaired"] = lambda r: t.interval(r[2] and r[2].perplexity_ratio, t.ratio)
        columns["divergence"] = lambda r: t.interval(r[1].divergence, t.nats)
        columns["agreement"] = lambda r: t.interval(r[1].agreement, t.percent)
    return t.table("texts", columns, rows)


# -- repair --------------------------------------------------------------------------------------


def changed(gaps: Sequence[RepairedGap]) -> int:
    """How many matrices are not the original's. A matrix and the bias beside it count once."""
    return len({tensor.name.rpartition(".")[0] for gap in gaps for tensor in gap.tensors})


def by_gap(t: Locale, repair: RepairRecord) -> Table:
    """A row per gap, with the loss on the windows that judged its fit, by text."""
    texts = list(dict.fromkeys(name for gap in repair.gaps for name in gap.before))

    def loss(gap: RepairedGap, text: str) -> str:
        if text not in gap.before or text not in gap.after:
            return DASH
        return t("repair.change", before=t.nats(gap.before[text]), after=t.nats(gap.after[text]))

    rows = tuple(
        (
            t.join(gap.removed),
            t.count(changed([gap])),
            t("repair.refused") if gap.ridge is None else f"{gap.ridge:g}",
            *(loss(gap, text) for text in texts),
        )
        for gap in repair.gaps
    )
    heldout = repair.heldout
    return Table(
        caption=t("repair.caption"),
        columns=(*(t(f"repair.{c}") for c in ("gap", "matrices", "ridge")), *map(t.called, texts)),
        rows=rows,
        note=t("repair.note", windows=heldout.windows, length=heldout.length),
    )


# -- tasks ---------------------------------------------------------------------------------------


def tasks(t: Locale, results: Sequence[TaskResult]) -> list[Item]:
    """A line per task: scores, and what has changed item by item; side by side on a page."""
    compared = any(r.pruned for r in results)
    scores: Columns = {
        "task": lambda r: r.name,
        "metric": lambda r: r.metric,
        "items": lambda r: t.count(r.items),
        "chance": lambda r: DASH if r.chance is None else t.percent(r.chance),
        "dense" if compared or t.markup else "alone": lambda r: t.interval(r.dense, t.percent),
    }
    if compared or t.markup:
        scores["pruned"] = lambda r: t.interval(r.pruned, t.percent)
    flips: Columns = {
        "difference": lambda r: _difference(t, r),
        "lost_won": lambda r: (
            t("tasks.counts", lost=r.flips.lost, won=r.flips.won) if r.flips else DASH
        ),
        "reading": lambda r: change(t, r.flips),
    }
    guesses = [Text(t("tasks.guesses", task=r.name)) for r in results if r.guesses]
    if t.markup:
        both = t.table("tasks", {**scores, **flips}, results, words=["metric", "reading"])
        return [Text(t("tasks.text")), both, *guesses]
    items: list[Item] = [t.table("tasks", scores, results, words=["metric"])]
    if compared:
        named: Columns = {"task": scores["task"], **flips}
        caption = t("tasks.flips_caption")
        items += [
            t.table("tasks", named, results, words=["reading"], caption=caption),
            Text("lost: right before, wrong after; won: the reverse"),
        ]
    if any(r.flips and r.flips.within_noise for r in results):
        items.append(
            Text("within noise: these items cannot tell whether anything was lost or won; use more")
        )
    return [*items, *guesses]


def _difference(t: Locale, r: TaskResult) -> str:
    if r.flips:
        return t.interval(r.flips.difference, t.points)
    return DASH if r.pruned is None else t.points(r.pruned.value - r.dense.value)


def change(t: Locale, flips: Flips | None) -> str:
    """In words, whether answers were lost or won."""
    if flips is None:
        return t.plain("reading.unpaired")
    key = "noise" if flips.within_noise else "worse" if flips.lost > flips.won else "better"
    if not flips.lost + flips.won:
        key = "same"
    return t.plain(f"reading.{key}")


def worst_tasks(t: Locale, results: Sequence[TaskResult]) -> Table:
    """Scores and flips of the tasks that lost most."""
    worst = sorted(results, key=lambda r: r.flips.difference.value if r.flips else 0.0)[:ROWS]
    left = len(results) - len(worst)
    columns: Columns = {
        "task": lambda r: r.name,
        "score": lambda r: t(
            "tasks.from_to", dense=t.percent(r.dense.value), pruned=t.percent(r.pruned.value)
        ),
        "flipped": lambda r: (
            t("tasks.flips", lost=r.flips.lost, won=r.flips.won, items=r.flips.items)
            if r.flips
            else ""
        ),
        "reading": lambda r: change(t, r.flips),
    }
    caption, note = t("tasks.short_caption"), t("quality.more", count=left) if left else ""
    return t.table("tasks", columns, worst, words=["reading"], caption=caption, note=note)


# -- answers kept --------------------------------------------------------------------------------


def answers_kept(t: Locale, k: AnswersKept) -> list[Item]:
    """What is kept of the original's answers to prompts."""
    right = k.right
    rows: list[tuple[str, str]] = []
    if right:
        rows.append((t("kept.right", judged=right.judged), right_counts(t, right)))
        if right.kept:
            rows.append((t("kept.right_kept"), t.interval(right.kept, t.percent)))
    rows.append((t("kept.agreement"), t.interval(k.agreement, t.percent)))
    for name in ("unhealed", "unrepaired"):
        if found := getattr(k, name):
            rows.append((t(f"kept.{name}"), t.interval(found, t.percent)))
    rows += [
        (t("kept.until_first"), t.interval(k.until_first, t.level)),
        (t("kept.reproduced"), t.interval(k.reproduced, t.percent)),
        (t("kept.divergence"), t.interval(k.divergence, t.nats)),
    ]
    facts = Facts(tuple(rows))
    return [facts, *warning(t, k), Text(prompts_told(t, k))]


def answer_rows(t: Locale, k: AnswersKept, cuts: int) -> list[tuple[str, ...]]:
    """Rows of a table with a column for the original and one for each of ``cuts``."""
    plain = [t.interval(k.unrepaired, t.percent) if k.unrepaired else DASH] * (cuts - 1)
    rows: list[tuple[str, ...]] = []
    if right := k.right:
        counts = [str(right.dense), *[DASH] * (cuts - 1), str(right.pruned)]
        rows.append((t("kept.right", judged=right.judged), *counts))
    agreement = t.interval(k.agreement, t.percent)
    return [*rows, (t("kept.agreement"), t.percent(1.0), *plain, agreement)]


def warning(t: Locale, k: AnswersKept | None) -> list[Text]:
    """That too little is kept, where it is, or that this cannot be told."""
    if k is None or k.agreement.value >= FLOOR:
        return []
    told = {"share": t.percent(k.agreement.value), "floor": t.percent(FLOOR)}
    if k.agreement.high is not None and k.agreement.high < FLOOR:
        return [Text(t("kept.below", **told))]
    more = items_to_tell(k.agreement, FLOOR, k.prompts)
    would = t("kept.uncertain_needed", needed=needed(t, more, "prompts")) if more else ""
    return [Text(t("kept.uncertain", prompts=t.count(k.prompts), needed=would, **told))]


def prompts_told(t: Locale, k: AnswersKept) -> str:
    """What was asked."""
    counts = {"prompts": k.prompts, "answered": k.tokens, "tokens": k.new_tokens}
    source = t.join(names(k.source.split(", ")).values())
    told = t("kept.text", source=source, **{name: t.count(n) for name, n in counts.items()})
    return f"{told} {t('kept.left_out', count=t.count(k.left_out))}" if k.left_out else told


def right_counts(t: Locale, right: RightAnswers) -> str:
    """Right answers of both models, and how many were lost and won."""
    counts = {"dense": right.dense, "pruned": right.pruned, "lost": right.lost, "won": right.won}
    return t("kept.counts", **counts)


# -- answers -------------------------------------------------------------------------------------


def answers(t: Locale, c: Comparison) -> list[Item]:
    """Both models' answers in sum, the worst of them side by side, and on a page all others to be
    opened."""
    ordered = c.worst_first
    most = PAIRS if t.markup else PAIRS // 2
    shown = [p for p in ordered[:most] if not (p.identical or p.won)]
    items: list[Item] = [
        Text(t("answers.text", prompts=c.prompts, tokens=c.max_new_tokens)),
        _answer_table(t, c),
        Listing(tuple(_together(t, c))),
    ]
    if not c.languages and not t.markup:
        items.append(Text("to tell more languages apart: pip install py3langid"))
    if all(p.identical for p in c.pairs):
        items.append(Text(t("answers.same")))
    elif shown:
        items.append(Text(t("answers.shown", shown=len(shown), prompts=c.prompts)))
    items += [_pair(t, pair) for pair in shown]
    rest = ordered[len(shown) :] if t.markup else ()
    items += [Text(t("answers.rest"))] if rest else []
    return [*items, *(Folded(_title(t, pair), _pair(t, pair)) for pair in rest)]


def worst_pair(t: Locale, c: Comparison | None, k: AnswersKept | None) -> list[Item]:
    """The answer that went most wrong, beside the original's: of all that were compared, or of
    those by which the result was measured."""
    worst = c.worst_first[0] if c and c.pairs else None
    if c and worst and not (worst.identical or worst.won):
        return [Text(t("answers.worst", prompts=c.prompts)), _pair(t, worst)]
    return examples(t, k)[:2]


def examples(t: Locale, k: AnswersKept | None) -> list[Item]:
    """Right answers that were lost, then those of which least is kept, side by side."""
    if k is None or not k.worst:
        return []
    most = PAIRS // 2
    found: list[Item] = [Text(t("kept.worst", prompts=k.prompts))]
    found += [_example(t, e) for e in k.worst[:most]]
    rest = k.worst[most:] if t.markup else ()
    found += [Text(t("answers.rest"))] if rest else []
    return [*found, *(Folded(t("answers.prompt", id=t.called(e.id)), _example(t, e)) for e in rest)]


def _together(t: Locale, c: Comparison) -> Iterator[str]:
    """What is told of both models' answers together."""
    if known := [pair.judged for pair in c.pairs if pair.judged]:
        right = sum(one.dense for one in known), sum(one.pruned for one in known)
        changed = sum(one.lost for one in known), sum(one.won for one in known)
        counts = dict(zip(("dense", "pruned", "lost", "won"), (*right, *changed), strict=True))
        yield t("answers.right_of", judged=len(known), counts=t("kept.counts", **counts))
    yield t("answers.identical", share=t.interval(c.identical, t.percent))
    yield t("answers.parted", tokens=t.count(round(c.agreed_median)))
    key = "answers.switched_share" if c.languages else "answers.scripts_share"
    yield t(key, share=t.interval(c.switched, t.percent))
    if c.seconds_per_token_ratio is not None:
        yield t("answers.faster", ratio=t.interval(c.seconds_per_token_ratio, t.times))


def _answer_table(t: Locale, c: Comparison) -> Table:
    names = ["ended", "empty", "repetitive"]
    if c.dense.json_valid or c.pruned.json_valid:
        names.append("json_valid")
    names += ["seconds_median", "seconds_p90"]

    def cell(of: Any, name: str) -> str:
        found = getattr(of, name)
        return t.seconds(found) if isinstance(found, float) else t.interval(found, t.percent)

    columns: Columns = {
        "what": lambda name: t(f"answers.{name}"),
        "dense": lambda name: cell(c.dense, name),
        "pruned": lambda name: cell(c.pruned, name),
    }
    return t.table("answers", columns, names)


def _pair(t: Locale, pair: Pair) -> SideBySide:
    note = t("answers.agreed", agreed=pair.agreed)
    if pair.switched:  # to another writing system, or only to another language
        moved = pair.pruned.script != pair.dense.script
        other = (pair.pruned.script if moved else pair.pruned.language) or DASH
        note += t("answers.switched", other=other)
    turns = pair.turns or (("", pair.prompt),)
    dense, pruned = ((a.text, _remarks(t, a)) for a in (pair.dense, pair.pruned))
    return _side_by_side(t, pair.id, turns, dense, pruned, note, pair.judged)


def _title(t: Locale, pair: Pair) -> str:
    said = t("answers.prompt", id=t.called(pair.id))
    if pair.identical:
        return t.plain("answers.folded_same", prompt=said)
    return t.plain("answers.folded", prompt=said, agreed=pair.agreed)


def _example(t: Locale, e: Example) -> SideBySide:
    note = t("kept.example", share=t.percent(e.agreement))
    return _side_by_side(t, e.id, e.turns, (e.dense, ()), (e.pruned, ()), note, e.judged)


Said = tuple[str, tuple[str, ...]]
"""An answer, and remarks about it."""


def _side_by_side(
    t: Locale,
    name: str,
    turns: Sequence[tuple[str, str]],
    dense: Said,
    pruned: Said,
    note: str,
    judged: Judged | None,
) -> SideBySide:
    """``judged``: what was expected, which then stands below the prompt."""
    asked = [(t.named("roles", role or "prompt"), text) for role, text in turns]
    if judged:
        asked.append((t("answers.expected"), _expected(judged)))

    def answered(of: str, said: Said, right: bool) -> Answered:
        first = (t("answers.right" if right else "answers.wrong"),) if judged else ()
        return Answered(
            name=t(f"answers.{of}"), text=BLANK.sub("", said[0]), remarks=(*first, *said[1])
        )

    return SideBySide(
        title=t("answers.prompt", id=t.called(name)),
        prompt=tuple(Answered(name=name, text=BLANK.sub("", text)) for name, text in asked),
        dense=answered("dense", dense, judged is not None and judged.dense),
        pruned=answered("pruned", pruned, judged is not None and judged.pruned),
        note=note,
        more=t("answers.more"),
        nothing=t("answers.nothing"),
        cut=t.raw("answers.cut"),
    )


def _expected(judged: Judged) -> str:
    """An answer as it is; else what it is held against, each on a line."""

    def line(key: str, value: object) -> str:
        said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return said if key == "answer" else f"{key}: {said}"

    return "\n".join(line(*item) for item in judged.expected.items())


def _remarks(t: Locale, a: Answer) -> tuple[str, ...]:
    said = [t("answers.tokens", tokens=a.tokens, seconds=t.seconds(a.seconds))]
    if not a.ended:
        said.append(t("answers.unended"))
    if "repetitive" in a.faults:
        said.append(t("answers.repeats", share=t.percent(a.repetition)))
    if a.json_valid is not None:
        said.append(t("answers.json_yes" if a.json_valid else "answers.json_no"))
    return tuple(said)


# -- transfer ------------------------------------------------------------------------------------


def transfer(t: Locale, found: Transfer) -> list[Item]:
    """What each choice of blocks costs on each text, what choices share, and which one to use."""

    def source(name: str) -> str:
        return t.plain("transfer.mix") if name == "mix" else name

    def cost(plan: Chosen, domain: str, increase: Interval) -> str:
        shown = t.interval(increase, t.nats)
        return t("transfer.away", increase=shown) if domain in plan.away else shown

    best = next(plan for plan in found.plans if plan.source == found.recommended)
    heads = zip(found.domains, found.heldout, strict=True)
    costs = Table(
        caption=t("transfer.caption"),
        columns=(
            t("transfer.chosen_on"),
            t("transfer.blocks"),
            *(t("transfer.on", domain=d, windows=n) for d, n in heads),
        ),
        rows=tuple(
            (
                source(plan.source),
                t.join(plan.removed),
                *(cost(plan, *x) for x in zip(found.domains, plan.increase, strict=True)),
            )
            for plan in found.plans
        ),
        words=frozenset({0, 1}),
        note=t("transfer.note"),
    )
    names = tuple(source(plan.source) for plan in found.plans)
    overlap = Table(
        caption=t("transfer.overlap"),
        columns=(t("transfer.chosen_on"), *names),
        rows=tuple(
            (name, *map(t.percent, row)) for name, row in zip(names, found.overlap, strict=True)
        ),
    )
    return [
        Text(t("transfer.text", windows=found.windows, length=found.length)),
        costs,
        overlap,
        Text(t("transfer.recommended", source=source(best.source))),
    ]


def healing(t: Locale, h: Healed) -> Figure:
    """The divergence of windows that were not trained on, by step; of the weights that were taken
    in particular."""
    by_step = {step: fmean(kinds) for step, kinds in h.checks}
    steps, found = tuple(by_step), tuple(by_step.values())
    return Figure(
        name="healed",
        title=t("healed.chart"),
        text=t(
            "healed.text",
            speed=t.count(round(h.tokens_per_second)),
            seconds=t.count(round(h.seconds)),
        ),
        alt=t.plain(
            "healed.alt", first=t.nats(found[0]), last=t.nats(by_step[h.best_step]), steps=h.steps
        ),
        chart=Line(
            x=steps,
            y=found,
            low=(None,) * len(steps),
            high=(None,) * len(steps),
            chosen=(h.best_step, by_step[h.best_step], None, None),
            chosen_label=t.plain("curve.chosen"),
            x_label=t.plain("healed.x"),
            y_label=t.plain("healed.y"),
        ),
    )
