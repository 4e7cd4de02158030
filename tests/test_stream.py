"""Blocks that stay on disk: the same scores, each block read once per walk, within the memory."""

import os
import shutil
import subprocess
import sys
from collections import ChainMap, Counter

import pytest
import torch

import sleb
from conftest import tiny_llama
from sleb.core.errors import DataError, InputError, ResourceError
from sleb.models.stack import BlockStack
from sleb.selection.metrics import KL, NLL
from sleb.selection.objective import BlockSet
from sleb.selection.sweep import Sweep

CPU = {"dtype": "float32", "device": "cpu"}
SETS = [BlockSet(), BlockSet({1}), BlockSet({4}), BlockSet({1, 4}), BlockSet(range(1, 5))]


@pytest.fixture
def streamed(tiny_dir):
    return sleb.load(tiny_dir, stream=True, **CPU)


def ids(n=7, length=20, vocab=259):
    return torch.randint(3, vocab, (n, length), generator=torch.Generator().manual_seed(0))


def test_blocks_are_not_in_memory_and_everything_else_is(streamed):
    where = {n: p.device.type for n, p in streamed.model.named_parameters()}
    assert {w for n, w in where.items() if ".layers." in n} == {"meta"}
    assert {w for n, w in where.items() if ".layers." not in n} == {"cpu"}
    assert streamed.stack.streamed
    assert not BlockStack(tiny_llama()).streamed


@pytest.mark.parametrize("metric", [NLL, KL])
@pytest.mark.parametrize("max_bytes", [None, 60_000])
def test_scores_are_those_of_the_model_in_memory(tiny_dir, streamed, metric, max_bytes):
    want = Sweep(sleb.load(tiny_dir, **CPU).stack, ids(), metric, batch=2).scores(SETS, 0, 7)
    sweep = Sweep(streamed.stack, ids(), metric, batch=2, max_bytes=max_bytes)
    assert torch.equal(sweep.scores(SETS, 0, 7), want)
    assert all(p.device.type == "meta" for p in streamed.stack.blocks.parameters())


def test_each_block_is_read_once_per_walk(streamed, monkeypatch):
    """A walk is as many windows as hidden states of all sets fit in max_bytes."""
    from accelerate.utils.offload import OffloadedWeightsLoader

    reads: Counter[str] = Counter()
    real = OffloadedWeightsLoader.__getitem__

    def get(self, key):
        reads[key] += 1
        return real(self, key)

    state = 20 * 32 * 4
    sweep = Sweep(streamed.stack, ids(8), NLL, batch=2, max_bytes=4 * (len(SETS) + 3) * state)
    Sweep(streamed.stack, ids(8), NLL, batch=2).scores(SETS, 0, 2)  # once it reads more, to check
    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", get)
    assert sweep.step(len(SETS)) == 4
    sweep.scores(SETS, 0, 8)
    assert set(reads.values()) == {2}
    assert len(reads) == 6 * 9


def test_too_little_memory_for_one_window_says_what_to_do(streamed):
    sweep = Sweep(streamed.stack, ids(), NLL, max_bytes=4_000)
    with pytest.raises(ResourceError, match=r"take 0 MB, and 0 MB are allowed: raise --max-memory"):
        sweep.scores(SETS, 0, 7)
    with pytest.raises(InputError, match="--max-memory 'lots' is not a size"):
        sleb.search("nowhere", remove=1, max_memory="lots")


def test_a_failed_run_puts_the_weights_back_on_disk(streamed):
    def places():
        return {p.device.type for p in streamed.stack.blocks[2].parameters()}

    def fail():
        with streamed.stack.holding(2):
            assert places() == {"cpu"}
            raise RuntimeError("stop")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert places() == {"meta"}


@pytest.mark.slow
def test_every_verb_that_scores_can_stream(place, capsys, monkeypatch):
    from sleb.cli.main import main

    seen = []
    real = Sweep.__init__

    def init(self, stack, *args, **kwargs):
        seen.append(stack.streamed)
        real(self, stack, *args, **kwargs)

    monkeypatch.setattr(Sweep, "__init__", init)
    for verb in ("eval MODEL --plan plan.json", "search MODEL --remove 2 -o new.json"):
        command = [*verb.split(), "--windows", "3", "--length", "16", "--json"]
        assert main(command) == 0
        want = capsys.readouterr().out
        assert main([*command, "--stream", *(["--force"] if "search" in verb else [])]) == 0
        assert capsys.readouterr().out == want
    assert seen == [False, True, False, True]
    assert main(["similarity", "MODEL", "--stream", "--windows", "3", "--length", "16"]) == 0


LIMITED = """
import resource, sys
import sleb, torch, accelerate, transformers.models.llama.modeling_llama
_, kind, path, spare, small = sys.argv
torch.set_num_threads(1)
sleb.search(small, remove=1, windows=2, length=16, dtype="float32", device="cpu")
lines = open("/proc/self/status").read().splitlines()
held = 1024 * int(next(line for line in lines if line.startswith("VmData")).split()[1])
resource.setrlimit(resource.RLIMIT_DATA, (held + int(spare),) * 2)
plan = sleb.search(path, remove=2, windows=4, length=32, stream=kind == "stream", device="cpu",
                   max_memory="20MB", dtype="float32")
print(plan.order)
"""


@pytest.mark.slow
@pytest.mark.real
def test_the_real_model_is_searched_in_less_memory_than_it_has(real_model, tmp_path, tiny_dir):
    """A process that may hold, beyond what it had before, no more than its float32 weights:
    streamed it finds the same blocks, else it fails. (RLIMIT_DATA also counts mapped files:
    streamed it needs 0.7 of that, resident above 1.5.)"""
    loaded = sleb.load(real_model, dtype="bfloat16")
    loaded.model.save_pretrained(tmp_path / "m", max_shard_size="40MB")
    loaded.tokenizer.save_pretrained(tmp_path / "m")
    weights = 4 * sum(p.numel() for p in loaded.model.parameters())
    assert weights > 5e8

    def run(kind):
        command = [sys.executable, "-c", LIMITED, kind, tmp_path / "m", str(weights), tiny_dir]
        # else what glibc keeps of freed blocks depends on timing and on the number of cores
        tidy = {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_ARENA_MAX": "1"}
        env = {**os.environ, **tidy}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env)

    streamed, resident = run("stream"), run("resident")
    assert streamed.returncode == 0, streamed.stderr[-2000:]
    assert resident.returncode != 0
    assert "allocate" in resident.stderr
    plan = sleb.search(real_model, remove=2, windows=4, length=32, dtype="float32", device="cpu")
    assert streamed.stdout.strip() == str(plan.order)


@pytest.mark.parametrize("piece", [2**25, 100])
def test_tensors_are_read_from_files_where_the_hooks_would_have_them_from(
    tiny_dir, tmp_path, monkeypatch, piece
):
    """What goes to a GPU is read past accelerate's maps, which say where it lies."""
    from sleb.models import shard_reader as reading
    from sleb.models.offload import offloading

    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    stack = sleb.load(folder, stream=True, device="cpu", dtype="bfloat16").stack
    monkeypatch.setattr(reading, "PIECE", piece)
    files, seen = reading.Files(), 0
    for module, hook in offloading(stack.blocks[3]):
        names = [name for name, _ in module.named_parameters()]
        places = [files.stored(hook.weights_map, name) for name in names]
        for name, place, tensor in zip(
            names, places, files.read(places, pinned=False), strict=True
        ):
            assert tensor.dtype == torch.float32  # as it is stored
            assert place.dtype == torch.bfloat16
            assert torch.equal(tensor.to(place.dtype), hook.weights_map[name])
            seen += 1
        over = ChainMap({names[0]: torch.zeros(1)}, hook.weights_map)
        assert files.stored(over, names[0]) is None  # changed since
        assert files.stored({names[0]: torch.zeros(1)}, names[0]) is None
    assert seen == 9
    with open(folder / "model.safetensors", "r+b") as stream:
        stream.truncate(places[0].info.start + 1)
    with pytest.raises(DataError, match="shorter than its head says"):
        files.read(places, pinned=False)
