"""Names of blocks in a quantization config follow a cut, or the cut is refused."""

import json

import pytest

from sleb.checkpoints.cut import Cut
from sleb.core.errors import UnsupportedModel
from sleb.models.quantization_names import quant_method, renumber_metadata, renumber_quantization

PATH = "model.layers"
PARTS = ("", ".mlp", ".mlp.up_proj", ".mlp.down_proj", ".self_attn", ".self_attn.q_proj")
MODULES = ["lm_head", "model.embed_tokens", "model.vision.layers.1.fc"] + [
    f"{PATH}.{i}{part}" for i in range(12) for part in PARTS
]


def renumber(quantization, removed=(1, 4)):
    cut = Cut(blocks=12, removed=removed)

    def named(name):
        new = cut.rename(f"{name}.", f"{PATH}.")
        return None if new is None else new[:-1]

    return renumber_quantization(quantization, MODULES, PATH, named)


def ignored(*entries, removed=(1, 4)):
    found = renumber({"quant_method": "compressed-tensors", "ignore": list(entries)}, removed)
    return found["ignore"]


@pytest.mark.parametrize(
    ("entry", "new"),
    [
        ("lm_head", ["lm_head"]),
        ("Linear", ["Linear"]),
        ("model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj"]),
        ("model.layers.2.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        ("model.layers.11.mlp.up_proj", ["model.layers.9.mlp.up_proj"]),
        ("model.layers.4.mlp.up_proj", []),
        ("model.vision.layers.1.fc", ["model.vision.layers.1.fc"]),
        (r"re:.*layers\.5\..*", [r"re:.*layers\.3\..*"]),
        (r"re:model\.layers\.5\.mlp$", [r"re:model\.layers\.3\.mlp$"]),
        (r"re:.*layers\.4\..*", []),
        (r"re:.*layers\.\d+\.mlp\.up_proj", [r"re:.*layers\.\d+\.mlp\.up_proj"]),
        (r"re:.*down_proj$", [r"re:.*down_proj$"]),
        (r"re:.*layers\.[0]\.mlp.*", [r"re:.*layers\.[0]\.mlp.*"]),
    ],
)
def test_an_entry_follows_its_modules(entry, new):
    assert ignored("lm_head", entry)[1:] == new


@pytest.mark.parametrize(
    "entry",
    [
        r"re:.*layers\.(5|7)\..*",
        r"re:.*layers\.[5-9]\..*",
        r"re:.*\.5\.mlp.*",
        r"re:.*layers\.1.*",  # the first block, and the tenth
        "language_model.layers.5.mlp.up_proj",  # not a module of this model
        "model.layers.5.self_attn.qkv_proj",
    ],
)
def test_what_cannot_follow_is_refused(entry):
    with pytest.raises(UnsupportedModel, match="cannot be renumbered exactly for this cut"):
        ignored(entry)


def test_a_pattern_over_blocks_that_all_stay_in_place_is_kept():
    assert ignored(r"re:.*layers\.[0-2]\..*", removed=(7,)) == [r"re:.*layers\.[0-2]\..*"]


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(UnsupportedModel, match="which is no pattern"):
        ignored("re:(")


def test_groups_and_other_methods():
    found = renumber(
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": {"targets": ["model.layers.2.mlp.up_proj", "model.layers.4.mlp.up_proj"]},
                "b": {"targets": ["Linear"], "weights": {"num_bits": 4}},
            },
        }
    )
    assert found["config_groups"]["a"] == {"targets": ["model.layers.1.mlp.up_proj"]}
    assert found["config_groups"]["b"] == {"targets": ["Linear"], "weights": {"num_bits": 4}}
    with pytest.raises(UnsupportedModel, match="a group for removed blocks alone"):
        renumber({"config_groups": {"a": {"targets": ["model.layers.4.mlp.up_proj"]}}})
    torchao = {"quant_method": "torchao", "modules_to_not_convert": ["model.layers.5.mlp"]}
    assert renumber(torchao)["modules_to_not_convert"] == ["model.layers.3.mlp"]
    # transformers reads it as the beginning of a name, so it is the tenth block's too
    short = {"quant_method": "torchao", "modules_to_not_convert": ["model.layers.1"]}
    with pytest.raises(UnsupportedModel, match=r"'model.layers.1'"):
        renumber(short, removed=(0,))
    rules = {"quant_method": "gptq", "dynamic": {r"-:.*layers\.5\..*": {}, "+:.*down_proj": {}}}
    assert list(renumber(rules)["dynamic"]) == [r"-:.*layers\.3\..*", "+:.*down_proj"]
    with pytest.raises(UnsupportedModel):
        renumber({"quant_method": "gptq", "dynamic": {r".*\.5\..*": {}}})
    extra = {"quant_method": "auto-round", "extra_config": {"model.layers.5.mlp": {"bits": 8}}}
    assert renumber(extra)["extra_config"] == {"model.layers.3.mlp": {"bits": 8}}


def test_a_name_in_an_unknown_field_is_refused():
    for value in ("model.layers.5.mlp", ["model.layers.5.mlp"], {"model.layers.5.mlp": 1}):
        with pytest.raises(UnsupportedModel, match="cannot be renumbered"):
            renumber({"quant_method": "new", "somewhere": value})
    plain = {"quant_method": "new", "bits": 4, "kind": "model.layers", "sizes": [1, 2]}
    assert renumber(plain) == plain


def test_metadata_follows():
    names = ["model.layers.0.a", "model.layers.1.a", "model.layers.2.a", "lm_head"]
    metadata = {"format": "pt", "tensor_names": json.dumps(names)} | dict(
        zip(names, "0128", strict=True)
    )
    cut = Cut(blocks=3, removed=(1,))
    new = renumber_metadata(metadata, lambda name: cut.rename(name, "model.layers."))
    assert json.loads(new.pop("tensor_names")) == [
        "model.layers.0.a",
        "model.layers.1.a",
        "lm_head",
    ]
    assert new == {
        "format": "pt", "model.layers.0.a": "0", "model.layers.1.a": "2", "lm_head": "8"
    }  # fmt: skip


def test_the_method_is_told_from_a_config():
    assert quant_method({"quantization_config": {"quant_method": "fp8"}}) == "fp8"
    assert quant_method({"quantization_config": {}}) is None
    assert quant_method({}) is None
    assert quant_method({"quantization_config": {"bits": 4}}) == "an unnamed method"
