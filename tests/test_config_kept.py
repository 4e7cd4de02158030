"""A cut keeps config.json in its maker's words: only what depends on depth changes."""

import json

import pytest

import sleb
from hub_configs import BLOCKS, HUB, hub_folder
from plan_tools import plan_of
from sleb.checkpoints.depth_fields import DERIVED_FROM
from sleb.models.load import load_config
from sleb.models.pruned_config import lost_fields, pruned_config, pruned_json, write_json

# What each file says of depth, besides patterns.
DEPTH = {
    "num_hidden_layers",
    "n_layer",
    "max_window_layers",
    "layer_types",
    "no_rope_layers",
    "decoder_sparse_step",
    "mlp_only_layers",
    "first_k_dense_replace",
    "num_dense_layers",
    "full_attn_idxs",
    "moe_layer_start_index",
    "moe_layer_end_index",
    "mlp_layer_types",
    "first_last_k_dense_replace",
    "num_hash_layers",
    "moe_layers_enum",
    "sparse_attention_config",
}
CASES = [(name, removed) for name, (_, cuts) in HUB.items() for removed in cuts]


@pytest.fixture(params=CASES, ids=str)
def case(request, tmp_path):
    """What a file says, its path, the blocks to remove, and what a cut makes of it."""
    name, removed = request.param
    path = tmp_path / "config.json"
    path.write_text(json.dumps(HUB[name][0]))
    config = load_config(tmp_path)
    new = pruned_json(HUB[name][0], config, pruned_config(config, removed), removed)
    return HUB[name][0], path, removed, new


def test_nothing_changes_but_what_depends_on_depth(case):
    given, _, removed, new = case
    if "text_config" in given:
        assert {**new, "text_config": 0} == {**given, "text_config": 0}
        given, new = given["text_config"], new["text_config"]
    follow = given.get("num_nextn_predict_layers", 0)
    assert [k for k in new if k in given] == [k for k in given if k in new], "another order"
    for name, value in given.items():
        if name in DERIVED_FROM:
            assert new.get(name, value) == value
        elif name == "hybrid_override_pattern" or (
            isinstance(value, list) and len(value) in (BLOCKS, BLOCKS + follow)
        ):
            kept = [entry for i, entry in enumerate(value) if i not in removed]
            assert list(new[name]) == kept, name
        elif name not in DEPTH:
            assert name in new
            assert new[name] == value, name
    assert set(new) - set(given) <= DEPTH
    depth = "n_layer" if "n_layer" in given else "num_hidden_layers"
    assert new[depth] == BLOCKS - len(removed)


def test_transformers_reads_the_cut_from_it(case):
    _, path, removed, new = case
    config = load_config(path.parent)
    expected = pruned_config(config, removed).to_dict()
    write_json(new, path, path)
    found = load_config(path.parent).to_dict()
    ignored = {"transformers_version", "_name_or_path", *DERIVED_FROM}
    differ = {k for k in {*expected, *found} if expected.get(k) != found.get(k)}
    assert differ <= ignored


@pytest.mark.parametrize("name", ["gemma3", "cohere2", "exaone4", "qwen3_next"])
def test_a_pattern_stays_only_where_it_is_still_true(name, tmp_path):
    given, cuts = HUB[name]
    (tmp_path / "config.json").write_text(json.dumps(given))
    config = load_config(tmp_path)
    patterns = set(given) & set(DERIVED_FROM)
    for removed in cuts:
        new = pruned_json(given, config, pruned_config(config, removed), removed)
        kept = [i for i in range(BLOCKS) if i not in removed]
        assert new["layer_types"] == [config.layer_types[i] for i in kept]
        in_a_row = len(removed) == max(removed) - min(removed) + 1
        assert patterns & set(new) == (patterns if in_a_row else set())


@pytest.mark.parametrize("name", ["llama", "granitemoehybrid", "gemma3"])
def test_a_cut_is_verified_and_taken_back_to_the_byte(name, tmp_path):
    source = hub_folder(name, tmp_path / "source")
    plan = plan_of(source, 4, 1)
    out = sleb.apply(plan, source, tmp_path / "out")
    found = sleb.verify(out, model=source, plan=plan)
    found.require()
    assert "config-kept" in [check.key for check in found.checks]
    text = (out / "config.json").read_text()
    assert text.startswith('{\n "architectures"')  # in the form of the original's
    assert text.endswith("}\n")
    sleb.restore(out, tmp_path / "back")
    sleb.restore(out, tmp_path / "less", depth=1)
    sleb.apply(plan, source, tmp_path / "one", depth=1)
    configs = {p: (tmp_path / p / "config.json").read_bytes() for p in ("back", "less", "one")}
    assert configs["back"] == (source / "config.json").read_bytes()
    assert configs["less"] == configs["one"]

    fields = json.loads(text)  # as transformers 5 would have it
    theta = {"rope_theta": fields.pop("rope_theta"), "rope_type": "default"}
    (out / "SHA256SUMS").unlink()
    (out / "config.json").write_text(json.dumps({**fields, "rope_parameters": theta}))
    checks = sleb.verify(out, model=source, plan=plan).checks
    failed = {check.key: str(check.found) for check in checks if not check.passed}
    assert "rope_theta" in failed["config-kept"]


def test_what_is_lost_is_named_and_what_is_added_is_not():
    wanted = {"a": 1, "text_config": {"b": 2, "c": [3]}, "transformers_version": "4"}
    assert list(lost_fields(wanted, {**wanted, "d": 4, "transformers_version": "5"})) == []
    found = {"text_config": {"b": 2.5, "c": [3]}, "sliding_window_pattern": 6}
    assert list(lost_fields(wanted, found)) == ["a", "text_config.b", "sliding_window_pattern"]
    assert list(lost_fields(wanted, found, {"a", "b"})) == ["sliding_window_pattern"]


@pytest.mark.parametrize("text", ['{"a": 1e-5,\n "b": "\\u00e9"}', '{\n\t"a": 1,\n\t"b": "é"\n}\n'])
def test_a_file_that_says_the_same_keeps_its_bytes(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    write_json(json.loads(text), path, tmp_path / "same.json")
    assert (tmp_path / "same.json").read_bytes() == path.read_bytes()
    write_json({**json.loads(text), "a": 2}, path, tmp_path / "new.json")
    new = (tmp_path / "new.json").read_text(encoding="utf-8")
    assert json.loads(new) == {"a": 2, "b": "é"}
    assert new.isascii() == text.isascii()
    assert ("\n\t" in new, new[-1]) == ("\n\t" in text, text[-1])
