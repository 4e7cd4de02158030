"""`sleb eval`: perplexity or tasks of a model, and of the same model cut by a plan."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sleb.cli import show
from sleb.cli.measure import check_record, save
from sleb.cli.options import (
    Batch,
    Depth,
    Device,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Record,
    Seed,
    Stream,
    TensorParallel,
    Text,
    Trust,
    Windows,
)
from sleb.cli.progress import terminal_progress
from sleb.core.errors import InputError

__all__ = ["evaluate"]


def evaluate(
    model: Model,
    text: Text = None,
    windows: Windows = None,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens per window. Default: 2048, or what the model reads.", min=2),
    ] = None,
    plan: Annotated[
        str | None, typer.Option("--plan", help="Also score the model cut by this plan.")
    ] = None,
    depth: Depth = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="NAME",
            help="Score a task in place of text; repeat for several. Your own .jsonl of questions, "
            "or a name that lm-evaluation-harness knows.",
        ),
    ] = None,
    tasks_folder: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where further tasks are defined (YAML).")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items per task.", min=1)] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch: Batch = None,
    stream: Stream = False,
    device_map: DeviceMap = None,
    tp: TensorParallel = 1,
    record: Record = None,
    json: Json = False,
    trust_remote_code: Trust = False,
) -> int:
    """Perplexity or tasks, with 95 % intervals; with --plan, dense and pruned side by side."""
    from sleb.core.plan import Plan

    chosen = Plan.load(plan) if plan else None
    if depth is not None and chosen is None:
        raise InputError("--depth is a depth of a plan; give the plan with --plan")
    if record and chosen is None:
        raise InputError("--record is for a pruned model's record; give its plan with --plan")
    if task and (text or windows or length):
        raise InputError("--task scores items, not windows of --text; run sleb eval once for each")
    if (tasks_folder or limit) and not task:
        raise InputError("--tasks-folder and --limit are for tasks; name them with --task")
    removed = chosen.at_depth(depth) if chosen else ()
    check_record(record, removed)
    from sleb.calibration import check_sources, load_windows
    from sleb.checkpoints.checkpoint import Checkpoint, check_fingerprint, fingerprint
    from sleb.evaluation.perplexity import evaluate as score
    from sleb.models.load import load
    from sleb.repairs import stored_repair

    check_sources(text or ())
    if task:
        from sleb.evaluation.tasks import check_tasks

        check_tasks(task, folder=tasks_folder)
    progress = terminal_progress()
    loaded = load(
        model,
        dtype=dtype,
        device=device,
        stream=stream,
        device_map=device_map,
        tp=tp,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    if chosen:
        identity = fingerprint(Checkpoint.open(loaded.source.path), len(loaded.stack))
        check_fingerprint(chosen.model, identity, model)
    patch = None
    if chosen and plan and removed == chosen.removed:
        fixed = stored_repair(chosen, Path(plan).parent, loaded)
        patch = partial(fixed.patch, loaded.stack) if fixed else None
    if task:
        from sleb.evaluation.tasks import run_tasks

        results = run_tasks(
            loaded,
            task=task,
            removed=removed,
            patch=patch,
            tasks_folder=tasks_folder,
            limit=limit,
            batch=batch,
            seed=seed,
            progress=progress,
        )
        show.result(results, json)
        save(record, json, tasks=results)
        return 0
    length = length or min(2048, loaded.stack.max_length or 2048)
    scored, _ = load_windows(
        loaded.tokenizer, text or (), windows=windows or "all", length=length, seed=seed
    )
    found = score(loaded, scored, removed=removed, patch=patch, batch=batch, progress=progress)
    show.result(found, json)
    from sleb.record import EvaluationText

    seen = EvaluationText(
        windows=found.windows, length=length, source="given", texts=tuple(text or ["default"])
    )
    save(record, json, evaluation=found, evaluation_text=seen)
    return 0
