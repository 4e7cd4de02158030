"""Making a report in memory and reading it as a browser would: by section, by table, by link."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from html.parser import HTMLParser
from unittest.mock import patch

from markupsafe import Markup
from pydantic import BaseModel
from sleb.views.context import Material

from report_plan import plan
from report_record import complete
from sleb.views.html import render
from sleb.views.locale import Words
from sleb.views.report import view

VOID = {"meta", "link", "img", "br", "hr", "input"}
NO_CHART = Markup('<svg role="img"></svg>')
INLINE = {"a", "code", "span", "small", "i"}
INVISIBLE = str.maketrans({"\u00a0": " ", "\u2060": None})


def put(value, path, new):
    """``value`` with ``new`` at ``path``, such as ``speed.ratios.3.ratio.low``."""
    key, _, rest = path.partition(".")
    if isinstance(value, tuple):
        at = int(key)
        return (*value[:at], put(value[at], rest, new) if rest else new, *value[at + 1 :])
    if isinstance(value, dict):
        return {**value, key: put(value[key], rest, new) if rest else new}
    new = put(getattr(value, key), rest, new) if rest else new
    if isinstance(value, BaseModel):
        assert key in type(value).model_fields
        return value.model_copy(update={key: new})
    assert is_dataclass(value)
    assert key in {f.name for f in fields(value)}
    return replace(value, **{key: new})


def page(record=None, chosen=None, lang="en"):
    """The report as values."""
    given = Material(
        record=record or complete(),
        plan=chosen or plan(),
        say=Words(lang),
        digests={"run.json": "ab" * 32, "plan.json": "cd" * 32},
    )
    return view(given)


def html(record=None, chosen=None, lang="en", charts=False):
    """The report as HTML; without ``charts``, which take time, in their places are empty ones."""
    made = page(record, chosen, lang)
    if charts:
        return render(made)
    with patch("sleb.views.html.draw", lambda chart, name, alt: NO_CHART):
        return render(made)


@dataclass
class Seen(HTMLParser):
    """What a page has."""

    source: str
    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, list[list[str]]] = field(default_factory=dict)

    def __post_init__(self):
        super().__init__()
        self._open: list[tuple[str, str | None]] = []
        self.feed(self.source)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append((tag, named))
        if named.get("id"):
            self.ids.append(named["id"])
        if tag == "a":
            self.links.append(named["href"])
        if tag not in VOID:
            self._open.append((tag, named.get("id")))
        for place in self._places():
            if tag not in INLINE:
                self.texts.setdefault(place, []).append(" ")
            if tag == "tr":
                self.rows.setdefault(place, []).append([])
            if tag in ("td", "th"):
                self.rows[place][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        opened, _ = self._open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        shown = data.translate(INVISIBLE)
        names = [tag for tag, _ in self._open]
        for place in self._places():
            self.texts.setdefault(place, []).append(shown)
            if "td" in names or "th" in names:
                self.rows[place][-1][-1] += shown

    def _places(self):
        return [name for tag, name in self._open if name and tag in ("section", "div")]

    def text(self, place):
        """All text below the element of this id, on one line."""
        return " ".join("".join(self.texts[place]).split())


def seen(*arguments, **options):
    """The parsed page of :func:`html`."""
    return Seen(html(*arguments, **options))
