"""Names of modules in a config's ``quantization_config``, and how they follow a cut.

A quantized checkpoint says which modules are quantized, and how, by name or by pattern. After a cut
an entry that names a block would speak of another one, and the model would load and compute
something else. So every entry is tried on the names of the modules: in the cut model it must match
exactly those that it matched before, under their new names. What cannot be written so is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from sleb.core.errors import UnsupportedModel

Rename = Callable[[str], "str | None"]
Matches = Callable[[str, str], bool]

FIELDS = frozenset(
    {
        "ignore",
        "targets",
        "modules_to_not_convert",
        "llm_int8_skip_modules",
        "ignored_layers",
        "exclude_modules",
        "extra_config",
        "dynamic",
        "module_fqn_to_config",
        "fqn_to_config",
    }
)
"""Fields that hold names of modules, or patterns: lists of them, or mappings with them as keys."""

_NUMBER = re.compile(r"(^|[^\w])\d+\\?(\.|$)")
"""A part of a module's path that is a number."""


def quant_method(config: Any) -> str | None:
    """How the weights of a checkpoint are quantized, as its config (a mapping, or transformers')
    says; None if they are not."""
    found = config if isinstance(config, Mapping) else vars(config)
    quantization = found.get("quantization_config")
    if not quantization:
        return None
    if not isinstance(quantization, Mapping):
        quantization = quantization.to_dict()
    method = quantization.get("quant_method") or "an unnamed method"
    return str(getattr(method, "value", method))


def renumber_quantization(
    quantization: Mapping[str, Any], modules: Iterable[str], path: str, rename: Rename
) -> dict[str, Any]:
    """The ``quantization_config`` of the model without some blocks; the given one unchanged.

    Args:
        quantization: of the uncut model, as JSON has it.
        modules: names of its modules, as entries may have them.
        path: of the list of blocks.
        rename: the name that a module has after the cut; None if it goes.

    Raises:
        UnsupportedModel: an entry cannot follow the cut exactly.
    """
    method = str(quantization.get("quant_method") or "")
    entries = _Entries(modules, path, rename, _MATCHES.get(method, _as_path))
    return {key: entries.walk(value, key in FIELDS) for key, value in quantization.items()}


def renumber_metadata(metadata: Mapping[str, str], rename: Rename) -> dict[str, str]:
    """A shard's metadata after a cut. torchao describes every tensor there, by its name, and lists
    the names once more."""
    new = {}
    for key, value in metadata.items():
        if (name := rename(key)) is not None:
            new[name] = value
    if "tensor_names" in new:
        names = (rename(name) for name in json.loads(new["tensor_names"]))
        new["tensor_names"] = json.dumps([name for name in names if name is not None])
    return new


class _Entries:
    def __init__(self, modules: Iterable[str], path: str, rename: Rename, matches: Matches) -> None:
        self.new = {name: rename(name) for name in modules}
        self.left = frozenset(name for name in self.new.values() if name is not None)
        self.rename, self.matches = rename, matches
        last = re.escape(path.rpartition(".")[2])
        # a block's number, after the name of the list; in a pattern the dots may be escaped
        self.numbered = re.compile(rf"(?:.*[^\w]|){last}\\?\.(?=[\d\[(])", re.DOTALL)
        self.number = re.compile(rf"((?:^|(?<=[^\w])){last}(\\?\.))(\d+)(?=\\?\.|\$|$)")

    def walk(self, value: Any, names: bool) -> Any:
        """``value`` renumbered; ``names`` says whether it holds entries."""
        if isinstance(value, Mapping):
            moved = {}
            for key, inner in value.items():
                new = self.follow(key) if names else self.unnamed(key)
                if new is not None:
                    moved[new] = self.walk(inner, key in FIELDS)
            if "targets" in value and value["targets"] and not moved["targets"]:
                raise UnsupportedModel(
                    "quantization_config has a group for removed blocks alone "
                    f"({value['targets'][0]!r}), and none of its modules stays: keep one of them"
                )
            return moved
        if isinstance(value, (list, tuple)):
            if names and all(isinstance(entry, str) for entry in value):
                return [new for entry in value if (new := self.follow(entry)) is not None]
            return [self.walk(inner, False) for inner in value]
        if isinstance(value, str):
            return self.follow(value) if names else self.unnamed(value)
        return value

    def unnamed(self, text: str) -> str:
        """A string of a field that is not known to hold names."""
        if self.numbered.match(text):
            raise self.refusal(text)
        return text

    def follow(self, entry: str) -> str | None:
        """The entry for the cut model; None if it spoke of removed blocks alone."""
        old = {name for name in self.new if self.matches(entry, name)}
        want = {new for name in old if (new := self.new[name]) is not None}
        if not old and (self.numbered.match(entry) or _NUMBER.search(entry)):
            raise self.refusal(entry)  # of modules by other names than those known here
        if old and not want:
            return None
        for candidate in (self.shifted(entry), entry):
            if candidate is not None and self.matched(candidate) == want:
                return candidate
        raise self.refusal(entry)

    def matched(self, entry: str) -> Collection[str]:
        return {name for name in self.left if self.matches(entry, name)}

    def shifted(self, entry: str) -> str | None:
        """The entry with the number of its block, if it has just one, replaced by the new one."""
        if entry in self.new:
            return self.new[entry]
        found = list(self.number.finditer(entry))
        if len(found) != 1:
            return entry
        (match,) = found
        moved = {
            new
            for old in self.new
            if (block := self.block_of(old)) == match[3]
            and (name := self.new[old]) is not None
            and (new := self.block_of(name)) is not None
            and block is not None
        }
        if len(moved) != 1:
            return None
        return f"{entry[: match.start(3)]}{moved.pop()}{entry[match.end(3) :]}"

    def block_of(self, name: str) -> str | None:
        """The number of the block that a module is in, if the cut renumbers such names."""
        found = self.number.search(name)
        return found[3] if found else None

    def refusal(self, entry: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"quantization_config has {entry!r}, which cannot be renumbered exactly for this cut: "
            "cut the model before quantizing it"
        )


def _compressed_tensors(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        return _match(entry[3:], name)
    return entry == name


def _not_converted(entry: str, name: str) -> bool:
    """As transformers understands ``modules_to_not_convert``: a pattern for the beginning, or the
    end of a name."""
    return _match(entry, name) or name.endswith(entry)


def _gptq(entry: str, name: str) -> bool:
    """A pattern, with a sign in front that says whether its modules are quantized."""
    return _match(entry[2:] if entry[:2] in ("+:", "-:") else entry, name)


def _as_path(entry: str, name: str) -> bool:
    """A module, and what is inside it."""
    return name == entry or name.startswith(f"{entry}.")


def _match(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise UnsupportedModel(
            f"quantization_config has {pattern!r}, which is no pattern ({error})"
        ) from None


_MATCHES: dict[str, Matches] = {
    "compressed-tensors": _compressed_tensors,
    "torchao": _not_converted,
    "awq": _not_converted,
    "gptq": _gptq,
    "bitsandbytes": _not_converted,
    "fp8": _not_converted,
    "mxfp4": _not_converted,
}
