"""Rows with images as windows of token ids, and such windows as what a model takes.

A window has the model's own tokens, made by the checkpoint's processor, but for the places that
images take: there is a negative number, a hash of the row's text and images, in place of the id of
the processor's placeholder. So windows of texts and of images are tensors of one kind.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sleb.calibration.row_images import ImageFile
from sleb.calibration.rows import Chat
from sleb.core.errors import SAID, InputError, UnsupportedModel, map_exceptions


class Images:
    """The rows with images that one model is given. ``processor()`` is the checkpoint's, or raises
    why there is none; ``placeholder`` is the id that embeddings of images replace, and ``longest``
    the most tokens that the model reads.
    """

    def __init__(self, processor: Callable[[], Any], placeholder: int, longest: int | None) -> None:
        self._open, self.placeholder, self.longest = processor, placeholder, longest
        self._rows: dict[int, Chat] = {}

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's.

        Raises:
            InputError: there is none, or it needs a package that is not installed.
            UnsupportedModel: images cannot go into this model.
        """
        return self._open()

    def read(self, chat: Chat) -> tuple[Tensor, Tensor]:
        """The window of a chat with images: ids [T], and which of them an assistant says [T].

        Raises:
            InputError: an image is not readable, the chat template does not show all images, or
                there are more tokens than the model reads; or see :attr:`processor`.
            UnsupportedModel: see :attr:`processor`.
        """
        shown = chat.count(self.processor.image_token)
        if shown != len(chat.images):
            raise InputError(
                f"{chat.where} has {len(chat.images)} images, and its text, through the chat "
                f"template, {shown} times {self.processor.image_token!r}: leave the row out, or "
                "write what stands for an image nowhere else"
            )
        pixels = [_opened(image, chat.where) for image in chat.images]
        ids = self._processed(chat, pixels, chat.where)["input_ids"][0]
        if self.longest is not None and len(ids) > self.longest:
            raise InputError(
                f"{chat.where} has {len(ids)} tokens with its images, and the model reads "
                f"{self.longest}: leave it out, or give smaller images"
            )
        said = torch.zeros(len(ids), dtype=torch.bool)
        for span in chat.answers:
            first, last = (_shared(ids, self._before(chat, pixels, end)) for end in span)
            said[first:last] = True
        seen = ids == self.placeholder
        self._rows[key := row_key(chat)] = chat
        return ids.masked_fill(seen, key), said & ~seen

    def probe(self) -> Tensor | None:
        """A window [1, T] of a text around an image of noise; None where nothing makes one."""
        try:
            text = f"This is {self.processor.image_token} what I saw there."
            probe, content = Chat(text), io.BytesIO()
            _noise().save(content, "PNG")
            probe.answers, probe.images, probe.where = (), (content.getvalue(),), "the probe"
            return self.read(probe)[0][None]
        except (InputError, UnsupportedModel):  # no processor, say; that text goes in is known
            return None

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Arguments of the model's forward pass for windows. ids [B, T]; of windows with images,
        one at a time, and cut or padded behind as it may be.

        Raises:
            InputError: an image is not readable any more; or its tokens are cut off, as nothing
                behind it is scored.
        """
        if not with_images(ids):
            return {"input_ids": ids}
        keys = set(ids[ids < 0].tolist())
        if len(ids) != 1 or len(keys) != 1 or (key := keys.pop()) not in self._rows:
            raise ValueError("windows with images run one at a time, in the model that read them")
        chat = self._rows[key]
        pixels = [_opened(image, chat.where) for image in chat.images]
        given = self._processed(chat, pixels, chat.where)
        whole = given["input_ids"]
        if int((whole == self.placeholder).sum()) != int((ids < 0).sum()):
            raise InputError(f"{chat.where} ends with an image, of which nothing is said: drop it")
        known = {
            name: _fitted(value, ids.shape[1]) if value.shape == whole.shape else value
            for name, value in given.items()
            if isinstance(value, Tensor)
        }
        known.pop("attention_mask", None)  # padding is behind all that counts, as in texts
        return known | {"input_ids": ids.where(ids >= 0, self.placeholder)}

    def _before(self, chat: Chat, pixels: list[Any], end: int) -> Tensor:
        """The tokens of a chat's first ``end`` characters."""
        text = str(chat)[:end]
        shown = pixels[: text.count(self.processor.image_token)]
        ids: Tensor = self._processed(text, shown, chat.where)["input_ids"][0]
        return ids

    def _processed(self, text: str, pixels: list[Any], where: str) -> Any:
        failure = f"{where} does not go through the model's processor: {SAID}"
        with map_exceptions((Exception, InputError, failure)):  # code of each family's own
            return self.processor(
                text=[str(text)], images=[pixels] if pixels else None, return_tensors="pt"
            )


def _noise() -> Any:
    """An image of noise, always the same."""
    from PIL import Image

    numbers = torch.randint(
        0, 256, (224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Image.fromarray(numbers.numpy())


def with_images(ids: Tensor) -> bool:
    """Whether there are images among windows ids [N, T]."""
    return bool((ids < 0).any())


def row_key(chat: Chat) -> int:
    """A negative number that stands for a row."""
    found = hashlib.sha256(chat.encode())
    for image in chat.images:
        found.update(hashlib.sha256(_content(image)).digest())
    return -1 - (int.from_bytes(found.digest()[:8], "little") >> 1)


def _content(image: ImageFile) -> bytes:
    return image if isinstance(image, bytes) else image.read_bytes()


def _opened(image: ImageFile, where: str) -> Any:
    """An image as processors take it, as transformers opens it: upright, in RGB.

    Raises:
        InputError: it is none, or there is no Pillow.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise InputError(f"{where} has an image, which needs Pillow: pip install pillow") from None
    failure = f"{where} has an image that is not readable: {SAID}"
    with map_exceptions((Exception, InputError, failure)):  # of whatever format's reader
        found = ImageOps.exif_transpose(Image.open(io.BytesIO(_content(image))))
        return found.convert("RGB")


def _shared(ids: Tensor, other: Tensor) -> int:
    """How many tokens both begin with alike."""
    n = min(len(ids), len(other))
    differ = (ids[:n] != other[:n]).nonzero()
    return int(differ[0]) if len(differ) else n


def _fitted(values: Tensor, length: int) -> Tensor:
    """[1, T] of another length, zeros behind."""
    return torch.nn.functional.pad(values, (0, length - values.shape[1]))
