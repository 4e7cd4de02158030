"""Limits itself, then runs the program on stdin: the child of ``run_code.py``, which starts this
file by its path. Arguments: seconds, bytes of memory, bytes of a file, and the exit code that says
that the network cannot be taken away."""

from __future__ import annotations

import ctypes
import resource
import sys

NEW_USER, NEW_NET = (
    0x10000000,
    0x40000000,
)  # of unshare(2): a network of its own, with nothing in it


def main() -> None:
    """Run it."""
    seconds, memory, file, refused = map(int, sys.argv[1:])
    if sys.platform != "linux" or ctypes.CDLL(None).unshare(NEW_USER | NEW_NET):
        sys.exit(refused)
    for limit, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    sys.argv = ["-"]
    exec(compile(sys.stdin.read(), "answer", "exec"), {"__name__": "__main__"})  # noqa: S102


if __name__ == "__main__":
    main()
