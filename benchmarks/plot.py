"""Draw what quality.py, answers.py or search.py --growth has measured, or print Markdown tables.

    python benchmarks/plot.py RESULT.json [RESULT.json ...] -o docs/quality.svg
    python benchmarks/plot.py RESULT.json --markdown
    python benchmarks/plot.py RESULT.json --against EARLIER.json
    python benchmarks/plot.py GROWTH.json -o docs/growth.svg

For the growth of a search the published algorithm's time is its block forwards times the shortest
time per block forward that was measured in the run, in its favour.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from common import table
from pages import page

__all__ = ["changes", "draw", "draw_answers", "finals", "markdown", "published_forwards"]

COLOURS = ("#888888", "#c44e52", "#3b75af", "#55a868", "#8172b2", "#ccb974", "#64b5cd")
FORMS = {"plain": "--", "repaired": "-"}
AXES = {"windows": "calibration windows", "removed": "blocks removed", "blocks": "blocks"}
GROWTH = {"published": "#888888", "exact": "#3b75af", "racing": "#c44e52"}


def cuts(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """System and set of blocks, the smaller cuts first."""
    found = [(s["system"], cut) for s in report["systems"] for cut in s["sets"]]
    return sorted(found, key=lambda pair: pair[1]["removed"])


def changes(report: dict[str, Any], earlier: dict[str, Any]) -> str:
    """What became of the sets of blocks that an earlier result has too, after their repair."""
    unseen = [*report["unseen"]]

    def figures(cut: dict[str, Any]) -> list[str]:
        row = cut["repaired"] or cut["plain"]
        ratios = [row["domains"][name]["ratio"]["value"] for name in unseen]
        right = f"{100 * row['tasks']['mean']:.1f}" if row["tasks"] else "-"
        return [*(f"{x:.2f}" for x in (row["geo"]["value"], *ratios)), right]

    known = {(system, tuple(cut["blocks"])): figures(cut) for system, cut in cuts(earlier)}
    rows = [
        [
            str(cut["removed"]),
            system,
            *(f"{a} → {b}" for a, b in zip(before, figures(cut), strict=True)),
        ]
        for system, cut in cuts(report)
        if (before := known.get((system, tuple(cut["blocks"]))))
    ]
    return table(["removed", "system", "five domains", *unseen, "accuracy"], rows, words=2)


def markdown(report: dict[str, Any]) -> str:
    """All tables of one result."""

    def mean(form: dict[str, Any], names: Sequence[str]) -> float:
        return geometric_mean(form["domains"][name]["ratio"]["value"] for name in names)

    searches = {s["system"]: s["searches"] for s in report["systems"]}
    found = page("quality.md.j2", r=report, cuts=cuts(report), searches=searches, mean=mean)
    return found.strip("\n")


def answers(report: dict[str, Any]) -> str:
    """The table of one result of answers.py, by depth: shares of the right answers kept."""
    systems = list(dict.fromkeys(cut["system"] for cut in report["cuts"]))
    made = [cut for cut in report["cuts"] if "error" not in cut]
    rows = [
        (
            len(cut["removed"]),
            cut["system"],
            ", ".join(map(str, cut["removed"])),
            f"{cut['code']['kept']:.0%}".replace("%", " %"),
            f"{cut['math']['kept']:.0%}".replace("%", " %"),
            f"{cut['perplexity_ratio']:.3f}",
            f"{cut['speedup']:.2f}",
        )
        for cut in sorted(made, key=lambda c: (len(c["removed"]), systems.index(c["system"])))
    ]
    head = ("removed", "system", "blocks", "code kept", "sums kept", "perplexity", "speed-up")
    return table(head, rows, words=3)


def draw(reports: Sequence[dict[str, Any]], out: Path) -> None:
    """A row of panels for each result: the five domains, unseen texts, accuracy where measured."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    plt = pyplot()
    tasks = any(report["dense"]["tasks"] for report in reports)
    size = (3 + tasks * 1.5 + 4, 2.9 * len(reports))
    figure, grid = plt.subplots(
        len(reports), 2 + tasks, figsize=size, layout="constrained", squeeze=False
    )
    known: list[str] = list(dict.fromkeys(s["system"] for r in reports for s in r["systems"]))
    colour = dict(zip(known, COLOURS, strict=False))
    for report, panels in zip(reports, grid, strict=True):
        for system in report["systems"]:
            style = {"marker": "o", "markersize": 3, "color": colour[system["system"]]}
            for form, dashes in FORMS.items():
                rows = [cut for cut in system["sets"] if cut[form]]
                x = [cut["removed"] for cut in rows]
                for panel, key in zip(panels, ("geo", "unseen_geo"), strict=False):
                    panel.plot(x, [cut[form][key]["value"] for cut in rows], dashes, **style)
                if report["dense"]["tasks"]:
                    y = [100 * cut[form]["tasks"]["mean"] for cut in rows]
                    panels[2].plot(x, y, dashes, **style)
        depths = sorted({cut["removed"] for _, cut in cuts(report)})
        for panel in panels:
            panel.set(xlabel=f"blocks removed of {report['blocks']}", xticks=depths)
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        for panel in panels[:2]:
            panel.set_yscale("log")
            low, high = panel.get_ylim()
            steps = (1, 1.5, 2, 3, 5, 7) if high < 30 * low else (1, 3)  # few enough to be read
            panel.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_locator(NullLocator())
        panels[0].set_ylabel("perplexity over the dense model's")
        panels[0].set_title(f"{report['model']}: the five domains", fontsize=8)
        panels[1].set_title("texts of other kinds", fontsize=8)
        if report["dense"]["tasks"]:
            panels[2].axhline(100 * report["dense"]["tasks"]["mean"], color="black", lw=0.8)
            panels[2].set_title("zero-shot accuracy, % (black: dense)", fontsize=8)
        elif tasks:
            panels[2].set_axis_off()
    marks = [Line2D([], [], color=colour[name], label=name) for name in known]
    marks += [
        Line2D([], [], color="black", ls=dashes, label=form) for form, dashes in FORMS.items()
    ]
    figure.legend(handles=marks, loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(out, metadata={"Date": None})


def finals(found: dict[str, Any]) -> str:
    """The comparison of quality.py --finals. Bold: the lower of greedy and window."""
    rows = []
    for row in found["depths"]:
        pair = [name for name in ("greedy", "window") if name in row["sets"]]
        taken = min(pair, key=lambda name: row["sets"][name]["increase"], default=None)
        for name, s in row["sets"].items():
            tasks = s["measured"]["tasks"]
            figures = [f"{s[key]:.3f}" for key in ("given", "own", "increase")]
            figures += [f"{s['measured'][key]:.2f}" for key in ("five", "unseen")]
            figures.append("" if tasks is None else f"{100 * tasks:.1f}")
            rows.append([str(row["removed"]), f"**{name}**" if name == taken else name, *figures])
    head = ["removed", "blocks of", "given text", "own text", "all", "five domains", "unseen"]
    return table([*head, "accuracy"], rows, words=2)


def published_forwards(blocks: int, candidates: int, n: int, windows: int) -> int:
    """Block forwards of the published algorithm, which shares none."""
    return windows * sum((candidates - r) * (blocks - r - 1) for r in range(n))


def pyplot() -> Any:
    """Matplotlib, set to draw the same file each time."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "sleb", "svg.fonttype": "none", "font.size": 9})
    return plt


def draw_growth(report: dict[str, Any], out: Path) -> None:
    """Seconds of the three ways to search, over windows, removals and blocks."""

    def forwards(row: dict[str, Any]) -> int:
        return published_forwards(row["blocks"], row["blocks"] - 2, row["removed"], row["windows"])

    rows = report["seconds"]
    quickest = min(r["published"] / forwards(r) for r in rows)
    plt = pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        chosen = [r for r in rows if r["axis"] == axis]
        x = [r[axis] for r in chosen]
        for system, colour in GROWTH.items():
            y = [quickest * forwards(r) if system == "published" else r[system] for r in chosen]
            dashed = "--" if system == "published" else "-"
            panel.plot(x, y, dashed, marker="o", markersize=3, color=colour, label=system)
        fixed = {k: chosen[-1][k] for k in AXES if k != axis}
        panel.set_title(", ".join(f"{v} {k}" for k, v in fixed.items()), fontsize=8)
        panel.set(xlabel=label, yscale="log", xticks=x)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds")
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(f"{report['model']}, {report['machine']}, {report['length']} tokens a window")
    figure.savefig(out, metadata={"Date": None})


def draw_answers(report: dict[str, Any], out: Path) -> None:
    """Right answers, with their 95 % intervals, over the measured speed-up."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained", sharex=True)
    systems = list(dict.fromkeys(cut["system"] for cut in report["cuts"]))
    for panel, kind in zip(panels, ("code", "math"), strict=True):
        dense = report["dense"][kind]["right"]
        panel.axhspan(100 * dense["low"], 100 * dense["high"], color="black", alpha=0.08, lw=0)
        panel.axhline(100 * dense["value"], color="black", lw=0.8)
        for system, colour in zip(systems, COLOURS, strict=False):
            rows = [cut for cut in report["cuts"] if cut["system"] == system and "error" not in cut]
            rows.sort(key=lambda cut: cut["speedup"])
            right = [cut[kind]["right"] for cut in rows]
            spread = [[100 * abs(r["value"] - r[end]) for r in right] for end in ("low", "high")]
            x, y = [cut["speedup"] for cut in rows], [100 * r["value"] for r in right]
            panel.errorbar(x, y, spread, marker="o", ms=3, capsize=2, color=colour, label=system)
        panel.set_title(f"{kind}: right answers, % (black: dense)", fontsize=8)
        panel.set(xlabel="times as fast on prompts", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{report['model']}, {report['machine']}")
    figure.savefig(out, metadata={"Date": None})


def tables(report: dict[str, Any]) -> str:
    """All that a result has, by what made it."""
    if "depths" in report:
        return finals(report)
    return answers(report) if "cuts" in report else markdown(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--markdown", action="store_true", help="print tables")
    parser.add_argument("--against", type=Path, help="print what differs from an earlier result")
    options = parser.parse_args()
    if not (options.out or options.markdown or options.against):
        parser.error("give -o FILE.svg, --markdown or --against FILE")
    reports = [json.loads(path.read_text()) for path in options.results]
    if options.markdown:
        print("\n\n".join(map(tables, reports)))
    if options.against:
        print(changes(reports[0], json.loads(options.against.read_text())))
    if options.out and "systems" in reports[0]:
        draw(reports, options.out)
    elif options.out and "cuts" in reports[0]:
        cuts = [cut for report in reports for cut in report["cuts"]]
        draw_answers({**reports[0], "cuts": cuts}, options.out)
    elif options.out:
        draw_growth(reports[0], options.out)


if __name__ == "__main__":
    main()
