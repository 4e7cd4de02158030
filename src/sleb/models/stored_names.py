"""Where the blocks' tensors are in a checkpoint, which need not be where the modules are.

transformers renames what it loads: ``language_model.model.layers.0`` of a file is
``model.language_model.layers.0`` of the model. Its own rules are asked, since a vision tower beside
the decoder may have as many blocks and tensors of the same names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

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
    base, own = model.base_model_prefix, own or model.state_dict()

    def loaded(name: str) -> str:
        new: str = rename_source_key(name, renamings, converters, base, own)[0]
        if new not in own and name in own:  # a rule for another model's names matches this one's
            return name
        return new

    return loaded
