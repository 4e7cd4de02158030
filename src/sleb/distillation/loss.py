"""Chunked KL between two causal LMs, for training and for validation.

Logits are the largest tensors of a training step: tokens times vocabulary. So the output head runs
on a few positions at a time, the gradient of its input is kept and the logits are freed; what runs
before the head then gets all these gradients at once. The result is that of one full pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from sleb.calibration.windows import Windows
from sleb.core.errors import DataError, UnsupportedModel
from sleb.core.statistics import Values
from sleb.models.stack import BlockStack
from sleb.selection.metrics import token_nll, token_quality
from sleb.surgery.gates import logit_tolerance

CHUNK_BYTES = {"cuda": 512 * 2**20, "cpu": 32 * 2**20}
"""Float32 logits of one chunk, at most. Four or five tensors of that size exist at a time."""


class _Reached(Exception):
    """Ends a forward pass before the head; never leaves this module."""


class SplitModel:
    """``model`` split before its output head: the features that the head is given, and the logits
    that it and all that follows make of them.

    ``autocast``: dtype that the products are computed in, where it is not the weights' own.

    Raises:
        UnsupportedModel: the model names no output head, or its parts make other logits than the
            whole.
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
        """Input of the head. ids [B, T] -> [B, T, D]."""
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
        """Size of the vocabulary, V, once the parts are known to be the whole."""
        ids = torch.arange(8, device=self.device)[None]
        with self._computing():
            whole = self.model(input_ids=ids, use_cache=False).logits
        if not agree(self.logits(self.features(ids)), whole):
            raise UnsupportedModel(
                f"{self.stack.name} cannot be split before its head, so it cannot be healed"
            )
        return int(whole.shape[-1])


def agree(found: Tensor, wanted: Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    limit = wanted.abs().max() * logit_tolerance(wanted.dtype)
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= limit)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over positions of KL(teacher || student), nats. Logits [..., V] twice -> scalar."""
    p, q = (torch.log_softmax(x.float(), -1) for x in (teacher, student))
    return kl_div(q, p, reduction="sum", log_target=True)


def chunks(ids: Tensor, vocabulary: int) -> Iterator[slice]:
    """Slices of the positions of ids [B, T] whose logits are small enough to be held."""
    limit = CHUNK_BYTES.get(ids.device.type, CHUNK_BYTES["cpu"])
    step = max(1, limit // (4 * vocabulary * len(ids)))
    for start in range(0, ids.shape[1], step):
        yield slice(start, min(start + step, ids.shape[1]))


def backward_kl(student: SplitModel, teacher: SplitModel, ids: Tensor, scale: float) -> Tensor:
    """Add the gradients of ``scale`` times the summed KL on ids [B, T] to the student's parameters;
    return the unscaled sum."""
    with torch.no_grad():
        known = teacher.features(ids)
    features = student.features(ids)
    total, gradients = features.new_zeros((), dtype=torch.float32), []
    for rows in chunks(ids, teacher.vocabulary):
        chunk = features[:, rows].detach().requires_grad_()
        with torch.no_grad():
            wanted = teacher.logits(known[:, rows])
        loss = kl(student.logits(chunk), wanted)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        assert chunk.grad is not None
        gradients.append(chunk.grad)
        total += loss.detach()
    features.backward(torch.cat(gradients, 1))  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def validate(student: SplitModel, teacher: SplitModel, windows: Windows, at_once: int) -> Values:
    """Per window the teacher's loss, the student's, and KL(teacher || student), nats/token, means
    over the predicted tokens. Returns float64 [N, 3].

    Raises:
        DataError: one of them is NaN or infinite.
    """
    rows = []
    for start in range(0, len(windows.ids), at_once):
        ids = windows.ids[start : start + at_once].to(teacher.device)
        known, own = teacher.features(ids), student.features(ids)
        sums = torch.zeros(len(ids), 3, dtype=torch.float64)
        for part in chunks(ids[:, 1:], teacher.vocabulary):
            targets = ids[:, 1:][:, part].reshape(-1)
            dense = teacher.logits(known[:, part]).flatten(0, 1)
            logits = student.logits(own[:, part]).flatten(0, 1)
            found = token_quality(logits, targets, dense)[:, :2]
            values = torch.cat((token_nll(dense, targets)[:, None], found), 1)
            sums += values.double().view(len(ids), -1, 3).sum(1).cpu()
        rows.append(sums / (ids.shape[1] - 1))
    losses: Values = torch.cat(rows).numpy()
    if not np.isfinite(losses).all():
        raise DataError("a loss is NaN or infinite on held-out text; give a lower --lr")
    return losses
