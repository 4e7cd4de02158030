"""Exactness gates: is a checkpoint really the original model without those blocks?

The comparison is with the original and its blocks bypassed, so it also judges a checkpoint that
another tool pruned.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sleb.checkpoints.checkpoint import (
    Checkpoint,
    check_fingerprint,
    identity,
    read_json,
    tensor_bytes,
    tensor_lines,
)
from sleb.checkpoints.checksums import SUMS, check_sums
from sleb.checkpoints.cut import Cut
from sleb.checkpoints.depth_fields import NUMBER_OF_BLOCKS, depth_fields
from sleb.core.errors import DataError, InputError, SlebError, UnsupportedModel, VerificationFailed
from sleb.core.plan import Plan
from sleb.core.progress import Progress, silent
from sleb.models.load import (
    LoadedModel,
    load,
    load_config,
    pick_device,
    pick_dtype,
    stream_places,
    strict_model,
)
from sleb.models.pruned_config import lost_fields, pruned_config
from sleb.models.quantization_names import quant_method
from sleb.models.source import resolve
from sleb.models.stack import BlockStack, decoder_config
from sleb.models.stored_names import block_prefix
from sleb.repairs import repaired
from sleb.surgery.apply import cut_config

HEALED = "heal.json"
"""File of a checkpoint that was trained after the cut."""
NAMES = {
    "checksums": f"files match {SUMS}",
    "repaired-tensors": "repaired tensors",
    "config-kept": "config.json keeps the original's fields",
    "depth-fields": "depth-dependent config fields",
    "clean-reload": "clean reload",
    "blocks": "number of blocks",
    "weights": "weights equal the original's",
    "weights-but-repaired": "weights equal the original's, but for the repaired",
    "logits": "logits equal the original with blocks bypassed",
    "generation": "generation with cache equals without",
}
"""Gates by their keys, in the order in which they are asked."""
NEW_TOKENS = 16
MAX_PROBE = 1040


def logit_tolerance(dtype: torch.dtype) -> float:
    """How far logits of the same weights may be apart after a reload, as a share of the largest."""
    return 1e-4 if dtype == torch.float32 else 2e-2


@dataclass(frozen=True, kw_only=True)
class Check:
    """One gate: what was measured, against which limit. ``key`` names it for programs."""

    name: str
    key: str = ""
    passed: bool
    measured: str
    limit: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """All gates of one checkpoint."""

    checkpoint: str
    removed: tuple[int, ...]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all(check.passed for check in self.checks)

    def require(self) -> None:
        """Raise VerificationFailed, naming the first gate that failed."""
        for check in self.checks:
            if not check.passed:
                raise VerificationFailed(
                    f"{self.checkpoint} failed '{check.name}': {check.measured} "
                    f"(must be {check.limit}); do not ship it"
                )


def verify(
    out: str | Path,
    *,
    model: str | Path,
    plan: Plan,
    depth: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    stream: bool | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Verification:
    """Check the checkpoint ``out`` against ``model`` with the plan's blocks bypassed and, where the
    plan records a repair, with the repaired tensors of ``out``, whose hashes must be the plan's.

    The two models are in memory one after the other, never together. In float32 on the CPU logits
    must be equal bit for bit; elsewhere within 1e-4 (float32) or 2e-2 of the largest logit.

    With ``stream``, by default where a model does not fit, blocks stay in the files and are read
    when they run. Then tensors are compared as they are stored, under their names in the files,
    and fewer tokens are generated, since each reads the model.

    Raises:
        InputError: a path is wrong, ``out`` is no checkpoint or a healed one, or the plan is for
            another model.
        UnsupportedModel: the original cannot be cut exactly.
    """
    if (Path(out) / HEALED).is_file():
        raise InputError(
            f"{out} is healed: its weights were trained after the cut, so they are not the "
            f"original's, as {HEALED} records; verify the cut that it was made from"
        )
    cut = Cut.of(plan, depth)
    removed = cut.removed
    target = pick_device(device)
    source = resolve(model, progress)
    resolve(out)
    checks: list[Check] = []
    if (Path(out) / SUMS).is_file():
        checks.append(_sums_check(Path(out), progress))
        if not checks[-1].passed:  # loading damaged files can fail in any way
            return Verification(checkpoint=str(out), removed=removed, checks=tuple(checks))
    trust = trust_remote_code
    config = load_config(source.path, trust_remote_code=trust)
    after = quant_method(read_json(Path(out) / "config.json"))
    if after and not quant_method(config):
        raise InputError(
            f"{out} is quantized ({after}) and {source.ref} is not, so no weight is equal; verify "
            "the cut that it was made from"
        )
    checked_dtype = pick_dtype(dtype, config, target)
    given = Checkpoint.open(source.path)
    lines = tensor_lines(given)
    found = identity(given, decoder_config(config).num_hidden_layers, lines)
    check_fingerprint(plan.model, found, source.ref)
    expected = pruned_config(config, removed)
    probe = probe_ids(config)
    streams = _too_large(given, checked_dtype, target) if stream is None else stream

    def load_again() -> LoadedModel:
        return load(model, dtype=dtype, device=device, stream=streams, trust_remote_code=trust)

    if cut.record:
        check, cut = _repair_check(cut, plan, Path(out))
        checks.append(check)
    with progress.stage("original with the blocks bypassed", None):
        original = load_again()
        _align(original.model)
        stack = original.stack
        prefix = block_prefix(given, stack)
        wanted = cut_config(given, stack, cut, config, expected)
        with repaired(stack, cut.repair or {}, prefix):
            if streams:
                weights = _stored_digests(lines, cut, prefix)
            else:
                weights = _digests(original.model, cut, f"{stack.path}.")
            reference = _logits(original.model, probe, stack.bypassed(removed))
        del original, stack
        gc.collect()

    with progress.stage("reloading the checkpoint", None):
        checks.append(_kept_check(Path(out), wanted, expected))
        checks.append(_config_check(Path(out), expected, trust))
        try:
            checkpoint = Checkpoint.open(out)
            if streams:
                own = load_config(Path(out), trust_remote_code=trust)
                places = {"device_map": stream_places(own, target, trust)}
                pruned = strict_model(Path(out), checked_dtype, trust, places)
            else:
                pruned = strict_model(Path(out), checked_dtype, trust).to(target)
            _align(pruned)
        except (DataError, UnsupportedModel) as error:
            checks.append(_check("clean-reload", False, str(error), "no tensor missing or extra"))
            return Verification(checkpoint=str(out), removed=removed, checks=tuple(checks))
        checks.append(_check("clean-reload", True, "0 missing, unexpected, mismatched", "0"))
    blocks = len(BlockStack(pruned))
    left = plan.model.blocks - len(removed)
    checks.append(_check("blocks", blocks == left, str(blocks), str(left)))
    stays = _stored_digests(tensor_lines(checkpoint)) if streams else _digests(pruned)
    checks.append(_weight_check(stays, weights, len(cut.record.tensors) if cut.record else 0))
    if blocks == left:
        exact = checked_dtype == torch.float32 and target.type == "cpu" and not streams
        checks.append(_logit_check(_logits(pruned, probe), reference, checked_dtype, exact))
    with progress.stage("generating", None):
        tokens = 2 if streams else NEW_TOKENS
        checks.append(_generation_check(pruned, probe, load_again, tokens))
    return Verification(checkpoint=str(out), removed=removed, checks=tuple(checks))


def _repair_check(cut: Cut, plan: Plan, out: Path) -> tuple[Check, Cut]:
    """Whether the checkpoint has the plan's repaired tensors; and the cut with those, if so."""
    key, limit = "repaired-tensors", "the hashes in the plan"
    try:
        found = Cut.of(plan, len(cut.removed), out)
    except (DataError, InputError) as error:
        return _check(key, False, str(error), limit), cut
    return _check(key, True, f"{len(found.repair or ())} tensors are the plan's", limit), found


def _sums_check(out: Path, progress: Progress) -> Check:
    """Whether the files are those that were written with the checkpoint."""
    count, wrong = check_sums(out, progress)
    measured = "; ".join([*wrong[:3], *(["..."] if len(wrong) > 3 else [])])
    measured = measured or f"{count} files are as written"
    return _check("checksums", not wrong, measured, "equal SHA-256")


def probe_ids(config: Any) -> Tensor:
    """Random but fixed token ids [1, T], longer than a sliding window (up to 1040 tokens), so
    that a wrong attention pattern shows."""
    text = decoder_config(config)
    window = getattr(text, "sliding_window", None) or 0
    longest = getattr(text, "max_position_embeddings", None) or MAX_PROBE
    length = min(max(64, window + 16), MAX_PROBE, longest - NEW_TOKENS)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, text.vocab_size, (1, max(2, length)), generator=generator)


@torch.inference_mode()
def _logits(model: nn.Module, ids: Tensor, context: Any = None) -> Tensor:
    """Logits [1, T, V] on the CPU, float32."""
    ids = ids.to(_entry(model))
    if context is None:
        return model(input_ids=ids, use_cache=False).logits.float().cpu()  # type: ignore[no-any-return]
    with context:
        return _logits(model, ids)


def _entry(model: Any) -> torch.device:
    """Where token ids go."""
    device: torch.device = model.get_input_embeddings().weight.device
    return device


def _align(model: nn.Module) -> None:
    """Move weights to where a cache line begins. In a file they start at any multiple of 8 bytes,
    a cut moves them, and some kernels then round differently."""
    for parameter in model.parameters():
        if any(part.data_ptr() % 64 for part in _stored(parameter)):
            parameter.data = parameter.data.clone()


def _digests(model: nn.Module, cut: Cut | None = None, prefix: str = "") -> dict[str, str]:
    """SHA-256 of every tensor of a loaded model, by the name that it has after the ``cut``, where
    ``prefix`` begins the names of blocks. So file layout and names do not matter."""
    tensors = {
        new: tensor
        for name, tensor in model.state_dict().items()
        if (new := cut.rename(name, prefix) if cut else name)
    }

    def digest(tensor: Tensor) -> str:
        sha = hashlib.sha256()
        for part in _stored(tensor):
            sha.update(tensor_bytes(part))
        return sha.hexdigest()

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def _too_large(model: Checkpoint, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model of that dtype would leave hardly any of the memory that is free now."""
    free = int(psutil.virtual_memory().available)
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return sum(info.numel for info in model.tensors.values()) * dtype.itemsize > 0.9 * free


def _stored_digests(
    lines: Mapping[str, str], cut: Cut | None = None, prefix: str = ""
) -> dict[str, str]:
    """Dtype, shape and SHA-256 of tensors in files, from their :func:`tensor_lines`, by the names
    that they have after the ``cut``, and of those that it repairs with the record's SHA-256."""
    found, repaired = {}, cut.record.tensors if cut and cut.record else {}
    for name, line in lines.items():
        if (new := cut.rename(name, prefix) if cut else name) is not None:
            *kind, digest = line.rstrip("\n").split("\t")[1:]
            found[new] = "\t".join([*kind, repaired.get(name, digest)])
    return found


def _stored(tensor: Any) -> list[Tensor]:
    """What a tensor consists of: torchao's quantized ones have integers and their scales inside."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _stored(getattr(tensor, name))]


def _weight_check(found: dict[str, str], expected: dict[str, str], repaired: int) -> Check:
    """Whether every tensor is as ``expected``: the original's, or one of the ``repaired``."""
    key, limit = "weights", "equal bytes in every tensor that stays"
    equal = f"{len(found)} tensors are equal"
    if repaired:
        key = "weights-but-repaired"
        limit += ", or the plan's"
        equal = f"{len(found) - repaired} tensors are equal, {repaired} are the plan's"
    differ = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    if differ:
        measured = f"{len(differ)} of {len(expected)} tensors differ, for example {differ[0]}"
        return _check(key, False, measured, limit)
    return _check(key, True, equal, limit)


def _logit_check(found: Tensor, expected: Tensor, dtype: torch.dtype, exact: bool) -> Check:
    if found.shape != expected.shape:
        return _check("logits", False, f"shape {tuple(found.shape)}", f"{tuple(expected.shape)}")
    gap = (found - expected).abs().max().item()
    limit = 0.0 if exact else expected.abs().max().item() * logit_tolerance(dtype)
    return _check("logits", gap <= limit, f"maximum difference {gap:.3g}", f"at most {limit:.3g}")


def _generation_check(
    pruned: nn.Module, ids: Tensor, reload: Callable[[], LoadedModel], tokens: int
) -> Check:
    """Greedy tokens with and without the key-value cache must agree; if they do not, but neither
    do the original's, or if that cannot generate at all, the cut is not to blame."""
    key, limit = "generation", f"{tokens} equal tokens"

    def outcome(model: nn.Module) -> tuple[int, str]:
        """How bad it is, and what there is to say."""
        try:
            if _cache_agrees(model, ids, tokens):
                return 0, limit
        except Exception as error:  # any failure of generate() is a failed gate, and is shown
            said = " ".join(str(error).split())[:400]
            return 2, f"generate() fails: {type(error).__name__}: {said}"
        return 1, "tokens differ"

    worst, said = outcome(pruned)
    if not worst or worst > outcome(reload().model)[0]:
        return _check(key, not worst, said, limit)
    return _check(key, True, f"{said}; so it is with the original", limit)


def _cache_agrees(model: Any, ids: Tensor, tokens: int) -> bool:
    prompt = ids[:, :32].to(_entry(model))
    options: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "attention_mask": torch.ones_like(prompt),
        "pad_token_id": 0,
    }
    cached, plain = (model.generate(prompt, use_cache=flag, **options) for flag in (True, False))
    return bool(torch.equal(cached, plain))


def _kept_check(out: Path, wanted: dict[str, Any], expected: Any) -> Check:
    """Every field of config.json must be the original's, in its words: other readers than this
    version of transformers would take a default for one that is gone. (Those that transformers
    knows to depend on depth are for the next check.)"""
    text = decoder_config(expected)
    known = {field.name for field in depth_fields(text.to_dict(), text.num_hidden_layers)}
    lost = list(lost_fields(wanted, read_json(out / "config.json"), known | NUMBER_OF_BLOCKS))
    measured = ", ".join(lost[:8]) + (" and others" if len(lost) > 8 else "")
    key, limit = "config-kept", "every field as the original has it"
    if lost:
        return _check(key, False, f"gone or changed: {measured}", limit)
    return _check(key, True, f"{len(wanted)} fields are kept", limit)


def _config_check(out: Path, expected: Any, trust_remote_code: bool) -> Check:
    """Every depth-dependent field must be what the re-index rules make of the original's."""
    key = "depth-fields"
    try:
        text = decoder_config(load_config(out, trust_remote_code=trust_remote_code)).to_dict()
    except SlebError as error:
        return _check(key, False, str(error), "a config that loads")
    want = decoder_config(expected).to_dict()
    depth = decoder_config(expected).num_hidden_layers
    names = [field.name for field in depth_fields(want, depth)]
    for field in names:
        if text.get(field) != want.get(field):
            return _check(key, False, f"{field} = {text.get(field)}", f"{want.get(field)}")
    return _check(key, True, ", ".join(names) or "none besides the number of blocks", "re-indexed")


def _check(key: str, passed: bool, measured: str, limit: str) -> Check:
    return Check(name=NAMES[key], key=key, passed=passed, measured=measured, limit=limit)
