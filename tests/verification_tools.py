"""Checkpoints spoilt in one way, and which of the gates see it."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from sleb.core.errors import VerificationFailed
from sleb.surgery import verification

CONFIG = "depth-dependent config fields"
RELOAD = "clean reload"
BLOCKS = "number of blocks"
WEIGHTS = "weights equal the original's"
LOGITS = "logits equal the original with blocks bypassed"
GENERATION = "generation with cache equals without"
KEPT = "config.json keeps the original's fields"
ORDER = [KEPT, CONFIG, RELOAD, BLOCKS, WEIGHTS, LOGITS, GENERATION]


def failed(found: verification.Verification) -> list[str]:
    """Names of the gates that failed; and that the error names the first of them."""
    names = [check.name for check in found.checks if not check.passed]
    assert found.passed == (not names)
    if names:
        with pytest.raises(VerificationFailed, match=rf"failed '{names[0]}': .*\(must be .*do not"):
            found.require()
    else:
        found.require()
    return names


def measured(found: verification.Verification, name: str) -> str:
    return next(check.measured for check in found.checks if check.name == name)


def without_sums(folder: Path) -> Path:
    (folder / "SHA256SUMS").unlink()
    return folder


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.copy() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
