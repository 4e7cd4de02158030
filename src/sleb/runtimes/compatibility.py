"""Does a runtime take a pruned checkpoint, and compute what the original does without those blocks?

Where the runtime can be imported, by this interpreter or by one that is named, it loads both models
in processes of their own and its log-probabilities are compared; elsewhere the config is judged by
what is known of the runtime's code (:mod:`sleb.runtimes.rules`), which proves nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sleb.calibration.windows import load_windows
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.cut import Cut
from sleb.config import CheckOptions, takes
from sleb.core.errors import (
    InputError,
    SlebError,
    UnsupportedModel,
    VerificationFailed,
    did_you_mean,
)
from sleb.core.finding import Finding, finding
from sleb.core.plan import Plan
from sleb.core.printable import paragraphs
from sleb.core.progress import Progress, silent
from sleb.core.statistics import Values
from sleb.models.load import LoadedModel, load, load_config, pick_device, pick_dtype
from sleb.models.source import resolve
from sleb.models.stack import decoder_config
from sleb.models.stored_names import block_prefix
from sleb.repairs import repaired
from sleb.runtimes import rules
from sleb.runtimes.base import RUNTIMES, Settings, release
from sleb.runtimes.bench import gguf_file
from sleb.runtimes.worker import VERSION_S, Failed, Worker

FACTOR = 3.0
SLACK = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}
"""What a deviation may be beyond the dense model's, in nats: less than rounding in the dtype."""
OTHERWISE = 10.0
"""A dense model that deviates by so many times the slack is computed otherwise, not rounded."""
TOKENS, MAX_TOKENS = 256, 1040
_DEFAULTS = CheckOptions()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one runtime makes of a checkpoint.

    ``verdict``: accepted, refused or undecided (it does not compute the dense model as transformers
    does, or no rule can tell). ``how``: loaded or by rule. ``version``: of the runtime that was
    loaded, or whose code the rule is from. ``dense``, ``pruned``: mean absolute deviation of its
    log-probabilities from transformers', in nats per token, on the original and on the checkpoint;
    null where it was not loaded. ``limit``: the most that ``pruned`` may be.
    ``no_file``: it was not loaded for want of a .gguf file of both models.
    """

    runtime: str
    version: str | None
    verdict: str
    how: str
    dense: float | None = None
    pruned: float | None = None
    limit: float | None = None
    why: Finding | None = None
    no_file: bool = False


@dataclass(frozen=True, kw_only=True)
class RuntimeReport:
    """All runtimes on one checkpoint. ``tokens``: log-probabilities compared. ``moved``: what the
    cut itself moves them by, in transformers, on average, in nats: a runtime that did not follow it
    would be off by as much."""

    checkpoint: str
    removed: tuple[int, ...]
    dtype: str
    device: str
    tokens: int
    moved: float | None
    verdicts: tuple[Verdict, ...]

    def __str__(self) -> str:
        found = ", ".join(f"{v.runtime} {v.verdict}" for v in self.verdicts)
        return paragraphs([f"{self.checkpoint}: {found}"])

    def require(self) -> None:
        """Raise VerificationFailed if a runtime that was loaded does not compute the same."""
        for v in self.verdicts:
            if v.how == "loaded" and v.verdict == "refused":
                raise VerificationFailed(
                    f"{self.checkpoint} is not right in {v.runtime} {v.version} ({v.why}); do not "
                    "serve it there"
                )


def parse_runtimes(names: str) -> tuple[str, ...]:
    """``transformers,vllm`` as names, each once; ``llama-cpp`` is llama.cpp.

    Raises:
        InputError: empty, or an unknown name.
    """
    asked = [_known(name) for name in names.split(",")]
    for name in asked:
        if name not in RUNTIMES:
            raise InputError(
                f"--runtime: unknown runtime '{name}'{did_you_mean(name, RUNTIMES)}; known: "
                f"{', '.join(RUNTIMES)}"
            )
    return tuple(dict.fromkeys(asked))


def _known(name: str) -> str:
    return name.strip().replace("llama-cpp", "llama.cpp")


def parse_pythons(given: Sequence[str], runtimes: Sequence[str]) -> dict[str, str]:
    """``vllm=/path/to/python`` as a mapping. Each interpreter is asked for its runtime.

    Raises:
        InputError: of another form, of a runtime that is not asked for, or an interpreter that does
            not run or has not the runtime.
    """
    found: dict[str, str] = {}
    for one in given:
        name, equals, path = one.partition("=")
        name = _known(name)
        if not equals or not path:
            raise InputError(f"--python {one}: give RUNTIME=PATH, as vllm=/venv/bin/python")
        if name not in runtimes:
            raise InputError(
                f"--python {one}: {name} is not in --runtime {','.join(runtimes)}"
                f"{did_you_mean(name, runtimes)}"
            )
        try:
            with Worker(path, path) as worker:
                release = worker.ask("version", {"runtime": name}, VERSION_S)
        except (Failed, SlebError) as error:
            raise InputError(f"--python {one}: {error}") from None
        if release is None:
            raise InputError(f"--python {one}: that interpreter has no {RUNTIMES[name][0]}")
        found[name] = path
    return found


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """Token ids [T], and log-probabilities [T - 1] in nats of all but the first: of the dense
    model, and with blocks bypassed."""

    ids: list[int]
    dense: Values
    pruned: Values


@takes(CheckOptions)
def check_runtimes(
    out: str | Path,
    config: CheckOptions = _DEFAULTS,
    *,
    model: str | Path,
    plan: Plan,
    runtimes: Sequence[str] = tuple(RUNTIMES),
    pythons: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> RuntimeReport:
    """Judge the checkpoint ``out`` in each of ``runtimes``.

    The reference is ``model`` in transformers with the plan's blocks bypassed (and the plan's
    repaired tensors of ``out`` in place), on embedded text of 256 tokens, or up to 1,040 to pass a
    sliding window. A runtime computes in another order and with kernels of its own, so it deviates
    from that on the dense model as well. That much is granted it: the mean absolute deviation of
    log-probabilities on the pruned model must be at most ``3 * the dense model's + slack`` (0.001
    nats in float32, 0.01 in float16, 0.02 in bfloat16). llama.cpp runs the .gguf file that ``out``
    and ``model`` are, or OUT.gguf beside OUT, or the one in that folder, in its own types.

    Raises:
        InputError: ``out`` is no checkpoint, its repaired tensors are not the plan's, or an unknown
            runtime.
        UnsupportedModel: ``out`` is a .gguf file without parts of blocks.
        UnsupportedModel, DataError, ResourceError: see :func:`sleb.load`.
    """
    names = parse_runtimes(",".join(runtimes))
    known, cut = pythons or {}, Cut.of(plan, config.depth, parts=True)
    device, trust = pick_device(config.device), config.trust_remote_code
    if cut.parts and Path(out).suffix == ".gguf":
        raise UnsupportedModel(
            f"{out} lacks parts of blocks, and is not read back to compare it: run it in llama.cpp "
            "beside the original"
        )
    dense, pruned = resolve(model, progress).path, resolve(out, progress).path
    # without parts of blocks it is of a type that transformers has no code for
    decoder = decoder_config(load_config(dense if cut.parts else pruned, trust_remote_code=trust))
    blocks = len(cut.kept) if cut.parts else decoder.num_hidden_layers
    text = {**decoder.to_dict(), "num_hidden_layers": blocks}
    dtype = pick_dtype(config.dtype, load_config(dense, trust_remote_code=trust), device)
    files: dict[str, list[Path | None]] = {name: [dense, pruned] for name in names}
    files["llama.cpp"] = [gguf_file(model, dense), gguf_file(out, pruned)]
    there = {name for name in names if known.get(name) or release(name)}
    given: dict[str, Any] = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    reference = None
    if any(all(files[name]) for name in there):
        with progress.stage("reference in transformers", None):
            reference = _reference(model, config, plan, out, pruned)
        gc.collect()
    verdicts = []
    for name in names:
        if reference and name in there and all(files[name]):
            settings = Settings(
                runtime=name, purpose="score", path="", trust_remote_code=trust, **given
            )
            with progress.stage(f"loading in {name}", None):
                verdict = _loaded(settings, files[name], known.get(name), reference)
            verdicts.append(_cautious(verdict, text, len(reference.ids)))
        else:
            written = Checkpoint.open(pruned).config
            verdict = _by_rule(name, text, written, files[name][1], cut)
            verdicts.append(replace(verdict, no_file=name in there))
    return RuntimeReport(
        checkpoint=str(out),
        removed=cut.removed,
        tokens=len(reference.ids) - 1 if reference else 0,
        moved=float(np.abs(reference.dense - reference.pruned).mean()) if reference else None,
        verdicts=tuple(verdicts),
        **given,
    )


def _length(config: dict[str, Any]) -> int:
    """Tokens of the probe: twice a sliding window, so that half of them see what is beyond it."""
    length = max(TOKENS, min(MAX_TOKENS, 2 * (_window(config) or 0)))
    return min(length, (config.get("max_position_embeddings") or length + 1) - 1)


def _window(config: dict[str, Any]) -> int | None:
    """The sliding window, if blocks differ in having one."""
    kinds = set(config.get("layer_types") or ())
    return config.get("sliding_window") if "sliding_attention" in kinds and len(kinds) > 1 else None


def _reference(
    model: str | Path, config: CheckOptions, plan: Plan, out: str | Path, pruned: Path
) -> _Reference:
    """What transformers computes; the model is gone afterwards."""
    loaded = load(
        model,
        dtype=config.dtype,
        device=config.device,
        stream=config.stream,
        trust_remote_code=config.trust_remote_code,
    )
    length = _length(decoder_config(loaded.model.config).to_dict())
    windows, _ = load_windows(loaded.tokenizer, (), windows=1, length=length, seed=0)
    ids = windows.ids[0].tolist()
    prefix = block_prefix(Checkpoint.open(loaded.source.path), loaded.stack)
    cut = Cut.of(plan, config.depth, out if Path(out).suffix == ".gguf" else pruned, parts=True)
    dense = _logprobs(loaded, ids)
    with (
        repaired(loaded.stack, cut.repair or {}, prefix),
        loaded.stack.bypassed(cut.removed),
    ):
        return _Reference(ids=ids, dense=dense, pruned=_logprobs(loaded, ids))


@torch.inference_mode()
def _logprobs(loaded: LoadedModel, ids: list[int]) -> Values:
    """[T - 1], nats."""
    given = torch.tensor([ids], device=loaded.stack.input_device)
    logits = loaded.model(input_ids=given, use_cache=False).logits[0, :-1].float()
    picked = logits.log_softmax(-1).gather(-1, given[0, 1:, None].to(logits.device))[:, 0]
    found: Values = picked.double().cpu().numpy()
    return found


def _loaded(
    settings: Settings, files: Sequence[Any], python: str | None, reference: _Reference
) -> Verdict:
    """Both models in a runtime. One that cannot run the dense model decides nothing."""
    name, deviations = settings.runtime, list[float]()
    settings = replace(settings, length=len(reference.ids) + 1)
    about: dict[str, Any] = {"runtime": name, "version": None, "how": "loaded"}
    for path, expected in zip(files, (reference.dense, reference.pruned), strict=True):
        what = "pruned" if deviations else "dense"
        try:
            with Worker(f"the {what} model", python) as worker:
                about["version"] = worker.ask("version", {"runtime": name}, VERSION_S)
                worker.load(replace(settings, path=str(path.absolute())))
                got = np.array(worker.ask("logprobs", {"ids": reference.ids}))
            if got.shape != expected.shape or not np.isfinite(got).all():
                raise Failed("its log-probabilities are not finite, or not one for each token")
        except (Failed, SlebError) as error:
            verdict, dense = ("refused", deviations[0]) if deviations else ("undecided", None)
            why = finding(f"{what}-fails", error=str(error))
            return Verdict(**about, verdict=verdict, dense=dense, why=why)
        deviations.append(float(np.abs(got - expected).mean()))
    dense, pruned = deviations
    limit = FACTOR * dense + SLACK[settings.dtype]
    about |= {"dense": dense, "pruned": pruned, "limit": limit}
    if pruned > limit:
        why = finding("deviates", dense=dense, pruned=pruned, limit=limit)
        return Verdict(**about, verdict="refused", why=why)
    if name != "llama.cpp" and dense > OTHERWISE * SLACK[settings.dtype]:  # it has its own types
        why = finding("dense-deviates", dense=dense)
        return Verdict(**about, verdict="undecided", why=why)
    return Verdict(**about, verdict="accepted")


def _cautious(verdict: Verdict, config: dict[str, Any], tokens: int) -> Verdict:
    """Says so if no token of the probe was beyond the sliding window."""
    window = _window(config)
    if verdict.verdict != "accepted" or window is None or window < tokens:
        return verdict
    return replace(verdict, why=finding("window-unseen", tokens=tokens, window=window))


def _by_rule(
    name: str, config: dict[str, Any], written: dict[str, Any], gguf: Path | None, cut: Cut
) -> Verdict:
    try:
        ruling = rules.judge(name, config, written, gguf, cut)
    except SlebError as error:  # the file is not one that could run
        ruling = rules.Ruling(verdict="refused", why=finding("error", error=str(error)))
    read = rules.READ.get(name) or version(name)
    return Verdict(
        runtime=name, version=read, verdict=ruling.verdict, how="by rule", why=ruling.why
    )
