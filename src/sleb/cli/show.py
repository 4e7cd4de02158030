"""A verb's result on stdout: drawn by its type, or as JSON. The views, which know all types of
results and so import torch, are imported when there is something to show."""

from __future__ import annotations

import sys
from typing import Any

from sleb.core.printable import LONGEST_MESSAGE, printable


def show(result: Any) -> None:
    """Draw ``result`` for a person."""
    from sleb import views

    views.show(result)


def as_json(facts: Any) -> None:
    """Print for a program."""
    from sleb import views

    views.show(facts, json=True)


def note(text: str, json: bool = False) -> None:
    """A last line that says what to do next: on stderr if stdout is for a program."""
    print(printable(text, LONGEST_MESSAGE), file=sys.stderr if json else sys.stdout)
