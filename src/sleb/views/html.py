"""The page as one HTML file: no script, no request, everything escaped by the template."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from sleb.core.printable import printable
from sleb.views.charts import draw
from sleb.views.model import Figure, Page

HERE = Path(__file__).parent
START = 600  # characters of an answer that are shown without a click
LONGEST = 8_000  # characters of one answer that the page holds at all


def render(page: Page) -> str:
    """HTML of ``page``."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )

    def chart(figure: Figure) -> Markup:
        return draw(figure.chart, figure.name, figure.alt)

    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    template = environment.get_template("template.html.j2")
    return template.render(page=page, style=style, chart=chart, split=split, percent=_percent)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _visible(value: object) -> object:
    """What others wrote, with control characters visible; line breaks of an answer stay."""
    if isinstance(value, str):
        return type(value)(printable(value, None, lines=True))
    return value


def split(text: str, cut: str) -> tuple[str, str]:
    """A text in two parts, cut after a space if there is one; what is far too long is cut off, and
    ``cut`` says how much."""
    if len(text) <= START:
        return text, ""
    at = text.rfind(" ", START // 2, START) + 1 or START
    rest = text[at:LONGEST]
    if len(text) > LONGEST:
        rest += "\n" + cut.format(characters=f"{len(text) - LONGEST:,}")
    return text[:at], rest
