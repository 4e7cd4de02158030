"""The user's own prompts: both models in sum, and the worst answers side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from markupsafe import Markup

from sleb.views.context import Material
from sleb.views.page import Answered, Item, Listing, Missing, SideBySide, Table, Text

if TYPE_CHECKING:
    from sleb.core.statistics import Interval
    from sleb.evaluation.answers import Answer, Comparison, Pair

__all__ = ["answers"]

SHOWN = 6  # pairs
START = 600  # characters that are shown without a click
LONGEST = 8_000  # characters of one text that the report holds at all


def answers(m: Material) -> list[Item]:
    """The section's table and pairs."""
    say, c = m.say, m.record.answers
    if c is None:
        return [Missing(text=m.missing("answers"))]
    shown = c.worst(SHOWN)
    items: list[Item] = [
        Text(text=say("answers.text", prompts=c.prompts, tokens=c.max_new_tokens)),
        _table(m, c),
        Listing(lines=tuple(_paired(m, c))),
    ]
    if not shown:
        return [*items, Text(text=say("answers.same"))]
    items.append(Text(text=say("answers.shown", shown=len(shown), prompts=c.prompts)))
    return [*items, *(_pair(m, pair) for pair in shown)]


def _paired(m: Material, c: Comparison) -> Iterator[Markup]:
    """What is told of both models' answers together."""
    say = m.say
    yield say("answers.identical", share=say.interval(c.identical, say.percent))
    yield say("answers.parted", tokens=say.number(c.agreed_median, 0))
    key = "answers.switched_share" if c.languages else "answers.scripts_share"
    yield say(key, share=say.interval(c.switched, say.percent))
    if c.seconds_per_token_ratio is not None:
        yield say("answers.faster", ratio=say.interval(c.seconds_per_token_ratio, say.times))


def _table(m: Material, c: Comparison) -> Table:
    say = m.say

    def shares(name: str, dense: Interval | None, pruned: Interval | None) -> tuple[str, ...]:
        both = (say.interval(x, say.percent) if x else "–" for x in (dense, pruned))
        return (say(f"answers.{name}"), *both)

    names = ["ended", "empty", "repetitive"]
    if c.dense.json_valid or c.pruned.json_valid:
        names.append("json_valid")
    rows = [shares(name, getattr(c.dense, name), getattr(c.pruned, name)) for name in names]
    for name in ("seconds_median", "seconds_p90"):
        both = (say.seconds(getattr(x, name)) for x in (c.dense, c.pruned))
        rows.append((say(f"answers.{name}"), *both))
    return Table(
        caption=say("answers.caption"),
        columns=(say("answers.what"), say("answers.dense"), say("answers.pruned")),
        rows=tuple(rows),
    )


def _pair(m: Material, pair: Pair) -> SideBySide:
    say = m.say
    return SideBySide(
        title=say("answers.prompt", id=pair.id),
        prompt=_long(m, say("answers.question"), pair.prompt, ()),
        dense=_long(m, say("answers.dense"), pair.dense.text, _remarks(m, pair.dense)),
        pruned=_long(m, say("answers.pruned"), pair.pruned.text, _remarks(m, pair.pruned)),
        note=say("answers.agreed", agreed=pair.agreed)
        + (say("answers.switched", other=_other(pair)) if pair.switched else ""),
        more=say("answers.more"),
    )


def _other(pair: Pair) -> str:
    """The writing system that the pruned model changed to; the language if it kept that."""
    changed = pair.pruned.script != pair.dense.script
    return (pair.pruned.script if changed else pair.pruned.language) or "–"


def _long(m: Material, name: str, text: str, remarks: tuple[str, ...]) -> Answered:
    """A text in two parts, cut after a space if there is one; what is far too long is cut off."""
    if len(text) <= START:
        return Answered(name=name, start=text or m.say("answers.nothing"), rest="", remarks=remarks)
    at = text.rfind(" ", START // 2, START) + 1 or START
    rest = text[at:LONGEST]
    if len(text) > LONGEST:
        rest += "\n" + m.say.plain("answers.cut", characters=m.say.number(len(text) - LONGEST, 0))
    return Answered(name=name, start=text[:at], rest=rest, remarks=remarks)


def _remarks(m: Material, a: Answer) -> tuple[str, ...]:
    say = m.say
    said = [say("answers.tokens", tokens=a.tokens, seconds=say.seconds(a.seconds))]
    if not a.ended:
        said.append(say("answers.unended"))
    if "repetitive" in a.faults:
        said.append(say("answers.repeats", share=say.percent(a.repetition)))
    if a.json_valid is not None:
        said.append(say("answers.json_yes" if a.json_valid else "answers.json_no"))
    return tuple(said)
