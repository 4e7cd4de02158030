"""The published algorithm, plainly: one full forward pass per candidate, nothing shared.

Written against transformers alone, from the paper's description, so that it can disagree with
the library.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn


def blocks_of(model: nn.Module) -> nn.ModuleList:
    n = model.config.get_text_config().num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n)


@torch.no_grad()
def logits_without(model: nn.Module, removed: Collection[int], ids: Tensor) -> Tensor:
    """Logits with blocks skipped by forward hooks that return the block's input."""

    def hook(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    blocks = blocks_of(model)
    handles = [blocks[b].register_forward_hook(hook, with_kwargs=True) for b in removed]
    try:
        return model(input_ids=ids, use_cache=False).logits.float()
    finally:
        for handle in handles:
            handle.remove()


def loss(model: nn.Module, removed: Collection[int], windows: Tensor) -> Tensor:
    """Mean next-token loss per window, nats, float64 [N]; one window at a time."""
    losses = []
    for window in windows:
        logits = logits_without(model, removed, window[None])[0, :-1]
        losses.append(nn.functional.cross_entropy(logits, window[1:]).double())
    return torch.stack(losses)


def divergence(model: nn.Module, removed: Collection[int], windows: Tensor) -> Tensor:
    """Mean KL(dense || pruned) per window, nats, float64 [N]."""
    values = []
    for window in windows:
        dense = logits_without(model, (), window[None])[0, :-1].log_softmax(-1)
        pruned = logits_without(model, removed, window[None])[0, :-1].log_softmax(-1)
        kl = nn.functional.kl_div(pruned, dense, log_target=True, reduction="none").sum(-1)
        values.append(kl.mean().double())
    return torch.stack(values)


def greedy(
    model: nn.Module,
    windows: Tensor,
    n: int,
    score: Callable[..., Tensor] = loss,
    protected: Collection[int] = (),
) -> tuple[list[int], list[dict[int, float]]]:
    """SLEB, algorithm 1: n times, remove the live block whose absence scores lowest."""
    depth = len(blocks_of(model))
    order: list[int] = []
    rounds = []
    for _ in range(n):
        scores = {
            b: score(model, [*order, b], windows).mean().item()
            for b in range(depth)
            if b not in order and b not in protected
        }
        order.append(min(scores, key=lambda b: (scores[b], b)))
        rounds.append(scores)
    return order, rounds
