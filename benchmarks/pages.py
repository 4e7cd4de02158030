"""The pages docs/performance.md and docs/scale.md: results in the templates beside this file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader

__all__ = ["fetched", "merged", "page", "render"]

Sections = Mapping[str, Any]
UNMEASURED = ("error", "skipped", "stopped")


def page(template: str, **values: Any) -> str:
    """A template beside this file, filled. What a section did not measure is blank in it."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=ChainableUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["f"] = format
    return found.get_template(template).render(time=_time, fetched=fetched, **values)


def merged(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sections of several results: of one that is in several, the last that was measured."""
    sections: dict[str, Any] = {}
    for report in reports:
        for name, row in report["sections"].items():
            if name not in sections or not any(key in row for key in UNMEASURED):
                sections[name] = row
    return sections


def render(paths: Sequence[Path]) -> str:
    """docs/performance.md; see :func:`merged`."""
    given = [json.loads(path.read_text()) for path in paths]
    reports = [report for report in given if "sections" in report]
    sections = merged(reports)

    def of(part: str) -> list[tuple[str, Mapping[str, Any]]]:
        found = [(_shape(name), row) for name, row in sections.items() if name.endswith(f".{part}")]
        real = sections.get("real", {})
        return [*found, (real["model"], real[part])] if part in real else found

    return page(
        "performance.md.j2",
        abouts=[
            *dict.fromkeys(_about(r["about"]) for r in reports),
            *dict.fromkeys(r["about"]["note"] for r in reports if "note" in r["about"]),
        ],
        machines=[r["sections"]["machine"] for r in reports if "machine" in r["sections"]],
        aims=[*_aims(sections)],
        searches=[*_searches(sections)],
        of=of,
        streams=[
            row for name, row in sections.items() if name == "70b.stream" and "compute" in row
        ],
        missing=[*_missing(sections)],
        ran=[(report, _commands(report)) for report in given if "commands" in report],
    )


def _commands(report: Mapping[str, Any]) -> list[list[str]]:
    """By command: what the first build took, the last one, the ratio, what of that is in no phase,
    and the peak of memory (of the GPU's, where there is one) of both."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in report["commands"]:
        found.setdefault(row["task"], []).append(row)
    table = []
    for task, rows in found.items():
        old, new = rows[0], rows[-1]
        seconds = [
            f"over {row['over_s']:.0f}" if "over_s" in row else f"{row['wall_s']:.1f}"
            for row in (old, new)
        ]
        ratio, rest = "", ""
        if "wall_s" in new:
            least = old.get("wall_s", old.get("over_s"))
            ratio = f"{'over ' if 'over_s' in old else ''}{least / new['wall_s']:.1f}x"
        if "wall_s" in new and (phases := new.get("phases")):
            rest = f"{new['wall_s'] - sum(phases.values()):.1f}"
        memory = [f"{row.get('gpu_gb', row.get('rss_gb', 0)):.1f}" for row in (old, new)]
        table.append([task, *seconds, ratio, rest, *memory])
    return table


def _about(about: Mapping[str, Any]) -> str:
    tiny = ", shapes made tiny to try the script: **no figures**"
    return (
        f"{about['machine']}, torch {about['torch']}, transformers {about['transformers']}, "
        f"{about['dtype']}{tiny if about['shape'] != 'full' else ''}."
    )


def _aims(sections: Sections) -> Iterator[tuple[str, str, str, bool]]:
    """What was to be reached, by how much, what was, and whether."""
    search = sections.get("7b.search", {})
    if "memory" in search and "stopped" not in search:
        yield "7B search", "under 120 s", f"{search['seconds']} s", search["seconds"] < 120
        if share := search["share_of_matmul"]:
            yield "its TFLOP/s of the product's", "60 %", f"{100 * share:.0f} %", share >= 0.6
        if peak := search["memory"].get("peak_over_held_gb"):
            yield "its memory over the weights", "8 GB", f"{peak} GB", peak <= 8
    case = sections.get("7b.speed", {}).get("cases", {}).get("prompt, batch 1", {})
    for name, cut in case.get("cuts", {}).items():
        over = cut["over_ideal"]
        yield f"7B prompt, cut by {name}, over at best", "3 %", f"{100 * over:+.1f} %", over <= 0.03


def _searches(sections: Sections) -> Iterator[tuple[str, str, Mapping[str, Any], list[str]]]:
    """Model, way, figures and notes of every search."""
    found = []
    for name, row in sections.items():
        kind, _, part = name.partition(".")
        if part in ("search", "compiled", "exact"):
            found.append((_shape(name), row, sections.get(f"{kind}.block", {})))
        elif kind == "ranks":
            found.append((f"7B shape, {row.get('ranks')} GPUs", row, {}))
        elif kind == "real":
            found += [(row["model"], search, {}) for search in row.get("searches", {}).values()]
    one = sections.get("7b.search", {})
    for name, row, block in found:
        if "tflops" not in row:
            continue
        notes = []
        how = ("exact" if row["exact"] else "racing") + (", compiled" if row["compiled"] else "")
        if "extrapolated_by" in row:
            notes.append(f", {how}: {row['seconds']} s were run; {row['extrapolated_by']}.")
        if (ranks := row.get("ranks")) and "seconds" in one:
            alone = row["seconds"] * row["speedup"] if "speedup" in row else one["seconds"]
            same = "the same order" if row["order"] == one["order"] else "**another order**"
            faster = alone / row["seconds"]
            notes.append(
                f": {faster:.2f}x as fast as one ({alone:.1f} s on the same machine), "
                f"{100 * faster / ranks:.0f} % of the ideal, {same} of removal."
            )
        if "compile_seconds" in row:
            # the section of one block may have compiled it before
            before = block.get("compiled", {}).get("compile_seconds", 0)
            notes.append(f": compiling took {max(row['compile_seconds'], before)} s more.")
        yield name, how, row, notes


def _missing(sections: Sections) -> Iterator[tuple[str, str]]:
    for name, row in sections.items():
        parts = {name: row, **{f"{name}, {c}": r for c, r in row.get("cases", {}).items()}}
        for part, found in parts.items():
            yield from ((part, found[key]) for key in UNMEASURED if key in found)


def _shape(section: str) -> str:
    return f"{section.partition('.')[0].upper()} shape"


def fetched(row: Mapping[str, Any], key: str) -> float:
    """GB/s that a walk read. In results without ``reads`` each walk was timed with the check of the
    model, a pass through its own code that reads all blocks once more."""
    walk = row[key]
    reads = walk.get("reads", walk["walks"] + 1)
    return float(reads * row["blocks_on_disk"] * row["block_gb"] / walk["seconds"])


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
