"""Charts: text that is text, in any language; no fonts or ids that clash; the same bytes."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import matplotlib as mpl
import pytest
from sleb.views.page import Bars, Dots, Heat, Line

from report_tools import page
from sleb.views.charts import _plain, _ticks, draw

NAN = float("nan")
CHARTS = {i.name: i.chart for s in page().sections for i in s.items if i.kind == "figure"}


def texts(svg):
    found = []

    class Reader(HTMLParser):
        def handle_data(self, data):
            if data.strip():
                found.append(data.strip())

    Reader().feed(str(svg))
    return found


def line(**changes):
    given = {
        "x": (1, 2, 3),
        "y": (0.1, 0.2, 0.4),
        "low": (0.05, 0.1, 0.3),
        "high": (0.15, 0.3, 0.5),
        "chosen": 3,
        "chosen_label": "here",
        "x_label": "x",
        "y_label": "y",
    }
    return Line(**{**given, **changes})


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_one_small_element_with_text(name):
    svg = str(draw(CHARTS[name], name, 'what "it" <shows>'))
    assert svg.startswith("<svg viewBox=")
    assert svg.endswith("</svg>")
    assert 'aria-label="what &#34;it&#34; &lt;shows&gt;"' in svg
    assert not re.search(r"<style|<metadata|<!DOCTYPE|<\?xml|font-family|xlink|http", svg)
    assert not re.search(r"<svg[^>]* (width|height)=", svg)
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert all(i.startswith(f"{name}-") for i in ids)
    assert {*re.findall(r'(?:href="#|url\(#)([^")]+)', svg)} <= {*ids}
    assert texts(svg)
    assert len(svg) < 60_000


@pytest.mark.parametrize("name", CHARTS)
def test_the_same_chart_gives_the_same_bytes_whatever_the_users_settings(name):
    before = draw(CHARTS[name], name, "")
    with mpl.rc_context({"axes.facecolor": "red", "font.size": 30, "svg.fonttype": "path"}):
        assert draw(CHARTS[name], name, "") == before


def test_labels_are_those_of_the_page():
    heat, curve = texts(draw(CHARTS["rounds"], "a", "")), texts(draw(CHARTS["curve"], "b", ""))
    assert {"round", "block", "nats/token above best", "1", "2", "3", "11"} <= {*heat}
    assert {"this model", "blocks removed", "loss increase, nats/token"} <= {*curve}
    assert {"2.40 GB", "2.52 GB", "peak to expect"} <= {
        t.replace("\u00a0", " ") for t in texts(draw(CHARTS["memory"], "c", ""))
    }
    speed = texts(draw(CHARTS["speed"], "d", ""))
    assert {"reading 1 × 512 tokens", "ideal", "possible", "measured, 95 % interval"} <= {*speed}


def test_marks_and_bands_are_drawn_where_there_is_something_to_draw():
    def paths(chart):
        return str(draw(chart, "c", "")).count("<use") + str(draw(chart, "c", "")).count("<path")

    bare = line(low=(None,) * 3, high=(None,) * 3)
    assert paths(line()) > paths(bare)
    assert paths(line()) > paths(line(chosen=7))
    heat = CHARTS["rounds"]
    plain = Heat(**{**vars(heat), "dots": (), "crosses": ()})
    assert paths(heat) >= paths(plain) + len(heat.dots) + 2 * len(heat.crosses)
    dots = CHARTS["speed"]
    alone = Dots(**{**vars(dots), "low": (None,) * 4, "high": (None,) * 4})
    assert paths(dots) >= paths(alone) + 4
    gone = tuple((name, (None,) * 4) for name, _ in dots.references)
    none = Dots(**{**vars(dots), "references": gone})
    assert paths(dots) > paths(none)
    bars = CHARTS["memory"]
    unmarked = Bars(**{**vars(bars), "marks": ((None, None), (None, None))})
    assert "peak to expect" not in texts(draw(unmarked, "c", ""))


def test_names_with_signs_that_mean_something_elsewhere_are_left_alone():
    found = texts(draw(line(y_label="$a_1$ <b> & 損失"), "c", ""))
    assert "$a_1$ <b> & 損失" in found


@pytest.mark.parametrize("values", [((NAN, 1.0), (1.0, NAN)), ((1.0, 1.0), (1.0, 1.0))])
def test_a_grid_with_gaps_or_one_value_can_be_drawn(values):
    for log in (False, True):
        grid = Heat(
            rows=("1", "2"),
            columns=("0", "1"),
            values=values,
            row_label="r",
            column_label="c",
            unit="u",
            log=log,
        )
        assert "r" in texts(draw(grid, "c", ""))


def test_of_many_labels_round_ones_are_shown():
    assert _ticks(tuple(map(str, range(80))), 32) == list(range(0, 80, 5))
    assert _ticks(("in", *map(str, range(79))), 16) == [0, *range(6, 80, 5)]
    assert _ticks(("1", "2", "3"), 32) == [0, 1, 2]
    assert _plain(-0.25) == "−0.25"
