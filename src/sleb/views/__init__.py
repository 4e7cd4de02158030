"""The report: what a run measured, as one self-contained HTML page for managers and engineers.

It reads run.json and plan.json only, so a figure that was not recorded cannot be in it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sleb.core.errors import InputError
from sleb.core.files import writable_target, write_text

__all__ = ["write_report"]


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
    from sleb.core.plan import Plan
    from sleb.record import RunRecord
    from sleb.views.context import Material
    from sleb.views.html import render
    from sleb.views.locale import Words
    from sleb.views.report import view

    record, plan = RunRecord.load(run), Plan.load(run / "plan.json")
    digests = {
        name: hashlib.sha256((run / name).read_bytes()).hexdigest()
        for name in ("run.json", "plan.json")
    }
    page = view(Material(record=record, plan=plan, say=Words(lang), digests=digests))
    write_text(out, render(page))
    return out
