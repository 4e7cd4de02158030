"""The harness's model for transformers, around a model that is loaded already.

It adds what a paired comparison needs: nothing is truncated, progress is told, NaN is refused, and
generating with bypassed blocks is exact.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from sleb.core.errors import DataError, InputError
from sleb.core.progress import Progress, Tick
from sleb.models.load import LoadedModel
from sleb.models.stack import decoder_config

__all__ = ["Scorer"]

NO_LIMIT = 2**17  # tokens; for models that read texts of any length
MOST = {"cpu": 16}
MOST_ELSEWHERE = 64
LOGITS = 2**30  # bytes that the logits of a batch may take
TRIAL = 4  # tokens


class Scorer(HFLM):  # type: ignore[misc]
    """Scores requests of the harness. See :meth:`prepare`."""

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
        with self.progress.stage(self.title, len(requests)) as tick:
            self.set_cache_hook(_Ticking(tick))
            try:
                return score(requests, disable_tqdm=True)
            finally:
                self.set_cache_hook(CacheHook(None))

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
