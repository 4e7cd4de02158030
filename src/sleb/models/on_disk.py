"""What can be told of a model, and of this machine, in milliseconds: without torch, and without
reading more of a file than it takes. Where that does not tell, loading the model will.
"""

from __future__ import annotations

import json
import re
import sys
from ctypes import CDLL
from importlib.util import find_spec
from pathlib import Path

from sleb.checkpoints.gguf_file import GGUFFile
from sleb.core.errors import InputError

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""How configs name the number of blocks."""
LINUX = sys.platform == "linux"


def stated_depth(path: Path) -> int | None:
    """The number of blocks that a folder's config.json or a .gguf file states, at least; None where
    it does not say so plainly.

    Raises:
        DataError, UnsupportedModel: see :meth:`sleb.checkpoints.gguf_file.GGUFFile.depth`.
    """
    if path.suffix == ".gguf":
        return GGUFFile.depth(path)
    try:
        config = json.loads((path / "config.json").read_bytes())
    except ValueError:
        return None
    if not isinstance(config, dict) or config.get("is_encoder_decoder"):
        return None
    text = config.get("text_config", config)
    for name in DEPTHS if isinstance(text, dict) else ():
        if isinstance(found := text.get(name), int):
            return found
    return None


def check_device(device: str) -> None:
    """Refuse a device that is none, or a GPU of NVIDIA's on a machine without its driver.

    Raises:
        InputError: so it is.
    """
    if not re.fullmatch(r"auto|(cpu|cuda|mps)(:\d+)?", device):
        raise InputError(f"--device {device!r} is not a device; use cpu, cuda, cuda:1 or mps")
    if device.startswith("cuda") and not _may_have_cuda():
        raise InputError(f"--device {device}: this machine has 0 CUDA devices")


def _may_have_cuda() -> bool:
    """Whether torch was built for GPUs, and their driver is there; True where that is not known."""
    found = find_spec("torch")  # which does not import it
    about = Path(found.origin or "").with_name("version.py") if found else Path()
    if about.is_file():
        built = dict(re.findall(r"^(cuda|hip)\b[^=]*= (.*)$", about.read_text(), re.MULTILINE))
        if built and set(built.values()) == {"None"}:
            return False
        if built.get("hip", "None") != "None":
            return True
    if not LINUX:
        return True
    try:
        CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
