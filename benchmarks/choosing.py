"""The page docs/choosing.md: which method when, and the models that were run, from the results.

python benchmarks/choosing.py -o docs/choosing.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from common import RESULTS
from pages import page

from sleb.core.files import write_text

__all__ = ["render"]

QUALITY = ("quality-h200-smollm2.json", "quality-h200-gemma-3-270m.json")
FINALS = ("finals-h200-smollm2.json", "finals-h200-gemma-3-270m.json")
ANSWERS = "answers-h200-1.5b.json"
HEALS = (
    "heal-h200-1.5b-default-3.json",
    "heal-h200-1.5b-answers-3.json",
    "heal-h200-1.5b-default-6.json",
    "heal-h200-1.5b-answers-6.json",
)
"""Of benchmarks/heal.py on that model; they name its cache."""
HEALED = "heal-h200-window.json"
UNITS = "units-h200-1.5b.json"
ROUNDED = ("quantize-smollm2.json", "quantize-gemma-3-270m.json")
CODER = "Qwen2.5-Coder-1.5B-Instruct"
BLOCKS = {CODER: 28}
NAMES = {
    "qwen.gguf": CODER,
    "qwen2.5-coder-1.5b": CODER,
    "SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct",
    "gemma-3-270m": "Gemma-3-270M",
}
SYSTEMS = {
    "cosine": "cosine (ShortGPT)",
    "sleb": "SLEB, as published",
    "greedy": "greedy: SLEB on all texts",
    "window": "best window",
    "beam": "beam of 4",
    "repair-aware": "loss after a repair",
}
CUTS = {
    **{system: f"{words}, plain" for system, words in SYSTEMS.items()},
    "default": "the default of prune, repaired",
    "merged": "the default of prune, repaired by merging",
    "texts alone": "the default of prune without prompts, repaired",
}


def read(file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return found


def name(model: str) -> str:
    """A model by its own name, where a result has that of its file."""
    return NAMES.get(model, model)


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def seconds(value: float) -> str:
    return (
        f"{value:.1f} s"
        if value < 10
        else f"{value:.0f} s"
        if value < 600
        else f"{value / 60:.0f} min"
    )


def quality_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every choice of blocks, the smaller cuts first."""
    rows = []
    right = report["dense"]["tasks"]["mean"]
    every = [*report["domains"], *report["unseen"]]
    for system in report["systems"]:
        times = {search["removed"]: search["seconds"] for search in system["searches"]}
        for cut in system["sets"]:
            after = cut["repaired"]
            took = times.get(cut["removed"])
            rows.append(
                {
                    "system": system["system"],
                    "removed": cut["removed"],
                    "plain": cut["plain"]["geo"]["value"],
                    "repaired": after["geo"]["value"],
                    "unseen": after["unseen_geo"]["value"],
                    "answers": after["tasks"]["mean"] / right,
                    "all": geometric_mean(after["domains"][n]["ratio"]["value"] for n in every),
                    "search": "" if took is None else seconds(took),
                    "seconds": max(times.values()) + cut["repair"]["seconds"],
                }
            )
    order = [*SYSTEMS]
    return sorted(rows, key=lambda row: (row["removed"], order.index(row["system"])))


def sizes() -> dict[str, tuple[float, float]]:
    """Bytes of the weights in 16 bit, and of a block of them, by model."""
    units = read(UNITS)
    blocks = next(s for s in units["systems"] if s["system"] == "blocks")
    dense = units["dense"]["weight_bytes"]
    found = {
        name(units["model"]): (dense, (dense - blocks["weight_bytes"]) / len(blocks["removed"]))
    }
    for report in map(read, ROUNDED):
        whole, cut = (
            next(row["disk_bytes"] for row in report["rows"] if row["name"] == of)
            for of in ("dense", "pruned")
        )
        found[name(report["model"])] = (whole, (whole - cut) / len(report["removed"]))
    return found


def healings() -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Report, how it was made, and measured, of each cut and of that healed."""
    for report in map(read, HEALS):
        by = "by answers" if report["what"]["system"] == "answers" else "as by default"
        yield report, f"chosen {by}, repaired", report["cut"]
        yield report, f"chosen {by}, healed", report["healed"][0]


def heal_rows() -> Iterator[dict[str, Any]]:
    for report, how, row in healings():
        yield {
            "model": CODER,
            "removed": f"{report['what']['removed']} of {BLOCKS[CODER]}",
            "how": how,
            "tasks": row["code"]["kept"],
            "sums": row["math"]["kept"],
            "perplexity": row["perplexity_ratio"],
            "time": seconds(row["healing"]["seconds"]) if "healing" in row else "",
        }
    report = read(HEALED)
    for how in ("cut", "healed"):
        yield {
            "model": name(report["model"]),
            "removed": "6 of 30",
            "how": "repaired" if how == "cut" else "healed, on texts alone",
            "tasks": None,
            "sums": None,
            "perplexity": (report[how]["geo"] ** 5 * report[how]["unseen_geo"] ** 3) ** (1 / 8),
            "time": "" if how == "cut" else seconds(report["training_seconds"]),
        }


def plain_rows() -> Iterator[dict[str, Any]]:
    """Right answers of plain cuts, of what `prune` makes, and of that healed, by depth."""
    rows, report = [], read(ANSWERS)
    for cut in report["cuts"]:
        rows.append(
            {
                "model": name(report["model"]),
                "removed": len(cut["removed"]),
                "how": CUTS[cut["system"]],
                "blocks": ", ".join(map(str, sorted(cut["removed"]))),
                "tasks": cut["code"]["kept"],
                "sums": cut["math"]["kept"],
                "asked": f"{len(report['dense']['code']['items'])}, "
                f"{len(report['dense']['math']['items'])}",
                "perplexity": cut["perplexity_ratio"],
            }
        )
    yield from sorted(rows, key=lambda row: (row["removed"], row["sums"]))


def model_rows(
    qualities: list[tuple[dict[str, Any], list[dict[str, Any]]]],
) -> Iterator[dict[str, Any]]:
    """What `prune` chose by itself, and healed: of every model and depth."""
    weights = sizes()

    def size(model: str, removed: int) -> str:
        whole, block = weights[model]
        return f"{whole / 1e6:,.0f} → {(whole - removed * block) / 1e6:,.0f} MB"

    for report, rows in qualities:
        for removed in sorted({row["removed"] for row in rows}):
            taken = taken_of(report, removed)
            row = next(r for r in rows if (r["removed"], r["system"]) == (removed, taken))
            model = name(report["model"])
            yield {
                "model": model,
                "machine": report["machine"],
                "removed": removed,
                "blocks": report["blocks"],
                "how": f"repaired ({taken})",
                "size": size(model, removed),
                "tasks": None,
                "sums": None,
                "questions": row["answers"],
                "perplexity": row["all"],
                "time": seconds(row["seconds"]),
            }
    report = read(ANSWERS)
    cuts = [
        (report, "repaired", len(cut["removed"]), cut, cut["seconds"])
        for cut in report["cuts"]
        if cut["system"] == "default"
    ]
    cuts += [
        (report, how, report["what"]["removed"], row, row["healing"]["seconds"])
        for report, how, row in healings()
        if "healing" in row
    ]
    for report, how, removed, row, took in cuts:
        yield {
            "model": CODER,
            "machine": report["machine"],
            "removed": removed,
            "blocks": BLOCKS[CODER],
            "how": how,
            "size": size(CODER, removed),
            "tasks": row["code"]["kept"],
            "sums": row["math"]["kept"],
            "questions": None,
            "perplexity": row["perplexity_ratio"],
            "time": seconds(took),
        }


def taken_of(report: dict[str, Any], removed: int) -> str:
    """Which of greedy and window `prune` takes, by the comparison that it makes."""
    file = next(file for file in FINALS if is_of(file, report))
    row = next(row for row in read(file)["depths"] if row["removed"] == removed)
    return min(("greedy", "window"), key=lambda system: row["sets"][system]["increase"])


def is_of(file: str, report: dict[str, Any]) -> bool:
    return name(read(file)["model"]) == name(report["model"])


def render() -> str:
    """The page."""
    qualities = [(report, quality_rows(report)) for report in map(read, QUALITY)]
    return page(
        "choosing.md.j2",
        name=name,
        share=share,
        systems=SYSTEMS,
        qualities=qualities,
        heals=[*heal_rows()],
        plains=[*plain_rows()],
        units=read(UNITS),
        quantized=[*map(read, ROUNDED)],
        blocks={name(report["model"]): report["blocks"] for report, _ in qualities},
        models=[*model_rows(qualities)],
        files=[*QUALITY, *FINALS, ANSWERS, *HEALS, HEALED, UNITS, *ROUNDED],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    write_text(parser.parse_args().out, render())


if __name__ == "__main__":
    main()
