"""What makes a block redundant: a number that is lower the better the block can be spared.

A *token metric* looks at the next-token logits of a model with blocks removed and gives one value
per predicted token; search averages it. A *profile metric* ranks all blocks from one pass over
the dense model. To add one, register it here: see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sleb.core.registry import Registry
from sleb.models.heads import predicted

CACHE_BYTES = 2 * 2**20


@dataclass(frozen=True, kw_only=True)
class TokenMetric:
    """Value per predicted token from logits, or M of them.

    ``tokens(logits [N, V], targets [N], dense logits [N, V] or None) -> float32 [N]`` or [N, M].
    ``window(values [B, P] or [B, P, M], scored [B, P]) -> [B]`` or [B, M'] makes one of the scored
    tokens' values, by default their mean. ``of(head, given [S, N, D], targets [N], dense given
    [N, D] or None) -> float32 [S, N]`` or [S, N, M] is the same for S sets from what the head is
    given, on a CPU many times as fast; without it ``tokens`` does everything.
    """

    name: str
    unit: str
    tokens: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    needs_dense: bool = False
    window: Callable[[Tensor, Tensor], Tensor] | None = None
    of: Callable[[nn.Linear, Tensor, Tensor, Tensor | None], Tensor] | None = None

    def reduced(self, values: Tensor, scored: Tensor | None) -> Tensor:
        """One value, or several, of each window, float64: of all tokens without ``scored``."""
        values = values.double()
        if scored is None and self.window is None:
            return values.mean(1)
        if scored is None:
            scored = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        return (self.window or mean_of)(values, scored)


def mean_of(values: Tensor, scored: Tensor) -> Tensor:
    """Means over the scored tokens. values [B, P] or [B, P, M], scored [B, P] -> [B] or [B, M]."""
    counts = scored.to(values)
    return torch.einsum("bp...,bp->b...", values, counts / counts.sum(1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A user's choice of ``--metric``: what is measured, and whether it is measured again after
    every removal (``greedy``) or once (``one-shot``). ``token`` is None for a profile metric.
    ``repaired``: measured after a repair of the cut; see ``sleb.repairs.scoring``. ``answers``:
    measured on the dense model's answers to prompts in place of texts."""

    token: TokenMetric | None
    unit: str
    strategy: str
    source: str
    repaired: bool = False
    answers: bool = False


METRICS: Registry[Metric] = Registry("metric")


def token_nll(logits: Tensor, targets: Tensor, dense: Tensor | None = None) -> Tensor:
    """Negative log-likelihood, nats. logits [N, V], targets [N] -> float32 [N]."""

    def nll(rows: slice) -> Tensor:
        return cross_entropy(logits[rows].float(), targets[rows], reduction="none")

    return _by_rows(nll, logits)


def token_kl(logits: Tensor, targets: Tensor, dense: Tensor | None = None) -> Tensor:
    """KL(dense || pruned) of the next-token distributions, nats. [N, V], [N, V] -> float32 [N]."""
    assert dense is not None

    def kl(rows: slice) -> Tensor:
        p = torch.log_softmax(dense[rows].float(), -1)
        q = torch.log_softmax(logits[rows].float(), -1)
        return (p.exp() * (p - q)).sum(-1)

    return _by_rows(kl, logits)


def token_quality(logits: Tensor, targets: Tensor, dense: Tensor | None = None) -> Tensor:
    """Loss and divergence in nats, and whether the likeliest token is the dense model's.
    [N, V], [N], [N, V] -> float32 [N, 3]."""
    assert dense is not None
    same = (logits.argmax(-1) == dense.argmax(-1)).float()
    return torch.stack((token_nll(logits, targets), token_kl(logits, targets, dense), same), -1)


def nll_of(head: nn.Linear, given: Tensor, targets: Tensor, dense: Tensor | None = None) -> Tensor:
    """:func:`token_nll` of S sets. [S, N, D], [N] -> float32 [S, N]."""
    rows = predicted(head, given.flatten(0, 1)[None], targets.repeat(len(given))).nll
    return rows.view(given.shape[:2])


def kl_of(head: nn.Linear, given: Tensor, targets: Tensor, dense: Tensor | None = None) -> Tensor:
    """:func:`token_kl` of S sets. [S, N, D], [N], [N, D] -> float32 [S, N]."""
    found = predicted(head, given, targets, dense).kl
    assert found is not None
    return found


def quality_of(
    head: nn.Linear, given: Tensor, targets: Tensor, dense: Tensor | None = None
) -> Tensor:
    """:func:`token_quality` of S sets. [S, N, D], [N], [N, D] -> float32 [S, N, 3]."""
    found = predicted(head, given, targets, dense, same=True)
    assert found.kl is not None
    assert found.same is not None
    return torch.stack((found.nll, found.kl, found.same), -1)


def _by_rows(value: Callable[[slice], Tensor], logits: Tensor) -> Tensor:
    """``value`` of all rows of logits [N, V]; on a CPU a few rows at a time, so that float32
    intermediates stay in its cache."""
    n, vocab = logits.shape
    rows = max(1, CACHE_BYTES // (4 * vocab)) if logits.device.type == "cpu" else n
    return torch.cat([value(slice(a, a + rows)) for a in range(0, n, rows)])


def token_missed(logits: Tensor, targets: Tensor, dense: Tensor | None = None) -> Tensor:
    """1 where the likeliest token is not the target. [N, V], [N] -> float32 [N]."""
    return (logits.argmax(-1) != targets).float()


MISSED = TokenMetric(name="missed", unit="share", tokens=token_missed)
NLL = TokenMetric(name="loss", unit="nats/token", tokens=token_nll, of=nll_of)
KL = TokenMetric(name="kl", unit="nats/token", tokens=token_kl, needs_dense=True, of=kl_of)
QUALITY = TokenMetric(
    name="quality",
    unit="nats/token, nats/token, share",
    tokens=token_quality,
    needs_dense=True,
    of=quality_of,
)

METRICS.register("loss")(
    Metric(token=NLL, unit=NLL.unit, strategy="greedy", source="SLEB (2402.09025), metric 3")
)
METRICS.register("one-shot-loss")(
    Metric(token=NLL, unit=NLL.unit, strategy="one-shot", source="SLEB (2402.09025), metric 2")
)
METRICS.register("kl")(
    Metric(token=KL, unit=KL.unit, strategy="greedy", source="divergence from the dense model")
)
METRICS.register("repaired-loss")(
    Metric(
        token=NLL,
        unit=NLL.unit,
        strategy="greedy",
        source="SLEB's metric 3, of the cut after its closed-form repair",
        repaired=True,
    )
)
METRICS.register("cosine")(
    Metric(
        token=None,
        unit="1 - cosine",
        strategy="one-shot",
        source="SLEB (2402.09025), metric 1; Block Influence of ShortGPT (2403.03853)",
    )
)
METRICS.register("answers")(
    Metric(
        token=KL,
        unit=KL.unit,
        strategy="greedy",
        source="divergence from the dense model on its own answers to prompts",
        answers=True,
    )
)
