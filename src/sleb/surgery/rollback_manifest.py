"""The side-car ``OUT/rollback/`` and its list of contents. Needs no torch.

    rollback/rollback.json        this list: every file by name, with its SHA-256
    rollback/removed.safetensors  the removed blocks' tensors, and the originals of repaired ones
    rollback/tensors.tsv          name, dtype, shape and SHA-256 of every tensor of the original;
                                  its own SHA-256 is the fingerprint in the plan
    rollback/headers/SHARD.json   the header of each shard of the original, as it was stored
    rollback/files/               small files of the original that the cut rewrote or left out

A subfolder, since vLLM loads every ``*.safetensors`` that lies beside the config. It may come from
an untrusted place, so it is size-checked, schema-checked, and names in it cannot lead elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from typing_extensions import Self

from sleb.checkpoints.checkpoint import INDEX
from sleb.checkpoints.checksums import ROLLBACK
from sleb.core.errors import DataError, InputError, first_mistake
from sleb.core.plan import BlockId, Digest, Fingerprint, Plan, Text

FOLDER = ROLLBACK
MANIFEST = "rollback.json"
REMOVED = "removed.safetensors"
TENSORS = "tensors.tsv"
HEADERS = "headers/"
FILES = "files/"
TEMPLATES = "additional_chat_templates"
HEALED = "heal.json"
"""File of a checkpoint that was trained after the cut."""

# params.json is the config, number of blocks included, of another format; heal.json tells of
# another checkpoint's training
REWRITTEN = frozenset(
    {
        "config.json",
        "params.json",
        "README.md",
        "plan.json",
        "run.json",
        HEALED,
        "SHA256SUMS",
    }
)
"""Files beside the weights that a cut does not carry over as they are."""

MAX_BYTES = 4 * 2**20
SIDE_FILE = re.compile(
    rf"{REMOVED}|{TENSORS}|{HEADERS}[^/]+\.safetensors\.json"
    rf"|{FILES}({'|'.join(map(re.escape, sorted({*REWRITTEN, INDEX})))})"
)


def _plain(name: str) -> str:
    """A name of a file in a folder, or in its folder of chat templates; nothing that leads out."""
    parts = name.split("/")
    fits = len(name) <= 512 and len(parts) <= 8 and name.isprintable() and "\\" not in name
    if not fits or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name[:80]!r} is no name of a file in the folder")
    if name.startswith(".") or (len(parts) > 1 and parts[0] != TEMPLATES):
        raise ValueError(f"{name[:80]!r} is no file that a cut carries over")
    return name


def _carried(name: str) -> str:
    if name in REWRITTEN or name.endswith((".safetensors", INDEX)):
        raise ValueError(f"{name[:80]!r} is no file that a cut carries over")
    return _plain(name)


def _in_side_car(name: str) -> str:
    if not SIDE_FILE.fullmatch(name):
        raise ValueError(f"{name[:80]!r} is no file of a side-car")
    _plain(name.rpartition("/")[2])
    return name


def _written(name: str) -> str:
    if name not in ("config.json", "plan.json", INDEX):
        raise ValueError(f"{name[:80]!r} is no file that a cut writes")
    return name


def _shard(name: str) -> str:
    if "/" in name or not name.endswith(".safetensors"):
        raise ValueError(f"{name[:80]!r} is no name of a shard")
    return _plain(name)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a cut did: ``names`` of the tensors that stay, old to new, in which ``prefix`` begins
    those of blocks; those ``replaced`` (old names), and the files ``carried`` over."""

    prefix: str
    names: Mapping[str, str]
    replaced: Collection[str]
    carried: Sequence[str]


class Manifest(BaseModel):
    """rollback.json. ``model`` is the original, ``removed`` what the cut took from it, ``prefix``
    what its block tensors' names begin with, ``repaired`` the SHA-256 of each tensor that the cut
    changed, by its name in the original.

    SHA-256 of files: ``files`` in the side-car; ``carried`` from the original into OUT; ``written``
    into OUT by the cut; of ``shards`` of OUT, only the header.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: Fingerprint
    removed: tuple[BlockId, ...]
    prefix: Text
    repaired: dict[Text, Digest]
    files: dict[Annotated[str, AfterValidator(_in_side_car)], Digest]
    carried: dict[Annotated[str, AfterValidator(_carried)], Digest]
    written: dict[Annotated[str, AfterValidator(_written)], Digest]
    shards: dict[Annotated[str, AfterValidator(_shard)], Digest]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        needed = {REMOVED, TENSORS, f"{FILES}config.json"}
        if lacking := sorted(needed - set(self.files)):
            raise ValueError(f"it lists no {lacking[0]}")
        if not any(name.startswith(HEADERS) for name in self.files):
            raise ValueError("it lists no headers")
        if not self.shards or not {"config.json", "plan.json"} <= set(self.written):
            raise ValueError("it does not list the cut's own files")
        return self

    def to_json(self) -> str:
        """Indented JSON."""
        return self.model_dump_json(indent=1) + "\n"

    def check_plan(self, plan: Plan, folder: Path) -> None:
        """Raise InputError unless this is the side-car of the cut that ``plan`` made."""
        repaired = plan.repair.tensors if plan.repair else {}
        what = None
        if self.model != plan.model:
            what = "of another model"
        elif self.removed != plan.removed:
            what = f"of the cut of blocks {list(self.removed)}, not of {list(plan.removed)}"
        elif self.repaired != repaired:
            what = "of another repair of this cut"
        if what:
            raise InputError(
                f"{folder} is {what}, so it does not belong to this checkpoint's plan.json; put "
                "back the folder that was written with it"
            )

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read and check rollback.json.

        Raises:
            DataError: too large, not JSON, another schema version, or inconsistent.
        """
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is larger than {MAX_BYTES >> 20} MiB: no list of a side-car")
        raw = path.read_bytes()
        try:
            found = cls.model_validate_json(raw, strict=True)
        except ValidationError as error:
            raise DataError(f"{path} is damaged: {first_mistake(error)}") from None
        if raw != found.to_json().encode():
            raise DataError(f"{path} is damaged: it is not as sleb wrote it")
        return found
