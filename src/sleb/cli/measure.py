"""The verbs that gather evidence: what the smaller model does, how fast, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sleb.cli import show
from sleb.cli.options import Device, Dtype, Force, Json, Model, Record, Threads, Trust, searching
from sleb.cli.progress import terminal_progress
from sleb.core.errors import InputError
from sleb.core.files import writable_target
from sleb.core.process_group import group

__all__ = ["bench", "check_record", "compare", "init", "report", "run", "save", "transfer"]


def compare(
    model: Model,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The pruned checkpoint.")],
    prompts: Annotated[
        str, typer.Option(metavar="FILE", help="Your prompts: .jsonl, or .txt with one a line.")
    ],
    new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    device: Device = "auto",
    dtype: Dtype = "auto",
    record: Record = None,
    json: Json = False,
    trust_remote_code: Trust = False,
) -> int:
    """Your own prompts through both models: what changed in the answers."""
    from sleb.evaluation.answers import compare as answer
    from sleb.evaluation.answers import read_prompts

    asked = read_prompts(prompts)
    check_record(record)
    found = answer(
        model,
        out,
        asked,
        max_new_tokens=new_tokens,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=terminal_progress(),
    )
    show.result(found, json)
    save(record, json, answers=found)
    return 0


def bench(
    model: Model,
    outs: Annotated[
        list[str] | None, typer.Argument(metavar="[OUT]...", help="Pruned checkpoints.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Times each case is run.", min=1)] = 6,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller cases, for a CPU.")] = False,
    draft: Annotated[
        bool,
        typer.Option("--draft", help="Time each OUT as the draft of MODEL, and nothing else."),
    ] = False,
    draft_tokens: Annotated[int, typer.Option(help="Tokens drafted at a time.", min=1)] = 4,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts to draft for. Default: embedded text."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    record: Record = None,
    json: Json = False,
    trust_remote_code: Trust = False,
) -> int:
    """Speed and memory, dense and pruned in turn, against what is possible."""
    from sleb.runtimes.bench import bench as measure

    check_record(record)
    if draft:
        from sleb.evaluation.prompts import read_prompts
        from sleb.runtimes.speculative import draft as write

        drafted = write(
            model,
            outs or (),
            read_prompts(prompts) if prompts else (),
            draft_tokens=draft_tokens,
            new_tokens=16 if quick else 64,
            runs=runs,
            device=device,
            dtype=dtype,
            threads=threads,
            trust_remote_code=trust_remote_code,
            progress=terminal_progress(),
        )
        show.result(drafted, json)
        save(record, json, draft=drafted)
        return 0
    if prompts:
        raise InputError("--prompts is for --draft; give that too, or leave it out")
    found = measure(
        model,
        outs or (),
        runs=runs,
        quick=quick,
        device=device,
        dtype=dtype,
        threads=threads,
        trust_remote_code=trust_remote_code,
        progress=terminal_progress(),
    )
    show.result(found, json)
    save(record, json, speed=found)
    return 0


@searching
def transfer(model: Model, record: Record = None, **options: Any) -> int:
    """Search on each --text and on all of them, and score every choice on every text."""
    from sleb.config import TransferConfig
    from sleb.evaluation.transfer import check_transfer
    from sleb.evaluation.transfer import transfer as measure
    from sleb.models.load import load

    json = options.pop("json")
    options.pop("force")
    config = TransferConfig.of({**options, "text": options["text"] or ()})
    check_transfer(config)
    check_record(record)
    progress = terminal_progress()
    names = ("dtype", "device", "stream", "device_map", "tp", "trust_remote_code")
    loaded = load(model, **{name: options[name] for name in names}, progress=progress)
    found = measure(loaded, config, progress=progress)
    show.result(found, json)
    save(record, json, transfer=found)
    return 0


def init(
    out: Annotated[str, typer.Option("--out", "-o", help="File to write.")] = "sleb.toml",
    model: Annotated[
        str, typer.Option("--model", help="Folder, hub id, or .gguf file.")
    ] = "./model",
    force: Force = False,
) -> int:
    """Write a commented project file for `sleb run`."""
    writable_target(Path(out), force=force, folder=False)
    from sleb.project import write_project

    write_project(Path(out), model)
    show.note(f"{out} written; set the model and the texts in it, then: sleb run {out}", False)
    return 0


def run(
    project: Annotated[str, typer.Argument(metavar="FILE", help="Project file from sleb init.")],
    force: Force = False,
    json: Json = False,
) -> int:
    """Do all that a project file asks for, from search to report. Exit code 3 if its gate fails."""
    from sleb.project import Project
    from sleb.project import run as work

    asked = Project.load(project)
    done = work(project, force=force, progress=terminal_progress())
    show.result(done, json)
    if done.gate is not None and not json:
        show.result(done.gate, json)
    for lang in asked.measure.reports:
        show.note(f"report written to {asked.target / f'report.{lang}.html'}", json)
    if done.gate is not None:
        done.gate.require()
    return 0


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder from sleb prune or sleb run.")],
    out: Annotated[str, typer.Option("--out", "-o", help="File to write.")] = "report.html",
    lang: Annotated[str, typer.Option(help="en or ja.")] = "en",
    force: Force = False,
) -> int:
    """Write what a run measured as one HTML page."""
    from sleb.views import write_report

    write_report(Path(run), Path(out), lang, force=force)
    show.note(f"report written to {out}", False)
    return 0


def check_record(folder: str | None, removed: tuple[int, ...] | None = None) -> None:
    """Refuse --record early where nothing could be recorded."""
    if folder is None:
        return
    from sleb.record import RunRecord

    known = RunRecord.load(folder)
    if removed is not None and known.removed != removed:
        raise InputError(
            f"--record {folder} is of a model without blocks {list(known.removed)}, and these are "
            f"{list(removed)}; give the plan that it was made with"
        )


def save(folder: str | None, json: bool, **sections: Any) -> None:
    """Add sections to a run record."""
    if folder is None or not group().is_main:
        return
    from sleb.record import RunRecord

    RunRecord.update(folder, **sections)
    show.note(f"recorded in {Path(folder) / 'run.json'}", json)
