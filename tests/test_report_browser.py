"""The report in a real browser, as wide as a desktop and a phone, without scripts and network.

Chromium loads it in a frame that may not run scripts, from a server that notes every request; a
script around the frame measures what is in it.
"""

import json
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from report_plan import bare_plan, repaired_plan
from report_tools import SECTIONS, big, hostile, html, repaired, sparse

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HARNESS = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<iframe src="report.html" sandbox="allow-same-origin" width="%d" height="800"
 style="border: 0"></iframe><pre id="found"></pre>
<script>
window.onload = () => {
  const d = document.querySelector("iframe").contentDocument, w = d.defaultView;
  const all = [...d.querySelectorAll("body *")].filter(e => e.checkVisibility());
  const size = e => e.getBoundingClientRect();
  const inside = e => e.closest(".scroll, .chart");
  const beyond = all.filter(e => !inside(e) && size(e).right > w.innerWidth + 1);
  const cut = all.filter(e => !inside(e) && e.scrollWidth > e.clientWidth + 1 && e.clientWidth);
  document.getElementById("found").textContent = JSON.stringify({
    width: d.documentElement.clientWidth, content: d.documentElement.scrollWidth,
    scripts: d.scripts.length,
    beyond: beyond.map(e => e.outerHTML.slice(0, 80)), cut: cut.map(e => e.outerHTML.slice(0, 80)),
    sections: [...d.querySelectorAll("section[id]")].filter(e => size(e).height > 20)
      .map(e => e.id),
    charts: [...d.querySelectorAll(".chart svg")].map(e => [size(e).width, size(e).height]),
    inks: [...d.querySelectorAll(".chart svg text")].map(e => w.getComputedStyle(e).fill),
    scrolled: [...d.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth + 1)
      .map(e => w.getComputedStyle(e).backgroundImage),
    ink: w.getComputedStyle(d.body).color,
    bars: [...d.querySelectorAll(".meter")].map(e => [size(e).width, size(e).height]),
    glossary: d.querySelector("#term-block").checkVisibility(), rules: d.styleSheets.length,
  });
};
</script>"""


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    return found or pytest.skip(f"none of {', '.join(BROWSERS)} is installed")


def look(browser, folder, source, width):
    """What Chromium shows of ``source`` in a frame of ``width``, its log, and what it asked for."""
    (folder / "report.html").write_text(source, encoding="utf-8")
    (folder / "harness.html").write_text(HARNESS % width, encoding="utf-8")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format, *arguments):
            asked.append(self.path)

    handler = partial(Handler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ran = subprocess.run(
            [
                *(
                    browser,
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--disable-dev-shm-usage",
                ),
                *("--no-first-run", "--disable-background-networking", "--enable-logging=stderr"),
                *(f"--user-data-dir={folder / 'profile'}", "--window-size=1600,1000"),
                *("--virtual-time-budget=20000", "--dump-dom"),
                f"http://127.0.0.1:{server.server_port}/harness.html",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        server.shutdown()
    found = re.search(r'<pre id="found">(\{.*\})</pre>', ran.stdout)
    assert found, ran.stdout[-300:]
    console = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">")), console, asked


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(
    ("made", "lang"),
    [(hostile, "en"), (hostile, "ja"), (big, "ja"), (lambda: (sparse(), bare_plan()), "en")],
    ids=["hostile-en", "hostile-ja", "big-ja", "bare-en"],
)
def test_the_page_fits_and_asks_for_nothing(browser, tmp_path, made, lang, width):
    found, console, asked = look(browser, tmp_path, html(*made(), lang, charts=True), width)
    assert console == []
    assert asked == ["/harness.html", "/report.html"]
    assert width - 20 < found["content"] <= found["width"] <= width
    assert found["beyond"] == []
    assert found["cut"] == []
    assert found["scripts"] == 0
    assert found["rules"] == 1
    assert found["glossary"]
    assert set(SECTIONS) <= set(found["sections"])
    assert all(w > 250 and h > 100 for w, h in found["charts"])
    assert {*found["inks"]} <= {found["ink"], "rgb(181, 84, 28)"}  # and the chosen point's
    assert all(w > 100 and 4 < h < 20 for w, h in found["bars"])


@pytest.mark.parametrize("width", [600, 1280])
def test_a_table_that_goes_on_at_the_side_is_shaded_there(browser, tmp_path, width):
    """Some systems show no scroll bar before one scrolls."""
    found, _, _ = look(browser, tmp_path, html(repaired(), repaired_plan()), width)
    assert found["scrolled"] or width == 1280
    assert all(shown.count("linear-gradient") == 4 for shown in found["scrolled"])


def test_the_browser_test_can_fail(browser, tmp_path):
    bad = '<img src="tracker.png"><script src="x.js"></script><p style="width:999px">wide</p>'
    source = html(sparse(), bare_plan())
    worse = source.replace("<main>", f"<main>{bad}")
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", worse)
    found, console, asked = look(browser, tmp_path, free, 390)
    assert "/tracker.png" in asked
    assert console
    assert found["content"] > found["width"]
    assert found["beyond"]
    assert found["scripts"] == 1
    # with its policy the page would not even ask
    _, console, asked = look(browser, tmp_path, worse, 390)
    assert asked == ["/harness.html", "/report.html"]
    assert any("Content Security Policy" in line for line in console)
