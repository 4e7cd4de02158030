"""The gates pass a right checkpoint and name what is wrong with any other."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import sleb
from cli_tools import tree
from conftest import byte_tokenizer, save_tiny
from plan_tools import edit_config, plan_of
from sleb.core.errors import InputError
from sleb.surgery import verification
from verification_tools import (
    BLOCKS,
    CONFIG,
    GENERATION,
    KEPT,
    LOGITS,
    ORDER,
    RELOAD,
    WEIGHTS,
    edit_tensors,
    failed,
    measured,
    without_sums,
)


@pytest.fixture(scope="module")
def plan(tiny_dir):
    return plan_of(tiny_dir, 3, 1)


@pytest.fixture
def out(tiny_dir, plan, tmp_path) -> Path:
    """The right checkpoint, which a test may spoil; without checksums, which would tell at once."""
    return without_sums(sleb.apply(plan, tiny_dir, tmp_path / "out"))


def test_a_right_checkpoint_passes_every_gate(tiny_dir, plan, out, tmp_path):
    before = tree(tmp_path)
    found = sleb.verify(out, model=tiny_dir, plan=plan)
    assert failed(found) == []
    assert [check.name for check in found.checks] == ORDER
    assert measured(found, LOGITS) == "maximum difference 0"
    assert measured(found, BLOCKS) == "4"
    assert measured(found, WEIGHTS) == "39 tensors are equal"
    assert found.removed == (1, 3)
    assert tree(tmp_path) == before


def test_another_block_is_missing_than_the_plan_says(tiny_dir, plan, tmp_path):
    wrong = sleb.apply(plan_of(tiny_dir, 3, 2), tiny_dir, tmp_path / "wrong")
    assert failed(sleb.verify(wrong, model=tiny_dir, plan=plan)) == [WEIGHTS, LOGITS]


def test_more_or_fewer_blocks_are_missing(tiny_dir, plan, out):
    deeper = plan_of(tiny_dir, 3, 1, 2)
    found = sleb.verify(out, model=tiny_dir, plan=deeper)
    assert failed(found) == [BLOCKS, WEIGHTS]
    assert measured(found, BLOCKS) == "4"
    assert failed(sleb.verify(out, model=tiny_dir, plan=deeper, depth=2)) == []
    with pytest.raises(InputError, match=r"--depth 4 is outside this plan's 1\.\.3"):
        sleb.verify(out, model=tiny_dir, plan=deeper, depth=4)


def test_two_blocks_are_swapped(tiny_dir, plan, out):
    def swap(tensors):
        for name in [name for name in tensors if ".layers.1." in name]:
            other = name.replace(".1.", ".2.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    edit_tensors(out, swap)
    found = sleb.verify(out, model=tiny_dir, plan=plan)
    assert failed(found) == [WEIGHTS, LOGITS]
    assert measured(found, WEIGHTS).startswith(
        "14 of 39 tensors differ, for example model.layers.1"
    )


@pytest.mark.parametrize("row", ["read", "not read"])
def test_one_weight_is_off_by_the_smallest_step(tiny_dir, plan, out, row):
    """Also where the probe does not look: rows of the embedding that it never reads."""
    probe = set(verification.probe_ids(sleb.load(tiny_dir).model.config)[0].tolist())
    at = min(probe) if row == "read" else min(set(range(259)) - probe)

    def nudge(tensors):
        embedding = tensors["model.embed_tokens.weight"]
        embedding[at, 0] = np.nextafter(embedding[at, 0], np.float32(9))

    edit_tensors(out, nudge)
    found = sleb.verify(out, model=tiny_dir, plan=plan)
    assert WEIGHTS in failed(found)
    assert (LOGITS in failed(found)) == (row == "read")
    assert measured(found, WEIGHTS) == (
        "1 of 39 tensors differ, for example model.embed_tokens.weight"
    )


def test_a_tensor_is_missing_or_extra_or_of_another_shape(tiny_dir, plan, out):
    name = "model.layers.2.mlp.up_proj.weight"
    for change, said in [
        (lambda t: t.pop(name), f"1 missing keys on loading, for example {name}"),
        (
            lambda t: t.update({name: t["lm_head.weight"], "x.weight": t["lm_head.weight"]}),
            "1 unexpected keys on loading, for example x.weight",
        ),
        (lambda t: (t.pop("x.weight"), None), "1 mismatched keys on loading, for example " + name),
    ]:
        edit_tensors(out, change)
        found = sleb.verify(out, model=tiny_dir, plan=plan)
        assert failed(found) == [RELOAD]
        assert said in measured(found, RELOAD)


def test_blocks_are_not_renumbered(tiny_dir, plan, out):
    def spread(tensors):
        for name in [name for name in tensors if ".layers.3." in name]:
            tensors[name.replace(".3.", ".5.")] = tensors.pop(name)

    edit_tensors(out, spread)
    found = sleb.verify(out, model=tiny_dir, plan=plan)
    assert failed(found) == [RELOAD]


@pytest.mark.parametrize("count", [3, 5])
def test_the_config_has_another_number_of_blocks(tiny_dir, plan, out, count):
    edit_config(out, num_hidden_layers=count)
    assert failed(sleb.verify(out, model=tiny_dir, plan=plan)) == [RELOAD]


def test_a_setting_that_changes_the_computation(tiny_dir, plan, out):
    edit_config(out, rms_norm_eps=1e-3)
    assert failed(sleb.verify(out, model=tiny_dir, plan=plan)) == [KEPT, LOGITS]


def test_a_damaged_checkpoint_fails_and_a_missing_one_is_a_mistake(tiny_dir, plan, out, tmp_path):
    shard = out / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    found = sleb.verify(out, model=tiny_dir, plan=plan)
    assert failed(found) == [RELOAD]
    assert "model.safetensors is corrupt or truncated" in measured(found, RELOAD)
    edit_config(out, num_hidden_layers="four")
    found = sleb.verify(out, model=tiny_dir, plan=plan)
    assert failed(found) == [CONFIG, RELOAD]
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"has no config\.json|no checkpoint folder at"):
            sleb.verify(place, model=tiny_dir, plan=plan)


def windowed(kind: str, folder: Path) -> Path:
    """A tiny model whose blocks attend alternately, or after the second, to 8 tokens only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {
        "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
        "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    }[kind]
    config = AutoConfig.for_model(
        kind,
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **special,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_a_stale_list_of_layer_types(tmp_path, kind):
    """The mistake of tools that only change num_hidden_layers: it loads, and computes otherwise."""
    source = windowed(kind, tmp_path / "source")
    types = json.loads((source / "config.json").read_text())["layer_types"]
    plan = plan_of(source, 0)
    out = without_sums(sleb.apply(plan, source, tmp_path / "out"))
    assert json.loads((out / "config.json").read_text())["layer_types"] == types[1:]
    assert failed(sleb.verify(out, model=source, plan=plan)) == []
    edit_config(out, layer_types=types[:5])
    found = sleb.verify(out, model=source, plan=plan)
    assert failed(found) == [CONFIG, LOGITS]
    assert measured(found, CONFIG).startswith("layer_types = ['")
    changed = json.loads((out / "config.json").read_text())
    del changed["layer_types"]  # now the library makes up the list, from the number of blocks
    (out / "config.json").write_text(json.dumps({**changed, "max_window_layers": 2}))
    assert LOGITS in failed(sleb.verify(out, model=source, plan=plan))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_a_checkpoint_that_was_pruned_elsewhere_passes(tmp_path, kind):
    """Pruned in memory by plain transformers code, and saved in another layout of shards."""
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    save_tiny(source) if kind == "llama" else windowed(kind, source)
    model = AutoModelForCausalLM.from_pretrained(source)
    kept = [0, 2, 4, 5]
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    for i, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = i
    model.config.num_hidden_layers = 4
    if kind != "llama":
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    if kind == "qwen2":
        model.config.max_window_layers = 1
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    found = sleb.verify(tmp_path / "theirs", model=source, plan=plan_of(source, 3, 1))
    assert failed(found) == []


def test_the_probe_is_longer_than_a_window_and_fits_the_model(tmp_path):
    from transformers import MistralConfig

    def length(window, positions):
        config = MistralConfig(sliding_window=window, max_position_embeddings=positions)
        first, second = (verification.probe_ids(config) for _ in range(2))
        assert torch.equal(first, second)
        return first.shape[1]

    assert [length(8, 4096), length(None, 4096), length(100, 4096)] == [64, 64, 116]
    assert length(4096, 131072) == 1040
    assert length(None, 40) == 24


def test_the_models_sampling_settings_do_not_matter(tiny_dir, plan, out):
    settings = {"do_sample": True, "temperature": 1.9, "top_k": 3, "max_new_tokens": 2}
    (out / "generation_config.json").write_text(json.dumps(settings))
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(sleb.verify(out, model=tiny_dir, plan=plan))
    assert failed(found[0]) == []
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("pruned", "original", "passed", "said"),
    [
        (False, True, False, "tokens differ"),
        (False, False, True, "the original"),
        (RuntimeError("bad"), RuntimeError("bad before"), True, "the original"),
        (RuntimeError("bad"), False, False, "RuntimeError"),
        (True, None, True, "16 equal tokens"),
        (RuntimeError("bad\nmask"), True, False, r"generate() fails: RuntimeError: bad mask"),
    ],
)
def test_generation_is_compared_with_and_without_cache(
    tiny_dir, plan, out, monkeypatch, pruned, original, passed, said
):
    answers = [pruned, original]

    def agrees(model, ids, tokens):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(verification, "_cache_agrees", agrees)
    found = sleb.verify(out, model=tiny_dir, plan=plan)
    assert failed(found) == ([] if passed else [GENERATION])
    assert said in measured(found, GENERATION)


def test_a_cache_that_goes_wrong_is_noticed(tiny_dir):
    """Without the stand-in: two blocks that write to one place of the cache."""
    loaded = sleb.load(tiny_dir, dtype="float32", device="cpu")
    ids = verification.probe_ids(loaded.model.config)
    assert verification._cache_agrees(loaded.model, ids, 16)
    loaded.stack.blocks[3].self_attn.layer_idx = 2
    assert not verification._cache_agrees(loaded.model, ids, 16)


def test_in_float32_on_the_cpu_nothing_but_zero_will_do():
    logits = torch.linspace(-3, 3, 12).reshape(1, 3, 4)
    other = logits.clone()
    other[0, 1, 1] = torch.nextafter(other[0, 1, 1], torch.tensor(9.0))

    def passes(found, dtype=torch.float32, exact=True):
        return verification._logit_check(found, logits, dtype, exact).passed

    assert passes(logits)
    assert not passes(other)
    assert passes(other, exact=False)
    assert not passes(logits + 4e-4, exact=False)
    assert passes(logits + 0.05, torch.bfloat16, False)
    assert not passes(logits + 0.07, torch.bfloat16, False)
    assert not passes(logits[:, :2])
    for dtype in (torch.float32, torch.bfloat16):
        assert not passes(logits * float("nan"), dtype, False)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_a_right_checkpoint_passes_in_every_dtype(tiny_dir, plan, out, dtype):
    assert failed(sleb.verify(out, model=tiny_dir, plan=plan, dtype=dtype)) == []
    with pytest.raises(InputError, match="unknown dtype 'int3'"):
        sleb.verify(out, model=tiny_dir, plan=plan, dtype="int3")


def test_a_plan_for_another_model_is_refused(tiny_dir, plan, out, tmp_path):
    other = save_tiny(tmp_path / "other", seed=7)
    with pytest.raises(InputError, match=r"another model: weights_sha256 is .* in .*other; sear"):
        sleb.verify(out, model=other, plan=plan)
    changed = Path(shutil.copytree(tiny_dir, tmp_path / "changed"))
    edit_config(changed, rope_theta=5.0)
    with pytest.raises(InputError, match="another model: config_sha256 is"):
        sleb.verify(out, model=changed, plan=plan)
