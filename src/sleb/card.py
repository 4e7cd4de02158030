"""The model card that travels with a pruned checkpoint, made only from the plan and the record."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sleb.plan import Plan
from sleb.record import RunRecord
from sleb.statistics import Interval

__all__ = ["model_card"]

logger = logging.getLogger(__name__)


def model_card(plan: Plan, record: RunRecord, source: Path) -> str:
    """README.md with metadata. ``source`` is the original's folder: its licence is carried over."""
    from huggingface_hub import ModelCardData

    inherited = _inherited(source)
    data = ModelCardData(
        base_model=None if Path(record.model).exists() else record.model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sleb", "pruned", "block-pruning"],
        **inherited,
    )
    left = record.blocks - len(plan.removed)
    name = Path(record.model).name or source.resolve().name
    before, after = (f"{n / 1e6:,.1f} M" for n in record.parameters)
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {name} without {len(plan.removed)} of its {record.blocks} transformer blocks",
        "",
        f"Removed blocks (original numbering, first is 0): {', '.join(map(str, plan.removed))}; "
        f"{left} remain. {_changed(plan)} The order of removal, "
        "every candidate's score and the calibration text's hashes are in `plan.json`; timings and "
        "verification in `run.json`.",
        "",
        "```",
        record.command,
        "```",
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
        "Method: SLEB (Song et al., ICML 2024, arXiv:2402.09025).",
    ]
    return "\n".join(lines) + "\n"


def _changed(plan: Plan) -> str:
    """Which weights are not the original's."""
    if plan.repair is None:
        return "No weight was changed and nothing was trained."
    names = plan.repair.tensors
    return (
        f"{len(names)} matrices around the gaps were re-fitted in closed form, to make up for the "
        f"missing blocks ({', '.join(f'`{name}`' for name in names)}); nothing was trained."
    )


def _inherited(source: Path) -> dict[str, Any]:
    """Licence and language from the original's card, if it has one."""
    from huggingface_hub import metadata_load

    try:
        data: dict[str, Any] = metadata_load(source / "README.md") or {}
    except Exception as error:  # missing, or not a card: no reason to lose a finished search
        logger.info("no metadata from %s: %s", source / "README.md", error)
        return {}
    keys = ("license", "license_name", "license_link", "language")
    return {key: data[key] for key in keys if key in data}


def _range(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.value:.2f}"
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"
