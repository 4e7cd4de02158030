"""Byte tokenizers and short-cuts for the tests of calibration text."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sleb.calibration import parse_source, read_documents
from sleb.calibration.windows import Windows, load_windows
from sleb.core.errors import InputError

CHAT = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
BOS = 256
ENDS = {"bos": "<s> $A", "both": "<s> $A </s>", "eos": "$A </s>", "none": "$A"}


def tokenizer(ends: str = "none", **options: Any) -> PreTrainedTokenizerFast:
    """One token a byte, so that windows can be read back as text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=ENDS[ends], special_tokens=[("<s>", BOS), ("</s>", BOS + 1)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **options
    )


def letters(n: int, start: int = 0) -> str:
    """``n`` bytes in which every run of ten is different."""
    return "".join(f"{i:09d} " for i in range(start, start + n // 10 + 1))[:n]


def load(
    *specs: str, windows: int | str | None = None, length: int = 10, seed: int = 0, **options: Any
) -> tuple[Windows, Windows | None]:
    """``load_windows`` with a byte tokenizer and small windows."""
    ends = options.pop("ends", "none")
    return load_windows(
        tokenizer(ends), specs, windows=windows, length=length, seed=seed, **options
    )


def texts(windows: Windows) -> list[str]:
    """The windows as text."""
    return [str(tokenizer().decode(row)) for row in windows.ids]


Write = Callable[[str, str], str]


def documents(spec: str, **options: Any) -> list[str]:
    """What a spec holds."""
    return read_documents(parse_source(spec), tokenizer(**options))


def message(spec: str, **options: Any) -> str:
    """The error of reading a spec, which must be one line."""
    with pytest.raises(InputError) as caught:
        documents(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
