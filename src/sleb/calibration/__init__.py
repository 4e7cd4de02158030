"""Calibration text: where it comes from (``sources``), how it is cut (``windows``), and which
windows play which role (``split``).

``windows`` and ``split`` need torch; ``sources`` does not, nor does importing this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sleb.calibration.sources import SOURCES, Source, check_sources, parse_source, read_documents

if TYPE_CHECKING:
    from sleb.calibration.split import CalibrationSplit
    from sleb.calibration.windows import DEFAULT_WINDOWS, Windows, load_windows

__all__ = [
    "DEFAULT_WINDOWS",
    "SOURCES",
    "CalibrationSplit",
    "Source",
    "Windows",
    "check_sources",
    "load_windows",
    "parse_source",
    "read_documents",
]


def __getattr__(name: str) -> Any:
    if name == "CalibrationSplit":
        from sleb.calibration import split

        return split.CalibrationSplit
    if name in ("DEFAULT_WINDOWS", "Windows", "load_windows"):
        from sleb.calibration import windows

        return getattr(windows, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
