"""The target of a search, as the user gave it. Needs no torch, so that it is refused at once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from sleb.config import TargetOptions
from sleb.core.errors import InputError
from sleb.core.plan import Target, blocks_to_remove, parse_blocks, parse_removal


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One target as the user gave it; exactly one may be given."""

    remove: int | float | str | None = None
    max_loss_increase: float | None = None
    keep_answers: float | None = None
    speedup: float | None = None
    size: int | str | None = None

    def __post_init__(self) -> None:
        given = [f"--{k.replace('_', '-')}" for k, v in vars(self).items() if v is not None]
        if len(given) != 1:
            choice = "--remove, --max-loss-increase, --keep-answers, --speedup or --size"
            raise InputError(
                f"{' and '.join(given)} are two targets: give one of {choice}"
                if given
                else f"no target: give one of {choice}, for example --remove 20%"
            )
        if self.remove is not None:
            parse_removal(self.remove)
        if self.max_loss_increase is not None and not 0 < self.max_loss_increase < math.inf:
            raise InputError(
                f"--max-loss-increase {self.max_loss_increase} is not possible; give nats/token "
                "above 0, for example 0.1 (10.5 % more perplexity)"
            )
        if self.keep_answers is not None and not 0 < self.keep_answers < 1:
            raise InputError(
                f"--keep-answers {self.keep_answers} is not possible; give a share of tokens below "
                "1, for example 0.95"
            )
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise InputError(
                f"--speedup {self.speedup} is not possible; give more than 1, for example 1.25"
            )
        if self.size is not None:
            parse_bytes(self.size, "--size")

    def check_depth(self, n_blocks: int, protect: str) -> None:
        """Refuse what can be seen of a number of blocks alone: more are to go than there are, or
        than are not protected.

        Raises:
            InputError: so it is, or a protected block is none of the model's.
        """
        protected = parse_blocks(protect, n_blocks)
        if self.remove is not None:
            n = blocks_to_remove(self.remove, n_blocks, len(protected))
            check_candidates(n, n_blocks - len(protected), n_blocks, len(protected))

    @property
    def limit(self) -> float | None:
        """The most that a removal may cost on text or answers that took no part in the choice:
        nats/token, or the share of tokens that are no longer kept. None for other targets."""
        kept = self.keep_answers
        return self.max_loss_increase if kept is None else 1 - kept

    def reached(self, bound: float) -> Target:
        """The record of a limit that is kept up to ``bound``."""
        if self.keep_answers is not None:
            kept = round(1 - bound, 6)
            return Target(kind="keep-answers", limit=self.keep_answers, reached=kept)
        assert self.max_loss_increase is not None
        limit = self.max_loss_increase
        return Target(kind="max-loss-increase", limit=limit, reached=round(bound, 6))

    @classmethod
    def of(cls, config: TargetOptions) -> Goal:
        """The goal that was given; for a curve without one, to remove half of the blocks."""
        given = {field.name: getattr(config, field.name) for field in fields(cls)}
        if config.curve and all(value is None for value in given.values()):
            return cls(remove="50%")
        return cls(**given)


def check_candidates(n: int, candidates: int, n_blocks: int, protected: int) -> None:
    """Raise InputError if ``n`` cannot be removed of so many."""
    if n > candidates:
        raise InputError(
            f"cannot remove {n} of {candidates} candidates ({n_blocks} less {protected} "
            "protected); remove fewer, or protect fewer with --protect ''"
        )


def check_larger(size: int | str, nbytes: int) -> None:
    """Raise InputError unless weights of ``nbytes`` take more than the target ``size``."""
    if nbytes <= parse_bytes(size, "--size"):
        raise InputError(f"--size {size}: the weights take {nbytes / 1e6:,.1f} MB already")


def parse_bytes(text: int | str, option: str) -> int:
    """Bytes of ``"100MB"``, ``"1.5 GiB"`` or a plain number of bytes.

    Raises:
        InputError: not a size.
    """
    match = re.fullmatch(
        r"(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]i?)?B?", str(text).strip(), re.IGNORECASE
    )
    if not match or float(match[1]) <= 0:
        raise InputError(f"{option} {text!r} is not a size; write for example 100MB or 1.5GiB")
    unit = (match[2] or "").upper()
    base = 1024 if unit.endswith("I") else 1000
    return int(float(match[1]) * base ** ("KMGT".index(unit[0]) + 1 if unit else 0))
