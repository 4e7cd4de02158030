"""Put the pages of the site together: the repository's, where they are, so that their links hold;
and a reference of every verb and public function, made from the code."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAGE = ROOT / "build" / "site-pages"


def main() -> None:
    shutil.rmtree(STAGE, ignore_errors=True)
    STAGE.mkdir(parents=True)
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if name.startswith(("src/", "findings/", "pieces")) and not name.endswith(".md"):
            continue
        target = STAGE / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    (STAGE / "docs" / "reference.md").write_text(reference(), encoding="utf-8")


def reference() -> str:
    import sleb
    from sleb.cli.main import COMMAND
    from sleb.cli.verbs import VERBS

    os.environ["COLUMNS"] = "100"
    lines = [
        "# Reference",
        "",
        "Made from the code: every verb with its options, every function.",
        "",
    ]
    lines += ["## Command line", ""]
    for verb in VERBS:
        command = COMMAND.get_command(None, verb.name)
        with command.make_context(f"sleb {verb.name}", [], resilient_parsing=True) as context:
            lines += [f"### sleb {verb.name}", "", "```text", command.get_help(context), "```", ""]
    lines += ["## Python", ""]
    for name in sleb.__all__:
        value = getattr(sleb, name)
        called = "" if inspect.isclass(value) else shown(value)
        lines += [
            f"### sleb.{name}",
            "",
            *called,
            "```text",
            inspect.getdoc(value) or "",
            "```",
            "",
        ]
    return "\n".join(lines)


def shown(function: object) -> list[str]:
    """The signature of a function, a parameter a line."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    rows = [f"    {parameter}," for parameter in signature.parameters.values()]
    name = getattr(function, "__name__", "")
    return ["```python", f"{name}(", *rows, f") -> {signature.return_annotation}", "```", ""]


if __name__ == "__main__":
    sys.exit(main())
