"""A GGUF file on disk: fields and tensors located as byte ranges, and written again the same way.

The format is that of ggml's docs/gguf.md, versions 2 and 3. The reader of the `gguf` package makes
Python objects of every token of the vocabulary and trusts every length; here lengths are checked
against the file before anything is read by them, and memory stays at one buffer.
"""

from __future__ import annotations

import functools
import hashlib
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sleb.core.errors import DataError, InputError, UnsupportedModel

MAGIC = b"GGUF"
VERSIONS = (2, 3)
CHUNK = 2 * 2**20
MAX_DIMS = 4
MAX_ALIGNMENT = 2**16
MAX_KEY = 2**16
MAX_VALUE = 2**20
"""Bytes of a value that may be decoded; vocabularies are longer, and only copied."""

# Numbers of value types, from the format.
UINT32, INT32, BOOL, STRING, ARRAY = 4, 5, 7, 8, 9
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", INT32: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q",
    12: "d",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Field:
    """Where a field's bytes are: the entry is ``[start, stop)``, its value begins at ``data``.
    ``kind`` and, for an array, ``item`` are type numbers of the format."""

    key: str
    kind: int
    item: int | None
    count: int
    start: int
    data: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Value:
    """What a field is to hold; ``item`` is the type of an array's elements."""

    kind: int
    data: Any
    item: int | None = None

    def encode(self, key: str) -> bytes:
        """The field's entry, as it is stored."""
        head = _string(key) + struct.pack("<I", self.kind)
        if self.kind == STRING:
            return head + _string(self.data)
        if self.kind != ARRAY:
            return head + struct.pack("<" + _SCALARS[self.kind], self.data)
        assert self.item in _SCALARS, "arrays of strings are only copied"
        body = struct.pack(f"<{len(self.data)}{_SCALARS[self.item]}", *self.data)
        return head + struct.pack("<IQ", self.item, len(self.data)) + body


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """Where a tensor's bytes are: ``[start, start + nbytes)``. ``kind`` is ggml's type number;
    ``shape`` is in ggml's order, the fastest dimension first."""

    name: str
    kind: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class NewTensor:
    """A tensor to write: bytes of ``source``, or ``content`` of ggml's type ``kind`` instead; a
    function makes as many bytes as those of ``source``."""

    name: str
    source: GGUFTensor
    kind: int
    content: bytes | Callable[[], bytes] | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.source.nbytes

    def pieces(self, file: GGUFFile) -> Iterable[bytes]:
        """What is written, in order."""
        if self.content is None:
            return file.chunks(self.source.start, self.source.nbytes)
        return [self.content if isinstance(self.content, bytes) else self.content()]


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """A checked GGUF file; ``fields`` and ``tensors`` are in the file's order, by name."""

    path: Path
    version: int
    alignment: int
    fields: dict[str, Field]
    tensors: dict[str, GGUFTensor]

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Read and check the header.

        Raises:
            InputError: no such file, or one part of a split model.
            DataError: truncated or corrupt.
            UnsupportedModel: big-endian, an older version, or an unknown tensor type.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no model at {path}; check the path")
        size = path.stat().st_size
        with open(path, "rb") as stream:
            if stream.read(4) != MAGIC:
                raise DataError(f"{path} does not start as a GGUF file: fetch it again")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                file = _Parser(path, buffer, size).file()
        parts = file.value("split.count") or 1
        if parts != 1:
            raise InputError(
                f"{path} is one of {parts} parts of a model; join them first with: "
                "llama-gguf-split --merge FIRST_PART WHOLE.gguf"
            )
        return file

    @staticmethod
    def depth(path: str | Path) -> int | None:
        """The number of blocks that a file states, read without the rest of its header; those
        beside the decoder's own count too.

        Raises:
            DataError, UnsupportedModel: as :meth:`open`.
        """
        path = Path(path)
        with open(path, "rb") as stream:
            if stream.read(4) != MAGIC:
                raise DataError(f"{path} does not start as a GGUF file: fetch it again")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                return _Parser(path, buffer, path.stat().st_size).depth()

    def value(self, key: str) -> Any:
        """A field's value: a number, text, or a list of numbers; None if there is no such field.

        Raises:
            DataError: it is longer than 1 MiB, or not text.
        """
        field = self.fields.get(key)
        if field is None:
            return None
        if field.stop - field.data > MAX_VALUE or field.item in (STRING, ARRAY):
            raise DataError(f"{self.path}: {key} is not a value that can be read here")
        with open(self.path, "rb") as stream:
            stream.seek(field.data)
            raw = stream.read(field.stop - field.data)
        if field.kind == STRING:
            return _text(self.path, raw[8:], key)
        if field.kind == ARRAY:
            return list(struct.unpack(f"<{field.count}{_SCALARS[field.item or 0]}", raw[12:]))
        return struct.unpack("<" + _SCALARS[field.kind], raw)[0]

    def typed(self, key: str) -> Value | None:
        """A field's value with its type, so that it can be changed and written again."""
        field = self.fields.get(key)
        if field is None:
            return None
        return Value(kind=field.kind, item=field.item, data=self.value(key))

    def chunks(self, start: int, nbytes: int) -> Iterator[bytes]:
        """A range of bytes, in pieces of at most 2 MiB."""
        with open(self.path, "rb") as stream:
            stream.seek(start)
            while nbytes:
                piece = stream.read(min(CHUNK, nbytes))
                if not piece:
                    raise DataError(f"{self.path} became shorter while it was read")
                nbytes -= len(piece)
                yield piece

    def content(self, tensor: GGUFTensor) -> bytes:
        """A tensor's bytes."""
        return b"".join(self.chunks(tensor.start, tensor.nbytes))

    def sha256(self) -> str:
        """SHA-256 of the whole file, hexadecimal."""
        digest = hashlib.sha256()
        for piece in self.chunks(0, self.path.stat().st_size):
            digest.update(piece)
        return digest.hexdigest()


class _Parser:
    """Walks a header once. ``at`` is the next byte; every step is checked before it is taken."""

    def __init__(self, path: Path, buffer: mmap.mmap, size: int) -> None:
        self.path, self.buffer, self.size = path, buffer, size
        self.at = len(MAGIC)

    def depth(self) -> int | None:
        """What the first field that names a number of blocks says."""
        for _ in range(self._counts()[2]):
            field = self._field()
            if field.key.endswith(".block_count") and field.kind in _SCALARS:
                layout = "<" + _SCALARS[field.kind]
                return int(struct.unpack_from(layout, self.buffer, field.data)[0])
        return None

    def _counts(self) -> tuple[int, int, int]:
        """The version, and how many tensors and fields there are."""
        (version,) = self._take("I")
        if version and not version & 0xFFFF:
            raise UnsupportedModel(f"{self.path} is a big-endian GGUF file; convert it again here")
        if version not in VERSIONS:
            raise UnsupportedModel(
                f"{self.path} is GGUF version {version}, and sleb reads 2 and 3: convert it again"
            )
        tensors, count = self._take("QQ")
        if tensors * 24 + count * 13 > self.size:  # the least that an entry takes
            raise self._corrupt(f"counts {count} fields and {tensors} tensors")
        return version, tensors, count

    def file(self) -> GGUFFile:
        """The checked header."""
        version, tensors, count = self._counts()
        fields: dict[str, Field] = {}
        for _ in range(count):
            field = self._field()
            if field.key in fields:
                raise self._corrupt(f"has {field.key} twice")
            fields[field.key] = field
        found = [self._tensor() for _ in range(tensors)]
        alignment = self._alignment(fields)
        start = self.at + -self.at % alignment
        placed = {
            info.name: GGUFTensor(
                name=info.name,
                kind=info.kind,
                shape=info.shape,
                start=start + info.start,
                nbytes=info.nbytes,
            )
            for info in found
        }
        if len(placed) != len(found):
            raise self._corrupt("has two tensors of one name")
        end = start
        for info in sorted(placed.values(), key=lambda info: (info.start, info.nbytes)):
            if info.start < end or info.start % alignment or info.start + info.nbytes > self.size:
                raise self._corrupt(f"has no room for tensor {info.name}")
            end = info.start + info.nbytes
        return GGUFFile(
            path=self.path, version=version, alignment=alignment, fields=fields, tensors=placed
        )

    def _corrupt(self, what: str) -> DataError:
        return DataError(f"{self.path} is corrupt or truncated: it {what}; fetch it again")

    def _take(self, layout: str) -> tuple[Any, ...]:
        nbytes = struct.calcsize("<" + layout)
        start = self._skip(nbytes)
        return struct.unpack_from("<" + layout, self.buffer, start)

    def _skip(self, nbytes: int) -> int:
        start = self.at
        if nbytes > self.size - start:
            raise self._corrupt(f"ends inside its header, at byte {start}")
        self.at += nbytes
        return start

    def _name(self) -> str:
        (length,) = self._take("Q")
        if not 0 < length <= MAX_KEY:
            raise self._corrupt(f"has a name of {length} bytes")
        start = self._skip(length)
        return _text(self.path, self.buffer[start : self.at], "a name")

    def _field(self) -> Field:
        start = self.at
        key = self._name()
        (kind,) = self._take("I")
        data, item, count = self.at, None, 1
        if kind == ARRAY:
            item, count = self._take("IQ")
        each = item if kind == ARRAY else kind
        if each == STRING:
            if count * 8 > self.size:
                raise self._corrupt(f"has {count} texts in {key}")
            for _ in range(count):
                self._skip(self._take("Q")[0])
        elif each in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[each]))
        else:
            raise self._corrupt(f"has a value of type {each} in {key}")
        return Field(
            key=key, kind=kind, item=item, count=count, start=start, data=data, stop=self.at
        )

    def _tensor(self) -> GGUFTensor:
        name = self._name()
        (dims,) = self._take("I")
        if dims > MAX_DIMS:
            raise self._corrupt(f"has {dims} dimensions in tensor {name}")
        shape = self._take(f"{dims}Q")
        kind, offset = self._take("IQ")
        if kind not in _sizes():
            raise UnsupportedModel(
                f"{self.path}: tensor {name} has type {kind}, which the gguf package does not "
                "know: upgrade it"
            )
        block, width = _sizes()[kind]
        elements = 1
        for length in shape:
            elements *= length
        if not elements or (shape[0] if shape else 1) % block:
            raise self._corrupt(f"has shape {list(shape)} in tensor {name}")
        return GGUFTensor(
            name=name, kind=kind, shape=shape, start=offset, nbytes=elements // block * width
        )

    def _alignment(self, fields: dict[str, Field]) -> int:
        field = fields.get("general.alignment")
        if field is None:
            return 32
        if field.kind == UINT32:
            (alignment,) = struct.unpack_from("<I", self.buffer, field.data)
            if 8 <= alignment <= MAX_ALIGNMENT and not alignment & (alignment - 1):
                return int(alignment)
        raise self._corrupt("has an impossible general.alignment")


def write_gguf(
    source: GGUFFile,
    path: Path,
    *,
    values: dict[str, Value],
    tensors: Iterable[NewTensor],
    tick: Callable[[int], None],
    names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write ``source`` again with ``values`` in place of its own or, if it has no such field, after
    them, and with ``tensors``. All other fields are copied byte for byte, in their order, some
    under other ``names``, which are those in ``values``. ``tick`` gets bytes of tensors as they are
    written."""
    tensors = list(tensors)
    kept = {names.get(key, key): field for key, field in source.fields.items()}
    new = [key for key in values if key not in kept]
    infos, offset = [], 0
    for tensor in tensors:
        shape = tensor.source.shape
        infos.append(
            _string(tensor.name)
            + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.kind, offset)
        )
        offset += tensor.nbytes + -tensor.nbytes % source.alignment
    with open(path, "wb") as stream:
        counts = (len(tensors), len(source.fields) + len(new))
        stream.write(MAGIC + struct.pack("<IQQ", source.version, *counts))
        for key, field in kept.items():
            if key in values:
                stream.write(values[key].encode(key))
            else:
                stream.write(_string(key))
                rest = field.start + len(_string(field.key))
                stream.writelines(source.chunks(rest, field.stop - rest))
        stream.writelines(values[key].encode(key) for key in new)
        stream.writelines(infos)
        stream.write(bytes(-stream.tell() % source.alignment))
        for tensor in tensors:
            for piece in tensor.pieces(source):
                stream.write(piece)
                tick(len(piece))
            stream.write(bytes(-tensor.nbytes % source.alignment))


@functools.cache
def _sizes() -> dict[int, tuple[int, int]]:
    """Elements and bytes of a block of each tensor type, by ggml's number."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}


def parameters(file: GGUFFile) -> int:
    """Elements of all tensors."""
    return sum(math.prod(tensor.shape) for tensor in file.tensors.values())


def type_name(kind: int) -> str:
    """ggml's name of a tensor type, such as Q4_K."""
    from gguf.constants import GGMLQuantizationType

    return str(GGMLQuantizationType(kind).name)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _text(path: Path, raw: bytes, what: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise DataError(f"{path} is corrupt: {what} is not text; fetch it again") from None
