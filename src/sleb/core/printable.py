"""Text that others wrote, made safe to show: in a terminal, on a page, in an error message.

Names of models, tensors and files, keys of plans and configs, tokens and answers come from files
that may be hostile. A terminal obeys escape sequences in them, a carriage return hides what stands
before it, and bidirectional controls make a reader see another text than is there (Boucher and
Anderson, "Trojan Source", 2021). :func:`printable` shows such characters as ``\\x1b`` or
``\\u202e`` and cuts what is too long. All that `sleb` shows goes through it: errors when they are
made (:class:`sleb.core.errors.SlebError`), tables, pages and cards where they are drawn.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable
from typing import Any

LONGEST_MESSAGE = 2000
"""Characters of an error message, which may quote several things."""

_UNSAFE = (
    "\x00-\x1f\x7f-\x9f"  # control characters, of one and of two bytes
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional controls
    "\u2028\u2029"  # separators of lines
    "\u200b\u2061-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # invisible ones
    "\ud800-\udfff"  # halves of surrogate pairs, which no encoding can write
)
_ANY = re.compile(f"[{_UNSAFE}]")
_ANY_BUT_LAYOUT = re.compile(f"(?![\n\t])[{_UNSAFE}]")


def printable(
    text: object, limit: int | None = 200, *, ending: int = 0, lines: bool = False
) -> str:
    """``str(text)`` with every control character visible, in at most ``limit`` characters.

    Args:
        text: what others wrote.
        limit: characters to keep; a longer text ends in "…". None keeps all.
        ending: so many of them are the text's last ones, and "…" stands before these.
        lines: line breaks and tabs stay, for text that is shown as a paragraph.
    """
    whole, unsafe = str(text), _ANY_BUT_LAYOUT if lines else _ANY
    if limit is not None and (cut := len(whole) > 2 * limit):  # the rest need not be looked at
        whole = whole[:limit] + whole[-limit:]
    shown = unsafe.sub(_escaped, whole)
    if limit is None or not (cut or len(shown) > limit):
        return shown
    return f"{shown[: limit - ending - 1]}…{shown[len(shown) - ending :]}"


def paragraphs(lines: Iterable[str]) -> str:
    """Lines of at most 80 columns, with what does not fit into one in the next, indented."""
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, 80, subsequent_indent="  ", **how) for line in lines)


def printable_json(text: str) -> str:
    """The same JSON, in which characters that a terminal could obey are escapes."""
    return _ANY_BUT_LAYOUT.sub(lambda match: json.dumps(match[0])[1:-1], text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
