"""What a cut makes of a model's config and structure; on disk and in memory alike.

On disk a config keeps its maker's words: transformers 5 renames what it reads (``rope_theta``,
``torch_dtype``, kinds of layers), and whoever else reads a config that it has written, such as
transformers 4, takes a default for what is gone.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from sleb.checkpoints.depth_fields import (
    DERIVED_FROM,
    depth_fields,
    keeps_pattern,
    reindex,
    reindex_written,
)
from sleb.core.errors import SAID, UnsupportedModel, map_exceptions
from sleb.models.fixed_blocks import refuse_fixed
from sleb.models.source import quiet_transformers
from sleb.models.stack import BlockStack, decoder_config

Json = dict[str, Any]

_READ_ALIKE = frozenset(
    {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "quantization_config"}
)
"""Fields that say nothing of the computation, or are set by whoever loads the model."""
_OF_THE_WRITER = frozenset({"transformers_version", "_name_or_path", "use_cache"})
_REFUSED = (  # transformers validates with several exception types
    Exception,
    UnsupportedModel,
    f"transformers refuses the config of this cut: {SAID}",
)


def pruned_config(config: Any, removed: Collection[int]) -> Any:
    """A transformers config re-indexed for the model without ``removed``; the given one unchanged.

    Raises:
        UnsupportedModel: a depth-dependent field cannot follow this cut, or a block is needed.
    """
    refuse_fixed(config, removed)
    text = decoder_config(config)
    n = text.num_hidden_layers
    kept = [i for i in range(n) if i not in set(removed)]
    field = (getattr(text, "attribute_map", None) or {}).get(
        "num_hidden_layers", "num_hidden_layers"
    )
    fields = text.to_dict()
    new_text = reindex(fields, kept, n, field)
    changed = {k: v for k, v in new_text.items() if k not in fields or fields[k] != v}
    # what transformers writes to config.json; some types (dbrx) refuse to read all of to_dict()
    new = config.to_diff_dict()
    if text is config:
        new.update(changed)
    else:
        key = _place(config, text)
        assert key is not None
        new[key] = {**new.get(key, {}), **changed}
    with map_exceptions(_REFUSED):
        cut = type(config).from_dict(copy.deepcopy(new))
    check = decoder_config(cut)
    if check.num_hidden_layers != len(kept):
        raise UnsupportedModel(f"config field `{field}` does not set the number of blocks")
    read_back = check.to_dict()
    for name in (known.name for known in depth_fields(new_text, len(kept))):
        if read_back.get(name) != new_text[name]:
            raise UnsupportedModel(
                f"transformers does not accept config field `{name}` = {new_text[name]!r} for this "
                f"cut: it becomes {read_back.get(name)!r}"
            )
    return cut


def pruned_json(written: Json, config: Any, cut: Any, removed: Collection[int]) -> Json:
    """config.json of the model without ``removed``: as the original's is ``written``, with nothing
    changed but the fields that depend on depth; ``written`` itself is unchanged.

    ``config`` is what transformers reads from it, ``cut`` the :func:`pruned_config` of that. Where
    a list with one entry per block is not written, but derived from a pattern, it is written out,
    and the pattern goes if it would now say something else.

    Raises:
        UnsupportedModel: transformers would not read ``cut`` from it.
    """
    if not removed:
        return dict(written)
    text = decoder_config(config)
    n = text.num_hidden_layers
    kept = [i for i in range(n) if i not in set(removed)]
    key = _place(config, text)
    if key not in written:  # its fields stand at the top, beside those of other parts
        key = None
    own = written[key] if key else written
    aliases = getattr(text, "attribute_map", None) or {}
    new_own = reindex_written(own, text.to_dict(), kept, n, aliases)
    wanted = _plain(decoder_config(cut).to_dict())
    for pattern, derived in DERIVED_FROM.items():
        if own.get(pattern) not in (None, 0, 1) and wanted.get(derived) is not None:
            new_own.setdefault(derived, wanted[derived])
            if not keeps_pattern(own[pattern], kept):
                del new_own[pattern]

    def whole() -> Json:
        if not key:
            return dict(new_own)
        twice = {k for k in own if k in written and written[k] == own[k] and k in new_own}
        return {**written, **{k: new_own[k] for k in twice}, key: new_own}

    for _ in range(2):
        with map_exceptions(_REFUSED):
            read = _read(type(config), whole())
        found = _plain(decoder_config(read).to_dict())
        other = [k for k in wanted if k not in DERIVED_FROM and found.get(k) != wanted[k]]
        if not other:
            return whole()
        new_own |= {k: wanted[k] for k in other}
    raise UnsupportedModel(
        f"config field `{other[0]}` of this cut would be read as {found.get(other[0])!r}, and not "
        f"as {wanted[other[0]]!r}"
    )


def both_spellings(written: Json, config: Any) -> Json:
    """``written``, a config.json in transformers 5's words, with the words of transformers 4 beside
    them, as far as transformers reads the same ``config`` from it: for a model that was converted
    from GGUF, which has no config.json of its own."""
    rope: Json = written.get("rope_parameters") or {}
    sliding: Json = rope.get("sliding_attention") or {}
    full: Json = (rope.get("full_attention") if sliding else rope) or {}
    scaling = {k: v for k, v in full.items() if k not in ("rope_theta", "partial_rotary_factor")}
    older = {
        "torch_dtype": written.get("dtype"),
        "rope_theta": full.get("rope_theta"),
        "partial_rotary_factor": full.get("partial_rotary_factor"),
        "rope_local_base_freq": sliding.get("rope_theta"),
        "rope_scaling": scaling if scaling.get("rope_type", "default") != "default" else None,
    }
    new, wanted = dict(written), _plain(config.to_dict())
    for name, value in older.items():
        if value is None or name in new:
            continue
        found = _plain(_read(type(config), {**new, name: value}).to_dict())
        if all(found.get(k) == v for k, v in wanted.items()):
            new[name] = value
    return new


def _read(kind: Any, written: Json) -> Any:
    """The config of class ``kind`` that transformers reads from a file with ``written`` in it."""
    with tempfile.TemporaryDirectory(prefix="sleb-") as folder, quiet_transformers():
        (Path(folder) / "config.json").write_text(json.dumps(written), encoding="utf-8")
        fields, _ = kind.get_config_dict(folder)
        return kind.from_dict(fields)


def _place(config: Any, text: Any) -> str | None:
    """The field of ``config`` that the decoder's config ``text`` is; None if it is all of it."""
    if text is config:
        return None
    return next(str(k) for k in config.sub_configs if getattr(config, k, None) is text)


def _plain(fields: Json) -> Json:
    """``fields`` as JSON has them, without those that are no part of the model."""

    def cleaned(part: Json) -> Json:
        return {name: value for name, value in part.items() if name not in _READ_ALIKE}

    plain: Json = json.loads(json.dumps(fields, default=str), object_hook=cleaned)
    return plain


def lost_fields(
    wanted: Json, found: Json, passed_over: Collection[str] = (), above: str = ""
) -> Iterator[str]:
    """Names of what ``found`` lacks of the config.json ``wanted``, or has with another value, or
    has although the cut made it untrue; but for fields ``passed_over``. Others may be added."""
    for name, value in wanted.items():
        own = found.get(name)
        if name in passed_over or name in _OF_THE_WRITER:
            continue
        if isinstance(value, dict) and isinstance(own, dict):
            yield from lost_fields(value, own, passed_over, f"{above}{name}.")
        elif name not in found or own != value:
            yield above + name
    yield from (above + name for name in found if name in DERIVED_FROM and name not in wanted)


def write_json(new: Json, source: Path, target: Path) -> None:
    """Write ``new`` as ``target``, in the form of the JSON file ``source``; its very bytes, if it
    says the same."""
    text = source.read_text(encoding="utf-8")
    if json.dumps(json.loads(text)) == json.dumps(new):  # in the same order too
        target.write_bytes(source.read_bytes())
        return
    indent = re.match(r"\s*\{\r?\n([ \t]+)\S", text)
    written = json.dumps(new, indent=indent[1] if indent else None, ensure_ascii=text.isascii())
    target.write_text(written + "\n" * text.endswith("\n"), encoding="utf-8", newline="\n")


def check_structure(stack: BlockStack, kept: list[int], cut: nn.Module) -> None:
    """Raise UnsupportedModel unless each kept block is built alike in the cut model: some models
    build the first or the last place differently (rwkv, gpt_neox_japanese)."""
    for old, block in zip(kept, BlockStack(cut).blocks, strict=True):
        before, after = (
            {name: tuple(tensor.shape) for name, tensor in b.state_dict().items()}
            for b in (stack.blocks[old], block)
        )
        if different := sorted(dict(before.items() ^ after.items())):
            raise UnsupportedModel(
                f"block {old} would move to a place where {stack.name} builds blocks differently "
                f"({different[0]}): protect the block that has this place now"
            )
