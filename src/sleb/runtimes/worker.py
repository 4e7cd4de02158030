"""One model of one runtime in a process of its own, and the protocol by which it is asked.

So load time and memory are this model's alone, several models are resident and take turns, a
process that the system kills takes nothing with it, and a runtime can be asked that only another
interpreter has. Requests and answers are lines of JSON on the child's standard streams; all else
that libraries print goes to a file. The child answers these requests (:class:`Session`):

    version     runtime                     the release that is there
    load        Settings                    attributes of Worker
    work        prompts, new_tokens, ...    Run
    logprobs    ids                         a list, of each token but the first
    add_draft   Settings, draft_tokens      nothing: one more model drafts for the first
    generate    ids, new_tokens, draft      greedy tokens, seconds, accepted tokens
"""

from __future__ import annotations

import gc
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sleb.core import errors
from sleb.core.errors import ResourceError, SlebError
from sleb.core.printable import printable
from sleb.runtimes.base import Prompts, Runtime, Settings, release
from sleb.runtimes.llama_cpp import LlamaCpp
from sleb.runtimes.mlx_lm import MLX
from sleb.runtimes.transformers import Transformers
from sleb.runtimes.vllm import VLLM

ADAPTERS: dict[str, type[Runtime]] = {
    "transformers": Transformers,
    "vllm": VLLM,
    "llama.cpp": LlamaCpp,
    "mlx-lm": MLX,
}
VERSION_S = 60.0
"""Seconds for an answer to ``version``: longer takes no interpreter to start."""
ANSWER_S = 6 * 3600.0
"""Seconds for any other answer: longer takes no model to load or to generate."""
WATCH_S = 0.001
MAX_LINE = 2**24
MAX_MESSAGE = 400  # characters of another library's message

# Isolated, so that no file of the working folder is taken for a module. This interpreter gets the
# parent's own path; another one finds sleb's files alone, and not the packages that lie beside them
_START = """
import json, sys, types
path, folder = json.loads(sys.argv[1])
if path: sys.path[:] = path
else:
    sys.modules["sleb"] = types.ModuleType("sleb")
    sys.modules["sleb"].__path__ = [folder]
import sleb.runtimes.worker as worker
worker.serve()
"""


class OutOfMemory(ResourceError):
    """The device or the system had no memory left, and said so; the process goes on."""


class Failed(RuntimeError):
    """Another library raised something, or the process ended; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Seconds of one run; bytes at its peak if it was watched, else 0."""

    seconds: float
    peak: int


# -- the parent's side -----------------------------------------------------------------------------


class Child:
    """A process that answers lines with lines.

    ``python``: another interpreter than this one.

    Raises:
        Failed: it does not run.
    """

    def __init__(self, python: str | None = None) -> None:
        path = json.dumps([[] if python else sys.path, str(Path(__file__).parents[1])])
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the child
        try:
            self._process = subprocess.Popen(
                [python or sys.executable, "-I", "-c", _START, path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )
        except OSError as error:
            self._log.close()
            raise Failed(f"{python} does not run: {error.strerror}") from None
        self.pid = self._process.pid

    def ask(self, line: str, seconds: float) -> str:
        """The answer to a line.

        Raises:
            ResourceError: the system killed the process.
            Failed: it ended by itself, or gave no line of sensible length within ``seconds``.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            stdin.write(line.encode() + b"\n")
            stdin.flush()
        answer, end = bytearray(), time.monotonic() + seconds
        while not answer.endswith(b"\n"):
            if not select.select([stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise Failed(f"its process gave no answer in {seconds:,.0f} seconds")
            part = os.read(stdout.fileno(), 2**16)
            if not part:
                raise self._ended()
            answer += part
            if len(answer) > MAX_LINE:
                raise Failed("its process answered something else than it was asked for")
        return answer.decode("utf-8", "replace")

    def close(self) -> None:
        """End the process; it has nothing to save."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream:
                with suppress(BrokenPipeError):  # a request that it did not live to read
                    stream.close()

    def _ended(self) -> Exception:
        code = self._process.wait()
        if code in (-9, 137):
            return ResourceError(
                "the system killed its process, most likely for want of memory; use fewer models "
                "at a time, --quick or --dtype bfloat16"
            )
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        last = printable(lines[-1], MAX_MESSAGE) if lines else "silence"
        return Failed(f"its process ended with {code}: {last}")


class Worker:
    """A child with at most one model, called ``name`` in messages; the first of its attributes are
    known once that is loaded.

    Every request raises:
        OutOfMemory: the model does not fit.
        ResourceError: the system killed the process.
        Failed: anything that another library raised, or an answer that is none.
        SlebError: as :func:`sleb.load`.
    """

    load_seconds: float
    """With the model's files in the page cache, and without imports."""
    fewest_blocks: int | None
    parameters: int | None
    """As those of :class:`sleb.runtimes.base.Runtime`."""
    threads: int
    device: str

    def __init__(self, name: str, python: str | None = None) -> None:
        self.name = name
        self._child = Child(python)

    def load(self, settings: Settings) -> None:
        """Load the model."""
        for name, value in self.ask("load", {"settings": asdict(settings)}).items():
            setattr(self, name, value)

    def work(
        self, prompts: Prompts, new_tokens: int, *, fewest: bool = False, watched: bool = False
    ) -> Run:
        """Read ``prompts`` and generate, once; ``fewest``: with :attr:`fewest_blocks` alone.
        Watching memory costs time."""
        given = {"prompts": prompts, "new_tokens": new_tokens, "fewest": fewest}
        return Run(**self.ask("work", {**given, "watched": watched}))

    def ask(self, request: str, given: Mapping[str, Any], limit: float = ANSWER_S) -> Any:
        """The answer to any request, within ``limit`` seconds."""
        try:
            line = self._child.ask(json.dumps({"request": request, **given}), limit)
            answer = json.loads(line)
        except ResourceError as error:
            raise ResourceError(f"{self.name}: {error}") from None
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict) and "answer" in answer:
            return answer["answer"]
        if isinstance(answer, dict) and {"error", "message"} <= set(answer):
            raise _raised(self.name, str(answer["error"]), str(answer["message"]))
        raise Failed("its process answered something else than it was asked for")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._child.close()


def _raised(name: str, kind: str, message: str) -> Exception:
    """A child's error, as this process raises it."""
    if kind == OutOfMemory.__name__:
        return OutOfMemory(
            f"{name} does not fit in memory; try --dtype bfloat16, or a machine with more"
        )
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, SlebError):
        return known(message)
    return Failed(printable(message, MAX_MESSAGE))


# -- the child's side ------------------------------------------------------------------------------


def serve() -> None:
    """Answer every line of the standard input, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    session = Session()
    for line in sys.stdin:
        answers.write(session.answer(line) + "\n")
        answers.flush()
    os._exit(0)  # a runtime's threads may outlive it


class Session:
    """The model of a child. Requests are its own methods, or those of the model."""

    model: Any
    meter: Meter

    def answer(self, line: str) -> str:
        """The answer to a request, or the error that it met."""
        given = json.loads(line)
        request = given.pop("request")
        found: dict[str, Any]
        try:
            own: dict[str, Callable[..., Any]]
            own = {"version": release, "load": self._load, "work": self._work}
            call = own[request] if request in own else getattr(self.model, request)
            found = {"answer": call(**given)}
        except Exception as error:  # it is raised again on the other side
            traceback.print_exc()
            found = _described(error)
        # the exception is gone now, and with it the tensors of its frames
        if "error" in found:
            _free()
        return json.dumps(found)

    def _load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The attributes of :class:`Worker`."""
        given = Settings(**settings)
        adapter = ADAPTERS[given.runtime]
        if given.purpose == "score":
            self.model = adapter(given)
            return {}
        import torch

        if given.threads:
            torch.set_num_threads(given.threads)
        adapter.prepare(given)
        _read_ahead(Path(given.path))
        self.meter = Meter(given.device)
        start = time.perf_counter()
        self.model = adapter(given)
        spent = time.perf_counter() - start
        on_gpu = given.device.startswith("cuda")
        return {
            "load_seconds": spent,
            "fewest_blocks": self.model.fewest_blocks,
            "parameters": self.model.parameters,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(given.device) if on_gpu else given.device,
        }

    def _work(
        self, prompts: Prompts, new_tokens: int, fewest: bool, watched: bool
    ) -> dict[str, Any]:
        """The fields of :class:`Run`."""
        work, peak = self.model.work(prompts, new_tokens, fewest), [0]
        start = time.perf_counter()
        with self.meter.watching(self.model.memory) if watched else nullcontext(peak) as peak:
            work()
        return {"seconds": time.perf_counter() - start, "peak": peak[0]}


class Meter:
    """The most memory in use while something runs, in bytes beyond what the process held before
    the model was loaded. On a GPU, as torch's allocator counts it, without the context of CUDA;
    else resident memory, looked at every millisecond."""

    def __init__(self, device: str) -> None:
        import psutil

        self.cuda = device if device.startswith("cuda") else None
        self.process = psutil.Process()
        gc.collect()
        self.base = self.process.memory_info().rss

    @contextmanager
    def watching(self, memory: Callable[[], int | None]) -> Iterator[list[int]]:
        """Fills the list that it gives with one number at the end."""
        seen: list[int] = []
        if self.cuda and memory() is None:
            import torch

            torch.cuda.reset_peak_memory_stats(self.cuda)
            yield seen
            seen.append(int(torch.cuda.max_memory_allocated(self.cuda)))
            return
        most, done = 0, threading.Event()

        def look() -> None:
            nonlocal most
            while True:
                now = memory()
                most = max(most, self.process.memory_info().rss - self.base if now is None else now)
                if done.wait(WATCH_S):
                    return

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield seen
        finally:
            done.set()
            watcher.join()
            seen.append(most)


def _read_ahead(path: Path) -> None:
    """Bring weights into the page cache, so that load times do not depend on who came first."""
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            while stream.read(2**24):
                pass


def _described(error: Exception) -> dict[str, str]:
    """An error as the parent will know it: its kind, and what it says on one line."""
    line = " ".join(str(error).split())
    words = ("out of memory", "allocate memory", "does not fit on")
    kind = type(error).__name__
    if isinstance(error, SlebError) and not isinstance(error, ResourceError):
        return {"error": kind, "message": line}
    if isinstance(error, MemoryError) or any(word in line.lower() for word in words):
        return {"error": OutOfMemory.__name__, "message": line}
    if isinstance(error, SlebError):
        return {"error": kind, "message": line}
    return {"error": Failed.__name__, "message": f"{kind}: {line or kind}"}


def _free() -> None:
    gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.empty_cache()
