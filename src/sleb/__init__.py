"""Make large language models faster and smaller by removing redundant transformer blocks.

Training-free (SLEB, ICML 2024, arXiv:2402.09025). Importing this package does not import torch:
names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleb.calibration import Windows, load_windows
    from sleb.core.errors import (
        DataError,
        InputError,
        ResourceError,
        SlebError,
        UnsupportedModel,
        VerificationFailed,
    )
    from sleb.core.plan import Plan
    from sleb.evaluation.perplexity import Evaluation, evaluate
    from sleb.models.describe import Description, describe
    from sleb.models.load import LoadedModel, load
    from sleb.models.stack import bypassed
    from sleb.pipeline import Pruned, prune
    from sleb.repairs.search import search
    from sleb.selection.similarity import Similarity, measure_similarity
    from sleb.surgery.apply import apply
    from sleb.surgery.restore import Restored, restore
    from sleb.surgery.verification import Verification, verify

__version__ = "0.1.0"

_HOME = {
    "DataError": "core.errors",
    "Description": "models.describe",
    "Evaluation": "evaluation.perplexity",
    "InputError": "core.errors",
    "LoadedModel": "models.load",
    "Plan": "core.plan",
    "Pruned": "pipeline",
    "ResourceError": "core.errors",
    "Restored": "surgery.restore",
    "Similarity": "selection.similarity",
    "SlebError": "core.errors",
    "UnsupportedModel": "core.errors",
    "Verification": "surgery.verification",
    "VerificationFailed": "core.errors",
    "Windows": "calibration",
    "apply": "surgery.apply",
    "bypassed": "models.stack",
    "describe": "models.describe",
    "evaluate": "evaluation.perplexity",
    "load": "models.load",
    "load_windows": "calibration",
    "measure_similarity": "selection.similarity",
    "prune": "pipeline",
    "restore": "surgery.restore",
    "search": "repairs.search",
    "verify": "surgery.verification",
}

# spelled out, since type checkers do not compute it
__all__ = [
    "DataError",
    "Description",
    "Evaluation",
    "InputError",
    "LoadedModel",
    "Plan",
    "Pruned",
    "ResourceError",
    "Restored",
    "Similarity",
    "SlebError",
    "UnsupportedModel",
    "Verification",
    "VerificationFailed",
    "Windows",
    "apply",
    "bypassed",
    "describe",
    "evaluate",
    "load",
    "load_windows",
    "measure_similarity",
    "prune",
    "restore",
    "search",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sleb' has no attribute {name!r}")
    value = getattr(import_module(f"sleb.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
