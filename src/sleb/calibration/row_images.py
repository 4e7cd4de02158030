"""The images of a row: the forms in which rows have them, and where in a chat they stand.

A part of a turn is an image by its type (``image``, ``image_url``, ``input_image``), and has it
under ``image``, ``image_url``, ``url``, ``path``, ``base64`` or ``source``: the path of a file,
relative to that of the rows, a ``data:`` URL, base64, bytes or ``{"bytes": .., "path": ..}``, as
parquet has it, or a PIL image. A part without one, or ``<image>`` in a text, is the next of the
row's column ``images`` or ``image``; where nothing says, these stand before the first user's turn.
Needs no torch, and PIL only for PIL images.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from sleb.core.errors import InputError

COLUMNS = ("images", "image")
"""Columns of a row that hold its images."""
PLACEHOLDER = "<image>"
"""Stands in a text for the next image of the row's column."""
_KINDS = frozenset({"image", "image_url", "input_image"})
_HOLDERS = ("image", "image_url", "url", "path", "base64", "source")

ImageFile = bytes | Path
"""An image as its file has it: its content, or where it is."""


class RowImages:
    """The images of one row, which parts of turns are given in order. ``folder``: what paths are
    relative to."""

    def __init__(self, row: Mapping[str, Any], folder: str | Path, where: str) -> None:
        self.folder, self.where = Path(folder), where
        column: Any = next((row[name] for name in COLUMNS if row.get(name) is not None), [])
        self.column = list(column) if isinstance(column, (list, tuple)) else [column]
        self.used, self.own = 0, False  # of the column, and images that parts bring themselves

    def of(self, part: Mapping[str, Any], where: str) -> ImageFile | None:
        """The image that a part of a turn is; None if it is none."""
        named = part.get("type") or ("text" if part.get("image") is None else "image")
        if named not in _KINDS:
            return None
        value = next((part[key] for key in _HOLDERS if part.get(key) is not None), None)
        if value is None:
            return self._next(where)
        self.own = True
        return self._read(value, where)

    def between(self, text: str, where: str) -> Iterator[dict[str, Any]]:
        """The parts of a text, where it refers to images of the row's column."""
        pieces = text.split(PLACEHOLDER) if self.column else [text]
        for n, piece in enumerate(pieces):
            if n:
                yield {"type": "image", "image": self._next(where)}
            if piece:
                yield {"type": "text", "text": piece}

    def first(self) -> list[dict[str, Any]]:
        """All images of the column as parts, if turns neither refer to any nor have their own.

        Raises:
            InputError: turns referred to some of them.
        """
        if self.used and self.used < len(self.column):
            raise InputError(
                f"{self.where} has {len(self.column)} images and its turns refer to {self.used}; "
                f"write {PLACEHOLDER} where each belongs"
            )
        parts = []
        while not self.own and self.used < len(self.column):
            parts.append({"type": "image", "image": self._next(self.where)})
        return parts

    def _next(self, where: str) -> ImageFile:
        if self.used == len(self.column):
            has = f"the row has {len(self.column)}" if self.column else "the row has none"
            raise InputError(
                f"{where} refers to image {self.used + 1}, and {has}; give it in the part, or in "
                "the column `images`"
            )
        self.used += 1
        return self._read(self.column[self.used - 1], where)

    def _read(self, value: Any, where: str) -> ImageFile:
        """An image in one of the forms above."""
        if isinstance(value, (bytes, bytearray)):
            return bytes(value)
        if isinstance(value, Mapping):
            inner = next((value[k] for k in ("bytes", "url", "path", "data") if value.get(k)), None)
            if inner is not None:
                return self._read(inner, where)
        if isinstance(value, str):
            return self._named(value, where)
        if isinstance(value, Path):
            return self._named(str(value), where)
        if hasattr(value, "save") and hasattr(value, "convert"):  # PIL's
            content = io.BytesIO()
            value.convert("RGB").save(content, "PNG")
            return content.getvalue()
        raise InputError(
            f"{where} has an image of no form that sleb reads ({type(value).__name__}); give the "
            "path of a file, or a data: URL"
        )

    def _named(self, name: str, where: str) -> ImageFile:
        """An image by its path or URL, or in base64."""
        url = urlparse(name[:4096])
        if url.scheme in ("http", "https"):
            raise InputError(
                f"{where} has an image on the web ({name[:80]}), and sleb fetches none: download "
                "it, and give its path"
            )
        if url.scheme == "data":
            return _decoded(name.partition(",")[2], where)
        path = self.folder / (unquote(url.path) if url.scheme == "file" else name)
        if os.path.isfile(path):
            return path
        if len(name) > 64 and len(name) % 4 == 0 and not {*name[:64]} & {*".\\: "}:
            return _decoded(name, where)
        raise InputError(f"{where}: there is no image {path}; correct its path")


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{where} has an image that is not base64; correct it") from None
