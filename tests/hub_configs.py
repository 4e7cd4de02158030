"""config.json as makers publish them: in their own words, not as transformers 5 would write them.

``HUB`` has, by a name, what a file says, and cuts to try; ``MODELS`` in the form of which published
model it is written, with sizes shrunk and as its first blocks, or some where each kind occurs;
``source`` is where the model's own file was read, and without it none was. Each file has words that
transformers 5 renames or drops (``rope_theta``, ``torch_dtype``, ``rotary_pct``, patterns in place
of lists, kinds of layers by older names). In data/hub_configs.json a file is its ``own`` words
beside the ``common`` ones (null takes one of these away), or it is there as a ``whole``.
"""

import json
from pathlib import Path
from typing import Any

import torch

from conftest import byte_tokenizer

BLOCKS = 8
FILES = json.loads((Path(__file__).parent / "data/hub_configs.json").read_text(encoding="utf-8"))


def _file(whole: Any = None, own: Any = None) -> dict[str, Any]:
    first = {"architectures": None, "model_type": None}  # their place
    return whole or {
        name: value
        for name, value in {**first, **FILES["common"], **own}.items()
        if value is not None or name not in FILES["common"]
    }


HUB: dict[str, tuple[dict[str, Any], list[tuple[int, ...]]]] = {
    name: (
        _file(row.get("whole"), row.get("own")),
        [tuple(cut) for cut in row.get("cuts", [[1, 4]])],
    )
    for name, row in FILES["models"].items()
}
MODELS: dict[str, str] = {n: row["of"] for n, row in FILES["models"].items() if "of" in row}


def hub_folder(name: str, folder: Path) -> Path:
    """A random model under the file ``name`` of ``HUB``, with a tokenizer."""
    import transformers

    folder.mkdir(parents=True)
    text = json.dumps(HUB[name][0], indent=1) + "\n"
    (folder / "config.json").write_text(text)
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModelForCausalLM
    made = getattr(transformers, config.architectures[0]) if config.sub_configs else auto
    model = (made._from_config if config.sub_configs else auto.from_config)(config).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(text)
    return folder
