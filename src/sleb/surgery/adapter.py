"""A LoRA adapter of the dense model, as PEFT saves it, for a cut of that model.

PEFT finds the module of a tensor by its name alone, so an adapter of the dense model loads on the
cut without a word, with its matrices on other blocks.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sleb.checkpoints.cut import Cut, block_prefix_of
from sleb.core.errors import SAID, DataError, InputError, UnsupportedModel, map_exceptions
from sleb.core.files import staged_dir
from sleb.models.load import empty_model, load_config
from sleb.models.stack import BlockStack

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_BASE = "base_model.model."
_PART = re.compile(r"\.(?:lora_|base_layer\.|token_adapter\.|modules_to_save\.|weight$|bias$)")
"""What PEFT appends to a module's name."""
_BY_MODULE = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")


@dataclass(frozen=True, kw_only=True)
class CutAdapter:
    """An adapter for a cut. ``lost``: the modules of removed blocks that it adapted. ``repaired``:
    those whose matrices the cut's repair has changed, which it was not trained beside."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    lost: tuple[str, ...]
    repaired: tuple[str, ...]

    def write(self, out: Path, base: Path, *, force: bool) -> None:
        """Save it as ``out``, as an adapter of the cut ``base``.

        Raises:
            InputError: ``out`` exists.
            ResourceError: the disk is full.
        """
        config = {**self.config, "base_model_name_or_path": str(base)}
        with staged_dir(out, force=force) as stage:
            (stage / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(self.tensors, stage / WEIGHTS, metadata={"format": "pt"})
            if (self.folder / "README.md").is_file():
                shutil.copyfile(self.folder / "README.md", stage / "README.md")


def cut_adapter(
    folder: str | Path, model: Path, cut: Cut, *, trust_remote_code: bool = False
) -> CutAdapter:
    """The adapter in ``folder`` of the checkpoint ``model``, for a ``cut`` of that: tensors of
    removed blocks go, the others are renumbered. Where its config goes by blocks (layers, patterns,
    names with numbers), the modules that are adapted are listed there instead, each by its name.

    Raises:
        InputError: ``folder`` holds no adapter in safetensors.
        UnsupportedModel: it is no LoRA, names modules that the model does not have, or nothing of
            it is left.
        DataError: its config or weights are corrupt.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"--adapter {folder}: there is no {name}; save it with PEFT")
    corrupt = (Exception, DataError, f"--adapter {folder} cannot be read: {SAID}")
    with map_exceptions(corrupt):
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _refuse_others(folder, config)
    dense = empty_model(load_config(model, trust_remote_code=trust_remote_code))
    stack, modules = BlockStack(dense), {name for name, _ in dense.named_modules()}
    tensors, names, lost = dict[str, Tensor](), dict[str, str](), set[str]()
    for name, tensor in given.items():
        module = _PART.split(name, maxsplit=1)[0].removeprefix(_BASE)
        if not name.startswith(_BASE) or module not in modules:
            raise UnsupportedModel(
                f"--adapter {folder}: {name} is of no module of {model}; give an adapter that was "
                "trained on this very model"
            )
        new = cut.rename(name, f"{_BASE}{stack.path}.")
        if new is None:
            lost.add(module)
            continue
        tensors[new] = tensor
        names[module] = _PART.split(new, maxsplit=1)[0].removeprefix(_BASE)
    if not any(".lora_" in name for name in tensors):
        raise UnsupportedModel(f"--adapter {folder}: nothing of it is left, all its blocks go")
    if _goes_by_block(config):
        with map_exceptions(corrupt):
            config = _listed(config, names, given)
    fixed = {
        f"{stack.path}.{name.removeprefix(block_prefix_of(name)).rpartition('.')[0]}"
        for name in cut.repair or {}
    }
    return CutAdapter(
        folder=folder,
        config=config,
        tensors=tensors,
        lost=tuple(sorted(lost)),
        repaired=tuple(sorted(fixed & names.keys())),
    )


def _refuse_others(folder: Path, config: dict[str, Any]) -> None:
    """Raise UnsupportedModel for what cannot be renumbered rightly."""
    if (kind := config.get("peft_type")) != "LORA":
        raise UnsupportedModel(f"--adapter {folder} is {kind}; only LoRA is cut along")
    if config.get("layer_replication"):
        raise UnsupportedModel(f"--adapter {folder}: layer_replication makes blocks of its own")
    saved = [name for name in config.get("modules_to_save") or () if re.search(r"\.\d", name)]
    if saved:
        raise UnsupportedModel(f"--adapter {folder}: modules_to_save names a block, {saved[0]}")
    if config.get("target_parameters") and _goes_by_block(config):
        raise UnsupportedModel(
            f"--adapter {folder}: target_parameters beside what goes by blocks cannot be renumbered"
        )


def _goes_by_block(config: dict[str, Any]) -> bool:
    """Whether it may say something of single blocks: by their ids, or by names with numbers."""

    def said() -> Iterator[str]:
        for field in _BY_MODULE:
            value = config.get(field) or ()
            yield from (value,) if isinstance(value, str) else map(str, value)

    ids = config.get("layers_to_transform")
    return ids not in (None, []) or any(re.search(r"\d", name) for name in said())


def _listed(
    config: dict[str, Any], names: dict[str, str], given: dict[str, Tensor]
) -> dict[str, Any]:
    """``config`` with its modules listed one by one: by old names, the new ``names``."""
    new: dict[str, Any] = {
        **config,
        "target_modules": [],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    for old, now in names.items():
        a = given.get(f"{_BASE}{old}.lora_A.weight", given.get(f"{_BASE}{old}.lora_embedding_A"))
        if a is None:  # saved whole
            continue
        new["target_modules"].append(now)
        if a.shape[0] != config["r"]:
            new["rank_pattern"][now] = a.shape[0]
        patterns = config.get("alpha_pattern") or {}
        # as PEFT's get_pattern_key takes them
        found = next((k for k in patterns if re.match(rf"(.*\.)?({k})$", old)), None)
        if found is not None:
            new["alpha_pattern"][now] = patterns[found]
    return new
