"""Calling the command line in this process, and looking at what it leaves behind."""

import json
from dataclasses import dataclass
from pathlib import Path

from sleb.cli.main import COMMAND, main
from sleb.cli.verbs import VERBS

COMMANDS = {verb.name: COMMAND.get_command(None, verb.name) for verb in VERBS}
"""The verbs as typer commands."""


@dataclass(frozen=True)
class Ran:
    """A finished command: exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        """Standard output as strict JSON: nothing else may be in it, nor NaN or Infinity."""

        def refuse(name: str):
            raise AssertionError(f"{name} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


def run(capsys, *arguments) -> Ran:
    """``sleb ARGUMENTS`` in this process."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return Ran(code, captured.out, captured.err)


def refused(capsys, code: int, *arguments) -> str:
    """Run, and check that it ends as a mistake must: this exit code, nothing on stdout, and one
    line on stderr. Returns the line without its prefix."""
    ran = run(capsys, *arguments)
    assert ran.code == code, ran
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert len(lines) == 1, ran.err
    assert lines[0].startswith("sleb: ")
    return lines[0].removeprefix("sleb: ")


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, hidden files included: contents by path, None for a folder."""
    return {
        str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes()
        for p in sorted(folder.rglob("*"))
    }
