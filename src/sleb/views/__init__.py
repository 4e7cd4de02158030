"""Results as people see them: one view model, drawn on a terminal, as a page and as Markdown.

The report is one self-contained HTML page for managers and engineers. It reads run.json and
plan.json only, so a figure that was not recorded cannot be in it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sleb.core.errors import InputError
from sleb.core.files import writable_target, write_text
from sleb.core.plan import Plan
from sleb.record import RunRecord
from sleb.views.card import model_card as model_card
from sleb.views.html import render
from sleb.views.locale import Locale
from sleb.views.report import Report
from sleb.views.results import depths as depths
from sleb.views.results import items as items
from sleb.views.results import show as show


def write_report(run: Path, out: Path, lang: str = "en", force: bool = False) -> Path:
    """Write the report of the folder ``run`` to ``out``; give ``out`` back.

    ``lang`` is en or ja. The same record gives the same bytes.

    Raises:
        InputError: the extra ``sleb[report]`` is not installed, no such language, ``out`` exists
            and ``force`` is not given, or run.json and plan.json in ``run`` cannot be used.
        ResourceError: the disk is full.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "a report needs jinja2 and matplotlib: pip install 'sleb[report]'"
        ) from None
    writable_target(out, force=force, folder=False)
    record, plan = RunRecord.load(run), Plan.load(run / "plan.json")
    digests = {
        name: hashlib.sha256((run / name).read_bytes()).hexdigest()
        for name in ("run.json", "plan.json")
    }
    t = Locale(lang, markup=True)
    write_text(out, render(Report(record=record, plan=plan, t=t, digests=digests).page))
    return out
