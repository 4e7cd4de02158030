"""A proof of concept as one file: `sleb init` writes sleb.toml, `sleb run` goes from it to reports.

Each stage adds its section to the run record and notes a hash of what it depended on, so a run
that was stopped goes on with the stage that is missing, and a changed setting repeats only the
stages that depend on it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import Self

from sleb import estimates, pipeline
from sleb.acceptance import Gate
from sleb.calibration.answers import check_prompts
from sleb.calibration.prompts import read_prompts
from sleb.calibration.windows import DEFAULT_WINDOWS, load_windows
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.config import (
    BenchConfig,
    DeviceOptions,
    LoadOptions,
    RunConfig,
    TransferConfig,
    takes,
)
from sleb.core.errors import InputError, changes
from sleb.core.plan import Plan
from sleb.core.progress import Begins, Estimate, Phase, Progress, Tick, silent, tell
from sleb.evaluation.answers import Comparison, compare
from sleb.evaluation.questions import read_questions
from sleb.evaluation.tasks import TaskResult, check_tasks, run_tasks
from sleb.evaluation.transfer import Transfer, transfer
from sleb.models.load import LoadedModel, cuda_or_cpu, load, load_tokenizer, pick_device
from sleb.models.source import resolve
from sleb.pipeline import prune, prune_and_heal
from sleb.project_file import ProjectFile
from sleb.record import RunRecord, Stopwatch
from sleb.repairs import stored_repair
from sleb.runtimes.bench import FULL, QUICK, Speed, bench
from sleb.selection.request import check_options
from sleb.selection.similarity import measure_similarity
from sleb.views.locale import Locale
from sleb.views.report import write_report


class Project(ProjectFile):
    """A project file with all that it names."""

    @classmethod
    def load(cls, path: str | Path, settings: Sequence[str] = ()) -> Self:
        """Read and check a project file, with ``settings`` such as ``search.remove=3`` in place of
        its own.

        Raises:
            InputError: missing, not TOML, a key or value that is not possible, or a file it names
                that is not there.
        """
        project = cls.read(path, settings)
        if project.gate is not None:
            Gate.parse(project.gate, f"{path}: gate")
        project._check(path)
        return project

    def _check(self, path: str | Path) -> None:
        """Find out now what would else stop the run after an hour."""
        check_options(self.search.replaced({"curve": False}))  # with it no target is needed
        if self.search.heldout < 2:
            raise InputError(f"{path}: [search] heldout: at least 2 windows, to measure depths on")
        measure = self.measure
        if self.target.suffix == ".gguf":
            raise InputError(
                f"{path}: out is a folder of results, and {self.out} a GGUF file: give a folder, "
                "or cut the file with sleb prune MODEL.gguf -o OUT.gguf"
            )
        if self.search.unit != "block" and measure.transfer:
            raise InputError(
                f"{path}: [measure] transfer is of whole blocks: leave it out, or [search] unit = "
                f"'{self.search.unit}'"
            )
        own = [task for task in self.tasks if task.endswith(".jsonl")]
        folder = [self.beside(measure.tasks_folder)] if measure.tasks_folder else []
        for name in (*own, *folder):
            if not Path(name).exists():
                raise InputError(f"{path}: nothing at {name}")
        if measure.tasks:
            check_tasks(self.tasks, folder=next(iter(folder), None))
        if measure.prompts:
            read_prompts(self.beside(measure.prompts))
        check_prompts(self.search.prompts, self.search.max_prompts)
        if measure.transfer and len(self.text) < 2:
            raise InputError(f"{path}: transfer compares texts; give two or more in [text]")


@takes(RunConfig)
def run(path: str | Path, config: RunConfig, *, progress: Progress = silent) -> RunRecord:
    """Do all that the project file at ``path`` asks for and that is not done yet: search, cut,
    prove, measure, hold it against the limits, write the reports.

    ``settings``, each as ``"search.remove=3"``, replace those of the file; ``force`` starts anew
    where settings of the search have changed.

    Raises:
        InputError: the file or something that it names cannot be used, or its ``out`` is from
            other settings.
        VerificationFailed: no block may go, or the checkpoint is not exact. (A limit that is not
            kept raises nothing: see the record's ``gate``.)
    """
    project = Project.load(path, config.settings)
    if project.gate is not None and not project.search.prompts:
        _check_chats(project, path)
    keys, out = project.keys(), project.target
    known = None if config.force else _known(project, keys["prune"])
    record = known or _pruned(project, keys["prune"], config.force, _Foretelling(progress))
    before, watch = record.seconds, Stopwatch(progress)
    session = _Session(project, record, watch)
    left = [
        (stage, work)
        for stage, wanted, work in session.stages()
        if wanted and record.stages.get(stage) != keys[stage]
    ]
    if left:
        tell(progress, Begins("measuring"))  # the last phase of the estimate has ended
        tell(progress, session.estimate([stage for stage, _ in left]))
    elif known:
        when = Locale("en").moment(known.started)
        tell(progress, f"nothing was measured again: all is from the run of {when}")
    for stage, work in left:
        tell(progress, Begins(stage))
        done, found = {**record.stages, stage: keys[stage]}, work()
        spent = {name: round(before.get(name, 0.0) + s, 3) for name, s in watch.seconds.items()}
        took = {**before, **spent}
        record = RunRecord.update(out, stages=done, seconds=took, **{stage: found})
    session.close()
    if project.gate is not None:
        gate = Gate.parse(project.gate, f"{path}: gate").check(record)
        record = RunRecord.update(out, gate=gate)
    for lang in project.measure.reports:
        write_report([out], out / f"report.{lang}.html", lang, force=True)
    return record


@takes(RunConfig)
def estimate(path: str | Path, config: RunConfig, *, progress: Progress = silent) -> Estimate:
    """What :func:`run` would take: as :func:`sleb.pipeline.estimate`, and what is measured after
    the cut. Nothing is written.

    Raises:
        InputError, UnsupportedModel, DataError, ResourceError: see :func:`run`.
    """
    project = Project.load(path, config.settings)
    search = project.search.replaced({"force": True})
    dense = load(project.source, **dict(search.part(LoadOptions)), progress=progress)
    speed = estimates.Speed.of(dense, search.length)
    how: dict[str, Any] = {"speed": speed, "heal": project.heal, "progress": progress}
    found = pipeline.estimate(dense, project.target, search, **how)
    seconds = {phase.name: phase.seconds for phase in found.phases}
    later, unknown = _later(project, dense, speed, seconds[estimates.SEARCH])
    phases = (*found.phases, *(Phase(name=name, seconds=s) for name, s in later.items()))
    return replace(found, phases=phases, unknown=unknown)


def _later(
    project: Project, dense: LoadedModel, speed: estimates.Speed, searching: float
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Seconds of the stages after the cut, where one search takes ``searching``; and those whose
    work is not known."""
    search, measure = project.search, project.measure
    found = {"similarity": speed.blocks * (search.windows or DEFAULT_WINDOWS) * search.length}
    if measure.transfer:
        found["transfer"] = (len(project.text) + 1) * searching
    if measure.prompts:
        asked = len(read_prompts(project.beside(measure.prompts)))
        found["answers"] = estimates.comparing(speed, asked, measure.new_tokens)
    if measure.bench:
        on_cpu = dense.stack.input_device.type == "cpu"
        cases = QUICK if (measure.bench_quick is None and on_cpu) or measure.bench_quick else FULL
        nbytes = Checkpoint.open(dense.source.path).nbytes
        found["speed"] = estimates.timing(speed, cases, BenchConfig().runs, nbytes)
    named = [task for task in project.tasks if not task.endswith(".jsonl")]
    if project.tasks and not named:
        files = map(read_questions, project.tasks)
        scored = (estimates.scoring(speed, file, measure.limit, dense.tokenizer) for file in files)
        found["tasks"] = estimates.STARTED_S + sum(scored)
    return found, ("tasks",) if named else ()


@dataclass(frozen=True)
class _Foretelling:
    """A progress of the cut, whose estimate says that it is not all."""

    progress: Progress

    def stage(self, title: str, total: int | None) -> AbstractContextManager[Tick]:
        """See :class:`sleb.core.progress.Progress`."""
        return self.progress.stage(title, total)

    def tell(self, what: Estimate | Begins | str) -> None:
        """See :class:`sleb.core.progress.Progress`."""
        if isinstance(what, Estimate):
            what = replace(what, unknown=(*what.unknown, "what is measured after the cut"))
        tell(self.progress, what)


def _check_chats(project: Project, path: str | Path) -> None:
    """Find out now that a limit on answers could not be measured in the end."""
    limits = (project.gate or {}).get("answers", {})
    if not {"min_agreement", "min_right"} & limits.keys():
        return
    search = project.search
    folder = resolve(project.source).path
    tokenizer = load_tokenizer(folder, trust_remote_code=search.trust_remote_code)
    if not tokenizer.chat_template:
        raise InputError(
            f"{path}: [gate.answers] has a limit on answers, and {project.model} has no chat "
            "template to ask it with: give [search] prompts, or take the limit out"
        )


def _known(project: Project, key: str) -> RunRecord | None:
    """The record of the search and the cut, if they were done before.

    Raises:
        InputError: they were, with other settings or texts.
    """
    out = project.target
    if not (out / "run.json").is_file():
        return None
    record = RunRecord.load(out)
    if record.stages.get("prune") == key:
        return record
    # a record of before has none, nor has one that `sleb prune` made
    differ = changes(project.settings, record.settings) if record.settings else []
    which = f" ({'; '.join(differ)})" if differ else ""
    raise InputError(
        f"{out} is from other settings or texts than now{which}; "
        "give another out, or --force to search again and replace it"
    )


def _pruned(project: Project, key: str, force: bool, progress: Progress) -> RunRecord:
    """Search and cut; the record."""
    out = project.target
    how: dict[str, Any] = {"command": "sleb run", "stages": {"prune": key}, "progress": progress}
    search = project.search.replaced({"force": force})
    if project.heal is None:
        prune(project.source, out, **dict(search), **how)
    else:
        healing = project.heal.replaced({"force": force})
        prune_and_heal(project.source, out, search, healing, **how)
    return RunRecord.update(out, settings=project.settings)


class _Session:
    """The stages after the cut. The dense model is loaded once for those that need it."""

    def __init__(self, project: Project, record: RunRecord, progress: Progress) -> None:
        self.project, self.record, self.progress = project, record, progress
        self._dense: LoadedModel | None = None

    def stages(self) -> list[tuple[str, bool, Callable[[], Any]]]:
        """Name of the record's section, whether it is wanted, and what makes it."""
        measure = self.project.measure
        return [
            ("similarity", True, self.similarity),
            ("tasks", bool(measure.tasks), self.tasks),
            ("transfer", measure.transfer, self.transfer),
            ("answers", measure.prompts is not None, self.answers),
            ("speed", measure.bench, self.speed),
        ]

    def estimate(self, left: Sequence[str]) -> Estimate:
        """What the stages that are left will take, where that is known."""
        known = dict[str, float]()
        if not self.dense.stack.streamed:
            searched = sum(s for name, s in self.record.seconds.items() if name == "searching")
            speed = estimates.Speed.of(self.dense, self.project.search.length)
            known, _ = _later(self.project, self.dense, speed, searched)
        return Estimate(
            phases=tuple(Phase(name=name, seconds=known[name]) for name in left if name in known),
            memory=0,
            disk=0,
            device=estimates.named(cuda_or_cpu(self.dense.stack.input_device)),
            unknown=tuple(name for name in left if name not in known),
        )

    @property
    def dense(self) -> LoadedModel:
        if self._dense is None:
            places = dict(self.project.search.part(LoadOptions))
            self._dense = load(self.project.source, **places, progress=self.progress)
        return self._dense

    def close(self) -> None:
        """Give the dense model's memory back."""
        self._dense = None
        gc.collect()

    def similarity(self) -> tuple[tuple[float, ...], ...]:
        search = self.project.search
        windows, _ = load_windows(
            self.dense.tokenizer,
            search.text,
            windows=search.windows,
            length=search.length,
            seed=search.seed,
            heldout=search.heldout,
            images=self.dense.stack.images,
        )
        found = measure_similarity(self.dense, windows, batch=search.batch, progress=self.progress)
        return tuple(tuple(spread.mean for spread in row) for row in found.pairs)

    def tasks(self) -> tuple[TaskResult, ...]:
        measure = self.project.measure
        folder = measure.tasks_folder and self.project.beside(measure.tasks_folder)
        plan = Plan.load(self.project.target / "plan.json")
        fixed = stored_repair(plan, self.project.target, self.dense)
        return run_tasks(
            self.dense,
            task=self.project.tasks,
            removed=self.record.removed,
            patch=partial(fixed.patch, self.dense.stack) if fixed else None,
            tasks_folder=folder and str(folder),
            limit=measure.limit,
            batch=self.project.search.batch,
            seed=self.project.search.seed,
            progress=self.progress,
        )

    def transfer(self) -> Transfer:
        """As many blocks as the run removed, whatever its target was."""
        others = dict.fromkeys(("max_loss_increase", "keep_answers", "speedup", "size"))
        target = {**others, "remove": len(self.record.removed), "curve": False}
        config = self.project.search.part(TransferConfig).replaced(target)
        return transfer(self.dense, config, progress=self.progress)

    def answers(self) -> Comparison:
        self.close()
        project, measure = self.project, self.project.measure
        assert measure.prompts is not None
        return compare(
            project.source,
            project.target,
            project.beside(measure.prompts),
            new_tokens=measure.new_tokens,
            **dict(project.search.part(DeviceOptions)),
            progress=self.progress,
        )

    def speed(self) -> Speed:
        self.close()
        search, quick = self.project.search, self.project.measure.bench_quick
        found: Speed = bench(
            self.project.source,
            [self.project.target],
            quick=pick_device(search.device).type == "cpu" if quick is None else quick,
            threads=search.threads,
            **dict(search.part(DeviceOptions)),
            progress=self.progress,
        )
        return found
