"""A transformers model, and texts, that a program has in memory."""

import copy
import json
from pathlib import Path

import gguf
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import sleb
from conftest import byte_tokenizer, save_tiny
from gguf_tools import readable, write_tiny  # noqa: F401 (a fixture)
from sleb.calibration.windows import Windows, load_windows
from sleb.core.errors import InputError

SMALL = {"windows": 4, "length": 16}
TEXTS = [f"letter {i}: the mail of day {i} is here, and it says so again. " * 3 for i in range(9)]
CHATS = [
    [{"role": "user", "content": f"what is {i} and {i}?"}, {"role": "assistant", "content": "two"}]
    for i in range(30)
]


@pytest.fixture
def model(tiny_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)


def with_adapter(model):
    """The model with a LoRA adapter of random weights."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    return peft.get_peft_model(copy.deepcopy(model), config)


def scores(plan):
    return [(s.block, s.mean) for r in plan.rounds for s in r.scores]


def test_a_model_that_was_not_changed_is_the_one_in_its_folder(tiny_dir, model):
    from_disk = sleb.search(tiny_dir, remove=2, device="cpu", dtype="float32", **SMALL)
    assert sleb.search(model, remove=2, **SMALL) == from_disk
    assert sleb.load(model).source.path == Path(tiny_dir)


def test_a_changed_model_is_searched_and_cut_as_it_is(tiny_dir, model, tmp_path):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(5)
    with pytest.raises(InputError, match="tokenizer"):
        sleb.load(model)
    plan = sleb.search(model, tokenizer=byte_tokenizer(), remove=2, **SMALL)
    base = sleb.search(tiny_dir, remove=2, device="cpu", dtype="float32", **SMALL)
    assert plan.model.weights_sha256 != base.model.weights_sha256
    assert scores(plan) != scores(base)
    done = sleb.prune(
        model, tmp_path / "out", tokenizer=byte_tokenizer(), remove=2, repair=False, **SMALL
    )
    lines = str(done).splitlines()
    assert lines[0] == str(tmp_path / "out")
    assert str(done.record.evaluation) in lines
    assert len(lines) < 12
    assert max(map(len, lines)) <= 240
    ids = torch.arange(20)[None]
    cut = AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32)
    with sleb.bypassed(model, done.plan.removed), torch.inference_mode():
        assert torch.equal(model(ids).logits, cut(ids).logits)


@pytest.mark.usefixtures("readable")
def test_a_model_that_transformers_unpacked_from_a_gguf_is_any_model(tmp_path):
    write_tiny(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    quantizer, kept = model.hf_quantizer, model.config.quantization_config
    plan = sleb.search(model, tokenizer=byte_tokenizer(), remove=2, **SMALL)
    assert model.hf_quantizer is quantizer
    assert model.config.quantization_config is kept
    source = sleb.load(model, tokenizer=byte_tokenizer()).source.path
    saved = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert not hasattr(saved.config, "quantization_config")
    for name, tensor in model.state_dict().items():
        assert saved.state_dict()[name].equal(tensor), name
    cut = AutoModelForCausalLM.from_pretrained(sleb.apply(plan, source, tmp_path / "out"))
    ids = torch.arange(20)[None]
    with sleb.bypassed(model, plan.removed), torch.inference_mode():
        assert torch.equal(model(ids).logits, cut(ids).logits)
    quantizer.packed_modules = {"model.layers.0.mlp.up_proj": None}  # as on a GPU with its kernels
    with pytest.raises(InputError, match=r"quantized \(gguf\).*sleb.load\(PATH\)"):
        sleb.load(model, tokenizer=byte_tokenizer())


def test_an_adapter_computes_along_and_the_plan_is_of_its_base(tiny_dir, model, tmp_path):
    adapted = with_adapter(model)
    plan = sleb.search(adapted, remove=2, **SMALL)
    merged = copy.deepcopy(adapted).merge_and_unload()
    same = sleb.search(merged, tokenizer=byte_tokenizer(), remove=2, **SMALL)
    plain = sleb.search(model, remove=2, **SMALL)
    assert [b for b, _ in scores(plan)] == [b for b, _ in scores(same)]
    means = [[mean for _, mean in scores(p)] for p in (plan, same, plain)]
    assert means[0] == pytest.approx(means[1], abs=1e-4)
    assert means[0] != pytest.approx(means[2], abs=1e-4)
    assert plan.model == plain.model
    assert sleb.apply(plan, tiny_dir, tmp_path / "out").is_dir()
    with pytest.raises(InputError, match="merge"):
        sleb.prune(adapted, tmp_path / "no", remove=2, **SMALL)


def test_a_plan_in_memory_is_applied_checked_and_bypassed(tiny_dir, tiny_plan, tmp_path):
    loaded = sleb.load(tiny_dir, device="cpu", dtype="float32")
    out = sleb.apply(tiny_plan, loaded, tmp_path / "out")
    sleb.verify(out, model=loaded, plan=tiny_plan).require()
    ids = torch.arange(20)[None]
    logits = sleb.load(out, device="cpu", dtype="float32").model(ids).logits
    with sleb.bypassed(loaded, tiny_plan):
        assert loaded.model(ids, use_cache=False).logits.equal(logits)


def test_a_plan_in_memory_is_scored_as_the_one_in_its_file(tiny_dir, tiny_plan, tmp_path):
    loaded = sleb.load(tiny_dir, device="cpu", dtype="float32")
    tiny_plan.save(tmp_path / "plan.json")
    windows, _ = load_windows(loaded.tokenizer, (), windows=4, length=16, seed=0)
    for depth in (None, 1):
        how = {"text": TEXTS, "length": 16, "depth": depth}
        known = sleb.evaluate(loaded, plan=tmp_path / "plan.json", **how)
        assert known.removed == tiny_plan.at_depth(depth)
        assert sleb.evaluate(loaded, plan=tiny_plan, **how) == known
        found = sleb.evaluate(loaded, windows, plan=tiny_plan, depth=depth)
        assert found == sleb.evaluate(loaded, windows, removed=known.removed)
    other = sleb.load(save_tiny(tmp_path / "other", seed=1), device="cpu", dtype="float32")
    for given in ({"text": TEXTS}, {"windows": windows}):
        with pytest.raises(InputError, match="plan"):
            sleb.evaluate(other, plan=tiny_plan, length=16, **given)
    fixed = sleb.repair(loaded, tiny_plan, length=16, repair_tokens=400)
    with_repair = tiny_plan.model_copy(update={"repair": fixed.record})
    with pytest.raises(InputError, match=r"path of its file.*model_copy"):
        sleb.evaluate(loaded, plan=with_repair, text=TEXTS)


def test_a_misspelt_option_is_told_as_on_the_command_line(tiny_dir):
    for call in (sleb.search, sleb.similarity, sleb.evaluate):
        with pytest.raises(InputError, match=r"no option windws \(did you mean 'windows'\?\)"):
            call(tiny_dir, windws=2)


def test_evaluating_and_repairing_take_it_too(model, tiny_plan):
    loaded = sleb.load(model)
    for given in (model, loaded):
        assert sleb.evaluate(given, 4, length=16) == sleb.evaluate(loaded, 4, length=16)
    fixed = sleb.repair(model, tiny_plan, length=16, repair_tokens=400)
    assert fixed.record.removed == tiny_plan.removed
    found = sleb.similarity(model, **SMALL)
    assert len(found.blocks) == 6


@pytest.mark.parametrize("kind", ["texts", "chats", "rows", "dataset"])
def test_texts_in_memory_are_as_those_of_a_file(model, tmp_path, kind):
    import datasets

    rows = [{"text": t} for t in TEXTS] if kind == "texts" else [{"messages": c} for c in CHATS]
    given = {
        "texts": TEXTS,
        "chats": CHATS,
        "rows": rows,
        "dataset": datasets.Dataset.from_list(rows),
    }[kind]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = byte_tokenizer()
    if kind != "texts":
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        )
    loaded = sleb.load(model, tokenizer=tokenizer)
    found, known = (sleb.evaluate(loaded, 4, length=16, text=t) for t in (given, (str(file),)))
    assert found.perplexity == known.perplexity
    plan = sleb.search(loaded, remove=1, text=given, **SMALL)
    assert plan.calibration.sources[0].spec.startswith("memory:")


def test_a_string_is_a_text_and_a_name_is_a_file(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = " ".join(TEXTS)
    Path("mail.txt").write_text(text)
    loaded = sleb.load(model)
    found = [sleb.evaluate(loaded, length=16, text=t).perplexity for t in (text, "mail.txt")]
    assert found[0] == found[1]
    for wrong, said in [
        ("male.txt", "'mail.txt'"),
        ("my male.txt", "no file"),
        (["mail.txt", "a text of words"], "one kind"),
        ([3], "no int"),
        (5, "no int"),
        ([], "text is empty"),
        ("memory:0123", "another process"),
    ]:
        with pytest.raises(InputError, match=said):
            sleb.evaluate(loaded, length=16, text=wrong)


def test_windows_may_be_a_tensor(model):
    loaded = sleb.load(model)
    known, _ = load_windows(loaded.tokenizer, (), windows=4, length=16, seed=0)
    assert sleb.evaluate(model, known.ids).perplexity == sleb.evaluate(loaded, known).perplexity
    plan = sleb.search(model, windows=known.ids, remove=2)
    assert scores(plan) == scores(sleb.search(model, remove=2, **SMALL))
    config = sleb.SearchConfig(text=("a.txt",))
    for beside in ({"text": TEXTS}, {"prompts": "mine.jsonl"}, {"config": config}):
        with pytest.raises(InputError, match=r"leave out --(text|prompts)"):
            sleb.search(model, windows=known.ids, remove=2, **beside)
    for wrong in (known.ids[0], known.ids.float(), known.ids[:0]):
        with pytest.raises(InputError, match="tensor of windows"):
            Windows.given(wrong)


def test_progress_may_be_true(model, capsys, monkeypatch):
    from sleb.core import display

    monkeypatch.setattr(display, "QUIET_S", 0.0)
    sleb.search(model, remove=1, progress=True, **SMALL)
    assert "searching" in capsys.readouterr().err
    sleb.similarity(model, progress=True, **SMALL)
    assert "similarity" in capsys.readouterr().err
    sleb.similarity(model, progress=False, **SMALL)
    assert capsys.readouterr().err == ""


def test_what_is_no_model_is_refused():
    with pytest.raises(InputError, match="Linear is no transformers model"):
        sleb.load(torch.nn.Linear(2, 2))
