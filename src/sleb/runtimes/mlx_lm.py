"""mlx-lm: a checkpoint folder, on Apple's GPUs or on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from sleb.core.errors import InputError
from sleb.runtimes.base import Prompts, Runtime, Settings


class MLX(Runtime):
    """One model. It chooses its number of threads itself, so ``settings.threads`` is not used."""

    def __init__(self, settings: Settings) -> None:
        self.mx: Any = import_module("mlx.core")
        self.cache = import_module("mlx_lm.models.cache")
        self.on_gpu = settings.device != "cpu"
        self.mx.set_default_device(self.mx.gpu if self.on_gpu else self.mx.cpu)
        load = import_module("mlx_lm.utils").load_model
        self.model, _ = load(
            Path(settings.path), lazy=True, trust_remote_code=settings.trust_remote_code
        )
        self.model.set_dtype(getattr(self.mx, settings.dtype))
        self.mx.eval(self.model.parameters())

    @staticmethod
    def prepare(settings: Settings) -> None:
        """See :class:`Runtime`."""
        if settings.device not in ("cpu", "mps"):
            raise InputError("it computes on Apple's GPUs, or on the CPU: use --device mps or cpu")
        import_module("mlx_lm.utils")

    def work(self, prompts: Prompts, new_tokens: int, fewest: bool) -> Callable[[], None]:
        """See :class:`Runtime`. A prompt is read into a cache; logits are of its last position."""
        ids = self.mx.array(prompts)

        def work() -> None:
            cache = self.cache.make_prompt_cache(self.model)
            self.model(ids[:, :-1], cache=cache)
            self.mx.eval([layer.state for layer in cache])
            token = ids[:, -1:]
            for _ in range(max(1, new_tokens)):
                token = self.model(token, cache=cache)[:, -1:].argmax(-1)
                self.mx.eval(token)

        return work

    def logprobs(self, ids: list[int]) -> list[float]:
        """See :class:`Runtime`."""
        cache = self.cache.make_prompt_cache(self.model)
        logits = self.model(self.mx.array([ids]), cache=cache)[0, :-1].astype(self.mx.float32)
        given = self.mx.array(ids[1:])[:, None]
        picked = self.mx.take_along_axis(logits, given, axis=-1)[:, 0]
        found: list[float] = (picked - self.mx.logsumexp(logits, axis=-1)).tolist()
        return found

    def memory(self) -> int | None:
        """See :class:`Runtime`."""
        return int(self.mx.get_active_memory()) if self.on_gpu else None
