"""Exactness: is a checkpoint really the original model without those blocks?

The comparison is with the original and its blocks bypassed, so it also judges a checkpoint that
another tool pruned. What is compared is in :mod:`sleb.surgery.gates`.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typing_extensions import Self

from sleb.checkpoints.checkpoint import (
    Checkpoint,
    check_fingerprint,
    identity,
    plan_alone,
    read_json,
    tensor_bytes,
    tensor_lines,
)
from sleb.checkpoints.checksums import SUMS
from sleb.checkpoints.cut import Cut
from sleb.config import CheckOptions, DeviceOptions, takes
from sleb.core.errors import DataError, InputError, UnsupportedModel, VerificationFailed
from sleb.core.plan import Plan, RepairRecord
from sleb.core.progress import Progress, silent
from sleb.core.units import UnitId
from sleb.models.load import (
    LoadedModel,
    load,
    load_config,
    pick_device,
    pick_dtype,
    stream_places,
    strict_model,
)
from sleb.models.pruned_config import pruned_config
from sleb.models.quantization_names import quant_method
from sleb.models.source import ModelSource, resolve
from sleb.models.stack import BlockStack, decoder_config
from sleb.models.stored_names import block_prefix
from sleb.repairs import repaired
from sleb.surgery import gates, nemotron_nas
from sleb.surgery.apply import cut_config
from sleb.surgery.gates import Check, entry

NEW_TOKENS = 16
MAX_PROBE = 1040


@dataclass(frozen=True, kw_only=True)
class Verification:
    """All checks of one checkpoint."""

    checkpoint: str
    removed: tuple[UnitId, ...]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        passed = sum(check.passed for check in self.checks)
        return f"{self.checkpoint}: {passed} of {len(self.checks)} checks of exactness passed"

    def require(self) -> None:
        """Raise VerificationFailed, naming the first check that failed."""
        for check in self.checks:
            if not check.passed:
                raise VerificationFailed(
                    f"{self.checkpoint} failed the check '{check.key}' ({check.found}); do not "
                    "ship it"
                )


@takes(CheckOptions)
def verify(
    out: str | Path,
    config: CheckOptions,
    *,
    model: str | Path,
    plan: Plan,
    generate_on: torch.device | None = None,
    progress: Progress = silent,
) -> Verification:
    """Check the checkpoint ``out`` against ``model`` with the plan's blocks bypassed and, where the
    plan records a repair, with the repaired tensors of ``out``, whose hashes must be the plan's. A
    plan of parts of blocks is checked as ``sleb.load(model, plan=...)`` applies it.

    ``generate_on``: the device that writes a few tokens, if the checkpoint fits there; all else is
    computed on the device of the options.

    The two models are in memory one after the other, never together. In float32 on the CPU logits
    must be equal bit for bit; elsewhere within 1e-4 (float32) or 2e-2 of the largest logit.

    With ``stream``, and where a model does not fit, blocks stay in the files and are read when they
    run. Then tensors are compared as they are stored, under their names in the files, and fewer
    tokens are generated, since each reads the model.

    Raises:
        InputError: a path is wrong, ``out`` is no checkpoint, or the plan is for
            another model.
        UnsupportedModel: the original cannot be cut exactly.
    """
    out, cut = Path(out), Cut.of(plan, config.depth, parts=True)
    if cut.parts:
        return _verify_loaded(out, config, model, plan, progress)
    checks: list[Check] = []

    def found() -> Verification:
        return Verification(checkpoint=str(out), removed=cut.removed, checks=tuple(checks))

    source = resolve(model, progress)
    resolve(out)
    if (out / SUMS).is_file():
        checks.append(gates.check_checksums(out, progress))
        if not checks[-1].passed:  # loading damaged files can fail in any way
            return found()
    both = _Loading.of(model, source, out, config)
    lines = tensor_lines(both.given)
    identified = identity(both.given, decoder_config(both.fields).num_hidden_layers, lines)
    check_fingerprint(plan.model, identified, source.ref)
    if cut.record:
        check, cut = gates.check_repair(cut, plan, out)
        checks.append(check)
    with progress.stage("original with the blocks bypassed", None):
        wanted = _bypassed(both, cut, lines)
        gc.collect()
    with progress.stage("reloading the checkpoint", None):
        checks.append(gates.check_config_kept(out, wanted.config, wanted.expected))
        checks.append(gates.check_depth_fields(out, wanted.expected, config.trust_remote_code))
        try:
            checkpoint = Checkpoint.open(out)
            pruned = both.checkpoint(out)
        except (DataError, UnsupportedModel) as error:
            checks.append(gates.check_reload(error))
            return found()
        checks.append(gates.check_reload())
    checks.append(gates.check_blocks(len(BlockStack(pruned)), len(cut.kept)))
    with progress.stage("comparing both", None):
        stays = _stored_digests(tensor_lines(checkpoint)) if both.streams else _digests(pruned)
        changed = len(cut.record.tensors) if cut.record else 0
        checks.append(gates.check_weights(stays, wanted.weights, changed))
        if len(BlockStack(pruned)) == len(cut.kept):
            logits = probe_logits(pruned, both.fields)
            checks.append(gates.check_logits(logits, wanted.logits, both.dtype, both.exact))
        checks.extend(_of_image(wanted.image, pruned, both.dtype, both.exact))
    with progress.stage("generating", None):
        if generate_on and not (both.streams or _too_large(checkpoint, both.dtype, generate_on)):
            pruned = pruned.to(generate_on)
        tokens, probe = 2 if both.streams else NEW_TOKENS, probe_ids(both.fields)
        checks.append(gates.check_generation(pruned, probe, both.original, tokens))
    return found()


def _verify_loaded(
    out: Path, config: CheckOptions, model: str | Path, plan: Plan, progress: Progress
) -> Verification:
    """Check what a plan of parts of blocks, with what lies in ``out`` of its repair, makes of
    ``model`` while that is loaded; and the files, where they are a checkpoint for others.

    Raises:
        InputError: ``out`` is neither.
    """
    cut = Cut.of(plan, config.depth, parts=True)
    checks = [] if plan_alone(out) else _check_files(out, model, plan, cut, progress)
    if cut.record:
        check, cut = gates.check_repair(cut, plan, out)
        checks.append(check)
    if all(check.passed for check in checks):
        how = dict(config.part(DeviceOptions))
        dense = load(model, **how)
        _align(dense.model)
        fields = dense.model.config
        prefix = block_prefix(Checkpoint.open(dense.source.path), dense.stack)
        with repaired(dense.stack, cut.repair or {}, prefix), dense.stack.bypassed(cut.removed):
            wanted = probe_logits(dense.model, fields)
            image = _image_probe(dense.stack)
        exact = dense.stack.dtype == torch.float32 and dense.stack.input_device.type == "cpu"
        del dense
        gc.collect()
        given = out if cut.record else None
        made = load(model, plan=plan, depth=config.depth, repaired=given, **how, progress=progress)
        _align(made.model)
        checks.append(gates.check_reload())
        checks.append(gates.check_blocks(len(made.stack), len(cut.kept)))
        found = probe_logits(made.model, fields)
        checks.append(gates.check_logits(found, wanted, made.stack.dtype, exact))
        checks.extend(_of_image(image, made.model, made.stack.dtype, exact))
        with progress.stage("generating", None):
            ids = probe_ids(fields)
            again = partial(load, model, **how)
            checks.append(gates.check_generation(made.model, ids, again, NEW_TOKENS))
    return Verification(checkpoint=str(out), removed=cut.removed, checks=tuple(checks))


def _check_files(
    out: Path, model: str | Path, plan: Plan, cut: Cut, progress: Progress
) -> list[Check]:
    """Whether a ``nemotron-nas`` folder has the config and the tensors that it should have."""
    if not nemotron_nas.is_one(out):
        raise InputError(
            f"{out} is nothing that a plan of parts of blocks makes; give the folder of sleb prune "
            f"--unit, or of sleb apply --format {nemotron_nas.FORMAT}"
        )
    checks = [gates.check_checksums(out, progress)] if (out / SUMS).is_file() else []
    if not all(check.passed for check in checks):
        return checks
    given = Checkpoint.open(resolve(model, progress).path)
    lines = tensor_lines(given)
    check_fingerprint(plan.model, identity(given, cut.blocks, lines), str(model))
    checks.append(gates.check_config_kept(out, nemotron_nas.config_json(given, cut)))
    found = _stored_digests(tensor_lines(Checkpoint.open(out)))
    expected = _stored_digests(lines, partial(nemotron_nas.renamed, cut=cut), cut.record)
    changed = len(cut.record.tensors) if cut.record else 0
    return [*checks, gates.check_weights(found, expected, changed)]


@dataclass(frozen=True, kw_only=True)
class _Loading:
    """How the two models are loaded. ``fields``: the original's config, ``given``: its checkpoint;
    ``streams``: blocks stay in the files."""

    model: str | Path
    options: CheckOptions
    fields: Any
    given: Checkpoint
    dtype: torch.dtype
    device: torch.device
    streams: bool

    @classmethod
    def of(cls, model: str | Path, source: ModelSource, out: Path, options: CheckOptions) -> Self:
        """Raises InputError where ``out`` is quantized and the original is not."""
        fields = load_config(source.path, trust_remote_code=options.trust_remote_code)
        after = quant_method(read_json(out / "config.json"))
        if after and not quant_method(fields):
            raise InputError(
                f"{out} is quantized ({after}) and {source.ref} is not, so no weight is equal; "
                "verify the cut that it was made from"
            )
        device = pick_device(options.device)
        dtype, given = pick_dtype(options.dtype, fields, device), Checkpoint.open(source.path)
        return cls(
            model=model,
            options=options,
            fields=fields,
            given=given,
            dtype=dtype,
            device=device,
            streams=options.stream or _too_large(given, dtype, device),
        )

    @property
    def exact(self) -> bool:
        """Whether the same computation gives the same bits."""
        return self.dtype == torch.float32 and self.device.type == "cpu" and not self.streams

    def original(self) -> LoadedModel:
        """The original."""
        options = self.options
        return load(
            self.model,
            dtype=options.dtype,
            device=options.device,
            stream=self.streams,
            trust_remote_code=options.trust_remote_code,
        )

    def checkpoint(self, out: Path) -> nn.Module:
        """The model in ``out``, every tensor of which must be accounted for."""
        trust = self.options.trust_remote_code
        if self.streams:
            fields = load_config(out, trust_remote_code=trust)
            places = {"device_map": stream_places(fields, self.device, trust)}
            pruned = strict_model(out, self.dtype, trust, places)
        else:
            pruned = strict_model(out, self.dtype, trust).to(self.device)
        _align(pruned)
        return pruned


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What the checkpoint must be: config.json, what transformers reads of it, digests of tensors
    by name, logits [1, T, V] on :func:`probe_ids`, and what :func:`_image_probe` gives."""

    config: dict[str, Any]
    expected: Any
    weights: dict[str, str]
    logits: Tensor
    image: _Image | None


def _bypassed(both: _Loading, cut: Cut, lines: Mapping[str, str]) -> _Wanted:
    """The original with the blocks of ``cut`` bypassed and its repair in place."""
    original = both.original()
    _align(original.model)
    stack = original.stack
    prefix = block_prefix(both.given, stack)
    expected = pruned_config(both.fields, cut.removed)
    with repaired(stack, cut.repair or {}, prefix):
        if both.streams:
            weights = _stored_digests(lines, partial(cut.rename, prefix=prefix), cut.record)
        else:
            weights = _digests(original.model, cut, f"{stack.path}.")
        with stack.bypassed(cut.removed):
            logits = probe_logits(original.model, both.fields)
            image = _image_probe(stack)
        return _Wanted(
            config=cut_config(both.given, stack, cut, both.fields, expected),
            expected=expected,
            weights=weights,
            logits=logits,
            image=image,
        )


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
def probe_logits(model: nn.Module, config: Any) -> Tensor:
    """Logits [1, T, V] on the :func:`probe_ids` of ``config``, on the CPU in float32."""
    ids = probe_ids(config).to(entry(model))
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float().cpu()


_Image = tuple[dict[str, Tensor], Tensor]
"""What a model is given of a text with an image, and its logits [1, T, V] for it."""


@torch.inference_mode()
def _image_probe(stack: BlockStack) -> _Image | None:
    """Of a model that images go into, if its checkpoint has a processor that loads."""
    ids = stack.images.probe() if stack.images else None
    if ids is None:
        return None
    given = stack.inputs(ids)
    return given, stack.model(**given, use_cache=False).logits.float().cpu()


@torch.inference_mode()
def _of_image(
    wanted: _Image | None, model: nn.Module, dtype: torch.dtype, exact: bool
) -> Iterator[Check]:
    """The gate of an image, where there is one."""
    if wanted is not None:
        given, expected = wanted
        found = model(**given, use_cache=False).logits.float().cpu()
        yield gates.check_logits(found, expected, dtype, exact, key="logits-of-image")


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
    lines: Mapping[str, str],
    renamed: Callable[[str], str | None] = str,
    record: RepairRecord | None = None,
) -> dict[str, str]:
    """Dtype, shape and SHA-256 of tensors in files, from their :func:`tensor_lines`, by the names
    that they have after a cut, and of those that ``record`` repairs with its SHA-256."""
    found, changed = {}, record.tensors if record else {}
    for name, line in lines.items():
        if (new := renamed(name)) is not None:
            *kind, digest = line.rstrip("\n").split("\t")[1:]
            found[new] = "\t".join([*kind, changed.get(name, digest)])
    return found


def _stored(tensor: Any) -> list[Tensor]:
    """What a tensor consists of: torchao's quantized ones have integers and their scales inside."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _stored(getattr(tensor, name))]
