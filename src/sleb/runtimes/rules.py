"""What a runtime that is not installed here would make of a cut config, by its source code.

The tables hold exceptions only: where a runtime finds a block's kind by its place, or by a field
that transformers does not keep, although the config has a list for it. A verdict by these rules
says what the cut changes: it supposes that the runtime takes the uncut model. It is no proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb.checkpoints.cut import Cut
from sleb.checkpoints.gguf_fields import ARCHITECTURES, PATTERN, REFUSED, GGUFModel
from sleb.checkpoints.gguf_file import GGUFFile
from sleb.core.finding import Finding, finding

READ = {"vllm": "0.32.0", "llama.cpp": "0.3.36", "mlx-lm": "0.32.2"}
"""The releases whose code was read: vllm/model_executor/models and vllm/models; llama.cpp as
llama-cpp-python carries it; and mlx_lm/models."""

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ruling:
    """``verdict``: accepted, refused or undecided; and why (see :func:`phrase`)."""

    verdict: str
    why: Finding


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """Of one runtime and some model types, with a key for words. ``reads(config)``: what the
    runtime takes each block for, and ``means(config)``: what transformers does; or None where it
    does not apply. They must be equal."""

    key: str
    reads: Callable[[Config], Any]
    means: Callable[[Config], Any]


def _sliding(config: Config) -> list[bool]:
    return [kind == "sliding_attention" for kind in config["layer_types"]]


def _sparse(config: Config) -> list[bool] | None:
    kinds = config.get("mlp_layer_types")
    return None if kinds is None else [kind == "sparse" for kind in kinds]


def _even(config: Config) -> list[bool]:
    return [i % 2 == 0 for i in range(config["num_hidden_layers"])]


def _stepped_experts(config: Config) -> list[int]:
    step = config.get("interleave_moe_layer_step") or 0
    n = config["num_hidden_layers"]
    return [i for i in range(n) if step > 0 and (i + 1) % step == 0]


def _after_first(config: Config) -> list[bool] | None:
    """Experts in all blocks but the first so many. Without the number, vLLM stops."""
    dense = config.get("first_k_dense_replace")
    if dense is None:
        return None if _sparse(config) is None else []
    return [i >= dense for i in range(config["num_hidden_layers"])]


def _mimo(config: Config) -> Any:
    return [bool(k) for k in config.get("hybrid_layer_pattern") or ()], [
        bool(k) for k in config.get("moe_layer_freq") or ()
    ]


def _one_kind(config: Config) -> bool:
    kinds = config.get("layer_types") or ()
    return len(set(kinds)) < 2 or config.get("max_window_layers") == config["num_hidden_layers"]


def _rotates_full(config: Config) -> bool:
    """Whether vLLM rotates the queries of blocks with full attention."""
    return "sliding_attention" not in config["layer_types"]


_DENSE_FIRST = _Rule(key="dense-first", reads=_after_first, means=_sparse)
_ROTATION = _Rule(
    key="rotation",
    reads=_rotates_full,
    means=lambda config: config.get("sliding_window") is None,
)
_TWO_KINDS = _Rule(key="two-kinds", reads=_one_kind, means=lambda _: True)
_STEPPED = _Rule(
    key="stepped-experts",
    reads=_stepped_experts,
    means=lambda config: sorted(config.get("moe_layers") or ()),
)

VLLM: dict[str, _Rule] = {
    "gpt_oss": _Rule(key="every-other-slides", reads=_even, means=_sliding),
    **dict.fromkeys(("llama4", "llama4_text"), _STEPPED),
    **dict.fromkeys(("qwen2", "qwen3"), _TWO_KINDS),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "glm4_moe_lite", "hy_v3"), _DENSE_FIRST),
    **dict.fromkeys(("exaone4", "exaone_moe"), _ROTATION),
    "mimo_v2_flash": _Rule(
        key="own-lists",
        reads=_mimo,
        means=lambda config: (_sliding(config), _sparse(config)),
    ),
}


def _period(field: str, default: int) -> Callable[[Config], list[bool]]:
    """All but every so many blocks, by a field that a cut leaves out where it is no longer true."""

    def reads(config: Config) -> list[bool]:
        period = config.get(field) or default
        return [(i + 1) % period != 0 for i in range(config["num_hidden_layers"])]

    return reads


def _letters(config: Config) -> list[bool] | None:
    """Sliding blocks by a pattern such as LLLG. Without the field, mlx-lm stops."""
    if "sliding_window_pattern" not in config:
        return None
    pattern = config["sliding_window_pattern"] or "G"
    return [pattern[i % len(pattern)] == "L" for i in range(config["num_hidden_layers"])]


def _not_full(config: Config) -> list[bool]:
    return [kind != "full_attention" for kind in config["layer_types"]]


def _some_full(config: Config) -> list[bool] | None:
    """Sliding blocks; None if there are no others, as mlx-lm stops then."""
    kinds = _not_full(config)
    return None if all(kinds) else kinds


_BOTH = _Rule(
    key="both-kinds",
    reads=lambda config: len(set(config.get("layer_types") or "SF")) == 2,
    means=lambda _: True,
)
_SLIDES = "slide-by-place"
_LINEAR = _Rule(key="linear-by-place", reads=_period("full_attention_interval", 4), means=_not_full)
MLX: dict[str, _Rule] = {
    "gemma3_text": _Rule(key=_SLIDES, reads=_period("sliding_window_pattern", 6), means=_some_full),
    "cohere2": _Rule(key=_SLIDES, reads=_period("sliding_window_pattern", 4), means=_some_full),
    "exaone4": _Rule(key=_SLIDES, reads=_letters, means=_sliding),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _LINEAR),
    # the wrapper alone: mlx-lm has other code for llama4_text, without experts
    "llama4": _Rule(
        key="llama4-by-place",
        reads=lambda config: (_stepped_experts(config), _period("", 4)(config)),
        means=lambda config: (
            sorted(config.get("moe_layers") or ()),
            [bool(rotates) for rotates in config["no_rope_layers"]],
        ),
    ),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "glm4_moe_lite"), _DENSE_FIRST),
    "mimo_v2_flash": VLLM["mimo_v2_flash"],
    **dict.fromkeys(("gpt_oss", "olmo3"), _BOTH),
}

# neither code of vLLM's own, nor a model that its transformers backend can take
NOT_IN_VLLM = frozenset(
    ["codegen", "gpt_neo", "gpt_neox_japanese", "mpt", "openai-gpt", "rwkv", "xglm"]
)


def judge(runtime: str, config: Config, written: Config, gguf: Path | None, cut: Cut) -> Ruling:
    """What ``runtime`` makes of a cut: see :func:`vllm`, :func:`llama_cpp` and :func:`mlx_lm`.
    transformers reads every field that sleb re-indexes: they are its own."""
    if cut.parts:
        reads = runtime in ("vllm", "mlx-lm") and written["model_type"] == "nemotron-nas"
        verdict, why = ("accepted", "parts") if reads else ("refused", "no-parts")
        return Ruling(verdict=verdict, why=finding(why))
    if runtime == "vllm":
        return vllm(config)
    if runtime == "llama.cpp":
        return llama_cpp(config, gguf, cut)
    if runtime == "mlx-lm":
        return mlx_lm(config, written)
    return Ruling(verdict="accepted", why=finding("own-code"))


def vllm(config: Config) -> Ruling:
    """Whether vLLM would take each block for what transformers does.

    Args:
        config: the text decoder's, with every per-block list written out.
    """
    kind = config["model_type"]
    if kind in NOT_IN_VLLM:
        return Ruling(verdict="refused", why=finding("no-code", type=kind))
    return _ruled(VLLM.get(kind), config, config)


def mlx_lm(config: Config, written: Config) -> Ruling:
    """Whether mlx-lm would take each block for what transformers does.

    Args:
        config: as for :func:`vllm`.
        written: config.json, which mlx-lm reads by itself, with defaults of its own.
    """
    own = {"num_hidden_layers": config["num_hidden_layers"], **written.get("text_config", written)}
    kind = written["model_type"] if written["model_type"] in MLX else config["model_type"]
    return _ruled(MLX.get(kind), own, config)


def _ruled(rule: _Rule | None, written: Config, config: Config) -> Ruling:
    if rule is None:
        listed = tuple(name for name in ("layer_types", "mlp_layer_types") if config.get(name))
        why = finding("listed", fields=listed) if listed else finding("alike")
        return Ruling(verdict="accepted", why=why)
    reads, means = rule.reads(written), rule.means(config)
    if reads != means:
        return Ruling(verdict="refused", why=_broken(rule.key, reads, means))
    return Ruling(verdict="accepted", why=finding("kept", rule=rule.key))


def _broken(rule: str, reads: Any, means: Any) -> Finding:
    """That a rule is broken; and by the first block that would change its kind, if both are lists
    of kinds."""
    if not (isinstance(reads, list) and isinstance(means, list)) or len(reads) != len(means):
        return finding("broken", rule=rule)
    if not all(isinstance(kind, bool) for kind in (*reads, *means)):
        return finding("broken", rule=rule)
    first = next(i for i, (a, b) in enumerate(zip(reads, means, strict=True)) if a != b)
    return finding("broken-at", rule=rule, block=first)


def llama_cpp(config: Config, gguf: Path | None, cut: Cut) -> Ruling:
    """Whether llama.cpp would take each block of the cut file for what transformers does.

    Args:
        config: as for :func:`vllm`.
        gguf: the file, if there is one.
        cut: of the original model.

    Raises:
        DataError, UnsupportedModel: ``gguf`` is no GGUF file of a language model.
    """
    if gguf is None:
        return _without_file(config["model_type"])
    model = GGUFModel.of(GGUFFile.open(gguf))
    if model.blocks != (expected := config["num_hidden_layers"]):
        why = finding("blocks", file=str(gguf), blocks=model.blocks, expected=expected)
        return Ruling(verdict="refused", why=why)
    if model.name not in ARCHITECTURES:
        key = "not-cut" if model.name in REFUSED else "unknown"
        return Ruling(verdict="undecided", why=finding(key, architecture=model.name))
    architecture = ARCHITECTURES[model.name]
    for number, step in enumerate(architecture.steps):
        if (period := step.period(model)) > 1 and any(
            ((old + 1) % period == 0) != ((new + 1) % period == 0)
            for new, old in enumerate(cut.kept)
        ):
            why = finding("step", architecture=model.name, step=number, period=period)
            return Ruling(verdict="refused", why=why)
    if architecture.depth(model, cut.blocks) != architecture.depth(model, len(cut.kept)):
        return Ruling(verdict="refused", why=finding("depth", architecture=model.name))
    return _windows(config, model, architecture.window(model))


def _windows(config: Config, model: GGUFModel, period: int) -> Ruling:
    """The sliding windows of a file against those of the config."""
    kinds = config.get("layer_types")
    stated = model.get(PATTERN)
    if not kinds or not (period or stated is not None):
        return Ruling(verdict="accepted", why=finding("alike"))
    if isinstance(stated, list):
        found: Sequence[bool] = [bool(one) for one in stated]
    else:
        step = int(period if stated is None else stated)
        found = [step == 0 or i % step < step - 1 for i in range(model.blocks)]
    if list(found) != _sliding(config):
        rule = "slide-by-place" if stated is None else "slide-by-file"
        return Ruling(verdict="refused", why=_broken(rule, list(found), _sliding(config)))
    return Ruling(verdict="accepted", why=finding("kept", rule="slide-by-file"))


def _without_file(kind: str) -> Ruling:
    name = next((name for name, a in ARCHITECTURES.items() if kind in a.types), None)
    if name is None:
        return Ruling(verdict="undecided", why=finding("unknown", architecture=kind))
    one = ARCHITECTURES[name]
    if one.steps or one.depth_of or one.linear or one.window is not _NO_WINDOW:
        return Ruling(verdict="undecided", why=finding("place", architecture=name))
    return Ruling(verdict="accepted", why=finding("alike"))


def phrase(why: Finding) -> str:
    """What llama.cpp does with the architecture that a finding is about, in the words of
    :mod:`sleb.checkpoints.gguf_fields`; empty if it is about none."""
    name, step = why.values.get("architecture"), why.values.get("step")
    known = ARCHITECTURES.get(str(name))
    if why.key == "not-cut":
        return REFUSED.get(str(name), "")
    if known is not None and why.key == "step" and step in range(len(known.steps)):
        return known.steps[int(str(step))].what
    return known.depth_of if known is not None and why.key == "depth" else ""


_NO_WINDOW = ARCHITECTURES["llama"].window
