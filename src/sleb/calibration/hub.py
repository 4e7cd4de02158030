"""Rows of a dataset on the Hugging Face hub, streamed, so that only what is used is fetched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from sleb.core.errors import SAID, InputError, ResourceError, map_exceptions


def hub_rows(location: str) -> Iterator[dict[str, Any]]:
    """Rows of ``DATASET[/CONFIG]:SPLIT``; DATASET may be a local folder that ``datasets`` reads.

    A split may be a slice such as ``train[:1000]``, which is downloaded whole.

    Raises:
        InputError: not of this form, no such dataset, config or split, or no ``datasets``.
        ResourceError: the hub cannot be reached.
    """
    dataset, _, split = location.partition(":")
    if not dataset or not split:
        raise InputError(
            f"hub:{location} names no split; write hub:DATASET[/CONFIG]:SPLIT, "
            "for example hub:wikitext/wikitext-2-raw-v1:train"
        )
    with _hub_errors(location):
        yield from _open(dataset, split)


def _open(dataset: str, split: str) -> Any:
    try:
        from datasets import load_dataset  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise InputError("hub: needs the datasets library: pip install datasets") from None
    failures: list[OSError] = []
    for path, config in _readings(dataset):
        try:
            return load_dataset(path, config, split=split, streaming="[" not in split)
        except (FileNotFoundError, ConnectionError) as error:
            failures.append(error)
    raise failures[0]


def _readings(dataset: str) -> list[tuple[str, str | None]]:
    """What ``dataset`` can mean, as (path, config): ``a/b`` is a's dataset b, or a's config b."""
    if os.path.isdir(dataset) or dataset.startswith(("/", ".")):
        return [(dataset, None)]
    first, *rest = dataset.split("/", 2)
    if len(rest) == 2:
        return [(f"{first}/{rest[0]}", rest[1])]
    return [(dataset, None), (first, rest[0])] if rest else [(dataset, None)]


def _hub_errors(location: str) -> contextlib.AbstractContextManager[None]:
    """One line for whatever the client libraries raise; their transports' errors share no base."""
    unknown = (
        f"hub:{location} was not found ({SAID}); check the name, and for a private dataset log in "
        "with: hf auth login"
    )
    lost = (
        f"hub:{location} cannot be fetched ({SAID}); check the network, or give a local .jsonl or "
        ".parquet file"
    )
    return map_exceptions(
        (FileNotFoundError, InputError, unknown),
        ((ValueError, RuntimeError), InputError, f"hub:{location} cannot be used: {SAID}"),
        (Exception, ResourceError, lost),
    )
