"""Which GGUF fields depend on depth, how each follows the blocks, and what llama.cpp cannot run.

The twin of `depth_fields` for GGUF. What counts is how llama.cpp reads a file: it knows each
block's kind from per-block arrays, from the tensors that are there, or from rules on the block's
index and on the number of blocks that are compiled in. The facts in ``ARCHITECTURES`` were read in
the sources of llama.cpp as llama-cpp-python 0.3.36 carries them (src/models, src/llama-model.cpp).
Architectures that are not listed are refused: a wrong guess would load and compute something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sleb.checkpoints.gguf_file import ARRAY, BOOL, STRING, GGUFFile, Value
from sleb.core.errors import DataError, UnsupportedModel, did_you_mean
from sleb.core.units import MAX_BLOCKS

PATTERN = "attention.sliding_window_pattern"
_RECURRENT = "attention.recurrent_layers"


@dataclass(frozen=True, kw_only=True)
class GGUFModel:
    """A file as a model: its architecture's name, its blocks, and its fields without the prefix."""

    file: GGUFFile
    name: str
    blocks: int

    @classmethod
    def of(cls, file: GGUFFile) -> GGUFModel:
        """Read what the file says of itself, and check that its blocks are there.

        Raises:
            DataError: fields or blocks are missing.
            UnsupportedModel: blocks beyond the last (multi-token prediction).
        """
        name = file.value("general.architecture")
        if not isinstance(name, str):
            raise DataError(f"{file.path} does not name its architecture: not a language model")
        blocks = file.value(f"{name}.block_count")
        if not isinstance(blocks, int) or not 1 <= blocks < MAX_BLOCKS:
            raise DataError(f"{file.path}: {name}.block_count is {blocks}: not a language model")
        model = cls(file=file, name=name, blocks=blocks)
        if predicted := model.integer("nextn_predict_layers"):
            raise UnsupportedModel(
                f"{file.path}: {predicted} of its {blocks} blocks predict further tokens "
                f"({name}.nextn_predict_layers), and sleb does not cut such GGUF files"
            )
        found = {block for tensor in file.tensors if (block := block_of(tensor)) is not None}
        if lacking := sorted(set(range(blocks)) - found):
            raise DataError(f"{file.path}: block {lacking[0]} of {blocks} has no tensors")
        if beyond := sorted(found - set(range(blocks))):
            raise UnsupportedModel(
                f"{file.path} has tensors of block {beyond[0]} behind its {blocks} blocks"
            )
        return model

    def block_sizes(self) -> list[tuple[int, int]]:
        """Elements and bytes of each block's tensors."""
        sizes = [(0, 0)] * self.blocks
        for name, info in self.file.tensors.items():
            if (block := block_of(name)) is not None:
                elements, nbytes = sizes[block]
                sizes[block] = (elements + math.prod(info.shape), nbytes + info.nbytes)
        return sizes

    def get(self, key: str) -> Any:
        """The value of ``{architecture}.key``; None if there is none."""
        return self.file.value(f"{self.name}.{key}")

    def integer(self, key: str) -> int | None:
        """The value of ``{architecture}.key``, which is a count; None if there is none."""
        value = self.get(key)
        if value is not None and (not isinstance(value, int) or value < 0):
            raise DataError(f"{self.file.path}: {self.name}.{key} is {value}, not a count")
        return value

    def counts(self, key: str) -> list[int] | None:
        """A count for each block: the field's list, or its one value repeated."""
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            return [self.integer(key) or 0] * self.blocks
        if value is not None and (
            len(value) != self.blocks or not all(isinstance(count, int) for count in value)
        ):
            raise DataError(
                f"{self.file.path}: {self.name}.{key} is not one count for each of "
                f"{self.blocks} blocks"
            )
        return value


@dataclass(frozen=True, kw_only=True)
class Step:
    """What llama.cpp does in every so many blocks, by their index alone. ``period(model)`` is the
    step, 0 or 1 where there is none."""

    what: str
    period: Callable[[GGUFModel], int]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp treats one architecture.

    ``types``: model types of transformers whose GGUF files have it. ``window(model)``: period of
    full attention among sliding windows where the file does not say; 0 for no sliding windows.
    ``linear``: whether some blocks have linear attention, which a list says or else a period of
    full attention. ``steps``: rules on a block's index. ``depth(model, n)``: what follows from the
    number of blocks ``n`` alone, and must be the same for the cut model, with its name in
    ``depth_of``.
    """

    types: tuple[str, ...]
    window: Callable[[GGUFModel], int] = lambda model: 0
    linear: bool = False
    steps: tuple[Step, ...] = ()
    depth: Callable[[GGUFModel, int], Any] = lambda model, n: None
    depth_of: str = ""


def _alike(*types: str) -> Architecture:
    """Blocks differ in nothing but tensors and per-block fields."""
    return Architecture(types=types)


def _window_if_set(period: int) -> Callable[[GGUFModel], int]:
    return lambda model: period if model.integer("attention.sliding_window") else 0


def _scaled_by_heads(depth: int) -> Callable[[GGUFModel, int], Any]:
    """Gemma 2 and 3: at one depth, that of the 27B model, attention is scaled by width over heads,
    and at all others by the length of a key."""

    def scale(model: GGUFModel, n: int) -> Any:
        heads, width = model.counts("attention.head_count"), model.integer("embedding_length")
        if not heads or not heads[0] or not width:
            return n == depth
        own, key = width // heads[0], model.integer("attention.key_length")
        return own if n == depth or key is None else key

    return scale


def _lite(model: GGUFModel, n: int) -> Any:
    tokens = model.file.fields.get("tokenizer.ggml.tokens")
    vocabulary = model.integer("vocab_size") or (tokens.count if tokens else 0)
    lite = n in (26, 27) or (n == 48 and vocabulary == 128256)
    gates = n in (47, 48) and vocabulary == 154880 and model.get("expert_gating_func") is None
    return lite, gates


_NO_ROPE = Step(what="leaves out the rotary embedding", period=lambda model: 4)
_EXPERTS = Step(
    what="expects experts", period=lambda model: model.integer("interleave_moe_layer_step") or 0
)

_SAME_NAME = (
    "apertus arcee bloom dbrx ernie4_5 exaone falcon gemma glm4 gpt2 granite internlm2 mpt "
    "nemotron olmo olmoe phi3 phimoe qwen2 qwen3 seed_oss stablelm starcoder2 xverse"
)

ARCHITECTURES: dict[str, Architecture] = {
    **{name: _alike(name) for name in _SAME_NAME.split()},
    "llama": _alike("llama", "mistral", "mixtral", "internlm3"),
    "mistral3": _alike("mistral3", "ministral3"),
    "qwen2moe": _alike("qwen2_moe"),
    "qwen3moe": _alike("qwen3_moe"),
    "gptneox": _alike("gpt_neox"),
    "starcoder": _alike("gpt_bigcode"),
    "phi2": _alike("phi"),
    "granitemoe": _alike("granitemoe", "granitemoeshared"),
    "chatglm": _alike("glm"),
    "hunyuan-dense": _alike("hunyuan_v1_dense"),
    "hunyuan-moe": _alike("hunyuan_v1_moe"),
    "minimax-m2": _alike("minimax_m2"),
    # dense at first, as leading_dense_block_count says
    "deepseek": _alike("deepseek"),
    "dots1": _alike("dots1"),
    "bailingmoe": _alike("bailing_moe"),
    # a block whose head_count_kv is 0 is no attention
    "lfm2": _alike("lfm2"),
    "jamba": _alike("jamba"),
    "granitehybrid": _alike("granitemoehybrid", "bamba"),
    # sliding windows by the block's index, unless the file has them block by block
    "gemma2": Architecture(
        types=("gemma2",),
        window=lambda model: 2,
        depth=_scaled_by_heads(46),
        depth_of="how attention is scaled",
    ),
    "gemma3": Architecture(
        types=("gemma3_text", "gemma3"),
        window=_window_if_set(6),
        depth=_scaled_by_heads(62),
        depth_of="how attention is scaled",
    ),
    "cohere2": Architecture(types=("cohere2",), window=lambda model: 4),
    "gpt-oss": Architecture(types=("gpt_oss",), window=lambda model: 2),
    "olmo2": Architecture(types=("olmo2", "olmo3"), window=_window_if_set(4)),
    # linear attention by the block's index, unless the file has it block by block
    "qwen3next": Architecture(types=("qwen3_next",), linear=True),
    "qwen35": Architecture(types=("qwen3_5_text", "qwen3_5"), linear=True),
    "qwen35moe": Architecture(types=("qwen3_5_moe_text", "qwen3_5_moe"), linear=True),
    # rules on the index that no field can express
    "smollm3": Architecture(types=("smollm3",), steps=(_NO_ROPE,)),
    "llama4": Architecture(
        types=("llama4_text", "llama4"),
        window=lambda model: 0 if model.integer("attention.sliding_window") == 0 else 4,
        steps=(_NO_ROPE, _EXPERTS),
        depth=lambda model, n: n if model.integer("attention.sliding_window") == 0 else None,
        depth_of="which block has no rotary embedding",
    ),
    "ernie4_5-moe": Architecture(types=("ernie4_5_moe",), steps=(_EXPERTS,)),
    # rules on the number of blocks
    "exaone4": Architecture(
        types=("exaone4",),
        window=lambda model: 4 if model.blocks == 64 else 0,
        depth=lambda model, n: n == 64,
        depth_of="whether there are sliding windows",
    ),
    "command-r": Architecture(
        types=("cohere",),
        depth=lambda model, n: n >= 64,
        depth_of="whether queries and keys are normalized",
    ),
    "deepseek2": Architecture(
        types=("deepseek_v2", "deepseek_v3"),
        depth=_lite,
        depth_of="the form of its attention and gates",
    ),
    "minicpm": Architecture(
        types=("minicpm",),
        depth=lambda model, n: n if model.get("residual_scale") is None else None,
        depth_of="the scale of its residuals (the file has no minicpm.residual_scale)",
    ),
}

REFUSED = {
    "baichuan": "llama.cpp tells its position embeddings by the number of blocks",
    "minicpm3": "llama.cpp scales its residuals by the number of blocks",
    "gemma3n": "its last blocks reuse the keys and values of earlier ones",
    "gemma4": "its last blocks reuse the keys and values of earlier ones",
    "qwen3vl": "the vision features go into its first blocks, by their index",
    "qwen3vlmoe": "the vision features go into its first blocks, by their index",
}

_SLICED = frozenset(
    f"attention.head_count attention.head_count_kv {_RECURRENT} attention.rope_pattern {PATTERN} "
    "expert_feed_forward_length expert_used_count feed_forward_length swiglu_clamp_exp "
    "swiglu_clamp_shexp".split()
)
"""Fields of an architecture that may have one entry per block."""

_SLICED_BARE = frozenset(["xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps"])
"""The same, of names without the architecture's prefix."""

_NOT_PER_BLOCK = frozenset(["rope.dimension_sections"])
_COUNTED = "leading_dense_block_count"
_OTHER_KINDS = ("general.", "tokenizer.", "quantize.", "sleb.")


def block_of(tensor: str) -> int | None:
    """The block that a tensor belongs to, by its name; None for the others."""
    match = re.match(r"blk\.(\d{1,6})\.", tensor)
    return int(match[1]) if match else None


def recut(model: GGUFModel, removed: Collection[int]) -> dict[str, Value]:
    """New values of the fields that depend on depth, for the file without the blocks ``removed``.

    Raises:
        UnsupportedModel: llama.cpp would not compute the same with these blocks gone, or a field
            may depend on depth in a way that is not known.
        DataError: a per-block field has not one entry per block.
    """
    architecture = architecture_of(model)
    gone = set(removed)
    kept = [block for block in range(model.blocks) if block not in gone]
    if not gone:
        return {}
    _refuse_steps(model, architecture, kept)
    before, after = (architecture.depth(model, n) for n in (model.blocks, len(kept)))
    if before != after:
        raise UnsupportedModel(
            f"{model.name}: llama.cpp tells {architecture.depth_of} by the number of blocks, and "
            f"it would change between {model.blocks} and {len(kept)}; cut the Hugging Face "
            "checkpoint, and run it elsewhere"
        )
    values = {f"{model.name}.block_count": _like(model, "block_count", len(kept))}
    if (dense := model.integer(_COUNTED)) is not None:
        values[f"{model.name}.{_COUNTED}"] = _like(
            model, _COUNTED, sum(block < dense for block in kept)
        )
    values |= _sliced(model, kept)
    pattern = f"{model.name}.{PATTERN}"
    if windows := windows_of(model):
        _keep_both(windows, kept, "attention", model)
        own = [windows[block] for block in kept]
        values.setdefault(pattern, Value(kind=ARRAY, item=BOOL, data=own))
    if architecture.linear:
        linear = linear_of(model)
        _keep_both(linear, kept, "blocks", model)
        own = [linear[block] for block in kept]
        values.setdefault(f"{model.name}.{_RECURRENT}", Value(kind=ARRAY, item=BOOL, data=own))
    heads = model.counts("attention.head_count_kv")
    if heads and 0 in heads:
        _keep_both([count == 0 for count in heads], kept, "blocks", model)
    _refuse_first_block(model, kept[0])
    return values


def refuse_parts(file: GGUFFile) -> None:
    """Raise UnsupportedModel for a file whose blocks may lack parts: llama.cpp alone runs it."""
    if file.value("general.architecture") == "deci":
        raise UnsupportedModel(
            f"{file.path} lacks parts of blocks: llama.cpp runs it, and transformers has no code "
            "for it; give the file that it was cut from (docs/units.md)"
        )


def architecture_of(model: GGUFModel) -> Architecture:
    """How llama.cpp treats the model. Raises UnsupportedModel if that is not known."""
    if reason := REFUSED.get(model.name):
        raise UnsupportedModel(f"{model.name} GGUF files cannot be cut exactly: {reason}")
    if model.name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"sleb does not know how llama.cpp runs '{model.name}'"
            f"{did_you_mean(model.name, ARCHITECTURES)}, so it does not cut such a file; cut the "
            "Hugging Face checkpoint instead (docs/gguf.md has the list)"
        )
    return ARCHITECTURES[model.name]


def _refuse_steps(model: GGUFModel, architecture: Architecture, kept: Sequence[int]) -> None:
    for step in architecture.steps:
        period = step.period(model)
        moved = [
            old
            for new, old in enumerate(kept)
            if period > 1 and ((old + 1) % period == 0) != ((new + 1) % period == 0)
        ]
        if moved:
            raise UnsupportedModel(
                f"{model.name}: llama.cpp {step.what} in every {period}th block, by its place: "
                f"blocks {moved[:4]} would change; only cuts that keep the pattern (such as "
                f"{period} blocks in a row) are exact"
            )


def _like(model: GGUFModel, key: str, number: int) -> Value:
    """``number`` in the type that the field has now."""
    old = model.file.typed(f"{model.name}.{key}")
    assert old is not None
    return Value(kind=old.kind, data=number)


def _sliced(model: GGUFModel, kept: Sequence[int]) -> dict[str, Value]:
    """Every per-block array, cut; arrays that may be per block, refused."""
    values = {}
    prefix = f"{model.name}."
    for key, info in model.file.fields.items():
        if info.kind != ARRAY:
            continue
        own = key.removeprefix(prefix) if key.startswith(prefix) else None
        if own in _SLICED or key in _SLICED_BARE:
            value = model.file.typed(key)
            if value is None or info.count != model.blocks or info.item == STRING:
                raise DataError(
                    f"{model.file.path}: {key} has {info.count} entries for {model.blocks} blocks"
                )
            data = [value.data[block] for block in kept]
            values[key] = Value(kind=ARRAY, item=value.item, data=data)
        elif own in _NOT_PER_BLOCK:
            continue
        elif own is not None or key.startswith("general.tensor_extra."):
            raise UnsupportedModel(
                f"{model.file.path}: sleb does not know the list {key}, which may depend on depth"
            )
        elif info.count == model.blocks > 1 and not key.startswith(_OTHER_KINDS):
            raise UnsupportedModel(
                f"{model.file.path}: {key} has one entry per block ({info.count}), and sleb does "
                "not know what it means"
            )
    return values


def windows_of(model: GGUFModel) -> list[bool] | None:
    """Which blocks of a model llama.cpp runs with a sliding window; None if it has no such
    pattern."""
    period = architecture_of(model).window(model)
    if not period:
        return None
    if isinstance(stated := model.get(PATTERN), list):
        return [bool(window) for window in stated]
    period = period if stated is None else model.integer(PATTERN) or 0
    return [period == 0 or block % period < period - 1 for block in range(model.blocks)]


def linear_of(model: GGUFModel) -> list[bool]:
    """Which blocks llama.cpp runs with linear attention, where an architecture has some."""
    if isinstance(stated := model.get(_RECURRENT), list):
        return [bool(linear) for linear in stated]
    period = model.integer("full_attention_interval") or 4
    return [(block + 1) % period != 0 for block in range(model.blocks)]


def _keep_both(kinds: Sequence[bool], kept: Sequence[int], what: str, model: GGUFModel) -> None:
    """llama.cpp makes a cache for each kind, and stops if none is left of one."""
    if len({kinds[block] for block in kept}) < len(set(kinds)):
        raise UnsupportedModel(
            f"{model.name}: this cut removes every block of one of its two kinds of {what}, and "
            "llama.cpp needs both; protect one of them"
        )


def _refuse_first_block(model: GGUFModel, first: int) -> None:
    """Where a file gives no lengths of keys and values, llama.cpp divides by the heads of the
    first block."""
    heads = model.counts("attention.head_count")
    lengths = [model.integer(f"attention.{name}_length") for name in ("key", "value")]
    if heads and None in lengths and heads[first] != heads[0]:
        raise UnsupportedModel(
            f"{model.name}: llama.cpp takes the length of a key from the first block's heads, and "
            f"block {first} has {heads[first]} instead of {heads[0]}: protect block 0"
        )
