"""What a run will take, by the work that it then does."""

from contextlib import contextmanager

import pytest

import sleb
from sleb import estimates

SETTINGS = {"windows": 8, "length": 32, "heldout": 4, "repair_tokens": 2000, "prompts": ["none"]}


class Heard:
    """A progress that keeps the estimate, and the units of each stage."""

    def __init__(self):
        self.seconds, self.ticks = {}, {}

    def tell(self, what):
        if isinstance(what, estimates.Estimate):
            self.seconds = {phase.name: phase.seconds for phase in what.phases}

    @contextmanager
    def stage(self, title, total):
        def tick(n=1, note=""):
            self.ticks[title] = self.ticks.get(title, 0) + n

        yield tick


@pytest.mark.parametrize("removed", [1, 2])
def test_the_work_that_is_foretold_is_done(learned, tmp_path, monkeypatch, removed):
    """In block forwards of a window, as the stages count them: a second per token of a pass is one
    for each of 6 blocks."""
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    speed = estimates.Speed(blocks=6 / SETTINGS["length"], head=0.0, written=0.0, alone=0.0)
    monkeypatch.setattr(estimates.Speed, "of", lambda *_: speed)
    heard, text = Heard(), [str(learned / "text.txt")]
    where = {"text": text, "device": "cpu", "dtype": "float32", "progress": heard}
    where |= {"strategy": "greedy", "exact": True}  # else it depends on what is found
    sleb.prune(learned / "model", tmp_path / "out", remove=removed, **SETTINGS, **where)
    search, repair = heard.seconds[estimates.SEARCH], heard.seconds[estimates.REPAIR]
    assert 1 / 2.5 < search / heard.ticks["searching"] < 2.5
    # up to three ridges are tried, and sums of products are no block forwards
    assert 1 / 2 < repair / heard.ticks["repairing"] < 4


def test_a_pass_is_timed_in_its_parts(loaded_learned):
    """Blocks, head and writing: a second way through the blocks takes longer than none."""
    speed = estimates.Speed.of(loaded_learned, 32)
    assert min(speed.blocks, speed.head, speed.written) > 0
    assert speed.alone > speed.written, "a token alone costs what the whole batch does, nearly"
