"""A Hugging Face checkpoint folder on disk: safetensors shards, read by header, without torch.

Tensors are located, hashed and copied as byte ranges, so memory stays at one buffer whatever the
model's size and whatever its dtype. Nothing here unpickles or executes anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb.core.errors import DataError, InputError
from sleb.core.plan import Fingerprint

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK = 2 * 2**20
MAX_HEADER = 100_000_000
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Bits of an element of each dtype of safetensors."""
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Floating-point dtypes of safetensors, by torch's names."""

# Fields of config.json that do not change what the model computes.
_VOLATILE = frozenset({"transformers_version", "_name_or_path", "_model_name_or_path", "use_cache"})


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor's bytes are: ``[start, stop)`` in ``shard``; ``dtype`` as safetensors says.

    In a checkpoint that is put together from others, ``shard`` is the file that the tensor belongs
    to, and ``file`` the one that holds its bytes, under the name ``key``.
    """

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    file: Path | None = None
    key: str | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    @property
    def numel(self) -> int:
        """Number of stored elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def width(self) -> int:
        """Bytes of one element; zero if it is less than a byte."""
        return self.nbytes // max(1, self.numel)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checked checkpoint folder. Build it with :meth:`open`. ``headers`` are those of the shards
    as they are stored: JSON, with what pads it, and without the length in front."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(repr=False)
    metadata: dict[str, dict[str, str]] = field(repr=False)
    headers: dict[str, bytes] = field(repr=False)

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read and check the headers of all shards. Links are followed, wherever they lead: the
        hub's cache and shared storage consist of them, and what they lead to is only read.

        Raises:
            InputError: not a checkpoint folder, or one without safetensors weights.
            DataError: a shard is missing, truncated or corrupt.
        """
        path = Path(path)
        config = read_json(path / "config.json")
        tensors: dict[str, TensorInfo] = {}
        metadata, headers = {}, {}
        for shard in shard_names(path):
            if not (path / shard).is_file():
                raise DataError(f"{path} lacks the shard {shard}: fetch it again")
            found, metadata[shard], headers[shard] = read_shard(path / shard)
            for name, info in found.items():
                if name in tensors:
                    raise DataError(f"{path}: tensor {name} is in two shards")
                tensors[name] = info
        if not tensors:
            raise DataError(f"{path} holds no tensors")
        return cls(path=path, config=config, tensors=tensors, metadata=metadata, headers=headers)

    def file(self, name: str) -> Path:
        """The file that holds a tensor's bytes."""
        info = self.tensors[name]
        return info.file or self.path / info.shard

    def chunks(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes, in pieces of at most 2 MiB."""
        info = self.tensors[name]
        with open(self.file(name), "rb") as stream:
            stream.seek(info.start)
            left = info.nbytes
            while left:
                piece = stream.read(min(CHUNK, left))
                if not piece:
                    raise DataError(f"{self.file(name)} ends inside tensor {name}")
                left -= len(piece)
                yield piece

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        from safetensors import safe_open

        with safe_open(self.file(name), framework="pt") as shard:
            found: Tensor = shard.get_tensor(self.tensors[name].key or name)
        return found

    def digest(self, name: str) -> str:
        """SHA-256 of a tensor's bytes, hexadecimal."""
        sha = hashlib.sha256()
        for piece in self.chunks(name):
            sha.update(piece)
        return sha.hexdigest()

    @property
    def architecture(self) -> str:
        """The model class that the config names, or an empty string."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def block_sizes(self, n: int, prefix: str) -> list[tuple[int, int]]:
        """Stored elements and bytes of each of the blocks 0..n-1, whose tensors are named
        ``prefix``, the block's number, a dot and more."""
        sizes = [(0, 0)] * n
        for name, info in self.tensors.items():
            block = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else ""
            if block.isdigit() and int(block) < n:
                elements, nbytes = sizes[int(block)]
                sizes[int(block)] = (elements + info.numel, nbytes + info.nbytes)
        return sizes


def shard_head(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """What stands before the data of a safetensors file that holds ``tensors`` one behind the
    other, by their names in it."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the format aligns tensor data to 8 bytes
    return struct.pack("<Q", len(raw)) + raw


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as they are stored."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy().data)


def fingerprint(
    checkpoint: Checkpoint, blocks: int, tick: Callable[[int], None] | None = None
) -> Fingerprint:
    """Hash a checkpoint's config and every tensor; ``tick`` gets bytes as they are hashed."""
    return identity(checkpoint, blocks, tensor_lines(checkpoint, tick))


def tensor_lines(
    checkpoint: Checkpoint, tick: Callable[[int], None] | None = None
) -> dict[str, str]:
    """For every tensor the line that goes into the fingerprint: its name, dtype, shape and SHA-256,
    with a tab between; sorted by name."""

    def line(name: str) -> str:
        info = checkpoint.tensors[name]
        digest = checkpoint.digest(name)
        if tick:
            tick(info.nbytes)
        return f"{name}\t{info.dtype}\t{list(info.shape)}\t{digest}\n"

    names = sorted(checkpoint.tensors)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(line, names), strict=True))


def identity(checkpoint: Checkpoint, blocks: int, lines: Mapping[str, str]) -> Fingerprint:
    """The fingerprint, where the :func:`tensor_lines` are known."""
    config = {k: v for k, v in checkpoint.config.items() if k not in _VOLATILE}
    canonical = json.dumps(config, sort_keys=True, ensure_ascii=False)
    return Fingerprint(
        model_type=str(config.get("model_type", "")),
        architecture=checkpoint.architecture[:4096],  # as much as a plan holds
        blocks=blocks,
        config_sha256=hashlib.sha256(canonical.encode()).hexdigest(),
        weights_sha256=hashlib.sha256("".join(lines.values()).encode()).hexdigest(),
    )


def check_fingerprint(expected: Fingerprint, found: Fingerprint, ref: str) -> None:
    """Raise InputError, naming the difference, unless the two are the same checkpoint."""
    if expected == found:
        return
    for name in ("model_type", "blocks", "weights_sha256", "config_sha256"):
        a, b = getattr(expected, name), getattr(found, name)
        if a != b:
            a, b = (str(v)[:12] + "…" if name.endswith("sha256") else v for v in (a, b))
            raise InputError(
                f"the plan was made for another model: {name} is {a} in the plan and {b} in {ref}; "
                "search again on this model"
            )


def plan_alone(folder: str | Path) -> Path | None:
    """The plan in a folder that holds no checkpoint, so that a model is to be loaded by it."""
    plan = Path(folder) / "plan.json"
    return plan if plan.is_file() and not plan.with_name("config.json").is_file() else None


def refuse_plan_alone(folder: Path) -> None:
    """Raise InputError, with what is possible, if ``folder`` has a plan and no checkpoint."""
    if plan := plan_alone(folder):
        raise InputError(
            f"{folder} holds a plan and no checkpoint: sleb.load(MODEL, plan='{plan}') applies it "
            f"while MODEL is loaded; sleb apply {plan} writes it as a GGUF file, or with --format "
            "nemotron-nas (docs/units.md)"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint folder.

    Raises:
        InputError: there is no such file.
        DataError: it holds something else.
    """
    if not path.is_file():
        refuse_plan_alone(path.parent)
        raise InputError(f"{path.parent} has no {path.name}: not a Hugging Face checkpoint")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object")
    return value


def shard_names(path: Path) -> list[str]:
    """The shard files of a folder, in order, whether they are there or not; where there are both,
    the single file counts and not the index, as in transformers.

    Raises:
        InputError: it has no safetensors weights.
        DataError: the index is no index, or names files elsewhere.
    """
    if (path / SINGLE).is_file():
        names = [SINGLE]
    elif (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise DataError(f"{path / INDEX} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
    elif any(path.glob("pytorch_model*.bin")):
        raise InputError(
            f"{path} has only pickled weights (.bin), which sleb does not open; convert once with "
            "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
        )
    else:
        raise InputError(f"{path} has no {SINGLE} or {INDEX}: no weights that sleb reads")
    for name in names:
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise DataError(f"{path / INDEX} names {name!r}: a shard must be a file beside it")
    return names


def read_shard(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str], bytes]:
    """A safetensors file's tensors in the order of their bytes, its metadata, and its header as it
    is stored.

    Raises:
        DataError: truncated or corrupt.
    """
    try:
        with open(path, "rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > MAX_HEADER:
                raise ValueError(f"its header would have {size} bytes")
            raw = stream.read(size)
        header: dict[str, Any] = json.loads(raw)
        metadata = header.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata are no texts")
        numbers = [n for e in header.values() for n in (*e["shape"], *e["data_offsets"])]
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("a shape or a place in it is no list of whole numbers")
        if not all(isinstance(entry["shape"], list) for entry in header.values()):
            raise ValueError("a shape in it is no list")
        placed = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        tensors = {
            name: TensorInfo(
                shard=path.name,
                dtype=str(header[name]["dtype"]),
                shape=tuple(header[name]["shape"]),
                start=8 + size + start,
                stop=8 + size + stop,
            )
            for start, stop, name in placed
        }
        _check_places(tensors, 8 + size, path.stat().st_size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise DataError(f"{path} is corrupt or truncated ({error}): fetch it again") from None
    return tensors, metadata, raw


def _check_places(tensors: Mapping[str, TensorInfo], start: int, end: int) -> None:
    """Raise ValueError unless tensors, in the order of their bytes, fill the file from ``start`` to
    ``end``, each as many bytes as its shape needs. As the safetensors library checks it, which
    imports numpy to do so."""
    for name, info in tensors.items():
        if info.dtype not in BITS:
            raise ValueError(f"{name} has the unknown type {info.dtype}")
        if info.start != start or 8 * info.nbytes != info.numel * BITS[info.dtype]:
            raise ValueError(f"{name} is not where it should be")
        start = info.stop
    if start != end:
        raise ValueError(f"it has {end} bytes, and its header is of {start}")
