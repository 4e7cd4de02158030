"""The user's own prompts, as two models read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sleb.calibration.prompts import Prompt, Read, read_as
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import InputError
from sleb.core.progress import Progress, silent
from sleb.models.load import load_config, load_tokenizer
from sleb.models.source import resolve
from sleb.models.stack import decoder_config


def read_alike(
    refs: tuple[str | Path, str | Path],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> list[Read]:
    """The prompts as both models read them. Loads no weights, so mistakes in either model and in
    any prompt are found before the first answer.

    Raises:
        InputError: see :func:`read_as`; the tokenizers differ, or a prompt with its answer is
            longer than a model reads.
        UnsupportedModel, DataError, ResourceError: not a model, or a corrupt one.
    """
    folders = [resolve(ref, progress).path for ref in refs]
    for folder in folders:
        Checkpoint.open(folder)
    configs = [load_config(path, trust_remote_code=trust_remote_code) for path in folders]
    tokenizers = [load_tokenizer(path, trust_remote_code=trust_remote_code) for path in folders]
    ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if ours != theirs:
        raise InputError(
            f"{refs[0]} and {refs[1]} have different tokenizers (of {len(ours)} and {len(theirs)} "
            "tokens); give a checkpoint that was made from this model"
        )
    read, again = (
        read_as(*each) for each in zip(tokenizers, (prompts, prompts), refs, strict=True)
    )
    limits = [getattr(decoder_config(c), "max_position_embeddings", None) for c in configs]
    room = min((limit for limit in limits if limit), default=None)
    for prompt, one, other in zip(prompts, read, again, strict=True):
        if one != other:
            raise InputError(
                f"{refs[0]} and {refs[1]} read prompt '{prompt.id}' differently; give both the "
                "same chat template and tokenizer settings"
            )
        if room is not None and len(one.ids) + max_new_tokens > room:
            raise InputError(
                f"prompt '{prompt.id}' takes {len(one.ids)} of the {room} tokens that the model "
                f"reads, and --new-tokens {max_new_tokens} do not fit; shorten it, or lower that"
            )
    return read
