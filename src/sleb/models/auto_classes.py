"""Which of transformers' classes loads a checkpoint as what it is.

Of some configs there is a class for the text decoder alone, and one with towers for images beside
it. A checkpoint is loaded, cut and written as the class that its config names.
"""

from __future__ import annotations

import inspect
from typing import Any


def auto_class(config: Any) -> Any:
    """transformers' auto class for a model that continues text: AutoModelForCausalLM, or
    AutoModelForImageTextToText where images may go in too; None if there is neither."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    kind, named = type(config), getattr(config, "architectures", None) or []
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind]
        if (not causal or whole.__name__ in named) and _reads_text_alone(whole):
            return AutoModelForImageTextToText
    return AutoModelForCausalLM if causal else None


def _reads_text_alone(model: Any) -> bool:
    _, *inputs = inspect.signature(model.forward).parameters.values()
    free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return all(i.default is not inspect.Parameter.empty or i.kind in free for i in inputs)
