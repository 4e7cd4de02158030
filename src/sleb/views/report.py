"""From a run's record and plan to a page: every figure and sentence of the report. Pure."""

from __future__ import annotations

from sleb.views.choice import choice
from sleb.views.context import Material
from sleb.views.limits import verdict
from sleb.views.measured import measured
from sleb.views.page import Page
from sleb.views.provenance import proof, provenance
from sleb.views.summary import summary

__all__ = ["view"]


def view(m: Material) -> Page:
    """The whole page, in the order in which it is read."""
    say, r = m.say, m.record
    return Page(
        lang=say.lang,
        title=say.plain("page.title", model=m.model),
        subtitle=say(
            "page.subtitle",
            k=len(r.removed),
            n=r.blocks,
            started=say.moment(r.started),
            model=r.model,
        ),
        verdict=verdict(m),
        summary=summary(m),
        contents=say("page.contents"),
        sections=(*choice(m), *measured(m), *proof(m), provenance(m)),
        glossary_title=say("page.glossary"),
        glossary=tuple(
            (name, term, meaning) for name, (term, meaning) in say.tables["glossary"].items()
        ),
        colophon=say("page.colophon"),
    )
