"""Where a model's weights lie when they do not all lie on one device.

Placing is accelerate's (``device_map``: several GPUs, the CPU's memory, files) and transformers'
(``tp_plan``: every matrix split over processes). Here is only what can be asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sleb.core.errors import InputError, UnsupportedModel, did_you_mean
from sleb.core.process_group import group
from sleb.models.stack import decoder_config

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def check_placing(*, device: str, stream: bool, device_map: str | None, tp: int) -> None:
    """Refuse what cannot be combined.

    Raises:
        InputError: says what, and what to leave out.
    """
    for given, option, other in (
        (stream and device_map, "--stream", "--device-map"),
        (stream and tp > 1, "--stream", "--tp"),
        (device_map and tp > 1, "--device-map", "--tp"),
        (device_map and device != "auto", "--device-map", "--device"),
    ):
        if given:
            raise InputError(f"{option} and {other} both say where weights lie; give one of them")
    if device_map and group().several:
        raise InputError(
            "--device-map spreads one model over all devices, and every process of this job would: "
            "start sleb by itself, or split the model over the processes with --tp"
        )


def device_map_options(device_map: str) -> dict[str, Any]:
    """Arguments for from_pretrained. ``device_map``: one of ``AUTOMATIC``, or a JSON file with a
    device for each module, as in ``{"model.embed_tokens": 0, "model.layers.0": "disk"}``, or with
    limits for the automatic choice, as in ``{"max_memory": {"0": "20GB", "cpu": "64GB"}}``.

    Raises:
        InputError: it is neither.
    """
    if device_map in AUTOMATIC:
        return {"device_map": device_map}
    path = Path(device_map)
    if not path.is_file():
        raise InputError(
            f"--device-map {device_map!r} is neither {', '.join(AUTOMATIC)} nor a JSON file"
            f"{did_you_mean(device_map, AUTOMATIC)}"
        )
    try:
        places = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    limits = places.get("max_memory") if isinstance(places, dict) and len(places) == 1 else None
    given = places if limits is None else limits
    kinds = (int, str)
    if not isinstance(given, dict) or not all(isinstance(v, kinds) for v in given.values()):
        raise InputError(
            f'{path} must hold a device for each module, as in {{"model.norm": 0}}, or limits, as '
            'in {"max_memory": {"0": "20GB"}}'
        )
    if limits is None:
        return {"device_map": places}
    by_device = {int(k) if k.isdigit() else k: v for k, v in limits.items()}
    return {"device_map": "auto", "max_memory": by_device}


def tensor_parallel_options(config: Any, tp: int, device: str, name: str) -> dict[str, Any]:
    """Arguments for from_pretrained, with this job's processes in groups of ``tp``.

    Raises:
        InputError: the processes do not come in such groups.
        UnsupportedModel: transformers has no plan for this architecture, or its attention heads do
            not come in such groups.
    """
    text = decoder_config(config)
    if not getattr(text, "base_model_tp_plan", None):
        raise UnsupportedModel(
            f"{name}: transformers has no plan to split a {text.model_type} over processes: leave "
            "out --tp"
        )
    heads = int(text.num_attention_heads)
    shared = int(getattr(text, "num_key_value_heads", None) or heads)
    if heads % tp or shared % tp:
        fits = [n for n in range(2, heads + 1) if not (heads % n or shared % n)]
        hint = f"--tp {fits[-1]} is possible" if fits else "no --tp is possible"
        raise UnsupportedModel(
            f"{name} has {heads} attention and {shared} key-value heads, which --tp {tp} does not "
            f"divide: {hint}"
        )
    here = group()
    here.split(tp, device)
    from transformers.distributed import DistributedConfig

    # fsdp_size is the number of copies of the model: transformers only checks that all processes
    # are accounted for, and splits by the mesh
    plan = DistributedConfig(tp_plan="auto", tp_size=tp, fsdp_size=here.size)
    return {"distributed_config": plan, "device_mesh": here.mesh}
