"""Several processes find what one finds, to the bit, and end together when one of them fails."""

import json
import shutil
import threading
from collections import Counter

import numpy as np
import pytest
import torch

import sleb
import zoo
from conftest import byte_tokenizer, save_tiny, tiny_llama
from parallel_tools import CPU, HERE, SEARCHES, found, launch, split_repair
from sleb.calibration.split import CalibrationSplit
from sleb.core import process_group as parallel
from sleb.core.errors import InputError, UnsupportedModel
from sleb.models.stack import BlockStack
from sleb.selection import sweep as sweeping
from sleb.selection.metrics import KL, NLL, QUALITY
from sleb.selection.objective import DENSE, BlockSet
from sleb.selection.sweep import Sweep


def wide(path):
    """A model of eight attention and four key-value heads, which two processes can share."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


def even(learned, path):
    """A model that has learned a text, and whose vocabulary two processes can share."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(learned / "model")
    model.resize_token_embeddings(260, mean_resizing=False)
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


def norms(path):
    """A random model with a norm behind each matrix that writes into the stream."""
    zoo.tiny("gemma3_text", vocab_size=260)[0].save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


@pytest.fixture(scope="module")
def job(learned, tmp_path_factory):
    """What a job of two processes has found, and where."""
    folder = tmp_path_factory.mktemp("job")
    shutil.copytree(learned / "model", folder / "model")
    shutil.copy(learned / "text.txt", folder / "text.txt")
    wide(folder / "wide")
    even(learned, folder / "even")
    norms(folder / "norms")
    process = launch(2, str(HERE / "parallel_tools.py"), str(folder))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return folder, json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def alone(job):
    """The same by one process."""
    return json.loads(json.dumps(found(job[0])))


@pytest.mark.slow
def test_two_processes_find_the_same_to_the_bit(job, alone):
    both = job[1]["found"]
    assert job[1]["size"] == 2
    for name in [*SEARCHES, "quality", "similarity"]:
        assert both[name] == alone[name], name
    assert len({str(both[name]["order"]) for name in SEARCHES}) > 1


@pytest.mark.slow
def test_a_repair_is_the_same_to_rounding(job, alone):
    same_repair(job[1]["found"]["repair"], alone["repair"])


def same_repair(both, one):
    assert both["ridges"] == one["ridges"]
    assert any(both["ridges"])
    assert both["after"] == pytest.approx(one["after"], abs=2e-6)
    assert both["tensors"].keys() == one["tensors"].keys()
    for name, values in one["tensors"].items():
        want = torch.tensor(values)
        rounding = 1e-5 * float(want.abs().max())  # sums over ranks are added in another order
        torch.testing.assert_close(
            torch.tensor(both["tensors"][name]), want, rtol=1e-4, atol=rounding
        )


@pytest.mark.slow
def test_a_repair_of_streamed_blocks_is_the_same_to_rounding(job, alone):
    both, one = job[1]["found"]["streamed repair"], alone["streamed repair"]
    same_repair(both, one)
    assert one["tensors"] == alone["given text"]["tensors"]


@pytest.mark.slow
def test_trouble_of_one_process_is_that_of_all(job):
    first, last = job[1]["trouble by rank"]
    assert first["memory"] == last["memory"] == "2 windows, True"
    assert first["data"] == last["data"] == "DataError: window 7 is no good"
    assert last["bug"] == "ZeroDivisionError: oops"
    assert first["bug"] == "Failed: another process of this job failed: ZeroDivisionError: oops"
    assert "no longer do the same work" in first["apart"]
    assert first["apart"] == last["apart"]


@pytest.mark.slow
def test_a_model_held_by_two_processes_scores_the_same(job):
    folder, out = job
    held, split = out["split"]
    assert held == "DTensor"
    assert out["one rank's sum"] == 1  # not one from each process
    model = sleb.load(folder / "wide", **CPU)
    windows, _ = sleb.load_windows(
        model.tokenizer, [str(folder / "text.txt")], windows=4, length=32, seed=0
    )
    plan = sleb.search(model, split=CalibrationSplit(search=windows), remove=2, batch=2, threads=1)
    own = sleb.evaluate(model, windows, removed=plan.removed, batch=2)
    assert tuple(split["removed"]) == own.removed
    assert split["loss"]["value"] == pytest.approx(own.loss.value, abs=1e-5)
    assert split["pruned_loss"]["value"] == pytest.approx(own.pruned_loss.value, abs=1e-5)


@pytest.mark.slow
def test_a_model_held_by_two_processes_is_repaired_the_same(job):
    """And its tensors are whole, and it is as before afterwards; also where norms follow."""
    folder, out = job
    for name in ("even", "norms"):
        split, one = out["split repair"][name], split_repair(folder / name, folder, 1)
        same_repair(split, one)
        assert split["values"].keys() == one["values"].keys()
        for key, values in one["values"].items():
            torch.testing.assert_close(
                torch.tensor(split["values"][key]), torch.tensor(values), rtol=1e-4, atol=1e-5
            )
        assert split["as before"] == one["as before"] == [True, True]
        assert split["patched"] == pytest.approx(one["patched"], abs=1e-5)
        assert split["own"] == one["own"]  # of the model's own text, the tokens


class Threads:
    """Ranks as threads of one process, each with a model of its own."""

    def __init__(self, size, monkeypatch):
        self.size, self.barrier, self.said = size, threading.Barrier(size), [b""] * size
        self.mine = threading.local()
        for module in (sweeping, parallel):
            monkeypatch.setattr(module, "group", lambda: self.mine.group)

    def run(self, work):
        results = [None] * self.size

        def rank(r):
            group = parallel.Group()
            group.rank, group.size, group._store = r, self.size, object()
            group.exchange = lambda mine: self.exchange(r, mine)
            self.mine.group = group
            results[r] = work(r)

        threads = [threading.Thread(target=rank, args=(r,)) for r in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def exchange(self, rank, mine):
        self.said[rank] = mine
        self.barrier.wait(60)
        told = list(self.said)
        self.barrier.wait(60)
        return told


SETS = [*(BlockSet({b, 3}) for b in range(6) if b != 3), BlockSet({1, 2}), BlockSet({0, 5}), DENSE]


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_scores_do_not_depend_on_the_number_of_ranks(size, monkeypatch):
    ids = torch.randint(3, 259, (11, 24), generator=torch.Generator().manual_seed(1))
    calls = [(SETS, a, min(a + 4, 11)) for a in (0, 4, 8)] + [(SETS[2:], 9, 10)]

    def scores(metric, batch):
        sweep = Sweep(BlockStack(tiny_llama()), ids, metric, batch=batch)
        return [values for _, values in sweeping.distribute(sweep, calls)]

    cases = [(NLL, 4), (KL, 4), (QUALITY, 16)]
    want = [scores(*case) for case in cases]
    ranks = Threads(size, monkeypatch).run(lambda r: [scores(*case) for case in cases])
    for got in ranks:
        for a, b in zip(want, got, strict=True):
            for one, several in zip(a, b, strict=True):
                np.testing.assert_array_equal(one, several)


def test_a_call_is_shared_where_there_are_fewer_than_ranks():
    sweep = Sweep(BlockStack(tiny_llama()), torch.zeros((8, 128), dtype=torch.long), NLL, batch=8)
    here = parallel.Group()
    here.size = 4
    shares = sweeping._shared(sweep, [(SETS, 0, 8)], 0, 0, here)
    assert sorted(shares) == [0, 1, 2, 3]
    assert sorted(map(sorted, (s for mine in shares.values() for s in mine))) == sorted(
        map(sorted, SETS)
    )
    whole = sweeping._shared(sweep, [(SETS, 0, 8), (SETS, 8, 16)], 1, 2, here)
    assert whole == {1: SETS}


@pytest.mark.parametrize("metric", [NLL, KL])
def test_streams_share_calls_within_a_bundle_only(metric, monkeypatch):
    """Few windows of many sets, as in a race's first looks on a GPU. A product of this size rounds
    the same in any company, so the calls themselves are compared."""
    made = []

    def groups(*args):
        for share in real_groups(*args):
            made.append(("block", tuple(sorted(map(tuple, map(sorted, share))))))
            yield share

    def score(self, hidden, *args):
        made.append(("head", len(hidden)))
        return real(self, hidden, *args)

    real, real_groups = Sweep._score, sweeping.groups
    monkeypatch.setattr("sleb.selection.sweep.groups", groups)
    monkeypatch.setattr(Sweep, "_score", score)
    ids = torch.randint(3, 259, (2, 16), generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr("sleb.selection.sweep.busy_tokens", lambda stack: 64)
    sweep = Sweep(BlockStack(tiny_llama()), ids, metric, batch=32)
    bundles = sweep.bundles(SETS, 2)
    assert len(bundles) > 2
    assert len(bundles[0]) > 1
    whole = sweep.scores(SETS, 0, 2)
    together = Counter(made)
    assert any(kind == "block" and len(share) > 1 for kind, share in together if kind == "block")
    assert sum(n for (kind, _), n in together.items() if kind == "head") == len(bundles)
    for bundle in bundles:
        made.clear()
        rows = [SETS.index(s) for s in bundle]
        assert torch.equal(sweep.scores(bundle, 0, 2, among=SETS), whole[rows])
        assert not Counter(made) - together


def test_a_job_that_says_not_which_process_this_is(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE is set, but RANK, LOCAL_RANK"):
        with parallel.joined():
            pass


def test_splits_that_are_refused_before_loading(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("sleb.models.load.strict_model", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(UnsupportedModel, match=r"has 4 attention and 2 key-value heads, which"):
        sleb.load(tiny_dir, tp=3, **CPU)
    with pytest.raises(InputError, match=r"--tp 2 needs 2 processes, or a multiple, and this job"):
        sleb.load(tiny_dir, tp=2, **CPU)
    save_tiny(tmp_path / "bare")
    config = json.loads((tmp_path / "bare/config.json").read_text())
    (tmp_path / "bare/config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
    with pytest.raises(UnsupportedModel, match="no plan to split a bloom over processes"):
        sleb.load(tmp_path / "bare", tp=2, **CPU)


@pytest.mark.parametrize(
    ("options", "say"),
    [
        ({"tp": 2, "stream": True}, "--stream and --tp both say where"),
        ({"tp": 2, "device_map": "auto"}, "--device-map and --tp both say where"),
        ({"stream": True, "device_map": "auto"}, "--stream and --device-map both say where"),
        ({"device_map": "auto", "device": "cpu"}, "--device-map and --device both say where"),
        ({"tp": 0}, "--tp 0"),
        ({"device_map": "atuo"}, r"neither auto, .* nor a JSON file \(did you mean 'auto'\?\)"),
    ],
)
def test_what_does_not_go_together(tiny_dir, options, say):
    with pytest.raises(InputError, match=say):
        sleb.load(tiny_dir, **options)
