"""Tiny vision-language models with the real processors of their families, and rows with images."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from conftest import byte_tokenizer
from wrappers import TEXT, TOWER, wrapper_folder
from zoo import randomize

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FIRST = 259
"""The id of the first token that is no byte: what stands for an image."""
VOCABULARY = {"vocab_size": 264}


def _tokenizer(**special: str) -> Any:
    backend = byte_tokenizer()._tokenizer
    kinds = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=special, **kinds
    )


def _gemma3() -> Any:
    return transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer=_tokenizer(image_token="<img>", boi_token="<boi>", eoi_token="<eoi>"),
        chat_template=TEMPLATE.replace("IMAGE", "<boi>"),
        image_seq_length=4,
    )


def _llava() -> Any:
    size = {"height": 28, "width": 28}
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size=size
        ),
        tokenizer=_tokenizer(image_token="<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )


class _OfImages:
    """Mixed into a processor: without what looks at videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
        self.image_token, self.video_token = "<|image_pad|>", None
        self.image_token_id, self.video_token_id = FIRST, None
        transformers.ProcessorMixin.__init__(
            self, image_processor, tokenizer, chat_template=chat_template
        )


class _Qwen2(_OfImages, transformers.Qwen2_5_VLProcessor):
    pass


class _Qwen3(_OfImages, transformers.Qwen3VLProcessor):
    pass


def _qwen(kind: Any) -> Any:
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 8 * 28 * 28}
    return kind(
        transformers.Qwen2VLImageProcessorPil(size=pixels),
        _tokenizer(image_token="<|image_pad|>"),
        TEMPLATE.replace("IMAGE", "(<|image_pad|>)"),
    )


_INDEX = {"image_token_index": FIRST, "text_config": VOCABULARY}
_TOKENS = ("image_token_id", "video_token_id")
_QWEN = {**VOCABULARY, "image_token_id": FIRST, "video_token_id": 263}
SEEING: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "gemma3": (_gemma3, _INDEX),
    "llava": (_llava, _INDEX),
    "qwen2_5_vl": (lambda: _qwen(_Qwen2), _QWEN),
    "qwen3_vl": (
        lambda: _qwen(_Qwen3),
        {"text_config": VOCABULARY, **{k: _QWEN[k] for k in _TOKENS}},
    ),
}
"""By name of ``wrappers.WRAPPERS``: the processor, and what its model's file says otherwise."""


def seeing_folder(name: str, folder: Path) -> tuple[Path, Any]:
    """A random vision-language model with its processor in the folder, and the processor."""
    make, changes = SEEING[name]
    wrapper_folder(name, folder, changes=changes)
    processor = make()
    processor.save_pretrained(folder)
    return folder, processor


def paligemma_folder(folder: Path) -> Path:
    """A random PaliGemma with its processor."""
    text = {"model_type": "gemma", **TEXT, **VOCABULARY}
    vision = {"model_type": "siglip_vision_model", **TOWER}
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=FIRST, projection_dim=32
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.PaliGemmaForConditionalGeneration._from_config(config).float()
        randomize(model)
    model.save_pretrained(folder)
    images = transformers.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    template = TEMPLATE.replace("IMAGE", "<image>")
    tokens = _tokenizer(image_token="<image>")
    processor = transformers.PaliGemmaProcessor(images, tokens, chat_template=template)
    processor.save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 40, height: int = 56) -> Image.Image:
    """A random image."""
    numbers = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


def saved(folder: Path, seed: int, **size: int) -> Path:
    """A random image as a file."""
    path = folder / f"{seed}.png"
    picture(seed, **size).save(path)
    return path


def data_url(path: Path) -> str:
    """A file as a data: URL."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def asked(*images: Any, question: str = "What is it?", answer: str = "A tree, I think.") -> Any:
    """A row of one question about images, and its answer."""
    shown = [{"type": "image", "image": image} for image in images]
    return {
        "messages": [
            {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    }


def rows_file(path: Path, rows: list[Any]) -> str:
    """Rows as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
