"""What a plan changes of a model at one depth, in whatever files the model is stored."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Self

from sleb.checkpoints import gguf_repaired
from sleb.checkpoints.checkpoint import Checkpoint, read_shard, tensor_bytes
from sleb.core.errors import InputError, UnsupportedModel
from sleb.core.files import disk_errors
from sleb.core.plan import Plan, RepairRecord
from sleb.core.units import Unit, block_of, canonical, part_of, parts_in

if TYPE_CHECKING:
    from torch import Tensor


REPAIRED = "repaired.safetensors"
"""Beside a plan that is applied while its model is loaded: the repair's tensors alone."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model of ``blocks`` blocks without the units ``removed`` (sorted, original numbering).

    ``record`` is the plan's repair, if it is of this very cut. ``repair`` are its tensors on the
    CPU, by their names in the original checkpoint: their SHA-256 are those of the record, which is
    checked when a cut is made. It is None where there is no repair or its tensors are not at hand.
    ``rounded``: the tensors are those of a GGUF file that was written with the repair, which holds
    them quantized again.
    """

    blocks: int
    removed: tuple[int, ...]
    record: RepairRecord | None = field(default=None, repr=False)
    repair: Mapping[str, Tensor] | None = field(default=None, repr=False)
    rounded: bool = False

    def __post_init__(self) -> None:
        if self.record is None or self.repair is None or self.rounded:
            return
        for name, digest in self.record.tensors.items():
            tensor = self.repair.get(name)
            if tensor is None or hashlib.sha256(tensor_bytes(tensor)).hexdigest() != digest:
                raise InputError(
                    f"{name} is not the repaired tensor that the plan records; give the checkpoint "
                    "folder that was written with this plan"
                )

    @classmethod
    def of(
        cls,
        plan: Plan,
        depth: int | None = None,
        folder: str | Path | None = None,
        *,
        parts: bool = False,
    ) -> Self:
        """The cut by the first ``depth`` removals of ``plan``, or by all of them; with its repair's
        tensors, if it has one, from the repaired checkpoint in ``folder``, or as the repaired GGUF
        file that this is holds them. ``parts``: whether the caller can do without the attention or
        the MLP of a block.

        Raises:
            UnsupportedModel: parts of blocks are removed, and the caller cuts whole blocks.
            InputError: ``depth`` is outside the plan; or ``folder`` holds no checkpoint, or not the
                tensors that the plan records.
            DataError: the checkpoint is damaged.
        """
        removed = plan.at_depth(depth)
        if not parts and (refused := parts_in(removed)):
            raise UnsupportedModel(
                f"the plan removes parts of blocks ({refused[0]}), and this cuts whole blocks "
                "alone: use sleb.load(MODEL, plan=PLAN), sleb eval --plan, or sleb apply with a "
                "GGUF file or --format nemotron-nas (docs/units.md)"
            )
        record = plan.repair if removed == plan.removed else None
        cut = cls(blocks=plan.model.blocks, removed=removed, record=record)
        if record is not None and not record.tensors:  # a fit that changed nothing
            return replace(cut, repair={})
        if record is None or folder is None:
            return cut
        if (beside := Path(folder) / REPAIRED).is_file():
            return cut._checked(folder, read_repaired(beside, record))
        names = {name: cut.rename(name, block_prefix_of(name)) or "" for name in record.tensors}
        if Path(folder).suffix == ".gguf":
            found = gguf_repaired.read_repaired(Path(folder), record.tensors, names)
            return replace(cut, repair=found, rounded=True)
        if not (Path(folder) / "config.json").is_file():
            raise InputError(
                f"the plan is of a repaired cut, and {folder} holds no checkpoint with its "
                "tensors; give the folder that was written with this plan"
            )
        checkpoint, found = Checkpoint.open(folder), {}
        for name, new in names.items():
            if new not in checkpoint.tensors:
                raise InputError(
                    f"{folder} lacks {new or name}, a repaired tensor of the plan; give the folder "
                    "that was written with this plan"
                )
            found[name] = checkpoint.tensor(new)
        return cut._checked(folder, found)

    def _checked(self, folder: str | Path, found: Mapping[str, Tensor]) -> Self:
        """With the repair's tensors, which are from ``folder``."""
        try:
            return replace(self, repair=found)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None

    def with_repair(self, record: RepairRecord, tensors: Mapping[str, Tensor]) -> Self:
        """The same cut with a repair that was fitted to it.

        Raises:
            InputError: it was fitted to another cut, or the tensors are not those of ``record``.
        """
        if record.removed != self.removed:
            raise InputError(
                f"the repair is of a cut of blocks {list(record.removed)}, and this one is of "
                f"{list(self.removed)}"
            )
        return replace(self, record=record, repair=tensors)

    def without_repair(self) -> Self:
        """The same cut as a plain one."""
        return replace(self, record=None, repair=None)

    def check_whole(self, how: str) -> None:
        """Raise InputError, which says ``how`` to give them, if tensors of the repair lack."""
        if self.record is not None and self.repair is None:
            raise InputError(
                "the plan is of a repaired cut, and has only the hashes of the repaired tensors: "
                f"{how}"
            )

    @property
    def whole(self) -> tuple[int, ...]:
        """The blocks that go."""
        return tuple(unit for unit in self.removed if not part_of(unit))

    @property
    def parts(self) -> tuple[int, ...]:
        """The parts of blocks that go, by the blocks' numbers in the cut."""
        return tuple(
            Unit.of(self.kept.index(block_of(unit)), part_of(unit))
            for unit in parts_in(self.removed)
        )

    @property
    def kept(self) -> list[int]:
        """The blocks that stay, in order."""
        gone = frozenset(self.removed)
        return [block for block in range(self.blocks) if block not in gone]

    def rename(self, name: str, prefix: str) -> str | None:
        """What a tensor or module called ``name`` is called after the cut; None if it goes. Names
        of blocks are ``prefix``, their number, and a dot. Blocks numbered past the last
        (multi-token prediction) move down by the number removed."""
        if not name.startswith(prefix):
            return name
        match = re.match(r"(\d+)(\..*)", name[len(prefix) :], re.DOTALL)
        if not match:
            return name
        block = int(match[1])
        if block in self.removed:
            return None
        return f"{prefix}{block - sum(gone < block for gone in self.removed)}{match[2]}"

    def used(self, plan: Plan) -> Plan:
        """``plan`` as far as this cut uses it: its first removals, and the repair if it is made."""
        depths = range(len(plan.order) + 1)
        depth = next(d for d in depths if canonical(plan.order[:d]) == self.removed)
        order = plan.order[:depth]
        record = None if self.repair is None else self.record
        return plan.model_copy(update={"removed": self.removed, "order": order, "repair": record})


def written_with(plan: str | Path) -> Path:
    """What was written with the file ``plan``: the GGUF file that this lies beside, or its
    folder."""
    plan = Path(plan)
    beside = plan.with_name(plan.name.removesuffix(".plan.json") + ".gguf")
    return beside if plan.name.endswith(".plan.json") and beside.is_file() else plan.parent


def write_repaired(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a repair's tensors alone, by their names in the original checkpoint."""
    from safetensors.torch import save_file

    with disk_errors(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_repaired(path: Path, record: RepairRecord) -> dict[str, Tensor]:
    """The tensors of a repair that :func:`write_repaired` wrote.

    Raises:
        InputError: they are not all there, or it is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if lacking := sorted({*record.tensors} - {*file.keys()}):
                raise InputError(f"{path} lacks {lacking[0]}, a repaired tensor of the plan")
            return {name: file.get_tensor(name) for name in record.tensors}
    except SafetensorError as error:
        raise InputError(f"{path} is no file of repaired tensors: {error}") from None


def loaded_by_plan(folder: Path, plan: Plan, source: Checkpoint, prefix: str) -> Checkpoint:
    """The cut that is made of ``source`` while it is loaded by the plan in ``folder``, as if it
    were a checkpoint: tensors by the names that they then have, where they are stored; of removed
    parts of blocks as well. ``prefix``: see :meth:`Cut.rename`.

    Raises:
        InputError, DataError: the tensors of the plan's repair are not there.
    """
    cut = Cut.of(plan, folder=folder, parts=True)
    repaired = cut.record.tensors if cut.record else {}
    own = read_shard(folder / REPAIRED)[0] if repaired else {}
    tensors = {}
    for old, info in source.tensors.items():
        if (new := cut.rename(old, prefix)) is None:
            continue
        if old in repaired:
            tensors[new] = replace(own[old], file=folder / REPAIRED, key=old)
        else:
            tensors[new] = replace(info, file=source.file(old), key=info.key or old)
    return replace(source, path=folder, tensors=tensors)


def block_prefix_of(name: str) -> str:
    """What stands before the number of its block in a block tensor's name."""
    match = re.match(r"(.*?\.|)\d+\.", name)
    return match[1] if match else ""


def consecutive_runs(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted block ids as half-open ranges ``[start, stop)``, in order."""
    runs = itertools.groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0])
    ids = [[block for _, block in run] for _, run in runs]
    return [(run[0], run[-1] + 1) for run in ids]
