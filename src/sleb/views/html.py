"""The page as one HTML file: no script, no request, everything escaped by the template."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from sleb.views.charts import draw
from sleb.views.page import Figure, Page

__all__ = ["render"]

HERE = Path(__file__).parent


def render(page: Page) -> str:
    """HTML of ``page``."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def chart(figure: Figure) -> Markup:
        return draw(figure.chart, figure.name, figure.alt)

    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    template = environment.get_template("template.html.j2")
    return template.render(page=page, style=style, chart=chart)
