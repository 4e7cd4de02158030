"""How images get into a model: its checkpoint's processor, or why they cannot."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from sleb.calibration.images import Images
from sleb.core.errors import SAID, InputError, UnsupportedModel, map_exceptions
from sleb.models.source import ModelSource, quiet_transformers
from sleb.models.stack import BlockStack, decoder_config


def images_of(stack: BlockStack, source: ModelSource, processor: Any = None) -> Images:
    """What reads rows with images for the model of ``stack``; nothing is loaded before there is
    one. ``processor``: the model's own, if that is at hand."""
    config: Any = stack.model.config
    ids = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    placeholder = next((found for found in ids if found is not None), -1)

    def found() -> Any:
        _refuse_images(stack, source, placeholder)
        loaded = processor or _processor(source.path)
        if getattr(loaded, "image_token", None) is None:
            raise UnsupportedModel(
                f"{source.ref}: {type(loaded).__name__} does not say what stands for an image in a "
                "text: leave out rows with images"
            )
        return loaded

    return Images(found, placeholder, stack.max_length)


def _refuse_images(stack: BlockStack, source: ModelSource, placeholder: int) -> None:
    """
    Raises:
        UnsupportedModel: the model takes no images, or in blocks of their own.
    """
    advice = "leave out rows with images"
    if source.is_gguf:
        raise UnsupportedModel(
            f"{source.ref}: a .gguf file has the text decoder alone, without what looks at images: "
            f"{advice}, or give the model's safetensors checkpoint"
        )
    if placeholder < 0 or "pixel_values" not in inspect.signature(stack.model.forward).parameters:
        raise UnsupportedModel(
            f"{source.ref} is a {stack.name}, which reads text alone: {advice}, or give a "
            "vision-language model"
        )
    if getattr(decoder_config(stack.model.config), "cross_attention_layers", None):
        raise UnsupportedModel(
            f"{source.ref}: blocks of their own attend to images, and sleb runs the others alone: "
            f"{advice}"
        )


def _processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    failures = map_exceptions(
        (ImportError, InputError, f"{folder}: images need a package that is missing: {SAID}"),
        (Exception, InputError, f"{folder} has no processor for images that loads: {SAID}"),
    )
    with quiet_transformers(), failures:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)
