"""How alike the outputs of blocks are: the first of the method's three stages.

State 0 is the input of block 0 (the embedding) and state i + 1 the output of block i. Every
measure is a similarity: 1 for identical states, lower for less alike. One pass over the text; per
batch of windows only the states of that batch are held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sleb.calibration.windows import Windows
from sleb.core.errors import DataError
from sleb.core.progress import Progress, silent
from sleb.core.registry import Registry
from sleb.core.statistics import Values
from sleb.core.tabular import Points, Tabular
from sleb.models.load import LoadedModel
from sleb.models.stack import BlockStack
from sleb.selection.resources import batch_for

Measure = Callable[[Tensor, Tensor], Tensor]
"""``measure(a [A, N, D], b [B, N, D]) -> float32 [A, B, N]`` per token, or [A, B, 1] per window."""

MEASURES: Registry[Measure] = Registry("measure")


@MEASURES.register("cosine")
def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between two hidden states. SLEB metric 1; ShortGPT (2403.03853)."""
    unit_a, unit_b = (torch.nn.functional.normalize(x, dim=-1) for x in (a, b))
    dots = (unit_a.transpose(0, 1) @ unit_b.permute(1, 2, 0)).permute(1, 2, 0)  # [A, B, N]
    return dots.clamp(-1, 1)


@MEASURES.register("angular")
def angular(a: Tensor, b: Tensor) -> Tensor:
    """1 - angle / pi; the angular distance of Gromov et al. (2403.17887), turned round."""
    return 1 - torch.arccos(cosine(a, b)) / math.pi


@MEASURES.register("correlation")
def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation over the hidden dimensions: cosine after removing the mean."""
    return cosine(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True))


@MEASURES.register("relative-l2")
def relative_l2(a: Tensor, b: Tensor) -> Tensor:
    """1 - |a - b| / (|a| + |b|): also sees a change of length, which an angle does not."""
    norm = torch.linalg.vector_norm
    sizes = norm(a, dim=-1)[:, None] + norm(b, dim=-1)[None]  # [A, B, N]
    gap = torch.stack([norm(x[None] - b, dim=-1) for x in a])  # [A, B, N]
    alike: Tensor = 1 - gap / sizes.clamp_min(1e-30)
    return alike


@MEASURES.register("cka")
def cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear centred kernel alignment over a window's tokens (Kornblith et al., 1905.00414)."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    # Gram matrices over tokens, [*, N, N], as vectors: HSIC is their inner product
    gram_a, gram_b = (torch.bmm(x, x.transpose(1, 2)).flatten(1) for x in (a, b))
    unit_a, unit_b = (torch.nn.functional.normalize(g, dim=-1) for g in (gram_a, gram_b))
    return (unit_a @ unit_b.T).clamp(-1, 1)[..., None]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A mean over tokens, its spread over tokens, and its standard error over windows.

    The spread is null for a measure without per-token values (cka), the error for one window.
    """

    mean: float
    token_std: float | None
    window_se: float | None


@dataclass(frozen=True, kw_only=True)
class Similarity(Tabular):
    """Similarities of a model's states on some windows.

    ``blocks[i]``: block i's input and output. ``pairs[i][j]``: states i and j (state 0 is the
    embedding, state i + 1 block i's output). ``per_window`` [windows, blocks].
    """

    measure: str
    blocks: tuple[Spread, ...]
    pairs: tuple[tuple[Spread, ...], ...]
    per_window: Values

    def rows(self) -> list[dict[str, Any]]:
        """A row for each block."""
        return [{"block": i, **asdict(spread)} for i, spread in enumerate(self.blocks)]

    def drawn(self) -> Points:
        """By block, with two standard errors."""
        ends = [2 * (spread.window_se or 0.0) for spread in self.blocks]
        means = [spread.mean for spread in self.blocks]
        return Points(
            x=tuple(range(len(means))),
            y=tuple(means),
            low=tuple(mean - end for mean, end in zip(means, ends, strict=True)),
            high=tuple(mean + end for mean, end in zip(means, ends, strict=True)),
            x_label="block",
            y_label=f"similarity of input and output ({self.measure})",
        )

    def __str__(self) -> str:
        order = sorted(range(len(self.blocks)), key=lambda i: -self.blocks[i].mean)[:3]
        most = ", ".join(f"{i} ({self.blocks[i].mean:.3f})" for i in order)
        return f"{self.measure} similarity of {len(self.blocks)} blocks; most: {most}"

    def auto_threshold(self, candidates: Sequence[int], n: int) -> float:
        """The similarity of the last block in the more similar half of the candidates, or among
        their 2n most similar, whichever lets more through: enough choice for the loss to decide,
        without the blocks that plainly transform their input."""
        best = sorted((self.blocks[b].mean for b in candidates), reverse=True)
        return best[min(len(best), max(2 * n, math.ceil(len(best) / 2))) - 1]


def measure_similarity(
    model: LoadedModel,
    windows: Windows,
    *,
    measure: str = "cosine",
    batch: int | None = None,
    progress: Progress = silent,
) -> Similarity:
    """Compare all states of ``model`` on ``windows``.

    Raises:
        InputError: unknown measure.
        DataError: a hidden state is NaN or infinite; the message names block and window.
    """
    compare = MEASURES[measure]
    stack, n, lengths = model.stack, len(windows.ids), windows.lengths
    batch = batch_for(stack, windows.ids, batch)
    per_token: list[Tensor] = []  # each [S, S]: sums of squares over a window's tokens
    per_window: list[Tensor] = []  # each [S, S]: means over a window's tokens
    with progress.stage("measuring similarity", n) as tick:
        for start in range(0, n, batch):
            states = _states(stack, windows.ids[start : start + batch], start)  # [S, B, T, D]
            for w in range(states.shape[1]):
                real = states[:, w, : lengths[start + w]]
                values = compare(real, real).double()
                per_window.append(values.mean(-1).cpu())
                per_token.append(values.square().mean(-1).cpu())
                tick()
    means = torch.stack(per_window).numpy()  # [W, S, S]
    squares = torch.stack(per_token).numpy().mean(0)
    mean = means.mean(0)
    std = None if measure == "cka" else np.sqrt(np.clip(squares - mean**2, 0, None))
    error = means.std(0, ddof=1) / math.sqrt(n) if n > 1 else None

    def spread(i: int, j: int) -> Spread:
        return Spread(
            mean=float(mean[i, j]),
            token_std=None if std is None else float(std[i, j]),
            window_se=None if error is None else float(error[i, j]),
        )

    states_n = mean.shape[0]
    return Similarity(
        measure=measure,
        blocks=tuple(spread(i, i + 1) for i in range(states_n - 1)),
        pairs=tuple(tuple(spread(i, j) for j in range(states_n)) for i in range(states_n)),
        per_window=np.stack([means[:, i, i + 1] for i in range(states_n - 1)], axis=1),
    )


@torch.inference_mode()
def _states(stack: BlockStack, ids: Tensor, first_window: int) -> Tensor:
    """Input of block 0 and output of every block. ids [B, T] -> float32 [blocks + 1, B, T, D]."""
    hidden, calls = stack.enter(ids)
    states = [hidden.float()]
    for i, call in enumerate(calls):
        with stack.holding(i, i + 1 if i + 1 < len(stack) else None):
            hidden = stack.run(i, hidden, call)
        states.append(hidden.float().to(states[0].device))
        if not torch.isfinite(states[-1]).all():
            bad = (~torch.isfinite(states[-1])).flatten(1).any(1).nonzero()[0].item()
            raise DataError(
                f"the output of block {i} is NaN or infinite on window {first_window + int(bad)}: "
                "try --dtype float32"
            )
    return torch.stack(states)
