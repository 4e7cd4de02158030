"""Chunked KL between two causal LMs, for training and for validation.

Logits are the largest tensors of a training step: tokens times vocabulary. So the output head runs
on a few positions at a time, the gradient of its input is kept and the logits are freed; what runs
before the head then gets all these gradients at once. The result is that of one full pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from sleb.calibration.windows import Windows, unpadded, used_length
from sleb.core.errors import UnsupportedModel
from sleb.core.statistics import Values
from sleb.models.stack import BlockStack
from sleb.selection.metrics import token_nll, token_quality
from sleb.surgery.gates import logit_tolerance

CHUNK_BYTES = {"cuda": 512 * 2**20, "cpu": 32 * 2**20}
"""Float32 logits of one chunk, at most. Three or four tensors of that size exist at a time."""
PASS = {"cuda": 2048, "cpu": 16}
"""What a pass takes beside its tokens, in tokens: kernels to be launched, which are too small to
fill a GPU; gradients to be added up."""


class Reached(Exception):
    """Ends a forward pass where all that is wanted is known; :func:`run_until` takes it."""


def run_until(model: nn.Module, ids: Tensor) -> None:
    """A forward pass up to where a hook raises :class:`Reached`."""
    with contextlib.suppress(Reached):
        model(input_ids=ids, use_cache=False)


@contextlib.contextmanager
def outputs(
    stack: BlockStack, blocks: Collection[int], *, end: bool = False
) -> Iterator[dict[int, Tensor]]:
    """While this is open, the last hidden states [B, T, D] that each of ``blocks`` gave, by block.
    With ``end`` a forward pass ends behind them, see :func:`run_until`."""
    found: dict[int, Tensor] = {}

    def note(i: int, out: Tensor | tuple[Tensor, ...]) -> None:
        found[i] = out if isinstance(out, Tensor) else out[0]
        if end and i == max(blocks):
            raise Reached

    handles = [
        stack.blocks[i].register_forward_hook(lambda _, __, out, i=i: note(i, out)) for i in blocks
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def distance(own: Tensor, dense: Tensor) -> Tensor:
    """Squared distance of hidden states [..., D] over the dense model's squared length [...]."""
    own, dense = own.float(), dense.float()
    return (own - dense).square().sum(-1) / dense.square().sum(-1).clamp_min(1e-12)


class SplitModel:
    """``model`` split before its output head: the features that the head is given, and the logits
    that it and all that follows make of them.

    Raises:
        UnsupportedModel: the model names no output head, or its parts make other logits than the
            whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.stack = model, BlockStack(model)
        head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise UnsupportedModel(
                f"{self.stack.name} names no output head, so it cannot be healed"
            )
        self.head, self.plain = head, False
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
            raise Reached

        handle = self.head.register_forward_pre_hook(reach)
        try:
            run_until(self.model, ids)
        finally:
            handle.remove()
        return found[0]

    def logits(self, features: Tensor) -> Tensor:
        """Head, scaling and caps. features [N, D] -> logits [N, V]."""
        if self.plain:
            found: Tensor = self.head(features)
            return found
        # a position each, as more could be more than the model knows of
        handle = self.head.register_forward_pre_hook(lambda *_: (features[:, None],))
        ids = torch.zeros((len(features), 1), dtype=torch.long, device=features.device)
        try:
            with self.stack.bypassed(range(len(self.stack))):
                logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        return logits[:, 0]

    @torch.no_grad()
    def _check(self) -> int:
        """Size of the vocabulary, V, once the parts are known to be the whole; and whether logits
        are what the head gives, to the bit, so that nothing else has to run."""
        ids = torch.arange(8, device=self.device)[None]
        whole = self.model(input_ids=ids, use_cache=False).logits
        features = self.features(ids)
        if not agree(self.logits(features[0]), whole[0]):
            raise UnsupportedModel(
                f"{self.stack.name} cannot be split before its head, so it cannot be healed"
            )
        self.plain = torch.equal(self.head(features), whole)
        return int(whole.shape[-1])


def agree(found: Tensor, wanted: Tensor) -> bool:
    """Whether logits are the same but for rounding."""
    limit = wanted.abs().max() * logit_tolerance(wanted.dtype)
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= limit)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Windows of one pass, on the device, without padding that all of them have. ``rows`` [P]: the
    positions in ids [B, T], flattened, whose next token is scored; ``owner`` [P]: the window of
    each, by its number among all; ``weights`` [P]: what each counts; ``tokens``: without padding.
    """

    ids: Tensor
    rows: Tensor
    owner: Tensor
    weights: Tensor
    tokens: int

    @classmethod
    def of(
        cls,
        windows: Windows,
        picked: Sequence[int],
        device: torch.device,
        weights: Sequence[float] | None = None,
    ) -> Batch:
        """The windows ``picked``, and what each of their tokens counts, by default one."""
        rows = [*picked]
        ids, scored = windows.ids[rows], torch.ones(len(rows), windows.ids.shape[1])
        if windows.scored is not None:
            scored = windows.scored[rows]
        length = used_length(scored)
        where = pad(scored[:, 1:length], (0, 1)).nonzero()  # on the CPU: a GPU would be waited for
        counted = torch.tensor(weights or [1.0] * len(rows))[where[:, 0]]
        parts = (ids[:, :length].contiguous(), where[:, 0] * length + where[:, 1], counted)
        pinned = device.type == "cuda"  # a copy of other memory waits for all that was begun before
        ids, positions, counted = (
            (part.pin_memory() if pinned else part).to(device, non_blocking=True) for part in parts
        )
        owner, tokens = torch.tensor(rows)[where[:, 0]], int(unpadded(scored).sum())
        return cls(ids=ids, rows=positions, owner=owner, weights=counted, tokens=tokens)

    @property
    def targets(self) -> Tensor:
        """The tokens to be predicted [P]."""
        return self.ids.flatten().index_select(0, self.rows + 1)

    def scored(self, features: Tensor) -> Tensor:
        """Of features [B, T, D] those whose predictions count [P, D]."""
        return features.flatten(0, 1).index_select(0, self.rows)


def passes(
    lengths: Sequence[int], rows: Sequence[int], tokens: int, device: str = "cpu"
) -> list[list[int]]:
    """``rows`` by length, in groups of at most ``tokens`` tokens, padding included, or of one row:
    those that hold the fewest in all, with ``PASS`` for each group."""
    apart = PASS.get(device, PASS["cpu"])
    rows = sorted(rows, key=lambda row: lengths[row])
    least = [(0, 0)]  # of the first rows: tokens, and where their last group begins
    for end in range(1, len(rows) + 1):
        longest = lengths[rows[end - 1]]
        starts = range(min(end - 1, max(0, end - tokens // max(1, longest))), end)
        least.append(min((least[at][0] + (end - at) * longest + apart, at) for at in starts))
    found, end = [], len(rows)
    while end:
        found.append(rows[least[end][1] : end])
        end = least[end][1]
    return found[::-1]


def chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Slices of so many rows of features whose logits are small enough to be held."""
    step = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // (4 * vocabulary))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class ActivationCache:
    """What the dense model makes of windows before its head, of which it need not read those again
    that have a place in ``nbytes`` of its device."""

    def __init__(self, teacher: SplitModel, windows: Windows, nbytes: int) -> None:
        self.teacher, self.windows = teacher, windows
        self.left, self.kept = nbytes, dict[int, Tensor]()
        self.counts = windows.counts.tolist()

    @torch.no_grad()
    def __call__(self, picked: Sequence[int], batch: Batch) -> Tensor:
        """Of the batch of the windows ``picked`` [P, D]."""
        missing = [row for row in picked if row not in self.kept]
        found = dict[int, Tensor]()
        if missing:
            if len(missing) < len(picked):
                batch = Batch.of(self.windows, missing, self.teacher.device)
            known = batch.scored(self.teacher.features(batch.ids))
            parts = torch.split(known, [self.counts[row] for row in missing])
            found = dict(zip(missing, parts, strict=True))
        out = torch.cat([self.kept[row] if row in self.kept else found[row] for row in picked])
        for row, features in found.items():
            if features.nbytes <= self.left:
                self.left -= features.nbytes
                self.kept[row] = features.clone()  # else all of the pass would be kept
        return out

    def forget(self) -> None:
        """From here on nothing is kept."""
        self.left = 0
        self.kept.clear()


@dataclass(frozen=True, kw_only=True)
class HiddenLoss:
    """Hidden states that are learned beside the predictions: of which block of the dense model each
    of ``blocks`` of the cut should give, with what ``weight``."""

    weight: float
    blocks: Mapping[int, int]


def backward_kl(
    student: SplitModel,
    teacher: SplitModel,
    batch: Batch,
    known: Tensor | None = None,
    hidden: HiddenLoss | None = None,
) -> None:
    """Add the gradients of a batch's weighted sum of KL(teacher || student), nats, to the student's
    parameters. By the student's logits it is the difference of the probabilities. ``known``: what
    the teacher makes of the batch before its head, where that is known already, and there is no
    loss of hidden states."""
    blocks = hidden.blocks if hidden else {}
    with torch.no_grad(), outputs(teacher.stack, {*blocks.values()}) as dense:
        if known is None or hidden:
            known = batch.scored(teacher.features(batch.ids))
    with outputs(student.stack, blocks) as own:
        features = batch.scored(student.features(batch.ids))
    gradient = torch.empty_like(features)
    for rows in chunks(len(known), teacher.vocabulary, known.device):
        chunk = features[rows].detach().requires_grad_()
        logits = student.logits(chunk)
        with torch.no_grad():
            slope = torch.softmax(logits, -1, dtype=torch.float32)
            slope -= torch.softmax(teacher.logits(known[rows]), -1, dtype=torch.float32)
            slope *= batch.weights[rows, None]
        logits.backward(slope.to(logits.dtype))  # type: ignore[no-untyped-call]
        assert chunk.grad is not None
        gradient[rows] = chunk.grad
    losses, gradients = [features], [gradient]
    if hidden:
        for mine, its in blocks.items():
            far = distance(batch.scored(own[mine]), batch.scored(dense[its]))
            losses.append((batch.weights * far).sum())
            gradients.append(torch.tensor(hidden.weight, device=far.device))
    torch.autograd.backward(losses, gradients)


class Validation:
    """``windows`` to validate on, ``tokens`` in a pass. What the dense model makes of them before
    its head is kept, so that it reads them once."""

    @torch.no_grad()
    def __init__(self, teacher: SplitModel, windows: Windows, tokens: int) -> None:
        self.teacher, self.windows = teacher, windows
        rows = range(len(windows.ids))
        groups = passes(windows.lengths, rows, tokens, teacher.device.type)
        self.batches = [Batch.of(windows, picked, teacher.device) for picked in groups]
        self.known = [batch.scored(teacher.features(batch.ids)) for batch in self.batches]

    @torch.no_grad()
    def __call__(self, student: SplitModel) -> Values:
        """Per window the dense model's loss, the student's, and KL(dense || student), nats/token,
        means over the scored tokens. Returns float64 [N, 3]; what is NaN stays so."""
        n = len(self.windows.ids)
        sums, counts = torch.zeros(n, 3, dtype=torch.float64), torch.zeros(n)
        for batch, known in zip(self.batches, self.known, strict=True):
            own, targets = batch.scored(student.features(batch.ids)), batch.targets
            found = []
            for rows in chunks(len(known), self.teacher.vocabulary, known.device):
                dense, logits = self.teacher.logits(known[rows]), student.logits(own[rows])
                quality = token_quality(logits, targets[rows], dense)[:, :2]
                found.append(torch.cat((token_nll(dense, targets[rows])[:, None], quality), 1))
            sums.index_add_(0, batch.owner, torch.cat(found).double().cpu())
            counts += torch.bincount(batch.owner, minlength=n)
        values: Values = (sums / counts[:, None]).numpy()
        return values
