"""Zero-shot accuracy for benchmarks/quality.py: tasks of examples/tasks on local files of items."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sleb.core.errors import InputError
from sleb.core.progress import silent
from sleb.core.statistics import flips, proportion
from sleb.models.load import LoadedModel
from sleb.selection.sweep import Patch

__all__ = ["Tasks", "local_tasks"]

EXAMPLES = Path(__file__).parents[1] / "examples" / "tasks"


class Tasks:
    """Zero-shot tasks, read once, and the dense model's score of every item of theirs."""

    def __init__(
        self, model: LoadedModel, names: Sequence[str], folder: Path, limit: int | None, seed: int
    ) -> None:
        from sleb.evaluation.lm_eval import Harness

        self.harness = Harness(model, batch=None, progress=silent)
        self.found = self.harness.load([], names, folder, limit=limit, seed=seed)
        self._dense = {task.name: self.harness.score(task) for task in self.found}
        for name, scores in self._dense.items():
            if set(scores.values) - {0.0, 1.0}:
                raise InputError(f"task {name!r} does not score items as right or wrong")

    def dense(self) -> dict[str, Any]:
        """Accuracies of the dense model."""
        rows = {
            task.name: {
                "metric": task.metric,
                "items": len(self._dense[task.name].values),
                "chance": self._dense[task.name].chance,
                **_accuracy(self._dense[task.name].values),
            }
            for task in self.found
        }
        return _with_mean(rows)

    def score(self, removed: Collection[int], patch: Patch | None) -> dict[str, Any]:
        """Accuracies without ``removed`` blocks, and what flipped against the dense model."""
        rows = {}
        for task in self.found:
            values = self.harness.score(task, removed, patch).values
            before = self._dense[task.name].values
            change = flips([v == 1 for v in before], [v == 1 for v in values])
            rows[task.name] = {**_accuracy(values), "lost": change.lost, "won": change.won}
        return _with_mean(rows)


def _accuracy(values: Sequence[float]) -> dict[str, Any]:
    return {"accuracy": asdict(proportion(int(sum(values)), len(values)))}


def _with_mean(rows: dict[str, Any]) -> dict[str, Any]:
    return {"mean": float(np.mean([row["accuracy"]["value"] for row in rows.values()])), **rows}


def local_tasks(data: Path, names: Sequence[str], folder: Path) -> list[str]:
    """The public tasks of examples/tasks, on the files in ``data``: their names, which are defined
    in ``folder`` then.

    Raises:
        InputError: there is no such example, or no file for it.
    """
    examples = {path.stem.removesuffix("_local"): path for path in EXAMPLES.glob("*_local.yaml")}
    if unknown := [name for name in names if name not in examples]:
        known = ", ".join(sorted(examples))
        raise InputError(f"no task {unknown[0]!r} in examples/tasks; it has {known}")
    folder.mkdir()
    for task, path in examples.items():  # all, since some include others
        text = path.read_text(encoding="utf-8")
        files = sorted((data / "zeroshot").glob(f"{task}*.jsonl"), key=lambda f: len(f.name))
        if files:
            text = text.replace(f"data/{task}.jsonl", json.dumps(str(files[0].resolve())))
        elif task in names:
            raise InputError(f"no file {task}*.jsonl in {data / 'zeroshot'}; leave the task out")
        (folder / path.name).write_text(text, encoding="utf-8")
    return [f"{name}_local" for name in names]
