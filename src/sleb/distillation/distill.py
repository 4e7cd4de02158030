"""Healing: the cut model learns from the dense one what it lost (recovery distillation).

    done = heal("smaller", "MODEL", "healed", HealConfig(text=["mail.jsonl"]))
    done.texts["mail"].healed_ratio      # perplexity on held-out windows, as a ratio to the dense

The cut itself needs no training; this does, and its result is a checkpoint of the same shape. What
was trained stands in its plan as a repair does, so that all that reads a repaired cut reads it.
"""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from sleb.calibration import check_sources
from sleb.calibration.answers import check_prompts
from sleb.checkpoints.checkpoint import (
    Checkpoint,
    check_fingerprint,
    fingerprint,
    tensor_bytes,
)
from sleb.checkpoints.checksums import write_sums
from sleb.checkpoints.cut import (
    REPAIRED,
    Cut,
    block_prefix_of,
    loaded_by_plan,
    write_repaired,
)
from sleb.config import HEAL_AT_ONCE, HEAL_TOKENS, HealConfig, takes
from sleb.core.errors import InputError, ResourceError, VerificationFailed
from sleb.core.files import check_folder, enough_space, staged_dir, writable_target
from sleb.core.plan import Plan, RepairedGap, RepairedTensor, RepairRecord
from sleb.core.process_group import group
from sleb.core.progress import Progress, silent
from sleb.core.statistics import Values
from sleb.distillation.computing import forwards, of_any_length, product_teraflops, recomputed
from sleb.distillation.local import segments
from sleb.distillation.loss import HiddenLoss, SplitModel, Validation, agree
from sleb.distillation.mix import TEXTS, Material, window_length
from sleb.distillation.record import Healed, HealedText, Reason, by_text
from sleb.distillation.state import LOWER, Schedule, TrainingState
from sleb.distillation.student import Student, check_installed
from sleb.distillation.training import Training
from sleb.models.load import LoadedModel, cuda_or_cpu, load, load_config, strict_model
from sleb.models.stack import BlockStack, decoder_config
from sleb.models.stored_names import block_prefix
from sleb.repairs.regression import gaps
from sleb.surgery.apply import cut_checkpoint, refuse_source
from sleb.surgery.rollback_manifest import HEALED
from sleb.surgery.verification import probe_ids


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a caller of :func:`heal` does in it. ``tokens``: say how many to train on, unless a
    stopped run goes on; ``finish``: what else is to be in the folder before it is named ``out``."""

    tokens: Callable[[Healing], int] | None = None
    finish: Callable[[Path, Healing, Healed], None] | None = None


NO_HOOKS = Hooks()


@takes(HealConfig)
def heal(
    cut: str | Path,
    model: str | Path,
    out: str | Path,
    config: HealConfig,
    *,
    stage_of: Path | None = None,
    save_every: float = 60.0,
    hooks: Hooks = NO_HOOKS,
    progress: Progress = silent,
) -> Healed:
    """Train the checkpoint ``cut``, which a plan of ``model`` made, to predict what ``model``
    predicts, and write the result as the checkpoint ``out``: same names, shapes and dtypes. Of a
    plan of parts of blocks, which is applied while ``model`` is loaded, ``out`` holds the plan and
    the trained tensors.

    The loss is KL(dense || cut) (distillation, 1503.02531), in nats/token, over texts, the dense
    model's own text and its answers to prompts, see :mod:`sleb.distillation.mix`; AdamW on float32
    weights, gradients clipped to norm 1. All weights of the blocks are trained, or with ``lora``
    only adapters of that rank. The learning rate is found by short runs. The divergence of
    windows that are not trained on is measured ten times in a run; one that is worse goes on from
    its best weights with a lower rate, and these are taken in the end. Options: see
    :class:`HealConfig`, of which ``stages`` are for :mod:`sleb.distillation.stages`; ``stage_of``:
    the cut that is healed in these. ``hooks``: what the caller does in between.

    What a stopped run needs to go on is in the file ``out``.heal, written every ``save_every``
    seconds and at Ctrl-C; the same call again goes on, on a CPU to the same bits.

    Raises:
        InputError: ``cut`` holds no plan of ``model``, or is healed already; the text is too
            short, or the minutes too few; ``out`` exists; the state is of other settings.
        UnsupportedModel: weights are quantized or stored under other names.
        VerificationFailed: healing made nothing better, or the result does not load as it was.
        DataError, ResourceError: see ``sleb.core.errors``.
    """
    cut, out = Path(cut), Path(out)
    writable_target(out, force=config.force)
    plan = _plan(cut, config)
    refuse_source(out, cut)
    dense = _dense(model, out, config, progress)
    job = Healing(cut, out, plan, dense, config, progress, hooks.tokens)
    try:
        training, stopped = job.train(save_every)
        found: list[Healed] = []

        def write() -> str:
            found.append(job.write(training, stopped, stage_of or cut, hooks.finish))
            job.state.unlink(missing_ok=True)
            return TypeAdapter(Healed).dump_json(found[0]).decode()

        written = group().broadcast_from_main(write)
    except torch.OutOfMemoryError:
        raise ResourceError(
            f"out of memory on {job.device} with --at-once {job.at_once}; give a lower --at-once, "
            "--recompute, --optimizer adamw-8bit, or --lora 16"
        ) from None
    return found[0] if found else TypeAdapter(Healed).validate_json(written)


def _plan(cut: Path, config: HealConfig) -> Plan:
    """Refuse what is wrong before anything is loaded; the plan of the cut."""
    check_folder(cut, "make one with: sleb prune")
    if (cut / HEALED).exists():
        raise InputError(f"{cut} is healed already; heal the cut that it was made from")
    if not (cut / "plan.json").is_file():
        raise InputError(
            f"{cut} has no plan.json, so it is not known what was cut from which model"
        )
    check_installed(config.lora, config.optimizer)
    check_sources(config.text)
    check_prompts(config.prompts, config.max_prompts)
    plan = Plan.load(cut / "plan.json")
    if plan.parts and (cut / "config.json").is_file():
        raise InputError(
            f"{cut} is written for other runtimes (docs/units.md): heal the folder with the plan "
            "that it was made by"
        )
    if plan.parts and (config.stages > 1 or config.local_first or config.hidden_loss):
        raise InputError(
            "--stages, --local-first and --hidden-loss are of whole blocks, and the plan removes "
            "parts of blocks: leave them out"
        )
    return plan


def _dense(model: str | Path, out: Path, config: HealConfig, progress: Progress) -> LoadedModel:
    dense = load(
        model,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
    )
    refuse_source(out, dense.source.path)
    return dense


class Healing:
    """A healing with all that it starts from, checked: windows, schedule, teacher, settings.
    ``healed``: the plan of the result."""

    def __init__(
        self,
        cut: Path,
        out: Path,
        plan: Plan,
        dense: LoadedModel,
        config: HealConfig,
        progress: Progress,
        tokens_of: Callable[[Healing], int] | None,
    ) -> None:
        self.cut, self.out, self.plan, self.dense = cut, out, plan, dense
        self.config, self.progress = config, progress
        source = Checkpoint.open(dense.source.path)
        with progress.stage("checking the model against the plan", source.nbytes) as tick:
            found = fingerprint(source, len(dense.stack), tick)
            check_fingerprint(plan.model, found, dense.source.ref)
        self.blocks = len(Cut.of(plan, parts=True).kept)
        self.checkpoint = self._stored(cut, plan)
        if not plan.parts:
            found = load_config(cut, trust_remote_code=config.trust_remote_code)
            if (there := decoder_config(found).num_hidden_layers) != self.blocks:
                raise InputError(
                    f"{cut} has {there} blocks, and its plan leaves {plan.model.blocks} - "
                    f"{len(plan.removed)}: it is not of this plan"
                )
        self.device, self.processes = dense.stack.input_device, group().size
        on = cuda_or_cpu(self.device)
        self.state = out.with_name(out.name + ".heal")

        def wanted() -> str:  # a run that was stopped goes on with what it began with
            known = TrainingState.tokens(self.state)
            if known is None and tokens_of:
                return str(tokens_of(self))
            return str(config.tokens or known or HEAL_TOKENS[on])

        tokens = int(group().broadcast_from_main(wanted))
        limited = config.tokens is not None or config.minutes is None
        self.config = config = config.replaced({"tokens": tokens})
        length = window_length(dense, tokens, config.length)
        self.at_once = config.at_once or max(1, HEAL_AT_ONCE[on] // length)
        self.tokens_at_once = self.at_once * length
        self.material = Material.of(dense, config, tokens, length, progress)
        self.mix = self.material.mix(config, tokens, length)
        self.schedule = Schedule(
            steps=math.ceil(tokens / self.mix.step_tokens) if limited else None,
            seconds=None if config.minutes is None else 60 * config.minutes,
        )
        chosen = {"tokens", "lr", "minutes", "optimizer", "lora", "recompute", "seed"}
        chosen |= {"stages", "local_first", "hidden_loss"}
        self.settings = {
            "model": plan.model.weights_sha256,
            "cut": fingerprint(self.checkpoint, self.blocks).weights_sha256,
            "windows": {k: w.record.sha256 for k, w in self.material.train.items()},
            "held-out windows": {k: w.record.sha256 for k, w in self.material.validation.items()},
            **config.model_dump(include=chosen),
            "length": length,
            "step_tokens": self.mix.step_tokens,
            "at_once": self.at_once,
            "device": self.device.type,
            "dtype": dense.dtype,
        }
        self.teacher = SplitModel(dense.model)

    def release(self) -> None:
        """Let go of the dense model."""
        del self.dense, self.teacher
        gc.collect()

    def _stored(self, folder: Path, plan: Plan) -> Checkpoint:
        """The tensors of a cut by ``plan``, where they are stored."""
        if not plan.parts:
            return Checkpoint.open(folder)
        source = Checkpoint.open(self.dense.source.path)
        return loaded_by_plan(folder, plan, source, block_prefix(source, self.dense.stack))

    def _load(self, path: Path, dtype: torch.dtype) -> nn.Module:
        trust = self.config.trust_remote_code
        if not self.plan.parts:
            model: nn.Module = strict_model(path, dtype, trust)
            return model.to(self.device)
        how = {"dtype": str(dtype).removeprefix("torch."), "device": str(self.device)}
        source, plan = self.dense.source.path, path / "plan.json"
        return load(source, plan=plan, check=False, trust_remote_code=trust, **how).model

    def _validated(self, path: Path) -> dict[str, Values]:
        """A checkpoint on the validation windows, in the dtype of the dense model."""
        student = SplitModel(self._load(path, self.dense.stack.dtype))
        return {
            kind: Validation(self.teacher, windows, self.tokens_at_once)(student)
            for kind, windows in self.material.validation.items()
        }

    def train(self, save_every: float) -> tuple[Training, Reason]:
        """Train the cut; why that ended.

        Raises:
            VerificationFailed: nothing got better.
            InputError: the minutes were too few for a step.
        """
        with self.progress.stage("measuring the cut", None):
            self.before = self._validated(self.cut)
        dense = self.dense.stack.dtype
        dtype = dense if dense == torch.float32 else torch.bfloat16  # float16's gradients vanish
        kind = self.config.optimizer
        with self.progress.stage("loading the cut to train it", None):
            model = self._load(self.cut, dtype)
            student = Student(
                model, self.checkpoint, rank=self.config.lora, seed=self.config.seed, optimizer=kind
            )
        # weights and best ones, of float32 with two moments; and room to replace the file
        state = (2 * dtype.itemsize if kind == "adamw-8bit" else 16) * student.count
        enough_space(self.out.parent, self.checkpoint.nbytes + 2 * state)
        cut, weight = Cut.of(self.plan, parts=True), self.config.hidden_loss
        beside = segments(cut.kept, cut.blocks)
        training = Training(
            student=student,
            split=SplitModel(model),
            teacher=self.teacher,
            mix=self.mix,
            at_once=self.tokens_at_once,
            validation=self.material.validation,
            schedule=self.schedule,
            lr=self.config.lr,
            settings=self.settings,
            path=self.state,
            segments=beside if self.config.local_first else (),
            hidden=HiddenLoss(weight=weight, blocks={s.last: s.target for s in beside})
            if weight
            else None,
        )
        stacks = [training.split.stack] if self.config.recompute else []
        with of_any_length(), forwards(stacks, recomputed):
            stopped = training.run(save_every, self.progress)
        if not training.where.gained:
            if group().is_main:
                self.state.unlink(missing_ok=True)
            left = f"{self.out} was not written, and {self.cut} stays"
            if not training.where.step:  # all was spent before, of which half is allowed to
                enough = math.ceil(2 * training.where.seconds / 6) / 10
                raise InputError(
                    f"--minutes {self.config.minutes:g} were over before the first step of "
                    f"training; {left}: give about {enough:g} or more"
                )
            raise VerificationFailed(
                f"healing did not bring {self.cut} nearer to the dense model on held-out text in "
                f"{training.where.step} steps; {left}: give more --text, "
                f"{'more --minutes, ' if stopped == 'time' else ''}or a lower --lr"
            )
        return training, stopped

    def write(
        self,
        training: Training,
        stopped: Reason,
        cut: Path,
        finish: Callable[[Path, Healing, Healed], None] | None,
    ) -> Healed:
        """Write the trained weights as a checkpoint, and load and validate it."""
        where, count = training.where, training.student.count
        tensors, model = training.student.finish(), training.student.model
        logits, dtype = _probed(model), BlockStack(model).dtype
        reached, product = training.teraflops, product_teraflops(self.device, dtype)
        del model
        training.release()
        self.healed, trained = self._healed(tensors)
        with staged_dir(self.out, force=self.config.force) as stage:
            if self.plan.parts:
                write_repaired(stage / REPAIRED, trained)
            else:
                cut_checkpoint(
                    self.checkpoint,
                    Cut(blocks=self.blocks, removed=(), repair=tensors),
                    stage,
                    trust_remote_code=self.config.trust_remote_code,
                    progress=self.progress,
                )
            self.healed.save(stage / "plan.json")
            with self.progress.stage("reloading the checkpoint", None):
                self._check_reload(stage, tensors, logits, dtype)
                after = self._validated(stage)
            heldout = self.material.validation
            done = Healed(
                path=str(self.out),
                model=self.dense.source.ref,
                cut=str(cut),
                removed=self.plan.removed,
                repaired=self.plan.repair is not None,
                texts=by_text(self.before, after, heldout),
                overall=HealedText.of(self.before[TEXTS], after[TEXTS]),
                steps=where.step,
                best_step=where.best_step,
                tokens=where.step * self.mix.step_tokens,
                passes=self.mix.turns(where.step),
                lr=where.lr / LOWER**where.lowered,
                rates=where.rates,
                trials=where.trials,
                stopped=stopped,
                seconds=round(where.seconds, 1),
                tokens_per_second=round(where.step * self.mix.step_tokens / where.stepping),
                teraflops=round(reached, 4),
                product_teraflops=round(product * self.processes, 4),
                compiled=training.compiled,
                processes=self.processes,
                trained_parameters=count,
                checks=where.checks,
                settings=self.settings,
                calibration={k: w.record for k, w in self.material.train.items()},
                heldout={k: w.record for k, w in heldout.items()},
                cut_sha256=self.settings["cut"],
                healed_sha256=fingerprint(
                    self._stored(stage, self.healed), self.blocks
                ).weights_sha256,
            )
            done.save(stage / HEALED)
            if finish:
                finish(stage, self, done)
            write_sums(stage, self.progress)
        return done

    def _healed(self, tensors: Mapping[str, Tensor]) -> tuple[Plan, dict[str, Tensor]]:
        """The plan with the digests of what training or a repair changed, and that, by the names in
        the original. The norm in front of attention that is gone is trained by nothing."""
        kept, prefix = Cut.of(self.plan, parts=True).kept, block_prefix_of(next(iter(tensors)))
        repaired = self.plan.repair.tensors if self.plan.repair else {}
        trained = {}
        for name, tensor in tensors.items():
            block, _, rest = name.removeprefix(prefix).partition(".")
            known = f"{prefix}{kept[int(block)]}.{rest}"
            if known in repaired or not torch.equal(tensor, self.checkpoint.tensor(name)):
                trained[known] = tensor
        healed = tuple(
            RepairedTensor(name=name, sha256=hashlib.sha256(tensor_bytes(tensor)).hexdigest())
            for name, tensor in trained.items()
        )
        texts, heldout = (
            part[TEXTS].record for part in (self.material.train, self.material.validation)
        )
        plain = RepairRecord(
            gaps=gaps_of(self.plan.removed, self.plan.model.blocks),
            reach=0,
            calibration=texts,
            heldout=heldout,
        )
        repair = (self.plan.repair or plain).model_copy(update={"healed": healed})
        return self.plan.model_copy(update={"repair": repair}), trained

    def _check_reload(
        self, stage: Path, tensors: Mapping[str, Tensor], logits: Tensor, dtype: torch.dtype
    ) -> None:
        """Raise VerificationFailed unless the new checkpoint is the trained model: its tensors in
        form those of the cut, in value those trained, its logits, computed in ``dtype``, those of
        the trained model."""
        written = self._stored(stage, self.healed)
        new, old = (
            {name: (info.dtype, info.shape) for name, info in c.tensors.items()}
            for c in (written, self.checkpoint)
        )
        if new != old:
            raise VerificationFailed("the healed checkpoint has other tensors than the cut")
        for name, tensor in tensors.items():
            if not torch.equal(written.tensor(name), tensor):
                raise VerificationFailed(f"{name} was not written as it was trained")
        if not agree(_probed(self._load(stage, dtype)), logits):
            raise VerificationFailed(
                "the healed checkpoint computes other logits than it was trained to"
            )


def gaps_of(removed: tuple[int, ...], blocks: int) -> tuple[RepairedGap, ...]:
    """The gaps of a cut of a model of so many ``blocks``, at which nothing is fitted."""
    return tuple(
        RepairedGap(removed=gap.removed, ridge=None, tensors=(), before={}, after={})
        for gap in gaps(removed, blocks)
    )


@torch.no_grad()
def _probed(model: nn.Module) -> Tensor:
    """Logits on fixed token ids, on the CPU [1, T, V]."""
    ids = probe_ids(model.config).to(next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.cpu()
