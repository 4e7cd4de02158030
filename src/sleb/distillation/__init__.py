"""Healing, the optional second stage: the cut model learns from the dense one what it lost.

    done = heal("smaller", "MODEL", "healed", text=["mail.jsonl"])
    done.texts["mail"].healed_ratio      # perplexity on held-out windows, as a ratio to the dense

The cut itself needs no training; this does, and its result is a checkpoint of the same shape.
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from sleb.calibration import Windows, check_sources
from sleb.checkpoints.checkpoint import Checkpoint, check_fingerprint, fingerprint
from sleb.checkpoints.checksums import write_sums
from sleb.checkpoints.cut import Cut
from sleb.core.errors import InputError, ResourceError, VerificationFailed
from sleb.core.files import enough_space, staged_dir, writable_target
from sleb.core.plan import Plan
from sleb.core.progress import Progress, silent
from sleb.core.statistics import Values
from sleb.distillation.data import JUDGES, heal_windows
from sleb.distillation.record import Healed, card
from sleb.distillation.reload import check_reload, probed
from sleb.distillation.split_model import SplitModel
from sleb.distillation.state import state_path
from sleb.distillation.student import Student, check_adapters, recomputed
from sleb.distillation.training import Schedule, Training
from sleb.distillation.validation import by_text, in_all, measure
from sleb.models.load import LoadedModel, load, load_config, strict_model
from sleb.models.stack import decoder_config
from sleb.surgery.apply import cut_checkpoint, refuse_source
from sleb.surgery.verification import HEALED

__all__ = ["BATCH", "LENGTH", "LR", "TOKENS", "Healed", "heal"]

TOKENS = 1_000_000
LENGTH = 1024
BATCH = 8
LR = 6e-4
TOKENS_AT_ONCE = {"cuda": 8192, "cpu": 1024}


def heal(
    cut: str | Path,
    model: str | Path,
    out: str | Path,
    *,
    text: Sequence[str] = (),
    tokens: int = TOKENS,
    length: int | None = None,
    lr: float = LR,
    batch: int = BATCH,
    at_once: int | None = None,
    minutes: float | None = None,
    heldout: int = JUDGES,
    lora: int | None = None,
    recompute: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    save_every: float = 60.0,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Healed:
    """Train the checkpoint ``cut``, which a plan of ``model`` made, to predict what ``model``
    predicts, and write the result as the checkpoint ``out``: same names, shapes and dtypes.

    The loss is KL(dense || cut) over all positions (distillation, 1503.02531), in nats/token;
    AdamW on float32 weights, gradients clipped to norm 1. All weights of the blocks and the norms
    are trained, or with ``lora`` only adapters of that rank. ``heldout`` windows of the texts are
    set aside; their divergence is measured ten times in a run, a run stops when it was no better
    three times on end, and the weights of the best time are taken.

    ``tokens``: how much text is gone through, more than once if there is less of it; ``length``:
    tokens per window, by default 1024 or what the model reads; ``batch``: windows per step;
    ``at_once``: windows per pass, fewer need less memory; ``minutes``: of training, at most;
    ``recompute``: keep only the blocks' inputs for the backward pass, for less memory and a third
    more time. What a stopped run needs to go on is in the file ``out``.heal, written every
    ``save_every`` seconds and at Ctrl-C; the same call again goes on, on a CPU to the same bits.

    Raises:
        InputError: ``cut`` holds no plan of ``model``, or is healed already; the text is too
            short; ``out`` exists; the state is of other settings.
        UnsupportedModel: weights are quantized or stored under other names.
        VerificationFailed: healing made nothing better, or the result does not load as it was.
        DataError, ResourceError: see ``sleb.core.errors``.
    """
    cut, out = Path(cut), Path(out)
    writable_target(out, force=force)
    numbers = {
        "tokens": tokens,
        "length": length,
        "lr": lr,
        "batch": batch,
        "at-once": at_once,
        "minutes": minutes,
        "heldout": heldout,
        "lora": lora,
    }
    plan = _check(cut, text, numbers)
    refuse_source(out, cut)
    dense = load(
        model,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    refuse_source(out, dense.source.path)
    source = Checkpoint.open(dense.source.path)
    with progress.stage("checking the model against the plan", source.nbytes) as tick:
        found = fingerprint(source, len(dense.stack), tick)
        check_fingerprint(plan.model, found, dense.source.ref)
    checkpoint = Checkpoint.open(cut)
    config = load_config(cut, trust_remote_code=trust_remote_code)
    blocks = decoder_config(config).num_hidden_layers
    if blocks != plan.model.blocks - len(plan.removed):
        raise InputError(
            f"{cut} has {blocks} blocks, and its plan leaves {plan.model.blocks} - "
            f"{len(plan.removed)}: it is not of this plan"
        )
    identity = fingerprint(checkpoint, blocks)
    longest = dense.stack.max_length or LENGTH
    length = length or min(LENGTH, longest)
    if dense.stack.max_length and length > longest:
        raise InputError(
            f"windows of {length} tokens are longer than the {longest} that {dense.stack.name} "
            f"reads: use --length {longest}"
        )
    schedule = Schedule(
        steps=max(1, math.ceil(tokens / (batch * length))),
        batch=batch,
        lr=lr,
        seconds=None if minutes is None else 60 * minutes,
    )
    windows, judges = heal_windows(
        dense.tokenizer,
        text,
        batch=batch,
        wanted=schedule.steps * batch,
        judges=heldout,
        length=length,
        seed=seed,
    )
    target = dense.stack.input_device
    at_once = at_once or max(1, TOKENS_AT_ONCE.get(target.type, 1024) // length)
    settings = {
        "model": plan.model.weights_sha256,
        "cut": identity.weights_sha256,
        "windows": windows.record.sha256,
        "held-out windows": judges.record.sha256,
        "tokens": tokens,
        "length": length,
        "batch": batch,
        "at_once": at_once,
        "lr": lr,
        "minutes": minutes,
        "lora": lora,
        "recompute": recompute,
        "seed": seed,
        "device": target.type,
        "dtype": dense.dtype,
    }
    try:
        teacher = SplitModel(dense.model.requires_grad_(False))
        with progress.stage("measuring the cut", None):
            before = _measured(cut, dense, teacher, judges, at_once, trust_remote_code)
        mixed = None if dense.stack.dtype == torch.float32 else torch.bfloat16
        kept = dense.stack.dtype if lora else torch.float32
        pruned = strict_model(cut, kept, trust_remote_code).to(target)
        student = Student(pruned, checkpoint, rank=lora, seed=seed)
        # of float32: weights, best, and two moments; and room to replace the file as a whole
        count = sum(p.numel() for p in student.trained.values())
        enough_space(out.parent, checkpoint.nbytes + 2 * 16 * count)
        training = Training(
            student=SplitModel(pruned, autocast=mixed),
            teacher=teacher,
            trained=student.trained,
            windows=windows,
            judges=judges,
            schedule=schedule,
            at_once=at_once,
            seed=seed,
            settings=settings,
            state=state_path(out),
            save_every=save_every,
            progress=progress,
        )
        with recomputed(training.student.stack, recompute):
            where, stopped = training.run(before)
        del training
        if where.best_step == 0:
            state_path(out).unlink(missing_ok=True)
            raise VerificationFailed(
                f"healing did not bring {cut} nearer to the dense model on held-out text "
                f"({stopped}); nothing was written: give a lower --lr, or more --text"
            )
        tensors = student.finish()
        trained = (probed(pruned), torch.float32, target)
        del pruned, student
        gc.collect()
        with staged_dir(out, force=force) as stage:
            cut_checkpoint(
                checkpoint,
                Cut(blocks=blocks, removed=(), repair=tensors),
                stage,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
            shutil.copyfile(cut / "plan.json", stage / "plan.json")
            with progress.stage("reloading the checkpoint", None):
                check_reload(stage, checkpoint, tensors, trained, trust_remote_code)
                after = _measured(stage, dense, teacher, judges, at_once, trust_remote_code)
            done = Healed(
                path=str(out),
                model=dense.source.ref,
                cut=str(cut),
                removed=plan.removed,
                repaired=plan.repair is not None,
                texts=by_text(before, after, judges),
                overall=in_all(before, after),
                steps=where.step,
                best_step=where.best_step,
                tokens=where.step * batch * length,
                passes=round(where.step * batch / len(windows.ids), 3),
                stopped=stopped,
                seconds=round(where.seconds, 1),
                trained_parameters=count,
                checks=where.checks,
                settings=settings,
                calibration=windows.record,
                heldout=judges.record,
                cut_sha256=identity.weights_sha256,
                healed_sha256=fingerprint(Checkpoint.open(stage), blocks).weights_sha256,
            )
            done.save(stage / HEALED)
            (stage / "README.md").write_text(card(cut, done), encoding="utf-8")
            write_sums(stage, progress)
    except torch.OutOfMemoryError:
        raise ResourceError(
            f"out of memory on {target} with --at-once {at_once}; give a lower --at-once, "
            "--recompute, or --lora 16"
        ) from None
    state_path(out).unlink(missing_ok=True)
    return done


def _check(cut: Path, text: Sequence[str], numbers: Mapping[str, float | None]) -> Plan:
    """Refuse what is wrong before anything is loaded; the plan of the cut."""
    if not cut.is_dir():
        raise InputError(f"no checkpoint folder at {cut}; make one with: sleb prune")
    if (cut / HEALED).exists():
        raise InputError(f"{cut} is healed already; heal the cut that it was made from")
    if not (cut / "plan.json").is_file():
        raise InputError(
            f"{cut} has no plan.json, so it is not known what was cut from which model"
        )
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise InputError(f"--{name} {value} is not possible; give more than 0")
    if numbers["lora"]:
        check_adapters()
    check_sources(text)
    return Plan.load(cut / "plan.json")


def _measured(
    path: Path, dense: LoadedModel, teacher: SplitModel, judges: Windows, at_once: int, trust: bool
) -> Values:
    """A checkpoint on the held-out windows, in the dtype of the dense model."""
    model = strict_model(path, dense.stack.dtype, trust).to(dense.stack.input_device)
    return measure(SplitModel(model), teacher, judges, at_once)
