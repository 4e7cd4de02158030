"""The verbs: their options, and the one library call that each makes.

Heavy imports are inside the functions, so that `sleb --help` is quick. Results go to stdout, as
tables or with --json as JSON; progress and messages go to stderr.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sleb.cli import gguf, measure, show
from sleb.cli.evaluate import evaluate
from sleb.cli.heal import heal
from sleb.cli.options import (
    Batch,
    Depth,
    Device,
    DeviceMap,
    Dtype,
    Force,
    Json,
    Keep,
    Length,
    Model,
    PlanFile,
    RepairTokens,
    Seed,
    Stream,
    TensorParallel,
    Text,
    Trust,
    Windows,
    searching,
)
from sleb.cli.progress import terminal_progress
from sleb.cli.quantize import Scheme, check_quantized, quantize, quantized
from sleb.cli.restore import restore
from sleb.cli.share import export, push
from sleb.cli.verify import verify
from sleb.core.errors import InputError
from sleb.core.files import writable_target
from sleb.core.process_group import Lost, group, main_process_first

__all__ = ["Interrupted", "register"]


def inspect(model: Model, json: Json = False, trust_remote_code: Trust = False) -> int:
    """Show a model's blocks, depth-dependent config fields, and what a cut would save."""
    from sleb.models.describe import describe

    found = describe(model, trust_remote_code=trust_remote_code, progress=terminal_progress())
    show.result(found, json)
    return 0 if found.supported else 4


def similarity(
    model: Model,
    text: Text = None,
    measure: Annotated[
        str, typer.Option(help="cosine, angular, correlation, cka or relative-l2.")
    ] = "cosine",
    windows: Windows = None,
    length: Length = 256,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch: Batch = None,
    stream: Stream = False,
    device_map: DeviceMap = None,
    tp: TensorParallel = 1,
    json: Json = False,
    trust_remote_code: Trust = False,
) -> int:
    """Compare the outputs of blocks: the first of the method's three stages."""
    from sleb.calibration import check_sources, load_windows
    from sleb.models.load import load
    from sleb.selection.similarity import MEASURES, measure_similarity

    MEASURES[measure]
    check_sources(text or ())
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
    scored, _ = load_windows(
        loaded.tokenizer, text or (), windows=windows, length=length, seed=seed
    )
    found = measure_similarity(loaded, scored, measure=measure, batch=batch, progress=progress)
    show.result(found, json)
    return 0


@searching
def search(
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="Plan file to write.")] = "plan.json",
    **options: Any,
) -> int:
    """Find the blocks whose removal costs least, and write the plan."""
    asked, force, json = _asked(options)
    writable_target(Path(out), force=force, folder=False)
    from sleb.repairs.search import search as find

    plan = find(model, **asked, journal=f"{out}.journal", progress=terminal_progress())
    if group().is_main:
        plan.save(out)
    show.result(plan, json)
    show.note(f"plan written to {out}; next: sleb apply {out} {model} -o OUT", json)
    return 0


def apply(
    plan: PlanFile,
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the new checkpoint.")],
    depth: Depth = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Re-fit matrices around the gaps, on --text.")
    ] = False,
    repair_tokens: RepairTokens = None,
    keep: Keep = True,
    repaired: gguf.Repaired = None,
    other_weights: gguf.OtherWeights = False,
    text: Text = None,
    length: Length = 256,
    device: Device = "auto",
    dtype: Dtype = "auto",
    stream: Stream = False,
    device_map: DeviceMap = None,
    force: Force = False,
    json: Json = False,
    trust_remote_code: Trust = False,
) -> int:
    """Write the checkpoint without the plan's blocks, shard by shard, without loading it; or cut a
    GGUF file, if MODEL and OUT both end in .gguf."""
    from sleb.core.plan import Plan

    loaded = Plan.load(plan)
    removed = loaded.at_depth(depth)
    if text and not repair:
        raise InputError("--text is what --repair is fitted on; give --repair too, or leave it out")
    if (stream or device_map) and not repair:
        raise InputError(
            "only --repair loads blocks, which --stream or --device-map place; give --repair too, "
            "or leave them out"
        )
    of_gguf: dict[str, Any] = {
        "depth": depth,
        "repaired": repaired,
        "other_weights": other_weights,
        "force": force,
    }
    as_gguf = gguf.wanted(loaded, plan, model, out, repair=repair, **of_gguf)
    if not as_gguf:
        writable_target(Path(out), force=force)
    from sleb.surgery.apply import apply as cut

    fixed = None
    if repair:
        from sleb.calibration import check_sources
        from sleb.models.load import load
        from sleb.repairs import fit_repair
        from sleb.repairs.self_generated import can_generate

        check_sources(text or ())
        progress = terminal_progress()
        dense = load(
            model,
            dtype=dtype,
            device=device,
            stream=stream,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        fixed = fit_repair(
            dense,
            removed,
            text=text or (),
            length=length,
            tokens=repair_tokens,
            progress=progress,
        )
        if not can_generate(dense.stack):
            show.note(
                "the repair was fitted on all of the given texts (blocks that are fetched when "
                "they run write none)",
                json,
            )
        del dense

    if as_gguf:
        return gguf.apply(loaded, model, out, repair=fixed, json=json, **of_gguf)
    cut(
        loaded,
        model,
        out,
        depth=depth,
        repair=fixed,
        keep=keep,
        force=force,
        trust_remote_code=trust_remote_code,
        progress=terminal_progress(),
    )
    left = loaded.model.blocks - len(removed)
    done = {"out": out, "removed": removed, "blocks": left}
    if fixed:
        done["repair"] = fixed.record.model_dump(mode="json")
    show.result(done, json)
    show.note(f"next: sleb verify {out} --model {model}", json)
    return 0


@searching
def prune(
    context: typer.Context,
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the new checkpoint.")],
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair",
            help="Re-fit matrices around the gaps to make up for them. Default: where possible.",
        ),
    ] = None,
    repair_tokens: RepairTokens = None,
    keep: Keep = True,
    quantize: Scheme = None,
    **options: Any,
) -> int:
    """Search, cut, repair and prove; OUT holds the checkpoint, plan, run record and card."""
    asked, force, json = _asked(options)
    if quantize:
        check_quantized(out, quantize, force=force)
    asked |= {"repair": repair, "repair_tokens": repair_tokens, "keep": keep}
    writable_target(Path(out), force=force)
    from sleb.pipeline import prune as run

    done = run(model, out, **asked, force=force, command=context.obj, progress=terminal_progress())
    if not json:
        from sleb.views import depths

        show.show((done.record, *depths(done.plan)))
    show.note(f"checkpoint written to {out}", json)
    if quantize:
        if not main_process_first():
            return 0
        rounded = quantized(out, quantize, options, force=force)
        if not json:
            show.result(rounded, json)
        show.note(f"quantized checkpoint written to {rounded.path}", json)
        if json:
            show.result({"run": done.record, "quantized": rounded}, json)
    elif json:
        show.result(done.record, json)
    return 0


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="The model; default: the SmolLM2 that make demo fetched."),
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write.")] = "sleb-demo",
) -> int:
    """Prune a small real model by 20 % and show what came of it."""
    from sleb.cli.demo import run

    return run(model, Path(out), terminal_progress())


def _asked(options: dict[str, Any]) -> tuple[dict[str, Any], bool, bool]:
    """What the library is asked for, apart from --force and --json. A wrong name or target is
    refused before anything is loaded."""
    from sleb.config import SearchConfig
    from sleb.selection.request import check_options

    force, json = options.pop("force"), options.pop("json")
    options = {**options, "text": tuple(options["text"] or ())}
    check_options(SearchConfig.of(options))
    return options, force, json


EXAMPLES: dict[str, tuple[Callable[..., int], str]] = {
    "inspect": (inspect, "sleb inspect HuggingFaceTB/SmolLM2-135M-Instruct"),
    "similarity": (similarity, "sleb similarity ./model --text mail.jsonl --measure angular"),
    "search": (search, "sleb search ./model --curve --text mail.jsonl -o plan.json"),
    "apply": (apply, "sleb apply plan.json ./model -o ./smaller --depth 3"),
    "restore": (restore, "sleb restore ./smaller -o ./model-again"),
    "verify": (verify, "sleb verify ./smaller --model ./model --plan plan.json"),
    "eval": (evaluate, "sleb eval ./model --text test.txt --plan plan.json"),
    "prune": (prune, "sleb prune ./model --remove 20% -o ./smaller"),
    "quantize": (
        quantize,
        "sleb quantize ./smaller --scheme w4a16 --text mail.jsonl -o ./smaller-w4a16",
    ),
    "heal": (heal, "sleb heal ./smaller --model ./model --text mail.jsonl -o ./healed"),
    "compare": (measure.compare, "sleb compare ./model ./smaller --prompts prompts.jsonl"),
    "bench": (measure.bench, "sleb bench ./model ./smaller --quick"),
    "transfer": (
        measure.transfer,
        "sleb transfer ./model --text mail=mail.jsonl --text code=code.txt --remove 20%",
    ),
    "init": (measure.init, "sleb init --model ./model"),
    "run": (measure.run, "sleb run sleb.toml"),
    "report": (measure.report, "sleb report ./smaller -o report.html --lang ja"),
    "export": (export, "sleb export plan.json --as mergekit --model ./model -o merge.yml"),
    "push": (push, "sleb push ./smaller me/smaller --private"),
    "demo": (demo, "sleb demo"),
}


TOGETHER = {"search", "similarity", "eval", "prune", "transfer"}
"""Verbs whose work the processes of a job share. The first does the others alone."""


class Interrupted(Exception):
    """Ctrl-C while a verb ran; says how to go on."""


def register(app: typer.Typer) -> None:
    """Add every verb to ``app``."""
    for name, (function, example) in EXAMPLES.items():
        app.command(name, epilog=f"Example: {example}")(_interruptible(name, function))


def _interruptible(name: str, function: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> int:
        if group().several and name not in TOGETHER and not main_process_first():
            return 0
        try:
            code = function(*args, **kwargs)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            why = "interrupted, or another process has ended" if group().several else "interrupted"
            raise Interrupted(f"{why}; {_how_to_go_on(kwargs.get('out'))}") from None
        except Lost as error:
            raise Lost(f"{error}; {_how_to_go_on(kwargs.get('out'))}") from None
        except BrokenPipeError:  # the reader of stdout has gone, as `head` does
            return 0
        finally:
            try:
                sys.stdout.flush()
            except OSError:  # reported by now; else Python would meet it again when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return run


def _how_to_go_on(out: str | None) -> str:
    journal = Path(f"{Path(out)}.journal") if out else None
    if journal and journal.exists():
        with_any = ", with any number of processes" if group().several else ""
        return f"scores so far are in {journal}: repeat the command to go on{with_any}"
    state = Path(f"{Path(out)}.heal") if out else None
    if state and state.exists():
        return f"the training so far is in {state}: repeat the command to go on"
    return "nothing was written"
