"""The options of the verbs, and the group of them that everything that searches shares."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

__all__ = [
    "Batch",
    "Compile",
    "Curve",
    "Depth",
    "Device",
    "DeviceMap",
    "Dtype",
    "Exact",
    "Force",
    "Heldout",
    "Json",
    "Keep",
    "Length",
    "MaxLossIncrease",
    "MaxMemory",
    "Metric",
    "MinSimilarity",
    "Model",
    "PlanFile",
    "Protect",
    "Record",
    "Remove",
    "RepairTokens",
    "Seed",
    "Size",
    "Speedup",
    "Strategy",
    "Stream",
    "TensorParallel",
    "Text",
    "Threads",
    "Trust",
    "Windows",
    "searching",
]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or .gguf file.")]
Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="SPEC",
        help="Text to measure on; repeat for several. A .txt, .jsonl or .parquet file, or "
        "hub:DATASET/CONFIG:SPLIT; append @2 for twice the share. Default: an embedded sample.",
    ),
]
Windows = Annotated[int | None, typer.Option(help="Number of token windows.", min=1)]
Length = Annotated[int, typer.Option(help="Tokens per window.", min=2)]
Seed = Annotated[int, typer.Option(help="Choice of windows.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")]
Batch = Annotated[
    int | None, typer.Option(help="Windows per forward pass. Default: measured.", min=1)
]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: measured.", min=1)]
Stream = Annotated[
    bool, typer.Option("--stream", help="Read blocks from disk as they run; one fits in memory.")
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES", help="With --stream: hidden states to hold, say 8GB. Default: half free."
    ),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Run blocks through torch.compile; for long searches on a GPU."),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="MAP",
        help="For a model larger than a device: auto spreads it over GPUs, memory and disk; or a "
        "JSON file of places. See docs/distributed.md.",
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tp", metavar="N", help="N processes of torchrun hold the model together.", min=1
    ),
]
Remove = Annotated[str | None, typer.Option(help="Target: blocks to remove, 6 or 20%.")]
MaxLossIncrease = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Target: as many blocks as keep the held-out loss within NATS per token of the "
        "dense model's (95 % bound); 0.1 is 10.5 % more perplexity.",
    ),
]
Speedup = Annotated[
    float | None,
    typer.Option(metavar="X", help="Target: X times as fast at generating (estimated), say 1.25."),
]
Size = Annotated[
    str | None, typer.Option(metavar="BYTES", help="Target: weights of at most, say, 100MB.")
]
Curve = Annotated[
    bool, typer.Option("--curve", help="Measure every depth on held-out text, for choosing one.")
]
Heldout = Annotated[int, typer.Option(help="Windows to set aside for quality.", min=0)]
Metric = Annotated[
    str,
    typer.Option(
        help="loss (SLEB), one-shot-loss, cosine, kl or repaired-loss. See docs/method.md."
    ),
]
Strategy = Annotated[
    str | None,
    typer.Option(
        help="greedy, one-shot, window, beam, refine or greedy-or-window. Default: the metric's "
        "own; the last one for prune --remove with a repair."
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact/--race",
        help="Score all candidates, as published; or give up early on those clearly worse.",
    ),
]
Protect = Annotated[str, typer.Option(help="Blocks that stay: 0,5-7,-1; '' for none.")]
MinSimilarity = Annotated[
    str | None,
    typer.Option(metavar="X", help="Candidates are blocks at least this similar; or auto."),
]
RepairTokens = Annotated[
    int | None,
    typer.Option(
        help="Tokens that a repair is fitted on, at most; one in three is the model's own. By "
        "default 100,000, on a GPU up to 400,000.",
        min=1,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Keep = Annotated[
    bool,
    typer.Option(
        "--keep/--no-keep",
        help="Keep in OUT/rollback what sleb restore needs to take the cut back.",
    ),
]
Depth = Annotated[int | None, typer.Option(help="Use only the plan's first DEPTH removals.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings.")
]
Record = Annotated[
    str | None,
    typer.Option(metavar="RUN", help="Add the result to RUN/run.json, for gate and report."),
]
PlanFile = Annotated[str, typer.Argument(metavar="PLAN", help="Plan from sleb search.")]


def _searching(
    remove: Remove = None,
    max_loss_increase: MaxLossIncrease = None,
    speedup: Speedup = None,
    size: Size = None,
    curve: Curve = False,
    metric: Metric = "loss",
    strategy: Strategy = None,
    exact: Exact = False,
    text: Text = None,
    windows: Windows = None,
    heldout: Heldout = 16,
    length: Length = 256,
    protect: Protect = "0,-1",
    min_similarity: MinSimilarity = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch: Batch = None,
    threads: Threads = None,
    stream: Stream = False,
    device_map: DeviceMap = None,
    tp: TensorParallel = 1,
    max_memory: MaxMemory = None,
    compile: Compile = False,
    force: Force = False,
    json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Options of a search; names and defaults are those of :func:`sleb.search`."""


def searching(verb: Callable[..., int]) -> Callable[..., int]:
    """Give ``verb(..., **options)`` the options of a search, as a signature that typer reads."""
    hints = {
        **get_type_hints(_searching, include_extras=True),
        **get_type_hints(verb, include_extras=True),
    }
    own, shared = inspect.signature(verb), inspect.signature(_searching)
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters = [p.replace(annotation=hints[p.name]) for p in (*kept, *shared.parameters.values())]

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> int:
        return verb(*args, **kwargs)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
