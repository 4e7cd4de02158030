"""A transformers model that is in memory already, as one that was loaded from a folder.

Plans, cuts and checks are of files. So a model in memory gets a folder: the one that it was loaded
from, if it still is what lies there, tensor by tensor; else one that it is saved to, which lasts as
long as the model. Of a model with a PEFT adapter that is not merged, the folder has the base: the
adapter takes part in all that is computed, and a plan is applied to the base.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import InputError, SlebError
from sleb.models.source import ModelSource, find, quiet_transformers
from sleb.models.stored_names import renaming

BASE_LAYER = ".base_layer."
"""What PEFT puts between a module's name and the names of its own tensors."""


def unwrapped(model: Any) -> tuple[Any, bool]:
    """The transformers model, and whether adapters that are not merged compute along in it.

    Raises:
        InputError: it is none.
    """
    inner = getattr(model, "base_model", None)
    if hasattr(model, "peft_config") and inner is not None and hasattr(inner, "model"):
        model = inner.model
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise InputError(f"{type(model).__name__} is no transformers model; give one, or a folder")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            "part of the model's weights is not in memory; let sleb place it: "
            "sleb.load(PATH, device_map='auto')"
        )
    return model, any(BASE_LAYER in name for name, _ in model.named_parameters())


def source_of(model: Any, adapted: bool, tokenizer: Any) -> ModelSource:
    """The folder of a model, see above; ``model`` and ``adapted`` are from :func:`unwrapped`."""
    own = {
        name.replace(BASE_LAYER, "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    origin = _origin(model, own)
    if origin is not None and not adapted:
        return ModelSource(ref=str(model.config._name_or_path), path=origin)
    folder = Path(tempfile.mkdtemp(prefix="sleb-model-"))
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    if origin is not None:  # a place of its own, since what it computes is not what the base does
        for path in origin.iterdir():
            os.symlink(path.resolve(), folder / path.name)
        return ModelSource(ref=str(model.config._name_or_path), path=folder)
    with quiet_transformers(), _unpacked(model):
        model.save_pretrained(folder, state_dict=own)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return ModelSource(ref=f"{type(model).__name__} in memory", path=folder)


@contextmanager
def _unpacked(model: Any) -> Iterator[None]:
    """Take from a model what transformers keeps of the GGUF file that it was read from, as it saves
    no model that has it, though the weights are as any model's once they are unpacked.

    Raises:
        InputError: the weights are packed, so that they cannot be saved.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.is_serializable():
        yield
        return
    method = str(getattr(quantizer.quantization_config.quant_method, "value", "its way"))
    if method != "gguf" or quantizer.packed_modules:
        raise InputError(
            f"the model's weights are quantized ({method}) and cannot be saved as they are in "
            "memory; give what it was loaded from: sleb.load(PATH), a folder or a .gguf file"
        )
    config, kept = model.config, model.config.quantization_config
    del config.quantization_config
    model.hf_quantizer = None
    try:
        yield
    finally:
        config.quantization_config, model.hf_quantizer = kept, quantizer


def _origin(model: Any, own: dict[str, Tensor]) -> Path | None:
    """The folder that the model was loaded from, if that has its tensors and its config."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    try:
        found = find(name)
        folder = found if isinstance(found, Path) else _cached(found.repo)
        if folder is None or not folder.is_dir():
            return None
        checkpoint = Checkpoint.open(folder)
    except SlebError:  # it is not there any more
        return None
    return folder if _alike(model, own, checkpoint) else None


def _cached(repo: str) -> Path | None:
    """A repository's folder in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _alike(model: Any, own: dict[str, Tensor], checkpoint: Checkpoint) -> bool:
    """Whether every tensor of a folder is in the model, and nothing else, but for rounding to the
    model's dtype."""
    from transformers import AutoConfig

    try:
        stored = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    except (OSError, ValueError):
        return False
    if _shape(stored) != _shape(model.config):
        return False
    loaded, seen = renaming(model, own), set()
    for name in checkpoint.tensors:
        tensor = own.get(loaded(name))
        if tensor is None or not torch.equal(
            checkpoint.tensor(name).to(tensor.dtype), tensor.cpu()
        ):
            return False
        seen.add(tensor.data_ptr())
    return all(tensor.data_ptr() in seen for tensor in own.values())


def _shape(config: Any) -> dict[str, Any]:
    """What of a config is about what is computed."""
    own = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"}
    return {name: value for name, value in config.to_dict().items() if name not in own}
