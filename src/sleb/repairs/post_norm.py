"""Re-fit of a matrix whose output goes through an RMS norm before it is added to the stream.

What is added is g * y / rms(y), with y = W x and the norm's gains g. A change of W turns y, and its
length is divided away again; how much is added is in the gains alone. So both are fitted in turn,
to the residual to the dense stream: W for the directions, by ridge regression on x / rms(y), where
rows with small gains, which show little of any change, take little of it; then each gain by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sleb.core.process_group import group
from sleb.repairs.residual_writers import Outputs, ResidualWriters, stream_before, weight_of

if TYPE_CHECKING:
    from sleb.repairs.regression import Regression

__all__ = ["exact", "fit_before_norm", "gain_weight"]

ROUNDS = 2
DAMPING = 0.1  # of the mean square of the gains


def fit_before_norm(
    fitter: Regression,
    block: int,
    branches: ResidualWriters,
    name: str,
    targets: Sequence[Tensor],
    ridge: float,
    rounded: Callable[[int, str, Tensor], Tensor],
    tick: Callable[[int], None],
) -> None:
    """Fit matrix ``name`` of a block, and the norm behind it, so that the stream [B, T, D] behind
    the block (or, for an inner one, between attention and MLP) becomes ``targets``."""
    norm = branches.norms[name]
    factor = {**branches.inner, **branches.final}[name]
    matrix, gain_of = fitter.module(block, name), fitter.module(block, norm.path)
    seen = Outputs(fitter.stack.blocks[block], [*dict.fromkeys([name, *branches.last])])

    def rows() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs x / rms(y) [R, in], directions y / rms(y) [R, D] and residuals [R, D], float32,
        all times the root of the token's weight."""
        with seen.recorded():
            for out, target in zip(fitter.run(block, fitter.cut, tick), targets, strict=True):
                value = stream_before(out, seen, branches.last) if name in branches.inner else out
                wanted = target.to(value.device).flatten(0, -2).float()
                root = gain_weight(wanted)
                y = seen.outputs[name].flatten(0, -2).float()
                scale = root * y.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
                x = seen.given(name).flatten(0, -2).float()
                yield x * scale, y * scale, (wanted - value.flatten(0, -2).float()) * root

    for _ in range(ROUNDS):
        weight, gains = weight_of(matrix), weight_of(gain_of)
        gram = torch.zeros(2 * weight.shape[1:], dtype=torch.float64, device=exact(weight))
        cross = gram.new_zeros(weight.shape)
        for x, _, residual in rows():
            gram += (x.T @ x).to(gram)
            cross += (residual.T @ x).to(gram)
        group().sum_(gram, cross)
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        change = torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram)).T.contiguous()
        group().from_first_(change)
        gain = gains.to(change) + norm.offset
        share = gain / (gain.square() + DAMPING * gain.square().mean()) / factor
        new = weight.double() + (share[:, None] * change).to(weight.device)
        fitter.write(block, f"{name}.weight", new, rounded)

        along, size = gram.new_zeros((2, len(gains)))
        for _, unit, residual in rows():
            along += (unit * residual).sum(0).to(gram)
            size += unit.square().sum(0).to(gram)
        group().sum_(along, size)
        step = along / factor / (size + ridge * size.mean())
        group().from_first_(step)
        new = gains.double() + step.to(gains.device)
        fitter.write(block, f"{norm.path}.weight", new, rounded)


def gain_weight(wanted: Tensor) -> Tensor:
    """Root of a token's weight [R, 1]: the inverse root mean square of what the stream is to be."""
    return wanted.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def exact(x: Tensor) -> torch.device:
    """Where float64 is possible: not on mps."""
    return torch.device("cpu") if x.device.type == "mps" else x.device
