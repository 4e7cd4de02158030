#!/usr/bin/env bash
# Mistral 3 of transformers 5 cannot take a single image that is one token. With patch_size 14 and spatial_merge_size 2
# a token is 28 x 28 pixels, to which the image processor enlarges whatever is smaller. `get_image_features` squeezes
# axis 0 of the projected features, which counts tokens there, and then splits along it: with one token it is gone.
#
# Seen with transformers 5.17.0 and torch 2.13.0, tiny random weights, blank images through PixtralImageProcessorPil:
#   20 x 16, made 28 x 28     RuntimeError: split_with_sizes expects split_sizes to sum exactly to 16 (input tensor's
#                             size at dimension 0), but got split_sizes=[1]      (16 is hidden_size of the text model)
#   40 x 16, made 56 x 28     features of 2 tokens
#   20 x 16 twice             features of 1 token each
# So who sends a single image makes one of its sides longer than 28 pixels first.
#
# Needs Python 3.11 or newer; several GB where pip takes a CUDA build of torch. Ends with 1 if any of this has changed.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy pillow==13.0.0 transformers==5.17.0
cat > ask.py <<'P'
import traceback
import torch
from PIL import Image
from transformers import (
    Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralImageProcessorPil, PixtralVisionConfig)

torch.manual_seed(0)
model = Mistral3ForConditionalGeneration(Mistral3Config(
    text_config=MistralConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                              num_attention_heads=2, num_key_value_heads=2, head_dim=8),
    vision_config=PixtralVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=1,
                                      num_attention_heads=2, image_size=112, patch_size=14),
    spatial_merge_size=2, image_token_index=10)).eval()
processor = PixtralImageProcessorPil(patch_size=14 * 2)   # as the processor of Mistral 3 sets it: patch times merge

def features(*sizes):
    """Shapes of the features of blank images of these sizes (width, height), by image."""
    inputs = processor([Image.new("RGB", size) for size in sizes], return_tensors="pt")
    made = [(w, h) for h, w in inputs["image_sizes"].tolist()]
    with torch.no_grad():
        found = [tuple(f.shape) for f in model.get_image_features(**inputs).pooler_output]
    print(f"{sizes}, made {made}: features {found}")
    return found

assert features((40, 16)) == [(2, 16)], "two tokens in a row"
assert features((16, 40)) == [(2, 16)], "two tokens in a column"
assert features((20, 16), (20, 16)) == [(1, 16), (1, 16)], "two images of one token"
try:
    features((20, 16))
except RuntimeError as error:
    place = [frame for frame in traceback.extract_tb(error.__traceback__) if "mistral3" in frame.filename][-1]
    print(f"one image of one token: {type(error).__name__}: {error}\n  {place.name}: {place.line}")
    assert place.name == "get_image_features" and "split_sizes=[1]" in str(error), "the behaviour has changed"
else:
    raise SystemExit("one image of one token works now")
P
env/bin/python ask.py
