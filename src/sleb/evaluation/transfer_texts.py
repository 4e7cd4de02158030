"""What texts and target `sleb transfer` takes. Needs no torch: others are refused at once."""

from __future__ import annotations

from sleb.calibration.sources import check_sources, parse_source
from sleb.config import TransferConfig
from sleb.core.errors import InputError

MIX = "mix"


def check_texts(config: TransferConfig) -> None:
    """Find mistakes in the options of :func:`sleb.transfer` before torch is imported.

    Raises:
        InputError: fewer than two texts, or two of one name; a target that plans cannot share; no
            windows to compare on; or as :func:`sleb.calibration.check_sources`.
    """
    if len(config.text) < 2:
        raise InputError(
            "sleb transfer compares texts: give two or more, as in --text mail=mail.jsonl "
            "--text code=code.txt"
        )
    names = [MIX, *(parse_source(spec).name for spec in config.text)]
    for i, name in enumerate(names):
        if name in names[:i]:
            why = "means all texts together" if name == MIX else "is the name of two texts"
            raise InputError(
                f"{config.text[i - 1]}: '{name}' {why}; give another name, as in NAME=FILE"
            )
    if config.curve:
        raise InputError(
            "--curve measures one plan at many depths, and sleb transfer many plans at one: use "
            "--curve with sleb search"
        )
    limits = [n for n in ("max_loss_increase", "keep_answers") if getattr(config, n) is not None]
    if limits:
        raise InputError(
            f"--{limits[0].replace('_', '-')} would have every plan remove another number of "
            "blocks, so their losses would not compare; give --remove, --speedup or --size"
        )
    if config.heldout < 2:
        raise InputError(f"--heldout {config.heldout} is too few to compare on; give at least 2")
    check_sources(config.text)
