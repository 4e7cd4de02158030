"""Exactness over architectures: a bypassed block is a deleted one, in memory and on disk."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sleb
import zoo
from sleb.checkpoints.checkpoint import INDEX, Checkpoint
from sleb.checkpoints.cut import Cut
from sleb.checkpoints.depth_fields import DERIVED_FROM, RULES
from sleb.core.errors import InputError, UnsupportedModel
from sleb.models.fixed_blocks import fixed_blocks
from sleb.models.load import load_config, strict_model
from sleb.models.pruned_config import pruned_config
from sleb.models.stack import BlockStack, decoder_config
from sleb.selection.metrics import NLL
from sleb.selection.sweep import Sweep
from sleb.surgery.apply import cut_checkpoint

every_family = pytest.mark.parametrize("family", zoo.families())


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=zoo.probe() if ids is None else ids, use_cache=False).logits


def saved(model, path: Path, shard: str = "1GB") -> Path:
    model.save_pretrained(path, max_shard_size=shard)
    return path


def cut(dense: Path, removed, path: Path) -> Path:
    path.mkdir()
    blocks = decoder_config(load_config(dense)).num_hidden_layers
    removal = Cut(blocks=blocks, removed=tuple(sorted(removed)))
    cut_checkpoint(Checkpoint.open(dense), removal, path)
    return path


def written_config(path: Path) -> dict:
    """config.json, less the dtype that transformers adds to nested parts as it reads them."""

    def read(fields: dict) -> dict:
        return {name: value for name, value in fields.items() if name != "dtype"}

    return json.loads((path / "config.json").read_text(), object_hook=read)


def reloaded(path: Path) -> nn.Module:
    """The checkpoint, strictly. Weights read from a file lie at any address, and some CPU kernels
    (grouped matrix products) round differently off a 64-byte boundary: copy them to one."""
    model = strict_model(path, torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def traces(model) -> list:
    """What an instance could be left with: attributes, and hooks on its forward pass."""
    return [
        (sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]


def greedy(model, use_cache: bool):
    prompt = zoo.probe()
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        use_cache=use_cache,
        do_sample=False,
        min_new_tokens=6,
        max_new_tokens=6,
        pad_token_id=0,
    )


def delete(model, removed) -> None:
    """Take blocks out of a live model, plainly: a shorter list, its modules renumbered, and the
    config of the cut."""
    stack, old = BlockStack(model), model.config
    kept = [block for i, block in enumerate(stack.blocks) if i not in set(removed)]
    above, _, name = stack.path.rpartition(".")
    setattr(model.get_submodule(above), name, nn.ModuleList(kept))
    numbers = ("layer_idx", "layer_id", "layer_number", "layer_index")
    for i, block in enumerate(kept):
        for module in block.modules():
            for field in numbers:
                if isinstance(getattr(module, field, None), int):
                    setattr(module, field, i)
    new = pruned_config(old, removed)
    for before, after in ((old, new), (decoder_config(old), decoder_config(new))):
        # the kernels in use are no part of a saved config; without them transformers would leave
        # out the causal mask
        inner = {k: v for k, v in vars(before).items() if k.endswith("_implementation_internal")}
        vars(after).update(inner)
        for module in model.modules():
            if getattr(module, "config", None) is before:
                module.config = after


def cache_agrees(model) -> bool:
    try:
        return torch.equal(greedy(model, True), greedy(model, False))
    except ValueError:  # xlstm's own cache refuses batches that its own code makes
        return False


@every_family
def test_bypass_is_deletion_in_memory_and_leaves_no_trace(family):
    model, config = zoo.tiny(family)
    before, fields, attributes = logits(model), config.to_dict(), traces(model)
    for removed in zoo.cuts(family):
        with sleb.bypassed(model, removed):
            bypassed = logits(model)
        assert (bypassed - before).abs().max() > 1e-3, "the probe does not see these blocks"
        live = copy.deepcopy(model)
        delete(live, removed)
        assert torch.equal(logits(live), bypassed), removed
        assert len(BlockStack(live)) == config.get_text_config().num_hidden_layers - len(removed)
    with pytest.raises(ZeroDivisionError), sleb.bypassed(model, {1}):
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)
    assert traces(model) == attributes
    assert config.to_dict() == fields, "the given config was changed"


@every_family
def test_bypass_is_the_cut_checkpoint(family, tmp_path):
    model, _ = zoo.tiny(family)
    dense = saved(model, tmp_path / "dense")
    assert torch.equal(logits(reloaded(dense)), logits(model))
    for i, removed in enumerate(zoo.cuts(family)[-2:]):
        with sleb.bypassed(model, removed):
            bypassed = logits(model)
        out = cut(dense, removed, tmp_path / str(i))
        assert torch.equal(logits(reloaded(out)), bypassed), removed
        a, b = written_config(dense), written_config(out)
        changed = {name for name in {*a, *b} if a.get(name) != b.get(name)}
        depth = {"num_hidden_layers", *type(model.config).attribute_map.values()}
        assert changed <= {*RULES, *depth, *DERIVED_FROM}


@every_family
def test_the_cut_model_generates_with_a_cache(family, tmp_path):
    model, _ = zoo.tiny(family)
    if family in zoo.CACHE_DIFFERS and not cache_agrees(model):
        pytest.skip("so it is before the cut")
    removed = zoo.cuts(family)[-2]
    out = reloaded(cut(saved(model, tmp_path / "dense"), removed, tmp_path / "out"))
    tokens = greedy(out, use_cache=False)
    assert torch.equal(greedy(out, use_cache=True), tokens)
    delete(model, removed)
    assert torch.equal(greedy(model, use_cache=True), tokens)


@every_family
def test_sweep_scores_are_those_of_full_passes(family):
    model, _ = zoo.tiny(family)
    windows = torch.randint(3, zoo.VOCAB, (3, 20), generator=torch.Generator().manual_seed(2))
    sets = [frozenset(), frozenset({1}), frozenset({2, 4})]
    scores = Sweep(BlockStack(model), windows, NLL, batch=2).scores(sets, 0, 3)
    for blocks, row in zip(sets, scores, strict=True):
        with sleb.bypassed(model, blocks):
            own = logits(model, windows)[:, :-1].flatten(0, 1)
        losses = nn.functional.cross_entropy(own, windows[:, 1:].flatten(), reduction="none")
        expected = losses.view(3, -1).double().mean(1)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)


PER_EXPERT = {"mixtral", "qwen3_moe", "deepseek_v3", "phimoe"}  # one fused tensor in memory


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss", *sorted(PER_EXPERT)])
def test_shards_hold_every_kept_tensor_byte_for_byte(family, tmp_path):
    model, _ = zoo.tiny(family)
    dense = Checkpoint.open(saved(model, tmp_path / "dense", shard="20KB"))
    assert len({info.shard for info in dense.tensors.values()}) > 2
    assert any(name not in model.state_dict() for name in dense.tensors) == (family in PER_EXPERT)
    kept = [0, 1, 3, 4, 6, 7]

    expected = {}
    for name in dense.tensors:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        if match and int(match[0]) in kept:
            new = kept.index(int(match[0]))
            expected[f"{name[: match.start()]}{new}{name[match.end() :]}"] = name
        elif not match:
            expected[name] = name
    out = Checkpoint.open(cut(dense.path, {2, 5}, tmp_path / "out"))

    assert set(out.tensors) == set(expected)
    for new, old in expected.items():
        assert out.digest(new) == dense.digest(old)
        assert (out.tensors[new].shape, out.tensors[new].dtype) == (
            dense.tensors[old].shape,
            dense.tensors[old].dtype,
        )
    index = json.loads((out.path / INDEX).read_text())
    assert index["weight_map"] == {name: info.shard for name, info in out.tensors.items()}
    assert index["metadata"]["total_size"] == out.nbytes
    assert index["metadata"]["total_parameters"] == sum(i.numel for i in out.tensors.values())
    with sleb.bypassed(model, {2, 5}):
        assert torch.equal(logits(reloaded(out.path)), logits(model))


@pytest.mark.parametrize("family", ["gemma2", "llama:tied", "gpt2", "opt", "falcon", "bloom"])
def test_tied_embeddings_stay_tied(family, tmp_path):
    model, _ = zoo.tiny(family)
    dense = saved(model, tmp_path / "dense")
    assert "lm_head.weight" not in Checkpoint.open(dense).tensors
    out = reloaded(cut(dense, {1}, tmp_path / "out"))
    assert out.get_output_embeddings().weight is out.get_input_embeddings().weight


def test_gemma_4_is_cut_in_its_decoder(tmp_path):
    """More of such models are in test_wrappers.py."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    text = zoo.tiny_config("gemma4_text").to_dict()
    torch.manual_seed(0)
    full = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=vision))
    zoo.randomize(full)
    dense = saved(full.eval(), tmp_path / "dense")
    model = reloaded(dense)
    assert BlockStack(model).path == "model.language_model.layers"
    out = cut(dense, {1, 4}, tmp_path / "out")
    with sleb.bypassed(model, {1, 4}):
        bypassed = logits(model)
    assert torch.equal(logits(reloaded(out)), bypassed)
    a, b = written_config(dense), written_config(out)
    assert (a["text_config"]["num_hidden_layers"], b["text_config"]["num_hidden_layers"]) == (8, 6)
    a.pop("text_config"), b.pop("text_config")
    assert a == b


SHARED_INDEXER = ["full", "shared", "full", "shared"] * 2
REFUSED = [
    ("gemma3n_text", {"num_kv_shared_layers": 2}, "num_kv_shared_layers.* keys and values"),
    ("gemma3n_text", {"num_kv_shared_layers": 0}, "hidden_size_per_layer_input.* every block"),
    ("gemma4_text", {"num_kv_shared_layers": 2}, "num_kv_shared_layers.* keys and values"),
    ("gemma4_text", {"hidden_size_per_layer_input": 4}, "hidden_size_per_layer_input.* every"),
    ("zamba2", {"layers_block_type": zoo.pattern("linear_attention", "hybrid")}, "is shared by"),
    ("diffllama", {}, "diffllama cannot be cut exactly: .* own index"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaled by the block's own index"),
    ("glm_moe_dsa", {"indexer_types": SHARED_INDEXER}, "earlier block's indexer"),
    ("zaya", {"num_experts_per_tok": 1}, "router state"),
    ("bert", {"is_decoder": False}, "is_decoder` is not set.* no causal language model"),
    ("rwkv", {"rescale_every": 3}, "set it to 0"),
    ("llama", {"widget_sizes": [1, 2] * 4}, "`widget_sizes` has one entry per block .8. but no"),
    ("jamba", {}, "attn_layer_period` is a period of 4: blocks .* 4 blocks in a row"),
    ("ernie4_5_moe", {"moe_layer_interval": 2}, "the MoE blocks that stay are not one after"),
]


@pytest.mark.parametrize(("family", "options", "reason"), REFUSED)
def test_no_exact_cut_is_refused(family, options, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        pruned_config(zoo.tiny_config(family, **options), {1})


@pytest.mark.parametrize(
    ("family", "removed", "reason"),
    [
        # the last block of Gemma 4 always has full attention
        ("gemma4_text", {5, 6, 7}, "does not accept config field `layer_types`"),
        ("olmo_hybrid", {0, 3, 6}, "transformers refuses .* at least one .linear_attention"),
    ],
)
def test_a_config_that_transformers_would_change_is_refused(family, removed, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        pruned_config(zoo.tiny_config(family), removed)


@pytest.mark.parametrize(("family", "blocks"), zoo.FIXED.items())
def test_a_block_at_a_special_place_must_stay(family, blocks, tmp_path):
    model, _ = zoo.tiny(family)
    dense = saved(model, tmp_path / "dense")
    with pytest.raises(UnsupportedModel, match=r"builds blocks differently .*: protect"):
        cut(dense, blocks, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("zaya", {"num_experts_per_tok": 1}),
        ("glm_moe_dsa", {"indexer_types": SHARED_INDEXER}),
        ("hy_v4", {"indexer_types": SHARED_INDEXER}),
    ],
)
def test_blocks_that_exchange_more_than_the_hidden_state_are_refused(family, options):
    model, _ = zoo.tiny(family, **options)
    sweep = Sweep(BlockStack(model), zoo.probe(), NLL)
    with pytest.raises(UnsupportedModel, match="takes more from the block before it"):
        sweep.scores([frozenset({1})], 0, 1)
    with pytest.raises(UnsupportedModel, match="takes more"), sleb.bypassed(model, {1}):
        pass


def test_the_sweep_refuses_blocks_that_talk_behind_its_back():
    """Nothing is handed on in the open: only the numbers show it."""
    model, _ = zoo.tiny("llama")
    notes = []

    def listen(module, args, output):
        notes.append(output)
        return output + (notes[-2] if len(notes) > 1 else 0)

    for block in model.model.layers:
        block.register_forward_hook(listen)
    model.register_forward_pre_hook(lambda *_: notes.clear())
    sweep = Sweep(BlockStack(model), zoo.probe(), NLL)
    with pytest.raises(UnsupportedModel, match="exchange more than the hidden state"):
        sweep.scores([frozenset({1})], 0, 1)


def test_models_without_one_stack_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5Config(vocab_size=99, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(UnsupportedModel, match=r"T5.* is an encoder-decoder; sleb cuts decoder-"):
        BlockStack(T5ForConditionalGeneration(t5))
    with pytest.raises(UnsupportedModel, match=r"is_encoder_decoder.* decoder-only"):
        pruned_config(t5, {1})
    with pytest.raises(
        UnsupportedModel, match=r"expected one list of 8 blocks .* found transf.*, "
    ):
        BlockStack(zoo.tiny("xlm")[0])
    with pytest.raises(UnsupportedModel, match=r"expected one list of 64 blocks .* found none"):
        BlockStack(zoo.tiny("hrm_text")[0])


def test_blocks_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match=r"blocks \[8, 9\] do not exist: Llama.* has 0..7"):
        with sleb.bypassed(zoo.tiny("llama")[0], {1, 8, 9}):
            pass


@pytest.mark.parametrize("family", ["gemma4_text", "olmo_hybrid"])
def test_a_block_of_a_kind_that_transformers_demands_is_no_candidate(family):
    """Whatever else goes, transformers takes the config."""
    config = zoo.tiny_config(family)
    fixed = fixed_blocks(config)
    kinds = [config.layer_types[block] for block in sorted(fixed)]
    removed = set(range(config.num_hidden_layers)) - fixed
    assert list(pruned_config(config, removed).layer_types) == kinds
    for block in fixed:
        assert config.layer_types[block] not in config.layer_types[block + 1 :], "not the last"
        assert block not in fixed_blocks(config, {block}), "it is protected as it is"


HYBRIDS = ("bamba", "granitemoehybrid", "kimi_linear", "lfm2", "nemotron_h", "qwen3_next")


@pytest.mark.parametrize("family", HYBRIDS)
def test_one_block_with_keys_and_values_has_to_stay(family):
    """transformers counts tokens in an attention block's cache, and cannot generate without."""
    config = zoo.tiny_config(family)
    attention = {i for i, kind in enumerate(config.layer_types) if kind == "full_attention"}
    with pytest.raises(UnsupportedModel, match=f"protect .*{max(attention)}"):
        pruned_config(config, attention)
    assert fixed_blocks(config) == {max(attention)}
    assert not fixed_blocks(config, {min(attention)}), "a protected one will do"
    model, _ = zoo.tiny(family)
    removed = attention - {max(attention)}
    delete(model, removed)
    assert cache_agrees(model)
