"""Where the blocks' tensors are in a checkpoint, which need not be where the modules are.

transformers renames what it loads: ``language_model.model.layers.0`` of a file is
``model.language_model.layers.0`` of the model. Its own rules are asked, since a vision tower beside
the decoder may have as many blocks and tensors of the same names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import DataError
from sleb.models.stack import BlockStack


def block_prefix(checkpoint: Checkpoint, stack: BlockStack) -> str:
    """What stands before a block's number in the names of its tensors on disk: ``model.layers.`` of
    ``model.layers.0.mlp...``.

    Raises:
        DataError: no tensors are numbered as all of these blocks are.
    """
    names: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in checkpoint.tensors:
        if match := re.match(r"(.*?\.|)(\d+)\.", name):
            names[match[1]][int(match[2])].append(name)
    loaded = renaming(stack.model)
    found = [
        prefix
        for prefix, blocks in names.items()
        if blocks.keys() >= set(range(len(stack)))
        and any(loaded(name).startswith(f"{stack.path}.0.") for name in blocks[0])
    ]
    if len(found) != 1:
        raise DataError(
            f"{checkpoint.path}: {' and '.join(found) or 'no'} tensors are numbered as "
            f"{stack.name}'s blocks 0..{len(stack) - 1}"
        )
    return found[0]


def pieces(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A parameter of ``model`` as a checkpoint has it: under one name, or in several tensors that
    transformers stacks on loading, as it does experts."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
    return found


def as_parameters(
    stack: BlockStack, tensors: Mapping[str, Tensor], prefix: str
) -> Iterator[tuple[int, str, Tensor]]:
    """Tensors of a checkpoint, whose blocks are named with ``prefix``, as blocks, paths in them and
    values of the parameters there. What is stacked takes from the model what is not given."""
    loaded = renaming(stack.model)
    stacked: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        block, _, path = name.removeprefix(prefix).partition(".")
        if path in dict(stack.blocks[int(block)].named_parameters()):
            yield int(block), path, tensor
        else:
            stacked[loaded(name)][name] = tensor
    for name, given in stacked.items():
        block, _, path = name.removeprefix(f"{stack.path}.").partition(".")
        old = stack.blocks[int(block)].get_parameter(path).detach()
        new = old.to("cpu", copy=True)
        # where a piece's elements are in the parameter shows by cutting up their numbers
        numbers = torch.arange(new.numel()).view(new.shape)
        for piece, at in pieces(stack.model, name, numbers).items():
            if piece in given:
                new.view(-1)[at.flatten()] = given[piece].to(new.dtype).flatten()
        yield int(block), path, new


def renaming(model: Any, own: Any = None) -> Callable[[str], str]:
    """The name under which ``model`` loads a tensor of a file. ``own``: its tensors, if their names
    are other than those of its modules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    # kept as they are: a weight that a repair wrote, split over processes, cannot be detached
    base, own = model.base_model_prefix, own or model.state_dict(keep_vars=True)

    def loaded(name: str) -> str:
        new: str = rename_source_key(name, renamings, converters, base, own)[0]
        if new not in own and name in own:  # a rule for another model's names matches this one's
            return name
        return new

    return loaded
