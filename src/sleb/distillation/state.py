"""What a healing run needs to go on after it was stopped: one file, replaced as a whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sleb.core.errors import DataError, InputError, ResourceError
from sleb.core.files import disk_errors

__all__ = ["Progressed", "load_state", "save_state", "state_path"]

KEY = "sleb.heal"


@dataclass(kw_only=True)
class Progressed:
    """Where a run is. ``seconds``: spent in training so far. ``checks``: (step, held-out
    divergence in nats/token). ``worse``: checks since the best one."""

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    worse: int = 0
    checks: tuple[tuple[int, float], ...] = ()

    @property
    def best(self) -> float:
        """Lowest held-out divergence so far, nats/token."""
        return min(value for _, value in self.checks)


def state_path(out: Path) -> Path:
    """The file of a run that is to write ``out``."""
    return out.with_name(out.name + ".heal")


def save_state(
    path: Path, settings: Mapping[str, Any], where: Progressed, tensors: dict[str, Tensor]
) -> None:
    """Write tensors, position and settings into one safetensors file, atomically.

    Raises:
        ResourceError: the disk is full.
    """
    from safetensors.torch import save_file

    # a folder, as the writer has a temporary file of its own; what a crash left there goes now
    part = path.with_name(f".{path.name}.part")
    text = json.dumps({"settings": settings, "progressed": asdict(where)})
    with disk_errors(path):
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(flat, part / path.name, metadata={KEY: text})
            os.replace(part / path.name, path)
        except SafetensorError as error:
            raise ResourceError(
                f"cannot write {path} ({error}); free some space and repeat the command"
            ) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def load_state(
    path: Path, settings: Mapping[str, Any]
) -> tuple[Progressed, dict[str, Tensor]] | None:
    """What :func:`save_state` wrote for the same settings; None if there is nothing.

    Raises:
        InputError: it is of a run with other settings.
        DataError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {})[KEY])
            # as JSON has them, so that tuples compare with lists
            now = json.loads(json.dumps(settings))
            differ = [k for k in {**now, **saved["settings"]} if now.get(k) != saved["settings"][k]]
            if differ:
                old, new = saved["settings"][differ[0]], now.get(differ[0])
                raise InputError(
                    f"{path} is of a run with other settings ({differ[0]} was {old}, now {new}); "
                    "repeat that run's command to finish it, or remove the file to start anew"
                )
            where = saved["progressed"]
            where["checks"] = tuple((step, value) for step, value in where["checks"])
            return Progressed(**where), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it to start anew") from None
