"""What a search is asked for, checked before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sleb.calibration import check_sources
from sleb.calibration.answers import check_prompts
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.depth_fields import reindex
from sleb.config import SearchConfig, UnitKind
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.plan import SimilarityGate, blocks_to_remove, parse_blocks, parse_removal
from sleb.core.process_group import group
from sleb.core.progress import Progress, silent, tell
from sleb.core.units import ATTENTION, MLP, Unit
from sleb.models.fixed_blocks import fixed_blocks, refuse_parts
from sleb.models.load import load_config
from sleb.models.source import resolve
from sleb.models.stack import decoder_config, giving_positions
from sleb.selection.goal import Goal, check_candidates, check_larger, parse_bytes
from sleb.selection.metrics import METRICS
from sleb.selection.similarity import Similarity
from sleb.selection.strategies import GREEDY_OR_WINDOW, STRATEGIES


def check_options(config: SearchConfig) -> Goal:
    """The target among a search's options, if all of these go together. Looks at no file.

    Raises:
        InputError: no target, two or an impossible one; names that do not exist, a threshold that
            is no number; a metric, strategy and target that do not go together.
    """
    goal = Goal.of(config)
    metric = METRICS[config.chosen_by]
    strategy = config.strategy or metric.strategy
    STRATEGIES[strategy]
    if config.min_similarity is not None:
        _threshold(config.min_similarity)
    if config.max_memory is not None:
        parse_bytes(config.max_memory, "--max-memory")
    if metric.token is None and strategy != metric.strategy:
        by = config.chosen_by
        raise InputError(f"--metric {by} ranks all blocks at once: it has no --strategy")
    if goal.limit is not None and strategy not in ("greedy", "one-shot"):
        asked = "--max-loss-increase" if goal.keep_answers is None else "--keep-answers"
        raise InputError(
            f"{asked} tests one removal after the other, and --strategy {strategy} "
            "chooses a set of known size: use greedy, or a plan's --curve"
        )
    if config.unit != "block":
        _check_parts(config, strategy)
    elif config.save:
        raise InputError("--save is for parts of blocks: give --unit attention, mlp or any too")
    if config.compile and config.stream:
        raise InputError("streamed blocks cannot be compiled: leave out --compile or --stream")
    return goal


def _check_parts(config: SearchConfig, strategy: str) -> None:
    """Raise InputError for what goes with whole blocks alone."""
    refused = {
        f"--strategy {strategy}": strategy != "greedy",
        "--min-similarity": config.min_similarity is not None,
        "--compile": config.compile,
        f"--metric {config.chosen_by}": METRICS[config.chosen_by].repaired,
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
    check_prompts(config.prompts, config.max_prompts)
    source = group().sequentially(lambda: resolve(model, progress))
    if goal.size is not None:
        file = Path(source.ref).expanduser()
        nbytes = file.stat().st_size if source.is_gguf else Checkpoint.open(source.path).nbytes
        check_larger(goal.size, nbytes)
    loaded = load_config(source.path, trust_remote_code=config.trust_remote_code)
    blocks = getattr(decoder_config(loaded), "num_hidden_layers", None)
    if isinstance(blocks, int):  # else loading the model says what is wrong with it
        candidates_for(goal, config.protect, blocks, loaded, config.unit)
        _tell_rounded(goal, blocks, progress)


def _tell_rounded(goal: Goal, blocks: int, progress: Progress) -> None:
    percent = None if goal.remove is None else parse_removal(goal.remove)[1]
    if percent is not None and round(percent * blocks, 4) % 100:
        n = removals(goal, blocks)
        tell(progress, f"{percent:g} % of {blocks} blocks, rounded up: {n}")


def strategy_before_repair(goal: Goal, config: SearchConfig) -> str | None:
    """The strategy of a search whose result is repaired: for a number of blocks, by default the one
    that compares sets after quick repairs. None for the metric's own."""
    plain = config.unit == "block" and config.chosen_by in ("loss", "answers")
    compares = plain and goal.remove is not None
    return config.strategy or (GREEDY_OR_WINDOW if compares else None)


def removals(goal: Goal, n_blocks: int, protected: int = 0) -> int:
    """How many blocks the goal removes at least."""
    return 1 if goal.remove is None else blocks_to_remove(goal.remove, n_blocks, protected)


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
    least = removals(goal, n_blocks, len(protected) if unit == "block" else 0)
    check_candidates(least, len(candidates), n_blocks, len(protected))
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
