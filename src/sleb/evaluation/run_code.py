"""Runs code that a model has written, with its tests, in a child with limits.

The child has a time, a memory and a scratch folder of its own, and no network. It is no sandbox:
the code can read what the user can, and write where the user may. Run it on a machine that may be
lost, or in a container.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sleb.core.errors import InputError

SECONDS = 10
MEMORY = 2 * 2**30
"""Bytes of address space."""
FILE = 16 * 2**20
"""Bytes of a file that is written, at most."""
NETWORK = 97
"""The child's exit code where the network cannot be taken from it."""
CHILD = Path(__file__).with_name("code_child.py")
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:```|$)", re.DOTALL | re.IGNORECASE)


def pass_all(answers: Sequence[str], tests: Sequence[str]) -> list[bool]:
    """Whether the code of each answer passes its tests; see :func:`passes`."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [*pool.map(passes, answers, tests)]


def passes(answer: str, tests: str) -> bool:
    """Whether a program of the answer's first fence, or of all of it, and the ``tests`` behind it
    ends without an error, within ``SECONDS`` and ``MEMORY``.

    Raises:
        InputError: the network cannot be taken from it here.
    """
    fenced = _FENCE.search(answer)
    source = f"{fenced[1] if fenced else answer}\n{tests}\n"
    limits = [str(limit) for limit in (SECONDS, MEMORY, FILE, NETWORK)]
    with tempfile.TemporaryDirectory(prefix="sleb-code-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(CHILD), *limits],
                input=source.encode(errors="replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    if done.returncode == NETWORK:
        raise InputError(
            "--run-code cannot take the network from the code here, which needs Linux and user "
            "namespaces: run it where they are allowed, or leave it out"
        )
    return done.returncode == 0
