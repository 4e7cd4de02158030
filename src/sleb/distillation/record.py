"""What a healing did: heal.json beside the checkpoint, and what the model card says of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sleb.core.card import with_section
from sleb.core.plan import Calibration
from sleb.distillation.validation import HealedText

__all__ = ["Healed", "card"]


@dataclass(frozen=True, kw_only=True)
class Healed:
    """What :func:`heal` did, as heal.json records it.

    ``texts``, ``overall``: before and after, on held-out windows. ``checks``: (step, held-out
    divergence in nats/token), of which the best one's weights were taken. ``passes``: how often
    the training windows were gone through. ``cut_sha256``, ``healed_sha256``: over all tensors of
    the checkpoint that was healed, and of the result. ``repaired``: whether the cut was.
    ``seconds``: of training, over all calls where it was stopped in between.
    """

    path: str
    model: str
    cut: str
    removed: tuple[int, ...]
    repaired: bool
    texts: dict[str, HealedText]
    overall: HealedText
    steps: int
    best_step: int
    tokens: int
    passes: float
    stopped: str
    seconds: float
    trained_parameters: int
    checks: tuple[tuple[int, float], ...]
    settings: dict[str, Any]
    calibration: Calibration
    heldout: Calibration
    cut_sha256: str
    healed_sha256: str
    schema_version: int = 1

    def save(self, path: Path) -> None:
        """Write as JSON."""
        plain = asdict(self)
        for name in ("calibration", "heldout"):
            plain[name] = getattr(self, name).model_dump(mode="json")
        path.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def card(cut: Path, done: Healed) -> str:
    """The card of ``cut``, if it has one, with a section on what was done to it since."""
    how = f"LoRA of rank {done.settings['lora']}" if done.settings["lora"] else "AdamW"
    lines = [
        f"After the cut, {done.trained_parameters:,} parameters were trained to predict what the "
        f"original predicts ({how}, {done.steps} steps, {done.tokens:,} tokens). Perplexity on "
        f"{done.overall.windows} held-out windows of {done.heldout.length} tokens, as a ratio to "
        "the original's, and divergence from its predictions (KL, nats/token):",
        "",
        f"| text | windows | {'repaired' if done.repaired else 'cut'} | healed | divergence |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, text in [*done.texts.items(), ("all", done.overall)]:
        old, new = text.cut_divergence.value, text.healed_divergence.value
        lines.append(
            f"| {name} | {text.windows} | {text.cut_ratio.value:.2f} | "
            f"{text.healed_ratio.value:.2f} | {old:.3f} to {new:.3f} |"
        )
    lines += ["", "Settings, texts and hashes are in `heal.json`."]
    return with_section(cut, "Healed", lines)
