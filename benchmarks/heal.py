"""How much of a cut's loss healing gives back: one cut, one run.

    python benchmarks/heal.py MODEL CUT --data FOLDER -o out.json

CUT is a folder from `sleb prune` or `sleb apply` on MODEL; FOLDER is laid out as texts.py says. The
cut is healed on the calibration texts of the five domains; perplexity over MODEL's is measured on
test texts that no training has seen, for the cut as it is and for the healed model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import asked, main_of, save, setting
from texts import DOMAINS, UNSEEN, prepare

import sleb
from sleb.distillation import heal


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("cut")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--test-windows", type=int, default=16, help="of each text")
    parser.add_argument("--test-length", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as place:
        texts = prepare(options.data, Path(place), options.seed)
        dense = sleb.load(options.model, device=options.device)
        test, _ = sleb.load_windows(
            dense.tokenizer,
            [*texts.test.values()],
            windows=options.test_windows * len(texts.test),
            length=options.test_length,
            seed=options.seed,
        )
        device, dtype = dense.stack.input_device, dense.stack.dtype

        def losses(model: Any) -> dict[str, float]:
            found = sleb.evaluate(model, test)
            return {name: quality.loss.value for name, quality in found.domains.items()}

        base = losses(dense)
        del dense
        before = losses(sleb.load(options.cut, device=options.device))
        start = time.monotonic()
        healed = Path(place) / "healed"
        names = ("tokens", "length", "lr", "batch", "seed", "device")
        given = {name: getattr(options, name) for name in names}
        calibrated = [*texts.calibration.values()]
        done = heal(options.cut, options.model, healed, text=calibrated, **given)
        seconds = time.monotonic() - start
        after = losses(sleb.load(healed, device=options.device))
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    report = {
        "what": asked(options, "out", "model", "cut", "data"),
        "model": Path(options.model).name,
        **setting(device, dtype),
        "tokens": done.tokens,
        "steps": done.steps,
        "training_seconds": done.seconds,
        "seconds": seconds,
        "peak_gb": peak,
        "cut": ratios(before, base),
        "healed": ratios(after, base),
    }
    save(options.out, report)
    for name in ("cut", "healed"):
        print(name, json.dumps(report[name]))
    print(f"{done.tokens:,} tokens in {done.seconds:.0f} s, all in {seconds:.0f} s")


def ratios(losses: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    """Perplexity over the dense model's by text, and geometric means over domains and the rest."""

    def mean(names: tuple[str, ...]) -> float:
        return round(float(np.exp(np.mean([losses[n] - base[n] for n in names]))), 4)

    own = {name: round(float(np.exp(losses[name] - base[name])), 4) for name in losses}
    return {**own, "geo": mean(tuple(DOMAINS)), "unseen_geo": mean(tuple(UNSEEN))}


if __name__ == "__main__":
    main_of(main)
