"""Rows with images: what the model's own processor and forward pass make of them is scored."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import sleb
from image_tools import (
    SEEING,
    TEMPLATE,
    asked,
    data_url,
    paligemma_folder,
    picture,
    rows_file,
    saved,
    seeing_folder,
)
from plan_tools import plan_of
from sleb.calibration.prompts import read_prompts
from sleb.calibration.rows import parse_row
from sleb.calibration.split import CalibrationSplit
from sleb.calibration.windows import Windows, load_windows
from sleb.core.errors import InputError, UnsupportedModel
from sleb.models.images import images_of
from sleb.models.source import ModelSource
from sleb.repairs import repair
from sleb.selection.metrics import NLL
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.similarity import measure_similarity
from sleb.selection.sweep import Sweep
from wrappers import wrapper_folder


@pytest.fixture(scope="module", params=SEEING)
def seeing(request, tmp_path_factory):
    """A loaded model, and its processor."""
    folder, processor = seeing_folder(request.param, tmp_path_factory.mktemp(request.param) / "M")
    return sleb.load(folder, device="cpu", tokenizer=processor), processor


def read(model, spec, **options) -> Windows:
    given = {"windows": "all", "length": 16, "seed": 0, "loss_on": "answers", **options}
    return load_windows(model.tokenizer, [spec], images=model.stack.images, **given)[0]


def own_inputs(processor, row):
    """What the processor alone makes of a row."""
    given = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(row["messages"], **given)


@torch.no_grad()
def logits(model, given):
    given = {name: value for name, value in given.items() if name != "attention_mask"}
    return model(**given, use_cache=False).logits


def losses(model, windows, *sets):
    sweep = Sweep(model.stack, windows.ids, NLL, scored=windows.scored)
    return sweep.values([*map(BlockSet, sets)] or [DENSE], 0, len(windows.ids))


def two_rows(folder):
    """Rows of different length and different numbers of images."""
    first, second, third = (str(saved(folder, i, width=30 + 20 * i)) for i in range(3))
    return [asked(first, answer="A tall tree."), asked(second, third, question="Which? ")]


def test_a_window_is_what_the_processor_makes_of_the_row(seeing, tmp_path):
    model, processor = seeing
    rows = two_rows(tmp_path)
    windows = read(model, rows_file(tmp_path / "rows.jsonl", rows))
    for row, ids in zip(rows, windows.ids, strict=True):
        own = own_inputs(processor, row)
        given = model.stack.inputs(ids[None])
        n = own["input_ids"].shape[1]
        assert torch.equal(given["input_ids"][:, :n], own["input_ids"])
        assert not given["input_ids"][:, n:].any()
        others = {*own} - {"input_ids", "attention_mask"}
        assert {*given} == {"input_ids", *others}
        for name in others:
            expected = own[name]
            found = given[name][:, :n] if name.endswith("token_type_ids") else given[name]
            assert torch.equal(found, expected)


def test_only_answers_are_scored_and_never_an_image(seeing, tmp_path):
    model, _ = seeing
    turns = asked(str(saved(tmp_path, 0)), answer="A tree.")["messages"]
    turns += asked(str(saved(tmp_path, 1)), question="And?", answer="A bush.")["messages"]
    spec = rows_file(tmp_path / "rows.jsonl", [{"messages": [*turns, turns[0]]}])
    windows = read(model, spec)
    scored = windows.ids[0][windows.scored[0]]
    assert model.tokenizer.decode(scored) == "A tree.A bush."
    everything = read(model, spec, loss_on="all")
    assert torch.equal(everything.scored[0, 1:], everything.ids[0, 1:] >= 0)


def test_blocks_run_one_by_one_are_the_forward_pass_with_images(seeing, tmp_path):
    model, processor = seeing
    rows = two_rows(tmp_path)
    windows = read(model, rows_file(tmp_path / "rows.jsonl", rows))
    for removed in ((), (1, 4)):
        found = losses(model, windows, removed)[0]
        for row, loss, mask in zip(rows, found, windows.scored, strict=True):
            own = own_inputs(processor, row)
            ids, n = own["input_ids"][0], own["input_ids"].shape[1]
            with model.stack.bypassed(removed):
                wanted = logits(model.model, own)[0, :-1].log_softmax(-1)
            each = -wanted[torch.arange(n - 1), ids[1:]]
            assert each[mask[1:n]].mean().item() == pytest.approx(loss, rel=1e-4)


def test_bypassed_is_cut_is_loaded_again(seeing, tmp_path):
    """To the bit, on rows with images: losses of the search's sweep and the model's own logits."""
    model, processor = seeing
    rows = two_rows(tmp_path)
    spec = rows_file(tmp_path / "rows.jsonl", rows)
    windows, own = read(model, spec), own_inputs(processor, rows[1])
    with sleb.bypassed(model, (3, 5)):
        bypassed = logits(model.model, own)
    out = sleb.apply(plan_of(model.source.path, 3, 5), model.source.path, tmp_path / "cut")
    cut = sleb.load(out, device="cpu", tokenizer=processor)
    for parameter in cut.model.parameters():  # at aligned addresses, off which kernels round
        parameter.data = parameter.data.clone()
    again = read(cut, spec)
    assert torch.equal(again.ids, windows.ids)
    assert torch.equal(logits(cut.model, own), bypassed)
    assert (losses(cut, again) == losses(model, windows, (3, 5))).all()


def test_images_and_their_order_change_the_scores(seeing, tmp_path):
    model, _ = seeing
    a, b = (str(saved(tmp_path, i)) for i in range(2))
    rows = [asked(a, b), asked(b, a), asked(a, a)]
    windows = read(model, rows_file(tmp_path / "rows.jsonl", rows))
    assert len({model.tokenizer.decode(ids.clamp_min(0)) for ids in windows.ids}) == 1
    found = losses(model, windows)[0]
    assert len({*found}) == 3
    assert len({row.tobytes() for row in windows.ids.numpy()}) == 3
    hashes = {read(model, rows_file(tmp_path / f"{i}.jsonl", [row])).record.sha256
              for i, row in enumerate(rows)}  # fmt: skip
    assert len(hashes) == 3


def test_without_images_a_row_is_what_it_is_among_texts(seeing, tmp_path):
    model, _ = seeing
    plain = asked(answer="A tree.")
    alone = read(model, rows_file(tmp_path / "a.jsonl", [plain]), length=8, loss_on="all")
    both = [plain, asked(str(saved(tmp_path, 0)))]
    beside = read(model, rows_file(tmp_path / "b.jsonl", both))
    length = beside.lengths[0]
    whole = read(model, rows_file(tmp_path / "a.jsonl", [plain]), length=length)
    assert alone.ids.flatten().tolist() == beside.ids[0, : alone.ids.numel()].tolist()
    assert losses(model, beside)[0][0] == pytest.approx(losses(model, whole)[0][0], rel=1e-6)
    assert whole.record.sources[0].tokens >= length


def test_whatever_the_batch_scores_are_the_same(seeing, tmp_path):
    model, _ = seeing
    windows = read(model, rows_file(tmp_path / "rows.jsonl", two_rows(tmp_path)))
    found = [
        Sweep(model.stack, windows.ids, NLL, scored=windows.scored, batch=batch).values(
            [DENSE, BlockSet([1]), BlockSet([1, 3])], 0, 2
        )
        for batch in (1, 2, None)
    ]
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


def test_padding_counts_neither_for_similarity_nor_for_a_repair(seeing, tmp_path):
    model, _ = seeing
    rows = two_rows(tmp_path)
    both = read(model, rows_file(tmp_path / "rows.jsonl", rows))
    shorter = min(range(2), key=both.lengths.__getitem__)
    alone = read(model, rows_file(tmp_path / "one.jsonl", [rows[shorter]]))
    measured = [measure_similarity(model, w) for w in (both, alone)]
    assert measured[0].per_window[shorter] == pytest.approx(measured[1].per_window[0], abs=1e-6)
    fits = [
        repair(model, (4,), w, w, self_generated=False)
        for w in (both.take([shorter] * 2), alone.take([0, 0]))
    ]
    assert fits[0].tensors.keys() == fits[1].tensors.keys()
    for name, tensor in fits[0].tensors.items():
        torch.testing.assert_close(tensor, fits[1].tensors[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_verification_looks_at_an_image_too(name, tmp_path):
    """A tower that was changed shows in nothing else that is computed."""
    folder, _ = seeing_folder(name, tmp_path / "M")
    out, gate = sleb.apply(plan_of(folder, 3, 5), folder, tmp_path / "cut"), "logits-of-image"
    checks = {c.key: c for c in sleb.verify(out, model=folder).checks}
    assert checks[gate].passed
    assert checks[gate].found.values["gap"] == 0
    tensors = load_file(out / "model.safetensors")
    tower = next(t for key, t in tensors.items() if "vision" in key and t.dim() > 1)
    tower += 0.1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "SHA256SUMS").unlink(missing_ok=True)
    checks = {c.key: c for c in sleb.verify(out, model=folder).checks}
    assert checks["logits"].passed
    assert not checks[gate].passed
    (folder / "processor_config.json").unlink()
    assert gate not in {c.key for c in sleb.verify(out, model=folder).checks}


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_prune_with_images(name, tmp_path):
    """Text and images together, from the files alone: chosen, repaired, measured and proven."""
    folder, _ = seeing_folder(name, tmp_path / "M")
    images = [str(saved(tmp_path, i)) for i in range(16)]
    rows = [asked(image, answer=f"A tree, number {i}.") for i, image in enumerate(images)]
    texts = (rows_file(tmp_path / "rows.jsonl", rows), str(tmp_path / "text.txt"))
    (tmp_path / "text.txt").write_text("a block passes its input through; " * 200)
    given = {"text": texts, "windows": 8, "heldout": 4, "length": 32, "device": "cpu"}
    done = sleb.prune(folder, tmp_path / "out", remove=1, prompts=("none",), **given)
    assert done.record.verification.passed
    assert done.record.evaluation.domains.keys() == {"rows", "text"}
    again = sleb.search(folder, remove=1, prompts=("none",), **given)
    assert again.calibration == done.plan.calibration
    cut = sleb.load(tmp_path / "out", device="cpu")
    windows = read(cut, texts[0])
    assert (losses(cut, windows) > 0).all()


def test_no_row_has_two_roles(tmp_path):
    """Though rows are padded to the longest of whatever they stand among."""
    folder, _ = seeing_folder("llava", tmp_path / "M")
    model = sleb.load(folder, device="cpu")
    images = [str(saved(tmp_path, i)) for i in range(20)]
    rows = [asked(image, answer="A " + "very " * i + "old tree") for i, image in enumerate(images)]
    spec = rows_file(tmp_path / "rows.jsonl", rows)
    given = {"windows": 6, "heldout": 4, "length": 8}
    split = CalibrationSplit.of(
        model.tokenizer, [spec], seed=0, loss_on="answers", images=model.stack.images, **given
    ).with_repair(1000)
    assert split.search.record.length == split.search.ids.shape[1] > 8
    written = []

    def write(n, length, seed):
        written.append(length)
        return torch.zeros(n, length, dtype=torch.int64)

    split.with_self_generated(write).generate()
    assert written == [8]
    roles = (split.search, split.heldout, split.repair_validation)
    keys = [{int(row.min()) for row in windows.ids} for windows in roles]
    assert [len(k) for k in keys] == [len(w.ids) for w in roles]
    assert not keys[0] & keys[1]
    assert not (keys[0] | keys[1]) & keys[2]


# -- forms of rows ------------------------------------------------------------------------------


def as_bytes(path):
    return path.read_bytes()


def openai(value):
    return {"type": "image_url", "image_url": value}


TURN = {"role": "user", "content": "<image>What?"}
SAID = {"role": "assistant", "content": "A tree."}
FORMS = {
    "path": lambda p: {"messages": [{"role": "user", "content": [
        {"type": "image", "path": p.name}, {"type": "text", "text": "What?"}]}, SAID]},
    "absolute": lambda p: {"messages": [{"role": "user", "content": [
        {"type": "image", "image": str(p)}, "What?"]}, SAID]},
    "file url": lambda p: {"messages": [{"role": "user", "content": [
        {"image": p.as_uri()}, {"text": "What?"}]}, SAID]},
    "openai": lambda p: {"messages": [{"role": "user", "content": [
        openai({"url": data_url(p), "detail": "low"}), {"type": "text", "text": "What?"}]}, SAID]},
    "openai text": lambda p: {"messages": [{"role": "user", "content": [
        openai(data_url(p)), {"type": "text", "text": "What?"}]}, SAID]},
    "responses": lambda p: {"messages": [{"role": "user", "content": [
        {"type": "input_image", "image_url": data_url(p)},
        {"type": "input_text", "text": "What?"}]}, SAID]},
    "anthropic": lambda p: {"messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                     "data": data_url(p).split(",")[1]}},
        {"type": "text", "text": "What?"}]}, SAID]},
    "base64": lambda p: {"messages": [{"role": "user", "content": [
        {"type": "image", "base64": data_url(p).split(",")[1]},
        {"type": "text", "text": "What?"}]}, SAID]},
    "bytes": lambda p: {"messages": [{"role": "user", "content": [
        {"type": "image", "image": {"bytes": as_bytes(p), "path": None}},
        {"type": "text", "text": "What?"}]}, SAID]},
    "column": lambda p: {"images": [{"bytes": as_bytes(p)}], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, SAID]},
    "column of nulls": lambda p: {"images": [p.name], "messages": [
        {"role": "user", "content": [{"type": "image", "image": None, "text": None},
                                     {"type": "text", "text": "What?", "image": None}]}, SAID]},
    "llava": lambda p: {"image": p.name, "conversations": [
        {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A tree."}]},
    "llama-factory": lambda p: {"images": [p.name], "messages": [TURN, SAID]},
    "not said where": lambda p: {"images": [p.name], "messages": [
        {"role": "system", "content": "be"}, {**TURN, "content": "What?"}, SAID]},
    "question": lambda p: {"image": {"path": p.name}, "question": "What?", "answer": "A tree."},
    "prompt": lambda p: {"images": [p.name], "prompt": [TURN], "completion": [SAID]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_turns_and_image(form, tmp_path):
    path = saved(tmp_path, 0)
    row = parse_row(FORMS[form](path), "row 1", tmp_path)
    contents = [m["content"] for m in row.messages if m["role"] != "system"]
    (shown, text), said = contents
    assert (shown["type"], text, said) == ("image", {"type": "text", "text": "What?"}, "A tree.")
    assert [i if isinstance(i, bytes) else i.read_bytes() for i in row.images] == [as_bytes(path)]


def test_images_of_memory_and_of_tables_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder, _ = seeing_folder("llava", tmp_path / "M")
    model = sleb.load(folder, device="cpu")
    path = saved(tmp_path, 0)
    named = read(model, rows_file(tmp_path / "rows.jsonl", [asked(path.name)]))
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}, *asked()["messages"][1:]]
    row = {"images": [{"bytes": path.read_bytes(), "path": None}], "messages": messages}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    table = read(model, str(tmp_path / "rows.parquet"))
    assert torch.equal(table.ids, named.ids)
    found = sleb.evaluate(model, text=[asked(picture(0))], length=16, device="cpu")
    wanted = sleb.evaluate(model, text=[str(tmp_path / "rows.jsonl")], length=16, device="cpu")
    assert found.loss.value == wanted.loss.value


def test_a_template_beside_the_processor_is_the_tokenizers_too(tmp_path):
    """Where the folder has chat_template.json, as LLaVA and others have."""
    folder, processor = seeing_folder("llava", tmp_path / "M")
    (folder / "chat_template.jinja").unlink()
    template = {"chat_template": processor.chat_template}
    (folder / "chat_template.json").write_text(json.dumps(template))
    model = sleb.load(folder, device="cpu")
    windows = read(model, rows_file(tmp_path / "r.jsonl", [asked(str(saved(tmp_path, 0)))]))
    assert (windows.ids < 0).any()


# -- refusals -----------------------------------------------------------------------------------


def broken(folder):
    (folder / "broken.png").write_bytes(b"\x89PNG no image")
    return "broken.png"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (lambda d: asked("none.png"), r"turn 1: there is no image .*none\.png"),
        (lambda d: asked("https://a.b/c.png"), "on the web .*download it"),
        (lambda d: asked("data:image/png;base64,###"), "not base64"),
        (lambda d: asked(5), "no form that sleb reads"),
        (lambda d: asked(None), "refers to image 1, and the row has none"),
        (lambda d: asked(broken(d)), "line 1 has an image that is not readable"),
        (lambda d: {**asked(str(saved(d, 0))), "images": ["0.png"]}, None),
        (lambda d: asked(str(saved(d, 0)), question="<boi>?"), "1 images, and .* 2 times '<boi>'"),
        (lambda d: {"images": [str(saved(d, i)) for i in (0, 1)],
                    "messages": [TURN, SAID]}, "has 2 images and its turns refer to 1"),
        (lambda d: asked(str(saved(d, 0)), question="?" * 300), "tokens with its images, and the"),
        (lambda d: {"messages": asked(str(saved(d, 0)))["messages"][:1]}, "--loss-on all"),
    ],
)  # fmt: skip
def test_rows_that_do_not_work_are_refused_by_name(row, message, tmp_path):
    folder, _ = seeing_folder("gemma3", tmp_path / "M")
    model = sleb.load(folder, device="cpu")
    spec = rows_file(tmp_path / "rows.jsonl", [row(tmp_path)])
    if message is None:  # what parts have, a column need not have
        assert (read(model, spec).ids < 0).sum() == 4
        return
    with pytest.raises(InputError, match=message):
        read(model, spec)


def test_models_with_blocks_for_images_say_so(tmp_path):
    model = sleb.load(wrapper_folder("mllama", tmp_path / "M"), device="cpu")
    model.tokenizer.chat_template = TEMPLATE.replace("IMAGE", "<pad>")
    spec = rows_file(tmp_path / "rows.jsonl", [asked(str(saved(tmp_path, 0)))])
    with pytest.raises(UnsupportedModel, match=r"attend to images.*: leave out rows with images"):
        read(model, spec)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_a_model_that_has_seen_the_answer_is_refused(tmp_path):
    """PaliGemma attends to all of a prompt, and what its processor is given is one."""
    folder = paligemma_folder(tmp_path / "M")
    model = sleb.load(folder, device="cpu")
    windows = read(model, rows_file(tmp_path / "r.jsonl", [asked(str(saved(tmp_path, 0)))]))
    with pytest.raises(UnsupportedModel, match="has seen the end of a text"):
        losses(model, windows)


def test_models_of_text_alone_say_what_to_give(tiny_dir, tmp_path):
    spec = rows_file(tmp_path / "rows.jsonl", [asked(str(saved(tmp_path, 0)))])
    model = sleb.load(tiny_dir, device="cpu")
    model.tokenizer.chat_template = TEMPLATE.replace("IMAGE", "<pad>")
    with pytest.raises(UnsupportedModel, match=r"reads text alone: .* give a vision"):
        read(model, spec)
    file = ModelSource(ref="m.gguf", path=tiny_dir, is_gguf=True)
    with pytest.raises(UnsupportedModel, match=r"m\.gguf: a \.gguf file has the text"):
        _ = images_of(model.stack, file).processor


def test_a_processor_that_is_missing_or_needs_a_package_is_named(tmp_path, monkeypatch):
    folder, _ = seeing_folder("llava", tmp_path / "M")
    spec = rows_file(tmp_path / "rows.jsonl", [asked(str(saved(tmp_path, 0)))])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="pip install pillow"):
        read(sleb.load(folder, device="cpu"), spec)
    monkeypatch.undo()
    model = sleb.load(folder, device="cpu")
    (folder / "processor_config.json").unlink()
    with pytest.raises(InputError, match="no processor for images that loads"):
        read(model, spec)


def test_an_image_that_nothing_is_said_of_is_named(tmp_path):
    folder, _ = seeing_folder("llava", tmp_path / "M")
    model = sleb.load(folder, device="cpu")
    turn = "<image>{{ m.content[-1].text }}<image>"
    model.tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
    row = asked(*[str(saved(tmp_path, 0))] * 2)
    row["messages"].pop()
    windows = read(model, rows_file(tmp_path / "rows.jsonl", [row]), loss_on="all")
    with pytest.raises(InputError, match="ends with an image"):
        losses(model, windows)


def test_where_only_text_is_read_images_are_refused(tmp_path):
    folder, _ = seeing_folder("llava", tmp_path / "M")
    spec = rows_file(tmp_path / "rows.jsonl", [asked(str(saved(tmp_path, 0)))] * 2)
    cut = sleb.apply(plan_of(folder, 3), folder, tmp_path / "cut")
    with pytest.raises(InputError, match="here only text is read"):
        sleb.heal(cut, model=folder, out=tmp_path / "healed", text=(spec,), device="cpu")
    with pytest.raises(InputError, match="prompts are text alone"):
        read_prompts(spec)


def test_what_forgets_the_images_cannot_go_on(tmp_path):
    folder, _ = seeing_folder("llava", tmp_path / "M")
    model = sleb.load(folder, device="cpu")
    windows = read(model, rows_file(tmp_path / "r.jsonl", [asked(str(saved(tmp_path, 0)))] * 2))
    with pytest.raises(ValueError, match="one at a time"):
        model.stack.enter(windows.ids)
    with pytest.raises(ValueError, match="one at a time"):
        sleb.load(folder, device="cpu").stack.enter(windows.ids[:1])
    with pytest.raises(ValueError, match="say which tokens are"):
        Sweep(model.stack, windows.ids, NLL)
