"""Put the pages of the site together: the repository's, where they are, so that their links hold;
and, made from the code, a reference of every verb and public function, and all messages."""

import ast
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

from sleb.core import errors

ROOT = Path(__file__).parents[1]
RAISED = {kind.__name__ for kind in errors.SlebError.__subclasses__()}
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
    (STAGE / "docs" / "messages.md").write_text(message_page(), encoding="utf-8")


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


def messages() -> dict[int, set[str]]:
    """What sleb ends with, by exit code, as the code has it; … stands for what a run fills in."""
    found: dict[int, set[str]] = {}
    for path in (ROOT / "src" / "sleb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            code, text = message(node, path.name)
            for said in texts(text):
                if said.strip("…: "):
                    found.setdefault(code, set()).add(" ".join(said.split()))
    return dict(sorted(found.items()))


def message(node: ast.AST, file: str) -> tuple[int, ast.expr | None]:
    """Exit code and text where a node makes an error, or is a row of ``map_exceptions``."""
    kinds = {name: kind.exit_code for name, kind in vars(errors).items() if name in RAISED}
    if file == "config.py":  # the checks of options
        kinds["ValueError"] = 2
    if isinstance(node, ast.Tuple) and len(node.elts) == 3 and name_of(node.elts[1]) in kinds:
        return kinds[name_of(node.elts[1])], node.elts[2]
    if isinstance(node, ast.Call) and node.args:
        if (name := name_of(node.func)) in kinds:
            return kinds[name], node.args[0]
        if name == "_fail" and isinstance(code := node.args[-1], ast.Constant):
            return int(str(code.value)), node.args[0]
    return 0, None


def name_of(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def texts(node: ast.expr | None) -> list[str]:
    """What a string in code may be, with … for what is filled in."""
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(texts(part)[0] for part in node.values)]
    if isinstance(node, ast.BinOp):
        return [one + two for one in texts(node.left) for two in texts(node.right)]
    return ["…"]


def message_page() -> str:
    """All messages, by exit code."""
    lines = [
        "# Messages",
        "",
        "Made from the code: the lines that sleb ends with, by exit code, with … for what a run "
        "fills in. What to do about the common ones: [troubleshooting](troubleshooting.md).",
    ]
    for code, found in messages().items():
        lines += ["", f"## Exit code {code}", "", "```text", *sorted(found, key=str.lower), "```"]
    return "\n".join(lines) + "\n"


def shown(function: object) -> list[str]:
    """The signature of a function, a parameter a line."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    rows = [f"    {parameter}," for parameter in signature.parameters.values()]
    name = getattr(function, "__name__", "")
    return ["```python", f"{name}(", *rows, f") -> {signature.return_annotation}", "```", ""]


if __name__ == "__main__":
    sys.exit(main())
