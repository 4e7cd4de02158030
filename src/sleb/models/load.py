"""Load a model and its tokenizer strictly: a checkpoint that does not fit its config is refused."""

from __future__ import annotations

import re
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sleb.checkpoint import Checkpoint, read_json
from sleb.depthfields import refuse_unsupported
from sleb.errors import DataError, InputError, ResourceError, UnsupportedModel, did_you_mean
from sleb.models.source import ModelSource, quiet_transformers, resolve
from sleb.models.stack import BlockStack, decoder_config, find_blocks
from sleb.plan import MAX_BLOCKS
from sleb.progress import Progress, silent

__all__ = ["DTYPES", "LoadedModel", "empty_model", "load", "load_config", "load_tokenizer"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer, block stack and origin."""

    model: nn.Module
    tokenizer: Any
    stack: BlockStack
    source: ModelSource

    @property
    def dtype(self) -> str:
        """Dtype of the blocks, as the plan records it."""
        return str(self.stack.dtype).removeprefix("torch.")


def load(
    ref: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    stream: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> LoadedModel:
    """Load MODEL (a folder, hub id or .gguf file) for scoring.

    ``dtype`` is float32, bfloat16, float16 or auto: the checkpoint's own, except that a CPU
    without bfloat16 instructions computes in float32. ``device`` is cpu, cuda, cuda:1, mps or
    auto: the first GPU, else the CPU. With ``stream``, blocks stay in the checkpoint's files and
    are read when they run, so that only one has to fit in memory; embedding and head are loaded.

    Raises:
        InputError: no such model, or an unknown dtype or device.
        UnsupportedModel: not a causal LM, or its blocks cannot be cut exactly.
        DataError: tensors are missing, unexpected or of another shape.
        ResourceError: it does not fit in memory.
    """
    target = pick_device(device)
    source = resolve(ref, progress)
    Checkpoint.open(source.path)  # its errors say more than those of loading
    config = load_config(source.path, trust_remote_code=trust_remote_code)
    text = decoder_config(config)
    refuse_unsupported(text.to_dict(), text.num_hidden_layers)
    with progress.stage(f"loading {source.ref}", None):
        computed = pick_dtype(dtype, config, target)
        if stream:
            places = _streaming(config, target, trust_remote_code)
            model = strict_model(source.path, computed, trust_remote_code, places)
        else:
            model = strict_model(source.path, computed, trust_remote_code)
            try:
                model.to(target)
            except torch.OutOfMemoryError:
                raise ResourceError(
                    f"{ref} does not fit on {target}; try --stream, or --dtype bfloat16"
                ) from None
    tokenizer = load_tokenizer(source.path, trust_remote_code=trust_remote_code)
    return LoadedModel(model=model, tokenizer=tokenizer, stack=BlockStack(model), source=source)


def strict_model(
    path: Path,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    places: dict[str, str] | None = None,
) -> nn.Module:
    """A causal LM from a folder, in evaluation mode; every tensor accounted for. It is on the CPU,
    or where ``places`` says (a device map of modules, as accelerate has it).

    Raises:
        InputError: loading needs a package that is not installed.
        DataError: missing, unexpected or mismatched tensors.
    """
    from transformers import AutoModelForCausalLM

    # weights that transformers has to rearrange cannot be read in place; it keeps a copy here
    spill = tempfile.TemporaryDirectory(prefix="sleb-") if places else None
    with quiet_transformers():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are counted below, and then refused
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **({"device_map": places, "offload_folder": spill.name} if spill else {}),
            )
            if spill:
                weakref.finalize(model, spill.cleanup)
        except ImportError as error:
            raise InputError(f"{path} needs a package to load: {_say(error)}") from None
        except Exception as error:  # of many types, and from the model's own code
            out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if out_of_memory or "allocate memory" in str(error):
                raise
            raise DataError(f"{path} does not load: {_say(error)}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        keys = (key for key in info.get(kind, ()) if not _predicts_further(key, model.config))
        if found := sorted(_key(key) for key in keys):
            raise DataError(
                f"{path}: {len(found)} {kind.replace('_', ' ')} on loading, for example "
                f"{found[0]}; the config does not describe these weights"
            )
    return model.eval()  # type: ignore[no-any-return]


def _streaming(config: Any, target: torch.device, trust_remote_code: bool) -> dict[str, str]:
    """A device map that leaves the blocks on disk and puts all else on ``target``."""
    model = empty_model(config, trust_remote_code=trust_remote_code)
    path, blocks = find_blocks(model)
    places = {f"{path}.{i}": "disk" for i in range(len(blocks))}

    def place(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if path.startswith(f"{prefix}{name}."):  # the blocks are somewhere inside
                place(child, f"{prefix}{name}.")
            elif prefix + name != path:
                places[prefix + name] = str(target)

    place(model, "")
    return places


def _predicts_further(key: Any, config: Any) -> bool:
    """Whether a tensor is of a multi-token-prediction block. These are numbered after the last
    block, and transformers passes over them by the numbers of the uncut model alone."""
    text = decoder_config(config)
    block = re.search(r"\blayers\.(\d+)\.", key) if isinstance(key, str) else None
    return bool(
        block
        and getattr(text, "num_nextn_predict_layers", None)
        and int(block[1]) >= text.num_hidden_layers
    )


def _key(key: Any) -> str:
    """A tensor of transformers' loading report: its name, with both shapes if they differ."""
    if isinstance(key, str):
        return key
    name, found, wanted = key
    return f"{name} of shape {list(found)} where {list(wanted)} is wanted"


def load_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The config of a checkpoint folder, with every per-block list written out.

    Raises:
        UnsupportedModel: not a causal language model, or a type that transformers does not know.
        DataError: a field's value is impossible.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    read_json(path / "config.json")  # its errors say more than those of transformers
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError, OSError) as error:
            raise UnsupportedModel(f"{path}: {_say(error)}") from None
        except Exception as error:  # transformers validates with several exception types
            raise DataError(f"{path / 'config.json'} is not valid: {_say(error)}") from None
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (remote and trust_remote_code):
        hint = "; it has code of its own: --trust-remote-code runs it" if remote else ""
        raise UnsupportedModel(
            f"{path} is not a causal language model (model_type {config.model_type!r}){hint}"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{path} is an encoder-decoder; sleb cuts decoder-only models")
    n = getattr(decoder_config(config), "num_hidden_layers", 1)
    if not isinstance(n, int) or not 1 <= n < MAX_BLOCKS:
        raise DataError(f"{path / 'config.json'} is not valid: num_hidden_layers is {n}")
    return config


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise InputError(f"{path} has no tokenizer that loads: {_say(error)}") from None


def empty_model(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """The model of ``config`` with its structure but no weights (on the meta device).

    Raises:
        DataError: the config's values do not go together.
    """
    from transformers import AutoModelForCausalLM

    model: nn.Module
    with quiet_transformers(), torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever the model's constructor makes of a bad value
            raise DataError(f"this config makes no model: {_say(error)}") from None
    return model


def pick_device(device: str) -> torch.device:
    """``auto`` is the first GPU, else the CPU.

    Raises:
        InputError: not a device, or one that this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        if picked.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except RuntimeError:
        raise InputError(
            f"--device {device!r} is not a device; use cpu, cuda, cuda:1 or mps"
        ) from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    if picked.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: not available on this machine")
    return picked


def pick_dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """See :func:`load`."""
    if name != "auto":
        if name not in DTYPES:
            raise InputError(
                f"unknown dtype '{name}'{did_you_mean(name, DTYPES)}; "
                f"known: auto, {', '.join(DTYPES)}"
            )
        return DTYPES[name]
    own = getattr(config, "dtype", None) or getattr(decoder_config(config), "dtype", None)
    if own not in (torch.bfloat16, torch.float16):
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
    return own  # type: ignore[no-any-return]


def _cpu_has_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 here (AVX512-BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def _say(error: BaseException) -> str:
    """Another library's error on one line: its first, and the second if the first announces it."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:400]
