"""The options of `sleb verify` about runtimes."""

from __future__ import annotations

from typing import Annotated

import typer

from sleb.core.errors import InputError

__all__ = ["Python", "Runtime", "RuntimeDtype", "asked_runtimes"]

Runtime = Annotated[
    str | None,
    typer.Option(
        "--runtime",
        metavar="NAMES",
        help="Try it there too: transformers, vllm, llama-cpp; several with commas.",
    ),
]
Python = Annotated[
    list[str] | None,
    typer.Option(
        "--python",
        metavar="NAME=PATH",
        help="Interpreter that has a runtime, as vllm=/venv/bin/python; repeat for several.",
    ),
]

RuntimeDtype = Annotated[
    str | None,
    typer.Option(help="What runtimes compute in, and are compared in. Default: that of --dtype."),
]


def asked_runtimes(
    names: str | None, pythons: list[str] | None
) -> tuple[tuple[str, ...], dict[str, str]] | None:
    """--runtime and --python, checked before anything is loaded; None without --runtime."""
    if names is None:
        if pythons:
            raise InputError("--python is for --runtime; give that too, or leave it out")
        return None
    from sleb.runtimes.compatibility import parse_pythons, parse_runtimes

    asked = parse_runtimes(names)
    return asked, parse_pythons(pythons or (), asked)
