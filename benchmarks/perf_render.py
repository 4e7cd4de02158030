"""The page of the performance benchmark, from its results and a frame of text around them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_page import table

__all__ = ["render"]

FRAME = Path(__file__).resolve().parent / "performance.md.in"
Sections = Mapping[str, Any]
COMMAND = """```bash
python benchmarks/performance.py --model SMOLLM2 -o benchmarks/results/performance.json
python benchmarks/performance.py --render benchmarks/results/performance*.json > docs/performance.md
```"""


def render(paths: Sequence[Path]) -> str:
    """The whole page. Of a section in several results, the last is shown."""
    reports = [json.loads(path.read_text()) for path in paths]
    body = "\n".join(_measured(reports)) if reports else "Not measured yet."
    return FRAME.read_text().replace("{measured}", f"{body}\n\n{COMMAND}")


def _measured(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    sections: dict[str, Any] = {}
    for report in reports:
        sections |= report["sections"]
    said = ("machine", "torch", "transformers", "dtype", "shape", "note")
    abouts = {json.dumps({k: r["about"][k] for k in said if k in r["about"]}) for r in reports}
    for text in sorted(abouts):
        about = json.loads(text)
        tiny = (
            ", shapes made tiny to try the script: **no figures**"
            if about["shape"] != "full"
            else ""
        )
        yield (
            f"{about['machine']}, torch {about['torch']}, transformers {about['transformers']}, "
            f"{about['dtype']}{tiny}.{' ' * ('note' in about)}{about.get('note', '')}"
        )
    for machine in [r["sections"]["machine"] for r in reports if "machine" in r["sections"]]:
        if "matmul_tflops" in machine:
            yield (
                f"A matrix product of {machine['matmul_n']}³ ran at {machine['matmul_tflops']} "
                f"TFLOP/s, a copy within the device at {machine['copy_gb_per_s']} GB/s (read and "
                f"written){_to_device(machine)}."
            )
    for part in (_targets, _searches, _block, _repairs, _speeds, _stream, _missing):
        if lines := list(part(sections)):
            yield ""
            yield from lines


def _to_device(machine: Mapping[str, Any]) -> str:
    if "pinned_to_device_gb_per_s" not in machine:
        return ""
    return (
        f", a copy to it at {machine['pinned_to_device_gb_per_s']} GB/s from pinned and "
        f"{machine['pageable_to_device_gb_per_s']} GB/s from other memory"
    )


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
            found.append((_shape(name), row))
        if name.startswith("ranks."):
            found.append((f"7B shape, {row.get('ranks')} GPUs", row))
        if name == "real":
            found += [(row["model"], search) for search in row.get("searches", {}).values()]
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
        if "efficiency" in row:
            same = "the same order" if row["same_order_as_one"] else "**another order**"
            notes.append(
                f"{name}: {row['speedup']}x as fast as one, {100 * row['efficiency']:.0f} % of the "
                f"ideal, {same}."
            )
        if "compile_seconds" in row:
            notes.append(f"{name}: compiling took {row['compile_seconds']} s more.")
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
        yield "Of random weights every gap's first fit is kept, after the loss on 16 other windows."


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
        walk = row[key]
        whole = walk["block_seconds"] * row["blocks_of_the_shape"]
        each = (walk["block_seconds"], walk["gb_per_s"], walk["fetch_gb_per_s"])
        rows.append((label, *each, f"{whole:.0f} s"))
    head = ["files", "seconds a block", "GB/s", "GB/s beside computing"]
    yield table([*head, "a walk of all blocks, extrapolated"], rows)
    yield ""
    yield (
        "Extrapolated by the number of blocks, with the same sets and windows. A whole search: see "
        "[scale](scale.md)."
    )


def _missing(sections: Sections) -> Iterator[str]:
    kinds = {"error", "skipped", "stopped"}
    bad = {
        n: next(row[k] for k in kinds & row.keys())
        for n, row in sections.items()
        if kinds & row.keys()
    }
    for name, row in sections.items():
        for case, found in row.get("cases", {}).items():
            bad |= {f"{name}, {case}": found[k] for k in kinds & found.keys()}
    if bad:
        yield "Not measured:"
        yield ""
        yield from (f"- {name}: {why}" for name, why in bad.items())


def _shape(section: str) -> str:
    return f"{section.partition('.')[0].upper()} shape"


def _memory(row: Mapping[str, Any]) -> str:
    peak = row.get("memory", {}).get("peak_over_held_gb")
    return f"{peak} GB" if peak else ""
