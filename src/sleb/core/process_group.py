"""The process group: several processes, as torchrun or accelerate launch start them.

Every process ("rank") runs the same command. Work is sharded, results are gathered, and each rank
takes the same decisions from the same numbers; only the main process writes and prints.

    with joined():                 # the command line does this; a program of yours may
        plan = sleb.search(...)    # the same plan on every rank

Small results are gathered through gloo even where models are on GPUs: a rank that has died then
shows at once as a broken connection. NCCL, used for tensors on GPUs, would wait for its timeout.
That, errors that are raised on all ranks, and bytes in place of pickles are why this is not
accelerate's ``PartialState``; see docs/architecture.md.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from sleb.core import errors
from sleb.core.errors import InputError, ResourceError, SlebError

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=6)
"""Of a rank that lives and does not take part: longer than any one step of work."""

_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


class Lost(ResourceError):
    """Another process of the job has ended, or cannot be reached."""


class Failed(SlebError):
    """Another process of the job met an error that is none of sleb's own."""


class Group:
    """The ranks of a job; this one is ``rank`` of ``size``. A job of one process needs no setup,
    and nothing here costs it anything.

    With tensor parallelism, ``tp`` neighbouring processes hold one model together. They count as
    one rank and compute the same numbers. ``local_rank`` of ``local_size`` counts the processes of
    this machine.
    """

    rank = 0
    size = 1
    tp = 1
    local_rank = 0
    local_size = 1
    mesh: DeviceMesh | None = None

    def __init__(self, store: Store | None = None) -> None:
        self._store = store
        self._broadcasts = 0
        self._ranks: ProcessGroup | None = None  # one process of each rank; None: all
        if store is None:
            return
        from torch import distributed

        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self._store is None or self._process == 0

    @property
    def several(self) -> bool:
        """Whether the job has more than one process."""
        return self._store is not None

    @property
    def _process(self) -> int:
        from torch import distributed

        return distributed.get_rank()

    def split(self, tp: int, device: str) -> None:
        """Have every ``tp`` neighbouring processes hold one model together, on ``device``s of a
        type.

        Raises:
            InputError: the job does not have a multiple of ``tp`` processes.
        """
        if tp == self.tp:
            return
        world = self.size * self.tp
        if self._store is None or world % tp:
            raise InputError(
                f"--tp {tp} needs {tp} processes, or a multiple, and this job has {world}: start "
                f"it with torchrun --nproc-per-node {tp} -m sleb ..."
            )
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device, (world // tp, tp), mesh_dim_names=("data", "tensor"))
        self.mesh, self._ranks = mesh["tensor"], mesh["data"].get_group()
        self.tp, self.size, self.rank = tp, world // tp, self._process // tp

    # -- exchanging ----------------------------------------------------------------------------

    def exchange(self, mine: bytes) -> list[bytes]:
        """What every rank has, in order.

        Raises:
            Lost: one of them cannot be reached.
        """
        if self._store is None:
            return [mine]
        import torch
        from torch import distributed

        world = self.size * self.tp
        with _lost_ranks():
            counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
            distributed.all_gather(counts, torch.tensor([len(mine)]))
            most = max(1, *(int(n) for n in counts))
            padded = torch.frombuffer(bytearray(mine.ljust(most, b"\0")), dtype=torch.uint8)
            found = [torch.empty(most, dtype=torch.uint8) for _ in range(world)]
            distributed.all_gather(found, padded)
        whole = zip(found, counts, strict=True)
        return [f.numpy().tobytes()[: int(n)] for f, n in whole][:: self.tp]

    def sum_(self, *tensors: Tensor) -> None:
        """Replace tensors by their sums over all ranks, to rounding those of one process. What
        decides should be :meth:`from_first_`.

        Raises:
            Lost: a rank cannot be reached.
        """
        if self._store is None or self.size == 1:
            return
        from torch import distributed

        with _lost_ranks():
            for tensor in tensors:
                distributed.all_reduce(tensor, group=self._ranks)

    def from_first_(self, tensor: Tensor) -> None:
        """Replace a tensor by the first rank's.

        Raises:
            Lost: a rank cannot be reached.
        """
        if self._store is None:
            return
        from torch import distributed

        with _lost_ranks():
            distributed.broadcast(tensor, 0)

    def all_or_raise(self, work: Callable[[], T]) -> T:
        """``work()``, which may fail on some ranks: then all raise, those that did not fail the
        error of the first that did.

        Raises:
            Lost: a rank cannot be reached.
        """
        if self._store is None:
            return work()
        mine: Exception | None = None
        found: list[T] = []
        try:
            found.append(work())
        except Exception as error:
            mine = error
        errors_by_rank = self.exchange(b"" if mine is None else _serialized(mine))
        if mine is not None:
            raise mine
        for text in errors_by_rank:
            if text:
                raise _deserialized(text)
        return found[0]

    def sequentially(self, work: Callable[[], T]) -> T:
        """``work()`` on one process of each machine, and then on its others, which find in a cache
        what the first has left there. Errors are raised on all ranks."""
        if self._store is None:
            return work()
        leads = self.local_rank == 0
        mine = self.all_or_raise(work if leads else lambda: None)
        others = self.all_or_raise((lambda: None) if leads else work)
        return mine if leads else others  # type: ignore[return-value]

    def broadcast_from_main(self, work: Callable[[], str]) -> str:
        """What ``work()`` gives on the first process, on all of them. It is done as by one process,
        and the others wait for as long as it takes; an error is raised on all."""
        if self._store is None:
            return work()
        key, self._broadcasts = f"broadcast {self._broadcasts}", self._broadcasts + 1
        text = ""
        if self.is_main:
            try:
                with _outside_group():
                    text = work()
            except Exception as error:
                self._store.set(key, _serialized(error).decode())
                raise
            self._store.set(key, "-")
        else:
            with _lost_ranks():
                while not self._store.check([key]):
                    time.sleep(0.1)  # not in one long call, which no signal could end
                if (failure := self._store.get(key)) != b"-":
                    raise _deserialized(failure)
        return self.exchange(text.encode())[0].decode()

    def reports_errors(self) -> bool:
        """See :func:`reports_errors`."""
        if self._store is None:
            return True
        try:
            return self._store.add("reported", 1) == 1
        except RuntimeError:  # the store has gone with its process
            return True


_SINGLE = Group()
_current = _last = _SINGLE


def group() -> Group:
    """The job that this process belongs to now."""
    return _current


def reports_errors() -> bool:
    """Whether this process may say how its job, which may have ended, did so: the first that asks
    may, so that one line is said and not one by each."""
    return _last.reports_errors()


def launched() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """Join the job that torchrun, or accelerate launch, has started this process for; without one,
    a group of one.

    Raises:
        InputError: the environment is of a job, but says not which process this is.
        Lost: the others do not come.
    """
    global _current, _last
    if not launched() or _current is not _SINGLE:
        yield _current
        return
    if missing := [name for name in _LAUNCH_VARIABLES if name not in os.environ]:
        raise InputError(
            f"WORLD_SIZE is set, but {', '.join(missing)} is not: start several processes with "
            "torchrun, or unset WORLD_SIZE"
        )
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "gloo"
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
    with _lost_ranks():
        store, rank, size = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        distributed.init_process_group(
            backend,
            store=PrefixStore("work", store),
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    _current = _last = Group(PrefixStore("sleb", store))
    try:
        yield _current
        distributed.destroy_process_group()  # after an error it could wait for who has gone
    finally:
        _current = _SINGLE


def leave_group() -> bool:
    """For work that one process does: leave the job, and tell whether this is the one. It looks
    then as if it had been started by itself, also to programs that it starts."""
    global _current
    first = _current.is_main
    _current = _SINGLE
    for name in (*_LAUNCH_VARIABLES, "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"):
        os.environ.pop(name, None)
    return first


@contextlib.contextmanager
def _outside_group() -> Iterator[None]:
    """Work that must not wait for other ranks, since these do not do it."""
    global _current
    before, _current = _current, _SINGLE
    try:
        yield
    finally:
        _current = before


def _lost_ranks() -> contextlib.AbstractContextManager[None]:
    """Errors of a collective operation as one line: torch.distributed raises RuntimeErrors."""
    why = f"another process of this job has ended or cannot be reached ({errors.SAID})"
    return errors.map_exceptions((RuntimeError, Lost, why))


def _serialized(error: Exception) -> bytes:
    return json.dumps([type(error).__name__, str(error)]).encode()


def _deserialized(text: bytes) -> SlebError:
    name, said = json.loads(text)
    kind: Any = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, SlebError):
        return kind(said)
    return Failed(f"another process of this job failed: {name}: {said}")
