"""Is a healed checkpoint what was trained?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import VerificationFailed
from sleb.models.load import strict_model
from sleb.surgery.verification import probe_ids

__all__ = ["check_reload", "probed"]


@torch.no_grad()
def probed(model: nn.Module) -> Tensor:
    """Logits on fixed token ids, float32 on the CPU [1, T, V]."""
    ids = probe_ids(model.config).to(next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float().cpu()


def check_reload(
    stage: Path,
    cut: Checkpoint,
    tensors: Mapping[str, Tensor],
    trained: tuple[Tensor, torch.dtype, torch.device],
    trust: bool,
) -> None:
    """Raise VerificationFailed unless the new checkpoint is the trained model: its tensors in
    form those of the cut, in value those trained, and its logits those of the trained model, with
    their dtype and device."""
    written = Checkpoint.open(stage)
    logits, dtype, device = trained

    def forms(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}

    if forms(written) != forms(cut):
        raise VerificationFailed("the healed checkpoint has other tensors than the cut")
    for name, tensor in tensors.items():
        if not torch.equal(written.tensor(name), tensor):
            raise VerificationFailed(f"{name} was not written as it was trained")
    model = strict_model(stage, dtype, trust).to(device)
    found = probed(model)
    limit = float(logits.abs().max()) * (1e-4 if dtype == torch.float32 else 2e-2)
    if not float((found - logits).abs().max()) <= limit:
        raise VerificationFailed(
            "the healed checkpoint computes other logits than it was trained to"
        )
