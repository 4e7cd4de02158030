"""Blocks, attention alone, and both, at equal measured time of writing.

    python benchmarks/units.py MODEL --data FOLDER --removed 3 -o out.json

Cuts ``--removed`` blocks and times what is left writing, behind ``--prompt-length`` tokens in each
of ``--sequences`` texts. The other systems remove what takes as much time, by what units are
measured to save. All are repaired as `sleb prune` repairs, without training; then right answers,
loss, bytes of weights and cache, and the speed of each case, models in turn. FOLDER: see
answers.py. The code that a model writes is run: see `sleb eval --run-code`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

import torch
from answers import Measure, options_of, prompts_given
from common import asked, main_of, measure, save, setting
from texts import prepare

import sleb
from sleb.core.errors import ResourceError
from sleb.core.plan import Saving
from sleb.core.units import named
from sleb.models.load import LoadedModel
from sleb.selection.savings import NEW, cache_bytes, step_seconds

SYSTEMS: dict[str, dict[str, Any]] = {
    "blocks": {},
    "attention": {"unit": "attention", "save": "time"},
    "attention by texts": {"unit": "attention", "save": "time", "metric": "loss"},
    "any": {"unit": "any", "save": "time"},
    "any by texts": {"unit": "any", "save": "time", "metric": "loss"},
}
"""Options of `sleb prune`. The first says how much time the others are to save."""


def writing_time(models: list[LoadedModel], length: int, sequences: int) -> list[float]:
    """Milliseconds of a step that writes a token of each text, of models in turn."""
    at = Saving(of="time", context=length, sequences=sequences)
    found = step_seconds([(model.stack, ()) for model in models], at)
    return [round(1000 * min(each), 4) for each in found]  # what else runs only adds


@torch.inference_mode()
def reading_time(models: list[LoadedModel], length: int, sequences: int) -> list[float]:
    """Milliseconds of reading a prompt into a cache, of models in turn."""
    device = models[0].stack.input_device
    ids = torch.ones((sequences, length), dtype=torch.long, device=device)
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(4):  # the first warms up
        for one, model in zip(seconds, models, strict=True):
            network: Any = model.model

            def read(network: Any = network) -> None:
                network(input_ids=ids, use_cache=True, logits_to_keep=1)

            took = measure(device, read)[1]
            if turn:
                one.append(took)
    return [round(1000 * median(each), 3) for each in seconds]


def speeds(models: dict[str, LoadedModel], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case: a prompt's length and how many at once. What does not fit says why."""
    found = []
    for length in options.prompts:
        for sequences in options.batches:
            row: dict[str, Any] = {"prompt": length, "sequences": sequences}
            room = next(iter(models.values())).stack.max_length
            if room is not None and length + NEW > room:
                found.append({**row, "skipped": f"the model reads {room} tokens"})
                continue
            try:
                for kind, timed in (("writing_ms", writing_time), ("reading_ms", reading_time)):
                    each = timed([*models.values()], length, sequences)
                    row[kind] = dict(zip(models, each, strict=True))
                    row[kind.replace("_ms", "_speedup")] = {
                        name: round(each[0] / ms, 3) for name, ms in row[kind].items()
                    }
            except torch.OutOfMemoryError as error:
                row["error"] = str(error).splitlines()[0]
                torch.cuda.empty_cache()
            found.append(row)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options_of(parser)
    parser.add_argument("--removed", type=int, default=3, help="blocks of the first system")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--prompt-length", type=int, default=2048, help="where time is equal")
    parser.add_argument("--sequences", type=int, default=16, help="texts at once there")
    parser.add_argument("--prompts", type=int, nargs="*", default=[256, 2048, 8192])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--repair-tokens", type=int, help="that repairs are fitted on")
    parser.add_argument("--given", type=int, help="tokens of answers that cuts are made with")
    return parser.parse_args()


class Bench:
    """What is compared: models by the name of their system, and the report so far."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.options, self.place = options, place
        self.texts = prepare(options.data, place, 0)
        self.measured = Measure(options, self.texts)
        self.given = prompts_given(options.data)
        self.models = {"dense": sleb.load(options.model, device=options.device)}
        self.speedup: float | None = None
        dense = self.models["dense"]
        self.report: dict[str, Any] = {
            "model": Path(options.model).name,
            "blocks": len(dense.stack),
            **setting(dense.stack.input_device, dense.stack.dtype),
            "what": asked(options, "model", "data", "out"),
            "dense": {**self.measured.of(dense), **self._bytes(dense)},
            "systems": [],
        }

    def _bytes(self, model: LoadedModel) -> dict[str, int]:
        """Of the weights, and of a token's keys and values."""
        held = cache_bytes(model.stack, 1)
        weights = sum(p.nbytes for p in model.model.parameters())
        return {"weight_bytes": weights, "cache_bytes_a_token": sum(held)}

    def run(self, name: str) -> None:
        """Prune as a system does, and measure what that leaves."""
        options, out, start = self.options, self.place / name, time.perf_counter()
        how: dict[str, Any] = {"windows": options.windows, "length": options.length}
        how |= {"prompts": self.given, "run_code": True, "keep": False, "device": options.device}
        how |= {"text": tuple(self.texts.calibration.values()), **SYSTEMS[name]}
        for key, value in (("repair_tokens", options.repair_tokens), ("new_tokens", options.given)):
            if value:
                how[key] = value
        if self.speedup is None:
            how["remove"] = options.removed
        else:
            how |= {"speedup": self.speedup, "prompt_length": options.prompt_length}
            how["sequences"] = options.sequences
        done = sleb.prune(options.model, out, **how)
        parts = {"plan": out / "plan.json"} if done.plan.parts else {}
        cut = sleb.load(options.model if parts else out, device=options.device, **parts)
        self.models[name] = cut
        at = options.prompt_length, options.sequences
        dense, ms = writing_time([self.models["dense"], cut], *at)
        if self.speedup is None:
            self.speedup = round(dense / ms, 4)
            if self.speedup <= 1:
                raise ResourceError(
                    f"without {options.removed} blocks a step takes {ms} ms and with them {dense}: "
                    "nothing to compare at; try a machine that does nothing else"
                )
        row = {
            "system": name,
            "removed": named(done.plan.order),
            "seconds": round(time.perf_counter() - start, 1),
            "writing_speedup": round(dense / ms, 4),
            "asked": self.speedup,
            "saving": done.plan.saving and done.plan.saving.model_dump(mode="json"),
            "repair": done.record.repair and done.record.repair.status,
            **self._bytes(cut),
            **self.measured.of(cut),
        }
        self.report["systems"].append(row)
        kept = {kind: row[kind]["kept"] for kind in self.measured.prompts}
        said = ("system", "removed", "writing_speedup", "cache_bytes_a_token", "perplexity_ratio")
        print(json.dumps({**{key: row[key] for key in said}, **kept}), flush=True)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(options, Path(place))
        for name in options.systems.split(","):
            try:
                bench.run(name)
            except Exception as error:  # of any type: the other rows are worth having
                row = {"system": name, "error": f"{type(error).__name__}: {error}"[:2000]}
                row["traceback"] = traceback.format_exc()[-4000:]
                bench.report["systems"].append(row)
                print(json.dumps(row), flush=True)
                if not (bench.speedup or 0) > 1:  # nothing says what the others should save
                    raise
            save(options.out, bench.report)
        bench.report["cases"] = speeds(bench.models, options)
        save(options.out, bench.report)


if __name__ == "__main__":
    main_of(main)
