"""The pages docs/performance.md and docs/scale.md, from results and a frame of text around them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import table

__all__ = ["fetched", "merged", "render", "scale_page"]

HERE = Path(__file__).resolve().parent
Sections = Mapping[str, Any]
UNMEASURED = {"error", "skipped", "stopped"}
COMMAND = """```bash
python benchmarks/performance.py --model SMOLLM2 -o benchmarks/results/performance.json
python benchmarks/performance.py --render benchmarks/results/performance*.json > docs/performance.md
```"""

RATES = {
    "tflops": "TFLOP/s of a sweep on one GPU",
    "fetch": "GB/s at which the GPUs of one machine together fetch streamed blocks",
    "link": "GB/s of an all-reduce within a machine",
    "network": "GB/s of an all-reduce between machines, per GPU",
    "meet": "seconds that ranks take to meet after a step",
    "memory": "GB of a GPU for weights and hidden states",
}


def merged(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sections of several results: of one that is in several of them, the last that was
    measured."""
    sections: dict[str, Any] = {}
    for report in reports:
        for name, row in report["sections"].items():
            if name not in sections or not row.keys() & UNMEASURED:
                sections[name] = row
    return sections


def render(paths: Sequence[Path]) -> str:
    """The whole page; see :func:`merged`."""
    reports = [json.loads(path.read_text()) for path in paths]
    body = "\n".join(_measured(reports)) if reports else "Not measured yet."
    return (HERE / "performance.md.in").read_text().replace("{measured}", f"{body}\n\n{COMMAND}")


def _measured(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    sections = merged(reports)
    yield from dict.fromkeys(_about(r["about"]) for r in reports)
    notes = [r["about"]["note"] for r in reports if "note" in r["about"]]
    yield from dict.fromkeys(notes)
    if machines := [r["sections"]["machine"] for r in reports if "machine" in r["sections"]]:
        yield _machines(machines)
    for part in (_targets, _searches, _block, _repairs, _speeds, _stream, _missing):
        if lines := list(part(sections)):
            yield ""
            yield from lines


def _about(about: Mapping[str, Any]) -> str:
    tiny = ", shapes made tiny to try the script: **no figures**"
    return (
        f"{about['machine']}, torch {about['torch']}, transformers {about['transformers']}, "
        f"{about['dtype']}{tiny if about['shape'] != 'full' else ''}."
    )


def _machines(machines: Sequence[Mapping[str, Any]]) -> str:
    """What the machines of all results reached, from the least to the most."""

    def span(key: str) -> str:
        found = sorted(m[key] for m in machines if key in m)
        ends = dict.fromkeys(f"{x:,.0f}" if x >= 20 else f"{x:.1f}" for x in (found[0], found[-1]))
        return " to ".join(ends)

    said = (
        f"A matrix product of {machines[0]['matmul_n']}³ ran at {span('matmul_tflops')} TFLOP/s, a "
        f"copy within the device at {span('copy_gb_per_s')} GB/s (read and written)"
    )
    if "pinned_to_device_gb_per_s" in machines[0]:
        said += (
            f", a copy to it at {span('pinned_to_device_gb_per_s')} GB/s from pinned and "
            f"{span('pageable_to_device_gb_per_s')} GB/s from other memory"
        )
    return f"{said}."


def _targets(sections: Sections) -> Iterator[str]:
    search = sections.get("7b.search", {})
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, limit: str, value: str, kept: bool) -> None:
        rows.append((what, limit, value, "reached" if kept else "**missed**"))

    if "tflops" in search and "stopped" not in search:
        seconds = search["seconds"]
        add("7B search", "under 120 s", f"{seconds} s", seconds < 120)
        if share := search.get("share_of_matmul"):
            add("its TFLOP/s of the product's", "60 %", f"{100 * share:.0f} %", share >= 0.6)
        if memory := search.get("memory"):
            peak = memory["peak_over_held_gb"]
            add("its memory over the weights", "8 GB", f"{peak} GB", peak <= 8)
    case = sections.get("7b.speed", {}).get("cases", {}).get("prompt, batch 1", {})
    for name, cut in case.get("cuts", {}).items():
        over = cut["over_ideal"]
        add(f"7B prompt, cut by {name}, over at best", "3 %", f"{100 * over:+.1f} %", over <= 0.03)
    if rows:
        yield table(["aim", "limit", "measured", ""], rows, words=2)


def _searches(sections: Sections) -> Iterator[str]:
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name, row in sections.items():
        if name.partition(".")[2] in ("search", "compiled", "exact"):
            found.append((_shape(name), {**row, "shape": name.partition(".")[0]}))
        if name.startswith("ranks."):
            found.append((f"7B shape, {row.get('ranks')} GPUs", row))
        if name == "real":
            found += [
                (row["model"], {**search, "shape": name})
                for search in row.get("searches", {}).values()
            ]
    found = [(name, row) for name, row in found if "tflops" in row]
    if not found:
        return
    rows, notes = [], []
    for name, row in found:
        how = "exact" if row["exact"] else "racing"
        how += ", compiled" if row["compiled"] else ""
        seconds = str(row["seconds"])
        if "extrapolated_seconds" in row:
            seconds = f"{row['extrapolated_seconds']:.0f}, extrapolated"
            notes.append(f"{name}, {how}: {row['seconds']} s were run; {row['extrapolated_by']}.")
        if "stopped" in row:
            seconds += ", not finished"
        if (ranks := row.get("ranks")) and "seconds" in (one := sections.get("7b.search", {})):
            alone = row["seconds"] * row["speedup"] if "speedup" in row else one["seconds"]
            same = "the same order" if row["order"] == one["order"] else "**another order**"
            faster = alone / row["seconds"]
            notes.append(
                f"{name}: {faster:.2f}x as fast as one ({alone:.1f} s on the same machine), "
                f"{100 * faster / ranks:.0f} % of the ideal, {same} of removal."
            )
        if "compile_seconds" in row:
            # the section of one block may have compiled it before
            before = sections.get(f"{row['shape']}.block", {}).get("compiled", {})
            took = max(row["compile_seconds"], before.get("compile_seconds", 0))
            notes.append(f"{name}: compiling took {took} s more.")
        share = row.get("share_of_matmul")
        rows.append(
            (
                name,
                how,
                f"{row['removed']} of {row['blocks']}",
                f"{row['windows']} x {row['length']}",
                seconds,
                f"{row['block_forwards']:,}",
                row["tflops"],
                f"{100 * share:.0f} %" if share else "",
                _memory(row),
            )
        )
    yield "### Search"
    yield ""
    head = ["model", "how", "removed", "tokens", "seconds", "block forwards", "TFLOP/s"]
    yield table([*head, "of the product's", "memory over weights"], rows, words=2)
    yield ""
    yield from notes
    yield """
The shapes' weights are random: such blocks are all alike, and a race among them would drop none.
The model is scored for its time, and the race is told losses drawn from the spread of SmolLM2's
(`benchmarks/race_model.py`), as steady as windows of this length make them. Operations are
counted: those of the matrix products, of causal attention and of the head."""


def _block(sections: Sections) -> Iterator[str]:
    for name, row in sections.items():
        if not name.endswith(".block") or "windows" not in row:
            continue
        rows = []
        for batch, found in row["windows"].items():
            usual = ", the search's batch" if int(batch) == row["default_batch"] else ""
            rows.append((f"{batch} windows{usual}", found["ms"], found["tflops"]))
        for key, label in (
            ("compiled", "the search's batch, compiled"),
            ("products", "its matrix products alone"),
            ("attention", "its attention alone"),
            ("head_and_loss", "output head and loss"),
        ):
            if "ms" in row.get(key, {}):
                rows.append((label, row[key]["ms"], row[key]["tflops"]))
        yield f"### One block, {_shape(name)}"
        yield ""
        yield table(["what", "ms", "TFLOP/s"], rows)
        yield ""


def _repairs(sections: Sections) -> Iterator[str]:
    found = [(_shape(name), row) for name, row in sections.items() if name.endswith(".repair")]
    if "repair" in sections.get("real", {}):
        found.append((sections["real"]["model"], sections["real"]["repair"]))
    rows = [
        (
            name,
            len(row["removed"]),
            len(row["gaps"]),
            f"{row['tokens']:,}",
            row["seconds"],
            _memory(row),
        )
        for name, row in found
        if "tokens" in row
    ]
    if rows:
        yield "### Repair"
        yield ""
        head = ["model", "removed", "gaps", "tokens", "seconds", "memory over weights"]
        yield table(head, rows)
        yield ""
        yield (
            "Of random weights every gap's first fit is kept, after the loss on 16 other windows. "
            "Seconds of the real model hold those in which it writes a third of the text itself."
        )


def _speeds(sections: Sections) -> Iterator[str]:
    found = [(_shape(name), row) for name, row in sections.items() if name.endswith(".speed")]
    if "speed" in sections.get("real", {}):
        found.append((sections["real"]["model"], sections["real"]["speed"]))
    for name, row in found:
        cases = {k: c for k, c in row.get("cases", {}).items() if "cuts" in c}
        if not cases:
            continue
        n = row["blocks"]
        rows = []
        for case, c in cases.items():
            cells = [f"{c['median_ms']['dense']:,.2f}"]
            for cut in c["cuts"].values():
                cells += [f"{cut['speedup']:.3f}x", f"{cut['speedup_at_best']:.3f}x"]
                cells.append(f"{100 * cut['over_ideal']:+.1f} %")
            rows.append((case, *cells))
        yield f"### Prompt and generation, {name}"
        yield ""
        yield (
            f"{n['dense']} blocks, cut to {n['10%']} and {n['20%']}. At best: a line through the "
            f"times of {n['dense']}, {n['half']} and {n['quarter']} blocks. For such cuts SLEB's "
            "paper gives 1.12x and 1.26x."
        )
        yield ""
        cut_head = ["at best", "time over that"]
        yield table(["case", "dense ms", "10 %", *cut_head, "20 %", *cut_head], rows)
        yield ""
    if found:
        yield (
            "A step of `generate` waits for the CPU, so it scatters with all that the CPU has to "
            "do, and its rows say little; a CUDA graph is what is left without that wait."
        )


def _stream(sections: Sections) -> Iterator[str]:
    row = sections.get("70b.stream", {})
    if "compute" not in row:
        return
    yield "### 70B shape, streamed"
    yield ""
    yield (
        f"{row['blocks_on_disk']} of {row['blocks_of_the_shape']} blocks of {row['block_gb']:.2f} "
        f"GB, {row['sets']} sets, {row['windows']} windows of {row['length']} tokens. Plain reads: "
        f"{row['disk_gb_per_s']} GB/s from the disk, {row['page_cache_gb_per_s']} GB/s from the "
        f"page cache. A block in place runs at {row['compute']['tflops']} TFLOP/s."
    )
    yield ""
    rows = []
    for key, label in (("from_disk", "not cached"), ("from_page_cache", "in the page cache")):
        rate = fetched(row, key)
        compute = row["compute"]["walk_seconds"] / row["blocks_on_disk"]
        each = max(row["block_gb"] / rate, compute)
        rows.append(
            (
                label,
                row[key]["seconds"],
                f"{rate:.2f}",
                f"{each * row['blocks_of_the_shape']:.0f} s",
            )
        )
    checked = ""
    if "reads" not in row["from_disk"]:
        checked = (
            "The seconds are of two passes: the walk, and the check that a model gets once, by its "
            "own code. The GB/s count the reading of both. "
        )
    head = ["files", "seconds for these blocks", "GB/s read"]
    whole = f"a walk of all {row['blocks_of_the_shape']} blocks, extrapolated"
    yield table([*head, whole], rows)
    yield ""
    yield (
        f"{checked}A walk of all blocks is extrapolated by the slower of reading a block at this "
        "rate and computing it, with the same sets and windows. A whole search: see "
        "[scale](scale.md)."
    )


def _missing(sections: Sections) -> Iterator[str]:
    bad = {
        n: next(row[k] for k in UNMEASURED & row.keys())
        for n, row in sections.items()
        if UNMEASURED & row.keys()
    }
    for name, row in sections.items():
        for case, found in row.get("cases", {}).items():
            bad |= {f"{name}, {case}": found[k] for k in UNMEASURED & found.keys()}
    if bad:
        yield "Not measured:"
        yield ""
        yield from (f"- {name}: {why}" for name, why in bad.items())


def _shape(section: str) -> str:
    return f"{section.partition('.')[0].upper()} shape"


def _memory(row: Mapping[str, Any]) -> str:
    peak = row.get("memory", {}).get("peak_over_held_gb")
    return f"{peak} GB" if peak else ""


def fetched(row: dict[str, Any], key: str) -> float:
    """GB/s that a walk read. In results without ``reads`` each walk was timed with the check of the
    model, a pass through its own code that reads all blocks once more."""
    walk = row[key]
    reads = walk.get("reads", walk["walks"] + 1)
    return float(reads * row["blocks_on_disk"] * row["block_gb"] / walk["seconds"])


def scale_page(found: Mapping[str, Any]) -> str:
    """Markdown."""
    gaps = [row["simulated"] / row["measured"] - 1 for row in found["check"]]
    values = {
        "windows": str(found["windows"]),
        "length": str(found["length"]),
        "seeds": str(found["seeds"]),
        "off": f"{100 * min(gaps):+.0f} to {100 * max(gaps):+.0f} %",
        "check": _check(found),
        "models": _models(found),
        "rates": _rates(found),
        "predictions": _predictions(found),
    }
    text = (HERE / "scale.md.in").read_text()
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text


def _check(found: Mapping[str, Any]) -> str:
    many = f"simulated, mean of {found['seeds_check']}"
    head = ["measured in", "windows x tokens", "block forwards measured", many, "least, most"]
    return table(
        [*head, "by the formula"],
        (
            (
                row["result"],
                f"{row['windows']} x {row['length']}",
                f"{row['measured']:,}",
                f"{row['simulated']:,}",
                f"{row['least']:,}, {row['most']:,}",
                f"{row['formula']:,}",
            )
            for row in found["check"]
        ),
        words=2,
    )


def _models(found: Mapping[str, Any]) -> str:
    first, *others = found["models"][0]["left"]
    head = ["model", "blocks", "removed", "steps", "block forwards", "by the formula"]
    head += ["exact search", f"candidates left at window {first}", *map(str, others)]
    rows = []
    for row in found["models"]:
        left = [f"{c:.0f}" if c >= 10 else f"{c:.1f}" for c in row["left"].values()]
        counts = [f"{row[k]:,}" for k in ("block_forwards", "formula", "exact_block_forwards")]
        rows.append((row["model"], row["blocks"], row["removed"], row["steps"], *counts, *left))
    return table(head, rows)


def _rates(found: Mapping[str, Any]) -> str:
    rates = found["rates"]
    rows = [(label, rates["source"][k], f"{rates[k]:.3g}") for k, label in RATES.items()]
    return table(["rate", "from", "value"], rows, words=2)


def _predictions(found: Mapping[str, Any]) -> str:
    weights = {row["model"]: row["gb"] for row in found["models"]}
    head = ["model", "a model is on", "weights", "GPUs", "ranks", "predicted", "computing"]
    rows = []
    for row in found["predictions"]:
        seconds = row["seconds"]
        rows.append(
            (
                row["model"],
                "each GPU, streamed" if row["streamed"] else f"{row['group']} GPUs",
                f"{weights[row['model']]:,} GB",
                row["gpus"],
                row["replicas"],
                f"**{_time(seconds['total'])}**",
                *(_time(seconds.get(k)) for k in ("compute", "between GPUs", "fetch", "meeting")),
                f"{100 * row['busy']:.0f} %",
            )
        )
    return table([*head, "between GPUs", "fetching", "meeting", "ranks busy"], rows, words=2)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
