"""The verbs whose work is in several folders, as functions: `sleb similarity` is
``sleb.similarity(...)``. A verb that is one folder's work is that folder's function.

The options of a verb are keywords, by the names in :mod:`sleb.config`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sleb import estimates, pipeline
from sleb.acceptance import Gate
from sleb.calibration import check_sources
from sleb.calibration.answers import check_prompts, prompts_of
from sleb.calibration.prompts import read_prompts
from sleb.calibration.split import SELF_GENERATED, CalibrationSplit
from sleb.calibration.windows import Windows, load_windows
from sleb.checkpoints.checkpoint import Checkpoint, check_fingerprint, fingerprint
from sleb.checkpoints.checksums import SUMS
from sleb.checkpoints.cut import Cut, written_with
from sleb.config import (
    ApplyConfig,
    BenchConfig,
    CheckOptions,
    EvalConfig,
    HealConfig,
    LoadOptions,
    Options,
    OutputOptions,
    PruneConfig,
    QuantizeConfig,
    RepairConfig,
    SearchConfig,
    SimilarityConfig,
    TransferConfig,
    VerifyConfig,
    WriteConfig,
    keywords_of,
    spoken_in_python,
    takes,
)
from sleb.core.errors import InputError, SlebError
from sleb.core.files import check_folder, record_path, writable_target
from sleb.core.plan import Plan, RepairRecord
from sleb.core.process_group import group, leave_group
from sleb.core.progress import Estimate, Progress, silent, tell
from sleb.core.showing import shown
from sleb.estimates import Speed as ModelSpeed
from sleb.evaluation import perplexity
from sleb.evaluation import transfer as transfers
from sleb.evaluation.agreement import AnswersKept, measure_answers
from sleb.evaluation.perplexity import Evaluation
from sleb.evaluation.tasks import TaskResult, check_tasks, run_tasks
from sleb.evaluation.transfer import Transfer
from sleb.formats import quantize as rounding
from sleb.models.load import LoadedModel, load
from sleb.models.source import resolve
from sleb.pipeline import Pruned, place
from sleb.record import GateResult, RunRecord
from sleb.repairs import Repair, fit_repair, stored_repair
from sleb.repairs import search as searching
from sleb.repairs.answering import answers_to, prompt_files
from sleb.runtimes.bench import Speed
from sleb.runtimes.bench import bench as time_models
from sleb.runtimes.compatibility import (
    RuntimeReport,
    check_runtimes,
    parse_pythons,
    parse_runtimes,
)
from sleb.runtimes.speculative import Drafting, draft
from sleb.selection.request import check_options, check_request
from sleb.selection.similarity import MEASURES, Similarity, measure_similarity
from sleb.surgery import apply as cutting
from sleb.surgery import verification
from sleb.surgery.adapter import CutAdapter, cut_adapter
from sleb.surgery.gates import Check, check_checksums
from sleb.surgery.gguf_cut import CutGGUF, check_gguf, cut_gguf, plan_beside
from sleb.surgery.gguf_prune import verify_gguf
from sleb.surgery.nemotron_nas import write_nemotron_nas
from sleb.surgery.verification import Verification
from sleb.views.report import write_report

IN_MEMORY = "in memory"
"""In place of the path of a plan that was given as it is."""
_BENCH, _OUTPUT, _ANY = BenchConfig(), OutputOptions(), LoadOptions()


Model = LoadedModel | nn.Module | str | Path
"""One that is loaded, a transformers model that is in memory, a folder, hub id or .gguf file."""


def _loaded(model: Model, config: Options, progress: Progress, tokenizer: Any) -> LoadedModel:
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, nn.Module):
        return load(model, tokenizer=tokenizer)
    return load(model, **dict(config.part(LoadOptions)), tokenizer=tokenizer, progress=progress)


def _check_model(plan: Plan, loaded: LoadedModel, model: Model) -> None:
    """Raise InputError if the plan is of another model."""
    identity = fingerprint(Checkpoint.open(loaded.source.path), len(loaded.stack))
    named = str(model) if isinstance(model, (str, Path)) else loaded.source.ref
    check_fingerprint(plan.model, identity, named)


def _plan(plan: Plan | str | Path) -> Plan:
    return plan if isinstance(plan, Plan) else Plan.load(plan)


# --- choosing blocks ---------------------------------------------------------------------------


@takes(SimilarityConfig)
def similarity(
    model: Model,
    config: SimilarityConfig,
    *,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> Similarity:
    """How alike the hidden states before and after each block are: the first of three stages.

    Raises:
        InputError, UnsupportedModel, DataError, ResourceError: see ``sleb.core.errors``.
    """
    MEASURES[config.measure]
    check_sources(config.text)
    loaded = _loaded(model, config, progress, tokenizer)
    windows, _ = load_windows(
        loaded.tokenizer,
        config.text,
        windows=config.windows,
        length=config.length,
        seed=config.seed,
        images=loaded.stack.images,
    )
    return measure_similarity(
        loaded, windows, measure=config.measure, batch=config.batch, progress=progress
    )


@keywords_of(SearchConfig)
@spoken_in_python()
def search(
    model: Model,
    config: SearchConfig | None = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    tokenizer: Any = None,
    progress: Progress = silent,
    **options: Any,
) -> Plan:
    """Find the blocks whose removal costs least, and return the plan. Exactly one target is given.

    The plan is also saved as ``out``, with the journal beside it, by which the same call goes on
    after it was stopped.

    Raises:
        VerificationFailed: nothing can be removed within ``max_loss_increase``.
        InputError, UnsupportedModel, DataError, ResourceError: see ``sleb.core.errors``.
    """
    if out is not None:
        writable_target(Path(out), force=force, folder=False)
        options["journal"] = f"{out}.journal"
    progress = shown(progress)

    def foretell(loaded: LoadedModel, split: CalibrationSplit, config: SearchConfig) -> None:
        known = out is not None and Path(options["journal"]).is_file()

        def found(speed: ModelSpeed) -> Estimate:
            whole = estimates.estimate_search(loaded, speed, split, check_options(config), config)
            return replace(whole, resumed=known)

        estimates.foretell(progress, loaded, config.length, found)

    given = model if isinstance(model, (str, Path)) else _loaded(model, _ANY, progress, tokenizer)
    if isinstance(ids := options.get("windows"), Tensor):
        for name in ("text", "prompts"):
            if options.get(name) or getattr(config, name, ()):
                raise InputError(f"windows of token ids are measured on alone: leave out --{name}")
        windows = Windows.given(ids)
        options |= {"split": CalibrationSplit(search=windows), "windows": len(windows.ids)}
        options["length"] = windows.record.length
    how: dict[str, Any] = {"foretell": foretell, "progress": progress}
    plan = searching.search(given, config, **how, **options)
    if out is not None and group().is_main:
        plan.save(out)
    return plan


@takes(SearchConfig)
def estimate_search(
    model: str | Path,
    config: SearchConfig,
    *,
    out: str | Path,
    progress: Progress = silent,
) -> Estimate:
    """What :func:`search` would take. The model is loaded and timed for a moment.

    Raises:
        InputError, UnsupportedModel, DataError, ResourceError: see :func:`search`.
    """
    goal = check_options(config)
    check_request(model, config, progress)
    loaded = _loaded(model, config, progress, None)
    config, split = searching.texts_of(loaded, config, goal)
    speed = ModelSpeed.of(loaded, config.length)
    found = estimates.estimate_search(loaded, speed, split, goal, config)
    return replace(found, resumed=Path(f"{out}.journal").is_file())


@takes(TransferConfig)
def transfer(
    model: Model,
    config: TransferConfig,
    *,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> Transfer:
    """Search on each text and on all of them, and score every choice on every held-out part.

    Raises:
        InputError, UnsupportedModel, DataError, ResourceError: see
            :func:`sleb.evaluation.transfer.transfer`.
    """
    transfers.check_transfer(config)
    return transfers.transfer(
        _loaded(model, config, progress, tokenizer), config, progress=progress
    )


# --- cutting -----------------------------------------------------------------------------------


@takes(PruneConfig)
def prune(
    model: Model,
    out: str | Path,
    config: PruneConfig,
    *,
    heal: bool = False,
    quantize: str | None = None,
    tokenizer: Any = None,
    command: str = "sleb.prune",
    progress: Progress = silent,
) -> Pruned:
    """Search, repair, measure on held-out text, write the checkpoint ``out`` and verify it; all or
    nothing. Exactly one target is given. What ``out`` holds: see :func:`sleb.pipeline.prune`.

    With ``heal`` that is OUT-cut, and OUT is what :func:`sleb.heal` makes of it; with ``quantize``
    also write OUT-SCHEME, calibrated on the windows that the search saw.

    Raises:
        VerificationFailed, InputError, UnsupportedModel, DataError, ResourceError: as there, or as
            :func:`sleb.heal` or :func:`sleb.quantize`; what is written by then stays.
    """
    if config.unit != "block" and quantize:
        raise InputError(
            f"--quantize takes a checkpoint, and --unit {config.unit} leaves a plan: leave out one"
        )
    if Path(out).suffix == ".gguf" and (heal or quantize):
        raise InputError(f"{out} is a GGUF file, and healing and quantizing are for folders")
    beside = Path(out).with_name(f"{Path(out).name}-{quantize}")
    if quantize is not None:
        rounding.check_scheme(quantize)
        writable_target(beside, force=config.force)
    how: dict[str, Any] = {"command": command, "progress": progress}
    if not isinstance(model, (str, Path)):
        model = _loaded(model, _ANY, progress, tokenizer)
    if heal:
        training = HealConfig.after(config, {})
        done = pipeline.prune_and_heal(model, out, config, training, **how)
    else:
        done = pipeline.prune(model, out, config, **how)
    if quantize is None or not leave_group():
        return done
    text = config.text if rounding.SCHEMES[quantize].calibrated else ()
    given = config.part(QuantizeConfig).replaced({"scheme": quantize, "text": text})
    try:
        return replace(done, quantized=rounding.quantize(out, beside, given, progress=progress))
    except SlebError as error:
        raise type(error)(f"{out} is written, but not quantized: {error}") from error


@takes(RepairConfig)
def repair(
    model: Model,
    plan: Plan | str | Path,
    config: RepairConfig,
    *,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> Repair:
    """Re-fit matrices around a plan's gaps on ``text``, and, where the model can write, on text of
    its own. The result goes to :func:`apply`.

    Raises:
        InputError, UnsupportedModel, DataError, ResourceError: see ``sleb.core.errors``.
    """
    removed = _plan(plan).at_depth(config.depth)
    check_sources(config.text)
    check_prompts(config.prompts, config.max_prompts)
    loaded = _loaded(model, config, progress, tokenizer)
    return fit_repair(loaded, removed, config=config, progress=progress)


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A cut that was written: a checkpoint folder, or a GGUF file and what is known of it.
    ``fitted``: its repair was made for it, and is not the plan's. ``adapter``: what was cut along,
    into the folder that :func:`adapter_beside` names."""

    out: Path
    removed: tuple[int, ...]
    blocks: int
    repair: RepairRecord | None = None
    fitted: bool = False
    gguf: CutGGUF | None = None
    adapter: CutAdapter | None = None

    @property
    def self_generated(self) -> bool:
        """Whether the repair was fitted on text of the model's own, too."""
        return self.repair is not None and SELF_GENERATED in [
            source.spec for source in self.repair.calibration.sources
        ]


def adapter_beside(out: Path) -> Path:
    """Where the adapter of the cut ``out`` goes."""
    return out.with_name(f"{out.name}-adapter")


@keywords_of(ApplyConfig)
def apply(
    plan: Plan | str | Path,
    model: LoadedModel | str | Path,
    out: str | Path,
    *,
    repair: Repair | bool | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Path:
    """Write the checkpoint without the plan's blocks, shard by shard, without loading it; or cut a
    GGUF file, if ``model`` and ``out`` both end in .gguf.

    ``repair`` is one that was fitted, True to fit one here, or False to leave the plan's out. By
    default the cut gets the plan's repair if there is one, with the tensors of the checkpoint in
    ``repaired``, or in the folder that the file ``plan`` lies in.

    Raises:
        InputError: the tensors of the plan's repair are not there, or it is of a deeper cut; and
            as below.
        UnsupportedModel, DataError, ResourceError: see :func:`sleb.surgery.apply.apply` and
            :func:`sleb.surgery.gguf_cut.cut_gguf`.
    """
    return applied(plan, model, out, progress, repair=repair, **options).out


@spoken_in_python()
def applied(
    plan: Plan | str | Path,
    model: LoadedModel | str | Path,
    out: str | Path,
    progress: Progress = silent,
    **options: Any,
) -> Applied:
    """As :func:`apply` with the same options, and say what was written."""
    repair = options.get("repair")
    fixed = repair if isinstance(repair, Repair) else None
    config = ApplyConfig.of({**options, "repair": repair if fixed is None else None})
    if fixed is not None and config.repaired:
        raise InputError("a cut has one repair: give the one that was fitted, or a folder")
    given, model, target = _plan(plan), place(model), Path(out)
    to_gguf = target.suffix == ".gguf"
    cut = Cut.of(given, config.depth, parts=to_gguf or config.format is not None)
    _check_output(target, cut, config)
    if to_gguf:
        _check_gguf(plan, given, model, target, cut, config)
    if config.repair:
        if not to_gguf:  # a fit takes long; else it is seen at once, below
            writable_target(target, force=config.force)
        fixed = _repair(model, given, config.part(RepairConfig), progress=progress)
    if fixed is not None:
        cut, given = cut.with_repair(fixed.record, fixed.tensors), given.seeing(fixed.prompts_seen)
    elif config.repair is False:
        cut = cut.without_repair()
    else:
        cut = _with_stored(cut, given, plan, config.repaired)
    done, adapter = None, _adapter(model, cut, config, progress)
    how: dict[str, Any] = {"cut": cut, "force": config.force, "progress": progress}
    if to_gguf:
        done = cut_gguf(given, model, out, other_weights=config.other_weights, **how)
    elif config.format:
        write_nemotron_nas(given, model, out, **how)
    else:
        cutting.apply(given, model, out, config.part(WriteConfig), cut=cut, progress=progress)
    if adapter:
        adapter.write(adapter_beside(target), target, force=config.force)
    return Applied(
        out=target,
        removed=cut.removed,
        blocks=len(cut.kept),
        repair=cut.used(given).repair,
        fitted=fixed is not None,
        gguf=done,
        adapter=adapter,
    )


_repair = repair  # as a parameter of applied hides it


def _with_stored(cut: Cut, plan: Plan, given: Plan | str | Path, repaired: str | None) -> Cut:
    """``cut`` with the repair of ``plan``, if that has one, from the checkpoint in ``repaired``, or
    that in the folder of the file ``given``.

    Raises:
        InputError: the repair is of a deeper cut, or its tensors are not there.
    """
    if plan.repair is None:
        if repaired:
            raise InputError(
                "the plan records no repair that --repaired could bring; give the plan.json of the "
                "repaired cut"
            )
        return cut
    if cut.record is None:
        raise InputError(
            f"the plan's repair is of the cut of all its {len(plan.order)} blocks, not of the "
            f"first {len(cut.removed)}: fit one for these with --repair and each --text, or give "
            "--no-repair for the plain cut"
        )
    how = "(--repaired), fit one anew (--repair and each --text), or leave it out (--no-repair)"
    where = repaired if repaired or isinstance(given, Plan) else written_with(given)
    if str(where).endswith(".gguf"):
        raise InputError(
            f"{where} holds the repaired tensors rounded, which serves to measure and not to cut: "
            f"give a folder that was written with this repair {how}"
        )
    if repaired is None and isinstance(given, Plan):
        cut.check_whole(f"give the folder that was written with it {how}")
        return cut
    try:
        return Cut.of(plan, folder=where, parts=bool(cut.parts))
    except InputError as error:
        raise InputError(f"{error} {how}") from None


def _check_output(out: Path, cut: Cut, config: ApplyConfig) -> None:
    """Refuse early what could not be written at the end."""
    to_gguf = out.suffix == ".gguf"
    if config.other_weights and not to_gguf:
        raise InputError("--other-weights is for GGUF files: give -o a name that ends in .gguf")
    if to_gguf and (config.format or config.adapter):
        given = "--format" if config.format else "--adapter"
        raise InputError(f"{given} is for checkpoints: give -o a folder, or leave it out")
    if config.adapter and cut.parts:
        raise InputError("--adapter is cut along with whole blocks alone: leave it out")
    if config.adapter:
        writable_target(adapter_beside(out), force=config.force)


def _adapter(
    model: str | Path, cut: Cut, config: ApplyConfig, progress: Progress
) -> CutAdapter | None:
    """The adapter that is asked for, cut along."""
    if not config.adapter:
        return None
    folder, trust = resolve(model, progress).path, config.trust_remote_code
    return cut_adapter(config.adapter, folder, cut, trust_remote_code=trust)


def _check_gguf(
    written: Plan | str | Path,
    plan: Plan,
    model: str | Path,
    out: Path,
    cut: Cut,
    config: ApplyConfig,
) -> None:
    """All that can be found wrong with a cut of a GGUF file before a model is loaded."""
    if Path(model).suffix != ".gguf":
        raise InputError(
            f"-o {out} is a GGUF file, and {model} is not: convert the uncut model with "
            "llama.cpp's convert_hf_to_gguf.py, then cut that file with this plan and "
            "--other-weights"
        )
    beside = plan_beside(out)
    if not isinstance(written, Plan) and beside.exists() and beside.samefile(written):
        raise InputError(
            f"the plan that goes beside {out} would replace {written}; choose another -o"
        )
    check_gguf(plan, model, out, cut=cut, force=config.force)


# --- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was checked: the checkpoint's checks, and, where asked for, runtimes and limits. A GGUF
    file has checks where the original was given as one."""

    verification: Verification | None
    runtimes: RuntimeReport | None = None
    gate: GateResult | None = None
    record: Path | None = None

    @property
    def checkpoint(self) -> str:
        """What was checked."""
        return self._gates.checkpoint

    @property
    def removed(self) -> tuple[int, ...]:
        """The blocks that it should lack."""
        return self._gates.removed

    @property
    def checks(self) -> tuple[Check, ...]:
        """What was compared, and what each found."""
        return self._gates.checks

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return self._gates.passed

    @property
    def _gates(self) -> Verification:
        if self.verification is None:
            raise AttributeError("nothing was compared, as MODEL is no GGUF file: see runtimes")
        return self.verification

    def __str__(self) -> str:
        return str(self.verification or self.runtimes)

    def require(self) -> None:
        """Raise VerificationFailed for the first part that failed."""
        for part in (self.verification, self.runtimes, self.gate):
            if part is not None:
                part.require()

    def sections(self) -> dict[str, Any]:
        """What a run record gets: nothing of a checkpoint that failed its checks."""
        if self.verification is not None and not self.verification.passed:
            return {}
        found: dict[str, Any] = {}
        if self.runtimes is not None and self.record is not None:
            found["runtimes"] = self.runtimes
        try:
            if self.runtimes is not None:
                self.runtimes.require()
        except SlebError:
            return found
        return {**found, **({"gate": self.gate} if self.gate is not None else {})}


@takes(VerifyConfig)
def verify(
    out: str | Path,
    config: VerifyConfig,
    *,
    model: LoadedModel | str | Path,
    plan: Plan | str | Path | None = None,
    progress: Progress = silent,
) -> Verified:
    """Check that ``out``, a folder or a GGUF file, is ``model`` without the plan's blocks, that
    ``runtimes`` run it as such, and that its record keeps the limits of ``gate``.

    ``plan`` is by default the one that lies with ``out``. With ``recorded`` the proof is that of
    the run record, if the files are still the same. The result's ``require()`` raises what
    failed.

    Raises:
        InputError, UnsupportedModel, DataError, ResourceError: see ``sleb.core.errors``.
    """
    model, tried = place(model), () if config.runtimes is None else parse_runtimes(config.runtimes)
    interpreters = parse_pythons(config.pythons, tried)
    beside = plan_of(out)  # refuses what there is nothing to check of
    used = _plan(beside if plan is None else plan)
    to_gguf = Path(out).suffix == ".gguf"
    if to_gguf and config.recorded:
        raise InputError("--recorded is for folders; a GGUF file is soon compared: leave it out")
    if to_gguf and Path(model).suffix != ".gguf" and not tried:
        raise InputError(
            f"{out} is a GGUF file, and {model} is not: give the file that it was cut from, or run "
            "it: --runtime llama-cpp"
        )
    judged = Gate.load(config.gate).check(RunRecord.load(out)) if config.gate else None
    checked, shared = config.part(CheckOptions), {"model": model, "plan": used}
    found = None
    if Path(out).is_dir() and config.recorded:
        found = _recorded(Path(out), model, used, config.depth, progress)
    elif Path(out).is_dir():
        found = verification.verify(out, checked, **shared, progress=progress)
    elif Path(model).suffix == ".gguf":
        source = Path(model).expanduser()
        found = verify_gguf(Path(out), source, used, config.depth, progress)
    ran = None
    if tried and (found is None or found.passed):
        ran = check_runtimes(
            out,
            checked.replaced({"dtype": config.runtime_dtype or config.dtype}),
            **shared,
            runtimes=tried,
            pythons=interpreters,
            progress=progress,
        )
    record = Path(out) if record_path(Path(out)).is_file() else None
    return Verified(verification=found, runtimes=ran, gate=judged, record=record)


def _recorded(
    out: Path, model: str | Path, plan: Plan, depth: int | None, progress: Progress
) -> Verification:
    """The proof in the run record of ``out``, with the checksums as they are now.

    Raises:
        InputError: it is of another cut or model, or there are no checksums.
    """
    proof = RunRecord.load(out).verification
    if tuple(proof.removed) != plan.at_depth(depth) or not (out / SUMS).is_file():
        raise InputError(
            f"{out} has no recorded proof of this plan's files, with their checksums: leave out "
            "--recorded, and it is proved now"
        )
    source = resolve(model, progress)
    checkpoint = Checkpoint.open(source.path)
    with progress.stage("hashing the model", checkpoint.nbytes) as tick:
        check_fingerprint(plan.model, fingerprint(checkpoint, plan.model.blocks, tick), source.ref)
    now = check_checksums(out, progress)
    others = [check for check in proof.checks if check.key != now.key]
    return replace(proof, checkpoint=str(out), checks=(now, *(others if now.passed else ())))


def plan_of(out: str | Path) -> Path:
    """The plan that lies with a checkpoint or a GGUF file."""
    out = Path(out)
    if out.is_dir():
        return out / "plan.json"
    if out.suffix != ".gguf" or not out.is_file():
        check_folder(out)
    return plan_beside(out)


@keywords_of(EvalConfig)
@spoken_in_python()
def evaluate(
    model: Model,
    windows: Windows | Tensor | int | None = None,
    *,
    tokenizer: Any = None,
    progress: Progress = silent,
    **options: Any,
) -> Evaluation | tuple[TaskResult, ...] | AnswersKept:
    """Perplexity, or with ``task`` scores of tasks; with ``plan``, dense and cut side by side. With
    ``prompts`` and a plan: what the cut keeps of the model's answers, but for those that it was
    made by.

    With the plan's full depth the cut is scored with the repair that lies beside the plan's file; a
    plan without a repair may be in memory.
    On :class:`Windows` that were loaded before it is :func:`sleb.evaluation.perplexity.evaluate`.

    Raises:
        InputError, UnsupportedModel, DataError, ResourceError: see ``sleb.core.errors``.
    """
    progress = shown(progress)
    given = options.get("plan")
    given = given if isinstance(given, Plan) else None
    if given is not None:
        if given.repair is not None:
            raise InputError(
                "give plan as the path of its file, which its repair lies beside; to score the cut "
                "without it: plan.model_copy(update={'repair': None})"
            )
        options["plan"] = IN_MEMORY
    if isinstance(windows, (Windows, Tensor)):
        loaded = _loaded(model, _ANY, progress, tokenizer)
        if given is not None:
            _check_model(given, loaded, model)
            del options["plan"]
            options["removed"] = given.at_depth(options.pop("depth", None))
        return perplexity.evaluate(loaded, Windows.given(windows), progress=progress, **options)
    config = EvalConfig.of({**options, "windows": windows})
    plan = given or (Plan.load(config.plan) if config.plan else None)
    removed = plan.at_depth(config.depth) if plan else ()
    check_sources(config.text)
    prompts_of(config.prompts)
    if config.task:
        check_tasks(config.task, folder=config.tasks_folder)
    loaded = _loaded(model, config, progress, tokenizer)
    patch = None
    if plan and config.plan:
        _check_model(plan, loaded, model)
        if plan.repair is not None and removed == plan.removed:
            fixed = stored_repair(plan, written_with(config.plan), loaded)
            patch = partial(fixed.patch, loaded.stack) if fixed else None
    if specs := prompt_files(loaded, config):
        assert plan is not None  # see EvalConfig
        found = answers_to(loaded, specs, config, most=math.inf, progress=progress)
        others = found.without(plan.seen)
        if others is None:
            raise InputError(
                "the cut was made by the answers to all of these prompts, so they cannot tell what "
                "it keeps of others: give --prompts that had no part in it"
            )
        kept = measure_answers(loaded, others, removed, patch, progress)
        return replace(kept, left_out=len(found.prompts) - len(others.prompts))
    if config.task:
        return run_tasks(loaded, config, removed=removed, patch=patch, progress=progress)
    scored, _ = load_windows(
        loaded.tokenizer,
        config.text,
        windows=config.windows or "all",
        length=config.length or min(2048, loaded.stack.max_length or 2048),
        seed=config.seed,
        loss_on=config.loss_on,
        images=loaded.stack.images,
    )
    if plan and (same := plan.saw(scored.record)):
        what = f"{', '.join(same)}: the cut was made by this text, whose figures flatter it"
        tell(progress, f"{what}; other text tells more")
    times = 1 + bool(removed) + (patch is not None)
    length, tokens = scored.record.length, scored.ids.numel()
    estimates.foretell(
        progress,
        loaded,
        length,
        lambda speed: estimates.estimate_reading(loaded, speed, tokens, times),
    )
    return perplexity.evaluate(
        loaded, scored, removed=removed, patch=patch, batch=config.batch, progress=progress
    )


@takes(BenchConfig)
def bench(
    model: str | Path,
    outs: str | Path | Sequence[str | Path] | None = None,
    config: BenchConfig = _BENCH,
    *,
    prompts: str | Path | None = None,
    progress: Progress = silent,
) -> Speed | Drafting:
    """Time ``model`` and ``outs`` in turn; with ``draft``, each of ``outs`` as its draft.

    Raises:
        InputError, UnsupportedModel, DataError, ResourceError: see
            :func:`sleb.runtimes.bench.bench` and :func:`sleb.runtimes.speculative.draft`.
    """
    outs = [outs] if isinstance(outs, (str, Path)) else outs
    if config.draft:
        asked = read_prompts(prompts) if prompts else ()
        return draft(model, outs or (), asked, config, progress=progress)
    if prompts:
        raise InputError("--prompts is for --draft; give that too, or leave it out")
    return time_models(model, outs or (), config, progress=progress)


# --- a project ---------------------------------------------------------------------------------


@takes(OutputOptions)
def report(
    run: str | Path | Sequence[str | Path],
    out: str | Path = "report.html",
    config: OutputOptions = _OUTPUT,
    *,
    lang: str = "en",
) -> Path:
    """Write what the run in folder ``run`` measured as one HTML page; or, of several folders, their
    figures side by side.

    Raises:
        InputError: no run there, no such language, or ``out`` cannot be written.
    """
    runs = [run] if isinstance(run, (str, Path)) else run
    return write_report([*map(Path, runs)], Path(out), lang, force=config.force)
