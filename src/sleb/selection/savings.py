"""What each unit saves of time, memory or cache where the model is to run: measured here, for texts
of a given length, so many at once. A loss for each of these is how unlike units compare."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.plan import Saving
from sleb.core.progress import Progress, silent
from sleb.core.units import MLP, block_of, part_of
from sleb.models.decoding import WARM_UP, capturable, writing
from sleb.models.stack import BlockStack
from sleb.selection.targets import Costs

ROUNDS, STEPS = 6, 12
"""Each variant writes ``STEPS`` tokens in each of ``ROUNDS`` turns."""
NEW = 2 + WARM_UP + ROUNDS * STEPS
LENGTH = 2048


def default_length(stack: BlockStack) -> int:
    """Tokens that texts begin with: 2048, or what the model reads less what is written."""
    room = stack.max_length
    return LENGTH if room is None else max(1, min(LENGTH, room - NEW))


def measure_savings(
    stack: BlockStack,
    costs: Costs,
    units: Sequence[int],
    saving: Saving,
    progress: Progress = silent,
) -> Saving:
    """``saving`` with the share that each of ``units`` has: of the bytes of all weights
    (``memory``), of the bytes of keys and values (``kv``), or of the seconds that a written token
    takes (``time``).

    Raises:
        InputError: the model does not read so many tokens.
        UnsupportedModel: tokens cannot be timed, as layers have windows.
    """
    if saving.of == "memory":
        shares = {unit: costs.of_units([unit]) / costs.total for unit in units}
    elif saving.of == "kv":
        shares = _cached(stack, units, saving.context)
    else:
        shares = _timed(stack, units, saving, progress)
    return saving.model_copy(update={"shares": {str(u): round(s, 6) for u, s in shares.items()}})


def _cached(stack: BlockStack, units: Sequence[int], context: int) -> dict[int, float]:
    each = cache_bytes(stack, context)
    total = sum(each) or 1
    return {u: 0.0 if part_of(u) == MLP else each[block_of(u)] / total for u in units}


@torch.inference_mode()
def cache_bytes(stack: BlockStack, context: int) -> list[int]:
    """Bytes that each block's keys and values of a text of ``context`` tokens take, by what a few
    tokens leave in the cache; a window holds no more than its length."""
    ids = torch.ones((1, 4), dtype=torch.long, device=stack.input_device)
    cache = stack.model(input_ids=ids, use_cache=True).past_key_values
    each = []
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None) or context
        held = [x for x in (layer.keys, layer.values) if x is not None]
        each.append(sum(x.nbytes for x in held) // ids.numel() * min(context, window))
    return each


def _timed(
    stack: BlockStack, units: Sequence[int], saving: Saving, progress: Progress
) -> dict[int, float]:
    """Blocks of one shape cost the same, so all units of a kind are left out at once, and each has
    its part of the difference."""
    room = stack.max_length
    if room is not None and saving.context + NEW > room:
        raise InputError(
            f"--prompt-length {saving.context} leaves no room to write {NEW} tokens: {stack.name} "
            f"reads {room}"
        )
    if stack.input_device.type == "cuda" and not capturable(stack.model):
        raise UnsupportedModel(
            f"{stack.name} has windows or other parts that a written token cannot be timed with: "
            "use --save memory or --save kv"
        )
    kinds: dict[tuple[object, ...], list[int]] = {}
    for unit in units:
        block, part = block_of(unit), part_of(unit)
        if part == MLP or block not in stack.giving_positions:
            kinds.setdefault((part, *_shape(stack.blocks[block])), []).append(unit)
    variants = [(stack, units) for units in ((), *kinds.values())]
    seconds = step_seconds(variants, saving, progress)
    dense, *without = map(min, seconds)  # what else runs on the machine only adds
    shares = dict.fromkeys(units, 0.0)
    for same, one in zip(kinds.values(), without, strict=True):
        shares |= dict.fromkeys(same, max(0.0, (dense - one) / len(same) / dense))
    return shares


def _shape(block: nn.Module) -> tuple[object, ...]:
    return tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


@torch.inference_mode()
def step_seconds(
    variants: Sequence[tuple[BlockStack, Sequence[int]]],
    saving: Saving,
    progress: Progress = silent,
) -> list[list[float]]:
    """Seconds of a step that writes a token of each text, by turn, of each of ``variants``: a model
    without some units. All are on one device."""
    device = variants[0][0].input_device
    ids = torch.arange(saving.sequences * saving.context, device=device) % 97 + 1
    ids = ids.view(saving.sequences, saving.context)
    found: list[list[float]] = [[] for _ in variants]
    work = ROUNDS * len(variants)
    with ExitStack() as opened, progress.stage("timing blocks and their parts", work) as tick:
        runs = []
        for stack, units in variants:
            with stack.bypassed(units):
                made = writing(stack.model, ids, torch.ones_like(ids), NEW)
                runs.append(opened.enter_context(made)[0])
        for turn in range(ROUNDS):
            places = range(len(variants))
            for i in places if turn % 2 == 0 else reversed(places):
                with variants[i][0].bypassed(variants[i][1]):
                    found[i].append(_seconds(runs[i], device))
                tick(1)
    return found


def _seconds(run: object, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        run()  # type: ignore[operator]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS
