"""The texts of benchmarks/quality.py: what calibrates, what tests, and what is only tested on.

They lie in one folder. A ``.raw`` file is WikiText's: its rows are documents. A ``.jsonl`` file has
a document a row, in ``text``. Documents are joined by a blank line, as the published protocol does.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from sleb.core.errors import InputError

__all__ = ["DOMAINS", "PUBLISHED", "UNSEEN", "Texts", "prepare"]

DOMAINS = {
    "wikitext": ("wikitext2/wiki.valid.raw", "wikitext2/wiki.test.raw"),
    "c4": ("domains/c4_calibration.jsonl", "domains/c4_test.jsonl"),
    "code": ("domains/python_code.jsonl",),
    "support": ("domains/support_sgd_dialogues.jsonl",),
    "finance": ("domains/finance_tatqa.jsonl",),
}
"""Calibration and test file of each domain. One file alone: two thirds of its documents, drawn by
the seed, calibrate, and the others test."""

UNSEEN = {
    "factbook": "prose/factbook_prose.jsonl",
    "sotu": "prose/sotu_1961_2026.jsonl",
    "japanese": "domains/japanese_wikipedia.jsonl",
}
PUBLISHED = "wikitext"
"""The domain that SLEB's paper calibrates on."""

OWN = 200  # characters from which on a document is one of a kind, unlike a heading


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Values of ``--text``, by domain: for calibration, and for testing with the unseen ones."""

    calibration: dict[str, str]
    test: dict[str, str]


def prepare(data: Path, folder: Path, seed: int) -> Texts:
    """Write the texts that ``data`` holds into ``folder``, each for one use.

    Raises:
        InputError: a file is missing or not of its form, or a document is in both uses.
    """
    calibration: dict[str, list[str]] = {}
    test: dict[str, list[str]] = {}
    for name, files in DOMAINS.items():
        read = [_read(data / file) for file in files]
        if len(read) == 1:
            read = _split(read[0], f"{seed} {name}")
        calibration[name], test[name] = read
    test |= {name: _read(data / file) for name, file in UNSEEN.items()}
    known = {d for documents in calibration.values() for d in documents if len(d) > OWN}
    for name, documents in test.items():
        if known.intersection(documents):
            raise InputError(f"a document of '{name}' tests and calibrates; take it out of one")
    return Texts(
        calibration=_write(calibration, folder / "calibration"), test=_write(test, folder / "test")
    )


def _read(path: Path) -> list[str]:
    try:
        raw = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return raw if path.suffix == ".raw" else [json.loads(row)["text"] for row in raw]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as texts ({error!r}); see texts.py") from None


def _split(documents: list[str], seed: str) -> list[list[str]]:
    unique = [*dict.fromkeys(documents)]
    chosen = set(random.Random(seed).sample(range(len(unique)), 2 * len(unique) // 3))
    return [[d for i, d in enumerate(unique) if (i in chosen) == use] for use in (True, False)]


def _write(texts: dict[str, list[str]], folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True)
    specs = {}
    for name, documents in texts.items():
        path = folder / f"{name}.jsonl"
        rows = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        path.write_text(rows, encoding="utf-8")
        specs[name] = str(path)
    return specs
