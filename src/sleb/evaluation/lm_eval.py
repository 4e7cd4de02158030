"""lm-evaluation-harness as a library: finding tasks, and scoring a loaded model on them.

Only imported where it is installed (extra ``eval``).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task as harness_task
import numpy as np
import torch
from huggingface_hub import utils as hub
from lm_eval.api.metrics import mean
from lm_eval.api.model import CacheHook
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from torch import Tensor
from yaml import YAMLError

from sleb.core.errors import (
    SAID,
    DataError,
    InputError,
    ResourceError,
    did_you_mean,
    map_exceptions,
    said,
)
from sleb.core.progress import Progress, Tick
from sleb.evaluation.questions import Questions
from sleb.models.load import LoadedModel
from sleb.models.source import quiet_transformers
from sleb.models.stack import decoder_config
from sleb.selection.sweep import Patch

METRICS = ("acc_norm", "acc", "exact_match")
"""In this order, if a task has several."""
NO_LIMIT = 2**17  # tokens; for models that read texts of any length
MOST = {"cpu": 16}  # requests per forward pass
MOST_ELSEWHERE = 64
LOGITS = 2**30  # bytes that the logits of a batch may take
TRIAL = 4  # tokens
CODE_EVAL = "HF_ALLOW_CODE_EVAL"
_TRANSPORTS = ("httpx", "httpcore", "requests", "urllib3", "aiohttp", "huggingface_hub")
_LOCAL = ("json", "csv", "parquet", "text", "arrow", "pandas")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task with its data. ``picked``: indices of the items to score, null for all."""

    name: str
    metric: str
    task: Any
    picked: tuple[int, ...] | None
    longest: int


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Score of each item, in 0..1, and the chance of guessing right, where it is known."""

    values: tuple[float, ...]
    chance: float | None


class Harness:
    """Tasks and a model to score on them. ``run_code``: also tasks that run what it writes, in the
    way that the harness has for that, see docs/tasks.md."""

    def __init__(
        self, model: LoadedModel, *, batch: int | None, run_code: bool = False, progress: Progress
    ) -> None:
        self.model, self.batch, self.progress = model, batch, progress
        self.run_code = run_code
        with _quiet():
            self.scorer = Scorer(model, progress)

    def load(
        self,
        questions: Sequence[Questions],
        names: Sequence[str],
        folder: str | Path | None,
        *,
        limit: int | None,
        seed: int,
    ) -> list[Task]:
        """All tasks with their data, in the order given, once every item of each was checked."""
        loaded: dict[str, Any] = {}
        reading = self.progress.stage("reading tasks", None)
        with _quiet(), _seeded(), _running_code(self.run_code), reading:
            for asked in questions:
                loaded[asked.name] = harness_task.ConfigurableTask(
                    config=asked.task(self.scorer.tokenizer)
                )
            manager = find_names(names, folder) if names else None
            for name in names:
                for found in _load(manager, name):
                    if found.task_name in loaded:
                        raise InputError(
                            f"'{name}' has a task '{found.task_name}', and so has another one that "
                            "is asked for; leave one out"
                        )
                    loaded[found.task_name] = found
            return [self._checked(name, task, limit, seed) for name, task in loaded.items()]

    def _checked(self, name: str, task: Any, limit: int | None, seed: int) -> Task:
        if getattr(task, "UNSAFE_CODE", False) and not self.run_code:
            raise InputError(
                f"task '{name}' runs code that the model writes; allow that with --run-code, on a "
                "machine or in a container that may be lost"
            )
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"task '{name}' needs images or sound; sleb scores text alone")
        metric = _metric(name, task)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        count = len(task.eval_docs)
        picked = None
        if limit is not None and limit < count:
            picked = tuple(sorted(random.Random(seed).sample(range(count), limit)))
        # whatever its templates and functions raise on an item
        why = f"task '{name}' cannot be built: {SAID}"
        with map_exceptions((Exception, InputError, why)), _seeded():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            task.build_all_requests(samples=picked and list(picked), rank=0, world_size=1)
            _check_answers(name, task, picked)
        longest = self.scorer.longest(name, task.instances, picked)
        return Task(name=name, metric=metric, task=task, picked=picked, longest=longest)

    def score(
        self, task: Task, removed: Collection[int] = (), patch: Patch | None = None
    ) -> Scores:
        """Score the model, with ``removed`` blocks bypassed if there are some, under ``patch``."""
        title = f"{task.name}, {'pruned' if removed else 'dense'}"
        self.scorer.prepare(title, self.batch, task.longest, bypassing=bool(removed))
        with contextlib.ExitStack() as stack:
            ways = (_quiet(), _seeded(), _running_code(self.run_code))
            for context in (*ways, *([patch()] if patch else [])):
                stack.enter_context(context)
            stack.enter_context(self.model.stack.bypassed(removed))
            task.task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            try:
                found = evaluate(
                    self.scorer,
                    {"tasks": {task.name: task.task}},
                    samples=task.picked and {task.name: list(task.picked)},
                    bootstrap_iters=0,
                    log_samples=True,
                    confirm_run_unsafe_code=self.run_code,
                )
            except torch.OutOfMemoryError:
                raise ResourceError(
                    f"task '{task.name}' does not fit in memory; try --batch 1"
                ) from None
        rows = found["samples"][task.name]
        first = [row for row in rows if row["filter"] == rows[0]["filter"]]
        # a function may give its score another name than its own, as humaneval's gives pass@1
        metric = task.metric if task.metric in rows[0] else rows[0]["metrics"][0]
        values = tuple(_value(task.name, metric, row) for row in first)
        aggregate = found["results"][task.name][f"{metric},{rows[0]['filter']}"]
        if not np.isclose(float(np.mean(values)), aggregate):  # then it is no mean of items
            raise InputError(f"task '{task.name}': its {metric} is no mean over items")
        return Scores(values=values, chance=_chance(task.task, [row["doc"] for row in first]))


class Scorer(HFLM):  # type: ignore[misc]
    """The harness's model for transformers, around a model that is loaded already.

    It adds what a paired comparison needs: nothing is truncated, progress is told, NaN is refused,
    and generating with bypassed blocks is exact. See :meth:`prepare`.
    """

    def __init__(self, loaded: LoadedModel, progress: Progress) -> None:
        super().__init__(
            pretrained=loaded.model,
            backend="causal",
            # the harness sets a padding token
            tokenizer=copy.deepcopy(loaded.tokenizer),
            max_length=loaded.stack.max_length or NO_LIMIT,
            softmax_dtype="float32",
        )
        self._device = loaded.stack.input_device
        self.progress = progress
        self.title = ""
        self.bypassing = False
        self._cached: bool | None = None
        self._vocabulary = decoder_config(loaded.model.config).vocab_size

    def prepare(self, title: str, batch: int | None, longest: int, *, bypassing: bool) -> None:
        """What comes next: ``title`` of its progress; requests per forward pass, None for what
        fits; tokens of the longest request; whether blocks are bypassed meanwhile."""
        self.title, self.bypassing, self._cached = title, bypassing, None
        # log-probabilities are a second copy, in float32
        fits = LOGITS // (longest * self._vocabulary * 8)
        most = MOST.get(self.device.type, MOST_ELSEWHERE)
        self.batch_size_per_gpu = batch or max(1, min(most, fits))

    # -- nothing is truncated ----------------------------------------------------------------

    def longest(
        self, name: str, instances: Sequence[Any], picked: Sequence[int] | None = None
    ) -> int:
        """Tokens of the longest of these requests, answer included.

        Raises:
            InputError: one is longer than the model reads, or has an answer without tokens.
        """
        found = 1
        for one in instances:
            tokens, answer = self._tokens(one)
            number = one.doc_id if picked is None else picked[one.doc_id]
            item = one.doc.get("where") if isinstance(one.doc, dict) else None
            where = f"task '{name}', {item or f'item {number}'}"
            if not answer:
                raise InputError(f"{where}: an answer has no tokens of its own; write another one")
            # the last token of a continuation is only predicted, never read
            given = one.request_type == "loglikelihood"
            if tokens - given > self.max_length:
                raise InputError(
                    f"{where} takes {tokens - given} tokens with its answer, and the model reads "
                    f"{self.max_length}; shorten it or leave it out"
                )
            found = max(found, tokens)
        return found

    def _tokens(self, one: Any) -> tuple[int, int]:
        """Tokens of a request in all, and of its answer."""
        if one.request_type == "generate_until":
            context, options = one.args[:2]
            room = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            return len(self.tok_encode(context)) + room, room
        if one.request_type == "loglikelihood":
            context, answer = one.args
            if not context:  # one token stands for it
                count = len(self.tok_encode(answer, add_special_tokens=False))
                return 1 + count, count
            before, after = self._encode_pair(context, answer)
            return len(before) + len(after), len(after)
        return 1, 1  # rolling: the harness cuts windows that fit

    # -- progress, and no bars of the harness's ------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """See HFLM."""
        return self._staged(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """See HFLM."""
        return self._staged(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        """See HFLM."""
        return self._staged(super().generate_until, requests)

    def _staged(self, score: Callable[..., Any], requests: list[Any]) -> Any:
        before = self.cache_hook
        with self.progress.stage(self.title, len(requests)) as tick:
            self.set_cache_hook(_Ticking(tick))
            try:
                return score(requests, disable_tqdm=True)
            finally:
                self.set_cache_hook(before)

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> Any:
        found = super()._loglikelihood_tokens(requests, **{**options, "disable_tqdm": True})
        if any(math.isnan(value) for value, _ in found):
            raise DataError(f"{self.title}: log-probabilities are NaN; try --dtype float32")
        return found

    # -- generating with bypassed blocks -------------------------------------------------------

    def _model_generate(self, context: Tensor, **options: Any) -> Any:
        if self.bypassing and self._cached is None:
            self._cached = self._cache_is_exact(context, options["attention_mask"])
        if not self.bypassing or self._cached:
            return super()._model_generate(context, **options)
        own, before = self.model.generate, vars(self.model).get("generate")
        # the harness always asks for the cache
        self.model.generate = lambda **given: own(**{**given, "use_cache": False})
        try:
            return super()._model_generate(context, **options)
        finally:
            if before is None:
                del self.model.generate
            else:
                self.model.generate = before

    @torch.inference_mode()
    def _cache_is_exact(self, context: Tensor, attention_mask: Tensor) -> bool:
        """Whether bypassed blocks leave the cache as it should be, on some tokens. transformers
        takes positions and masks from certain layers of it, and ``bypassed`` refuses these."""

        def tokens(use_cache: bool) -> Tensor:
            return self.model.generate(  # type: ignore[no-any-return]
                input_ids=context[:1],
                attention_mask=attention_mask[:1],
                max_new_tokens=TRIAL,
                do_sample=False,
                use_cache=use_cache,
                pad_token_id=self.tokenizer.pad_token_id,
            )

        try:
            return torch.equal(tokens(True), tokens(False))
        except InputError:
            return False


class _Ticking(CacheHook):  # type: ignore[misc]
    """The harness hands each finished request to this hook."""

    def __init__(self, tick: Tick) -> None:
        super().__init__(None)
        self._tick = tick

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """A request is done."""
        self._tick(1)


def find_names(names: Sequence[str], folder: str | Path | None) -> Any:
    """A task manager that knows all ``names``.

    Raises:
        InputError: one is known neither to a .yaml file in ``folder`` nor to the harness.
    """
    own = _manager(folder, False) if folder is not None else None
    # a group's members may be the harness's
    if own and all(n in own.all_tasks and n not in own.all_groups for n in names):
        return own
    manager = _manager(folder, True)
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(f"unknown task '{name}'{_hint(name, folder, manager)}")
    return manager


def _hint(name: str, folder: str | Path | None, manager: Any) -> str:
    """What may have been meant, or which file in the folder could not be read."""
    if name.endswith((".yaml", ".yml")):
        return "; give the `task` that the file names, and its folder with --tasks-folder"
    if broken := _unreadable(folder, manager):
        return f"; in {folder}, this cannot be read: {broken}"
    return did_you_mean(name, manager.all_tasks) or "; give a .jsonl file, or see: lm_eval ls tasks"


def _manager(folder: str | Path | None, defaults: bool) -> Any:
    files = sorted(Path(folder).rglob("*.yaml")) if folder is not None else []
    stamps = tuple((str(path), path.stat().st_mtime_ns) for path in files)
    return _indexed(None if folder is None else str(folder), defaults, stamps)


@lru_cache(maxsize=8)
def _indexed(folder: str | None, defaults: bool, _: tuple[tuple[str, int], ...]) -> Any:
    """Reading the harness's thousands of files takes half a minute, so once is enough."""
    with _quiet():
        return TaskManager(include_path=folder, include_defaults=defaults)


def _unreadable(folder: str | Path | None, manager: Any) -> str:
    """The first .yaml file that the harness passes over, and why."""
    known = {getattr(entry, "yaml_path", None) for entry in manager.task_index.values()}
    for path in sorted({*Path(folder).rglob("*.yaml")} - known) if folder is not None else ():
        try:
            manager.load([str(path)])
        except (YAMLError, OSError, ValueError) as error:  # its own errors, or those of an include
            return f"{path.name}: {said(error)}"
        except Exception:  # readable, but no task by itself, as what others include
            continue
    return ""


def _load(manager: Any, name: str) -> list[Any]:
    """A task, or all of a group or tag."""
    try:
        return list(manager.load([name])["tasks"].values())
    except Exception as error:  # of many libraries, and of code that the definition names
        path = getattr(manager.task_index.get(name), "cfg", None) or {}
        local = path.get("dataset_path") in _LOCAL
        if not local and _is_network(error):
            raise ResourceError(
                f"the data of task '{name}' cannot be fetched ({said(error)}); check the network, "
                "or define the task on a local file: see docs/tasks.md"
            ) from None
        raise InputError(f"task '{name}' cannot be loaded: {said(error)}") from None


def _is_network(error: BaseException | None) -> bool:
    """Whether anything in the chain of causes is of a transport, or of the hub's client."""
    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError)):
            return True
        if type(error).__module__.split(".")[0] in _TRANSPORTS:
            return True
        error = error.__cause__ or error.__context__
    return False


def _metric(name: str, task: Any) -> str:
    better = task.higher_is_better()
    means = [m for m, how in task.aggregation().items() if how is mean and better.get(m)]
    for metric in (*METRICS, *map(str, means)):
        if metric in means:
            return metric
    raise InputError(
        f"task '{name}' has no metric that is a mean over items, of which more is better (it has "
        f"{', '.join(task.aggregation()) or 'none'}); for perplexity use --text"
    )


def _check_answers(name: str, task: Any, picked: Sequence[int] | None) -> None:
    """The harness scores an item as wrong if its right answer is none of its choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    for i, doc in task.doc_iterator(samples=picked and list(picked)):
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        choices = task.doc_to_choice(doc)
        for answer in gold if isinstance(gold, list) else [gold]:
            known = 0 <= answer < len(choices) if isinstance(answer, int) else answer in choices
            if not known:
                raise InputError(
                    f"task '{name}', item {picked[i] if picked else i}: its answer {answer!r} is "
                    f"none of the {len(choices)} choices; look at doc_to_target in its definition"
                )


def _value(task: str, metric: str, row: dict[str, Any]) -> float:
    value = row.get(metric)
    if isinstance(value, (bool, int, float, np.number)) and 0 <= float(value) <= 1:
        return float(value)
    raise InputError(
        f"task '{task}': its {metric} gives an item {value!r}, which is no score in 0..1"
    )


def _chance(task: Any, docs: Sequence[Any]) -> float | None:
    """Mean over items of right choices over choices; None where nothing is chosen."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    shares = []
    for doc in docs:
        gold = task.doc_to_target(doc)
        right = len(set(gold)) if isinstance(gold, list) else 1
        shares.append(right / len(task.doc_to_choice(doc)))
    return float(np.mean(shares))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence notices and bars of the harness and of what it downloads with; not its errors."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    drawing = [lib for lib in (datasets, hub) if not lib.are_progress_bars_disabled()]
    bar = harness_task.tqdm
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        for lib in drawing:
            lib.disable_progress_bars()
        harness_task.tqdm = partial(bar, disable=True)  # it has no switch of its own
        with quiet_transformers():
            yield
    finally:
        harness_task.tqdm = bar
        for lib in drawing:
            lib.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _running_code(allowed: bool) -> Iterator[None]:
    """Tell Hugging Face's code_eval, which tasks run code by, that this is wanted."""
    if not allowed or CODE_EVAL in os.environ:
        yield
        return
    os.environ[CODE_EVAL] = "1"
    try:
        yield
    finally:
        del os.environ[CODE_EVAL]


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """The harness's own seeds, so that its figures come out; the caller's states are put back."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
