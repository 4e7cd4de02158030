"""The gates pass a right checkpoint and name what is wrong with any other, also where models do not
fit in memory and blocks are read as they run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

import sleb
from cli_tools import tree
from conftest import byte_tokenizer, save_tiny
from plan_tools import edit_config, plan_of
from sleb.core.errors import InputError, VerificationFailed
from sleb.models.stack import BlockStack
from sleb.surgery import gates, verification
from sleb.views.locale import Locale
from zoo import tiny

CONFIG = "depth-fields"
RELOAD = "clean-reload"
BLOCKS = "blocks"
WEIGHTS = "weights"
LOGITS = "logits"
GENERATION = "generation"
KEPT = "config-kept"
ORDER = [KEPT, CONFIG, RELOAD, BLOCKS, WEIGHTS, LOGITS, GENERATION]
UP = "model.layers.2.mlp.up_proj.weight"
in_memory_and_streamed = pytest.mark.parametrize("stream", [False, True])


def failed(found: verification.Verification) -> list[str]:
    """Keys of the gates that failed; and that the error names the first of them, and a reader is
    told of all in words."""
    for check in found.checks:
        for words in (Locale("en"), Locale("ja")):
            assert words.said("found", check.found, check.key) != str(check.found)
            assert words.said("must", check.found, check.key) != str(check.found)
    names = [check.key for check in found.checks if not check.passed]
    assert found.passed == (not names)
    if names:
        with pytest.raises(VerificationFailed, match=rf"'{names[0]}' \(.*\); do not ship"):
            found.require()
    else:
        found.require()
    return names


def measured(found: verification.Verification, name: str) -> str:
    return str(next(check.found for check in found.checks if check.key == name))


def without_sums(folder: Path) -> Path:
    (folder / "SHA256SUMS").unlink()
    return folder


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.copy() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def plan(tiny_dir):
    return plan_of(tiny_dir, 3, 1)


@pytest.fixture(scope="module")
def right(tiny_dir, plan, tmp_path_factory) -> Path:
    """The right checkpoint without checksums, which would tell of any change at once."""
    return without_sums(sleb.apply(plan, tiny_dir, tmp_path_factory.mktemp("right") / "out"))


@pytest.fixture
def out(right, tmp_path) -> Path:
    """A copy of it, which a test may spoil."""
    return shutil.copytree(right, tmp_path / "out")


@pytest.fixture
def streams(monkeypatch):
    """For each model that was run, whether its blocks were in memory."""
    seen = []
    real = verification.probe_logits

    def logits(model, config):
        seen.append(BlockStack(model).streamed)
        return real(model, config)

    monkeypatch.setattr(verification, "probe_logits", logits)
    return seen


def test_a_right_checkpoint_passes_every_gate(tiny_dir, plan, out, tmp_path):
    before = tree(tmp_path)
    found = sleb.verify(out, model=tiny_dir, plan=plan)
    assert failed(found) == []
    assert [check.key for check in found.checks] == ORDER
    assert measured(found, LOGITS) == "gap: gap 0, limit 0"
    assert measured(found, BLOCKS).startswith("counted: blocks 4")
    assert measured(found, WEIGHTS) == "equal: tensors 39"
    assert found.removed == (1, 3)
    assert tree(tmp_path) == before


def swapped(tensors):
    for name in [name for name in tensors if ".layers.1." in name]:
        other = name.replace(".1.", ".2.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def spread(tensors):
    for name in [name for name in tensors if ".layers.3." in name]:
        tensors[name.replace(".3.", ".5.")] = tensors.pop(name)


def nudged(tensors):
    tensors[UP][0, 0] += 1


SPOILT = {  # what is done to tensors, or fields of the config; gates that fail; what one says
    "two blocks are swapped": (swapped, [WEIGHTS, LOGITS], "wrong 14, tensors 39"),
    "one weight is off": (nudged, [WEIGHTS, LOGITS], f"wrong 1, tensors 39, example {UP}"),
    "a tensor is missing": (lambda t: t.pop(UP), [RELOAD], f"1 missing keys .* {UP}"),
    "a tensor is extra": (lambda t: t.update(x=t[UP]), [RELOAD], "1 unexpected keys .* x"),
    "a tensor has another shape": (
        lambda t: t.update({UP: t["lm_head.weight"]}), [RELOAD], f"1 mismatched keys .* {UP}"),
    "blocks are not renumbered": (spread, [RELOAD], "keys"),
    "too few blocks": ({"num_hidden_layers": 3}, [RELOAD], "unexpected"),
    "too many blocks": ({"num_hidden_layers": 5}, [RELOAD], "missing"),
    "no number of blocks": ({"num_hidden_layers": "four"}, [CONFIG, RELOAD], "num_hidden_layers"),
    "another computation": ({"rms_norm_eps": 1e-3}, [KEPT, LOGITS], "rms_norm_eps"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", SPOILT)
def test_what_is_wrong_is_named(tiny_dir, plan, out, how, stream):
    change, wrong, said = SPOILT[how]
    edit_config(out, **change) if isinstance(change, dict) else edit_tensors(out, change)
    found = sleb.verify(out, model=tiny_dir, plan=plan, stream=stream)
    assert failed(found) == wrong
    assert re.search(said, measured(found, wrong[0]))


@in_memory_and_streamed
def test_another_block_is_missing_than_the_plan_says(tiny_dir, plan, tmp_path, stream):
    wrong = sleb.apply(plan_of(tiny_dir, 3, 2), tiny_dir, tmp_path / "wrong")
    assert failed(sleb.verify(wrong, model=tiny_dir, plan=plan, stream=stream)) == [WEIGHTS, LOGITS]


def test_more_or_fewer_blocks_are_missing(tiny_dir, plan, out):
    deeper = plan_of(tiny_dir, 3, 1, 2)
    found = sleb.verify(out, model=tiny_dir, plan=deeper)
    assert failed(found) == [BLOCKS, WEIGHTS]
    assert measured(found, BLOCKS).startswith("counted: blocks 4")
    assert failed(sleb.verify(out, model=tiny_dir, plan=deeper, depth=2)) == []
    with pytest.raises(InputError, match=r"--depth 4 is outside this plan's 1\.\.3"):
        sleb.verify(out, model=tiny_dir, plan=deeper, depth=4)


def test_a_weight_that_the_probe_does_not_read_is_seen(tiny_dir, plan, out):
    """A row of the embedding, of a token that is not in the probe."""
    probe = set(verification.probe_ids(sleb.load(tiny_dir).model.config)[0].tolist())
    at = min(set(range(259)) - probe)
    edit_tensors(out, lambda t: t["model.embed_tokens.weight"][at].__iadd__(1))
    assert failed(sleb.verify(out, model=tiny_dir, plan=plan)) == [WEIGHTS]


def test_a_damaged_checkpoint_fails_and_a_missing_one_is_a_mistake(tiny_dir, plan, out, tmp_path):
    shard = out / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    found = sleb.verify(out, model=tiny_dir, plan=plan)
    assert failed(found) == [RELOAD]
    assert "model.safetensors is corrupt or truncated" in measured(found, RELOAD)
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"no config\.json|no checkpoint folder"):
            sleb.verify(place, model=tiny_dir, plan=plan)


def windowed(kind: str, folder: Path) -> Path:
    """A tiny model whose blocks attend alternately, or after the second, to 8 tokens only."""
    options = {"max_window_layers": 2} if kind == "qwen2" else {}
    options |= {"num_hidden_layers": 6, "layer_types": None, "vocab_size": 259}
    tiny(kind, **options)[0].save_pretrained(folder)
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
    assert measured(found, CONFIG).startswith("differ: field layer_types")
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
        (False, True, False, "differ: "),
        (False, False, True, "original-differ: "),
        (RuntimeError("bad"), RuntimeError("bad before"), True, "original-error: "),
        (RuntimeError("bad"), False, False, "RuntimeError"),
        (True, None, True, "equal: tokens 16"),
        (RuntimeError("bad\nmask"), True, False, "RuntimeError: bad mask"),
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

    monkeypatch.setattr(gates, "cache_agrees", agrees)
    found = sleb.verify(out, model=tiny_dir, plan=plan)
    assert failed(found) == ([] if passed else [GENERATION])
    assert said in measured(found, GENERATION)


def test_a_cache_that_goes_wrong_is_noticed(tiny_dir):
    """Without the stand-in: two blocks that write to one place of the cache."""
    loaded = sleb.load(tiny_dir, dtype="float32", device="cpu")
    ids = verification.probe_ids(loaded.model.config)
    assert gates.cache_agrees(loaded.model, ids, 16)
    loaded.stack.blocks[3].self_attn.layer_idx = 2
    assert not gates.cache_agrees(loaded.model, ids, 16)


def test_tokens_alone_are_written_on_another_device(tiny_dir, plan, out):
    nowhere = torch.device("meta")  # no token comes from there
    found = verification.verify(out, model=tiny_dir, plan=plan, generate_on=nowhere)
    assert failed(found) == [GENERATION]


def test_in_float32_on_the_cpu_nothing_but_zero_will_do():
    logits = torch.linspace(-3, 3, 12).reshape(1, 3, 4)
    other = logits.clone()
    other[0, 1, 1] = torch.nextafter(other[0, 1, 1], torch.tensor(9.0))

    def passes(found, dtype=torch.float32, exact=True):
        return gates.check_logits(found, logits, dtype, exact).passed

    assert passes(logits)
    assert not passes(other)
    assert passes(other, exact=False)
    assert not passes(logits + 4e-4, exact=False)
    assert passes(logits + 0.05, torch.bfloat16, False)
    assert not passes(logits + 0.07, torch.bfloat16, False)
    assert not passes(logits[:, :2])
    for dtype in (torch.float32, torch.bfloat16):
        assert not passes(logits * float("nan"), dtype, False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_right_checkpoint_passes_in_every_dtype(tiny_dir, plan, out, dtype):
    assert failed(sleb.verify(out, model=tiny_dir, plan=plan, dtype=dtype)) == []
    with pytest.raises(InputError, match="unknown dtype 'int3'"):
        sleb.verify(out, model=tiny_dir, plan=plan, dtype="int3")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_a_right_checkpoint_passes_and_blocks_stay_in_its_files(family, tmp_path, streams):
    model, _ = tiny(family)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    plan = plan_of(folder, 1)
    out = sleb.apply(plan, folder, tmp_path / "out")
    found = sleb.verify(out, model=folder, plan=plan, stream=True)
    assert failed(found) == []
    assert [c.key for c in found.checks][1:] == ORDER
    assert measured(found, GENERATION) == "equal: tokens 2"
    assert len(streams) >= 2
    assert all(streams)


@pytest.mark.slow
def test_repaired_tensors_are_the_plans(learned, tmp_path):
    options = {"remove": 2, "windows": 6, "length": 32, "device": "cpu", "dtype": "float32"}
    text = [str(learned / "text.txt")]
    done = sleb.prune(learned / "model", tmp_path / "out", text=text, repair=True, **options)
    count = len(done.plan.repair.tensors)
    checked = {"model": learned / "model", "plan": done.plan, "stream": True}
    found = sleb.verify(tmp_path / "out", **checked)
    assert failed(found) == []
    name = "weights-but-repaired"
    assert measured(found, name).endswith(f"repaired {count}")
    without_sums(tmp_path / "out")
    edit_tensors(tmp_path / "out", lambda t: [x.__iadd__(1) for n, x in t.items() if "down" in n])
    found = failed(sleb.verify(tmp_path / "out", **checked))
    assert {"repaired-tensors", name} <= set(found)


def test_it_is_done_where_a_model_does_not_fit(tiny_dir, plan, out, streams, monkeypatch):
    assert failed(sleb.verify(out, model=tiny_dir, plan=plan)) == []
    assert not any(streams)
    size = sum(p.numel() for p in sleb.load(tiny_dir).model.parameters())

    class Memory:
        available = 1.1 * size * torch.float32.itemsize

    monkeypatch.setattr(verification.psutil, "virtual_memory", Memory)
    streams.clear()
    assert failed(sleb.verify(out, model=tiny_dir, plan=plan)) == []
    assert all(streams)
    streams.clear()
    assert failed(sleb.verify(out, model=tiny_dir, plan=plan, dtype="bfloat16")) == []  # half of it
    assert not any(streams)


def test_a_streamed_cut_is_verified_streamed(learned, tmp_path, streams, capsys):
    from sleb.cli.main import main

    rest = ["--windows", "6", "--length", "32", "--text", str(learned / "text.txt")]
    prune = ["prune", str(learned / "model"), "--remove", "1", "--stream", "--no-repair"]
    assert main([*prune, *rest, "-o", str(tmp_path / "out")]) == 0
    assert all(streams)
    streams.clear()
    again = ["verify", str(tmp_path / "out"), "--model", str(learned / "model"), "--stream"]
    assert main(again) == 0
    assert len(streams) >= 2
    assert all(streams)
    capsys.readouterr()


def test_a_recorded_proof_is_taken_only_of_the_very_files(tiny_dir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    small = {"windows": 4, "length": 16, "dtype": "float32", "device": "cpu", "repair": False}
    proved = sleb.prune(tiny_dir, out, remove=2, **small).record.verification
    asked = {"model": tiny_dir, "recorded": True}
    monkeypatch.setattr(verification, "verify", None)  # nothing is proved again
    found = sleb.verify(out, **asked)
    assert found.passed
    assert found.checks[1:] == proved.checks
    with pytest.raises(InputError, match="no recorded proof"):
        sleb.verify(out, depth=1, **asked)
    with pytest.raises(InputError, match="another model"):
        sleb.verify(out, model=save_tiny(tmp_path / "other", seed=5), recorded=True)
    shard = out / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert failed(sleb.verify(out, **asked)) == ["checksums"]
    (out / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match="no recorded proof"):
        sleb.verify(out, **asked)
