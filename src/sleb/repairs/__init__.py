"""Closed-form repair of a cut: a few matrices around each gap are re-fitted to make up for it.

    found = repair(model, plan.removed, windows, heldout)
    found.record     # what was changed and gained on held-out windows: goes into the plan
    found.tensors    # the new matrices, by their names in the checkpoint: go into the cut

Nothing is added and no shape changes, so the result is as stock a checkpoint as the plain cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sleb.calibration.split import SHARE, CalibrationSplit
from sleb.calibration.windows import Windows
from sleb.checkpoints.checkpoint import TORCH_DTYPES, Checkpoint, tensor_bytes
from sleb.checkpoints.cut import Cut
from sleb.config import RepairConfig
from sleb.core.errors import UnsupportedModel
from sleb.core.plan import Plan, RepairedGap, RepairedTensor, RepairRecord
from sleb.core.progress import Progress, silent
from sleb.core.statistics import Values, standard_error
from sleb.core.units import block_of, parts_in
from sleb.models.load import LoadedModel
from sleb.models.overrides import WeightOverrides
from sleb.models.quantization_names import quant_method
from sleb.models.stack import BlockStack
from sleb.models.stored_names import as_parameters, block_prefix
from sleb.repairs.answering import with_answers, writer
from sleb.repairs.regression import REACH, Gap, Regression, default_tokens, gaps
from sleb.repairs.residual_writers import ResidualWriters, find_residual_writers
from sleb.repairs.self_generated import can_generate, with_self_generated
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.sweep import Sweep

RIDGES = (0.1, 1.0, 10.0)
"""Ridges tried in turn, as shares of the Gram matrix's mean diagonal: each next one is a smaller
step away from the original weights."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Repair:
    """New tensors by name in the original checkpoint, in its dtypes, on the CPU; and the record.
    ``prompts_seen``: see :class:`sleb.core.plan.Plan`."""

    record: RepairRecord
    tensors: Mapping[str, Tensor] = field(repr=False)

    prefix: str
    prompts_seen: Collection[str] = ()

    def __str__(self) -> str:
        fitted = sum(gap.ridge is not None for gap in self.record.gaps)
        around = f"around {fitted} of {len(self.record.gaps)} gaps"
        gone = ", ".join(map(str, self.record.removed))
        return f"repair of the cut without {gone}: {len(self.tensors)} tensors {around}"

    def patch(self, stack: BlockStack) -> AbstractContextManager[None]:
        """The model of ``stack`` with the new tensors, until the context ends."""
        return repaired(stack, self.tensors, self.prefix)


def repair(
    model: LoadedModel,
    removed: Collection[int],
    windows: Windows,
    validation: Windows,
    *,
    reach: int = REACH,
    self_generated: bool | None = None,
    batch: int | None = None,
    progress: Progress = silent,
) -> Repair:
    """Re-fit matrices around each gap of ``removed``, from the front to the back; the model itself
    is left as it was.

    The fit sees ``windows`` and, with ``self_generated``, half as many that the model itself
    writes; by default it does where :func:`sleb.repairs.self_generated.can_generate`. A gap's fit
    stays only if on ``validation`` windows less is lost against the dense model, and on none of
    their texts more than a standard error may be; else it is made with a larger ridge, or left out.
    Where a cut is by chance better than the dense model on a text, a fit takes it back, and that is
    no loss.

    Blocks may be offloaded, or split over processes. For each ridge tried, an offloaded block is
    read once to fit, from where the gap before ended to where this one ends; to validate, each kept
    block is read once, or as often as the validation windows' hidden states are more than half of
    the free memory; and all blocks once more, for the dense model's losses.

    Raises:
        UnsupportedModel: no matrix around the gaps writes into the stream as it is, or the weights
            are quantized.
        InputError: ``self_generated`` text is asked for and cannot be written.
    """
    stack = model.stack
    cut = gaps(removed, len(stack), reach)
    _refuse_quantized(model)
    writers: dict[tuple[int, ...], ResidualWriters] = {}
    _refuse_unless_fitted(stack, [block for gap in cut for block in gap.blocks], writers)
    if self_generated or (self_generated is None and can_generate(stack)):
        windows = with_self_generated(model, windows, progress)
    stored = _Stored(Checkpoint.open(model.source.path), stack)
    found: list[RepairedGap] = []
    tensors: dict[str, Tensor] = {}
    with progress.stage("repairing", len(windows.ids) * _runs(cut, removed)) as tick:
        sweep = Sweep(stack, validation.ids, NLL, batch=batch, scored=validation.scored)
        fitter = Regression(
            stack, removed, windows.ids, sweep.batch, writers, stored.rounded, scored=windows.scored
        )
        fitter.tick = tick
        validate = _Validation(sweep, removed, validation)
        try:
            before = validate.loss()
            for turn, gap in enumerate(cut, 1):
                fitter.tick(0, note=stack.reader.noted(f"gap {turn} of {len(cut)}"))
                ridge = fitter.fit(gap, RIDGES, validate.better_than(before))
                after = before if ridge is None else validate.last
                changed = {} if ridge is None else stored.tensors(fitter, gap)
                tensors |= changed
                found.append(_record(gap, ridge, changed, validate, (before, after)))
                before = after
        finally:
            fitter.restore()
    record = RepairRecord(
        gaps=tuple(found), reach=reach, calibration=windows.record, heldout=validation.record
    )
    return Repair(record=record, tensors=tensors, prefix=stored.prefix)


def fit_repair(
    model: LoadedModel,
    removed: Collection[int],
    *,
    config: RepairConfig,
    progress: Progress = silent,
) -> Repair:
    """Repair a cut as ``sleb apply --repair`` does: fitted on texts, on answers to prompts, and,
    where the model can write, on its own text. ``repair_tokens``: see :func:`given_tokens`.

    Raises:
        InputError: the text is too short, or as :func:`sleb.load_windows` and
            :func:`sleb.repairs.answering.with_answers`.
        UnsupportedModel: as :func:`repair`.
    """
    split = CalibrationSplit.of(
        model.tokenizer,
        config.text,
        windows=None,
        length=config.length,
        seed=0,
        loss_on=config.loss_on,
        images=model.stack.images,
    )
    given = given_tokens(model.stack, config.repair_tokens)
    split = split.with_repair(given, beside_search=True)
    split = with_answers(model, split, config, progress)
    if can_generate(model.stack):
        split = split.with_self_generated(writer(model, progress))
    fit, validation = split.repair_fit, split.validation
    found = repair(model, removed, fit, validation, self_generated=False, progress=progress)
    return replace(found, prompts_seen=split.answers.seen) if split.answers else found


def given_tokens(stack: BlockStack, tokens: int | None = None) -> int:
    """How many tokens of given text a repair is to be fitted on, of ``tokens`` in all; the rest is
    self-generated where it can be. By default see ``sleb.repairs.regression``."""
    tokens = tokens or default_tokens(stack)
    return tokens - tokens // SHARE if can_generate(stack) else tokens


def check_repair(model: LoadedModel) -> None:
    """Find out whether any cut of a model can be repaired.

    Raises:
        UnsupportedModel: no block has a matrix that can be re-fitted, or the weights are quantized.
    """
    _refuse_quantized(model)
    _refuse_unless_fitted(model.stack, range(len(model.stack)), {})


def _refuse_quantized(model: LoadedModel) -> None:
    if method := quant_method(Checkpoint.open(model.source.path).config):
        raise UnsupportedModel(
            f"{model.source.ref} is quantized ({method}), and a fitted matrix would not be: repair "
            "the cut first and quantize it then, or use --no-repair"
        )


def _refuse_unless_fitted(
    stack: BlockStack, blocks: Iterable[int], writers: dict[tuple[int, ...], ResidualWriters]
) -> None:
    """Look for a block with something to re-fit; ``writers`` gets what is found on the way."""
    for block in blocks:
        writers[block,] = find_residual_writers(stack, block)
        if writers[block,].fitted:
            return
    raise UnsupportedModel(
        f"{stack.name}: no matrix beside the gaps writes into the stream as it is (a norm "
        "follows, or experts do it), so the cut cannot be repaired: use --no-repair"
    )


def stored_repair(plan: Plan, folder: str | Path, model: LoadedModel) -> Repair | None:
    """The repair that ``plan`` records, with its tensors from the checkpoint in ``folder``, or from
    the GGUF file that this is; None if it records none.

    Raises:
        InputError: the checkpoint is not there, or its tensors are not the plan's.
    """
    cut = Cut.of(plan, folder=folder, parts=True)
    if cut.record is None or cut.repair is None:
        return None
    stored = _Stored(Checkpoint.open(model.source.path), model.stack)
    return Repair(record=cut.record, tensors=cut.repair, prefix=stored.prefix)


@contextmanager
def repaired(stack: BlockStack, tensors: Mapping[str, Tensor], prefix: str) -> Iterator[None]:
    """The model with ``tensors`` in place, named as in the checkpoint, whose block tensors begin
    with ``prefix``; afterwards it is as it was, bit for bit."""
    changes = WeightOverrides(stack)
    try:
        for block, path, value in as_parameters(stack, tensors, prefix):
            changes.put(block, path, value)
        yield
    finally:
        changes.undo()


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


class _Stored:
    """How the model's matrices are stored: their names and their precision."""

    def __init__(self, checkpoint: Checkpoint, stack: BlockStack) -> None:
        self.checkpoint, self.stack = checkpoint, stack
        self.prefix = block_prefix(checkpoint, stack)

    def name(self, block: int, path: str) -> str:
        """Name in the checkpoint of a parameter of a block."""
        return f"{self.prefix}{block}.{path}"

    def dtype(self, block: int, path: str) -> torch.dtype:
        name = self.name(block, path)
        info = self.checkpoint.tensors.get(name)
        if info is None or info.dtype not in TORCH_DTYPES:
            stored = f"is stored as {info.dtype}" if info else "has another name in the checkpoint"
            raise UnsupportedModel(f"{name} {stored}, so it cannot be repaired: use --no-repair")
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
        return dtype

    def rounded(self, block: int, path: str, tensor: Tensor) -> Tensor:
        """``tensor`` with the precision that the parameter is stored with."""
        return tensor.to(self.dtype(block, path))

    def tensors(self, fitter: Regression, gap: Gap) -> dict[str, Tensor]:
        """What ``fitter`` has changed for ``gap``."""
        return {
            self.name(block, path): value.to(self.dtype(block, path))
            for (block, path), value in fitter.changes.values.items()
            if block in gap.blocks
        }


def _runs(cut: Collection[Gap], removed: Collection[int]) -> int:
    """Block forwards of a window if every gap's first fit is accepted: each block once in the dense
    model and once in the cut one from where they part, and twice more where something is fitted."""
    fitted = [block for gap in cut for block in gap.blocks]
    first, end = min(fitted), max(*fitted, *map(block_of, removed)) + 1
    return end + (end - first - len(removed) + len(parts_in(removed))) + 2 * len(fitted)


class _Validation:
    """Loss per window of a cut on the windows that decide whether a fit stays."""

    def __init__(self, sweep: Sweep, removed: Collection[int], windows: Windows) -> None:
        self._sweep, self._sets, self._windows = sweep, [BlockSet(removed)], windows
        self.dense = sweep.values([DENSE], 0, len(windows.ids))[0]
        self.last = np.zeros(0)

    def loss(self) -> Values:
        """Of the model as it is now, nats/token [windows]."""
        self.last = self._sweep.values(self._sets, 0, len(self._windows.ids))[0]
        return self.last

    def better_than(self, before: Values) -> Callable[[], bool]:
        """Tells of the model as it is whether it loses less against the dense model than with
        losses ``before``, and on no text more, by more than a standard error over its windows: of
        eight texts one is a little worse by chance more often than not."""

        def accept() -> bool:
            more = self._lost(self.loss()) - self._lost(before)
            changes = self._texts(self.last - before).values()
            errors = [len(text) * (standard_error(text) or 0.0) for text in changes]
            return bool(more.sum() < 0 and (more <= errors).all())

        return accept

    def _lost(self, losses: Values) -> Values:
        """What the loss is above the dense model's, at least 0: of each text, over its windows."""
        above = self._texts(losses - self.dense).values()
        return np.array([max(0.0, text.sum()) for text in above])

    def by_text(self, losses: Values) -> dict[str, float]:
        """Mean loss on each text, nats/token."""
        names, texts = self._windows.names, self._texts(losses)
        return {names[i]: round(float(text.mean()), 6) for i, text in texts.items()}

    def _texts(self, values: Values) -> dict[int, Values]:
        """By number of a text, those of its windows."""
        source = np.array(self._windows.source)
        return {i: values[source == i] for i in np.unique(source)}


def _record(
    gap: Gap,
    ridge: float | None,
    changed: Mapping[str, Tensor],
    validation: _Validation,
    losses: tuple[Values, Values],
) -> RepairedGap:
    before, after = map(validation.by_text, losses)
    return RepairedGap(
        removed=gap.removed,
        ridge=ridge,
        tensors=tuple(
            RepairedTensor(name=name, sha256=_digest(tensor)) for name, tensor in changed.items()
        ),
        before=before,
        after=after,
    )
