"""What a GGUF file says of its model that transformers' converter passes over.

The converter knows some fields of each architecture and takes a default for the others, without a
word: a model with scaled rotary frequencies, another query scale, or another epsilon would be
searched, measured and written out as another one. So every field of the architecture and every
tensor is accounted for here: it is converted, it is carried over into the config, it changes
nothing, or the file is refused with its name.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from itertools import repeat
from typing import TYPE_CHECKING, Any

from sleb.checkpoints.gguf_fields import (
    ARCHITECTURES,
    PATTERN,
    GGUFModel,
    block_of,
    linear_of,
    windows_of,
)
from sleb.checkpoints.gguf_file import ARRAY, STRING, GGUFFile
from sleb.core.errors import DataError, UnsupportedModel

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import nn

_CONVERTED = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "expert_count",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "ssm.conv_kernel",
        "ssm.state_size",
        "ssm.time_step_rank",
        "ssm.inner_size",
        "shortconv.l_cache",
    }
)
"""Read by transformers' converter, or shapes, which a wrong value could not load."""
_WITHOUT_EFFECT = frozenset(
    {"tensor_data_layout", "use_parallel_residual", "pooling_type", "rope.scaling.finetuned"}
)
"""Told by the tensors too, or of no effect on a causal language model."""
_AGREE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
        ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon"),
    ),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_weights_norm": ("norm_topk_prob",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
"""Fields, and the attributes of configs that must have their value."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "ssm.dt_b_c_rms": (False,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
}
"""Fields of which transformers' converter supposes one of these values."""
_QUERY_SCALE = frozenset({"gemma2", "gemma3"})
_SLIDES = frozenset({"gemma2", "gemma3", "gpt-oss"})
"""Architectures of which llama.cpp and transformers both read a sliding window."""
_OF_ITS_OWN = frozenset({"qwen35", "gemma4"})
"""Architectures for which transformers has code that reads what the file states of positions."""
_FREQUENCIES = "rope_freqs.weight"


def corrections(file: GGUFFile, config: Any) -> dict[str, Any]:
    """What has to be set in transformers' ``config`` of a GGUF file, so that it is the model that
    llama.cpp runs; by attribute.

    Raises:
        UnsupportedModel: a field or tensor has no place in the config.
        DataError: a value is not of its kind.
    """
    return _Carrier(file, config).carried()


def check_tensors(file: GGUFFile, model: nn.Module) -> None:
    """Account for every tensor: transformers draws those that are missing at random, and passes
    over those that it does not know.

    Raises:
        DataError: tensors are missing.
        UnsupportedModel: there are more than ``model`` has.
    """
    config: Any = model.config
    blocks = int(config.num_hidden_layers)
    known = [t for t in file.tensors.values() if not t.name.startswith(("rope_f", "rope_factors"))]
    found = sum(
        math.prod(tensor.shape)
        for tensor in known
        if (block := block_of(tensor.name)) is None or block < blocks
    )
    own = {id(value): value.numel() for value in model.state_dict(keep_vars=True).values()}
    if (wanted := sum(own.values())) == found:
        return
    parts = Counter(t.name.split(".", 2)[2] for t in known if block_of(t.name) is not None)
    most = max(parts.values(), default=0)
    rare = [part for part, count in parts.items() if count == most - 1 or not count]
    lacking = [
        f"blk.{i}.{part}"
        for part in rare
        for i in range(blocks)
        if f"blk.{i}.{part}" not in file.tensors
    ]
    if found < wanted:
        raise DataError(
            f"{file.path} lacks tensors ({(wanted - found) / wanted:.1%} of the weights"
            f"{', ' + lacking[0] if lacking else ''}): it is incomplete; fetch it again"
        )
    raise UnsupportedModel(
        f"{file.path} has more weights than transformers {version('transformers')} reads "
        f"({found - wanted:,} elements): give the model as a Hugging Face checkpoint"
    )


def correct_tokens(path: Path, tokenizer: Any) -> None:
    """Have ``tokenizer``, which transformers made of a GGUF file, read whole what the file marks as
    a token of its own, and end a text as the file does. transformers 5.17 has three such tokens of
    Qwen2, and another end."""
    from gguf import GGUFReader, TokenType
    from transformers import AddedToken

    fields = GGUFReader(path).fields
    model, kinds, tokens, end = (
        fields[key].contents() if (key := f"tokenizer.ggml.{name}") in fields else None
        for name in ("model", "token_type", "tokens", "eos_token_id")
    )
    if model != "gpt2" or not kinds or not tokens:
        return  # that of a SentencePiece model is made of all its parts
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        known = tokenizer.added_tokens_decoder
        lost = [tokens[i] for i, found in enumerate(kinds) if found == kind and i not in known]
        marked = [AddedToken(text, normalized=False, special=special) for text in lost]
        tokenizer.add_tokens(marked, special_tokens=special)
    if end is not None and tokenizer.convert_ids_to_tokens(end) == tokens[end]:
        tokenizer.eos_token = tokens[end]


@contextmanager
def parsed_once() -> Iterator[None]:
    """While this is open a GGUF file is parsed once, whoever asks, and its tensors are dequantized
    by all cores. gguf's reader takes seconds for the texts of a large tokenizer, and transformers
    has the file parsed anew for the config, for the weights and for the tokenizer; and all names of
    an architecture's tensors made anew for each module."""
    import gguf
    import numpy as np
    from transformers import modeling_gguf_pytorch_utils as converter

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        data: Any

        def _get(self, *where: Any, **how: Any) -> Any:
            if isinstance(self.data, np.memmap):  # a slice of one is dear
                self.data = self.data.view(np.ndarray)
            return super()._get(*where, **how)

    known: dict[int, tuple[Any, Any]] = {}  # the parts of the file, and their values

    def value(part: Any, kinds: Any) -> Any:
        if id(part) not in known:
            text = kinds[-1] == STRING
            known[id(part)] = part, bytes(part).decode() if text else value_of(part, kinds)
        return known[id(part)][1]

    parsed, dequantize = lru_cache(maxsize=1)(Reader), gguf.dequantize
    value_of = converter._gguf_parse_value

    def by_rows(data: Any, kind: Any) -> Any:
        if data.ndim < 2:
            return dequantize(data, kind)
        parts = np.array_split(data, min(len(data), workers))
        return np.concatenate([*pool.map(dequantize, parts, repeat(kind))])

    workers = os.cpu_count() or 1
    ours = {
        "GGUFReader": lambda path: parsed(str(path)),
        "get_tensor_name_map": lru_cache(gguf.get_tensor_name_map),
        "dequantize": by_rows,
    }
    before = {name: getattr(gguf, name) for name in ours}
    with ThreadPoolExecutor(workers) as pool:
        vars(gguf).update(ours)
        converter._gguf_parse_value = value
        try:
            yield
        finally:
            vars(gguf).update(before)
            converter._gguf_parse_value = value_of


class _Carrier:
    def __init__(self, file: GGUFFile, config: Any) -> None:
        self.file, self.config = file, config
        self.name = str(file.value("general.architecture"))
        self.changes: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        """The value of the architecture's field; None for a list of texts, or if there is none."""
        field = self.file.fields.get(f"{self.name}.{key}")
        if field is None or (field.kind == ARRAY and field.item in (STRING, ARRAY)):
            return None
        return self.file.value(field.key)

    def refusal(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.file.path} states {what}, which transformers {version('transformers')} does "
            "not convert, so it would be another model: give it as a Hugging Face checkpoint"
        )

    def agree(self, attribute: str, value: Any) -> bool:
        """Have the config's ``attribute`` be ``value``; whether there is such an attribute."""
        if not hasattr(self.config, attribute):
            return False
        if not _close(getattr(self.config, attribute), value):
            self.changes[attribute] = value
        return True

    def carried(self) -> dict[str, Any]:
        for field in self.file.fields:
            if field.startswith(f"{self.name}."):
                self.field(field.removeprefix(f"{self.name}."))
        if self.name in _QUERY_SCALE:
            self.query_scale()
        self.windows()
        if self.name not in _OF_ITS_OWN:
            self.positions()
        return self.changes

    def field(self, key: str) -> None:
        """Account for one field; for those of positions and windows, that they are read at all."""
        value = self.get(key)
        if key in _CONVERTED or key in _WITHOUT_EFFECT or self.name in _OF_ITS_OWN:
            return
        if not self.accounted(key, value):
            raise self.refusal(f"{self.name}.{key} = {value}")

    def accounted(self, key: str, value: Any) -> bool:
        if key in _ONLY:
            return any(_close(value, only) for only in _ONLY[key])
        if key in _AGREE:
            return any([self.agree(name, value) for name in _AGREE[key]])  # noqa: C419 (all)
        if key in ("attention.key_length", "attention.value_length"):
            return bool(self.head_dim() == value)
        if key == "expert_gating_func":
            return self.name == "minimax-m2" or value == 1  # softmax
        return key in _ROPE or key.startswith("attention.sliding_window")

    def head_dim(self) -> int:
        config = self.config
        own = getattr(config, "head_dim", None)
        return int(own or config.hidden_size // config.num_attention_heads)

    def query_scale(self) -> None:
        """llama.cpp tells it by the number of blocks (the 27B models have their own)."""
        model = GGUFModel.of(self.file)
        scale = ARCHITECTURES[self.name].depth(model, model.blocks)
        if isinstance(scale, int) and not isinstance(scale, bool):
            self.agree("query_pre_attn_scalar", scale)

    def windows(self) -> None:
        """Which blocks slide, as the file says or llama.cpp supposes, and how far; or which have
        linear attention."""
        if self.name in ARCHITECTURES and ARCHITECTURES[self.name].linear:
            linear = linear_of(GGUFModel.of(self.file))
            kinds = ["linear_attention" if one else "full_attention" for one in linear]
            self.agree("layer_types", kinds)
        if self.name in _SLIDES and (window := self.get("attention.sliding_window")):
            self.agree("sliding_window", window)
        stated = self.get(PATTERN)
        listed = isinstance(stated, list)
        if self.name not in ARCHITECTURES or not (listed or self.name in _SLIDES):
            return
        slides = stated if listed else windows_of(GGUFModel.of(self.file))
        if slides is None:
            return
        kinds = getattr(self.config, "layer_types", None) or []
        if len(kinds) != len(slides) or not set(kinds) <= {"sliding_attention", "full_attention"}:
            raise self.refusal(f"sliding windows block by block ({self.name}.{PATTERN})")
        self.agree("layer_types", ["sliding_attention" if s else "full_attention" for s in slides])

    def positions(self) -> None:
        """Rotary embedding: its base, how much of a head it turns, and how it is scaled."""
        rope = getattr(self.config, "rope_parameters", None)
        stated = [k for k in _ROPE if self.get(k) is not None]
        special = [n for n in self.file.tensors if n.startswith(("rope_freqs", "rope_factors"))]
        if not rope:
            if named := [*(f"{self.name}.{k}" for k in stated), *special]:
                raise self.refusal(named[0])
            return
        by_kind = isinstance(rope.get("full_attention"), dict)
        parts = {k: dict(v) for k, v in rope.items()} if by_kind else {"": dict(rope)}
        full = parts["full_attention" if by_kind else ""]
        full["rope_theta"] = self.get("rope.freq_base") or 10000.0
        if by_kind:
            swa = self.get("rope.freq_base_swa") or 10000.0
            parts.setdefault("sliding_attention", {})["rope_theta"] = swa
        elif self.get("rope.freq_base_swa"):
            raise self.refusal(f"{self.name}.rope.freq_base_swa")
        self.turned(full)
        self.scaled(full)
        for name in special:
            if name != _FREQUENCIES or by_kind:
                raise self.refusal(f"a tensor {name}")
            self.frequencies(full)
        new = parts if by_kind else full
        if not _close(rope, new):
            self.changes["rope_parameters"] = new

    def turned(self, rope: dict[str, Any]) -> None:
        count, width = self.get("rope.dimension_count"), self.head_dim()
        own = rope.get("partial_rotary_factor") or getattr(
            self.config, "partial_rotary_factor", None
        )
        if not count or getattr(self.config, "rotary_dim", None) == count:
            return
        if int(width * (own or 1.0)) != count:
            if own is None:
                raise self.refusal(f"{self.name}.rope.dimension_count = {count}")
            rope["partial_rotary_factor"] = count / width

    def scaled(self, rope: dict[str, Any]) -> None:
        factor = self.get("rope.scaling.factor") or self.get("rope.scale_linear") or 0.0
        kind = self.get("rope.scaling.type") or ("linear" if factor else "none")
        old = self.get("rope.scaling.original_context_length")
        own = rope.get("rope_type", "default")
        if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
            kind = "default"
        if kind == "linear":
            rope |= {"rope_type": kind, "factor": factor}
        elif kind != own or (
            kind != "default"
            and (
                not _close(rope.get("factor"), factor)
                or (old and rope.get("original_max_position_embeddings") != old)
            )
        ):
            raise self.refusal(f"{self.name}.rope.scaling.type = {kind}, factor {factor}")

    def frequencies(self, rope: dict[str, Any]) -> None:
        """Divisors of the frequencies, as Llama 3.1 and later have them: the config says by which
        rule they were made."""
        import numpy as np

        tensor = self.file.tensors[_FREQUENCIES]
        if tensor.kind:  # float32
            raise self.refusal(f"a tensor {_FREQUENCIES}")
        given = np.frombuffer(self.file.content(tensor), dtype="<f4").astype(np.float64)
        if np.allclose(given, 1):
            return
        for old in (8192, 4096, 2048, 16384, 32768, 1024, 65536, 131072):
            rule = {
                "rope_type": "llama3",
                "factor": float(round(given.max(), 3)),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": old,
            }
            if rope.get("rope_type", "default") == "default" and np.allclose(
                given, _llama3(rope["rope_theta"], len(given), rule), rtol=1e-4
            ):
                rope |= rule
                return
        raise self.refusal(f"a tensor {_FREQUENCIES} that is not Llama 3's")


_ROPE = (
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.original_context_length",
)
"""Fields of positions that :meth:`_Carrier.positions` reads."""


def _llama3(theta: float, half: int, rule: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Divisors [half] of the rotary frequencies by Llama 3.1's rule: long waves are stretched by
    ``factor``, short ones are not, and between them it is interpolated."""
    import numpy as np

    waves = 2 * np.pi * theta ** (np.arange(half) / half)
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    share = (rule["original_max_position_embeddings"] / waves - low) / (high - low)
    smooth = np.clip(share, 0, 1)
    divisors: np.ndarray[Any, Any] = 1 / ((1 - smooth) / rule["factor"] + smooth)
    return divisors


def _close(a: Any, b: Any) -> bool:
    """Equal, as far as float32 tells, also inside mappings and lists."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_close, a, b))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)
