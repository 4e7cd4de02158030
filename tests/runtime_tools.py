"""Stand-ins for the tests of runtimes: children without a process, and runtimes that pretend."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from sleb.config import BenchConfig
from sleb.core.progress import silent
from sleb.runtimes.base import Settings
from sleb.runtimes.bench import Bench, BenchModel, Case
from sleb.runtimes.worker import OutOfMemory, Session

CPU = {"dtype": "float32", "device": "cpu", "threads": 1}
PROMPT = Case(name="prompt", batch=1, prompt_tokens=16, new_tokens=0)
WRITE = Case(name="generate-2", batch=2, prompt_tokens=8, new_tokens=12)
ALONE = Case(name="generate-1", batch=1, prompt_tokens=8, new_tokens=3)


def settings(path: Path, **changes) -> Settings:
    given = {"runtime": "transformers", "device": "cpu", "dtype": "float32", "length": 64}
    return Settings(path=str(path), **{**given, "threads": 1, "blocks": 6, "batch": 4, **changes})


class InProcess:
    """A child whose session is in this process."""

    def __init__(self, python: str | None = None) -> None:
        self.session = Session()

    def ask(self, line: str, seconds: float) -> str:
        return self.session.answer(line)

    def close(self) -> None:
        pass


class Costs:
    """A child that answers at once, with seconds that follow from its blocks: 1 for all else, half
    a second a block. It writes down who ran when, as (blocks, case tokens, fewest, watched)."""

    log: ClassVar[list[tuple[int, int, bool, bool]]] = []
    loaded: ClassVar[list[dict]] = []
    full: ClassVar[set[tuple[int, int]]] = set()
    """(blocks, tokens) for which there is no memory."""
    at_load: ClassVar[int | None] = None
    """As many fit in memory at once."""
    live: ClassVar[int] = 0
    fails: ClassVar[dict[str, str]] = {}
    """Another library's words, by runtime; under ``fewest`` those of a pass with fewest blocks."""

    def __init__(self, python: str | None = None) -> None:
        self.live_now = False

    def ask(self, line: str, seconds: float) -> str:
        given = json.loads(line)
        request = given.pop("request")
        try:
            return json.dumps({"answer": getattr(self, request)(**given)})
        except OutOfMemory:
            return json.dumps({"error": "OutOfMemory", "message": ""})
        except RuntimeError as error:
            return json.dumps({"error": "Failed", "message": str(error)})

    def load(self, settings: dict) -> dict:
        if Costs.at_load is not None and Costs.live >= Costs.at_load:
            raise OutOfMemory
        if settings["runtime"] in Costs.fails:
            raise RuntimeError(Costs.fails[settings["runtime"]])
        Costs.live, self.live_now = Costs.live + 1, True
        Costs.loaded.append(settings)
        self.blocks = settings["blocks"]
        return {"load_seconds": 0.5, "fewest_blocks": 2, "threads": 3, "device": "cpu"}

    def work(self, prompts, new_tokens: int, fewest: bool, watched: bool) -> dict:
        tokens = len(prompts) * len(prompts[0])
        Costs.log.append((self.blocks, tokens, fewest, watched))
        if (self.blocks, tokens) in Costs.full:
            raise OutOfMemory
        if fewest and "fewest" in Costs.fails:
            raise RuntimeError(Costs.fails["fewest"])
        blocks = 2 if fewest else self.blocks
        # a first run is as slow as first runs are
        slow = 100.0 if watched else 1.0
        return {"seconds": (1 + blocks / 2) * slow, "peak": 1000 * blocks if watched else 0}

    def close(self) -> None:
        Costs.live -= self.live_now


def bench_model(ref: str, blocks: int, **changes) -> BenchModel:
    given = {"parameters": 10 * blocks, "nbytes": 20 * blocks, "vocabulary": 259, "longest": 256}
    given |= {"path": Path(ref), "config": None, "gguf": None}
    return BenchModel(ref=ref, blocks=blocks, **{**given, **changes})


def bench_of(*models: BenchModel, runs: int = 6, runtime: str = "transformers", note=None) -> Bench:
    config = BenchConfig(runs=runs, **CPU)
    note = note or (lambda skipped: pytest.fail(str(skipped)))
    return Bench(models=models, runtime=runtime, config=config, note=note, progress=silent)


MODELS = (bench_model("dense", 10), bench_model("pruned", 8))

VLLM = """
import json, os
from pathlib import Path
print("a line that is no answer", flush=True)
class Made:
    def __init__(self, **given): self.__dict__.update(given)
class SamplingParams(Made): pass
class LLM:
    def __init__(self, model, dtype, max_model_len, **options):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert options["enable_prefix_caching"] is False and "gpu_memory_utilization" not in options
        self.longest, known = max_model_len, Path(model) / "oracle.json"
        self.known = json.loads(known.read_text()) if known.is_file() else {}
        if "says" in self.known: raise RuntimeError(self.known["says"])
        if "dies" in self.known: raise SystemExit(7)
    def generate(self, prompts, asked, use_tqdm):
        assert asked.temperature == 0 and not asked.detokenize
        return [self.answer(prompt["prompt_token_ids"], asked) for prompt in prompts]
    def answer(self, ids, asked):
        assert len(ids) + asked.max_tokens <= self.longest
        if not hasattr(asked, "prompt_logprobs"):
            assert asked.ignore_eos
            return Made(outputs=[Made(token_ids=[0] * asked.max_tokens)])
        assert asked.prompt_logprobs == 0 and ids == self.known["ids"]
        pairs = zip(ids[1:], self.known["logprobs"])
        return Made(prompt_logprobs=[None, *({i: Made(logprob=x)} for i, x in pairs)])
"""
LLAMA = """
import json, os
import numpy as np
print("a line that is no answer", flush=True)
def note(text):
    if "FAKE_LOG" in os.environ:
        with open(os.environ["FAKE_LOG"], "a") as stream: stream.write(text + "\\n")
def llama_supports_gpu_offload(): return False
class Llama:
    def __init__(self, model_path, n_ctx, n_gpu_layers, logits_all, **rest):
        assert n_gpu_layers == 0
        self.known, self.all, self.length = json.loads(open(model_path).read()), logits_all, n_ctx
        blocks = self.known.get("blocks", 0)
        self.metadata = {"general.architecture": "llama", "llama.block_count": blocks}
        note(f"load {blocks} {n_ctx}")
    def reset(self): note("reset")
    def sample(self, temp): return 7
    def eval(self, ids):
        note(f"eval {len(ids)}")
        assert len(ids) <= self.length
        if not self.all: return
        assert ids == self.known["ids"]
        self.scores = np.full((len(ids), 259), -np.inf)
        for i, (token, x) in enumerate(zip(ids[1:], self.known["logprobs"])):
            self.scores[i, token] = 5 + x
            self.scores[i, token - 1] = 5 + np.log1p(-np.exp(x))
"""


@contextmanager
def pretending(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Modules that pretend to be vLLM and llama.cpp, for this process and its children: their
    answers are in oracle.json beside a checkpoint, and in the file that would be a .gguf."""
    folder.mkdir()
    for name, text in {"vllm": VLLM, "llama_cpp": LLAMA}.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield patch
    for name in ("vllm", "llama_cpp"):
        sys.modules.pop(name, None)


def next_logprobs(
    python: str, files: Sequence[Path], prompts: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Log-probabilities [prompts, vocabulary] of what comes next, of GGUF files in llama.cpp, as
    the interpreter ``python`` has it (xllamacpp)."""
    asked = json.dumps({"files": [str(file) for file in files], "prompts": prompts})
    script = str(Path(__file__).with_name("llama_next.py"))
    done = subprocess.run(
        [python, script], input=asked, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [
        np.array([[prompt[str(i)] for i in range(len(prompt))] for prompt in file])
        for file in json.loads(done.stdout)
    ]
