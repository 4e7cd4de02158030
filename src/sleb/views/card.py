"""The model card that travels with a pruned checkpoint, made only from the plan and the record."""

from __future__ import annotations

from pathlib import Path

from sleb.core.plan import Plan
from sleb.core.statistics import Interval
from sleb.record import RunRecord
from sleb.surgery.card import changed, fenced, front_matter, provenance, title, using

__all__ = ["model_card"]


def model_card(plan: Plan, record: RunRecord, source: Path, *, kept: bool = False) -> str:
    """README.md with metadata. ``source`` is the original's folder: its licence is carried over.
    ``kept``: the checkpoint has a side-car to restore the original from."""
    left = record.blocks - len(plan.removed)
    name = title(record.model, source.resolve().name)
    before, after = (f"{n / 1e6:,.1f} M" for n in record.parameters)
    lines = [
        front_matter(source, record.model),
        "",
        f"# {name} without {len(plan.removed)} of its {record.blocks} transformer blocks",
        "",
        f"Removed blocks (original numbering, first is 0): {', '.join(map(str, plan.removed))}; "
        f"{left} remain. {changed(plan)} The order of removal, "
        "every candidate's score and the calibration text's hashes are in `plan.json`; timings and "
        "verification in `run.json`.",
        "",
        *fenced(record.command),
        "",
        "| | original | pruned |",
        "| --- | ---: | ---: |",
        f"| blocks | {record.blocks} | {left} |",
        f"| parameters | {before} | {after} |",
        f"| weights, MB | {record.nbytes[0] / 1e6:,.1f} | {record.nbytes[1] / 1e6:,.1f} |",
    ]
    quality = record.evaluation
    if quality and quality.pruned_perplexity and quality.perplexity_ratio:
        lines += [
            f"| perplexity | {_range(quality.perplexity)} | {_range(quality.pruned_perplexity)} |",
            "",
            f"Perplexity ratio {_range(quality.perplexity_ratio)} (95 % interval, paired), on "
            f"{record.evaluation_note}, computed in {record.environment['dtype']}. It says nothing "
            "about other texts or tasks: measure yours before you rely on this model.",
        ]
        if quality.unrepaired and quality.unrepaired.perplexity_ratio:
            plain = _range(quality.unrepaired.perplexity_ratio)
            lines += ["", f"Without the repair the ratio is {plain}."]
    else:
        lines += ["", f"Quality was not measured: {record.evaluation_note}."]
    lines += ["", "Checks passed when it was written:", ""]
    lines += [f"- {check.name}: {check.measured}" for check in record.verification.checks]
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
        *provenance(plan, source, record.model),
        "",
        *using(kept),
        "",
        "Method: SLEB (Song et al., ICML 2024, arXiv:2402.09025).",
    ]
    return "\n".join(lines) + "\n"


def _range(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.value:.2f}"
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"
