"""Load a model and its tokenizer strictly: a checkpoint that does not fit its config is refused."""

from __future__ import annotations

import re
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sleb.checkpoints.checkpoint import (
    Checkpoint,
    check_fingerprint,
    fingerprint,
    identity,
    read_json,
)
from sleb.checkpoints.cut import REPAIRED, Cut, written_with
from sleb.checkpoints.depth_fields import refuse_unsupported, refused_type
from sleb.config import LoadOptions, takes
from sleb.core.errors import (
    SAID,
    DataError,
    InputError,
    ResourceError,
    UnsupportedModel,
    did_you_mean,
    map_exceptions,
)
from sleb.core.plan import Plan
from sleb.core.printable import printable
from sleb.core.process_group import group
from sleb.core.progress import Progress, silent
from sleb.core.units import MAX_BLOCKS
from sleb.models.auto_classes import auto_class
from sleb.models.images import images_of
from sleb.models.in_memory import source_of, unwrapped
from sleb.models.offload import misshapen
from sleb.models.placement import check_placing, device_map_options, tensor_parallel_options
from sleb.models.pruned_config import check_structure, pruned_config
from sleb.models.quantization_names import quant_method
from sleb.models.source import ModelSource, called, quiet_tqdm, quiet_transformers, resolve
from sleb.models.stack import BlockStack, decoder_config, find_blocks
from sleb.models.stored_names import block_prefix

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, repr=False)
class LoadedModel:
    """A model in evaluation mode with its tokenizer, block stack and origin. ``removed``: blocks of
    the origin, and parts of blocks, that a plan took out while it was loaded. ``adapted``: an
    adapter that is not merged computes along, and is not in the origin."""

    model: nn.Module
    tokenizer: Any
    stack: BlockStack
    source: ModelSource
    removed: tuple[int, ...] = ()
    adapted: bool = False

    def __repr__(self) -> str:
        place = f"{self.dtype} on {self.stack.input_device}"
        return f"LoadedModel({self.source.ref}: {len(self.stack)} blocks, {place})"

    @property
    def dtype(self) -> str:
        """Dtype of the blocks, as the plan records it."""
        return str(self.stack.dtype).removeprefix("torch.")


@takes(LoadOptions)
def load(
    ref: str | Path | nn.Module,
    config: LoadOptions,
    *,
    tokenizer: Any = None,
    plan: Plan | str | Path | None = None,
    depth: int | None = None,
    repaired: str | Path | None = None,
    check: bool = True,
    progress: Progress = silent,
) -> LoadedModel:
    """Load MODEL (a folder, hub id or .gguf file) for scoring; or take a transformers model that is
    in memory, with its ``tokenizer``, or its processor if that is of images too: where it is, in
    its dtype, in evaluation mode from now on.
    A PEFT adapter, merged or not, computes along; see :mod:`sleb.models.in_memory`.

    ``dtype`` is float32, bfloat16, float16 or auto: the checkpoint's own, except that a CPU
    without bfloat16 instructions computes in float32. ``device`` is cpu, cuda, cuda:1, mps or
    auto: the first GPU, else the CPU. With ``stream``, blocks stay in the checkpoint's files and
    are read when they run, so that only one has to fit in memory; embedding and head are loaded.

    A model larger than a device: ``device_map`` places it with accelerate over several GPUs, memory
    and disk, as :func:`sleb.models.placement.device_map_options` says. ``tp`` processes, started by
    torchrun, hold it together (transformers' tensor parallelism).

    With ``plan`` (or its file) the model is cut while it is loaded, by the first ``depth`` removals
    or all of them, and computes what the checkpoint that :func:`sleb.apply` writes would: only
    kept blocks are read, and nothing is written. Where a block loses its attention or MLP alone,
    that computes nothing and holds no weights, keys or values; what `save_pretrained` then writes
    is no checkpoint. The plan must be of this model; without ``check`` its tensors are not hashed
    for that, which takes as long as reading the whole file. Where the whole plan is used and has a
    repair, the changed tensors come from ``repaired``, the folder of a checkpoint that was written
    with it; or from repaired.safetensors or the .gguf file beside the file ``plan``.

    Raises:
        InputError: no such model, or an unknown dtype or device; the plan is for another model, or
            its repaired tensors are not at hand.
        UnsupportedModel: not a causal LM, or its blocks cannot be cut exactly.
        DataError: tensors are missing, unexpected or of another shape.
        ResourceError: it does not fit in memory.
    """
    if isinstance(ref, nn.Module):
        return _taken(ref, tokenizer, as_it_is=plan is None and config == LoadOptions())
    check_placing(
        device=config.device, stream=config.stream, device_map=config.device_map, tp=config.tp
    )
    options = device_map_options(config.device_map) if config.device_map else {}
    trust = config.trust_remote_code
    target = pick_device(config.device)
    if plan is None and (depth is not None or repaired is not None):
        raise InputError("depth and repaired say how a plan is used; give plan too")
    if plan is not None and (config.stream or config.device_map or config.tp > 1):
        raise InputError(
            "blocks are not streamed, placed or split and cut at once; leave out plan, or stream, "
            "device_map and tp"
        )
    if isinstance(plan, (str, Path)):
        made = written_with(plan)
        if repaired is None and (made.suffix == ".gguf" or (made / REPAIRED).is_file()):
            repaired = made
        plan = Plan.load(plan)
    source = group().sequentially(lambda: resolve(ref, progress))
    checkpoint = Checkpoint.open(source.path)  # its errors say more than those of loading
    own = load_config(source.path, trust_remote_code=trust)
    text = decoder_config(own)
    refuse_unsupported(text.to_dict(), text.num_hidden_layers)
    refuse_unread(checkpoint, own, trust_remote_code=trust)
    weights, cut = None, None
    if plan is not None:
        cut = Cut.of(plan, depth, repaired, parts=True)
        weights = _cut_weights(
            source,
            checkpoint,
            own,
            plan,
            cut,
            check=check,
            trust_remote_code=trust,
            progress=progress,
        )
    with progress.stage(f"loading {called(source.ref)}", None):
        computed = pick_dtype(config.dtype, own, target)
        if config.stream:
            options = {"device_map": stream_places(own, target, trust)}
        elif config.tp > 1:
            options = tensor_parallel_options(own, config.tp, target.type, source.ref)
        if options:
            model = strict_model(source.path, computed, trust, options)
        else:
            model = strict_model(source.path, computed, trust, weights=weights)
            if cut is not None:
                BlockStack(model).remove_parts(cut.parts)
            try:
                model.to(target)
            except torch.OutOfMemoryError:
                raise ResourceError(
                    f"{ref} does not fit on {target}; try --stream, or --dtype bfloat16"
                ) from None
    tokenizer, processor = _told_apart(tokenizer)
    tokenizer = tokenizer or load_tokenizer(source.path, trust_remote_code=trust)
    _refuse_tokens_without_embedding(model, tokenizer, source.ref)
    stack = BlockStack(model)
    stack.images = images_of(stack, source, processor)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        stack=stack,
        source=source,
        removed=cut.removed if cut else (),
    )


def _told_apart(tokenizer: Any) -> tuple[Any, Any]:
    """A tokenizer and the processor that it was given as, if it was: of texts and images."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:
        return tokenizer, None
    inner = copy(inner)
    inner.chat_template = inner.chat_template or tokenizer.chat_template
    return inner, tokenizer


def _taken(given: nn.Module, tokenizer: Any, *, as_it_is: bool) -> LoadedModel:
    """A model in memory.

    Raises:
        InputError: it is no transformers model, or its tokenizer is not known.
        UnsupportedModel: its blocks cannot be cut exactly.
    """
    if not as_it_is:
        raise InputError("a model in memory is taken as it is: give it alone, or a path")
    model, adapted = unwrapped(given)
    text = decoder_config(model.config)
    refuse_unsupported(text.to_dict(), text.num_hidden_layers)
    source = source_of(model, adapted, tokenizer)
    tokenizer, processor = _told_apart(tokenizer)
    if tokenizer is None:
        if source.ref != str(model.config._name_or_path):
            raise InputError("the tokenizer of a model in memory is not known: give tokenizer=")
        tokenizer = load_tokenizer(source.path, trust_remote_code=False)
    _refuse_tokens_without_embedding(model, tokenizer, source.ref)
    stack = BlockStack(model.eval())
    stack.images = images_of(stack, source, processor)
    return LoadedModel(
        model=model, tokenizer=tokenizer, stack=stack, source=source, adapted=adapted
    )


def _cut_weights(
    source: ModelSource,
    checkpoint: Checkpoint,
    config: Any,
    plan: Plan,
    cut: Cut,
    *,
    check: bool,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model cut by ``plan`` without weights (on the meta device), and its tensors by the names
    that they would have in its checkpoint: on the CPU, mapped from the files that ``source`` has.
    ``check``: hash the tensors to see that the plan is of this model."""
    cut.check_whole(
        "give repaired=FOLDER, the checkpoint that was written with it, or a smaller depth"
    )
    if checkpoint.config.get("quantization_config"):
        raise UnsupportedModel(
            f"{source.ref} is quantized, and is not cut while it loads: write a checkpoint with "
            "sleb apply and load that"
        )
    n = decoder_config(config).num_hidden_layers
    if check:
        with progress.stage("checking the model against the plan", checkpoint.nbytes) as tick:
            found = fingerprint(checkpoint, n, tick)
    else:
        unread = {"weights_sha256": plan.model.weights_sha256}
        found = identity(checkpoint, n, {}).model_copy(update=unread)
    check_fingerprint(plan.model, found, source.ref)

    stack = BlockStack(empty_model(config, trust_remote_code=trust_remote_code))
    empty = empty_model(pruned_config(config, cut.whole), trust_remote_code=trust_remote_code)
    check_structure(stack, cut.kept, empty)
    prefix, others = block_prefix(checkpoint, stack), cut.repair or {}
    names = {old: new for old in checkpoint.tensors if (new := cut.rename(old, prefix)) is not None}
    with ExitStack() as opened:
        files = {
            shard: opened.enter_context(safe_open(source.path / shard, framework="pt"))
            for shard in {checkpoint.tensors[name].shard for name in names}
        }
        tensors = {
            new: others[name] if name in others else files[shard].get_tensor(name)
            for name, new in names.items()
            if (shard := checkpoint.tensors[name].shard)
        }
    return empty, tensors


def strict_model(
    path: Path,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    placing: Mapping[str, Any] = MappingProxyType({}),
    *,
    weights: tuple[nn.Module, dict[str, Tensor]] | None = None,
) -> nn.Module:
    """A causal LM from a folder, in evaluation mode; every tensor accounted for. It is on the CPU,
    or where ``placing`` says, arguments of from_pretrained such as ``device_map``. With
    ``weights``, an empty model and its tensors by their names in a checkpoint, the folder gives
    only settings.

    Raises:
        InputError: loading needs a package that is not installed.
        DataError: missing, unexpected or mismatched tensors.
    """
    from transformers import AutoModelForCausalLM

    if weights is None:
        config = load_config(path, trust_remote_code=trust_remote_code)
        loader: Any = auto_class(config) or AutoModelForCausalLM
    else:
        loader = type(weights[0])
    # weights that transformers has to rearrange cannot be read in place; it keeps a copy here
    placed = "device_map" in placing
    spill = tempfile.TemporaryDirectory(prefix="sleb-") if placed else None
    failures = map_exceptions(
        (ImportError, InputError, f"{path} needs a package to load: {SAID}"),
        (Exception, DataError, f"{path} does not load: {SAID}"),  # also from the model's own code
    )
    packed = _unpacked(path)
    with quiet_transformers(), quiet_tqdm() if packed else nullcontext(), failures:
        given = {} if weights is None else _given(path, *weights)
        model, info = loader.from_pretrained(
            None if given else path,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are counted below, and then refused
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            **given,
            **placing,
            **packed,
            **({"offload_folder": spill.name} if spill else {}),
        )
        if spill:
            weakref.finalize(model, spill.cleanup)
        if given:
            model.name_or_path = model.config.name_or_path = str(path)
    if placed:
        info["mismatched_keys"] = [*info.get("mismatched_keys", ()), *misshapen(model)]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        keys = (key for key in info.get(kind, ()) if not _predicts_further(key, model.config))
        if found := sorted(_key(key) for key in keys):
            raise DataError(
                f"{path}: {len(found)} {kind.replace('_', ' ')} on loading, for example "
                f"{found[0]}; the config does not describe these weights"
            )
    return model.eval()  # type: ignore[no-any-return]


def _unpacked(path: Path) -> dict[str, Any]:
    """Compressed weights are unpacked when they are read: transformers does so at the first forward
    pass at the latest, and a search or a digest must not find one thing before it and another
    after."""
    if quant_method(read_json(path / "config.json")) != "compressed-tensors":
        return {}
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(run_compressed=False)}


def _given(path: Path, empty: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What transformers is given in place of a folder."""
    from transformers import GenerationConfig

    given = {"config": empty.config, "state_dict": tensors}
    if (path / "generation_config.json").is_file():
        given["generation_config"] = GenerationConfig.from_pretrained(path)
    return given


def stream_places(config: Any, target: torch.device, trust_remote_code: bool) -> dict[str, str]:
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

    fields = read_json(path / "config.json")  # its errors say more than those of transformers
    if fields.get("model_type") == "nemotron-nas":
        raise UnsupportedModel(f"{path}: {refused_type(fields)}")
    failures = map_exceptions(  # transformers validates with several exception types
        ((ValueError, KeyError, OSError), UnsupportedModel, f"{path}: {SAID}"),
        (Exception, DataError, f"{path / 'config.json'} is not valid: {SAID}"),
    )
    with quiet_transformers(), failures:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if auto_class(config) is None and not (remote and trust_remote_code):
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


def refuse_unread(checkpoint: Checkpoint, config: Any, *, trust_remote_code: bool = False) -> None:
    """Refuse files that are in order, but that transformers does not load as this causal LM.

    Raises:
        UnsupportedModel: a way of quantization that it does not know; or a vision tower beside the
            text model, where it loads the text model alone and does not pass over the rest.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise UnsupportedModel(
            f"{checkpoint.path} is quantized by {method}, which transformers does not read: give "
            "the model as it was before that"
        )
    if decoder_config(config) is config:
        return
    model: Any = empty_model(config, trust_remote_code=trust_remote_code)
    if isinstance(model.config, type(config)):
        return
    passed_over = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    for name in checkpoint.tensors:
        tower = re.search(r"(^|\.)(vision|visual|multi_modal|audio)\w*\.", name)
        if tower and not any(re.search(pattern, name) for pattern in passed_over):
            raise UnsupportedModel(
                f"{checkpoint.path} is a {config.model_type} with more than text ({name}), and "
                f"transformers loads {type(model).__name__} only from files without that"
            )


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    # the tokenizers library raises bare Exceptions
    failure = f"{path} has no tokenizer that loads: {_lacking_packages(path) or SAID}"
    failures = map_exceptions((Exception, InputError, failure))
    with quiet_transformers(), failures:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    beside = path / "chat_template.json"  # a processor's, as it was written before .jinja
    if tokenizer.chat_template is None and beside.is_file():
        tokenizer.chat_template = read_json(beside).get("chat_template")
    return tokenizer


def _refuse_tokens_without_embedding(model: Any, tokenizer: Any, ref: str) -> None:
    """Where the tokenizer has more tokens than the model, which may never come up, have one that
    does refused by name: torch would say that an index is out of range, on a GPU much later."""
    embedding = model.get_input_embeddings()
    rows = int(embedding.num_embeddings)
    if len(tokenizer) <= rows:
        return

    def check(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if (highest := int(inputs[0].max())) >= rows:
            token = printable(str(tokenizer.convert_ids_to_tokens(highest)))
            raise InputError(
                f"token {highest} ({token}) is in the text, and {ref} has embeddings for 0 to "
                f"{rows - 1} alone: leave it out of the text, or give the model's own tokenizer"
            )

    embedding.register_forward_pre_hook(check)


def _lacking_packages(path: Path) -> str:
    """What to install for a SentencePiece file that nothing else stands beside: transformers takes
    it for one of tiktoken where it lacks the packages for it."""
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    file = path / "tokenizer.model"
    there = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    lacking = [name for name, found in there.items() if not found]
    if not lacking or not file.is_file() or (path / "tokenizer.json").is_file():
        return ""
    with open(file, "rb") as stream:
        if stream.read(1) != b"\n":  # a protobuf's first field; tiktoken's are lines of text
            return ""
    return f"{file.name} is SentencePiece's, for which install: pip install {' '.join(lacking)}"


def empty_model(config: Any, *, trust_remote_code: bool = False) -> nn.Module:
    """The model of ``config`` with its structure but no weights (on the meta device).

    Raises:
        DataError: the config's values do not go together.
    """
    from transformers import AutoModelForCausalLM

    model: nn.Module
    # whatever the model's constructor makes of a bad value
    failures = map_exceptions((Exception, DataError, f"this config makes no model: {SAID}"))
    with quiet_transformers(), torch.device("meta"), failures:
        loader = auto_class(config) or AutoModelForCausalLM
        model = loader.from_config(config, trust_remote_code=trust_remote_code)
    return model


def cuda_or_cpu(device: torch.device) -> str:
    """As defaults are given: those of a CUDA device, or those of any other."""
    return "cuda" if device.type == "cuda" else "cpu"


def pick_device(device: str) -> torch.device:
    """``auto`` is the first GPU, else the CPU. Of several processes on a machine each has a GPU of
    its own.

    Raises:
        InputError: not a device, or one that this machine lacks; or one GPU for several processes.
    """
    here = group()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if here.several and device.startswith("cuda"):
        if device != "cuda":
            raise InputError(
                f"--device {device} is one GPU, and this job has {here.local_size} processes here, "
                "each with its own: leave --device out"
            )
        if here.local_size > torch.cuda.device_count():
            raise InputError(
                f"this job has {here.local_size} processes here and {torch.cuda.device_count()} "
                "GPUs: start as many processes as there are GPUs, or pass --device cpu"
            )
        return torch.device("cuda", here.local_rank)
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
