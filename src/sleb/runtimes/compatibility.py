"""Does a runtime take a pruned checkpoint, and compute what the original does without those blocks?

Where the runtime can be imported, by this interpreter or by one that is named, it loads both models
in processes of their own and its log-probabilities are compared; elsewhere the config is judged by
what is known of the runtime's code (:mod:`sleb.runtimes.rules`), which proves nothing.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.cut import Cut
from sleb.core.errors import InputError, SlebError, VerificationFailed, did_you_mean
from sleb.core.plan import Plan
from sleb.core.progress import Progress, silent
from sleb.models.load import LoadedModel, load, load_config, pick_device, pick_dtype
from sleb.models.source import resolve
from sleb.models.stack import decoder_config
from sleb.repairs import repaired
from sleb.runtimes import rules
from sleb.runtimes.probe import MODULES, release

__all__ = ["NAMES", "RuntimeReport", "Verdict", "check_runtimes", "parse_pythons", "parse_runtimes"]

NAMES = tuple(MODULES)
FACTOR = 3.0
SLACK = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 2e-2}
"""What a deviation may be beyond the dense model's, in nats: less than rounding in the dtype."""
TOKENS, MAX_TOKENS = 256, 1040
_PROBE = Path(__file__).with_name("probe.py")
_SAID = 400  # characters of a runtime's own message

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one runtime makes of a checkpoint.

    ``verdict``: accepted, refused or undecided. ``how``: loaded or by rule. ``version``: of the
    runtime that was loaded, or whose code the rule is from. ``dense``, ``pruned``: mean absolute
    deviation of its log-probabilities from transformers', in nats per token, on the original and on
    the checkpoint; null where it was not loaded. ``limit``: the most that ``pruned`` may be.
    """

    runtime: str
    version: str | None
    verdict: str
    how: str
    dense: float | None = None
    pruned: float | None = None
    limit: float | None = None
    why: str = ""


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

    def require(self) -> None:
        """Raise VerificationFailed if a runtime that was loaded does not compute the same."""
        for v in self.verdicts:
            if v.how == "loaded" and v.verdict == "refused":
                raise VerificationFailed(
                    f"{self.checkpoint} is not right in {v.runtime} {v.version}: {v.why}; "
                    "do not serve it there"
                )


def parse_runtimes(names: str) -> tuple[str, ...]:
    """``transformers,vllm`` as names, each once.

    Raises:
        InputError: empty, or an unknown name.
    """
    asked = [name.strip().replace("llama.cpp", "llama-cpp") for name in names.split(",")]
    for name in asked:
        if name not in NAMES:
            raise InputError(
                f"--runtime: unknown runtime '{name}'{did_you_mean(name, NAMES)}; known: "
                f"{', '.join(NAMES)}"
            )
    return tuple(dict.fromkeys(asked))


def parse_pythons(given: Sequence[str], runtimes: Sequence[str]) -> dict[str, str]:
    """``vllm=/path/to/python`` as a mapping. Each interpreter is asked for its runtime.

    Raises:
        InputError: of another form, of a runtime that is not asked for, or an interpreter that does
            not run or has not the runtime.
    """
    found: dict[str, str] = {}
    for one in given:
        name, equals, path = one.partition("=")
        name = name.strip().replace("llama.cpp", "llama-cpp")
        if not equals or not path:
            raise InputError(f"--python {one}: give RUNTIME=PATH, as vllm=/venv/bin/python")
        if name not in runtimes:
            raise InputError(
                f"--python {one}: {name} is not in --runtime {','.join(runtimes)}"
                f"{did_you_mean(name, runtimes)}"
            )
        answer = _ask({"runtime": name}, python=path)
        if answer.get("error"):
            raise InputError(f"--python {one}: {answer['error']}")
        if answer["version"] is None:
            raise InputError(f"--python {one}: that interpreter has no {MODULES[name]}")
        found[name] = path
    return found


def check_runtimes(
    out: str | Path,
    *,
    model: str | Path,
    plan: Plan,
    runtimes: Sequence[str] = NAMES,
    pythons: Mapping[str, str] | None = None,
    depth: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> RuntimeReport:
    """Judge the checkpoint ``out`` in each of ``runtimes``.

    The reference is ``model`` in transformers with the plan's blocks bypassed (and the repaired
    tensors of ``out`` in place), on embedded text of 256 tokens, or up to 1,040 to pass a sliding
    window. A runtime
    computes in another order and with kernels of its own, so it deviates from that on the dense
    model as well. That much is granted it: the mean absolute deviation of log-probabilities on the
    pruned model must be at most ``3 * the dense model's + slack`` (0.001 nats in float32, 0.01 in
    float16, 0.02 in bfloat16). llama.cpp runs the .gguf file that ``out`` and ``model`` are, or
    OUT.gguf beside OUT, or the one in that folder, in its own types.

    Raises:
        InputError: ``out`` is no checkpoint, or an unknown runtime.
        UnsupportedModel, DataError, ResourceError: see :func:`sleb.load`.
    """
    asked = parse_runtimes(",".join(runtimes))
    removed = plan.at_depth(depth)
    target = pick_device(device)
    source, cut = resolve(model, progress), resolve(out, progress)
    text = decoder_config(load_config(cut.path, trust_remote_code=trust_remote_code)).to_dict()
    config = load_config(source.path, trust_remote_code=trust_remote_code)
    computed = str(pick_dtype(dtype, config, target)).removeprefix("torch.")
    files = {"llama-cpp": (_gguf(model), _gguf(out))}
    jobs = {
        name: (*files.get(name, (source.path, cut.path)), (pythons or {}).get(name))
        for name in asked
    }
    loadable = {
        name for name, (dense, own, python) in jobs.items()
        if dense and own and (python or release(name))
    }  # fmt: skip
    reference: tuple[list[int], Values, Values] | None = None
    if loadable:
        with progress.stage("reference in transformers", None):
            loaded = load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
            reference = _reference(loaded, cut.path, plan, removed)
            del loaded
            gc.collect()
    verdicts = []
    for name, (dense, own, python) in jobs.items():
        if name in loadable and reference and dense and own:
            with progress.stage(f"loading in {name}", None):
                request: dict[str, Any] = {"runtime": name, "ids": reference[0], "dtype": computed}
                request |= {"device": str(target), "remote": trust_remote_code}
                verdict = _loaded(request, (dense, own), python, reference[1:])
                verdicts.append(_cautious(verdict, text, len(reference[0])))
        else:
            lacking = None if dense and own else "no .gguf file of both models"
            lacking = lacking if python or release(name) else None
            verdicts.append(_by_rule(name, text, own, lacking, (plan.model.blocks, removed)))
    moved = None
    if reference:
        moved = float(np.abs(reference[1] - reference[2]).mean())
    return RuntimeReport(
        checkpoint=str(out),
        removed=removed,
        dtype=computed,
        device=str(target),
        tokens=len(reference[0]) - 1 if reference else 0,
        moved=moved,
        verdicts=tuple(verdicts),
    )


def _length(config: dict[str, Any]) -> int:
    """Tokens of the probe: twice a sliding window, so that half of them see what is beyond it."""
    wanted = max(TOKENS, min(MAX_TOKENS, 2 * (_window(config) or 0)))
    return min(wanted, (config.get("max_position_embeddings") or wanted + 1) - 1)


def _window(config: dict[str, Any]) -> int | None:
    """The sliding window, if blocks differ in having one."""
    kinds = set(config.get("layer_types") or ())
    return config.get("sliding_window") if "sliding_attention" in kinds and len(kinds) > 1 else None


def _gguf(ref: str | Path) -> Path | None:
    """The .gguf file that a model is, or that has its folder's name, or the only one inside."""
    path = Path(ref).expanduser()
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    named = path.with_name(path.name + ".gguf")
    if named.is_file():
        return named
    inside = sorted(path.glob("*.gguf")) if path.is_dir() else []
    return inside[0] if len(inside) == 1 else None


def _reference(
    loaded: LoadedModel, out: Path, plan: Plan, removed: tuple[int, ...]
) -> tuple[list[int], Values, Values]:
    """Token ids, and log-probabilities of all but the first: dense, and with blocks bypassed."""
    from sleb.calibration import load_windows

    length = _length(decoder_config(loaded.model.config).to_dict())
    windows, _ = load_windows(loaded.tokenizer, (), windows=1, length=length, seed=0)
    ids = windows.ids[0].tolist()
    prefix = Checkpoint.open(loaded.source.path).block_prefix(len(loaded.stack), loaded.stack.path)
    cut = Cut.of(plan, len(removed) or None, folder=out)
    dense = _logprobs(loaded, ids)
    with repaired(loaded.stack, cut.repair or {}, prefix), loaded.stack.bypassed(removed):
        return ids, dense, _logprobs(loaded, ids)


@torch.inference_mode()
def _logprobs(loaded: LoadedModel, ids: list[int]) -> Values:
    """[T - 1], nats."""
    given = torch.tensor([ids], device=loaded.stack.input_device)
    logits = loaded.model(input_ids=given, use_cache=False).logits[0, :-1].float()
    picked = logits.log_softmax(-1).gather(-1, given[0, 1:, None].to(logits.device))[:, 0]
    found: Values = picked.double().cpu().numpy()
    return found


def _loaded(
    request: dict[str, Any],
    paths: tuple[Path, Path],
    python: str | None,
    reference: tuple[Values, Values],
) -> Verdict:
    """Both models in a runtime. One that cannot run the dense model decides nothing."""
    name: str = request["runtime"]
    deviations: list[float] = []
    for what, path, expected in zip(("dense", "pruned"), paths, reference, strict=True):
        answer = _ask({**request, "path": str(path.absolute())}, python=python)
        given: dict[str, Any] = {"runtime": name, "version": answer.get("version"), "how": "loaded"}
        if not answer.get("error"):
            got = np.array(answer["logprobs"])
            if got.shape != expected.shape or not np.isfinite(got).all():
                answer["error"] = "its log-probabilities are not finite, or not one for each token"
        if answer.get("error"):
            verdict = "undecided" if what == "dense" else "refused"
            why = f"it does not run the {what} model: {answer['error']}"
            return Verdict(
                **given, verdict=verdict, dense=deviations[0] if deviations else None, why=why
            )
        deviations.append(float(np.abs(got - expected).mean()))
    dense, pruned = deviations
    limit = FACTOR * dense + SLACK[request["dtype"]]
    why = ""
    if pruned > limit:
        why = (
            f"its log-probabilities deviate from transformers' by {pruned:.3g} nats per token, "
            f"and by {dense:.3g} on the dense model (at most {limit:.3g} is rounding)"
        )
    return Verdict(
        **given,
        verdict="refused" if why else "accepted",
        dense=dense,
        pruned=pruned,
        limit=limit,
        why=why,
    )


def _cautious(verdict: Verdict, config: dict[str, Any], tokens: int) -> Verdict:
    """Says so if no token of the probe was beyond the sliding window."""
    window = _window(config)
    if verdict.verdict != "accepted" or window is None or window < tokens:
        return verdict
    return replace(
        verdict,
        why=f"which blocks slide did not show: the probe has {tokens} tokens, the window {window}",
    )


def _ask(request: dict[str, Any], *, python: str | None) -> dict[str, Any]:
    """One answer of a child; ``error`` says why there is none."""
    if python is None:
        request = {**request, "path_of_modules": sys.path}
    try:
        done = subprocess.run(
            [python or sys.executable, "-I", str(_PROBE)],
            input=json.dumps(request) + "\n",
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            check=False,
        )
    except OSError as error:
        return {"error": f"{python} does not run: {error.strerror}"}
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines()
        last = said[-1][:_SAID] if said else "it said nothing"
        return {"error": f"its process ended with {done.returncode}: {last}"}
    if not isinstance(answer, dict) or "version" not in answer:
        return {"error": "it answered something else; give a Python interpreter"}
    if "error" in answer:
        answer["error"] = str(answer["error"])[:_SAID]
    return answer


def _by_rule(
    name: str,
    config: dict[str, Any],
    own: Path | None,
    lacking: str | None,
    cut: tuple[int, tuple[int, ...]],
) -> Verdict:
    read = {"vllm": rules.READ_VLLM, "llama-cpp": rules.READ_LLAMA_CPP}
    try:
        ruling = {
            "transformers": lambda: rules.transformers(config),
            "vllm": lambda: rules.vllm(config),
            "llama-cpp": lambda: rules.llama_cpp(config, own, *cut),
        }[name]()
    except SlebError as error:  # the file is not one that could run
        ruling = rules.Ruling(verdict="refused", why=str(error))
    return Verdict(
        runtime=name,
        version=read.get(name) or version(name),
        verdict=ruling.verdict,
        how="by rule",
        why=ruling.why + (f"; not loaded: {lacking}" if lacking else ""),
    )
