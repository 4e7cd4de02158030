"""`sleb prune`: search, measure, cut and prove, in one readable flow."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import Unpack

from sleb.calibration import Windows, load_windows
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.files import enough_space, writable_target
from sleb.core.plan import Plan, Target, blocks_to_remove
from sleb.core.process_group import group
from sleb.core.progress import Progress, silent
from sleb.evaluation.perplexity import evaluate
from sleb.models.load import LoadedModel, load
from sleb.models.placement import check_placing
from sleb.record import EvaluationText, RepairStatus, RunRecord, Stopwatch, environment
from sleb.repairs import Repair, can_repair
from sleb.repairs import repair as fit_repair
from sleb.repairs.data import default_tokens, repair_windows
from sleb.repairs.scoring import self_generated_validation
from sleb.repairs.self_generated import OWN, SelfGenerated, can_generate
from sleb.selection.goal import Goal
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.request import SearchOptions, check_request, goal_of
from sleb.selection.search import DEFAULT_HELDOUT, DEFAULT_LENGTH, DEFAULT_PROTECT, search
from sleb.selection.strategies import FINALS
from sleb.selection.sweep import Sweep
from sleb.selection.targets import nothing_within_limit, upper_bound
from sleb.surgery.apply import apply, refuse_source
from sleb.surgery.verification import verify
from sleb.views.card import model_card

__all__ = ["Pruned", "prune"]


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What :func:`prune` leaves: the checkpoint folder, its plan and its record."""

    path: Path
    plan: Plan
    record: RunRecord


def prune(
    model: str | Path,
    out: str | Path,
    *,
    windows: int | None = None,
    heldout: int = DEFAULT_HELDOUT,
    repair: bool | None = None,
    repair_tokens: int | None = None,
    keep: bool = True,
    force: bool = False,
    command: str = "sleb.prune",
    stages: dict[str, str] | None = None,
    progress: Progress = silent,
    **options: Unpack[SearchOptions],
) -> Pruned:
    """Search, repair, measure on held-out windows, write the checkpoint, verify it; all or nothing.

    ``out`` appears only after every exactness gate has passed. It holds the checkpoint, plan.json,
    run.json and a model card. ``options`` are those of :func:`sleb.search`; ``heldout`` is the
    number of windows set aside from the same texts for targets and for the quality figures.
    ``repair``: see :func:`sleb.repairs.repair`; by default it is done where it is possible, and the
    record says why it was not. It is fitted on about ``repair_tokens`` tokens (by default see
    :func:`sleb.repairs.data.default_tokens`), two thirds of them from the same texts, or all
    where blocks are fetched when they run. Where it is possible, and
    ``remove`` is the target, ``strategy`` is ``greedy-or-window`` by default. ``keep``: see
    :func:`sleb.apply`. ``command`` and ``stages`` go into the record as they are.

    Raises:
        VerificationFailed: a gate did not pass, or a limit on loss allows no removal; nothing was
            written.
        InputError, UnsupportedModel, DataError, ResourceError: see ``sleb.core.errors``.
    """
    out = Path(out)
    writable_target(out, force=force)
    watch = Stopwatch(progress)
    goal = goal_of(options)
    places: dict[str, Any] = {
        "device": options.get("device", "auto"),
        "stream": options.get("stream", False),
        "device_map": options.get("device_map"),
        "tp": options.get("tp", 1),
    }
    check_placing(**places)
    text, trust = options.get("text", ()), options.get("trust_remote_code", False)
    check_request(
        model,
        goal=goal,
        protect=options.get("protect", DEFAULT_PROTECT),
        text=text,
        trust_remote_code=trust,
        progress=watch,
    )
    loaded = load(
        model,
        dtype=options.get("dtype", "auto"),
        **places,
        trust_remote_code=trust,
        progress=watch,
    )
    refuse_source(out, loaded.source.path)
    if goal.remove is not None:
        n = len(loaded.stack)
        left = n - blocks_to_remove(goal.remove, n)
        nbytes = Checkpoint.open(loaded.source.path).nbytes
        enough_space(out.parent, nbytes if keep else nbytes * left // n)
    scored, aside = load_windows(
        loaded.tokenizer,
        text,
        windows=windows,
        length=options.get("length", DEFAULT_LENGTH),
        seed=options.get("seed", 0),
        heldout=heldout,
    )
    material = _material(loaded, scored, aside, repair, repair_tokens, options)
    limit, own = None, None
    if not isinstance(material, RepairStatus) and can_repair(loaded):
        if len(material[0].ids) > len(scored.ids):  # a search can see what a repair will leave
            if _compares(goal, options):
                options = {**options, "strategy": FINALS}
            if not loaded.stack.streamed:  # a fit of every depth would read its blocks anew
                limit = goal.max_loss_increase
            options = {**options, "after_repair": limit is not None}
        if can_generate(loaded.stack):
            judging = self_generated_validation(scored) if options.get("strategy") == FINALS else 0
            own = SelfGenerated(loaded, material[0], judging, watch)
    journal = out.with_name(out.name + ".journal")
    # a full disk below must not cost the search, so its journal stays
    plan = search(
        loaded,
        windows=scored,
        heldout=aside,
        own=own.judging if own else None,
        journal=journal,
        keep_journal=True,
        progress=watch,
        **options,
    )
    if isinstance(material, RepairStatus):
        fixed, status = None, material
    else:
        if own:
            material = own.fitted(), material[1]
        plan, fixed, status = _within(limit, aside, loaded, plan, material, repair, options, watch)
    quality = None
    seen = None
    if aside is not None:
        quality = evaluate(
            loaded,
            aside,
            removed=plan.removed,
            patch=partial(fixed.patch, loaded.stack) if fixed else None,
            batch=options.get("batch"),
            progress=watch,
        )
        length = aside.record.length
        seen = EvaluationText(windows=quality.windows, length=length, source="held-out")
    setting = environment(str(loaded.stack.input_device), loaded.dtype)
    if group().several:
        setting |= {"processes": group().size * group().tp}
    source, streamed = loaded.source, loaded.stack.streamed
    del loaded, own  # their memory is needed for the verification
    gc.collect()

    record: list[RunRecord] = []

    def finish(stage: Path) -> None:
        checked = replace(
            verify(
                stage,
                model=model,
                plan=plan,
                stream=True if streamed else None,
                trust_remote_code=trust,
                progress=watch,
            ),
            checkpoint=str(out),
        )
        checked.require()
        before, after = Checkpoint.open(source.path), Checkpoint.open(stage)
        record.append(
            RunRecord(
                command=command,
                started=watch.started,
                model=source.ref,
                removed=plan.removed,
                blocks=plan.model.blocks,
                seconds=dict(watch.seconds),
                parameters=(_elements(before), _elements(after)),
                nbytes=(before.nbytes, after.nbytes),
                evaluation=quality,
                evaluation_text=seen,
                repair=status,
                verification=checked,
                environment=setting,
                stages=stages or {},
            )
        )
        record[0].save(stage / "run.json")
        card = model_card(plan, record[0], source.path, kept=keep)
        (stage / "README.md").write_text(card, encoding="utf-8")

    def write() -> str:
        apply(
            plan,
            model,
            out,
            repair=fixed,
            keep=keep,
            force=force,
            trust_remote_code=trust,
            finish=finish,
            progress=watch,
        )
        journal.unlink(missing_ok=True)
        return TypeAdapter(RunRecord).dump_json(record[0]).decode()

    written = group().broadcast_from_main(write)
    done = record[0] if record else TypeAdapter(RunRecord).validate_json(written)
    return Pruned(path=out, plan=plan, record=done)


def _material(
    model: LoadedModel,
    scored: Windows,
    aside: Windows | None,
    wanted: bool | None,
    tokens: int | None,
    options: SearchOptions,
) -> tuple[Windows, Windows] | RepairStatus:
    """What a repair is fitted on and judged by, or why there is to be none."""
    if wanted is False:
        return RepairStatus(status="not-asked")
    try:
        return repair_windows(
            model.tokenizer,
            options.get("text", ()),
            scored=scored,
            aside=aside,
            tokens=tokens or default_tokens(model.stack),
            own=can_generate(model.stack),
            length=scored.record.length,
            seed=scored.record.seed,
        )
    except InputError as error:
        if wanted:
            raise
        return RepairStatus(status="not-possible", reason=str(error))


def _compares(goal: Goal, options: SearchOptions) -> bool:
    """Whether sets of blocks are to be compared after a repair: where nothing else is asked for."""
    asked = options.get("strategy") or options.get("metric", "loss") != "loss"
    return not asked and goal.remove is not None


def _within(
    limit: float | None,
    aside: Windows | None,
    model: LoadedModel,
    plan: Plan,
    material: tuple[Windows, Windows],
    wanted: bool | None,
    options: SearchOptions,
    progress: Progress,
) -> tuple[Plan, Repair | None, RepairStatus]:
    """The plan with its repair, and what became of that. Removals are taken back while the
    loss of ``aside`` is above a ``limit``, since the search has held that with quick repairs.

    Raises:
        VerificationFailed: it is so with a single removal.
    """
    while True:
        fixed, status = _repaired(model, plan, material, wanted, options, progress)
        plan = plan.model_copy(update={"repair": fixed.record if fixed else None})
        if limit is None:
            return plan, fixed, status
        assert aside is not None  # see search
        reached = _reached(model, plan, fixed, aside, options)
        if reached <= limit:
            target = Target(kind="max-loss-increase", limit=limit, reached=round(reached, 6))
            return plan.model_copy(update={"target": target}), fixed, status
        if len(plan.order) == 1:
            raise nothing_within_limit(
                limit, plan.order[0], reached, len(aside.ids), " after its repair"
            )
        plan = plan.without_last()


def _reached(
    model: LoadedModel, plan: Plan, fixed: Repair | None, aside: Windows, options: SearchOptions
) -> float:
    """Upper bound of the increase of the loss on held-out windows, nats/token."""
    n, sweep = len(aside.ids), Sweep(model.stack, aside.ids, NLL, batch=options.get("batch"))
    dense = sweep.values([DENSE], 0, n)[0]
    with fixed.patch(model.stack) if fixed else nullcontext():
        pruned = sweep.values([BlockSet(plan.removed)], 0, n)[0]
    bound = upper_bound(pruned - dense)
    assert bound is not None  # at least two windows, see search
    return bound


def _repaired(
    model: LoadedModel,
    plan: Plan,
    material: tuple[Windows, Windows],
    wanted: bool | None,
    options: SearchOptions,
    progress: Progress,
) -> tuple[Repair | None, RepairStatus]:
    """The repair of the plan's cut, and what became of it."""
    fitted, judges = material
    try:
        found = fit_repair(
            model,
            plan.removed,
            fitted,
            judges,
            own=False,
            batch=options.get("batch"),
            progress=progress,
        )
    except (InputError, UnsupportedModel) as error:
        if wanted:
            raise
        return None, RepairStatus(status="not-possible", reason=str(error))
    if not found.tensors:
        return None, RepairStatus(status="no-gain")
    seen = found.record.calibration
    return found, RepairStatus(
        status="repaired",
        tensors=len(found.tensors),
        gaps=sum(gap.ridge is not None for gap in found.record.gaps),
        gaps_total=len(found.record.gaps),
        tokens=seen.windows * seen.length,
        self_generated=OWN in [source.spec for source in seen.sources],
        validation_windows=len(judges.ids),
    )


def _elements(checkpoint: Checkpoint) -> int:
    return sum(info.numel for info in checkpoint.tensors.values())
