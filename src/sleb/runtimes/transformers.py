"""transformers: its own forward pass and generation, also with a draft model."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sleb.core.errors import DataError, UnsupportedModel
from sleb.models.auto_classes import auto_class
from sleb.runtimes.base import Prompts, Runtime, Settings


class Transformers(Runtime):
    """Greedy, with a cache. To time, blocks are found by sleb's own loader, so that they can be
    bypassed; to score, the checkpoint is loaded by transformers alone."""

    def __init__(self, settings: Settings) -> None:
        self.drafts: list[Any] = []
        if settings.purpose == "score":
            self.model: Any = _plain(settings)
            return
        loaded = _load(settings)
        self.model, self.stack = loaded.model, loaded.stack
        self.ends: dict[str, Any] = {"pad_token_id": 0}  # never ended early
        if settings.purpose == "draft":
            own = self.model.generation_config
            self.ends = {"eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id or 0}
        self.model.generation_config = _generation(**self.ends)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        stays = _needed(self.stack)
        self.bypassed = set(range(len(self.stack))) - stays
        self.fewest_blocks = len(stays) if self.bypassed else None

    @staticmethod
    def prepare(settings: Settings) -> None:
        """See :class:`Runtime`: the model's own code, and torch's first product of matrices."""
        import torch

        from sleb.models.load import DTYPES, empty_model, load_config

        remote = settings.trust_remote_code
        config = load_config(Path(settings.path), trust_remote_code=remote)
        empty_model(config, trust_remote_code=remote)
        square = torch.ones((64, 64), dtype=DTYPES[settings.dtype], device=settings.device)
        (square @ square).sum().item()

    def work(self, prompts: Prompts, new_tokens: int, fewest: bool) -> Callable[[], None]:
        """See :class:`Runtime`. A prompt is read as before generating: it fills a cache, and only
        the last position's logits are computed, where the model has that option."""
        import torch

        ids = torch.tensor(prompts, device=self.stack.input_device)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        call = self.model
        if new_tokens:
            call = self.model.generate
            given |= {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
            given |= {"do_sample": False, "num_beams": 1}
        elif "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            given["logits_to_keep"] = 1

        def work() -> None:
            with torch.inference_mode(), self.stack.bypassed(self.bypassed if fewest else ()):
                made = call(**given, use_cache=True)
            self._wait()
            if new_tokens and (got := made.shape[1] - ids.shape[1]) != new_tokens:
                raise DataError(
                    f"{self.stack.name} ended after {got} of {new_tokens} tokens, so it cannot be "
                    "timed"
                )

        return work

    def logprobs(self, ids: list[int]) -> list[float]:
        """See :class:`Runtime`."""
        import torch

        given = torch.tensor([ids], device=self.model.device)
        with torch.inference_mode():
            logits = self.model(input_ids=given, use_cache=False).logits[0, :-1].float()
            found: list[float] = (
                logits.log_softmax(-1).gather(-1, given[0, 1:, None])[:, 0].tolist()
            )
        return found

    def add_draft(self, settings: dict[str, Any], draft_tokens: int) -> None:
        """Load one more model, which is to draft ``draft_tokens`` at a time and never stops
        early."""
        model = _load(Settings(**settings)).model
        model.generation_config = _generation(
            **self.ends,
            num_assistant_tokens=draft_tokens,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        self.drafts.append(model)

    def generate(
        self, ids: list[int], new_tokens: int, draft: int | None, counted: bool
    ) -> dict[str, Any]:
        """``tokens`` after ``ids``, alone or with a draft model, and the ``seconds`` that it took;
        if ``counted``, also how many drafted tokens were ``proposed`` and ``accepted``.

        A pass of the dense model reads the drafted tokens at the end of its input; one is accepted
        if it and all before it are the likeliest by this pass's own logits.

        Raises:
            UnsupportedModel: transformers refuses to draft for this kind of model.
        """
        import torch

        proposed = accepted = 0
        read = len(ids)  # tokens before the drafted ones: the prompt at first, later one

        def count(_: Any, __: Any, given: dict[str, Any], made: Any) -> None:
            nonlocal proposed, accepted, read
            tokens = given["input_ids"][0]
            drafted, read = len(tokens) - read, 1
            if drafted:
                likeliest = made.logits[0, -drafted - 1 : -1].argmax(-1)
                proposed += drafted
                accepted += int((tokens[-drafted:] == likeliest).cumprod(0).sum())

        prompt = torch.tensor([ids], device=self.stack.input_device)
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
        if draft is not None:
            options["assistant_model"] = self.drafts[draft]
        hook = self.model.register_forward_hook(count, with_kwargs=True) if counted else None
        try:
            self._wait()
            start = time.perf_counter()
            with torch.inference_mode():
                made = self.model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), **options
                )
            self._wait()
            seconds = time.perf_counter() - start
        except (ValueError, NotImplementedError) as error:
            if draft is None:
                raise
            reason = " ".join(str(error).split())[:200]
            raise UnsupportedModel(
                f"transformers cannot draft for {self.stack.name}: {reason}"
            ) from None
        finally:
            if hook:
                hook.remove()
        found = {"tokens": made[0, len(ids) :].tolist(), "seconds": seconds}
        return {**found, "proposed": proposed, "accepted": accepted}

    def _wait(self) -> None:
        """Until the device is done."""
        import torch

        kind = self.stack.input_device.type
        if kind != "cpu":
            getattr(torch, kind).synchronize()


def _plain(settings: Settings) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = settings.trust_remote_code
    config = AutoConfig.from_pretrained(settings.path, trust_remote_code=trust)
    model = (auto_class(config) or AutoModelForCausalLM).from_pretrained(
        settings.path,
        dtype=getattr(torch, settings.dtype),
        use_safetensors=True,
        trust_remote_code=trust,
    )
    return model.to(settings.device).eval()


def _load(settings: Settings) -> Any:
    from sleb.models.load import load  # here alone: an interpreter that scores has no sleb

    return load(
        settings.path,
        plan=settings.plan,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
    )


def _generation(**options: Any) -> Any:
    """In place of the model's own, which might sample, punish repetition, or end."""
    from transformers import GenerationConfig

    return GenerationConfig(**options)


def _needed(stack: Any) -> set[int]:
    """The blocks that generation with a cache needs: transformers takes positions and masks from
    the first, some models also from the last, of each kind."""
    from sleb.models.stack import decoder_config

    n = len(stack)
    kinds = list(getattr(decoder_config(stack.model.config), "layer_types", None) or ["all"] * n)
    first = {kinds.index(kind) for kind in kinds}
    return first | {n - 1 - kinds[::-1].index(kind) for kind in kinds}
