"""Make large language models faster and smaller by removing redundant transformer blocks.

Training-free (SLEB, ICML 2024, arXiv:2402.09025). Importing this package does not import torch:
names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleb.errors import (
        DataError,
        InputError,
        ResourceError,
        SlebError,
        UnsupportedModel,
        VerificationFailed,
    )
    from sleb.exactness import Verification, verify
    from sleb.models.describe import Description, describe
    from sleb.models.load import LoadedModel, load
    from sleb.models.stack import bypassed
    from sleb.pipeline import Pruned, prune
    from sleb.plan import Plan
    from sleb.quality import Evaluation, evaluate
    from sleb.rollback.restore import Restored, restore
    from sleb.selection.search import search
    from sleb.similarity import Similarity, measure_similarity
    from sleb.surgery import apply
    from sleb.text import Windows, load_windows

__version__ = "0.1.0"

_HOME = {
    "DataError": "errors",
    "Description": "models.describe",
    "Evaluation": "quality",
    "InputError": "errors",
    "LoadedModel": "models.load",
    "Plan": "plan",
    "Pruned": "pipeline",
    "ResourceError": "errors",
    "Restored": "rollback.restore",
    "Similarity": "similarity",
    "SlebError": "errors",
    "UnsupportedModel": "errors",
    "Verification": "exactness",
    "VerificationFailed": "errors",
    "Windows": "text",
    "apply": "surgery",
    "bypassed": "models.stack",
    "describe": "models.describe",
    "evaluate": "quality",
    "load": "models.load",
    "load_windows": "text",
    "measure_similarity": "similarity",
    "prune": "pipeline",
    "restore": "rollback.restore",
    "search": "selection.search",
    "verify": "exactness",
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
