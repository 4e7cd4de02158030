"""Models in processes of their own: what runs in them, their memory, and how they fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

import sleb
from conftest import byte_tokenizer, save_tiny, tiny_llama
from sleb.core.errors import InputError, ResourceError
from sleb.runtimes import worker
from sleb.runtimes.adapters import engine, installed, tokens
from sleb.runtimes.bench import Case, Speed, bench
from sleb.runtimes.worker import Failed, Worker
from speed_tools import CPU, PROMPT, WRITE, settings
from zoo import tiny


@pytest.fixture(scope="module")
def out(tiny_dir, tiny_plan, tmp_path_factory) -> Path:
    return sleb.apply(tiny_plan, tiny_dir, tmp_path_factory.mktemp("cut") / "out")


# -- transformers ----------------------------------------------------------------------------------


def test_shortened_generation_is_that_of_a_really_cut_checkpoint(tiny_dir, tiny_plan, tmp_path):
    gone = (1, 2, 3, 4)
    plan = tiny_plan.model_copy(update={"removed": gone, "order": gone, "rounds": ()})
    cut = sleb.apply(plan, tiny_dir, tmp_path / "cut")
    whole = engine("transformers")(settings(tiny_dir))
    assert (whole.bypassed, whole.kept) == (set(gone), 2)
    ids = torch.tensor(tokens(WRITE, 259))
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12}
    with whole.stack.bypassed(whole.bypassed):
        ours = whole.model.generate(ids, **given)
    theirs = engine("transformers")(settings(cut, blocks=2)).model.generate(ids, **given)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, whole.model.generate(ids, **given))
    ran: set[int] = set()
    for i, block in enumerate(whole.stack.blocks):
        block.self_attn.register_forward_hook(lambda *_, i=i: ran.add(i))
    whole.prepare(WRITE, True)()
    assert ran == {0, 5}
    whole.prepare(WRITE, False)()
    assert ran == set(range(6))


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "gpt2", "mixtral", "qwen3_5_text"])
def test_shortened_generation_runs_in_other_families(family, monkeypatch):
    model, _ = tiny(family)
    stack = sleb.models.stack.BlockStack(model)
    monkeypatch.setattr(
        "sleb.models.load.load",
        lambda *_, **__: sleb.LoadedModel(model=model, tokenizer=None, stack=stack, source=None),
    )
    one = engine("transformers")(settings(Path("x"), vocabulary=128))
    assert 0 < one.kept < 8
    assert {0, 7} <= set(range(8)) - one.bypassed
    for case in (PROMPT, WRITE):
        for shortened in (False, True):
            one.prepare(case, shortened)()


def test_generation_ignores_what_the_model_itself_would_do(tmp_path):
    path = save_tiny(tmp_path / "ends")
    ends = {"eos_token_id": list(range(259)), "do_sample": True, "max_length": 9, "num_beams": 3}
    (path / "generation_config.json").write_text(json.dumps(ends))
    one = engine("transformers")(settings(path))
    one.prepare(WRITE, False)()
    one.model.generate = lambda **given: given["input_ids"]
    with pytest.raises(sleb.DataError, match="ended after 0 of 12 tokens, so it cannot be timed"):
        one.prepare(WRITE, False)()


def test_a_prompt_fills_a_cache_and_computes_one_position(tiny_dir):
    one = engine("transformers")(settings(tiny_dir))
    seen: list = []
    one.model.register_forward_hook(lambda *args: seen.append(args[-1]))
    one.prepare(PROMPT, False)()
    assert seen[0].logits.shape == (1, 1, 259)
    assert seen[0].past_key_values.get_seq_length() == 16


def test_prompts_are_the_same_for_every_model():
    assert tokens(WRITE, 259) == tokens(WRITE, 259)
    ids = torch.tensor(tokens(Case(name="x", batch=64, prompt_tokens=64, new_tokens=1), 50))
    assert ids.shape == (64, 64)
    assert set(ids.flatten().tolist()) == set(range(50))


PEAK = """
import time, torch
from sleb.runtimes.adapters import Meter

meter = Meter("cpu")
with meter.watching(lambda: None) as seen:
    held = torch.ones(40_000_000)  # 160 MB
    time.sleep(0.2)
    del held
print(seen[0])
"""


def test_the_meter_sees_a_peak_that_is_gone_at_the_end():
    # in a process of its own, as benchmarks have it: in this one others give memory back meanwhile
    seen = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(seen.stdout) > 120e6


# -- processes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> list[Path]:
    """Two and eight blocks of 16.8 MB each."""
    made = []
    for blocks in (2, 8):
        model = tiny_llama(1)
        config = model.config
        config.update({"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128})
        config.num_hidden_layers = blocks
        path = tmp_path_factory.mktemp("big") / str(blocks)
        type(model)(config).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        made.append(path)
    return made


def test_memory_is_each_models_own_and_grows_with_it(big):
    with Worker("small", settings(big[0])) as small, Worker("large", settings(big[1])) as large:
        assert small.load_seconds > 0
        peaks = [one.run(WRITE, watched=True).peak for one in (small, large)]
        assert large.run(WRITE).peak == 0
        weights = [(path / "model.safetensors").stat().st_size for path in big]
        assert peaks[1] - peaks[0] > 0.7 * (weights[1] - weights[0])
        assert 0.7 * weights[1] < peaks[1] < 3 * weights[1] + 100e6
        # another library's failure is one line, and the process goes on
        with pytest.raises(Failed, match=r"^[A-Za-z]+Error: "):
            small.run(replace(WRITE, prompt_tokens=-1))
        assert small.run(WRITE).seconds > 0
        # a process that is killed takes nothing with it
        os.kill(small._child.pid, signal.SIGKILL)
        with pytest.raises(ResourceError, match="small: the system killed the process that ran it"):
            small.run(WRITE)
        assert large.run(WRITE).seconds > 0


def test_a_child_that_cannot_load_says_why_and_is_gone(tmp_path):
    with pytest.raises(InputError, match="has no config"):
        Worker("none", settings(tmp_path))


def test_a_child_that_dies_of_itself_says_its_last_line(monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "_START", "import sys; sys.exit('no luck today') #")
    with pytest.raises(Failed, match="its process ended with 1: no luck today"):
        Worker("none", settings(tmp_path))


LLAMA = """
import os
print("a line that is no answer", flush=True)
def note(text):
    with open(os.environ["FAKE_LOG"], "a") as stream: stream.write(text + "\\n")
def llama_supports_gpu_offload(): return False
class Llama:
    def __init__(self, model_path, n_ctx, n_gpu_layers, **rest):
        blocks = open(model_path).read()
        self.metadata = {"general.architecture": "llama", "llama.block_count": blocks}
        note(f"load {blocks} {n_ctx} {n_gpu_layers}")
    def reset(self): note("reset")
    def eval(self, ids): note(f"eval {len(ids)}")
    def sample(self, temp): return 7
"""
VLLM = """
import os
class SamplingParams:
    def __init__(self, **given): self.given = given
class Made: pass
class LLM:
    def __init__(self, model, **options):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert options["enable_prefix_caching"] is False
        assert "gpu_memory_utilization" not in options
        assert options["max_model_len"] == 256
        if os.environ.get("FAKE_VLLM"): raise RuntimeError(os.environ["FAKE_VLLM"])
    def generate(self, prompts, asked, use_tqdm):
        assert asked.given["ignore_eos"] and asked.given["temperature"] == 0
        made = []
        for _ in prompts:
            one, answer = Made(), Made()
            answer.token_ids = [0] * asked.given["max_tokens"]
            one.outputs = [answer]
            made.append(one)
        return made
"""


@pytest.fixture(scope="module")
def whole(tiny_dir, out, tmp_path_factory):
    """A bench of both tiny models in three runtimes, two of them pretending; and its log."""
    place = tmp_path_factory.mktemp("whole")
    (place / "llama_cpp.py").write_text(LLAMA)
    (place / "vllm.py").write_text(VLLM)
    refs = []
    for path, blocks in ((tiny_dir, 6), (out, 3)):
        refs.append(shutil.copytree(path, place / f"model-{blocks}"))
        (refs[-1] / "m.gguf").write_text(str(blocks))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        patch.setenv("FAKE_LOG", str(place / "log"))
        assert installed() == ("transformers", "vllm", "llama.cpp")
        found = bench(*refs[:1], refs[1:], quick=True, runs=6, **CPU)
    return found, (place / "log").read_text().splitlines(), refs


def test_a_bench_of_two_models(whole):
    found, _, refs = whole
    assert (found.device, found.dtype, found.threads) == ("cpu", "float32", 1)
    assert [c.name for c in found.cases] == ["prompt", "first-token", "generate-1", "generate-4"]
    assert found.cases[0].prompt_tokens == 255  # of 256, as a first token needs room too
    dense, pruned = found.models[:2]
    assert (dense.path, pruned.path) == tuple(map(str, refs))
    assert (dense.blocks, pruned.blocks) == (6, 3)
    sizes = [sleb.describe(ref) for ref in refs]
    assert [m.file_bytes for m in (dense, pruned)] == [d.nbytes for d in sizes]
    assert [m.parameters for m in (dense, pruned)] == [d.parameters for d in sizes]
    for m in (dense, pruned):
        assert m.load_seconds > 0
        assert m.peak_bytes > 0
        for case, timed in zip(found.cases, m.runs, strict=True):
            assert timed.case == case.name
            assert len(timed.seconds) == 6
            assert min(timed.seconds) <= timed.low <= timed.median <= timed.high
            assert timed.tokens_per_second * timed.median == pytest.approx(
                case.batch * (case.new_tokens or case.prompt_tokens)
            )
    ratios = [r for r in found.ratios if r.runtime == "transformers"]
    assert [r.case for r in ratios] == [c.name for c in found.cases]
    for r, before, after in zip(ratios, dense.runs, pruned.runs, strict=True):
        each = [a / b for a, b in zip(before.seconds, after.seconds, strict=True)]
        assert (r.ratio.low, r.ratio.high) == pytest.approx((min(each), max(each)))
        assert r.ideal == 2
        assert r.possible is None or 1 < r.possible <= 2
    assert any(r.possible for r in ratios)
    assert TypeAdapter(Speed).validate_json(json.dumps(asdict(found))) == found


def test_other_runtimes_run_the_same_cases(whole):
    found, log, _ = whole
    assert [m.runtime for m in found.models] == [
        *("transformers",) * 2,
        *("vllm",) * 2,
        *("llama.cpp",) * 2,
    ]
    names = {m.runtime: [run.case for run in m.runs] for m in found.models}
    assert names["vllm"] == names["transformers"]
    assert names["llama.cpp"] == ["prompt", "first-token", "generate-1"]
    assert "llama.cpp: generate-4: it runs one sequence at a time here" in found.skipped
    assert all(r.possible is None for r in found.ratios if r.runtime != "transformers")
    assert len(found.ratios) == 4 + 4 + 3
    gguf = [m for m in found.models if m.runtime == "llama.cpp"]
    assert [m.file_bytes for m in gguf] == [1, 1]
    assert log[:2] == ["load 6 256 0", "load 3 256 0"]
    # one warm-up and six rounds of two models: each reads its whole prompt anew
    prompt, first, write = (
        2 * 7 * [["reset", f"eval {n}", *more]]
        for n, more in ((255, ()), (64, ()), (32, ("eval 1",) * 15))
    )
    assert log[2:] == [line for turns in (prompt, first, write) for turn in turns for line in turn]


def test_a_gguf_file_of_another_model_is_not_timed(monkeypatch, tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "llama_cpp.py").write_text(LLAMA)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    (tmp_path / "m.gguf").write_text("30")
    with pytest.raises(InputError, match=r"m\.gguf has 30 blocks and the checkpoint 24"):
        engine("llama.cpp")(settings(tmp_path / "m.gguf", blocks=24))
    with pytest.raises(InputError, match="the CPU only: use --device cpu"):
        engine("llama.cpp").imports(settings(tmp_path / "m.gguf", device="cuda"))
    sys.modules.pop("llama_cpp")


def test_vllm_takes_only_the_first_gpu(tmp_path):
    with pytest.raises(InputError, match="use --device cuda or cpu"):
        engine("vllm").imports(settings(tmp_path, device="cuda:1"))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "OutOfMemory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "OutOfMemory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "OutOfMemory"),
        (ResourceError("m does not fit on cuda; try --stream"), "OutOfMemory"),
        (ResourceError("disk full"), "ResourceError"),
        (InputError("no such thing"), "InputError"),
        (ValueError("first line\nlast line"), "Failed"),
    ],
)
def test_errors_keep_their_kind_across_processes(error, kind):
    said = worker._described(error)
    raised = worker._raised("m", said["error"], said["message"])
    assert type(raised).__name__ == kind
    assert "\n" not in str(raised)
    if kind == "Failed":
        assert str(raised) == "ValueError: last line"
