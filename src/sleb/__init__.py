"""Make large language models faster and smaller by removing redundant transformer blocks.

Training-free (SLEB, ICML 2024, arXiv:2402.09025). Importing this package does not import torch:
names are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # "as": type checkers know what is public by it
    # isort: off
    from sleb.calibration.windows import Windows as Windows, load_windows as load_windows
    from sleb.config import (
        ApplyConfig as ApplyConfig,
        BenchConfig as BenchConfig,
        CompareConfig as CompareConfig,
        EvalConfig as EvalConfig,
        ExportConfig as ExportConfig,
        HealConfig as HealConfig,
        PruneConfig as PruneConfig,
        PushConfig as PushConfig,
        QuantizeConfig as QuantizeConfig,
        RepairConfig as RepairConfig,
        RestoreConfig as RestoreConfig,
        SearchConfig as SearchConfig,
        SimilarityConfig as SimilarityConfig,
        TransferConfig as TransferConfig,
        VerifyConfig as VerifyConfig,
    )
    from sleb.core.errors import (
        DataError as DataError,
        InputError as InputError,
        ResourceError as ResourceError,
        SlebError as SlebError,
        UnsupportedModel as UnsupportedModel,
        VerificationFailed as VerificationFailed,
    )
    from sleb.core.plan import Plan as Plan
    from sleb.evaluation.answers import compare as compare
    from sleb.evaluation.perplexity import Evaluation as Evaluation
    from sleb.formats.exports import export as export
    from sleb.formats.hub import push as push
    from sleb.formats.quantize import quantize as quantize
    from sleb.models.describe import Description as Description, describe as describe
    from sleb.models.load import LoadedModel as LoadedModel, load as load
    from sleb.models.stack import bypassed as bypassed
    from sleb.pipeline import Pruned as Pruned, estimate as estimate, heal as heal
    from sleb.project import Project as Project, run as run
    from sleb.record import RunRecord as RunRecord
    from sleb.repairs import Repair as Repair
    from sleb.selection.similarity import (
        Similarity as Similarity,
        measure_similarity as measure_similarity,
    )
    from sleb.surgery.restore import Restored as Restored, restore as restore
    from sleb.surgery.verification import Verification as Verification
    from sleb.template import init as init
    from sleb.verbs import (
        Verified as Verified,
        apply as apply,
        bench as bench,
        evaluate as evaluate,
        prune as prune,
        repair as repair,
        report as report,
        search as search,
        similarity as similarity,
        transfer as transfer,
        verify as verify,
    )
    # isort: on

__version__ = "0.1.0"

_NAMES = {
    "calibration.windows": "Windows load_windows",
    "config": (
        "ApplyConfig BenchConfig CompareConfig EvalConfig ExportConfig HealConfig "
        "PruneConfig PushConfig QuantizeConfig RepairConfig RestoreConfig SearchConfig "
        "SimilarityConfig TransferConfig VerifyConfig"
    ),
    "core.errors": (
        "DataError InputError ResourceError SlebError UnsupportedModel VerificationFailed"
    ),
    "core.plan": "Plan",
    "evaluation.answers": "compare",
    "evaluation.perplexity": "Evaluation",
    "formats.exports": "export",
    "formats.hub": "push",
    "formats.quantize": "quantize",
    "models.describe": "Description describe",
    "models.load": "LoadedModel load",
    "models.stack": "bypassed",
    "pipeline": "Pruned estimate heal",
    "project": "Project run",
    "record": "RunRecord",
    "repairs": "Repair",
    "selection.similarity": "Similarity measure_similarity",
    "surgery.restore": "Restored restore",
    "surgery.verification": "Verification",
    "template": "init",
    "verbs": "Verified apply bench evaluate prune repair report search similarity transfer verify",
}
"""Public names, by the module that has them."""
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sleb' has no attribute {name!r}")
    value = getattr(import_module(f"sleb.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_HOME, *(name for name in globals() if name.startswith("__"))])
