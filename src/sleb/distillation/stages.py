"""In stages: a shallower cut is healed, cut on, and healed again, down to the depth of the plan.

Each cut takes less away at once, from a model that has learned to do without what went before
(iterative pruning and distillation, Minitron, 2407.14679).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.cut import Cut, block_prefix_of
from sleb.config import HEAL_TOKENS, HealConfig
from sleb.core.errors import InputError
from sleb.core.files import staged_dir, write_text
from sleb.core.plan import Plan
from sleb.core.process_group import group
from sleb.core.progress import Progress
from sleb.distillation.distill import NO_HOOKS, Hooks, gaps_of, heal
from sleb.models.load import cuda_or_cpu, pick_device
from sleb.surgery.apply import apply, cut_checkpoint


def stages_folder(out: Path) -> Path:
    """Where the stages of a healing into ``out`` are, until it is done."""
    return out.with_name(f"{out.name}.stages")


def first_stages(
    cut: Path,
    model: str | Path,
    out: Path,
    config: HealConfig,
    *,
    hooks: Hooks = NO_HOOKS,
    progress: Progress,
) -> tuple[Path, HealConfig]:
    """Heal all but the last of the ``config.stages`` stages of the plan of ``cut``; where the last
    one starts, and its options. What is in :func:`stages_folder` already is not done again.

    Raises:
        InputError: the plan removes fewer blocks than there are stages, or what is there is of
            other settings; or as :func:`heal`.
        VerificationFailed, UnsupportedModel, DataError, ResourceError: as :func:`heal`.
    """
    if not (cut / "plan.json").is_file():
        raise InputError(f"{cut} has no plan.json, so it cannot be made in stages")
    plan, total, place = Plan.load(cut / "plan.json"), config.stages, stages_folder(out)
    if len(plan.order) < total:
        raise InputError(f"--stages {total}: {cut} lacks {len(plan.order)} blocks; give no more")
    each = _share(config)
    asked = [each.model_dump(mode="json"), str(model), plan.to_json(), total]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    mark = place / "settings"

    def begin() -> str:
        if place.exists() and not (mark.is_file() and mark.read_text() == key):
            raise InputError(f"{place} is of a run with other settings; remove it to start anew")
        place.mkdir(exist_ok=True)
        write_text(mark, key)
        return ""

    group().broadcast_from_main(begin)
    for stage in range(1, total + 1):
        start, done = (place / f"{kind}-{stage}" for kind in ("cut", "healed"))

        def there(stage: int = stage, start: Path = start, done: Path = done) -> str:
            """Make the cut; whether it is healed."""
            depth, trust = -(-len(plan.order) * stage // total), config.trust_remote_code
            if not start.exists() and stage == 1:
                first = Cut.of(plan, depth).without_repair()
                how = {"keep": False, "trust_remote_code": trust}
                apply(plan, model, start, cut=first, progress=progress, **how)
            elif not start.exists():
                cut_on(place / f"healed-{stage - 1}", plan, depth, start, trust, progress)
            return "healed" if done.exists() else ""

        if not group().broadcast_from_main(there) and stage < total:
            heal(start, model, done, each, hooks=hooks, progress=progress)
    return start, each.replaced({"force": config.force, "stages": total})


def _share(config: HealConfig) -> HealConfig:
    """The options of one stage, whose part of the training is as large as any other's."""
    tokens, minutes = config.tokens, config.minutes
    if tokens is None and minutes is None:
        tokens = HEAL_TOKENS[cuda_or_cpu(pick_device(config.device))]
    part = {
        "tokens": tokens and max(1, tokens // config.stages),
        "minutes": minutes and minutes / config.stages,
    }
    return config.replaced({**part, "stages": 1, "force": False})


def cut_on(
    healed: Path, plan: Plan, depth: int, out: Path, trust_remote_code: bool, progress: Progress
) -> None:
    """Write ``out``: ``healed`` without what the first ``depth`` removals of ``plan`` take more, as
    a cut of the model that the plan is of, whose other blocks are as they were trained."""
    before, order = Plan.load(healed / "plan.json"), plan.order[:depth]
    kept, removed = Cut.of(before).kept, plan.at_depth(depth)
    further = tuple(kept.index(block) for block in removed if block in kept)
    assert before.repair is not None, "what is healed records it"
    tensors = tuple(t for t in before.repair.healed if _block(t.name) not in removed)
    record = {"gaps": gaps_of(removed, plan.model.blocks), "healed": tensors}
    repair = before.repair.model_copy(update=record)
    update = {"removed": removed, "order": order, "repair": repair}
    with staged_dir(out, force=False) as stage:
        cut_checkpoint(
            Checkpoint.open(healed),
            Cut(blocks=len(kept), removed=further),
            stage,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        plan.model_copy(update=update).save(stage / "plan.json")


def _block(name: str) -> int:
    """The number of the block in the name of one of its tensors."""
    return int(name.removeprefix(block_prefix_of(name)).partition(".")[0])
