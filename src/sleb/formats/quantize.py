"""Quantization of a checkpoint's weights, by the libraries that are made for it.

    quantize("smaller", "smaller-w4a16", scheme="w4a16", text=["mail.jsonl"])

Four or eight bits in groups are rounded by GPTQ (Frantar et al., ICLR 2023, arXiv:2210.17323), as
llm-compressor has it, on windows of the user's texts; the result is compressed-tensors, which
transformers and vLLM load. ``awq`` first scales the columns that matter most (Lin et al., MLSys
2024, arXiv:2306.00978), and needs a GPU. ``int8`` rounds each row by itself, through torchao,
without any text. Only matrices inside the blocks are rounded; embedding and head stay as they are.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sleb.calibration import check_sources
from sleb.calibration.windows import Windows, load_windows
from sleb.checkpoints.checkpoint import Checkpoint, read_json
from sleb.checkpoints.checksums import write_sums
from sleb.config import QuantizeConfig, takes
from sleb.core.card import with_section
from sleb.core.errors import InputError, did_you_mean
from sleb.core.files import enough_space, staged_dir, writable_target
from sleb.core.plan import Calibration
from sleb.core.progress import Progress, silent
from sleb.formats.quantizers import read_back, rounded
from sleb.models.load import load_config, load_tokenizer
from sleb.models.pruned_config import both_spellings, write_json
from sleb.models.quantization_names import quant_method
from sleb.models.source import ModelSource, resolve
from sleb.surgery.apply import carry, refuse_source
from sleb.surgery.rollback_manifest import HEALED

QUANTIZED = "quantize.json"
"""File of a quantized checkpoint that says how it was made."""


@dataclass(frozen=True)
class Scheme:
    """What a scheme does: ``bits`` per weight, by ``library`` (to install and to import), and
    whether it needs a ``gpu``."""

    name: str
    bits: int
    library: str = "llmcompressor"
    gpu: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether it is calibrated on text."""
        return self.library == "llmcompressor"


_ALL = (
    Scheme("w4a16", 4),
    Scheme("w8a16", 8),
    Scheme("awq", 4, gpu=True),
    Scheme("int8", 8, library="torchao"),
)
SCHEMES = {scheme.name: scheme for scheme in _ALL}


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What :func:`quantize` has made. ``matrices`` were rounded, in groups of ``group`` columns, or
    row by row if it is null. ``nbytes``: of the tensors, before and after. ``difference``: of the
    logits between the model in memory and the checkpoint read back, at most ``limit``, both as
    shares of the largest logit. ``versions`` of the libraries. ``twice``: the source was a .gguf
    file, whose weights had been rounded before."""

    path: str
    model: str
    scheme: str
    group: int | None
    matrices: int
    nbytes: tuple[int, int]
    calibration: Calibration | None
    difference: float
    limit: float
    seconds: float
    versions: dict[str, str]
    twice: bool

    def to_json(self) -> str:
        """As quantize.json has it."""
        record = self.calibration
        fields = {**asdict(self), "calibration": record and record.model_dump(mode="json")}
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def check_scheme(name: str) -> Scheme:
    """The scheme of that name, if it is known and what it needs is there; to be asked early.

    Raises:
        InputError: it is unknown, the library is not installed, or there is no GPU for it.
    """
    if name not in SCHEMES:
        raise InputError(
            f"unknown scheme '{name}'{did_you_mean(name, SCHEMES)}; known: {', '.join(SCHEMES)}"
        )
    scheme = SCHEMES[name]
    if importlib.util.find_spec(scheme.library) is None:
        raise InputError(
            f"--scheme {name} needs {scheme.library}, which is not installed: "
            "pip install llmcompressor torchao compressed-tensors"
        )
    if scheme.gpu and not _has_gpu():
        raise InputError(f"--scheme {name} needs a CUDA GPU, and there is none; use w4a16")
    return scheme


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@takes(QuantizeConfig)
def quantize(
    model: str | Path,
    out: str | Path,
    config: QuantizeConfig,
    *,
    progress: Progress = silent,
) -> Quantized:
    """Write MODEL (a folder, hub id or .gguf file) with quantized weights as a new checkpoint.

    The result is read back, and its logits compared with those of the quantized model in memory,
    before it becomes ``out``. MODEL is only read, and is in memory as a whole, in the dtype that it
    is stored in. llm-compressor computes on the first accelerator that it finds, torchao on the
    CPU. ``out`` gets MODEL's plan.json, if there is one, but not what a cut is taken back with:
    that stays with MODEL.

    Raises:
        InputError: a name or number is wrong, a library is missing, ``out`` exists, text is given
            to a scheme that needs none, or MODEL is quantized already.
        UnsupportedModel: its weights are not in matrices that these libraries know, or no group
            size fits.
        VerificationFailed: the checkpoint does not give the model's logits; nothing was written.
        DataError, ResourceError: see ``sleb.core.errors``.
    """
    out = Path(out)
    start = time.perf_counter()
    scheme = check_scheme(config.scheme)
    if config.text and not scheme.calibrated:
        raise InputError(f"--scheme {scheme.name} is not calibrated: leave out --text")
    check_sources(config.text)
    writable_target(out, force=config.force)
    source = resolve(model, progress)
    refuse_source(out, source.path)
    before = _unquantized(source, config)
    enough_space(out.parent, before.nbytes)
    calibration = _calibration(source, config) if scheme.calibrated else None
    rounding = rounded(
        source.path,
        bits=scheme.bits,
        scaled=scheme.name == "awq",
        calibration=calibration,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
    )
    with staged_dir(out, force=config.force) as stage:
        rounding.save(stage)
        _carry(source, before, stage)
        difference, limit = read_back(rounding, stage, config.trust_remote_code, progress)
        done = Quantized(
            path=str(out),
            model=source.ref,
            scheme=scheme.name,
            group=rounding.group,
            matrices=len(rounding.names),
            nbytes=(before.nbytes, Checkpoint.open(stage).nbytes),
            calibration=calibration.record if calibration else None,
            difference=difference,
            limit=limit,
            seconds=round(time.perf_counter() - start, 1),
            versions=rounding.versions,
            twice=source.is_gguf,
        )
        (stage / QUANTIZED).write_text(done.to_json(), encoding="utf-8")
        _describe(source, done, stage)
        write_sums(stage, progress)
    return done


def _unquantized(source: ModelSource, config: QuantizeConfig) -> Checkpoint:
    """The checkpoint to quantize; refuses what is quantized already or no causal LM."""
    checkpoint = Checkpoint.open(source.path)
    load_config(source.path, trust_remote_code=config.trust_remote_code)
    if method := quant_method(checkpoint.config):
        raise InputError(
            f"{source.ref} is quantized already ({method}); give the checkpoint that it was made "
            "from"
        )
    return checkpoint


def _calibration(source: ModelSource, config: QuantizeConfig) -> Windows:
    tokenizer = load_tokenizer(source.path, trust_remote_code=config.trust_remote_code)
    windows, _ = load_windows(
        tokenizer,
        config.text,
        windows=config.windows,
        length=config.length,
        seed=config.seed,
    )
    return windows


def _carry(source: ModelSource, before: Checkpoint, stage: Path) -> None:
    """What belongs to the model beside its weights: config, tokenizer, plan and so on."""
    _keep_config(before, stage, spell_both=source.is_gguf)
    for path in sorted(source.path.iterdir()):
        carry(path, stage)
    for name in ("plan.json", HEALED):
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, stage / name)


def _keep_config(before: Checkpoint, stage: Path, *, spell_both: bool) -> None:
    """config.json in the model's own words, with the library's section on its quantization."""
    saved = read_json(stage / "config.json")
    if saved.get("model_type") != before.config.get("model_type"):
        return  # another class than the files': its text model alone
    fields = {**before.config, "quantization_config": saved["quantization_config"]}
    if spell_both:
        fields = both_spellings(fields, load_config(stage))
    write_json(fields, before.path / "config.json", stage / "config.json")


def _describe(source: ModelSource, done: Quantized, stage: Path) -> None:
    """The model's card, with a section on what was done to it."""
    how = f"in groups of {done.group} columns" if done.group else "row by row"
    before, after = (f"{nbytes / 1e6:,.1f} MB" for nbytes in done.nbytes)
    used = ", ".join(f"{name} {number}" for name, number in sorted(done.versions.items()))
    lines = [
        f"The {done.matrices} matrices in the blocks were rounded to {SCHEMES[done.scheme].bits} "
        f"bits, {how}; embedding and head were not. Weights: {before} before, {after} after "
        f"({used}).",
    ]
    if done.calibration:
        c = done.calibration
        lines += ["", f"Calibrated on {c.windows} windows of {c.length} tokens of text."]
    if done.twice:
        lines += ["", "The source was a GGUF file, whose weights had been rounded before."]
    if (stage / "plan.json").is_file():
        lines += [
            "",
            "The plan (`plan.json`) says which blocks were cut. They can be put back in the "
            "checkpoint before quantization, with `sleb restore`, but not in this one.",
        ]
    card = with_section(source.path, f"Quantized: {done.scheme}", lines)
    (stage / "README.md").write_text(card, encoding="utf-8")
