"""Weights of safetensors files read straight into pinned memory, in several places at a time.

From there a GPU copies them while it computes. Reading through a memory map, as accelerate's maps
of weights do, faults page by page on one thread, which is slower than the disk and much slower
than the page cache.
"""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sleb.checkpoints.checkpoint import TORCH_DTYPES, TensorInfo, read_shard
from sleb.core.errors import DataError

THREADS = 8
PIECE = 2**25  # bytes of one read


@dataclass(frozen=True, kw_only=True)
class ShardSlice:
    """A tensor in a file, and the dtype that it is wanted in."""

    file: Path
    info: TensorInfo
    dtype: torch.dtype


class Files:
    """Reads tensors out of safetensors files, whose heads it knows."""

    def __init__(self) -> None:
        self._heads: dict[Path, dict[str, TensorInfo]] = {}
        self._pool = ThreadPoolExecutor(THREADS, "sleb-files")

    def stored(self, weights: Any, name: str) -> ShardSlice | None:
        """Where accelerate's map of weights has ``name``; None if not in a safetensors file."""
        from accelerate.utils import (  # type: ignore[import-untyped]
            OffloadedWeightsLoader,
            PrefixedDataset,
        )

        while not isinstance(weights, OffloadedWeightsLoader):
            if isinstance(weights, PrefixedDataset):
                weights, name = weights.dataset, f"{weights.prefix}{name}"
            elif isinstance(weights, ChainMap):
                weights = next((m for m in weights.maps if name in m), None)
            else:
                return None
        place = weights.index.get(name, {})
        if name in weights.state_dict or "safetensors_file" not in place:
            return None
        file = Path(place["safetensors_file"])
        if file not in self._heads:
            self._heads[file] = read_shard(file)[0]
        info = self._heads[file][place.get("weight_name", name)]
        if info.dtype not in TORCH_DTYPES:
            return None
        dtype = getattr(torch, place.get("dtype", TORCH_DTYPES[info.dtype]))
        return ShardSlice(file=file, info=info, dtype=dtype)

    def read(self, places: Iterable[ShardSlice], *, pinned: bool) -> list[Tensor]:
        """The tensors as they are stored, on the CPU.

        Raises:
            DataError: a file ends before its tensor does.
            OSError: a file cannot be read.
        """
        tensors, works = [], []
        for place in places:
            room = torch.empty(place.info.nbytes, dtype=torch.uint8, pin_memory=pinned)
            view = memoryview(room.numpy())  # type: ignore[arg-type]
            for at in range(0, len(view), PIECE):
                piece = view[at : at + PIECE]
                works.append(self._pool.submit(_fill, place.file, place.info.start + at, piece))
            dtype = getattr(torch, TORCH_DTYPES[place.info.dtype])
            tensors.append(room.view(dtype).view(place.info.shape))
        for work in works:
            work.result()
        return tensors


def _fill(file: Path, at: int, piece: memoryview) -> None:
    with open(file, "rb", buffering=0) as stream:
        while piece:
            got = os.preadv(stream.fileno(), [piece], at)
            if not got:
                raise DataError(f"{file} is shorter than its head says: fetch it again")
            piece, at = piece[got:], at + got
