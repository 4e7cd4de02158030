"""sleb.toml as `sleb init` writes it, for :mod:`sleb.project` to read. Needs no torch."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from sleb.config import OutputOptions, takes
from sleb.core.files import writable_target, write_text
from sleb.core.printable import printable

_OUTPUT = OutputOptions()


@takes(OutputOptions)
def init(
    out: str | Path = "sleb.toml",
    config: OutputOptions = _OUTPUT,
    *,
    model: str = "./model",
) -> Path:
    """Write a commented project file for :func:`sleb.run`, and give ``out`` back.

    Raises:
        InputError: it exists, or cannot be written.
    """
    out = Path(out)
    writable_target(out, force=config.force, folder=False)
    text = files("sleb.data").joinpath("sleb.toml").read_text(encoding="utf-8")
    text = text.replace("sleb run sleb.toml", f"sleb run {printable(str(out))}", 1)
    write_text(out, text.replace("MODEL", json.dumps(model, ensure_ascii=False)))
    return out
