"""What is asked of logits, without a row of them in memory: for a CPU.

With a large vocabulary a row of logits is many times what it is computed from, and it takes longer
to write it to memory and to read it again, pass by pass, than to compute it. Here the head's
product is taken in tiles that stay in the cache. Sums of exponentials are kept of each tile, below
its own largest logit, and put together in the end (Milakov and Gimelshein, 1805.02867).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

ROWS, COLUMNS = 512, 512
"""Of a tile: a megabyte in float32."""
LOG2_E = math.log2(math.e)


@torch.inference_mode()
def plain_head(network: Any, logits: Callable[[], Tensor] | None = None) -> nn.Linear | None:
    """The output head of a model on a CPU, where its weights are at hand and logits are its product
    with what it is given and nothing else; None where they are scaled, capped or computed in
    another way. Found by ``logits`` of a few positions, by default a forward pass."""
    head = network.get_output_embeddings()
    if type(head) is not nn.Linear or type(head.weight.data) is not Tensor:
        return None
    if head.weight.device.type != "cpu":
        return None
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, args, out: seen.append(out))
    ids = torch.zeros((1, 2), dtype=torch.long)
    try:
        own = logits() if logits else network(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return head if len(seen) == 1 and torch.equal(seen[0], own) else None


def tiles(head: nn.Linear, given: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Logits of ``given`` [N, D] as tiles [N, C] in float32, each with its first column."""
    for start in range(0, head.out_features, COLUMNS):
        columns = slice(start, start + COLUMNS)
        bias = None if head.bias is None else head.bias[columns]
        yield start, linear(given, head.weight[columns], bias).float()


def likeliest(head: nn.Linear, given: Tensor) -> Tensor:
    """Where the largest logit is [N], the first of equal ones. given [N, D]."""
    best = _Largest(len(given))
    for start, tile in tiles(head, given):
        best.see(tile, start, tile.amax(1))
    return best.at


def sampled(head: nn.Linear, given: Tensor, heat: Tensor, never: list[int], room: Tensor) -> Tensor:
    """Tokens [N], each by its probability at temperature ``heat`` [N, 1], none of ``never``: first
    a tile, and then a token of it. given [N, D]; ``room`` [N, tiles, C] holds exponentials."""
    tops, sums = [], []
    for k, (start, tile) in enumerate(tiles(head, given)):
        tile.div_(heat)
        for token in never:
            if 0 <= token - start < tile.shape[1]:
                tile[:, token - start] = -math.inf
        width = tile.shape[1]
        top, below = _exponentials(tile, room[:, k, :width])
        if width < COLUMNS:
            room[:, k, width:] = 0
        tops.append(top)
        sums.append(below.sum(1))
    top = torch.stack(tops, 1)
    share = torch.stack(sums, 1) * (top - top.amax(1, keepdim=True)).exp()
    draw = torch.rand(2, len(given), 1)
    which = drawn(share, draw[0])
    inside = room[torch.arange(len(given)), which]
    return which * COLUMNS + drawn(inside, draw[1])


def room_for(head: nn.Linear, n: int) -> Tensor:
    """What :func:`sampled` needs for ``n`` rows."""
    return torch.empty(n, -(-head.out_features // COLUMNS), COLUMNS)


def drawn(share: Tensor, draw: Tensor) -> Tensor:
    """By shares [N, K] one of K for each row, with random numbers [N, 1]."""
    up_to = share.cumsum(1)
    found = torch.searchsorted(up_to, draw * up_to[:, -1:], right=True)
    return found[:, 0].clamp_max(share.shape[1] - 1)


def _exponentials(tile: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest of each row [N], and exponentials below it [N, C], in ``out``."""
    top = tile.amax(1, keepdim=True).clamp_min(torch.finfo(tile.dtype).min)
    # exp2 is much faster than exp
    return top[:, 0], torch.add(top * -LOG2_E, tile, alpha=LOG2_E, out=out).exp2_()


class _Largest:
    """The largest of each of ``n`` rows so far, and where it is."""

    def __init__(self, n: int) -> None:
        self.value = torch.full((n,), -math.inf)
        self.at = torch.zeros(n, dtype=torch.long)

    def see(self, tile: Tensor, start: int, top: Tensor) -> None:
        """A tile [N, C] of columns from ``start``, and its largest [N]."""
        # argmax is slow, and few tiles have a new largest
        rows = (top > self.value).nonzero()[:, 0]
        self.at[rows] = tile[rows].argmax(1) + start
        self.value = torch.maximum(self.value, top)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Of S sets and N positions: loss, and where it was asked for divergence from the dense model,
    in nats, and whether the likeliest token is the same. float32 [S, N] each."""

    nll: Tensor
    kl: Tensor | None = None
    same: Tensor | None = None


@dataclass(eq=False)
class _Row:
    """What is known of rows of logits [N, V], the more tiles of them were seen."""

    targets: Tensor
    largest: _Largest | None
    target: Tensor  # its logit
    tops: list[Tensor] = field(default_factory=list)  # of each tile: its largest logit [N]
    sums: list[Tensor] = field(default_factory=list)  # and its exponentials below that
    gaps: list[Tensor] = field(default_factory=list)  # the dense model's, times its lead

    @classmethod
    def of(cls, targets: Tensor, likeliest: bool) -> _Row:
        found = _Largest(len(targets)) if likeliest else None
        return cls(targets, found, torch.zeros(len(targets)))

    def see(self, tile: Tensor, start: int) -> Tensor:
        """A tile [N, C] of columns from ``start``. Gives its exponentials, below its largest."""
        top, below = _exponentials(tile)
        self.tops.append(top)
        self.sums.append(below.sum(1))
        place, width = self.targets - start, tile.shape[1]
        found = tile.gather(1, place.clamp(0, width - 1)[:, None])[:, 0]
        self.target = torch.where((place >= 0) & (place < width), found, self.target)
        if self.largest:
            self.largest.see(tile, start, top)
        return below

    def summed(self, of: list[Tensor]) -> Tensor:
        """Sums over tiles of what is below the largest logit of each, below that of all [N]."""
        tops = torch.stack(self.tops)
        return (torch.stack(of) * (tops - tops.amax(0)).exp()).sum(0)

    @property
    def log_sum(self) -> Tensor:
        """Logarithm of the sum of exponentials [N]."""
        return self.summed(self.sums).log() + torch.stack(self.tops).amax(0)


def predicted(
    head: nn.Linear,
    given: Tensor,
    targets: Tensor,
    dense: Tensor | None = None,
    *,
    same: bool = False,
) -> Predicted:
    """What logits would tell, of what ``head`` is given: [S, N, D] by S sets, and [N, D] by the
    dense model, which is then compared with, with ``same`` by the likeliest token too.
    targets [N]."""
    parts = []
    for a in range(0, given.shape[1], ROWS):
        rows = slice(a, a + ROWS)
        base = None if dense is None else dense[rows]
        parts.append(_rows(head, given[:, rows], targets[rows], base, same))
    return Predicted(
        nll=torch.cat([part.nll for part in parts], 1),
        kl=None if dense is None else torch.cat([p.kl for p in parts if p.kl is not None], 1),
        same=torch.cat([p.same for p in parts if p.same is not None], 1) if same else None,
    )


def _rows(
    head: nn.Linear, given: Tensor, targets: Tensor, dense: Tensor | None, same: bool
) -> Predicted:
    sets = [_Row.of(targets, same) for _ in given]
    if dense is None:
        for one, x in zip(sets, given, strict=True):
            for start, tile in tiles(head, x):
                one.see(tile, start)
        return Predicted(nll=torch.stack([one.log_sum - one.target for one in sets]))
    base = _Row.of(targets, same)
    unlike = [(one, x) for one, x in zip(sets, given, strict=True) if not torch.equal(x, dense)]
    for (start, known), *others in zip(
        tiles(head, dense), *(tiles(head, x) for _, x in unlike), strict=True
    ):
        share = base.see(known, start)
        for (one, _), (_, tile) in zip(unlike, others, strict=True):
            one.see(tile, start)
            one.gaps.append(torch.sub(known, tile, out=tile).mul_(share).sum(1))
    total, lost = base.summed(base.sums), base.log_sum - base.target
    nll, kl, agree = [lost] * len(sets), [torch.zeros_like(lost)] * len(sets), []
    for k, one in enumerate(sets):
        if one.gaps:
            nll[k] = one.log_sum - one.target
            kl[k] = base.summed(one.gaps) / total - base.log_sum + one.log_sum
        if one.largest and base.largest:
            agree.append((one.largest.at == base.largest.at).float())
            if not one.gaps:  # it is the dense model
                agree[-1] = torch.ones_like(lost)
    return Predicted(
        nll=torch.stack(nll), kl=torch.stack(kl), same=torch.stack(agree) if same else None
    )
