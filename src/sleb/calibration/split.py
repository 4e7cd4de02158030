"""One split of the calibration texts into roles, made once per run.

Texts are read and tokenized once. No window has two roles, but for one: what blocks were chosen by
is fitted on too. Roles are given out in one seeded order of each text's windows: first the search,
then the held-out windows, then the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from sleb.calibration.answers import AnswerSplit
from sleb.calibration.images import Images
from sleb.calibration.windows import Texts, Windows, written_source
from sleb.config import LossOn
from sleb.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATION = 32
"""Windows that decide whether a fit stays."""
GENERATED_VALIDATION = (8, 32)
"""Self-generated windows in a final comparison: half as many as of the search, within this."""
SHARE = 3
"""One window in so many that a repair is fitted on is self-generated."""
SELF_GENERATED = "the model's own text"
"""Its name among the sources of a plan's repair."""

Writer = Callable[[int, int, int], Tensor]
"""``write(n, length, seed)`` gives windows [n, length] of text that a model has written."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CalibrationSplit:
    """Windows by role. ``search``: what blocks are chosen by. ``heldout``: what the result is
    measured on, in no other role. ``repair_given`` and ``repair_validation``: see
    :meth:`with_repair`. Without ``texts`` there are no windows for further roles. ``answers`` stand
    beside the texts in every role.
    """

    search: Windows
    heldout: Windows | None = None
    texts: Texts | None = None
    repair_given: Windows | None = None
    repair_validation: Windows | None = None
    generated: _Generated | None = None
    answers: AnswerSplit | None = None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        text: Sequence[str],
        *,
        windows: int | Literal["all"] | None,
        length: int,
        seed: int,
        heldout: int = 0,
        loss_on: LossOn = "all",
        images: Images | None = None,
    ) -> CalibrationSplit:
        """Read the texts, and set aside windows to search on and up to ``heldout`` others; see
        :func:`sleb.calibration.load_windows`, which raises the same errors."""
        texts = Texts.read(
            tokenizer, text, length=length, seed=seed, loss_on=loss_on, images=images
        )
        search, others = texts.windows(windows, heldout)
        return cls(search=search, heldout=others, texts=texts)

    # -- repair --------------------------------------------------------------------------------

    def with_repair(self, tokens: int, *, beside_search: bool = False) -> CalibrationSplit:
        """This split with windows to fit a repair on, about ``tokens`` tokens of the given texts,
        and others, at least one of each text, that decide whether a fit stays. What was searched on
        is fitted on too, and counts, unless ``beside_search``.

        Raises:
            InputError: the text is too short for both.
        """
        counted = 0 if beside_search else len(self.search.ids)
        rest, fitted, validation = self._repair_rows(max(0, tokens // self._length - counted))
        return replace(
            self,
            repair_given=self.search + rest.take(fitted),
            repair_validation=rest.take(validation),
        )

    def candidate_fit(self, tokens: int) -> Windows:
        """Windows that repairs of candidates are fitted on, about ``tokens`` tokens: none that
        scores them.

        Raises:
            InputError: no text is left over.
        """
        given = tokens // 2 if self.answers else tokens
        rest, fitted, _ = self._repair_rows(given // self._length)
        if not fitted:
            raise InputError(
                "no text is left over to fit repairs on: give more --text, or fewer --windows"
            )
        found = rest.take(fitted)
        if self.answers is None:
            return found
        fit = self.answers.fit
        each = max(1, fit.record.sources[-1].tokens // fit.record.sources[-1].documents)
        rows = range(len(fit.ids))
        return found.beside(fit.take(_spread(rows, min(len(rows), given // each + 1))))

    @property
    def repair_fit(self) -> Windows:
        """What a repair is fitted on: what is given, self-generated windows behind it, and then
        answers."""
        assert self.repair_given is not None
        found = self.generated.behind(self.repair_given) if self.generated else self.repair_given
        return found.beside(self.answers.search + self.answers.fit) if self.answers else found

    @property
    def validation(self) -> Windows:
        """What decides whether a fit stays."""
        assert self.repair_validation is not None
        if self.answers is None:
            return self.repair_validation
        return self.repair_validation.beside(self.answers.validation)

    @property
    def _length(self) -> int:
        return self.search.record.length

    def _repair_rows(self, extra: int) -> tuple[Windows, list[int], list[int]]:
        """Windows that neither the search nor the held-out ones are among; and which of them are to
        be fitted on, about ``extra``, and which validate."""
        kept = 0 if self.heldout is None else len(self.heldout.ids)
        wanted = kept + VALIDATION + extra
        rest = self.texts.windows(len(self.search.ids), wanted)[1] if self.texts else None
        taken = set() if self.heldout is None else set(map(_bytes, self.heldout.ids))
        free = [i for i, row in enumerate(rest.ids) if _bytes(row) not in taken] if rest else []
        if rest is None or not free:
            raise InputError(
                "no text is left over to validate a repair on: give more --text, or fewer --windows"
            )
        # spread evenly over each text, which is in order; at most a third of it
        validation = _of_each_text(rest, free, VALIDATION, most=3)
        return rest, sorted(set(free) - set(validation)), validation

    # -- self-generated text -------------------------------------------------------------------

    def with_self_generated(self, write: Writer, *, compare: bool = False) -> CalibrationSplit:
        """This split with windows that ``write`` makes once they are first asked for: half as many
        as a repair is given, and with ``compare`` others for a final comparison."""
        least, most = GENERATED_VALIDATION
        fitted = 0 if self.repair_given is None else len(self.repair_given.ids) // (SHARE - 1)
        validation = min(most, max(least, len(self.search.ids) // 2)) if compare else 0
        # what is written for the seed itself may be fitted on later
        seed = self.search.record.seed + (self.repair_given is None)
        length = self.texts.length if self.texts else self._length  # rows with images are longer
        made = _Generated(write, fitted, validation, length, seed)
        return replace(self, generated=made)

    def generate(self) -> None:
        """Write the self-generated windows now, not once they are first asked for."""
        if self.generated:
            _ = self.generated.validation

    @property
    def final_comparison(self) -> Windows:
        """Windows that compare what a search ends with: its own, self-generated ones, and
        answers."""
        found = joined(self.search, self.generated.validation) if self.generated else self.search
        return found.beside(self.answers.search) if self.answers else found

    # -- answers -------------------------------------------------------------------------------

    def with_answers(self, answers: AnswerSplit) -> CalibrationSplit:
        """This split with the dense model's answers in every role."""
        return replace(self, answers=answers)

    # -- other roles ---------------------------------------------------------------------------

    def healing(self, windows: int, validation: int) -> tuple[Windows, Windows]:
        """Of a split with as many windows held out: up to ``windows`` to train on, by the weights
        of the texts as far as each goes; and about ``validation`` others, spread evenly over every
        text, at most a quarter of it."""
        pool = self.search if self.heldout is None else self.search + self.heldout
        every = range(len(pool.ids))
        held = _of_each_text(pool, every, validation, most=4)
        rest = sorted(set(every) - set(held))
        return pool.take(_spread(rest, min(len(rest), windows))), pool.take(sorted(held))

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the token ids by role, as the plan records them before a repair."""
        roles = {"search": self.search, "heldout": self.heldout}
        if self.answers:
            roles |= {
                "answers_search": self.answers.search,
                "answers": self.answers.measured.windows,
            }
        return {role: w.record.sha256 for role, w in roles.items() if w is not None}


@dataclass(frozen=True, eq=False)
class _Generated:
    """Self-generated windows: so many to fit on, and so many for a final comparison. All are
    written in one go, since how long that takes depends on their length more than on their
    number."""

    write: Writer
    fit: int
    compare: int
    length: int
    seed: int

    @cached_property
    def _ids(self) -> Tensor:
        return self.write(self.fit + self.compare, self.length, self.seed)

    @property
    def validation(self) -> Tensor:
        """Windows [N, T] for a final comparison."""
        return self._ids[self.fit :]

    def behind(self, windows: Windows) -> Windows:
        """``windows`` and behind them those to fit on."""
        return joined(windows, self._ids[: self.fit]) if self.fit else windows


def joined(windows: Windows, ids: Tensor) -> Windows:
    """``windows`` and behind them ``ids`` [N, T], which a model has written."""
    source = written_source(SELF_GENERATED, ids, ids.numel())
    record = windows.record.model_copy(update={"sources": (source,)})
    names, rows = (SELF_GENERATED,), (0,) * len(ids)
    return windows.beside(Windows(ids=ids, source=rows, names=names, record=record))


def _of_each_text(windows: Windows, rows: Sequence[int], n: int, *, most: int) -> list[int]:
    """About ``n`` of ``rows``, spread evenly over every text: at least one of each, and not more
    than one in ``most``."""
    texts = [[i for i in rows if windows.source[i] == k] for k in range(len(windows.names))]
    each = max(1, n // len(texts))
    return [i for own in texts for i in _spread(own, min(each, max(1, len(own) // most)))]


def _spread(rows: Sequence[int], n: int) -> list[int]:
    return [rows[(2 * k + 1) * len(rows) // (2 * n)] for k in range(n)] if rows else []


def _bytes(row: Tensor) -> bytes:
    """What tells windows apart, however they are padded."""
    return row.numpy().astype("<i8").tobytes().rstrip(b"\0")
