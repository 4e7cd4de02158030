"""`sleb prune`: search, repair, measure, cut and prove, in one readable flow."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from sleb import estimates
from sleb.calibration.answers import ANSWERS, prompt_hashes
from sleb.calibration.overlap import shared_with
from sleb.calibration.split import SELF_GENERATED, CalibrationSplit
from sleb.calibration.windows import Windows
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.cut import REPAIRED, Cut, write_repaired
from sleb.checkpoints.gguf_fields import GGUFModel
from sleb.checkpoints.gguf_file import GGUFFile, parameters
from sleb.config import (
    HealConfig,
    LoadOptions,
    PruneConfig,
    SearchConfig,
    WriteConfig,
    takes,
)
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.files import enough_space, record_path, staged_dir, writable_target
from sleb.core.finding import finding
from sleb.core.plan import Plan, blocks_to_remove
from sleb.core.process_group import group
from sleb.core.progress import Begins, Estimate, Progress, silent, tell
from sleb.core.statistics import shares
from sleb.distillation import distill
from sleb.distillation.distill import Healing, Hooks
from sleb.distillation.mix import SHORTEST, TEXTS, group_of
from sleb.distillation.record import Healed
from sleb.distillation.stages import first_stages, stages_folder
from sleb.evaluation.agreement import agreement_of, measure_answers
from sleb.evaluation.perplexity import evaluate
from sleb.formats.quantize import Quantized
from sleb.models.load import LoadedModel, cuda_or_cpu, load
from sleb.models.placement import check_placing
from sleb.record import EvaluationText, RepairStatus, RunRecord, Stopwatch, environment
from sleb.repairs import Repair, check_repair, given_tokens, repair, stored_repair
from sleb.repairs.answering import with_answers, writer
from sleb.repairs.search import search, split_of, with_metric
from sleb.repairs.self_generated import can_generate
from sleb.selection.goal import Goal
from sleb.selection.metrics import MISSED, NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.request import check_options, check_request, strategy_before_repair
from sleb.selection.strategies import GREEDY_OR_WINDOW
from sleb.selection.sweep import Sweep
from sleb.selection.targets import Costs, nothing_within_limit, upper_bound
from sleb.surgery.apply import apply, refuse_source
from sleb.surgery.gguf_cut import CutGGUF
from sleb.surgery.gguf_prune import check_files, prune_gguf
from sleb.surgery.gguf_repair import as_stored
from sleb.surgery.verification import Verification, verify
from sleb.views.card import model_card


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What :func:`prune` leaves: the checkpoint folder, its plan and its record; and the
    ``quantized`` checkpoint beside it, see :func:`sleb.prune`. ``gguf``: what is known of ``path``
    where that is a GGUF file."""

    path: Path
    plan: Plan
    record: RunRecord
    quantized: Quantized | None = None
    gguf: CutGGUF | None = None

    def __str__(self) -> str:
        """What fits a screen."""
        return "\n".join([str(self.path), self.plan.in_short, *self.record.quality])


@takes(PruneConfig)
def prune(
    model: LoadedModel | str | Path,
    out: str | Path,
    config: PruneConfig,
    *,
    to_heal: HealConfig | None = None,
    command: str = "sleb.prune",
    stages: dict[str, str] | None = None,
    progress: Progress = silent,
) -> Pruned:
    """Search, repair, measure on held-out windows, write the checkpoint, verify it; all or nothing.

    ``out`` appears only after every exactness check has passed. It holds the checkpoint, plan.json,
    run.json and a model card. Of a plan of parts of blocks no checkpoint is written: ``out`` holds
    plan.json, which :func:`sleb.load` applies, run.json, and the repaired tensors. If ``model`` and
    ``out`` both end in .gguf, ``out`` is the file without these blocks or parts, in its own
    quantization: repaired tensors are quantized again, and so measured; plan and record lie beside
    it, as OUT.plan.json and OUT.run.json.

    Options, also as keywords: :class:`sleb.config.PruneConfig`. A repair is by default made where
    it is possible, and the record says why it was not; two thirds of what it is fitted on are the
    given texts, or all where blocks are offloaded. Where it is possible, whole blocks go and
    ``remove`` is the target, ``strategy`` is ``greedy-or-window`` by default. ``to_heal``: how
    the cut will be healed, see :func:`sleb.repairs.search.with_metric`. ``command`` and ``stages``
    go into the record as they are.

    Raises:
        VerificationFailed: a check did not pass, or a limit on loss allows no removal; nothing was
            written.
        InputError, UnsupportedModel, DataError, ResourceError: see ``sleb.core.errors``.
    """
    out = Path(out)
    given, model = model, place(model)
    gguf = _gguf(model, out, config)
    watch = Stopwatch(progress)
    goal = check_options(config)
    placing = config.part(LoadOptions).model_dump(include={"device", "stream", "device_map", "tp"})
    check_placing(**placing)
    check_request(model, config, watch)
    journal = out.with_name(out.name + ".journal")
    found = _find(given, out, config, goal, (journal, gguf), to_heal, watch)
    found.facts.update(command=command, stages=stages or {}, started=watch.started)
    gc.collect()  # the model's memory is needed for the verification
    tell(watch, Begins(estimates.WRITE))
    records: list[RunRecord] = []
    files: list[CutGGUF] = []

    def write() -> str:
        if gguf is None:
            records.append(_write(model, out, config, found, watch))
        else:
            files.append(_write_gguf(model, out, config, found, (watch, records)))
        journal.unlink(missing_ok=True)
        return TypeAdapter(RunRecord).dump_json(records[0]).decode()

    written = group().broadcast_from_main(write)
    record = records[0] if records else TypeAdapter(RunRecord).validate_json(written)
    return Pruned(path=out, plan=found.plan, record=record, gguf=files[0] if files else None)


@takes(PruneConfig)
def estimate(
    model: LoadedModel | str | Path,
    out: str | Path,
    config: PruneConfig,
    *,
    speed: estimates.Speed | None = None,
    heal: HealConfig | None = None,
    progress: Progress = silent,
) -> Estimate:
    """What :func:`prune` would take, and to ``heal`` the cut, phase by phase. The model is
    loaded and timed for a moment, unless its ``speed`` is known; nothing is written.

    Raises:
        InputError, UnsupportedModel, DataError, ResourceError: see :func:`prune`.
    """
    out = Path(out)
    gguf = _gguf(place(model), out, config)
    goal = check_options(config)
    check_request(place(model), config, progress)
    loaded = model
    if not isinstance(loaded, LoadedModel):
        loaded = load(loaded, **dict(config.part(LoadOptions)), progress=progress)
    _check_space(out, gguf, goal, loaded, config)
    config = with_metric(loaded, config, to_heal=heal is not None)
    speed = speed or estimates.Speed.of(loaded, config.length)
    return estimates.estimate(loaded, speed, _split(loaded, config)[0], goal, config, gguf, heal)


def place(model: LoadedModel | str | Path) -> str | Path:
    """Where the files of a model are, as other verbs take it.

    Raises:
        InputError: an adapter computes along that is not in them.
    """
    if not isinstance(model, LoadedModel):
        return model
    if model.adapted:
        raise InputError(
            "a checkpoint without some blocks is of one model, and an adapter is not merged into "
            "this: merge it (merge_and_unload), or search, and apply the plan to the base with "
            "adapter="
        )
    return model.source.path


def _gguf(model: str | Path, out: Path, config: PruneConfig) -> GGUFModel | None:
    """The uncut file, where ``out`` is to be one; it is checked that ``out`` can be written."""
    if out.suffix == ".gguf":
        return check_files(model, out, record_path(out), force=config.force)
    if config.size is not None and Path(model).suffix == ".gguf":
        raise InputError(
            f"--size is of a file like {Path(model).name}, and a folder has its weights in 16 "
            f"bits: give -o {out}.gguf, or another target"
        )
    writable_target(out, force=config.force)
    return None


@takes(HealConfig)
def heal(
    cut: str | Path,
    model: str | Path,
    out: str | Path,
    config: HealConfig,
    *,
    command: str = "sleb.heal",
    stage_keys: dict[str, str] | None = None,
    save_every: float = 60.0,
    progress: Progress = silent,
) -> Pruned:
    """Train the checkpoint ``cut``, see :func:`sleb.distillation.distill.heal`, measure the result
    on windows and answers that were not trained on, and verify it. ``out`` holds what that of
    :func:`prune` does, and heal.json.

    Raises:
        VerificationFailed: healing made nothing better, or a check did not pass.
        InputError, UnsupportedModel, DataError, ResourceError: see ``sleb.core.errors``.
    """
    out, watch = Path(out), Stopwatch(progress)
    found: list[RunRecord] = []

    def finish(stage: Path, healing: Healing, done: Healed) -> None:
        healing.healed = healing.healed.seeing(_learned(healing))
        healing.healed.save(stage / "plan.json")
        facts = _healed_facts(healing, stage, config, watch)
        source, device = healing.dense.source.path, healing.dense.stack.input_device
        plan, parts = healing.healed, bool(healing.plan.parts)
        how: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        if parts:
            facts |= _without(healing.dense, plan) | {"file_nbytes": file_size(model)}
        else:
            how["generate_on"] = device
            facts |= _sizes(Checkpoint.open(source), Checkpoint.open(stage), model)
        healing.release()  # the model's memory is needed for the verification
        record = RunRecord(
            command=command,
            started=watch.started,
            stages=stage_keys or {},
            verification=_verified(stage, out, model, plan, watch, **how),
            seconds=watch.accounted,
            healed=done,
            **facts,
        )
        record.save(stage / "run.json")
        if not parts:  # what transformers loads alone
            card = model_card(plan, record, source)
            (stage / "README.md").write_text(card, encoding="utf-8")
        found.append(record)

    timed: list[estimates.Speed] = []

    def tokens_of(healing: Healing) -> int:
        dense, own = healing.dense, healing.config
        if not timed:  # once for all stages, of which the estimate is
            with watch.stage("estimating", None):
                timed.append(estimates.Speed.of(dense, config.length or SHORTEST))
            of = (healing.checkpoint.nbytes, healing.blocks)
            tell(watch, estimates.estimate_healing(dense, timed[0], config, *of))
            tell(watch, Begins(estimates.HEALING))
        return estimates.heal_tokens(timed[0], own, cuda_or_cpu(dense.stack.input_device))

    start, last = Path(cut), config
    writable_target(out, force=config.force)
    if config.stages > 1:
        hooks = Hooks(tokens=tokens_of)
        start, last = first_stages(start, model, out, config, hooks=hooks, progress=watch)
    hooks = Hooks(tokens=tokens_of, finish=finish)
    how: dict[str, Any] = {"save_every": save_every, "hooks": hooks, "progress": watch}
    distill.heal(start, model, out, last, stage_of=Path(cut), **how)

    def end() -> str:
        if config.stages > 1:
            shutil.rmtree(stages_folder(out))
        record = TypeAdapter(RunRecord).dump_json(found[0]).decode()
        return json.dumps([Plan.load(out / "plan.json").to_json(), record])

    plan, record = json.loads(group().broadcast_from_main(end))
    known = found[0] if found else TypeAdapter(RunRecord).validate_json(record)
    return Pruned(path=out, plan=Plan.model_validate_json(plan), record=known)


def prune_and_heal(
    model: LoadedModel | str | Path,
    out: str | Path,
    config: PruneConfig,
    healing: HealConfig,
    *,
    command: str = "sleb.prune",
    stages: dict[str, str] | None = None,
    progress: Progress = silent,
) -> Pruned:
    """:func:`prune` into OUT-cut, and :func:`heal` that into ``out``. The same call goes on where
    it was stopped: a cut that is there is not made again.

    Raises:
        VerificationFailed, InputError, UnsupportedModel, DataError, ResourceError: as these.
    """
    out = Path(out)
    cut = out.with_name(f"{out.name}-cut")
    writable_target(out, force=config.force)
    asked = config.model_dump(mode="json", exclude={"force"})
    key = hashlib.sha256(json.dumps([str(place(model)), asked]).encode()).hexdigest()
    known = RunRecord.load(cut) if (cut / "run.json").is_file() else None
    how: dict[str, Any] = {"command": command, "progress": progress}
    if not known or known.stages.get("cut") != key:
        prune(model, cut, config, to_heal=healing, stages={"cut": key}, **how)
    return heal(cut, place(model), out, healing, stage_keys=stages, **how)


def _healed_facts(
    healing: Healing, stage: Path, config: HealConfig, progress: Progress
) -> dict[str, Any]:
    """What a healed checkpoint is, and keeps, before and after: the dense model with its tensors in
    place and blocks bypassed, as a repaired cut is measured."""
    dense, plan = healing.dense, healing.healed
    after = stored_repair(plan, stage, dense)
    assert after is not None
    patch = partial(after.patch, dense.stack)
    heldout = healing.material.validation[TEXTS]
    quality = evaluate(dense, heldout, removed=plan.removed, patch=patch, progress=progress)
    old = RunRecord.load(healing.cut) if (healing.cut / "run.json").is_file() else None
    facts = {
        "model": dense.source.ref,
        "removed": plan.removed,
        "blocks": plan.model.blocks,
        "environment": environment(str(dense.stack.input_device), dense.dtype),
        "evaluation": quality,
        "evaluation_text": EvaluationText(
            windows=quality.windows, length=quality.length, source="held-out"
        ),
        "repair": old and old.repair,
        "similarity": old and old.similarity,
    }
    measured = healing.material.measured
    if measured is None:
        return facts
    given = len(measured.prompts)  # the cut may have been made by others than the healing
    measured = measured.without(plan.seen)
    if measured is None:
        return facts | {"unasked": finding("all-seen", prompts=given)}
    kept = measure_answers(dense, measured, plan.removed, patch, progress)
    unhealed = kept.unrepaired
    if before := stored_repair(healing.plan, healing.cut, dense):
        repaired = partial(before.patch, dense.stack)
        found = agreement_of(dense, measured, plan.removed, repaired, progress=progress)
        unhealed = shares(found[:, 1])
    return facts | {"prompts": replace(kept, unhealed=unhealed)}


def _learned(healing: Healing) -> list[str]:
    """The prompts by whose answers a healing was done."""
    kinds = [*healing.material.train.items(), *healing.material.validation.items()]
    return [seen for name, w in kinds if group_of(name) == ANSWERS for seen in prompt_hashes(w)]


def _verified(
    stage: Path, out: Path, model: str | Path, plan: Plan, watch: Stopwatch, **how: Any
) -> Verification:
    """What the checks found on the folder that is to be ``out``.

    Raises:
        VerificationFailed: one did not pass.
    """
    checked = verify(stage, model=model, plan=plan, progress=watch, **how)
    checked = replace(checked, checkpoint=str(out))  # the folder's name once it passed
    checked.require()
    return checked


@dataclass(frozen=True)
class _Found:
    """A cut that is not written yet. ``facts`` go into the run's record."""

    plan: Plan
    repair: Repair | None
    source: Path
    device: torch.device
    streamed: bool
    facts: dict[str, Any]


def _find(
    model: LoadedModel | str | Path,
    out: Path,
    config: PruneConfig,
    goal: Goal,
    beside: tuple[Path, GGUFModel | None],
    to_heal: HealConfig | None,
    watch: Stopwatch,
) -> _Found:
    """Load the model, choose blocks, repair the cut and measure it. ``beside``: where scores are
    kept meanwhile, and the GGUF file that will get the repair."""
    journal, gguf = beside
    loaded = model
    if not isinstance(loaded, LoadedModel):
        loaded = load(loaded, **dict(config.part(LoadOptions)), progress=watch)
    stack, source = loaded.stack, loaded.source
    refuse_source(out, source.path)
    _check_space(out, gguf, goal, loaded, config)
    config = with_metric(loaded, config, to_heal=to_heal is not None)
    with watch.stage("reading text", None):
        split, status = _split(loaded, config)
    estimates.foretell(
        watch,
        loaded,
        config.length,
        lambda speed: replace(
            estimates.estimate(loaded, speed, split, goal, config, gguf, to_heal),
            resumed=journal.is_file(),
        ),
    )
    tell(watch, Begins(estimates.TEXT))
    split = with_answers(loaded, split, config, watch, embedded=True)
    limited = None  # the target, where it is a limit on what the repaired cut costs
    # with text beside its own windows, a search can see what a repair will leave
    if split.repair_given is not None and len(split.repair_given.ids) > len(split.search.ids):
        config = config.replaced({"strategy": strategy_before_repair(goal, config)})
        if not stack.streamed:  # a fit of every depth would read its blocks anew
            limited = goal if goal.limit is not None else None
    if split.repair_given is not None and can_generate(stack):
        compare = config.strategy == GREEDY_OR_WINDOW
        split = split.with_self_generated(writer(loaded, watch), compare=compare)
        split.generate()  # in a phase of its own
    tell(watch, Begins(estimates.SEARCH))
    searched = loaded
    if gguf is None:  # sizes and speed are of the folder that is written
        searched = replace(loaded, source=replace(source, is_gguf=False))
    plan = search(
        searched,
        config.part(SearchConfig),
        split=split,
        after_repair=limited is not None,
        journal=journal,
        keep_journal=True,  # a full disk later on must not cost the search
        progress=watch,
    )
    fixed = None
    if split.repair_given is not None:
        tell(watch, Begins(estimates.REPAIR))
        plan, fixed, status = _repaired(loaded, plan, split, limited, config, watch)
    exact = fixed
    if fixed and gguf:  # what is measured is what will be in the file
        tensors = as_stored(gguf, fixed.tensors, Checkpoint.open(source.path))
        fixed = replace(fixed, tensors=tensors)
    facts = {"model": source.ref, "removed": plan.removed, "blocks": plan.model.blocks}
    setting = environment(str(stack.input_device), loaded.dtype)
    if group().several:
        setting |= {"processes": group().size * group().tp}
    facts |= {"repair": status, "environment": setting}
    if plan.parts:
        facts |= _without(loaded, plan)
    tell(watch, Begins(estimates.MEASURE))
    facts |= _measured(loaded, plan, fixed, split, config, watch)
    if split.answers:
        patch = partial(fixed.patch, stack) if fixed else None
        measured = split.answers.measured
        facts["prompts"] = measure_answers(loaded, measured, plan.removed, patch, watch)
    return _Found(plan, exact, source.path, stack.input_device, stack.streamed, facts)


def _measured(
    model: LoadedModel,
    plan: Plan,
    fixed: Repair | None,
    split: CalibrationSplit,
    config: PruneConfig,
    progress: Progress,
) -> dict[str, Any]:
    """Perplexity on held-out windows, and what these are."""
    heldout = split.heldout
    if heldout is None:
        return {"evaluation": None, "evaluation_text": None}
    found = evaluate(
        model,
        heldout,
        removed=plan.removed,
        patch=partial(fixed.patch, model.stack) if fixed else None,
        batch=config.batch,
        progress=progress,
    )
    length = heldout.record.length
    seen = split.repair_given if fixed and split.repair_given else split.search
    shared = len(shared_with(heldout.ids, seen.ids))
    text = EvaluationText(windows=found.windows, length=length, source="held-out", shared=shared)
    return {"evaluation": found, "evaluation_text": text}


def _write_gguf(
    model: str | Path,
    out: Path,
    config: PruneConfig,
    found: _Found,
    told: tuple[Stopwatch, list[RunRecord]],
) -> CutGGUF:
    """Cut the GGUF file, check it and record it, all or nothing; the record goes to ``told``.

    Raises:
        VerificationFailed: a check did not pass.
    """
    watch, records = told

    def finish(done: CutGGUF, checked: Verification) -> str:
        before = Path(model).expanduser()
        facts = found.facts | {
            "parameters": (parameters(GGUFFile.open(before)), parameters(GGUFFile.open(done.out))),
            "nbytes": (before.stat().st_size, done.nbytes),
            "requantized": tuple(tensor.stored for tensor in done.requantized),
        }
        records.append(RunRecord(seconds=watch.accounted, verification=checked, **facts))
        return records[0].to_json()

    cut = Cut.of(found.plan, parts=True)
    if found.repair:
        cut = cut.with_repair(found.repair.record, found.repair.tensors)
    how: dict[str, Any] = {"force": config.force, "progress": watch}
    return prune_gguf(found.plan, model, out, cut, record_path(out), finish=finish, **how)


def _write(
    model: str | Path, out: Path, config: PruneConfig, found: _Found, watch: Stopwatch
) -> RunRecord:
    """Cut, verify and record; ``out`` appears only if that succeeds.

    Raises:
        VerificationFailed: a check did not pass.
    """
    record: list[RunRecord] = []
    if found.plan.parts:
        return _write_plan(model, out, config, found, watch)

    def finish(stage: Path) -> None:
        how = {"stream": found.streamed, "trust_remote_code": config.trust_remote_code}
        checked = _verified(stage, out, model, found.plan, watch, generate_on=found.device, **how)
        sizes = _sizes(Checkpoint.open(found.source), Checkpoint.open(stage), model)
        facts = found.facts | sizes | {"kept": config.keep, "verification": checked}
        record.append(RunRecord(seconds=watch.accounted, **facts))
        record[0].save(stage / "run.json")
        card = model_card(found.plan, record[0], found.source, kept=config.keep)
        (stage / "README.md").write_text(card, encoding="utf-8")

    cut = Cut.of(found.plan)
    if found.repair:
        cut = cut.with_repair(found.repair.record, found.repair.tensors)
    apply(
        found.plan,
        model,
        out,
        config.part(WriteConfig),
        cut=cut,
        finish=finish,
        progress=watch,
    )
    return record[0]


def _write_plan(
    model: str | Path, out: Path, config: PruneConfig, found: _Found, watch: Stopwatch
) -> RunRecord:
    """As :func:`_write`, where the plan is applied while the model is loaded."""
    fixed = found.repair
    with staged_dir(out, force=config.force) as stage:
        found.plan.save(stage / "plan.json")
        if fixed:
            write_repaired(stage / REPAIRED, fixed.tensors)
        trust = config.trust_remote_code
        checked = _verified(stage, out, model, found.plan, watch, trust_remote_code=trust)
        facts = found.facts | {"file_nbytes": file_size(model), "verification": checked}
        record = RunRecord(seconds=watch.accounted, **facts)
        record.save(stage / "run.json")
    return record


def _sizes(before: Checkpoint, after: Checkpoint, model: str | Path) -> dict[str, Any]:
    """Parameters and bytes of two checkpoints, and of the GGUF file that was given as ``model``."""
    return {
        "parameters": (_elements(before), _elements(after)),
        "nbytes": (before.nbytes, after.nbytes),
        "file_nbytes": file_size(model),
    }


def _without(model: LoadedModel, plan: Plan) -> dict[str, tuple[int, int]]:
    """Parameters and bytes of the weights, dense and without what a plan of parts removes."""
    checkpoint = Checkpoint.open(model.source.path)
    costs = Costs.of(checkpoint, model.stack, plan.parts)
    numbers = _elements(checkpoint)
    left = costs.size(plan.removed)
    return {
        "parameters": (numbers, numbers * left // costs.total),
        "nbytes": (costs.total, left),
    }


def _check_space(
    out: Path, gguf: GGUFModel | None, goal: Goal, model: LoadedModel, config: PruneConfig
) -> None:
    if goal.remove is None or config.unit != "block":
        return
    removed = blocks_to_remove(goal.remove, len(model.stack))
    enough_space(out.parent, estimates.on_disk(model, gguf, removed, keep=config.keep))


def _split(model: LoadedModel, config: PruneConfig) -> tuple[CalibrationSplit, RepairStatus]:
    """The windows of each role, and what is known of the repair without a fit.

    Raises:
        InputError, UnsupportedModel: a repair was asked for, and is not possible.
    """
    split = split_of(model, config, config.heldout)
    if config.repair is False:
        return split, RepairStatus(status="not-asked")
    try:
        check_repair(model)
        split = split.with_repair(given_tokens(model.stack, config.repair_tokens))
    except (InputError, UnsupportedModel) as error:
        if config.repair:
            raise
        return split, RepairStatus.impossible(error)
    return split, RepairStatus(status="no-gain")


def _repaired(
    model: LoadedModel,
    plan: Plan,
    split: CalibrationSplit,
    limited: Goal | None,
    config: PruneConfig,
    progress: Progress,
) -> tuple[Plan, Repair | None, RepairStatus]:
    """The plan with its repair. Removals are taken back while the cut costs more on held-out
    windows or answers than is ``limited``, since the search has held that with quick repairs.

    Raises:
        VerificationFailed: it is so with a single removal.
    """
    fit, validation = split.repair_fit, split.validation
    while True:
        fixed, status = _fitted(model, plan, (fit, validation), config, progress)
        roles = {"repair_fit": fit, "repair_validation": validation} if fixed else {}
        hashes = plan.split | {role: windows.record.sha256 for role, windows in roles.items()}
        changes = {"repair": fixed.record if fixed else None, "split": hashes}
        repaired = plan.model_copy(update=changes)
        if limited is None or limited.limit is None:
            return repaired, fixed, status
        sweep = _limited_sweep(model, split, limited, config)
        reached = _reached(sweep, plan, fixed)
        if reached <= limited.limit:
            target = limited.reached(reached)
            return repaired.model_copy(update={"target": target}), fixed, status
        if len(plan.order) == 1:
            n = len(sweep.ids)
            raise nothing_within_limit(limited, plan.order[0], reached, n, " after its repair")
        plan = plan.without_last()


def _limited_sweep(
    model: LoadedModel, split: CalibrationSplit, limited: Goal, config: PruneConfig
) -> Sweep:
    """Scores what a limit is on."""
    windows, metric = split.heldout, NLL
    if limited.keep_answers is not None and split.answers:
        windows, metric = split.answers.measured.windows, MISSED
    assert windows is not None  # see search
    return Sweep(model.stack, windows.ids, metric, batch=config.batch, scored=windows.scored)


def _reached(sweep: Sweep, plan: Plan, fixed: Repair | None) -> float:
    """Upper bound of what the cut costs: nats/token, or the share of tokens that are not kept."""
    n, stack = len(sweep.ids), sweep.stack
    dense = sweep.values([DENSE], 0, n)[0]
    with fixed.patch(stack) if fixed else nullcontext():
        pruned = sweep.values([BlockSet(plan.removed)], 0, n)[0]
    bound = upper_bound(pruned - dense)
    assert bound is not None  # at least two windows, see search
    return bound


def _fitted(
    model: LoadedModel,
    plan: Plan,
    windows: tuple[Windows, Windows],
    config: PruneConfig,
    progress: Progress,
) -> tuple[Repair | None, RepairStatus]:
    """The repair of the plan's cut, and what became of it."""
    try:
        found = repair(
            model,
            plan.removed,
            *windows,
            self_generated=False,  # the windows have it already
            batch=config.batch,
            progress=progress,
        )
    except (InputError, UnsupportedModel) as error:
        if config.repair:
            raise
        return None, RepairStatus.impossible(error)
    if not found.tensors:
        return None, RepairStatus(status="no-gain")
    seen = [source.spec for source in found.record.calibration.sources]
    return found, RepairStatus(
        status="repaired",
        tensors=len(found.tensors),
        gaps=sum(gap.ridge is not None for gap in found.record.gaps),
        gaps_total=len(found.record.gaps),
        tokens=windows[0].tokens,
        self_generated=SELF_GENERATED in seen,
        answers=len(windows[0].of(ANSWERS)),
        validation_windows=len(windows[1].ids),
    )


def file_size(model: str | Path) -> int | None:
    """Of the GGUF file that was given; None for another model."""
    path = Path(model).expanduser()
    return path.stat().st_size if path.suffix == ".gguf" and path.is_file() else None


def _elements(checkpoint: Checkpoint) -> int:
    return sum(info.numel for info in checkpoint.tensors.values())
