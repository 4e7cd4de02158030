"""Charts as inline SVG: matplotlib draws, and what a page does not need is taken away.

The text stays text, in the page's own font. Labels stand above what they name, never beside it,
because the page's font may be wider than the one that matplotlib measures with. The same chart
gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from functools import singledispatch
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from sleb.views.model import Bars, Chart, Dots, Heat, Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, BLUE, ORANGE, EMPTY = "#1b1d21", "#d5d8dd", "#0b5c7a", "#b5541c", "#ececef"
PALE, GREY, WHITE = "#8fb4c4", "#8a9099", "#ffffff"
THEME = {
    INK: "ink",
    FAINT: "rule",
    BLUE: "accent",
    ORANGE: "mark",
    EMPTY: "plain-back",
    PALE: "pale",
    GREY: "muted",
    WHITE: "card",
}
"""Colours of a chart that are the page's own, light or dark, by the name of its CSS variable."""
LIGHT, DARK = "#fdfdfd", "#111111"  # over cells, whose colours are the same on any page
COLOURS = "YlGnBu"  # readable in grey and with any colour vision
NARROW, WIDE = 5.4, 10.0  # inches; a unit of the SVG is 1/72
LABELS = 32  # along a wide axis
FLOOR = 1e-4  # on a logarithmic scale colours of less are not told apart

BEHIND: Any = {"facecolor": WHITE, "edgecolor": "none", "pad": 1.5}  # of text over lines

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sleb",
    "text.parse_math": False,  # a name may hold a $
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.0,
    "axes.edgecolor": GREY,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.0,
    "axes.grid": False,
}


def draw(chart: Chart, name: str, alt: str) -> Markup:
    """The chart as an ``<svg>`` element whose ids begin with ``name``; ``alt`` describes it."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # the page's font has the glyphs that matplotlib's lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        matplotlib.rcdefaults()  # not the user's matplotlibrc
        matplotlib.rcParams.update(STYLE)
        figure = _figure(chart)
        file = io.StringIO()
        empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=empty)
        # behind it, as the layout moves axes while it draws
        titles = _titles(chart, figure) if isinstance(chart, Heat) else ""
    return _inline(file.getvalue(), name, alt, titles)


def _inline(svg: str, name: str, alt: str, more: str = "") -> Markup:
    """Only the element, with ``more`` inside; without fixed size, fonts, styles and ids that the
    page may have too, and in its colours."""
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*(?:; )?", "", svg)
    svg = re.sub(r"\bxlink:href=", "href=", svg)
    svg = re.sub(r"(\bid=\"|\bhref=\"#|url\(#)", rf"\1{name}-", svg)
    svg = re.sub("#[0-9a-f]{6}", lambda m: f"var(--{THEME[m[0]]})" if m[0] in THEME else m[0], svg)
    svg = svg.removesuffix("</svg>") + more + "</svg>"
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box
    head = f'<svg {view_box[0]} role="img" aria-label="{escape(alt)}">'
    return Markup(re.sub(r"^<svg[^>]*>", lambda _: head, svg))


@singledispatch
def _figure(chart: Chart) -> Figure:
    raise TypeError(type(chart))


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=72)  # as SVG is drawn
    return figure, figure.add_subplot()


def _numbers(axis: Any) -> None:
    """Ticks with few, plain numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def _plain(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


@_figure.register(Heat)
def _heat(chart: Heat) -> Figure:
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import FuncFormatter, NullLocator

    values = np.ma.masked_invalid(np.array(chart.values, dtype=np.float64))
    if chart.log:
        values = np.ma.maximum(values, FLOOR)
    if chart.square:
        width, height = NARROW, 0.88 * NARROW
    else:
        width, height = WIDE, 1.5 + 0.28 * len(chart.rows)
    figure, axes = _axes(width, height)
    low, high = float(values.min()), float(values.max())
    norm = LogNorm(low, max(high, 10 * low)) if chart.log else Normalize(low, max(high, low + 1e-6))
    image = axes.imshow(
        values, cmap=COLOURS, norm=norm, interpolation="none", aspect=1 if chart.square else "auto"
    )
    axes.set_facecolor(EMPTY)
    axes.spines[:].set_visible(False)
    for axis, labels in ((axes.xaxis, chart.columns), (axes.yaxis, chart.rows)):
        at = _ticks(labels, LABELS // 2 if chart.square else LABELS)
        axis.set_ticks(at, [labels[i] for i in at])
        axis.set_tick_params(length=0)
    axes.set_title(chart.row_label)
    axes.set_xlabel(chart.column_label)
    dot: Any = {"marker": "o", "ms": 3, "mfc": LIGHT, "mec": "#555555", "mew": 0.5}
    halo: Any = {"marker": "x", "ms": 8, "mew": 3.5, "color": LIGHT}
    cross: Any = {"marker": "x", "ms": 7, "mew": 1.5, "color": DARK}
    for marks, style in ((chart.dots, dot), (chart.crosses, halo), (chart.crosses, cross)):
        if marks:
            rows, columns = zip(*marks, strict=True)
            axes.plot(columns, rows, linestyle="none", **style)
    shrink, pad = (0.8, 0.04) if chart.square else (1.0, 0.02)
    bar = figure.colorbar(image, ax=axes, pad=pad, aspect=14, shrink=shrink)
    bar.outline.set_visible(False)  # type: ignore[operator, unused-ignore]
    bar.solids.set_rasterized(True)  # type: ignore[union-attr]
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    bar.ax.set_title(chart.unit, fontsize=10, loc="left" if chart.square else "right")
    return figure


def _titles(chart: Heat, figure: Figure) -> str:
    """What a pointer over a cell shows: its row, its column and its value."""
    axes, height = figure.axes[0], figure.bbox.height
    (left, top), (right, bottom) = axes.transData.transform(
        [(-0.5, -0.5), (len(chart.columns) - 0.5, len(chart.rows) - 0.5)]
    )
    wide, high = (right - left) / len(chart.columns), (top - bottom) / len(chart.rows)
    found = []
    for i, (row, values) in enumerate(zip(chart.rows, chart.values, strict=True)):
        for j, (column, value) in enumerate(zip(chart.columns, values, strict=True)):
            if value == value:
                x, y = left + j * wide, height - top + i * high
                box = f"M{x:.1f} {y:.1f}h{wide:.1f}v{high:.1f}H{x:.1f}z"
                said = f"{chart.row_label} {row}, {chart.column_label} {column}: {_plain(value)}"
                found.append(f'<path d="{box}"><title>{escape(said)}</title></path>')
    return f'<g fill="none" pointer-events="all">{"".join(found)}</g>'


def _ticks(labels: tuple[str, ...], most: int) -> list[int]:
    """Which of many labels to show: round numbers, and what is no number."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 10_000) if len(labels) <= most * s)
    first = 0 if labels[0].isdigit() or step == 1 else 1  # beside a name there is no room for 0
    return [
        i
        for i, label in enumerate(labels)
        if not label.isdigit() or (int(label) % step == 0 and int(label) >= first)
    ]


@_figure.register(Line)
def _line(chart: Line) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(NARROW, 3.4)
    if all(low is not None for low in chart.low):
        low, high = np.array(chart.low, dtype=float), np.array(chart.high, dtype=float)
        axes.fill_between(chart.x, low, high, color=BLUE, alpha=0.18, linewidth=0)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.plot(chart.x, chart.y, color=BLUE, marker="o", markersize=4)
    if chart.chosen:
        x, y, low_end, high_end = chart.chosen
        if low_end is not None and high_end is not None:
            axes.plot([x, x], [low_end, high_end], color=ORANGE, linewidth=3)
        axes.plot(x, y, "o", color=ORANGE, markersize=8)
        right = x > (chart.x[0] + chart.x[-1]) / 2
        below = chart.below
        place: Any = {"xytext": (-8 if right else 8, -14 if below else 8)}
        place |= {"textcoords": "offset points", "ha": "right" if right else "left"}
        axes.annotate(chart.chosen_label, (x, y), color=ORANGE, **place)
    _numbers(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(chart.y_label)
    axes.set_xlabel(chart.x_label)
    return figure


@_figure.register(Dots)
def _dots(chart: Dots) -> Figure:
    rows = len(chart.rows)
    figure, axes = _axes(NARROW, 1.5 + 0.52 * rows)
    at = np.arange(rows)
    axes.axvline(1, color=GREY, linewidth=0.8)
    for i, (value, low, high) in enumerate(zip(chart.values, chart.low, chart.high, strict=True)):
        axes.plot([1, value], [i, i], color=FAINT, linewidth=1.2, zorder=1)
        if low is not None and high is not None:
            axes.plot([low, high], [i, i], color=BLUE, linewidth=4, solid_capstyle="butt", zorder=2)
    axes.plot(chart.values, at, "o", color=BLUE, label=chart.measured, zorder=4)
    for (name, values), marker in zip(chart.references, ("|", "D"), strict=True):
        known = [(v, i) for i, v in enumerate(values) if v is not None]
        style: Any = {"marker": marker, "mew": 1.6, "mfc": "none", "label": name, "zorder": 3}
        style |= {"ms": 14, "color": ORANGE} if marker == "|" else {"ms": 6, "color": INK}
        if known:
            axes.plot(*zip(*known, strict=True), linestyle="none", **style)
    axes.set_ylim(rows - 0.5, -0.75)
    axes.margins(x=0.08)
    _names(axes, {i - 0.42: name for i, name in enumerate(chart.rows)})
    _numbers(axes.xaxis)
    axes.set_xlabel(chart.label)
    _legend(figure)
    return figure


@_figure.register(Bars)
def _bars(chart: Bars) -> Figure:
    groups, series = len(chart.groups), len(chart.series)
    pitch = series + 1.1  # rows per group, one of them for its name
    figure, axes = _axes(NARROW, 1.4 + 0.24 * pitch * groups)
    most = max((max(values) for _, values in chart.series), default=1.0) or 1.0
    marked = False
    for s, (name, values) in enumerate(chart.series):
        at = [g * pitch + s + 0.75 for g in range(groups)]
        colour = (BLUE, PALE)[s % 2]
        axes.barh(at, [v / 1e6 for v in values], height=0.82, color=colour, label=name)
        for y, value, text, mark in zip(at, values, chart.shown[s], chart.marks[s], strict=True):
            end = max(value, mark or 0.0)
            beside: Any = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(text, (end / 1e6, y), fontsize=10, **beside)
            if mark is not None:
                at_mark, label = [mark / 1e6] * 2, None if marked else chart.mark_label
                axes.plot(at_mark, [y - 0.5, y + 0.5], color=ORANGE, linewidth=2, label=label)
                marked = True
    axes.set_xlim(0, 1.25 * most / 1e6)
    axes.set_ylim(groups * pitch - 0.3, -0.4)
    _names(axes, {g * pitch: name for g, name in enumerate(chart.groups)})
    _numbers(axes.xaxis)
    axes.set_xlabel(chart.label)
    _legend(figure)
    return figure


def _names(axes: Axes, names: dict[float, str]) -> None:
    """Names of rows, by their heights, above their marks."""
    axes.set_yticks([])
    axes.spines.left.set_visible(False)
    style: Any = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 10.5}
    for height, name in names.items():
        axes.annotate(name, (0, height), bbox=BEHIND, **style)


def _legend(figure: Figure) -> None:
    """Below the chart, one entry a line, so that no font makes entries overlap."""
    figure.legend(loc="outside lower left", frameon=False, fontsize=10, ncols=1)
