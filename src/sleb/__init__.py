"""Make large language models faster and smaller by removing redundant transformer blocks.

Training-free (SLEB, ICML 2024, arXiv:2402.09025). Importing this package does not import torch:
names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleb.calibration.windows import Windows, load_windows
    from sleb.config import (
        ApplyConfig,
        BenchConfig,
        CompareConfig,
        EvalConfig,
        ExportConfig,
        HealConfig,
        PruneConfig,
        PushConfig,
        QuantizeConfig,
        RepairConfig,
        RestoreConfig,
        SearchConfig,
        SimilarityConfig,
        TransferConfig,
        VerifyConfig,
    )
    from sleb.core.errors import (
        DataError,
        InputError,
        ResourceError,
        SlebError,
        UnsupportedModel,
        VerificationFailed,
    )
    from sleb.core.plan import Plan
    from sleb.distillation import heal
    from sleb.evaluation.perplexity import Evaluation
    from sleb.formats.hub import push
    from sleb.formats.quantize import quantize
    from sleb.models.describe import Description, describe
    from sleb.models.load import LoadedModel, load
    from sleb.models.stack import bypassed
    from sleb.pipeline import Pruned
    from sleb.project import Project, run
    from sleb.record import RunRecord
    from sleb.repairs import Repair
    from sleb.selection.similarity import Similarity, measure_similarity
    from sleb.surgery.restore import Restored, restore
    from sleb.surgery.verification import Verification
    from sleb.verbs import (
        Verified,
        apply,
        bench,
        compare,
        evaluate,
        export,
        init,
        prune,
        repair,
        report,
        search,
        similarity,
        transfer,
        verify,
    )

__version__ = "0.1.0"

_HOME = {
    "ApplyConfig": "config",
    "BenchConfig": "config",
    "CompareConfig": "config",
    "DataError": "core.errors",
    "Description": "models.describe",
    "EvalConfig": "config",
    "Evaluation": "evaluation.perplexity",
    "ExportConfig": "config",
    "HealConfig": "config",
    "InputError": "core.errors",
    "LoadedModel": "models.load",
    "Plan": "core.plan",
    "Project": "project",
    "PruneConfig": "config",
    "Pruned": "pipeline",
    "PushConfig": "config",
    "QuantizeConfig": "config",
    "Repair": "repairs",
    "RepairConfig": "config",
    "ResourceError": "core.errors",
    "RestoreConfig": "config",
    "Restored": "surgery.restore",
    "RunRecord": "record",
    "SearchConfig": "config",
    "Similarity": "selection.similarity",
    "SimilarityConfig": "config",
    "SlebError": "core.errors",
    "TransferConfig": "config",
    "UnsupportedModel": "core.errors",
    "Verification": "surgery.verification",
    "VerificationFailed": "core.errors",
    "Verified": "verbs",
    "VerifyConfig": "config",
    "Windows": "calibration.windows",
    "apply": "verbs",
    "bench": "verbs",
    "bypassed": "models.stack",
    "compare": "verbs",
    "describe": "models.describe",
    "evaluate": "verbs",
    "export": "verbs",
    "heal": "distillation",
    "init": "verbs",
    "load": "models.load",
    "load_windows": "calibration.windows",
    "measure_similarity": "selection.similarity",
    "prune": "verbs",
    "push": "formats.hub",
    "quantize": "formats.quantize",
    "repair": "verbs",
    "report": "verbs",
    "restore": "surgery.restore",
    "run": "project",
    "search": "verbs",
    "similarity": "verbs",
    "transfer": "verbs",
    "verify": "verbs",
}

# spelled out, since type checkers do not compute it
__all__ = [
    "ApplyConfig",
    "BenchConfig",
    "CompareConfig",
    "DataError",
    "Description",
    "EvalConfig",
    "Evaluation",
    "ExportConfig",
    "HealConfig",
    "InputError",
    "LoadedModel",
    "Plan",
    "Project",
    "PruneConfig",
    "Pruned",
    "PushConfig",
    "QuantizeConfig",
    "Repair",
    "RepairConfig",
    "ResourceError",
    "RestoreConfig",
    "Restored",
    "RunRecord",
    "SearchConfig",
    "Similarity",
    "SimilarityConfig",
    "SlebError",
    "TransferConfig",
    "UnsupportedModel",
    "Verification",
    "VerificationFailed",
    "Verified",
    "VerifyConfig",
    "Windows",
    "apply",
    "bench",
    "bypassed",
    "compare",
    "describe",
    "evaluate",
    "export",
    "heal",
    "init",
    "load",
    "load_windows",
    "measure_similarity",
    "prune",
    "push",
    "quantize",
    "repair",
    "report",
    "restore",
    "run",
    "search",
    "similarity",
    "transfer",
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
