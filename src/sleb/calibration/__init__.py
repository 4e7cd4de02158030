"""Calibration text: where it comes from (``sources``), how it is cut (``windows``), and which
windows play which role (``split``).

``windows`` and ``split`` need torch; ``sources`` does not, nor does importing this package.
"""

from sleb.calibration.sources import SOURCES, Source, check_sources, parse_source, read_documents

__all__ = ["SOURCES", "Source", "check_sources", "parse_source", "read_documents"]
