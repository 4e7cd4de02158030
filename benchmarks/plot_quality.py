"""Draw what benchmarks/quality.py has measured, or print it as Markdown tables.

python benchmarks/plot_quality.py RESULT.json [RESULT.json ...] -o docs/quality.svg
python benchmarks/plot_quality.py RESULT.json --markdown
python benchmarks/plot_quality.py RESULT.json --against EARLIER.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

__all__ = ["markdown", "summary"]

COLOURS = ("#888888", "#c44e52", "#3b75af", "#55a868", "#8172b2", "#ccb974", "#64b5cd")
FORMS = {"plain": "--", "repaired": "-"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, padded so that it reads as plain text too; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [w * "-" if i < left else (w - 1) * "-" + ":" for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def cuts(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """System and set of blocks, the smaller cuts first."""
    found = [(s["system"], cut) for s in report["systems"] for cut in s["sets"]]
    return sorted(found, key=lambda pair: pair[1]["removed"])


def summary(report: dict[str, Any]) -> str:
    """One row for each system and depth."""
    head = ["removed", "system", "plain", "repaired", "worst domain", "unseen", "accuracy"]
    rows = []
    for system, cut in cuts(report):
        plain, repaired = cut["plain"], cut["repaired"]
        best = repaired or plain
        worst = best["domains"][best["worst"]]["ratio"]["value"]
        rows.append(
            [
                str(cut["removed"]),
                system,
                spread(plain["geo"]),
                spread(repaired["geo"]) if repaired else "-",
                f"{best['worst']} {worst:.2f}",
                f"{plain['unseen_geo']['value']:.2f} → {best['unseen_geo']['value']:.2f}",
                f"{accuracy(plain)} → {accuracy(repaired)}" if plain["tasks"] else "-",
            ]
        )
    return table(head, rows, left=2)


def spread(value: dict[str, Any]) -> str:
    """A ratio and half of its interval."""
    if value["high"] is None:
        return f"{value['value']:.2f}"
    return f"{value['value']:.2f} ± {(value['high'] - value['low']) / 2:.2f}"


def accuracy(row: dict[str, Any] | None) -> str:
    """Mean accuracy in percent."""
    return f"{100 * row['tasks']['mean']:.1f}" if row and row["tasks"] else "-"


def by_domain(report: dict[str, Any]) -> str:
    """Ratio for every text, plain and repaired."""
    names = [*report["domains"], *report["unseen"]]
    rows = [
        [
            str(cut["removed"]),
            f"{system}, {form}",
            *(f"{cut[form]['domains'][name]['ratio']['value']:.2f}" for name in names),
        ]
        for system, cut in cuts(report)
        for form in FORMS
        if cut[form]
    ]
    dense = [f"{report['dense']['perplexity'][name]['value']:.2f}" for name in names]
    return table(["removed", "system", *names], [["0", "dense", *dense], *rows], left=2)


def by_kind(report: dict[str, Any]) -> str:
    """Geometric means of ratios after the repair, over texts that nobody gave and over all."""
    unseen = [*report["unseen"]]
    kinds = {
        "not given": unseen,
        "these without japanese": [name for name in unseen if name != "japanese"],
        "all texts": [*report["domains"], *unseen],
    }
    rows = []
    for system, cut in cuts(report):
        found = (cut["repaired"] or cut["plain"])["domains"]
        means = [geometric_mean(found[n]["ratio"]["value"] for n in of) for of in kinds.values()]
        rows.append([str(cut["removed"]), system, *(f"{mean:.2f}" for mean in means)])
    return table(["removed", "system", *kinds], rows, left=2)


def by_task(report: dict[str, Any]) -> str:
    """Accuracy in percent for every task."""
    names = [name for name in report["dense"]["tasks"] if name != "mean"]
    heads = [name.removesuffix("_local") for name in names]

    def cells(tasks: dict[str, Any]) -> list[str]:
        values = [tasks[name]["accuracy"]["value"] for name in names] + [tasks["mean"]]
        return [f"{100 * value:.1f}" for value in values]

    rows = [["0", "dense", *cells(report["dense"]["tasks"])]]
    for system, cut in cuts(report):
        rows += [
            [str(cut["removed"]), f"{system}, {form}", *cells(cut[form]["tasks"])]
            for form in FORMS
            if cut[form]
        ]
    return table(["removed", "system", *heads, "mean"], rows, left=2)


def chosen(report: dict[str, Any]) -> str:
    """Which blocks, and what finding and repairing them took."""
    seconds = {s["system"]: s["searches"] for s in report["systems"]}
    rows = []
    for system, cut in cuts(report):
        search = next(
            (s for s in seconds[system] if s["removed"] == cut["removed"]), seconds[system][-1]
        )
        fixed = cut["repair"]
        gaps = fixed.get("gaps", [])
        accepted = sum(gap["ridge"] is not None for gap in gaps)
        own = search["removed"] == cut["removed"]
        rows.append(
            [
                str(cut["removed"]),
                system,
                " ".join(map(str, cut["blocks"])),
                f"{search['seconds']:.1f}" if own else f"(of {search['removed']})",
                f"{fixed['seconds']:.1f}" if gaps else "-",
                f"{accepted} of {len(gaps)}" if gaps else "refused",
                str(fixed.get("tensors", "-")),
            ]
        )
    head = ["removed", "system", "blocks", "search, s", "repair, s", "gaps repaired", "matrices"]
    return table(head, rows, left=3)


def changes(report: dict[str, Any], earlier: dict[str, Any]) -> str:
    """What became of the sets of blocks that an earlier result has too, after their repair."""
    unseen = [*report["unseen"]]

    def figures(cut: dict[str, Any]) -> list[str]:
        row = cut["repaired"] or cut["plain"]
        ratios = [row["domains"][name]["ratio"]["value"] for name in unseen]
        return [f"{x:.2f}" for x in (row["geo"]["value"], *ratios)] + [accuracy(row)]

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
    return table(["removed", "system", "five domains", *unseen, "accuracy"], rows, left=2)


def markdown(report: dict[str, Any]) -> str:
    """All tables of one result."""
    what, texts = report["what"], report["texts"]
    said = (
        f"{report['machine']}, {report['dtype']}, torch {report['torch']}, transformers "
        f"{report['transformers']}. Search on {texts['search']['windows']} windows of "
        f"{texts['search']['length']} tokens; *sleb* on {texts['published']['windows']} of "
        f"{texts['published']['length']}; repair fitted on {texts['repair']['windows']} windows of "
        f"{texts['repair']['length']}, judged on {texts['repair_judges']['windows']}; test on "
        f"{what['test_windows']} windows of {texts['test']['length']} for each text."
    )
    if "processes" in report:
        said += f" {report['processes']} processes ran beside each other, so times are longer."
    parts = [f"## {report['model']}, {report['blocks']} blocks", said, summary(report)]
    parts += ["Geometric means of texts after repair:", by_kind(report)]
    parts += ["Perplexity of the dense model, and its multiple after a cut:", by_domain(report)]
    if report["dense"]["tasks"]:
        parts += ["Accuracy, %:", by_task(report)]
    parts += ["What was chosen, and how long it took:", chosen(report)]
    if report["not_begun"]:
        parts.append(f"Not begun for lack of time: {', '.join(report['not_begun'])}.")
    return "\n\n".join(parts)


def draw(reports: Sequence[dict[str, Any]], out: Path) -> None:
    """A row of panels for each result: the five domains, unseen texts, accuracy where measured."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    plt.rcParams.update({"svg.hashsalt": "sleb", "svg.fonttype": "none", "font.size": 9})
    tasks = any(report["dense"]["tasks"] for report in reports)
    size = (3 + tasks * 1.5 + 4, 2.9 * len(reports))
    figure, grid = plt.subplots(
        len(reports), 2 + tasks, figsize=size, layout="constrained", squeeze=False
    )
    known: list[str] = list(dict.fromkeys(s["system"] for r in reports for s in r["systems"]))
    colour = dict(zip(known, COLOURS, strict=False))
    for report, panels in zip(reports, grid, strict=True):
        for system in report["systems"]:
            for form, dashes in FORMS.items():
                rows = [cut for cut in system["sets"] if cut[form]]
                x = [cut["removed"] for cut in rows]
                for panel, key in zip(panels, ("geo", "unseen_geo"), strict=False):
                    y = [cut[form][key]["value"] for cut in rows]
                    panel.plot(
                        x, y, dashes, marker="o", markersize=3, color=colour[system["system"]]
                    )
                if report["dense"]["tasks"]:
                    y = [100 * cut[form]["tasks"]["mean"] for cut in rows]
                    panels[2].plot(
                        x, y, dashes, marker="o", markersize=3, color=colour[system["system"]]
                    )
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
        print("\n\n".join(map(markdown, reports)))
    if options.against:
        print(changes(reports[0], json.loads(options.against.read_text())))
    if options.out:
        draw(reports, options.out)


if __name__ == "__main__":
    main()
