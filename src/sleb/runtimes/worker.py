"""A model in a process of its own, which loads it and runs one case at a time when told to.

So load time and memory are this model's alone, several models are resident and take turns, and a
process that the system kills for want of memory takes nothing with it. Requests and answers are
lines of JSON on the child's standard streams; all else that it says goes to a file.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from typing_extensions import Self

from sleb.core import errors as errors
from sleb.core.errors import ResourceError, SlebError
from sleb.runtimes.adapters import Engine, Meter, Settings, engine

if TYPE_CHECKING:
    from sleb.runtimes.bench import Case

__all__ = ["Failed", "OutOfMemory", "Run", "Worker", "serve"]

# isolated, so that no file of the working folder is taken for a module; then the parent's own path
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import sleb.runtimes.worker as w"
_SAID = 300  # characters of another library's message


class OutOfMemory(ResourceError):
    """The device or the system had no memory left, and said so; the process goes on."""


class Failed(RuntimeError):
    """Another library raised something; the message is its last line."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Seconds of one run; bytes at its peak if it was watched, else 0."""

    seconds: float
    peak: int


class Worker:
    """A running child. ``load_seconds``: with its files in the page cache and without imports.
    ``kept`` as in :class:`sleb.runtimes.adapters.Engine`.

    Raises:
        OutOfMemory: the model does not fit.
        ResourceError: the system killed the process.
        Failed: anything that another library raised.
        SlebError: as :func:`sleb.load`.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the child
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-c", f"{_START}; w.serve()", json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
        )
        try:
            facts = self._ask(asdict(settings))
        except BaseException:
            self.close()
            raise
        self.load_seconds: float = facts["load_seconds"]
        self.kept: int | None = facts["kept"]
        self.threads: int = facts["threads"]
        self.device: str = facts["device"]

    def run(self, case: Case, *, shortened: bool = False, watched: bool = False) -> Run:
        """Run a case once; ``shortened`` with only :attr:`kept` blocks. Watching costs time."""
        request = {"case": asdict(case), "shortened": shortened, "watched": watched}
        return Run(**self._ask(request))

    def close(self) -> None:
        """End the process; it has nothing to save."""
        self._child.kill()
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout, self._log):
            if stream:
                with suppress(BrokenPipeError):  # a request that it did not live to read
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _raised(self.name, answer["error"], answer["message"])
        return answer

    def _ended(self) -> Exception:
        code = self._child.wait()
        if code in (-9, 137):
            return ResourceError(
                f"{self.name}: the system killed the process that ran it, most likely for want of "
                "memory; bench fewer models at a time, or use --quick or --dtype bfloat16"
            )
        self._log.seek(0)
        said = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return Failed(f"its process ended with {code}: {said[-1][:_SAID] if said else 'silence'}")


def _raised(name: str, kind: str, message: str) -> Exception:
    """A child's error, as this process raises it."""
    if kind == OutOfMemory.__name__:
        return OutOfMemory(
            f"{name} does not fit in memory; try --dtype bfloat16, or a machine with more"
        )
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, SlebError):
        return known(message)
    return Failed(message)


def serve() -> None:
    """The child: load what the first line asks for, then run what each further line does."""
    requests: Iterable[str] = sys.stdin
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(given: dict[str, Any]) -> None:
        answers.write(json.dumps(given) + "\n")
        answers.flush()

    model: Engine | None = None
    meter: Meter | None = None
    for line in requests:
        asked = json.loads(line)
        found: dict[str, Any]
        try:
            if model is None or meter is None:
                model, meter, found = _load(Settings(**asked))
            else:
                found = _run(model, meter, **asked)
        except Exception as error:  # it is raised again on the other side
            traceback.print_exc()
            found = _described(error)
        # the exception is gone now, and with it the tensors of its frames
        if "error" in found:
            _free()
        answer(found)


def _load(settings: Settings) -> tuple[Engine, Meter, dict[str, Any]]:
    import torch

    if settings.threads:
        torch.set_num_threads(settings.threads)
    kind = engine(settings.runtime)
    kind.imports(settings)
    _read(Path(settings.path))
    meter = Meter(settings.device)
    start = time.perf_counter()
    model = kind(settings)
    spent = time.perf_counter() - start
    on_gpu = settings.device.startswith("cuda")
    return (
        model,
        meter,
        {
            "load_seconds": spent,
            "kept": model.kept,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(settings.device) if on_gpu else settings.device,
        },
    )


def _read(path: Path) -> None:
    """Bring weights into the page cache, so that load times do not depend on who came first."""
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with open(file, "rb") as stream:
            while stream.read(2**24):
                pass


def _run(
    model: Engine, meter: Meter, *, case: dict[str, Any], shortened: bool, watched: bool
) -> dict[str, Any]:
    from sleb.runtimes.bench import Case

    work = model.prepare(Case(**case), shortened)
    peak = 0
    start = time.perf_counter()
    if watched:
        with meter.watching(model.used) as seen:
            work()
        (peak,) = seen
    else:
        work()
    return {"seconds": time.perf_counter() - start, "peak": peak}


def _described(error: Exception) -> dict[str, Any]:
    """An error as the parent will know it: its kind, and what it says on one line."""
    said = (str(error).strip() or type(error).__name__).splitlines()[-1][:_SAID]
    if isinstance(error, SlebError) and not isinstance(error, ResourceError):
        return {"error": type(error).__name__, "message": str(error)}
    low = str(error).lower()
    words = ("out of memory", "allocate memory", "does not fit on")
    if isinstance(error, MemoryError) or any(word in low for word in words):
        return {"error": OutOfMemory.__name__, "message": said}
    if isinstance(error, SlebError):
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": "Failed", "message": f"{type(error).__name__}: {said}"}


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
