"""A repair that merges neighbours: the MLP before a gap takes in channels of those that are gone.

FlattenGPT (2602.08858) and CoMe (2510.15304) merge neighbouring blocks into one of a block's size.
Here the channels of all MLPs of a gap and of the block before it are candidates for that block's
MLP. Its last matrix is fitted on all of them, as a repair fits it on its own; then channels go, in
turns, by what each alone is worth behind a fit of the others (OBS, as SparseGPT 2301.00774), until
as many are left as the block has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sleb import repairs
from sleb.repairs.regression import ROWS, Regression, gain_weight, real_rows
from sleb.repairs.residual_writers import Outputs

POOL = 3
"""Candidates, of a block's channels: those that add most to the stream."""
TURNS = 6


class Merging(Regression):
    """Of blocks as Llama's: an RMS norm, and an MLP of gate_proj, up_proj and down_proj."""

    def _solve(
        self, block: int, maps: Mapping[str, float], targets: Sequence[Tensor], ridge: float
    ) -> None:
        gone = range(block + 1, self._behind(block))
        if gone and maps is self.writers(block).final:
            self._merge(block, [block, *gone], targets, ridge)
        else:
            super()._solve(block, maps, targets, ridge)

    def _merge(
        self, block: int, run: Sequence[int], targets: Sequence[Tensor], ridge: float
    ) -> None:
        """Give ``block`` the MLP of ``run``, of which it is the first, so that the stream behind it
        becomes ``targets``."""
        layers: Any = self.stack.blocks
        host = layers[block]
        width = host.mlp.down_proj.in_features
        gate, up, down = (
            torch.cat(rows)
            for rows in zip(*(self._channels(host, each) for each in run), strict=True)
        )
        kept = [*zip(*self._seen(block, targets), strict=True)]
        given, missing, root = (torch.cat(parts) for parts in kept)

        def features(picked: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            """What channels give [R, C], and what the MLP is to add [R, D], by ``root``."""
            reading, passing = gate[picked].float(), up[picked].float()
            for a in range(0, len(given), ROWS):
                x, r = given[a : a + ROWS], root[a : a + ROWS]
                found = host.mlp.act_fn(x @ reading.T) * (x @ passing.T)
                yield found * r, missing[a : a + ROWS] * r

        picked = torch.arange(len(gate), device=gate.device)
        if len(picked) > POOL * width:
            power = torch.stack([x.square().sum(0) for x, _ in features(picked)]).double().sum(0)
            added = power * down.square().sum(1)
            picked = added.topk(POOL * width).indices.sort().values
        prior = down[picked]
        gram, cross = prior.new_zeros(2 * (len(picked),)), torch.zeros_like(prior.T)
        for x, y in features(picked):
            self._add_products(gram, cross, x, y - x @ prior.float())
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        weight = prior + torch.cholesky_solve(cross.T, torch.linalg.cholesky(gram))
        for size in torch.linspace(len(picked), width, TURNS + 1).round().int().tolist()[1:]:
            alone = torch.cholesky_inverse(torch.linalg.cholesky(gram)).diagonal()
            best = (weight.square().sum(1) / alone).topk(size).indices.sort().values
            out = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
            out[best] = False
            rest, between = gram[best][:, best], gram[best][:, out]
            given_up = torch.cholesky_solve(between @ weight[out], torch.linalg.cholesky(rest))
            weight, gram, picked = weight[best] + given_up, rest, picked[best]
        for name, new in (("gate", gate[picked]), ("up", up[picked]), ("down", weight.T)):
            self.write(block, f"mlp.{name}_proj.weight", new.contiguous())

    def _channels(self, host: Any, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down [F, D] of a block's MLP, float64, that reads the norm of ``host``."""
        other: Any = self.stack.blocks[block]
        own, gain = (each.post_attention_layernorm.weight.double() for each in (host, other))
        linear = (getattr(other.mlp, f"{name}_proj") for name in ("gate", "up", "down"))
        gate, up, down = (module.weight.double() for module in linear)
        return gate * (gain / own), up * (gain / own), down.T

    def _seen(
        self, block: int, targets: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """By pass: what the MLP is given [R, D], is to add [R, D], and the root of each token's
        weight [R, 1], in float32."""
        seen = Outputs(self.stack.blocks[block], ["mlp"])
        with seen.recorded():
            for out, target, real in zip(self.run_cut(block), targets, self.real, strict=True):
                streams = seen.inputs["mlp"], seen.outputs["mlp"], target.to(out.device), out
                given, adds, wanted, now = (real_rows(x, real).float() for x in streams)
                yield given, wanted - now + adds, gain_weight(wanted)


@contextmanager
def merging() -> Iterator[None]:
    """While this is open, repairs merge."""
    with patch.object(repairs, "Regression", Merging):
        yield
