"""Plans made by hand, and checkpoints changed by hand."""

import json
from pathlib import Path

from sleb.checkpoints.checkpoint import Checkpoint, fingerprint
from sleb.core.plan import Plan
from sleb.models.load import load_config
from sleb.models.stack import decoder_config

ZEROS = "0" * 64


def minimal(**changes) -> dict:
    return {
        "model": {
            "model_type": "llama",
            "architecture": "LlamaForCausalLM",
            "blocks": 6,
            "config_sha256": ZEROS,
            "weights_sha256": ZEROS,
        },
        "removed": [1, 2, 4],
        "order": [4, 1, 2],
        "metric": "loss",
        "unit": "nats/token",
        "strategy": "greedy",
        "dtype": "float32",
        **changes,
    }


def plan_of(folder: Path, *order: int) -> Plan:
    """A plan that removes these blocks of a checkpoint, in this order."""
    blocks = decoder_config(load_config(folder)).num_hidden_layers
    plan = Plan.model_validate(minimal(removed=[], order=[]))
    model = fingerprint(Checkpoint.open(folder), blocks)
    return plan.model_copy(update={"model": model, "removed": tuple(sorted(order)), "order": order})


def edit_config(folder: Path, **fields) -> None:
    """Set fields of a checkpoint's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
