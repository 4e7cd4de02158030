"""A healing run that is stopped goes on, and ends as one that was not."""

import functools
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import heal_tools
import sleb
from cli_tools import tree
from heal_tools import SMALL, Stopping, healed, scripted
from sleb.checkpoints.checkpoint import Checkpoint
from sleb.core.errors import DataError, InputError, ResourceError
from sleb.distillation import computing, training
from sleb.distillation.state import TrainingState
from sleb.distillation.student import Student

home = heal_tools.home

LONG = {"tokens": 24 * 256, "at_once": 4}  # 24 steps of 2 passes, a check after every other step


@pytest.fixture(scope="module")
def unbroken(home, tmp_path_factory):
    """Weights of a run that was not stopped, with so many ``lora``."""

    @functools.cache
    def made(lora):
        healed(home, out := tmp_path_factory.mktemp("unbroken") / "H", lora=lora, **LONG)
        return (out / "model.safetensors").read_bytes()

    return made


@pytest.mark.parametrize(
    ("lora", "number"),
    [
        (None, signal.SIGINT),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(None, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(home, tmp_path, unbroken, lora, number):
    stop = Stopping(15, lambda: signal.raise_signal(number))  # in the middle of step 8 of 24
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        healed(home, tmp_path / "H", lora=lora, **LONG, progress=stop)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert stop.passes == 15
    assert [*tree(tmp_path)] == ["H.heal"]
    more = Stopping()
    done = healed(home, tmp_path / "H", lora=lora, **LONG, progress=more)
    assert more.passes == 34, "the seven steps that were done are not repeated"
    assert more.total == 17 * 8 * 32, "time left is that of what is left"
    assert done.steps == 24
    assert (tmp_path / "H/model.safetensors").read_bytes() == unbroken(lora)
    assert not (tmp_path / "H.heal").exists()


def test_a_run_that_was_killed_goes_on_from_its_last_state(home, tmp_path, unbroken):
    class Killed(Exception):
        pass

    def die():
        raise Killed

    for at in (3, 9, 8):
        progress = Stopping(at, die)
        with pytest.raises(Killed):
            healed(home, tmp_path / "H", **LONG, save_every=0, progress=progress)
    more = Stopping()
    healed(home, tmp_path / "H", **LONG, progress=more)
    assert more.passes == 48 - 2 * (1 + 4 + 3), "after 1, 4 and 3 whole steps"
    assert (tmp_path / "H/model.safetensors").read_bytes() == unbroken(None)


def test_an_interrupt_in_the_last_step_is_not_lost(home, tmp_path, unbroken):
    with pytest.raises(KeyboardInterrupt):
        healed(home, tmp_path / "H", **LONG, progress=Stopping(48))
    assert not (tmp_path / "H").exists()
    more = Stopping()
    healed(home, tmp_path / "H", **LONG, progress=more)
    assert more.passes == 0
    assert (tmp_path / "H/model.safetensors").read_bytes() == unbroken(None)


@pytest.mark.parametrize("title", ["writing the checkpoint", "generating"])
def test_a_run_that_is_stopped_after_its_training_does_not_train_again(
    home, tmp_path, unbroken, monkeypatch, title
):
    """Through the verb, whose proof of the result ends with "generating"."""

    class After(Stopping):
        def stage(self, now, total):
            if now == title:
                raise KeyboardInterrupt
            return super().stage(now, total)

    def heal(progress, **how):
        text = [str(home / "mail.txt"), str(home / "code.txt")]
        how = {**SMALL, **LONG, "text": text, "prompts": ["none"], "progress": progress, **how}
        return sleb.heal(home / "OUT", home / "MODEL", tmp_path / "H", **how)

    monkeypatch.setattr(training, "BYTES_PER_SECOND", 1.0)  # too slow to save in between
    with pytest.raises(KeyboardInterrupt):
        heal(After(), save_every=0.0)
    assert [*tree(tmp_path)] == ["H.heal"]
    assert {name.partition("/")[0] for name in load_file(tmp_path / "H.heal")} == {"best"}
    more = Stopping()
    assert heal(more).record.healed.steps == 24
    assert (more.passes, more.total) == (0, 0)
    assert (tmp_path / "H/model.safetensors").read_bytes() == unbroken(None)
    assert not (tmp_path / "H.heal").exists()


def test_a_run_shorter_than_the_time_between_two_states_writes_none(home, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingState, "save", lambda *_: pytest.fail("written"))
    healed(home, tmp_path / "H")


def test_the_best_weights_so_far_survive_a_stop(home, tmp_path, monkeypatch):
    seen = scripted(monkeypatch, [0.09, 0.05, 0.06, 0.055] + [0.07] * 10)
    with pytest.raises(KeyboardInterrupt):
        healed(home, tmp_path / "H", progress=Stopping(3))
    assert len(seen) == 2
    done = healed(home, tmp_path / "H")
    assert done.best_step == 2
    for name, tensor in load_file(tmp_path / "H/model.safetensors").items():
        assert torch.equal(tensor, seen[0][name]), name


def test_a_second_interrupt_acts_at_once():
    with training.interruptible() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_state_of_other_settings_is_refused(home, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        healed(home, tmp_path / "H", progress=Stopping(3))
    before = (tmp_path / "H.heal").read_bytes()
    with pytest.raises(InputError, match="lr was"):
        healed(home, tmp_path / "H", lr=1e-3)
    with pytest.raises(InputError, match="windows was"):
        healed(home, tmp_path / "H", seed=1)
    assert (tmp_path / "H.heal").read_bytes() == before
    (tmp_path / "H.heal").write_bytes(before[:-9])
    with pytest.raises(DataError, match=r"H\.heal is damaged"):
        healed(home, tmp_path / "H")


def test_a_full_disk_leaves_nothing_half_written(home, tmp_path, monkeypatch):
    state = tmp_path / "H.heal"
    where = TrainingState(step=3, checks=((0, (1.5,)),), rates=((1e-6, 2.0),))
    where.save(state, {"lr": 1}, {"x": torch.ones(2)})
    before = tree(tmp_path)

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ResourceError, match=r"H\.heal"):
        TrainingState(step=4).save(state, {"lr": 1}, {"x": torch.ones(2)})
    assert tree(tmp_path) == before
    found, tensors = TrainingState.load(state, {"lr": 1})
    assert found == where
    assert torch.equal(tensors["x"], torch.ones(2))
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="10 kB free"):
        healed(home, tmp_path / "N")
    assert tree(tmp_path) == before


def test_where_memory_does_not_suffice_passes_are_half_as_large(home, tmp_path, monkeypatch):
    real, sizes = training.backward_kl, []

    def small(student, teacher, batch, known, hidden):
        sizes.append(batch.ids.numel())
        if batch.ids.numel() > 2 * 32:
            raise torch.OutOfMemoryError
        real(student, teacher, batch, known, hidden)

    healed(home, tmp_path / "A", **LONG | {"at_once": 2})
    monkeypatch.setattr(training, "backward_kl", small)
    healed(home, tmp_path / "B", **LONG | {"at_once": 8})
    assert sizes[:3] == [8 * 32, 4 * 32, 2 * 32]
    assert max(sizes[3:]) == 2 * 32, "and stay so"
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "AB")
    assert a == b
    monkeypatch.setattr(
        training, "backward_kl", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError)
    )
    with pytest.raises(ResourceError, match="--recompute"):
        healed(home, tmp_path / "C", **LONG)


@pytest.mark.parametrize("fails", [False, True])
def test_compiled_blocks_learn_the_same(home, tmp_path, unbroken, monkeypatch, caplog, fails):
    graphs = []

    def backend(graph, _):
        if fails:
            raise RuntimeError("no compiler")
        graphs.append(graph)
        return graph.forward

    fused = functools.partial(torch.compile, dynamic=True, backend=backend)
    monkeypatch.setattr(computing, "fuse", fused)
    monkeypatch.setattr(training.Training, "compiling", True)
    torch._dynamo.reset()
    done = healed(home, tmp_path / "H", **LONG)
    torch._dynamo.reset()
    assert done.compiled == (not fails)
    assert len(graphs) == (0 if fails else 2), "with gradients and without"
    assert ("no compiler" in caplog.text) == fails
    found = load_file(tmp_path / "H/model.safetensors")
    (tmp_path / "unbroken").write_bytes(unbroken(None))
    for name, tensor in load_file(tmp_path / "unbroken").items():
        assert torch.allclose(found[name], tensor, atol=0 if fails else 1e-4), name


@pytest.mark.slow
def test_states_of_eight_bits_on_the_model_s_own_weights_learn_and_go_on(home, tmp_path):
    how = {**LONG, "optimizer": "adamw-8bit", "dtype": "bfloat16", "lr": None}
    with pytest.raises(KeyboardInterrupt):
        healed(home, tmp_path / "H", **how, progress=Stopping(15))
    state = load_file(tmp_path / "H.heal")
    assert {name.partition("/")[0] for name in state} == {"best", "weight"}
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    done = healed(home, tmp_path / "H", **how)
    assert done.steps == 24
    assert done.overall.healed_divergence.value < 0.9 * done.overall.cut_divergence.value


def test_copies_in_the_machine_s_memory_learn_the_same_and_go_on(home, tmp_path):
    how = {**LONG, "dtype": "bfloat16"}
    wanted = healed(home, tmp_path / "D", **how)
    with pytest.raises(KeyboardInterrupt):
        healed(home, tmp_path / "H", **how, optimizer="adamw-host", progress=Stopping(15))
    kinds = {name.partition("/")[0] for name in load_file(tmp_path / "H.heal")}
    assert kinds == {"best", "weight", "step", "exp_avg", "exp_avg_sq"}
    found = healed(home, tmp_path / "H", **how, optimizer="adamw-host")
    for (step, mine), (other, its) in zip(found.checks, wanted.checks, strict=True):
        assert step == other
        assert mine == pytest.approx(its, rel=5e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-host", "adamw-8bit"])
def test_where_what_is_trained_lies(home, optimizer):
    """The model's weights on a device of their own: "meta", which has no values."""
    model = AutoModelForCausalLM.from_pretrained(home / "OUT", dtype=torch.bfloat16).to("meta")
    student = Student(model, Checkpoint.open(home / "OUT"), rank=None, seed=0, optimizer=optimizer)
    found = {(weight.device.type, weight.dtype) for weight in student.trained.values()}
    place = "cpu" if optimizer == "adamw-host" else "meta"
    assert found == {(place, torch.bfloat16 if optimizer == "adamw-8bit" else torch.float32)}
