"""`sleb verify`: the gates of exactness, the runtimes, and the limits of a gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sleb.cli import measure, show
from sleb.cli.options import Depth, Device, Dtype, Json, Stream, Trust
from sleb.cli.progress import terminal_progress
from sleb.cli.runtimes import Python, Runtime, RuntimeDtype, asked_runtimes
from sleb.core.errors import InputError

if TYPE_CHECKING:
    from sleb.surgery.verification import Verification

__all__ = ["verify"]


def verify(
    out: Annotated[str, typer.Argument(metavar="OUT", help="The pruned checkpoint.")],
    model: Annotated[str, typer.Option("--model", help="The original model.")],
    plan: Annotated[
        str | None, typer.Option("--plan", help="The plan. Default: OUT/plan.json.")
    ] = None,
    depth: Depth = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    stream: Stream = False,
    gate: Annotated[
        str | None,
        typer.Option("--gate", metavar="FILE", help="Limits on what OUT/run.json has recorded."),
    ] = None,
    runtime: Runtime = None,
    python: Python = None,
    runtime_dtype: RuntimeDtype = None,
    json: Json = False,
    trust_remote_code: Trust = False,
) -> int:
    """Prove that a checkpoint is the original without the plan's blocks, and with --runtime, that
    these run it as such. Exit code 3 if not, or if a limit of the gate is not kept."""
    from sleb.core.plan import Plan

    tried = asked_runtimes(runtime, python)
    beside = _plan_of(Path(out), bool(tried))
    loaded = Plan.load(plan or beside)
    judged = None
    if gate:
        from sleb.acceptance import Gate
        from sleb.record import RunRecord

        judged = Gate.load(gate).check(RunRecord.load(out))
    found: Verification | None = None
    if Path(out).is_dir():
        from sleb.surgery.verification import verify as check

        found = check(
            out,
            model=model,
            plan=loaded,
            depth=depth,
            dtype=dtype,
            device=device,
            stream=stream or None,
            trust_remote_code=trust_remote_code,
            progress=terminal_progress(),
        )
    ran = None
    if tried and (found is None or found.passed):
        from sleb.runtimes.compatibility import check_runtimes

        ran = check_runtimes(
            out,
            model=model,
            plan=loaded,
            runtimes=tried[0],
            pythons=tried[1],
            depth=depth,
            dtype=runtime_dtype or dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=terminal_progress(),
        )
    parts = {"verification": found, "runtimes": ran, "gate": judged}
    shown = {name: part for name, part in parts.items() if part}
    show.result(found if set(shown) == {"verification"} else shown, json)
    if found:
        found.require()
    if ran:
        if (Path(out) / "run.json").is_file():
            measure.save(out, json, runtimes=ran)
        ran.require()
    if judged:
        measure.save(out, json, gate=judged)
        judged.require()
    return 0


def _plan_of(out: Path, running: bool) -> Path:
    """The plan that lies with a checkpoint. A GGUF file can only be run, as no gate reads it."""
    if out.is_dir():
        return out / "plan.json"
    if out.suffix != ".gguf" or not out.is_file():
        raise InputError(f"no checkpoint folder at {out}; make one with: sleb apply")
    if not running:
        raise InputError(f"{out} is a GGUF file, which is verified by running it: --runtime")
    from sleb.surgery.gguf_cut import plan_beside

    return plan_beside(out)
