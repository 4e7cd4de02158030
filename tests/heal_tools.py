"""A small cut model with texts, healing it, and stopping that."""

import json
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sleb
from conftest import save_tiny
from sleb.calibration.windows import Windows, written_source
from sleb.core.plan import Calibration
from sleb.core.process_group import joined
from sleb.distillation import heal, training

CPU = {"device": "cpu", "dtype": "float32"}
SMALL = {**CPU, "tokens": 3072, "length": 32, "lr": 3e-3, "heldout": 8, "batch": 8}


def cut_model(folder: Path, dtype: torch.dtype | None = None, **options) -> Path:
    model = save_tiny(folder / "MODEL", **options)
    if dtype:
        for shard in model.glob("*.safetensors"):
            stored = {name: tensor.to(dtype) for name, tensor in load_file(shard).items()}
            save_file(stored, shard, metadata={"format": "pt"})
        config = json.loads((model / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (model / "config.json").write_text(json.dumps(config))
    plan = sleb.search(model, remove=2, windows=4, length=16, **CPU)
    sleb.apply(plan, model, folder / "OUT")
    words = "the block of a model passes its input through and nothing is lost "
    (folder / "mail.txt").write_text((words * 200)[:12_000])
    (folder / "code.txt").write_text("".join(f"def f{i}(x): return x + {i}\n" for i in range(300)))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """``MODEL``, ``OUT`` without 2 of its 6 blocks, and two texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLEB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield cut_model(tmp_path_factory.mktemp("heal"))


def healed(home: Path, out: Path, **options):
    texts = [str(home / "mail.txt"), str(home / "code.txt")]
    return heal(home / "OUT", home / "MODEL", out, **{"text": texts, **SMALL, **options})


class Stopping:
    """A progress that does ``action`` at the ``at``-th pass of training, and counts them."""

    def __init__(self, at: int = -1, action=lambda: signal.raise_signal(signal.SIGINT)) -> None:
        self.at, self.action, self.passes, self.total = at, action, 0, None

    @contextmanager
    def stage(self, title, total):
        def tick(n=1, note=""):
            if title == "healing":
                self.passes += 1
                if self.passes == self.at:
                    self.action()

        if title == "healing":
            self.total = total
        yield tick


def scripted(monkeypatch, values):
    """Validation divergences of the start and of each check, in place of measured ones; and the
    weights at each check."""
    seen, script = [], iter(values)

    def measured(self, judges):
        found = next(script)
        if self.where.step:
            seen.append({n: p.detach().clone() for n, p in self.split.model.named_parameters()})
        return (found,) if isinstance(found, float) else found

    monkeypatch.setattr(training.Training, "_divergences", measured)
    return seen


def windows_of(ids, scored=None):
    """Token ids as windows."""
    record = written_source("test", ids, ids.numel())
    calibration = Calibration(
        sources=(record,), windows=len(ids), length=ids.shape[1], seed=0, sha256="0" * 64
    )
    return Windows(
        ids=ids, source=(0,) * len(ids), names=("test",), record=calibration, scored=scored
    )


IN_PARALLEL = {"local_first": True, "lr": None, "at_once": 1}


def stopped_by_one(home: Path, out: Path) -> None:
    """In a job: heal, of which the second process alone is told to stop."""
    torch.set_num_threads(1)
    with joined() as here:
        try:
            healed(home, out, **IN_PARALLEL, progress=Stopping(5 if here.rank == 1 else -1))
        except KeyboardInterrupt:
            sys.stdout.write("stopped\n")


if __name__ == "__main__":
    stopped_by_one(*map(Path, sys.argv[1:]))
