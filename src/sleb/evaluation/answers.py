"""The user's own prompts through both models, greedily: what changed in the answers.

Generation breaks before multiple choice does, so it is looked at by itself.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sleb.calibration.prompts import Prompt, Read, read_prompts
from sleb.checkpoints.checkpoint import plan_alone
from sleb.config import CompareConfig, DeviceOptions, takes
from sleb.core.errors import InputError
from sleb.core.files import check_folder
from sleb.core.progress import Progress, Tick, silent
from sleb.core.statistics import Interval, exponential, interval, proportion
from sleb.evaluation import answer_checks as check
from sleb.evaluation.grading import Judged, check_expected, gradable, judged
from sleb.evaluation.prompts import read_alike
from sleb.models.load import LoadedModel, load, pick_device
from sleb.models.source import called, quiet_transformers

REPETITIVE = 0.5
WARM_UP = 4  # tokens generated before the first answer is timed


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One generated answer.

    ``text`` is without special tokens; ``seconds`` for all of its ``tokens``. ``ended``: the model
    ended it itself within the limit. ``repetition``: share of its 4-grams of tokens that were there
    before, 0..1. ``script``: the writing system of most of its letters, empty without any.
    ``language``: ISO 639 code, empty where it is not clear. ``json_valid`` is null where no JSON
    was asked for.
    """

    text: str
    tokens: int
    seconds: float
    ended: bool
    repetition: float
    script: str
    language: str
    json_valid: bool | None

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with it by itself: ``empty``, ``json``, ``repetitive``, ``endless``."""
        found = {
            "empty": check.is_empty(self.text),
            "json": self.json_valid is False,
            "repetitive": self.repetition > REPETITIVE,
            "endless": not self.ended,
        }
        return tuple(name for name, wrong in found.items() if wrong)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both answers to one prompt. ``agreed``: tokens until they part. ``prompt``: as the model
    read it; ``turns``: what was said in it, as (role, text). ``switched``: the pruned model
    answered in another writing system or language than the dense one. ``judged``: whether the
    answers are right, where the prompt's row can tell without running code."""

    id: str
    prompt: str
    dense: Answer
    pruned: Answer
    agreed: int
    switched: bool
    turns: tuple[tuple[str, str], ...] = ()
    judged: Judged | None = None

    @property
    def won(self) -> bool:
        """Whether the pruned model alone is known to be right."""
        return self.judged is not None and self.judged.won

    @property
    def identical(self) -> bool:
        """Whether both answers are the same tokens."""
        return self.agreed == self.dense.tokens == self.pruned.tokens

    @property
    def faults(self) -> tuple[str, ...]:
        """Faults that only the pruned model's answer has, and ``switched``; worst first."""
        new = tuple(fault for fault in self.pruned.faults if fault not in self.dense.faults)
        return (*new, "switched") if self.switched else new


@dataclass(frozen=True, kw_only=True)
class Answers:
    """One model's answers in sum: shares of prompts in 0..1, with intervals. ``json_valid`` is
    null if no prompt asked for JSON. ``repetitive``: answers more than half of whose 4-grams were
    there before. Seconds per answer."""

    ended: Interval
    empty: Interval
    repetitive: Interval
    json_valid: Interval | None
    seconds_median: float
    seconds_p90: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All prompts through both models.

    ``identical``, ``switched``: shares of prompts. ``agreed_median``: tokens. ``sha256`` is of the
    prompts, as JSON. ``languages``: whether languages of one writing system were told apart, which
    needs the extra ``lang``. ``seconds_per_token_ratio``: dense over pruned, geometric mean
    over prompts, paired, so above 1 is faster; null if no prompt has two answers of two tokens or
    more. One model answers after the other, and reading the prompt counts, so `sleb bench` is the
    sounder measure.
    """

    prompts: int
    max_new_tokens: int
    sha256: str
    languages: bool
    dense: Answers
    pruned: Answers
    identical: Interval
    switched: Interval
    agreed_median: float
    seconds_per_token_ratio: Interval | None
    pairs: tuple[Pair, ...]

    def __str__(self) -> str:
        same = f"{self.identical.value:.1%} of {self.prompts} answers are identical"
        return f"{same}; the median parts after {self.agreed_median:g} tokens"

    @property
    def worst_first(self) -> tuple[Pair, ...]:
        """All pairs: right answers that were lost first, then most faults, then those that part
        earliest; last the identical ones, and those that the pruned model alone has right."""

        def place(p: Pair) -> tuple[bool, bool, int, int]:
            lost = p.judged is not None and p.judged.lost
            return p.identical or p.won, not lost, -len(p.faults), p.agreed

        return tuple(sorted(self.pairs, key=place))


@takes(CompareConfig)
def compare(
    model: str | Path,
    out: str | Path,
    prompts: str | Path | Sequence[Prompt],
    config: CompareConfig,
    *,
    progress: Progress = silent,
) -> Comparison:
    """Answer each of ``prompts``, a file of them or read before, with ``model`` and with the folder
    ``out``, and compare.

    Each model generates as its own generation config says, one prompt at a time, but greedily: the
    same inputs give the same texts. One model is in memory at a time.

    Raises:
        InputError: no prompts; ``out`` is no checkpoint, or has another tokenizer than ``model``;
            a chat without a chat template; a prompt that leaves no room for its answer, or expects
            what cannot be.
        UnsupportedModel, DataError, ResourceError: see :func:`sleb.load`.
    """
    asked = read_prompts(prompts) if isinstance(prompts, (str, Path)) else prompts
    if not asked:
        raise InputError("no prompts to compare on; give at least one")
    if Path(out).suffix == ".gguf":
        raise InputError(
            f"{out} is a GGUF file, and both models' texts are compared of folders: sleb eval "
            "--plan --prompts tells how much of the answers it keeps"
        )
    check_folder(Path(out))
    check_expected([prompt.expected for prompt in asked])
    pick_device(config.device)
    most, places = config.new_tokens, dict(config.part(DeviceOptions))
    plan = plan_alone(out)
    read = read_alike(
        (model, out if plan is None else model),
        asked,
        max_new_tokens=most,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
    )
    given = [one.ids for one in read]
    answered = []
    for ref, by in ((model, None), (out, plan)):
        loaded = load(ref if by is None else model, plan=by, **places, progress=progress)
        with progress.stage(f"answering with {called(ref)}", len(asked)) as tick:
            answered.append(list(_answers(loaded, asked, given, most, tick)))
        del loaded  # its memory is needed for the next one
        gc.collect()
    return _compared(asked, read, answered, most)


def _compared(
    prompts: Sequence[Prompt],
    read: Sequence[Read],
    answered: Sequence[Sequence[tuple[list[int], Answer]]],
    max_new_tokens: int,
) -> Comparison:
    """Of both models' tokens and answers, by prompt."""
    texts, after = ([answer.text for _, answer in of] for of in answered)
    graded = judged([prompt.expected for prompt in prompts], texts, after, gradable(False))
    pairs = tuple(
        Pair(
            id=prompt.id,
            prompt=one.text,
            dense=dense,
            pruned=pruned,
            agreed=check.first_difference(before, after),
            switched=check.switched(dense.text, pruned.text),
            turns=prompt.turns,
            judged=right,
        )
        for prompt, one, (before, dense), (after, pruned), right in zip(
            prompts, read, *answered, graded, strict=True
        )
    )
    rows = json.dumps([_hashed(prompt) for prompt in prompts], ensure_ascii=False, sort_keys=True)
    return Comparison(
        prompts=len(prompts),
        max_new_tokens=max_new_tokens,
        sha256=hashlib.sha256(rows.encode()).hexdigest(),
        languages=check.tells_languages(),
        dense=_sum([pair.dense for pair in pairs]),
        pruned=_sum([pair.pruned for pair in pairs]),
        identical=_share(pair.identical for pair in pairs),
        switched=_share(pair.switched for pair in pairs),
        agreed_median=float(np.median([pair.agreed for pair in pairs])),
        seconds_per_token_ratio=_speed_ratio(pairs),
        pairs=pairs,
    )


def _hashed(prompt: Prompt) -> dict[str, Any]:
    """The prompt as JSON; what came later only where there is some, so that earlier hashes hold."""
    return {k: v for k, v in asdict(prompt).items() if k not in ("tools", "expected") or v}


def _answers(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    given: Sequence[list[int]],
    max_new_tokens: int,
    tick: Tick,
) -> Iterator[tuple[list[int], Answer]]:
    """Each answer's tokens, the one that ends it included, and what can be said of it."""
    ends = getattr(loaded.model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    with quiet_transformers():
        _generate(loaded, given[0], min(WARM_UP, max_new_tokens))
        for prompt, ids in zip(prompts, given, strict=True):
            start = time.perf_counter()
            tokens = _generate(loaded, ids, max_new_tokens)
            seconds = time.perf_counter() - start
            text = str(
                loaded.tokenizer.decode(
                    tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
            )
            answer = Answer(
                text=text,
                tokens=len(tokens),
                seconds=seconds,
                ended=len(tokens) < max_new_tokens or tokens[-1] in ends,
                repetition=check.repetition(tokens),
                script=check.script(text),
                language=check.language(text),
                json_valid=check.is_json(text) if prompt.json else None,
            )
            tick(1, f"{prompt.id}: {len(tokens)} tokens")
            yield tokens, answer


@torch.inference_mode()
def _generate(loaded: LoadedModel, ids: list[int], max_new_tokens: int) -> list[int]:
    """The tokens that the model itself adds to ``ids``, greedily."""
    model: Any = loaded.model
    given = torch.tensor([ids], device=loaded.stack.input_device)
    found = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        tokenizer=loaded.tokenizer,  # for stop strings, where the generation config has them
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        return_dict_in_generate=False,
        max_new_tokens=max_new_tokens,
    )
    return found[0, len(ids) :].tolist()  # type: ignore[no-any-return]  # waits for the device


def _sum(answers: Sequence[Answer]) -> Answers:
    asked = [a.json_valid for a in answers if a.json_valid is not None]
    seconds = [a.seconds for a in answers]
    return Answers(
        ended=_share(a.ended for a in answers),
        empty=_share(check.is_empty(a.text) for a in answers),
        repetitive=_share(a.repetition > REPETITIVE for a in answers),
        json_valid=_share(asked) if asked else None,
        seconds_median=float(np.median(seconds)),
        seconds_p90=float(np.quantile(seconds, 0.9)),
    )


def _share(flags: Iterable[bool]) -> Interval:
    found = list(flags)
    return proportion(sum(found), len(found))


def _speed_ratio(pairs: Sequence[Pair]) -> Interval | None:
    logs = [
        math.log(p.dense.seconds / p.dense.tokens) - math.log(p.pruned.seconds / p.pruned.tokens)
        for p in pairs
        if min(p.dense.tokens, p.pruned.tokens) > 1
    ]
    return exponential(interval(np.array(logs))) if logs else None
