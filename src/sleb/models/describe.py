"""What `sleb inspect` knows: structure and sizes of a model, from its config and file headers.

Nothing here needs torch. A ``full`` description, and that of a .gguf file, which transformers has
to convert, builds the model's structure, without weights: that is in :mod:`sleb.models.structure`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.checkpoints.depth_fields import DepthField, depth_fields, refused_type
from sleb.checkpoints.gguf_fields import GGUFModel, architecture_of
from sleb.checkpoints.gguf_file import GGUFFile, parameters, type_name
from sleb.config import InspectConfig, takes
from sleb.core.errors import UnsupportedModel
from sleb.core.plan import blocks_to_remove
from sleb.core.printable import paragraphs
from sleb.core.progress import Progress, silent
from sleb.models.on_disk import DEPTHS
from sleb.models.source import find, resolve


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What removing ``blocks`` average blocks leaves: stored elements, bytes on disk in the model's
    own form, bytes of memory that the weights take in two bytes each, and the speed-up of the stack
    (upper bound for the model's)."""

    percent: int
    blocks: int
    parameters: int
    nbytes: int
    memory: int
    ideal_speedup: float


@dataclass(frozen=True, kw_only=True)
class Description:
    """A model's facts. Parameter counts are stored elements, sizes are bytes on disk; both per
    block in ``block_parameters`` and ``block_bytes``. ``supported`` is null where only files were
    looked at, and nothing in them is against it; ``reason`` says why it is not. ``gguf``: what
    stands against cutting the file itself, empty where nothing does; null for a folder.
    ``carried``: what of the config sleb takes from it, since transformers does not."""

    model: str
    model_type: str
    architecture: str
    supported: bool | None
    reason: str | None
    block_path: str | None = None
    block_class: str | None = None
    blocks: int | None = None
    parameters: int | None = None
    nbytes: int | None = None
    block_parameters: tuple[int, ...] = ()
    block_bytes: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    tied_weights: bool = False
    depth_fields: tuple[DepthField, ...] = ()
    savings: tuple[Saving, ...] = ()
    gguf: str | None = None
    carried: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        size = f", {self.nbytes / 1e6:,.4g} MB" if self.nbytes is not None else ""
        why = f"; {self.reason}" if self.reason else ""
        return paragraphs(
            [f"{self.model}: {self.blocks or 'unknown'} blocks of a {self.model_type}{size}{why}"]
        )


@takes(InspectConfig)
def describe(ref: str | Path, config: InspectConfig, *, progress: Progress = silent) -> Description:
    """Describe MODEL from its config and the headers of its files: of a .gguf file, from its
    header. With ``full`` its structure is built as well, without weights, as transformers has it.
    A model that sleb refuses is described as far as it can be, with the reason.

    Raises:
        InputError, DataError: there is no such model, or its files are damaged.
    """
    path, found = find(str(ref)), None
    if isinstance(path, Path) and path.is_file():
        from sleb.models.structure import gguf_structure

        file = GGUFFile.open(path)
        with progress.stage("asking transformers", None):
            facts = gguf_structure(file)  # refuses what could not be converted
        found = replace(_of_gguf(str(ref), file), **facts)
    if found is None or config.full:
        source = resolve(ref, progress)
        checkpoint = Checkpoint.open(source.path)
        found = found or _of_files(source.ref, checkpoint)
        if config.full:
            from sleb.models.structure import structure

            trust = config.trust_remote_code
            with progress.stage("asking transformers", None):
                facts = structure(checkpoint, trust_remote_code=trust)
            found = replace(found, **facts)
            if found.supported and found.gguf is None:
                found = _sized(found, checkpoint)
    return found


def _of_files(ref: str, checkpoint: Checkpoint) -> Description:
    """A folder's description, from config.json and the shards' headers."""
    config = checkpoint.config
    text = _decoder(config)
    model_type = str(config.get("model_type", "unknown"))
    facts: dict[str, Any] = {
        "model": ref,
        "model_type": model_type,
        "architecture": checkpoint.architecture or "unknown",
    }
    reason = refused_type(text)
    if config.get("is_encoder_decoder"):
        reason = f"{facts['architecture']} is an encoder-decoder; sleb cuts decoder-only models"
    if reason:
        return Description(**facts, supported=False, reason=reason)
    stated = next((text[name] for name in DEPTHS if isinstance(text.get(name), int)), None)
    path, n = _blocks(checkpoint, stated)
    found = Description(
        **facts,
        supported=None,
        reason=None,
        block_path=path,
        blocks=n,
        tied_weights=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings"))),
        depth_fields=tuple(depth_fields(text, n)) if n else (),
    )
    return _sized(found, checkpoint)


def _decoder(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that says how many blocks there are; all of it where none does."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    nested = [inner for part in parts[1:] for inner in part.values() if isinstance(inner, dict)]
    named = [part for part in (*parts, *nested) if any(name in part for name in DEPTHS)]
    text = next((part for part in named if part is config.get("text_config")), None)
    return text or (named or [config])[0]


def _blocks(checkpoint: Checkpoint, stated: int | None) -> tuple[str | None, int | None]:
    """Where blocks 0..n-1 stand among the tensors' names, and n: the largest such list."""
    numbers: dict[str, set[int]] = defaultdict(set)
    sizes: dict[str, int] = defaultdict(int)
    for name, info in checkpoint.tensors.items():
        if match := re.match(r"(?:(.*?)\.)?(\d+)\.", name):
            numbers[match[1] or ""].add(int(match[2]))
            sizes[match[1] or ""] += info.nbytes
    whole = [p for p, found in numbers.items() if found >= set(range(stated or len(found)))]
    if not whole:
        return None, None
    path = max(whole, key=lambda p: sizes[p])
    return path, stated or len(numbers[path])


def _sized(found: Description, checkpoint: Checkpoint) -> Description:
    """With the sizes of a folder's tensors."""
    if found.blocks is None:
        return found
    prefix = f"{found.block_path}." if found.block_path else ""
    sizes = checkpoint.block_sizes(found.blocks, prefix)
    infos = checkpoint.tensors.values()
    total, dtypes = sum(i.numel for i in infos), {i.dtype for i in infos}
    return _with_sizes(found, sizes, total, checkpoint.nbytes, dtypes)


def _with_sizes(
    found: Description,
    sizes: Iterable[tuple[int, int]],
    total: int,
    nbytes: int,
    dtypes: Iterable[str],
) -> Description:
    """``sizes``: elements and bytes of each block; of the whole model ``total`` and ``nbytes``."""
    elements, stored = zip(*sizes, strict=True)
    n, savings = len(elements), []
    for percent in (10, 20, 30):
        gone = min(blocks_to_remove(f"{percent}%", n), n - 1) if n > 1 else 0
        left = total - gone * sum(elements) // n
        savings.append(
            Saving(
                percent=percent,
                blocks=gone,
                parameters=left,
                nbytes=nbytes - gone * sum(stored) // n,
                memory=2 * left,
                ideal_speedup=n / (n - gone),
            )
        )
    return replace(
        found,
        parameters=total,
        nbytes=nbytes,
        block_parameters=elements,
        block_bytes=stored,
        dtypes=tuple(sorted(dtypes)),
        savings=tuple(savings),
    )


def _of_gguf(ref: str, file: GGUFFile) -> Description:
    """A .gguf file's description, from its header."""
    model = GGUFModel.of(file)
    try:
        architecture_of(model)
        against = ""
    except UnsupportedModel as error:
        against = str(error)
    kinds = {type_name(tensor.kind) for tensor in file.tensors.values()}
    found = Description(
        model=ref,
        model_type=model.name,
        architecture=str(file.value("general.name") or model.name),
        supported=None,
        reason=None,
        block_path="blk",
        blocks=model.blocks,
        tied_weights="output.weight" not in file.tensors,
        gguf=against,
    )
    total, nbytes = parameters(file), file.path.stat().st_size
    return _with_sizes(found, model.block_sizes(), total, nbytes, kinds)
