"""A causal LM in two halves that gradients flow through, and the divergence of two such models.

Logits are the largest tensors of a training step: tokens times vocabulary. So the head runs on a
few positions at a time, the gradient of its input is kept, and the logits are let go; what runs
before the head then gets all these gradients at once. The result is that of one full pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from sleb.core.errors import UnsupportedModel
from sleb.models.stack import BlockStack

__all__ = ["SplitModel", "backward", "divergence", "pieces"]

PIECE_BYTES = {"cuda": 512 * 2**20, "cpu": 32 * 2**20}
"""Float32 logits of one piece, at most. Four or five tensors of that size exist at a time."""


class _Reached(Exception):
    """Ends a forward pass before the head; never leaves this module."""


class SplitModel:
    """``model`` as what comes before its output head, and the head with all that follows it.

    ``autocast``: dtype that the products are computed in, where it is not the weights' own.

    Raises:
        UnsupportedModel: the model names no output head, or its halves make other logits than
            the whole.
    """

    def __init__(self, model: nn.Module, *, autocast: torch.dtype | None = None) -> None:
        self.model, self.stack, self.dtype = model, BlockStack(model), autocast
        head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise UnsupportedModel(
                f"{self.stack.name} names no output head, so it cannot be healed"
            )
        self.head = head
        self.vocabulary = self._check()

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.stack.input_device

    def features(self, ids: Tensor) -> Tensor:
        """What the head is given. ids [B, T] -> [B, T, D]."""
        found: list[Tensor] = []

        def reach(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            found.append(given[0])
            raise _Reached

        handle = self.head.register_forward_pre_hook(reach)
        try:
            with self._computing():
                self.model(input_ids=ids, use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        return found[0]

    def logits(self, features: Tensor) -> Tensor:
        """Head, scaling and caps. features [B, T, D] -> logits [B, T, V]; any positions will do."""
        handle = self.head.register_forward_pre_hook(lambda *_: (features,))
        ids = torch.zeros(features.shape[:2], dtype=torch.long, device=features.device)
        try:
            with self._computing(), self.stack.bypassed(range(len(self.stack))):
                logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        return logits

    def _computing(self) -> Any:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    @torch.no_grad()
    def _check(self) -> int:
        """Size of the vocabulary, V, once the halves are known to be the whole."""
        ids = torch.arange(8, device=self.device)[None]
        with self._computing():
            whole = self.model(input_ids=ids, use_cache=False).logits
        halves = self.logits(self.features(ids))
        limit = whole.abs().max() * (1e-4 if whole.dtype == torch.float32 else 2e-2)
        if halves.shape != whole.shape or not (halves - whole).abs().max() <= limit:
            raise UnsupportedModel(
                f"{self.stack.name} cannot be run in two halves, so it cannot be healed"
            )
        return int(whole.shape[-1])


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over positions of KL(teacher || student), nats. Logits [..., V] twice -> scalar."""
    p, q = (torch.log_softmax(x.float(), -1) for x in (teacher, student))
    return kl_div(q, p, reduction="sum", log_target=True)


def pieces(ids: Tensor, vocabulary: int) -> Iterator[slice]:
    """Slices of the positions of ids [B, T] whose logits are small enough to be held."""
    limit = PIECE_BYTES.get(ids.device.type, PIECE_BYTES["cpu"])
    step = max(1, limit // (4 * vocabulary * len(ids)))
    for start in range(0, ids.shape[1], step):
        yield slice(start, min(start + step, ids.shape[1]))


def backward(student: SplitModel, teacher: SplitModel, ids: Tensor, scale: float) -> Tensor:
    """Add the gradients of ``scale`` times the summed divergence on ids [B, T] to the student's
    parameters; return the unscaled sum."""
    with torch.no_grad():
        known = teacher.features(ids)
    features = student.features(ids)
    total, gradients = features.new_zeros((), dtype=torch.float32), []
    for rows in pieces(ids, teacher.vocabulary):
        piece = features[:, rows].detach().requires_grad_()
        with torch.no_grad():
            wanted = teacher.logits(known[:, rows])
        loss = divergence(student.logits(piece), wanted)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        assert piece.grad is not None
        gradients.append(piece.grad)
        total += loss.detach()
    features.backward(torch.cat(gradients, 1))  # type: ignore[no-untyped-call]
    return total
