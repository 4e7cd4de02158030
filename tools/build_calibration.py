"""Rebuild ``src/sleb/data/calibration.jsonl``, the text that is used when no --text is given.

The two prose files are JSONL with ``id`` and ``text``: one country and one speech a row. The code
is taken from the running interpreter's standard library. The result depends on nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import sysconfig
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

PROSE_BYTES = 200_000  # from each of the two prose files

# Pure Python, under CPython's own licence alone.
MODULES = (
    "colorsys.py",
    "fnmatch.py",
    "glob.py",
    "graphlib.py",
    "queue.py",
    "reprlib.py",
    "sched.py",
    "shlex.py",
    "string.py",
    "timeit.py",
)

GOLDEN = 0.6180339887


def country_paragraphs(text: str) -> list[str]:
    """The prose of a country page: its lines, less short remarks and lists of names."""
    lines = [line.strip() for line in text.split("\n")]
    return [
        line
        for line in lines
        if len(line) >= 120 and line.count(",") + 2 * line.count(";") < len(line) / 25
    ]


def speech_paragraphs(text: str) -> list[str]:
    """The paragraphs of a speech."""
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def excerpts(
    path: Path, paragraphs: Callable[[str], list[str]], sizes: Sequence[int]
) -> list[dict[str, str]]:
    """About PROSE_BYTES of whole paragraphs: one excerpt a row, of about ``sizes`` bytes in turn.

    Rows are visited in golden-ratio order, which spreads any number of them evenly over the file
    (and so over regions or years), and returned in file order. No paragraph is used twice.
    """
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    visits = sorted(range(len(rows)), key=lambda i: i * GOLDEN % 1)
    found: dict[int, str] = {}
    seen: set[str] = set()
    total = 0
    for turn, (index, size) in enumerate(zip(visits, cycle(sizes), strict=False)):
        parts = [p for p in paragraphs(rows[index]["text"]) if p not in seen]
        chosen: list[str] = []
        # Starting at the head, a third and two thirds in turn varies what part of a text is seen.
        for part in parts[turn % 3 * len(parts) // 3 :]:
            if chosen and len("\n\n".join([*chosen, part]).encode()) > size:
                break
            chosen.append(part)
        if not chosen:
            continue
        seen.update(chosen)
        found[index] = "\n\n".join(chosen)
        total += len(found[index].encode())
        if total >= PROSE_BYTES:
            break
    return [{"id": rows[index]["id"], "text": found[index]} for index in sorted(found)]


def code() -> list[dict[str, str]]:
    """MODULES, whole and unchanged."""
    library = Path(sysconfig.get_path("stdlib"))
    return [
        {
            "id": f"cpython-{platform.python_version()}:Lib/{name}",
            "text": (library / name).read_text(encoding="utf-8").strip("\n"),
        }
        for name in MODULES
    ]


def main() -> None:
    """Build the corpus from the command line's two prose files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("countries", type=Path, help="JSONL of country pages")
    parser.add_argument("speeches", type=Path, help="JSONL of speeches")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    rows = [
        *excerpts(args.countries, country_paragraphs, (1_000, 2_500, 5_000, 8_000)),
        *excerpts(args.speeches, speech_paragraphs, (800, 2_000, 4_000, 7_000)),
        *code(),
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    args.output.write_bytes("".join(lines).encode())


if __name__ == "__main__":
    main()
