"""Draw benchmarks/results/growth-*.json: python benchmarks/plot.py RESULT.json -o docs/growth.svg

The published algorithm's time is its block forwards times the shortest time per block forward that
was measured in the run, in its favour.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from search import published_forwards

AXES = {"windows": "calibration windows", "removed": "blocks removed", "blocks": "blocks"}
COLOURS = {"published": "#888888", "exact": "#3b75af", "racing": "#c44e52"}


def forwards(row: dict[str, Any]) -> int:
    blocks = row["blocks"]
    return published_forwards(blocks, blocks - 2, row["removed"], row["windows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    report = json.loads(options.result.read_text())
    rows = report["seconds"]
    quickest = min(r["published"] / forwards(r) for r in rows)
    plt.rcParams.update({"svg.hashsalt": "sleb", "svg.fonttype": "none", "font.size": 9})
    figure, panels = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        chosen = [r for r in rows if r["axis"] == axis]
        x = [r[axis] for r in chosen]
        for system, colour in COLOURS.items():
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
    figure.savefig(options.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
