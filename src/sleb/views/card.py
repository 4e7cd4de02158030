"""The model card that travels with a pruned checkpoint, made only from the plan and the record."""

from __future__ import annotations

from pathlib import Path

from sleb.core.plan import Plan
from sleb.core.statistics import Interval
from sleb.record import RunRecord
from sleb.surgery.card import changed, fenced, front_matter, provenance, title, using

__all__ = ["evaluated_on", "model_card", "repair_told"]


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
            f"{evaluated_on(record)}, computed in {record.environment['dtype']}. It says nothing "
            "about other texts or tasks: measure yours before you rely on this model.",
        ]
        if quality.unrepaired and quality.unrepaired.perplexity_ratio:
            plain = _range(quality.unrepaired.perplexity_ratio)
            lines += ["", f"Without the repair the ratio is {plain}."]
    else:
        lines += ["", f"Quality was not measured: {evaluated_on(record)}."]
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


def evaluated_on(record: RunRecord) -> str:
    """What perplexity was measured on, in words."""
    text = record.evaluation_text
    if text is None:
        return "no text was left over to measure on: give more, or fewer --windows"
    if text.note:
        return text.note
    if text.source == "held-out":
        return f"{text.windows} held-out windows of {text.length} tokens from the calibration texts"
    return f"{text.windows} windows of {text.length} tokens from {', '.join(text.texts)}"


def repair_told(record: RunRecord) -> str:
    """What became of the repair, in words; empty where there was none."""
    r = record.repair
    if r is None or r.note:
        return r.note if r else ""
    if r.status != "repaired":
        words = {"not-asked": "not asked for", "no-gain": "no fit was better on every text"}
        return words.get(r.status, f"not possible: {r.reason}")
    texts = "a third of them the model's own text" if r.self_generated else "of the given texts"
    return (
        f"{r.tensors} matrices around {r.gaps} of {r.gaps_total} gaps, fitted on {r.tokens:,} "
        f"tokens, {texts}, and judged on {r.validation_windows} other windows"
    )
