"""Children: what runs in them, their memory, and how they fail."""

import json
import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

import sleb
from conftest import byte_tokenizer, save_tiny, tiny_llama
from runtime_tools import CPU, PROMPT, WRITE, InProcess, pretending, settings
from sleb.core.errors import InputError, ResourceError
from sleb.runtimes import worker
from sleb.runtimes.base import installed
from sleb.runtimes.bench import Speed, bench, random_prompts
from sleb.runtimes.llama_cpp import LlamaCpp
from sleb.runtimes.transformers import Transformers
from sleb.runtimes.vllm import VLLM
from sleb.runtimes.worker import Failed, OutOfMemory, Worker
from zoo import tiny

pytestmark = pytest.mark.slow  # processes of their own

PROMPTS = {case: random_prompts(case, 128) for case in (PROMPT, WRITE)}


def test_a_pass_with_fewest_blocks_is_that_of_a_really_cut_checkpoint(
    tiny_dir, tiny_plan, tmp_path
):
    gone = (1, 2, 3, 4)
    plan = tiny_plan.model_copy(update={"removed": gone, "order": gone, "rounds": ()})
    cut = sleb.apply(plan, tiny_dir, tmp_path / "cut")
    whole = Transformers(settings(tiny_dir))
    assert (whole.bypassed, whole.fewest_blocks) == (set(gone), 2)
    ids = torch.tensor(PROMPTS[WRITE])
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12}
    with whole.stack.bypassed(whole.bypassed):
        ours = whole.model.generate(ids, **given)
    theirs = Transformers(settings(cut)).model.generate(ids, **given)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, whole.model.generate(ids, **given))
    ran: set[int] = set()
    for i, block in enumerate(whole.stack.blocks):
        block.self_attn.register_forward_hook(lambda *_, i=i: ran.add(i))
    whole.work(PROMPTS[WRITE], 12, True)()
    assert ran == {0, 5}
    whole.work(PROMPTS[WRITE], 12, False)()
    assert ran == set(range(6))


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "gpt2", "mixtral", "qwen3_5_text"])
def test_fewest_blocks_run_in_other_families(family, monkeypatch):
    model, _ = tiny(family)
    stack = sleb.models.stack.BlockStack(model)
    monkeypatch.setattr(
        "sleb.models.load.load",
        lambda *_, **__: sleb.LoadedModel(model=model, tokenizer=None, stack=stack, source=None),
    )
    one = Transformers(settings(Path("x")))
    assert 0 < one.fewest_blocks < 8
    assert {0, 7} <= set(range(8)) - one.bypassed
    for case in (PROMPT, WRITE):
        for fewest in (False, True):
            one.work(PROMPTS[case], case.new_tokens, fewest)()


def test_generation_ignores_what_the_model_itself_would_do(tmp_path):
    path = save_tiny(tmp_path / "ends")
    ends = {"eos_token_id": list(range(259)), "do_sample": True, "max_length": 9, "num_beams": 3}
    (path / "generation_config.json").write_text(json.dumps(ends))
    one = Transformers(settings(path))
    one.work(PROMPTS[WRITE], 12, False)()
    one.model.generate = lambda **given: given["input_ids"]
    with pytest.raises(sleb.DataError, match="ended after 0 of 12 tokens"):
        one.work(PROMPTS[WRITE], 12, False)()


def test_a_prompt_fills_a_cache_and_computes_one_position(tiny_dir):
    one = Transformers(settings(tiny_dir))
    seen: list = []
    one.model.register_forward_hook(lambda *args: seen.append(args[-1]))
    one.work(PROMPTS[PROMPT], 0, False)()
    assert seen[0].logits.shape == (1, 1, 259)
    assert seen[0].past_key_values.get_seq_length() == 16


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


@pytest.mark.slow
def test_memory_is_each_models_own_and_a_child_that_dies_takes_nothing_with_it(big, tmp_path):
    given = (PROMPTS[WRITE], WRITE.new_tokens)
    with Worker("small") as small, Worker("large") as large:
        with pytest.raises(InputError, match="has no config"):
            small.load(settings(tmp_path))
        small.load(settings(big[0]))
        large.load(settings(big[1]))
        assert small.load_seconds > 0
        peaks = [one.work(*given, watched=True).peak for one in (small, large)]
        assert large.work(*given).peak == 0
        weights = [(path / "model.safetensors").stat().st_size for path in big]
        assert peaks[1] - peaks[0] > 0.7 * (weights[1] - weights[0])
        assert 0.7 * weights[1] < peaks[1] < 3 * weights[1] + 100e6
        # another library's failure is one line, and the process goes on
        with pytest.raises(Failed, match=r"^[A-Za-z]+Error: [^\n]+$"):
            small.work([["no", "ids"]], 1)
        assert small.work(*given).seconds > 0
        os.kill(small._child.pid, signal.SIGKILL)
        with pytest.raises(ResourceError, match="small: the system killed"):
            small.work(*given)
        assert large.work(*given).seconds > 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("sys.exit('no luck\\x1b[31m today')", "ended with 1: no luck"),
        ("sys.exit(0)", "ended with 0"),
        ("print('no JSON', flush=True); sys.stdin.read()", "something else"),
        ("print('[[' * 10**5, flush=True); sys.stdin.read()", "something else"),
        ("print('{\"found\": 1}', flush=True); sys.stdin.read()", "something else"),
        ("print('x' * 3 * 2**20, end='', flush=True); sys.stdin.read()", "something else"),
        ("sys.stdin.read()", "no answer in 1 seconds"),
    ],
)
def test_a_child_that_dies_hangs_or_prints_garbage_is_one_clear_error(monkeypatch, code, reason):
    monkeypatch.setattr(worker, "_START", f"import sys; {code} #")
    monkeypatch.setattr(worker, "MAX_LINE", 2**20)
    with Worker("none") as none:
        with pytest.raises(Failed, match=reason) as error:
            none.ask("version", {}, 1 if reason.startswith("no answer") else 60)
    assert "\n" not in str(error.value)
    assert none._child._process.poll() is not None


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), OutOfMemory),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (ResourceError("m does not fit on cuda; try --stream"), OutOfMemory),
        (ResourceError("disk full"), ResourceError),
        (InputError("no such thing"), InputError),
        (ValueError("first line\nlast line"), Failed),
    ],
)
def test_errors_keep_their_kind_across_processes(error, kind, monkeypatch):
    class Broken(InProcess):
        def __init__(self, python=None):
            super().__init__()
            self.session.model = self

        def logprobs(self, ids):
            raise error

    monkeypatch.setattr(worker, "Child", Broken)
    with pytest.raises(kind) as raised:
        Worker("m").ask("logprobs", {"ids": []})
    assert raised.type is kind
    assert "\n" not in str(raised.value)


@pytest.fixture
def log(tmp_path) -> Path:
    """What llama.cpp was asked for; it and vLLM are played."""
    with pretending(tmp_path / "modules") as patch:
        patch.setenv("FAKE_LOG", str(tmp_path / "log"))
        yield tmp_path / "log"


def test_a_bench_in_three_runtimes(tiny_dir, tiny_plan, log, tmp_path, monkeypatch):
    """Of both tiny models, in this process; nothing but the clock is real."""
    monkeypatch.setattr(worker, "Child", InProcess)
    assert installed() == ("transformers", "vllm", "llama.cpp")
    out = sleb.apply(tiny_plan, tiny_dir, tmp_path / "cut")
    refs = [
        shutil.copytree(path, tmp_path / f"model-{i}") for i, path in enumerate((tiny_dir, out))
    ]
    for ref, blocks in zip(refs, (6, 3), strict=True):
        (ref / "m.gguf").write_text(json.dumps({"blocks": blocks}))
    found = bench(refs[0], refs[1:], quick=True, **CPU)
    assert (found.device, found.dtype, found.threads) == ("cpu", "float32", 1)
    assert [c.name for c in found.cases] == ["prompt", "first-token", "generate-1", "generate-4"]
    assert found.cases[0].prompt_tokens == 255  # of 256, as a first token needs room too
    runtimes = ["transformers"] * 2 + ["vllm"] * 2 + ["llama.cpp"] * 2
    assert [m.runtime for m in found.models] == runtimes
    for m, ref, blocks in zip(found.models, refs * 3, (6, 3) * 3, strict=True):
        known = sleb.describe(ref)
        size = (ref / "m.gguf").stat().st_size if m.runtime == "llama.cpp" else known.nbytes
        assert (m.path, m.blocks, m.parameters) == (str(ref), blocks, known.parameters)
        assert m.file_bytes == size
        cases = found.cases[:3] if m.runtime == "llama.cpp" else found.cases
        for case, timed in zip(cases, m.runs, strict=True):
            assert timed.case == case.name
            assert len(timed.seconds) == 6
            assert min(timed.seconds) <= timed.low <= timed.median <= timed.high
            assert timed.tokens_per_second * timed.median == pytest.approx(
                case.batch * (case.new_tokens or case.prompt_tokens)
            )
    assert len(found.ratios) == 4 + 4 + 3
    assert all(r.possible is None for r in found.ratios if r.runtime != "transformers")
    dense, pruned = found.models[:2]
    for r, before, after in zip(found.ratios[:4], dense.runs, pruned.runs, strict=True):
        each = [a / b for a, b in zip(before.seconds, after.seconds, strict=True)]
        assert (r.ratio.low, r.ratio.high) == pytest.approx((min(each), max(each)))
        assert r.ideal == 2
        assert r.possible is None or 1 < r.possible <= 2
    assert TypeAdapter(Speed).validate_json(json.dumps(asdict(found))) == found
    # llama.cpp: one warm-up and six rounds of two models: each reads its whole prompt anew
    asked = log.read_text().splitlines()
    assert asked[:2] == ["load 6 256", "load 3 256"]
    turns = {255: [], 64: [], 32: ["eval 1"] * 15}
    expected = [2 * 7 * ["reset", f"eval {n}", *more] for n, more in turns.items()]
    assert asked[2:] == [line for case in expected for line in case]


def test_what_other_runtimes_refuse(log, tmp_path):
    file = tmp_path / "m.gguf"
    file.write_text(json.dumps({"blocks": 30}))
    given = settings(file, runtime="llama.cpp", blocks=24)
    with pytest.raises(InputError, match="30 blocks and the checkpoint 24"):
        LlamaCpp(given)
    with pytest.raises(InputError, match="--device cpu"):
        LlamaCpp.prepare(replace(given, device="cuda"))
    with pytest.raises(InputError, match="--device cuda or cpu"):
        VLLM.prepare(replace(given, device="cuda:1"))
