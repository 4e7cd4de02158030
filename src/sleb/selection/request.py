"""What a search is asked for, checked before any weight is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sleb.calibration import check_sources
from sleb.calibration.answers import prompts_of
from sleb.checkpoints.depth_fields import reindex
from sleb.config import SearchConfig, TargetOptions, UnitKind
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.plan import SimilarityGate, Target, blocks_to_remove, parse_blocks
from sleb.core.process_group import group
from sleb.core.progress import Progress, silent
from sleb.core.units import ATTENTION, MLP, Unit
from sleb.models.fixed_blocks import fixed_blocks, refuse_parts
from sleb.models.load import load_config
from sleb.models.source import resolve
from sleb.models.stack import decoder_config, giving_positions
from sleb.selection.metrics import METRICS
from sleb.selection.similarity import Similarity
from sleb.selection.strategies import STRATEGIES


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One target as the user gave it; exactly one may be given."""

    remove: int | str | None = None
    max_loss_increase: float | None = None
    keep_answers: float | None = None
    speedup: float | None = None
    size: int | str | None = None

    def __post_init__(self) -> None:
        given = [f"--{k.replace('_', '-')}" for k, v in vars(self).items() if v is not None]
        if len(given) != 1:
            choice = "--remove, --max-loss-increase, --keep-answers, --speedup or --size"
            raise InputError(
                f"{' and '.join(given)} are two targets: give one of {choice}"
                if given
                else f"no target: give one of {choice}, for example --remove 20%"
            )
        if self.max_loss_increase is not None and not 0 < self.max_loss_increase < math.inf:
            raise InputError(
                f"--max-loss-increase {self.max_loss_increase} is not possible; give nats/token "
                "above 0, for example 0.1 (10.5 % more perplexity)"
            )
        if self.keep_answers is not None and not 0 < self.keep_answers < 1:
            raise InputError(
                f"--keep-answers {self.keep_answers} is not possible; give a share of tokens below "
                "1, for example 0.95"
            )
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise InputError(f"--speedup {self.speedup} is not possible; give for example 1.25")
        if self.size is not None:
            parse_bytes(self.size, "--size")

    @property
    def limit(self) -> float | None:
        """The most that a removal may cost on text or answers that took no part in the choice:
        nats/token, or the share of tokens that are no longer kept. None for other targets."""
        kept = self.keep_answers
        return self.max_loss_increase if kept is None else 1 - kept

    def reached(self, bound: float) -> Target:
        """The record of a limit that is kept up to ``bound``."""
        if self.keep_answers is not None:
            kept = round(1 - bound, 6)
            return Target(kind="keep-answers", limit=self.keep_answers, reached=kept)
        assert self.max_loss_increase is not None
        limit = self.max_loss_increase
        return Target(kind="max-loss-increase", limit=limit, reached=round(bound, 6))

    @classmethod
    def of(cls, config: TargetOptions) -> Goal:
        """The goal that was given; for a curve without one, to remove half of the blocks."""
        given = {field.name: getattr(config, field.name) for field in fields(cls)}
        if config.curve and all(value is None for value in given.values()):
            return cls(remove="50%")
        return cls(**given)


def parse_bytes(text: int | str, option: str) -> int:
    """Bytes of ``"100MB"``, ``"1.5 GiB"`` or a plain number of bytes.

    Raises:
        InputError: not a size.
    """
    match = re.fullmatch(
        r"(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]i?)?B?", str(text).strip(), re.IGNORECASE
    )
    if not match or float(match[1]) <= 0:
        raise InputError(f"{option} {text!r} is not a size; write for example 100MB or 1.5GiB")
    unit = (match[2] or "").upper()
    base = 1024 if unit.endswith("I") else 1000
    return int(float(match[1]) * base ** ("KMGT".index(unit[0]) + 1 if unit else 0))


def check_options(config: SearchConfig) -> Goal:
    """The target among a search's options, if all of these go together. Looks at no file.

    Raises:
        InputError: no target, two or an impossible one; names that do not exist, a threshold that
            is no number; a metric, strategy and target that do not go together.
    """
    goal = Goal.of(config)
    metric = METRICS[config.metric]
    strategy = config.strategy or metric.strategy
    STRATEGIES[strategy]
    if config.min_similarity is not None:
        _threshold(config.min_similarity)
    if config.max_memory is not None:
        parse_bytes(config.max_memory, "--max-memory")
    if metric.token is None and strategy != metric.strategy:
        raise InputError(f"--metric {config.metric} ranks all blocks at once: it has no --strategy")
    if goal.limit is not None and strategy not in ("greedy", "one-shot"):
        asked = "--max-loss-increase" if goal.keep_answers is None else "--keep-answers"
        raise InputError(
            f"{asked} tests one removal after the other, and --strategy {strategy} "
            "chooses a set of known size: use greedy, or a plan's --curve"
        )
    if config.unit != "block":
        _check_parts(config, strategy)
    if config.compile and config.stream:
        raise InputError("streamed blocks cannot be compiled: leave out --compile or --stream")
    return goal


def _check_parts(config: SearchConfig, strategy: str) -> None:
    """Raise InputError for what goes with whole blocks alone."""
    refused = {
        f"--strategy {strategy}": strategy != "greedy",
        "--min-similarity": config.min_similarity is not None,
        "--compile": config.compile,
    }
    for asked, given in refused.items():
        if given:
            raise InputError(
                f"{asked} is for whole blocks: leave it out, or --unit {config.unit}, which is "
                "searched by greedy"
            )


def check_request(model: str | Path, config: SearchConfig, progress: Progress = silent) -> None:
    """Find mistakes in a search's options before weights are loaded, from the config alone.

    Raises:
        InputError, UnsupportedModel: as :func:`sleb.search`.
    """
    goal = check_options(config)
    check_sources(config.text)
    prompts_of(config.prompts)
    source = group().sequentially(lambda: resolve(model, progress))
    loaded = load_config(source.path, trust_remote_code=config.trust_remote_code)
    blocks = getattr(decoder_config(loaded), "num_hidden_layers", None)
    if isinstance(blocks, int):  # else loading the model says what is wrong with it
        candidates_for(goal, config.protect, blocks, loaded, config.unit)


def removals(goal: Goal, n_blocks: int) -> int:
    """How many blocks the goal removes at least."""
    return 1 if goal.remove is None else blocks_to_remove(goal.remove, n_blocks)


def candidates_for(
    goal: Goal, protect: str, n_blocks: int, config: Any, unit: UnitKind = "block"
) -> list[int]:
    """The blocks that may go, or the parts of these.

    Raises:
        InputError: fewer than are to be removed.
        UnsupportedModel: none can be cut exactly.
    """
    protected = parse_blocks(protect, n_blocks)
    protected |= fixed_blocks(config, protected)
    blocks = [b for b in range(n_blocks) if b not in protected]
    candidates = blocks if unit in ("block", "any") else []
    if unit != "block":
        refuse_parts(config)
    if unit in (ATTENTION, "any"):
        keep = giving_positions(config)
        candidates = candidates + [Unit.of(b, ATTENTION) for b in blocks if b not in keep]
    if unit in (MLP, "any"):
        candidates = candidates + [Unit.of(b, MLP) for b in blocks]
    n = removals(goal, n_blocks)
    if n > len(candidates):
        raise InputError(
            f"cannot remove {n} of {len(candidates)} candidates ({n_blocks} less "
            f"{len(protected)} protected); remove fewer, or protect fewer with --protect ''"
        )
    if unit in ("block", "any"):
        _some_cut_is_exact(config, blocks)
    return candidates


def _some_cut_is_exact(config: Any, candidates: Sequence[int]) -> None:
    """Raise UnsupportedModel if no candidate could be removed alone: a search would be in vain."""
    text = decoder_config(config)
    fields, n = text.to_dict(), text.num_hidden_layers
    refusal: UnsupportedModel | None = None
    for block in candidates:
        try:
            reindex(fields, [b for b in range(n) if b != block], n)
        except UnsupportedModel as error:
            refusal = refusal or error
        else:
            return
    if refusal:
        raise refusal


def _threshold(given: float | str) -> float | None:
    """``--min-similarity`` as a number; None if it is to be picked."""
    if given == "auto":
        return None
    try:
        return float(given)
    except ValueError:
        raise InputError(f"--min-similarity {given!r} is neither a number nor auto") from None


def above(
    similarity: Similarity, candidates: Sequence[int], threshold: float | str, n: int
) -> tuple[list[int], SimilarityGate]:
    """The candidates whose similarity reaches the threshold, and the record of it.

    Raises:
        InputError: fewer than ``n`` do, or the threshold is no number.
    """
    value = _threshold(threshold)
    if value is None:
        value = similarity.auto_threshold(candidates, n)
    kept = [b for b in candidates if similarity.blocks[b].mean >= value]
    best = sorted((similarity.blocks[b].mean for b in candidates), reverse=True)
    if len(kept) < n:
        raise InputError(
            f"--min-similarity {value:g} leaves {len(kept)} candidates for {n} removals; "
            f"at most {best[n - 1]:.4f} leaves enough"
        )
    return kept, SimilarityGate(measure="cosine", threshold=value, candidates=tuple(kept))
