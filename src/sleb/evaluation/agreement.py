"""How much of the dense model's answers a cut keeps, on prompts that took no part in making it.

Teacher-forced: the cut reads the dense model's own answer, and at every token it either finds the
same one likeliest or not. Up to the first that differs this is what it would write itself, so the
place of that, and whether there is none, hold for greedy answers too. Over 33 cuts of a model of
1.5 B parameters agreement ranks as right answers do (docs/quality.md); perplexity does not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sleb.calibration.answers import Answers
from sleb.core.printable import paragraphs
from sleb.core.progress import Progress, silent
from sleb.core.statistics import Interval, Values, interval, proportion, shares
from sleb.core.tabular import Points, Tabular
from sleb.evaluation.grading import Judged, gradable, judged
from sleb.models.load import LoadedModel
from sleb.repairs.answering import answered
from sleb.selection.metrics import TokenMetric, mean_of, quality_of, token_kl
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.sweep import Patch, Sweep

FLOOR = 0.93
"""Agreement below which, of the cuts in docs/quality.md, all lost a third or more of their right
answers, and most two thirds."""
WORST = 3
"""Prompts that the cut answers because least of their answers is kept, if no row tells whether they
are right."""
FEW = 5
"""Right answers of the dense model, of which a share is told."""


@dataclass(frozen=True, kw_only=True)
class RightAnswers:
    """Answers that their rows can tell to be right, of ``judged`` prompts: ``dense`` and ``pruned``
    by each model; ``lost`` by the pruned one alone wrong, ``won`` alone right. ``kept``: the share
    of the dense model's that the pruned one has, null of fewer than ``FEW``, where one answer is a
    large part."""

    judged: int
    dense: int
    pruned: int
    lost: int
    won: int
    kept: Interval | None


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt by its turns, as (role, text), and both models' own greedy answers to it, of which
    ``agreement`` is kept. ``judged``: whether they are right, where its row can tell."""

    id: str
    turns: tuple[tuple[str, str], ...]
    agreement: float
    dense: str
    pruned: str
    judged: Judged | None = None


@dataclass(frozen=True, kw_only=True)
class AnswersKept(Tabular):
    """What a cut keeps of the dense model's greedy answers of at most ``new_tokens`` tokens, to
    ``prompts`` prompts of ``source``, ``tokens`` tokens in all.

    ``agreement``: share of an answer's tokens that are the likeliest of the cut too, teacher-forced
    on the dense model's; ``divergence``: KL from the dense model there, nats/token;
    ``until_first``: tokens before the first that differs; ``reproduced``: share of answers without
    any. Means over prompts, with 95 % intervals. ``unrepaired``: agreement of the plain cut;
    ``unhealed``: of the cut as it was before its healing. ``worst``: what the cut
    answered itself, right answers that were lost first, then others, each by how little is kept;
    none that the cut alone has right. ``left_out``: other
    prompts of ``source``, by whose answers the cut was made.
    """

    source: str
    prompts: int
    tokens: int
    new_tokens: int
    agreement: Interval
    divergence: Interval
    until_first: Interval
    reproduced: Interval
    unrepaired: Interval | None = None
    unhealed: Interval | None = None
    right: RightAnswers | None = None
    worst: tuple[Example, ...] = ()
    left_out: int = 0

    def rows(self) -> list[dict[str, Any]]:
        """A row for each figure."""
        names = ("agreement", "divergence", "until_first", "reproduced", "unrepaired", "unhealed")
        found = {name: getattr(self, name) for name in names}
        return [{"figure": name, **asdict(value)} for name, value in found.items() if value]

    def drawn(self) -> Points:
        """The shares."""
        rows = [row for row in self.rows() if row["figure"] not in ("divergence", "until_first")]
        return Points(
            x=tuple(row["figure"] for row in rows),
            y=tuple(row["value"] for row in rows),
            low=tuple(row["low"] for row in rows),
            high=tuple(row["high"] for row in rows),
            x_label="",
            y_label="share",
        )

    def __str__(self) -> str:
        right = self.right
        judged = (
            f"; right before {right.dense} of {right.judged}, now {right.pruned}" if right else ""
        )
        kept = f"{self.agreement.value:.1%} of the tokens of {self.prompts} answers are kept"
        return paragraphs([f"{kept}, divergence {self.divergence.value:.4g} nats/token{judged}"])


def answer_quality(logits: Tensor, targets: Tensor, dense: Tensor | None = None) -> Tensor:
    """Divergence in nats, and whether the likeliest token is the dense model's. [N, V], [N, V] ->
    float32 [N, 2]."""
    assert dense is not None
    same = (logits.argmax(-1) == dense.argmax(-1)).float()
    return torch.stack((token_kl(logits, targets, dense), same), -1)


def _answer_quality_of(
    head: nn.Linear, given: Tensor, targets: Tensor, dense: Tensor | None = None
) -> Tensor:
    """:func:`answer_quality` of S sets. [S, N, D], [N], [N, D] -> float32 [S, N, 2]."""
    return quality_of(head, given, targets, dense)[..., 1:]


def _of_answer(values: Tensor, scored: Tensor) -> Tensor:
    """Mean divergence and agreement, tokens before the first that differs, and whether there is
    none. values [B, P, 2], scored [B, P] -> [B, 4]."""
    means = mean_of(values, scored)
    agreed = ((values[..., 1] > 0) | ~scored).cumprod(1)
    first = (agreed * scored).sum(1).to(values)
    return torch.cat((means, first[:, None], agreed[:, -1:].to(values)), 1)


ANSWER_QUALITY = TokenMetric(
    name="answers kept",
    unit="nats/token, share, tokens, share",
    tokens=answer_quality,
    needs_dense=True,
    window=_of_answer,
    of=_answer_quality_of,
)


def agreement_of(
    model: LoadedModel,
    answers: Answers,
    removed: Collection[int],
    patch: Patch | None = None,
    *,
    progress: Progress = silent,
) -> Values:
    """Of every measured answer [N, 4]: divergence, agreement, tokens until the first difference,
    and 1 if it would be reproduced; see :class:`AnswersKept`."""
    windows, sets = answers.windows, [BlockSet(removed)]
    sweep = Sweep(model.stack, windows.ids, ANSWER_QUALITY, patch=patch, scored=windows.scored)
    work = len(windows.ids) * sweep.work([DENSE, *sets])
    with progress.stage("reading answers", work) as tick:
        sweep.on_work(tick)
        found: Values = sweep.values(sets, 0, len(windows.ids))[0]
    return found


def measure_answers(
    model: LoadedModel,
    answers: Answers,
    removed: Collection[int],
    patch: Patch | None = None,
    progress: Progress = silent,
) -> AnswersKept:
    """What the cut keeps of the dense model's ``answers``, with ``patch`` as of a repair. Prompts
    whose rows tell what is right, and those of which least is kept, the cut answers itself.

    Raises:
        DataError: a figure is NaN or infinite.
    """
    found = agreement_of(model, answers, removed, patch, progress=progress)
    plain = agreement_of(model, answers, removed, progress=progress) if patch else None
    windows = answers.windows
    assert windows.scored is not None
    divergence, agreement, first, reproduced = found.T
    known, prompts = gradable(answers.run_code), answers.prompts
    told = {i for i, prompt in enumerate(prompts) if prompt.expected.keys() & known}
    order = agreement.argsort(kind="stable").tolist()
    asked = sorted({*told, *[i for i in order if i not in told][:WORST]})
    said = _said(model, answers, asked, removed, patch, progress)
    before, after = ([said[i][of] for i in asked] for of in (0, 1))
    graded = judged([prompts[i].expected for i in asked], before, after, known)
    by_row = dict(zip(asked, graded, strict=True))
    worst = [i for i in order if i in by_row and not ((of := by_row[i]) and of.won)]
    worst.sort(key=lambda i: not ((of := by_row[i]) and of.lost))  # stable
    return AnswersKept(
        source=answers.source,
        prompts=len(windows.ids),
        tokens=int(windows.scored.sum()),
        new_tokens=answers.new_tokens,
        agreement=shares(agreement),
        divergence=interval(divergence, 0.0),
        until_first=interval(first, 0.0, answers.new_tokens),
        reproduced=proportion(int(reproduced.sum()), len(reproduced)),
        unrepaired=None if plain is None else shares(plain[:, 1]),
        right=_right([one for one in graded if one]) if told else None,
        worst=tuple(
            Example(
                id=prompts[i].id,
                turns=prompts[i].turns,
                agreement=float(agreement[i]),
                dense=said[i][0],
                pruned=said[i][1],
                judged=by_row[i],
            )
            for i in worst
        ),
    )


def _said(
    model: LoadedModel,
    answers: Answers,
    which: list[int],
    removed: Collection[int],
    patch: Patch | None,
    progress: Progress,
) -> dict[int, tuple[str, str]]:
    """What the dense model has answered to ``which`` of the prompts, and what the cut answers."""
    windows = answers.windows.take(which)
    assert windows.scored is not None
    rows = [*zip(windows.ids, windows.scored, strict=True)]
    before = [ids[counts].tolist() for ids, counts in rows]
    asked = [ids[: int(counts.nonzero()[0])].tolist() for ids, counts in rows]
    with patch() if patch else nullcontext(), model.stack.bypassed(removed):
        after = answered(model, asked, answers.new_tokens, progress, "answering without the blocks")
    both = zip(_texts(model, before), _texts(model, after), strict=True)
    return dict(zip(which, both, strict=True))


def _right(both: Sequence[Judged]) -> RightAnswers:
    """Right answers of both models."""
    kept = [one.pruned for one in both if one.dense]
    return RightAnswers(
        judged=len(both),
        dense=len(kept),
        pruned=sum(one.pruned for one in both),
        lost=sum(one.lost for one in both),
        won=sum(one.won for one in both),
        kept=proportion(sum(kept), len(kept)) if len(kept) >= FEW else None,
    )


def _texts(model: LoadedModel, answers: list[list[int]]) -> list[str]:
    texts: list[str] = model.tokenizer.batch_decode(
        answers,
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,  # which would change them
    )
    return texts
