"""How much of what a cut lost healing gives back, by how it is done.

    python benchmarks/heal.py MODEL CUT --data FOLDER -o out.json --variant "as it is" \\
        --variant "lr 3e-5: lr=3e-5" --variant "answers: mix=texts:1+answers:2, batch=8"

CUT is a folder from `sleb prune` or `sleb apply` on MODEL, and made first where it is not there, of
``--removed`` blocks, by the ``--system`` of answers.py; FOLDER is laid out as texts.py and
answers.py say, with prompts to learn from in ``answers/*_fit.jsonl``. The cut is healed once for
each variant: a name, and behind a colon what it has of its own: options of `sleb heal`; ``mix``,
the kinds of windows that are learned from, with their parts; and constants of the modules that
heal, such as ``PASSES=10``. Of the result, of the cut and of MODEL are measured right answers to
``answers/*_dev.jsonl`` (as answers.py does) and perplexity on test texts of texts.py, none of which
was learned from. The file is written after each variant; those that are in it are not done again,
and none is begun that would not be done within ``--budget`` seconds. Answers need a GPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from answers import HEALING, SYSTEMS, Measure, prompts_given
from common import asked, main_of, save, setting
from texts import prepare

import sleb
from sleb.core.errors import InputError, SlebError
from sleb.core.plan import Plan
from sleb.core.progress import silent
from sleb.distillation import heal, mix, state, training
from sleb.distillation.mix import Material, Mix, group_of
from sleb.record import Stopwatch
from sleb.repairs import answering


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("cut")
    parser.add_argument("--variant", action="append", dest="variants", metavar="NAME: OPTION=VALUE")
    parser.add_argument("--data", type=Path, required=True, help="folder of texts and prompts")
    parser.add_argument("--removed", type=int, help="blocks that CUT lacks, if it is to be made")
    parser.add_argument("--system", choices=SYSTEMS, default="default", help="that makes it then")
    parser.add_argument("--minutes", type=float, help="of training, of every variant")
    parser.add_argument("--tokens", type=int, help="or so many")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for all")
    parser.add_argument("--limit", type=int, help="items of each set of answers")
    parser.add_argument("--new", type=int, default=384, help="tokens of an answer, at most")
    parser.add_argument("--test-windows", type=int, default=12, help="of each text")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--out", type=Path, required=True)
    return parser.parse_args()


def variant(given: str) -> tuple[str, dict[str, Any], dict[str, float]]:
    """Its name, its options, and the parts of its mix.

    Raises:
        InputError: it is not of the form "NAME: OPTION=VALUE, ...".
    """
    name, _, rest = given.partition(":")
    options: dict[str, Any] = {}
    parts: dict[str, float] = {}
    try:
        for each in filter(None, rest.split(",")):
            option, value = each.strip().split("=")
            if option == "mix":
                pairs = (part.partition(":") for part in value.split("+"))
                parts = {kind: float(part or 1) for kind, _, part in pairs}
            else:
                options[option] = value
                with suppress(ValueError):  # a word
                    options[option] = json.loads(value)
    except ValueError as error:
        raise InputError(f"variant '{given}': {error}; see the head of heal.py") from None
    return name, options, parts


@contextmanager
def constants(given: dict[str, Any]) -> Iterator[None]:
    """While this is open, the constants of the modules that heal are those of ``given``.

    Raises:
        InputError: no module has one of that name.
    """
    with ExitStack() as stack:
        for name, value in given.items():
            homes = [
                module for module in (mix, answering, training, state) if hasattr(module, name)
            ]
            if not homes:
                raise InputError(f"nothing that heals has a constant {name}")
            for module in homes:
                stack.enter_context(patch.object(module, name, value))
        yield


@contextmanager
def learning_from(parts: dict[str, float]) -> Iterator[None]:
    """Only windows of the kinds of ``parts`` are trained on, if there are any; all judge."""
    whole = Material.mix

    def some(material: Material, *args: Any) -> Mix:
        found = whole(material, *args)
        kinds = {kind: found.kinds[kind] for kind in found.kinds if group_of(kind) in parts}
        return replace(found, kinds=kinds, parts=parts)

    if parts:
        Material.mix = some  # type: ignore[method-assign]
    try:
        yield
    finally:
        Material.mix = whole  # type: ignore[method-assign]


def healed(options: argparse.Namespace, given: dict[str, Any], one: str, out: Path) -> Any:
    """One run, and what it took."""
    name, own, parts = variant(one)
    watch = Stopwatch(silent)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    amount = {"minutes": options.minutes, "tokens": options.tokens}
    other = {key: own.pop(key) for key in [*own] if key.isupper()}
    with learning_from(parts), constants(other):
        done = heal(options.cut, options.model, out, progress=watch, **{**given, **amount, **own})
    row = {"name": name, "asked": one}
    row |= {"seconds": round(time.monotonic() - start, 1), "phases": watch.seconds}
    row["healing"] = {key: getattr(done, key) for key in HEALING}
    if torch.cuda.is_available():
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return row


def main() -> None:
    start, options = time.monotonic(), parse()
    variants: list[str] = options.variants or ["as it is"]
    report: dict[str, Any] = {"healed": []}
    if options.out.is_file():
        report = json.loads(options.out.read_text())
    with tempfile.TemporaryDirectory() as place:
        texts = prepare(options.data, Path(place), 0)
        measure = Measure(options, texts)
        given = {
            "text": tuple(texts.calibration.values()),
            "prompts": prompts_given(options.data),
            "device": options.device,
        }
        if not Path(options.cut).exists():
            if not options.removed:
                raise InputError(f"there is no cut at {options.cut}: give --removed to make it")
            made = {"windows": 64, "length": 512, "remove": options.removed}  # as answers.py does
            asked_for = {**made, **given, **SYSTEMS[options.system]}
            sleb.prune(options.model, options.cut, keep=False, run_code=True, **asked_for)

        def measured(folder: str | Path) -> dict[str, Any]:
            return measure.of(sleb.load(folder, device=options.device))

        if "dense" not in report:
            dense = sleb.load(options.model, device=options.device)
            report["model"] = Path(options.model).name
            report |= setting(dense.stack.input_device, dense.stack.dtype)
            left = ("out", "model", "cut", "data", "variants", "budget")
            report["what"] = asked(options, *left)
            report["dense"] = measure.of(dense)
            del dense
            report["removed"] = Plan.load(Path(options.cut) / "plan.json").removed
            report["cut"] = measured(options.cut)
            save(options.out, report)
        measure.dense = report["dense"]
        longest = 0.0
        for n, one in enumerate(variants):
            begun = time.monotonic()
            if any(row["name"] == variant(one)[0] for row in report["healed"]):
                continue
            if begun - start + longest > options.budget:
                print(f"no time is left for: {', '.join(variants[n:])}", flush=True)
                break
            out = Path(place) / f"healed-{n}"
            try:
                row = healed(options, given, one, out)
                row |= measured(out)
            except SlebError as error:  # the other variants are worth having
                row = {"name": variant(one)[0], "asked": one, "error": str(error)}
            report["healed"].append(row)
            save(options.out, report)
            longest = max(longest, time.monotonic() - begun)
            kept = {kind: row[kind]["kept"] for kind in measure.prompts if kind in row}
            print(one, kept, row.get("perplexity_ratio"), row.get("error", ""), flush=True)


if __name__ == "__main__":
    main_of(main)
