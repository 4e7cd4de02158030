"""How llm-compressor and torchao are called, and what of a model they are given."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import SAID, DataError, UnsupportedModel, VerificationFailed, map_exceptions
from sleb.core.progress import Progress
from sleb.models.auto_classes import auto_class
from sleb.models.load import DTYPES, load_config, strict_model
from sleb.models.source import quiet_tqdm, quiet_transformers
from sleb.models.stack import BlockStack
from sleb.surgery.gates import logit_tolerance
from sleb.surgery.verification import probe_logits

if TYPE_CHECKING:
    from sleb.calibration.windows import Windows

GROUPS = (128, 64, 32)
MOST = 0.8
"""Share of the blocks' weights that must be in matrices, for the word quantized to be true."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rounding:
    """A quantized model in memory: which matrices, in groups of how many columns (None: rows), by
    which versions of the libraries, and its :func:`probe_logits`."""

    model: Any = field(repr=False)
    names: tuple[str, ...]
    group: int | None
    versions: dict[str, str]
    logits: Tensor = field(repr=False)

    def save(self, stage: Path) -> None:
        """Write weights and config into a folder, as safetensors."""
        self.model.config._name_or_path = ""
        with quiet_transformers(), quiet_tqdm():
            self.model.save_pretrained(stage)
        (stage / "recipe.yaml").unlink(missing_ok=True)  # llm-compressor's; see quantize.json


def linear_layers(stack: BlockStack) -> tuple[dict[str, nn.Linear], list[str]]:
    """The linear modules in the blocks, by name; and the names of those outside.

    Raises:
        UnsupportedModel: most weights of the blocks are not in such modules.
    """
    inside: dict[str, nn.Linear] = {}
    outside = []
    for name, module in stack.model.named_modules():
        if isinstance(module, nn.Linear):
            if name.startswith(f"{stack.path}."):
                inside[name] = module
            else:
                outside.append(name)
    total = sum(p.numel() for p in stack.blocks.parameters())
    share = sum(module.weight.numel() for module in inside.values()) / total
    if share < MOST:
        raise UnsupportedModel(
            f"{stack.name}: only {share:.0%} of its blocks' weights are in linear modules (experts "
            "may be stored together), so quantizing these would leave most of it as it is"
        )
    return inside, outside


def rounded(
    path: Path,
    *,
    bits: int,
    scaled: bool,
    calibration: Windows | None,
    trust_remote_code: bool,
    progress: Progress,
) -> Rounding:
    """The model in ``path``, its matrices rounded to ``bits``: by GPTQ, or to the nearest once
    columns are ``scaled`` (AWQ), or without ``calibration`` each row by itself.

    Raises:
        UnsupportedModel: the library cannot do it, or no group size fits.
        DataError: the checkpoint does not load.
    """
    config = load_config(path, trust_remote_code=trust_remote_code)
    own = str(getattr(config, "dtype", None)).removeprefix("torch.")
    dtype = DTYPES.get(own, torch.float32)
    with progress.stage(f"loading {path.name}", None):
        model = strict_model(path, dtype, trust_remote_code)
        stack = BlockStack(model)
        inside, outside = linear_layers(stack)
    if calibration is None:
        names, group = tuple(inside), None
        del stack, inside, model
        gc.collect()
        with progress.stage("quantizing", None):
            model = _by_rows(path, dtype, outside, trust_remote_code)
        used: tuple[str, ...] = ("torchao",)
    else:
        names, group = tuple(inside), group_size(inside)
        with progress.stage("quantizing", None):
            _by_compressor(model, bits, scaled, group, outside, calibration)
        used = ("llmcompressor", "compressed-tensors")
    versions = {name: version(name) for name in (*used, "transformers", "torch")}
    with quiet_transformers():
        logits = probe_logits(model, config)
    return Rounding(model=model, names=names, group=group, versions=versions, logits=logits)


def group_size(layers: dict[str, nn.Linear]) -> int:
    """The largest group size that divides the columns of all.

    Raises:
        UnsupportedModel: there is none.
    """
    for size in GROUPS:
        odd = next((name for name, m in layers.items() if m.in_features % size), None)
        if odd is None:
            return size
    assert odd is not None
    raise UnsupportedModel(
        f"no group of {', '.join(map(str, GROUPS))} columns divides the "
        f"{layers[odd].in_features} of {odd}: use --scheme int8, which has no groups"
    )


def _by_compressor(
    model: nn.Module,
    bits: int,
    scaled: bool,
    group: int,
    ignore: Sequence[str],
    calibration: Windows,
) -> None:
    """GPTQ or AWQ in place. Symmetric: what is asymmetric is stored in two ways, and each reader
    knows one."""
    # it prints to stdout, and reads this when it is imported
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group
    )
    form = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": list(ignore),
    }
    recipe = [AWQModifier(), QuantizationModifier(**form)] if scaled else [GPTQModifier(**form)]
    rows = calibration.ids.tolist()
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    with quiet_transformers(), quiet_tqdm(), _failing("llm-compressor"):
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            max_seq_length=len(rows[0]),
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
        )


def _by_rows(path: Path, dtype: torch.dtype, ignore: Sequence[str], trust: bool) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(ignore) or None)
    loader = auto_class(load_config(path, trust_remote_code=trust)) or AutoModelForCausalLM
    with quiet_transformers(), _failing("torchao"):
        model = loader.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            quantization_config=config,
            trust_remote_code=trust,
        )
    return model.eval()


def read_back(
    rounding: Rounding, stage: Path, trust_remote_code: bool, progress: Progress
) -> tuple[float, float]:
    """Load what was saved, strictly, and compare logits with those of the model in memory: the
    largest difference and the limit on it, as shares of the largest logit.

    Raises:
        VerificationFailed: it does not load, or computes something else.
    """
    strange = [p.name for p in stage.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    if strange:
        raise VerificationFailed(f"the library wrote {strange[0]}, and sleb ships no pickle")
    limit = logit_tolerance(rounding.model.dtype)
    with progress.stage("reading it back", None):
        try:
            Checkpoint.open(stage)
            again = strict_model(stage, rounding.model.dtype, trust_remote_code)
        except (DataError, UnsupportedModel) as error:
            raise VerificationFailed(f"the quantized checkpoint does not load: {error}") from None
        with quiet_transformers():
            found = probe_logits(again, again.config)
    gap = ((found - rounding.logits).abs().max() / rounding.logits.abs().max()).item()
    if not gap <= limit:
        raise VerificationFailed(
            f"the quantized checkpoint, read back, differs by {gap:.3g} of the largest logit from "
            f"the model in memory (must be at most {limit:.3g}); nothing was written"
        )
    return gap, limit


def _failing(library: str) -> contextlib.AbstractContextManager[None]:
    """Another library's exceptions, of any type, as one line."""
    why = f"{library} cannot quantize this model: {SAID}"
    return map_exceptions((Exception, UnsupportedModel, why))
