"""The gates of :func:`sleb.verify`: each compares one thing and says what it found, in figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sleb.checkpoints.checkpoint import read_json
from sleb.checkpoints.checksums import check_sums
from sleb.checkpoints.cut import Cut
from sleb.checkpoints.depth_fields import NUMBER_OF_BLOCKS, depth_fields
from sleb.core.errors import DataError, InputError, SlebError
from sleb.core.finding import Finding, finding
from sleb.core.plan import Plan
from sleb.core.progress import Progress
from sleb.models.load import LoadedModel, load_config
from sleb.models.pruned_config import lost_fields
from sleb.models.stack import decoder_config

GATES = (
    "checksums",
    "repaired-tensors",
    "config-kept",
    "depth-fields",
    "clean-reload",
    "blocks",
    "weights",
    "weights-but-repaired",
    "logits",
    "logits-of-image",
    "generation",
)
"""Keys of the gates, in the order in which they are asked."""
NAMED = 8  # fields or files of many that are named


@dataclass(frozen=True, kw_only=True)
class Check:
    """One gate, by its key in :data:`GATES`, and what it found."""

    key: str
    passed: bool
    found: Finding


def check_checksums(out: Path, progress: Progress) -> Check:
    """Whether the files are those that were written with the checkpoint."""
    files, wrong = check_sums(out, progress)
    found = finding("equal", files=files)
    if wrong:
        by_state = {
            state: tuple([name for name, its in wrong.items() if its == state][:NAMED])
            for state in sorted({*wrong.values()})
        }
        found = finding("differ", wrong=len(wrong), files=files, **by_state)
    return Check(key="checksums", passed=not wrong, found=found)


def check_repair(cut: Cut, plan: Plan, out: Path) -> tuple[Check, Cut]:
    """Whether the checkpoint has the plan's repaired tensors; and the cut with those, if so."""
    key = "repaired-tensors"
    try:
        whole = Cut.of(plan, folder=out, parts=bool(cut.parts))
    except (DataError, InputError) as error:
        return Check(key=key, passed=False, found=finding("error", error=str(error))), cut
    return Check(
        key=key, passed=True, found=finding("equal", tensors=len(whole.repair or ()))
    ), whole


def check_config_kept(out: Path, wanted: dict[str, Any], expected: Any = None) -> Check:
    """Every field of config.json must be the original's, in its words: other readers than this
    version of transformers would take a default for one that is gone. Those that transformers knows
    to depend on depth, by the config ``expected``, are for the next check. Where there is none,
    since nothing loads the folder, no field may be added either."""
    own = read_json(out / "config.json")
    if expected is None:
        lost = sorted(n for n in wanted.keys() | own.keys() if wanted.get(n) != own.get(n))
    else:
        text = decoder_config(expected)
        known = {field.name for field in depth_fields(text.to_dict(), text.num_hidden_layers)}
        lost = list(lost_fields(wanted, own, known | NUMBER_OF_BLOCKS))
    found = finding("equal", fields=len(wanted))
    if lost:
        found = finding("differ", wrong=len(lost), fields=len(wanted), names=tuple(lost[:NAMED]))
    return Check(key="config-kept", passed=not lost, found=found)


def check_depth_fields(out: Path, expected: Any, trust_remote_code: bool) -> Check:
    """Every depth-dependent field must be what the re-index rules make of the original's."""
    key = "depth-fields"
    try:
        text = decoder_config(load_config(out, trust_remote_code=trust_remote_code)).to_dict()
    except SlebError as error:
        return Check(key=key, passed=False, found=finding("error", error=str(error)))
    want = decoder_config(expected).to_dict()
    depth = decoder_config(expected).num_hidden_layers
    names = [field.name for field in depth_fields(want, depth)]
    for name in names:
        if text.get(name) != want.get(name):
            values = {"value": str(text.get(name)), "expected": str(want.get(name))}
            found = finding("differ", field=name, **values)
            return Check(key=key, passed=False, found=found)
    found = finding("equal", fields=(*names,)) if names else finding("none")
    return Check(key=key, passed=True, found=found)


def check_reload(error: Exception | None = None) -> Check:
    """Whether every tensor was accounted for on loading, or the ``error`` that says what not."""
    found = finding("equal") if error is None else finding("error", error=str(error))
    return Check(key="clean-reload", passed=error is None, found=found)


def check_blocks(blocks: int, expected: int) -> Check:
    """Whether as many blocks are left as should be."""
    found = finding("counted", blocks=blocks, expected=expected)
    return Check(key="blocks", passed=blocks == expected, found=found)


def check_weights(found: dict[str, str], expected: dict[str, str], repaired: int) -> Check:
    """Whether every tensor, by its digest, is as ``expected``: the original's, or one of the
    ``repaired``."""
    key = "weights-but-repaired" if repaired else "weights"
    differ = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    if differ:
        of = {"wrong": len(differ), "tensors": len(expected)}
        return Check(key=key, passed=False, found=finding("differ", **of, example=differ[0]))
    others = {"repaired": repaired} if repaired else {}
    equal = finding("equal", tensors=len(found) - repaired, **others)
    return Check(key=key, passed=True, found=equal)


def logit_tolerance(dtype: torch.dtype) -> float:
    """How far logits of the same weights may be apart after a reload, as a share of the largest."""
    return 1e-4 if dtype == torch.float32 else 2e-2


def check_logits(
    found: Tensor, expected: Tensor, dtype: torch.dtype, exact: bool, *, key: str = "logits"
) -> Check:
    """Whether logits are equal: bit for bit if ``exact``, else within :func:`logit_tolerance`."""
    if found.shape != expected.shape:
        shapes = {"shape": str(tuple(found.shape)), "expected": str(tuple(expected.shape))}
        return Check(key=key, passed=False, found=finding("shape", **shapes))
    gap = (found - expected).abs().max().item()
    limit = 0.0 if exact else expected.abs().max().item() * logit_tolerance(dtype)
    return Check(key=key, passed=gap <= limit, found=finding("gap", gap=gap, limit=limit))


def check_generation(
    pruned: nn.Module, ids: Tensor, reload: Callable[[], LoadedModel], tokens: int
) -> Check:
    """Greedy tokens with and without the key-value cache must agree; if they do not, but neither
    do the original's, or if that cannot generate at all, the cut is not to blame."""
    worse = ("equal", "differ", "error")

    def outcome(model: nn.Module) -> Finding:
        try:
            same = cache_agrees(model, ids, tokens)
        except Exception as error:  # any failure of generate() is a failed gate, and is shown
            said = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            return finding("error", error=said, tokens=tokens)
        return finding("equal" if same else "differ", tokens=tokens)

    found = outcome(pruned)
    passed = found.key == "equal"
    if not passed and worse.index(found.key) <= worse.index(outcome(reload().model).key):
        passed, found = True, Finding(f"original-{found.key}", found.values)
    return Check(key="generation", passed=passed, found=found)


def cache_agrees(model: Any, ids: Tensor, tokens: int) -> bool:
    """Whether the first ``tokens`` that a model writes behind ``ids`` [1, T] are those that it
    writes without a key-value cache."""
    prompt = ids[:, :32].to(entry(model))
    options: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "attention_mask": torch.ones_like(prompt),
        "pad_token_id": 0,
    }
    cached, plain = (model.generate(prompt, use_cache=flag, **options) for flag in (True, False))
    return bool(torch.equal(cached, plain))


def entry(model: Any) -> torch.device:
    """Where token ids go."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device
