"""Commands of several builds side by side: from typing one to the prompt, by phase, and memory.

    python benchmarks/end_to_end.py MODEL --build old=OLD/src --build new=src \
        --tasks prune,search --text A.txt --text B.txt --remove 6 -o out.json

A build is a folder to import sleb from. Each command is a process of its own with an empty cache,
and the builds take turns; with ``--together`` they run at the same time, for a machine with cores
for all. A command that takes longer than ``--limit`` is ended. Results are shown by
performance.py --render.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from command import STATS
from common import asked, save, setting

PRUNE = ["prune", "MODEL", "-o", "OUT", "--remove", "N", "OPTIONS", "TEXT"]
TASKS: dict[str, list[str]] = {
    "help": ["--help"],
    "refused": ["prune", "MODEL", "-o", "OUT", "--remove", "N", "--metric", "nonsense"],
    "inspect": ["inspect", "MODEL"],
    "load": ["load", "MODEL"],
    "search": ["search", "MODEL", "-o", "OUT", "--remove", "N", "OPTIONS", "TEXT"],
    "fit": ["fit", "MODEL", "BLOCKS", "100000", "FILES"],
    "prune": PRUNE,
    "prune without answers": [*PRUNE, "--prompts", "none"],
    "demo": ["demo", "--model", "MODEL", "-o", "OUT"],
}
LATER = {"prune without answers": "prune"}
"""Tasks with an option that old builds lack: there they are another task."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--build", action="append", required=True, metavar="NAME=SRC")
    parser.add_argument("--tasks", required=True, help=", ".join(TASKS))
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--remove", default="6")
    parser.add_argument("--blocks", default="", help="of the fit, with commas")
    parser.add_argument("--options", default="", help="of search and prune")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds of one command")
    parser.add_argument("--together", action="store_true", help="the builds at the same time")
    parser.add_argument("-o", "--out", type=Path, required=True)
    return parser.parse_args()


def command_of(task: str, options: argparse.Namespace, out: Path) -> list[str]:
    """The words of a task."""
    fill = {
        "MODEL": [options.model],
        "OUT": [str(out)],
        "N": [options.remove],
        "BLOCKS": [options.blocks],
        "OPTIONS": options.options.split(),
        "TEXT": [word for text in options.text for word in ("--text", text)],
        "FILES": options.text,
    }
    return [word for part in TASKS[task] for word in fill.get(part, [part])]


def run(task: str, build: str, source: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One command: exit code, seconds in all and by phase, peak memory in GB."""
    row: dict[str, Any] = {"task": task, "build": build}
    if task in LATER and not (source / "sleb/config.py").is_file():
        task = LATER[task]
    with tempfile.TemporaryDirectory() as place:
        out, stats = Path(place) / "out", Path(place) / "stats.json"
        known = {STATS: str(stats), "PYTHONPATH": f"{source}:{os.environ.get('PYTHONPATH', '')}"}
        known |= {"SLEB_CACHE": str(Path(place) / "cache")}
        child = Path(__file__).with_name("command.py")
        words = [sys.executable, str(child), *command_of(task, options, out)]
        start = time.perf_counter()
        process = subprocess.Popen(
            words,
            env=os.environ | known,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        ended: list[Any] = []
        errors: list[str] = []

        def reap() -> None:
            assert process.stderr
            errors.extend(process.stderr.readlines())
            ended.append(os.wait4(process.pid, 0))

        waits = Thread(target=reap)
        waits.start()
        waits.join(options.limit)
        if waits.is_alive():
            process.kill()
            waits.join()
            return row | {"over_s": options.limit}
        _, status, used = ended[0]
        row |= {
            "code": os.waitstatus_to_exitcode(status),
            "wall_s": round(time.perf_counter() - start, 2),
            "rss_gb": round(used.ru_maxrss / 1e6, 2),
        }
        if stats.is_file():
            row |= json.loads(stats.read_text())
        if row["code"] and task != "refused":
            row["error"] = "".join(errors[-3:])
        if (out / "run.json").is_file():
            record = json.loads((out / "run.json").read_text())
            row |= {"removed": record["removed"], "phases": record["seconds"]}
        elif out.is_file():
            row["order"] = json.loads(out.read_text())["order"]
        return row


def main() -> None:
    options = parse()
    builds = {name: Path(source) for name, _, source in (b.partition("=") for b in options.build)}
    report: dict[str, Any] = {
        "model": Path(options.model).name,
        **setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16),
        "cores": len(os.sched_getaffinity(0)),
        "what": asked(options, "model", "build", "text", "out"),
        "commands": [],
    }

    def add(task: str, build: str) -> None:
        row = run(task, build, builds[build], options)
        report["commands"].append(row)
        save(options.out, report)
        print(json.dumps(row)[:400], flush=True)

    for task in options.tasks.split(","):
        threads = [Thread(target=add, args=(task, build)) for build in builds]
        for thread in threads:
            thread.start()
            if not options.together:
                thread.join()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
