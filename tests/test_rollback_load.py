"""A model cut while it is loaded is the model that apply would have written."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import sleb
import zoo
from cli_tools import tree
from conftest import byte_tokenizer
from plan_tools import edit_config
from rollback_tools import plan_of, repaired_cut, small
from sleb.core.errors import DataError, InputError, UnsupportedModel

CPU = {"dtype": "float32", "device": "cpu"}


def logits(loaded) -> torch.Tensor:
    """Logits on the probe. Weights lie at any address in a file, and some CPU kernels round
    differently off a 64-byte boundary: they are moved to one first."""
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        return loaded.model(input_ids=zoo.probe(), use_cache=False).logits


def tokenized(model, path):
    model.save_pretrained(path, max_shard_size="40KB")
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("family", zoo.families())
def test_loading_with_a_plan_is_loading_the_cut(family, tmp_path):
    model, _ = zoo.tiny(family)
    source = tokenized(model, tmp_path / "source")
    plan = plan_of(source, *sorted(zoo.cuts(family)[0 if family == "jamba" else 2]))
    out = sleb.apply(plan, source, tmp_path / "out", keep=False)
    before = tree(source)
    cut, live = sleb.load(out, **CPU), sleb.load(source, plan=plan, **CPU)
    assert torch.equal(logits(cut), logits(live))
    assert type(cut.model) is type(live.model)
    assert (len(live.stack), live.removed) == (len(cut.stack), plan.removed)
    names = [dict(m.model.state_dict()) for m in (cut, live)]
    assert names[0].keys() == names[1].keys()
    a, b = (m.model.config.to_dict() for m in (cut, live))
    a.pop("_name_or_path"), b.pop("_name_or_path")
    assert a == b
    with torch.no_grad():
        for parameter in live.model.parameters():
            parameter.zero_()
    assert tree(source) == before


@pytest.fixture
def source(tmp_path):
    return small(tmp_path / "source", shard="60KB")


def test_depth_is_a_matter_of_configuration(source, tmp_path):
    plan = plan_of(source, 4, 1, 3)
    plan.save(tmp_path / "plan.json")
    dense = sleb.load(source, **CPU)
    for depth in (1, 2, 3, None):
        live = sleb.load(source, plan=tmp_path / "plan.json", depth=depth, **CPU)
        with sleb.bypassed(dense, plan.at_depth(depth)):
            assert torch.equal(logits(live), logits(dense))
        assert len(live.stack) == 6 - (depth or 3)


def test_it_generates_as_the_cut_does(source, tmp_path):
    plan = plan_of(source, 4, 1)
    out = sleb.apply(plan, source, tmp_path / "out")
    made = []
    for loaded in (sleb.load(out, **CPU), sleb.load(source, plan=plan, **CPU)):
        logits(loaded)
        ids = zoo.probe()
        mask = torch.ones_like(ids)
        made.append(loaded.model.generate(ids, attention_mask=mask, max_new_tokens=8))
        made.append(loaded.model.generation_config.to_dict())
    assert torch.equal(made[0], made[2])
    assert made[1] == made[3]


def test_a_repair_comes_from_a_checkpoint_that_has_it(source, tmp_path):
    plan, _ = repaired_cut(source, tmp_path / "out", 3, 4)
    cut = sleb.load(tmp_path / "out", **CPU)
    live = sleb.load(source, plan=plan, repaired=tmp_path / "out", **CPU)
    assert torch.equal(logits(live), logits(cut))
    with pytest.raises(InputError, match=r"only the hashes of .*give repaired=FOLDER"):
        sleb.load(source, plan=plan, **CPU)
    plain = sleb.apply(plan_of(source, 3, 4), source, tmp_path / "plain")
    with pytest.raises(InputError, match=r"plain: model\.layers\.\d.* is not the repaired"):
        sleb.load(source, plan=plan, repaired=plain, **CPU)
    for repaired in (None, tmp_path / "out"):  # a repair belongs to the full cut
        less = sleb.load(source, plan=plan, depth=1, repaired=repaired, **CPU)
        own = tmp_path / f"own{repaired is None}"
        sleb.apply(plan, source, own, depth=1, repair=False)
        assert torch.equal(logits(less), logits(sleb.load(own, **CPU)))


def test_a_plan_of_another_model_is_refused(source, tmp_path):
    other = small(tmp_path / "other", seed=1, shard="60KB")
    plan = plan_of(source, 4, 1)
    with pytest.raises(InputError, match="another model"):
        sleb.load(other, plan=plan, **CPU)
    unchecked = sleb.load(other, plan=plan, check=False, **CPU)  # its form is still compared
    assert len(unchecked.stack) == 4
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace("1e-06", "1e-05"))
    with pytest.raises(InputError, match="config_sha256"):
        sleb.load(other, plan=plan, check=False, **CPU)


def test_what_cannot_be_is_refused(source):
    plan = plan_of(source, 4, 1)
    for options, said in [
        ({"plan": plan, "depth": 3}, "--depth 3"),
        ({"depth": 1}, "give plan too"),
        ({"plan": plan, "stream": True}, "not streamed"),
        ({"plan": source / "nothing.json"}, "no plan at"),
    ]:
        with pytest.raises(InputError, match=said):
            sleb.load(source, **options, **CPU)
    shard = sorted(source.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    name = next(n for n in tensors if ".mlp." in n)
    tensors[name] = tensors[name][:, :3].contiguous()
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(DataError, match="1 mismatched"):
        sleb.load(source, plan=plan_of(source, 4), **CPU)
    edit_config(source, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModel, match="quantized"):
        sleb.load(source, plan=plan_of(source, 4), **CPU)
