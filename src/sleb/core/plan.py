"""The plan: which blocks to remove, in which order, and the evidence for it. Needs no torch.

A plan is small, diffable JSON that may come from an untrusted place: it is size-checked before it
is parsed and schema-checked before it is used. Block ids are always the original numbering, and
attention or MLP alone are named by block, ``"12.attention"``.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from typing_extensions import Self

from sleb.core.errors import InputError, first_mistake
from sleb.core.files import write_text
from sleb.core.printable import paragraphs
from sleb.core.tabular import Points, Tabular
from sleb.core.units import MAX_BLOCKS, UnitId, block_of, canonical, parts_in

MAX_BYTES = 32 * 2**20
SCHEMA: Literal[3] = 3

BlockId = Annotated[int, Field(ge=0, lt=MAX_BLOCKS)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    """Frozen, strict about its fields, and without NaN or infinity."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        defer_build=True,  # most that imports this takes one class of it, and no plan
    )


class Fingerprint(_Record):
    """Identity of a checkpoint, independent of its file layout.

    ``config_sha256`` covers the fields that shape the computation; ``weights_sha256`` covers every
    tensor's name, dtype, shape and bytes.
    """

    model_type: Text
    architecture: Text
    blocks: Annotated[int, Field(ge=1, lt=MAX_BLOCKS)]
    config_sha256: Digest
    weights_sha256: Digest


class Origin(_Record):
    """Where on the hub a checkpoint is from: the repository, and the commit."""

    repository: Text
    revision: Text

    @classmethod
    def of(cls, folder: Path) -> Self | None:
        """The origin of ``folder`` in the hub's cache, ``models--OWNER--NAME/snapshots/COMMIT``;
        None for another folder."""
        commit = folder.absolute()
        home = commit.parents[1].name if len(commit.parents) > 1 else ""
        if commit.parent.name != "snapshots" or not home.startswith("models--"):
            return None
        repository = home.removeprefix("models--").replace("--", "/", 1)
        return cls(repository=repository, revision=commit.name)


ANSWERS_TO = "answers to "
"""What the ``spec`` of the model's own answers begins with; then come the files of prompts."""


class SourceRecord(_Record):
    """One calibration text: where it came from, its content hash, and what was used of it."""

    spec: Text
    sha256: Digest
    documents: Count
    tokens: Count
    windows: Count


class Calibration(_Record):
    """The token windows that were scored. ``sha256`` covers the token ids themselves."""

    sources: tuple[SourceRecord, ...]
    windows: Annotated[int, Field(ge=1)]
    length: Annotated[int, Field(ge=2)]
    seed: int
    sha256: Digest


class Score(_Record):
    """A candidate's mean score and its standard error over windows.

    ``excess_se`` is the standard error of the paired difference to the round's best candidate; it
    is what decides whether two candidates can be told apart, and is smaller than ``se`` because
    both saw the same windows. Standard errors are null where there was only one window. ``windows``
    is how many were scored before the candidate was out of the race.
    """

    block: UnitId
    mean: float
    se: float | None = None
    excess_se: float | None = None
    windows: Count | None = None


class Round(_Record):
    """One scoring of all live candidates, best first, and the blocks removed on its strength.

    ``within_noise``: whether the best candidate that stayed was as good as the last one removed, as
    far as these windows can tell; null without a rival.
    """

    removed: tuple[UnitId, ...]
    scores: tuple[Score, ...]
    within_noise: bool | None = None

    def choosing(self, *blocks: int) -> Round:
        """The same scoring with ``blocks`` removed on its strength."""
        chosen = Round(removed=blocks, scores=self.scores)
        rival = chosen.runner_up()
        return Round(
            removed=blocks, scores=self.scores, within_noise=None if rival is None else rival[2]
        )

    def runner_up(self) -> tuple[Score, float, bool] | None:
        """Best candidate not removed, its margin over the last one removed, and whether the
        margin is within noise (under two paired standard errors). None without a rival."""
        rest = [s for s in self.scores if s.block not in self.removed]
        if not rest or not self.scores:
            return None
        last = max((s for s in self.scores if s.block in self.removed), key=lambda s: s.mean)
        rival = min(rest, key=lambda s: s.mean)
        margin = rival.mean - last.mean
        return rival, margin, rival.excess_se is None or margin < 2 * rival.excess_se


def rounds_behind(rounds: tuple[Round, ...], order: tuple[int, ...]) -> tuple[Round, ...]:
    """The rounds behind ``order``, which may be shorter than what was found."""
    at_once = len(rounds) == 1 and set(order) <= set(rounds[0].removed)  # a run's has one name
    return (rounds[0].choosing(*order),) if at_once else rounds[: len(order)]


class Baseline(_Record):
    """The dense model's mean score and its standard error over windows."""

    mean: float
    se: float | None = None


class Finalist(_Record):
    """A set of blocks that a strategy ended with, and what it costs after a quick repair.

    ``increase``: of the mean loss over the dense model's, nats/token, and ``by_kind`` the same on
    texts and on answers, where both decided; ``excess``: over the best finalist's, with the
    standard error of that paired difference.
    """

    strategy: Text
    order: tuple[UnitId, ...]
    increase: float
    by_kind: Mapping[Text, float] = {}
    excess: float
    excess_se: float | None = None


class FinalComparison(_Record):
    """Sets that were compared at the end of a search by their loss after a quick repair, best
    first. ``fitted``: tokens that each repair saw; ``windows`` scored them, of which the model has
    written ``self_generated``, and ``answers`` to prompts. With answers the best set is that which
    loses least on them, of those that lose little more on texts than the one that is best there."""

    sets: Annotated[tuple[Finalist, ...], Field(min_length=2)]
    fitted: Count
    windows: Count
    self_generated: Count
    answers: Count = 0


class Saving(_Record):
    """What units were weighed by: the share that each saves of the ``time`` of a written token, the
    ``memory`` of the weights, or the bytes of the ``kv`` cache, measured where the search ran, with
    ``sequences`` texts of ``context`` tokens at once. ``shares``: by unit, in 0..1."""

    of: Literal["time", "memory", "kv"]
    context: Count
    sequences: Count
    shares: dict[Text, float] = {}

    def share(self, units: Collection[int]) -> float:
        """Of several units."""
        return sum(self.shares[str(unit)] for unit in canonical(units))


class SimilarityGate(_Record):
    """The similarity threshold that made some blocks candidates: stage one of the method."""

    measure: Text
    threshold: float
    candidates: tuple[BlockId, ...]


class Target(_Record):
    """What was asked for: ``remove`` (blocks), ``max-loss-increase`` (nats/token, held-out),
    ``keep-answers`` (share of the tokens of the dense model's answers),
    ``speedup`` (ratio, estimated) or ``size`` (bytes); and what the plan reaches of it."""

    kind: Literal["remove", "max-loss-increase", "keep-answers", "speedup", "size"]
    limit: float
    reached: float

    def told(self, value: float) -> str:
        """A limit, or what is reached, with its unit where that is bytes."""
        return f"{value / 1e6:.4g} MB" if self.kind == "size" else f"{value:.4g}"


class Point(_Record):
    """The model after ``depth`` removals, the last of which is ``block``.

    ``increase`` is the mean increase of the loss on held-out windows in nats/token, from ``low`` to
    ``high`` with 95 % confidence, and at most ``bound`` with 95 % (one-sided); all are paired with
    the dense model. ``nbytes``: weights on disk. ``speedup``: estimated for generation, where time
    goes into reading weights: bytes read per token, dense over pruned. It is a lower bound for
    reading prompts.
    """

    depth: Annotated[int, Field(ge=1)]
    block: UnitId
    increase: float
    low: float | None
    high: float | None
    bound: float | None
    nbytes: Count
    speedup: float


class Curve(_Record, Tabular):
    """Quality, size and speed by depth, on windows that took no part in the choice of blocks, as
    plain cuts, or each after a quick repair on ``fitted`` tokens."""

    heldout: Calibration
    baseline: Baseline
    fitted: Count | None = None
    points: tuple[Point, ...]

    def rows(self) -> list[dict[str, Any]]:
        """A row per depth."""
        names = ("depth", "block", "increase", "low", "high", "nbytes", "speedup")
        return [{name: getattr(point, name) for name in names} for point in self.points]

    def drawn(self) -> Points:
        """The increase of the held-out loss by depth."""
        found = self.points
        return Points(
            x=tuple(p.depth for p in found),
            y=tuple(p.increase for p in found),
            low=tuple(p.low for p in found),
            high=tuple(p.high for p in found),
            x_label="blocks removed",
            y_label="held-out loss above dense, nats/token",
        )

    def __str__(self) -> str:
        last = self.points[-1] if self.points else None
        end = f"; {last.increase:+.3f} nats/token at {last.depth}" if last else ""
        return f"Curve of {len(self.points)} depths{end}"


class RepairedTensor(_Record):
    """A tensor of the original checkpoint, by its name there, and the SHA-256 of its new bytes."""

    name: Text
    sha256: Digest


class RepairedGap(_Record):
    """A run of removed blocks and what was re-fitted to make up for it.

    ``ridge`` is the regression's, as a share of the Gram matrix's mean diagonal; null where no fit
    was accepted, and nothing was changed. ``before`` and ``after``: mean loss in nats/token of the
    cut model on held-out windows, by text, with the gaps in front of this one as they are.
    """

    removed: tuple[UnitId, ...]
    ridge: float | None
    tensors: tuple[RepairedTensor, ...]
    before: dict[Text, float]
    after: dict[Text, float]


class RepairRecord(_Record):
    """The closed-form repair of a cut: gap by gap, in order. ``reach``: blocks behind a gap that
    were re-fitted too. ``calibration`` is what was fitted on, ``heldout`` what judged it.
    ``healed``: tensors that were trained after that."""

    gaps: tuple[RepairedGap, ...]
    reach: Count
    calibration: Calibration
    heldout: Calibration
    healed: tuple[RepairedTensor, ...] = ()

    @property
    def removed(self) -> tuple[int, ...]:
        """The blocks of the cut, sorted."""
        return canonical(unit for gap in self.gaps for unit in gap.removed)

    @property
    def tensors(self) -> dict[str, str]:
        """SHA-256 of every changed tensor, by its name in the original checkpoint."""
        fitted = {tensor.name: tensor.sha256 for gap in self.gaps for tensor in gap.tensors}
        return fitted | {tensor.name: tensor.sha256 for tensor in self.healed}


class Plan(_Record, Tabular):
    """What to remove from which model, and why. Immutable; :meth:`save` and :meth:`load` it.

    ``racing``: candidates that were clearly worse were not scored on all windows; ``compiled``:
    blocks ran through torch.compile. ``split``: by role (``search``, ``heldout``, ``repair_fit``,
    ``repair_validation``) the SHA-256 of the token ids of the windows that had it.
    ``prompts_seen``: those by whose answers the cut was made, 12 hex digits each, see
    :func:`sleb.calibration.answers.prompt_hashes`.
    """

    schema_version: Literal[3] = SCHEMA
    model: Fingerprint
    origin: Origin | None = None
    removed: tuple[UnitId, ...]
    order: tuple[UnitId, ...]
    protected: tuple[BlockId, ...] = ()
    metric: Text
    unit: Text
    strategy: Text
    racing: bool = False
    compiled: bool = False
    dtype: Text
    target: Target | None = None
    baseline: Baseline | None = None
    rounds: tuple[Round, ...] = ()
    final_comparison: FinalComparison | None = None
    similarity: SimilarityGate | None = None
    saving: Saving | None = None
    calibration: Calibration | None = None
    split: dict[Text, Digest] = {}
    prompts_seen: Annotated[str, Field(pattern=r"^([0-9a-f]{12})*$")] = ""
    curve: Curve | None = None
    repair: RepairRecord | None = None
    versions: dict[Text, Text] = {}

    def __str__(self) -> str:
        """What fits a screen."""
        more = "more: .to_pandas(), .plot(), .save(FILE); next: sleb.apply(plan, MODEL, OUT)"
        return f"{self.in_short}\n{more}"

    @property
    def in_short(self) -> str:
        """What is removed and what that was chosen by, in lines that fit a screen."""
        of = f"{len(self.removed)} of {self.model.blocks} blocks of a {self.model.model_type}"
        manner = f"{self.strategy}{', racing' if self.racing else ''}"
        lines = [f"Plan: {of}, by {self.metric} ({manner})"]
        lines.append(f"removed, in order: {', '.join(map(str, self.order))}")
        if self.target:
            lines.append(
                f"asked for {self.target.kind} {self.target.told(self.target.limit)}, reached "
                f"{self.target.told(self.target.reached)}"
            )
        if self.calibration:
            texts = ", ".join(source.spec for source in self.calibration.sources)
            n, length = self.calibration.windows, self.calibration.length
            lines.append(f"chosen on {n} windows of {length} tokens: {texts}")
        if self.curve:
            lines.append(str(self.curve))
        if self.repair:
            lines.append(f"repaired: {len(self.repair.tensors)} tensors")
        return paragraphs(textwrap.shorten(line, 240) for line in lines)

    def rows(self) -> list[dict[str, Any]]:
        """A row per removal: its score, and the margin to the best candidate that stayed."""
        found = []
        for turn, block in enumerate(self.order, 1):
            home = next((r for r in self.rounds if block in r.removed), None)
            own = next((s for s in home.scores if s.block == block), None) if home else None
            rival = home.runner_up() if home and own else None
            found.append(
                {
                    "turn": turn,
                    "removed": str(block),
                    self.unit: own and own.mean,
                    "se": own and own.se,
                    "runner-up": rival and str(rival[0].block),
                    "margin": rival and rival[1],
                    "within noise": rival and rival[2],
                }
            )
        return found

    def drawn(self) -> Points:
        """The curve, where there is one; else the score of each removal."""
        if self.curve:
            return self.curve.drawn()
        scored = [row for row in self.rows() if row[self.unit] is not None]
        mean = [(row[self.unit], 1.96 * (row["se"] or 0)) for row in scored]
        return Points(
            x=tuple(row["turn"] for row in scored),
            y=tuple(y for y, _ in mean),
            low=tuple(y - reach for y, reach in mean),
            high=tuple(y + reach for y, reach in mean),
            x_label="blocks removed",
            y_label=f"{self.metric}, {self.unit}",
        )

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, data: Any) -> Any:
        return upgrade(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.removed != canonical(self.order) or len(set(self.order)) != len(self.order):
            raise ValueError("`removed` must be `order`, sorted, without repeats")
        last = max(map(block_of, self.removed), default=0)
        if last >= self.model.blocks:
            raise ValueError(f"removes block {last}, but the model has 0..{self.model.blocks - 1}")
        if len(self.removed) - len(self.parts) >= self.model.blocks:
            raise ValueError("removes every block of the model")
        if self.repair and self.repair.removed != self.removed:
            raise ValueError("`repair` is of another cut")
        if clash := sorted(set(self.removed) & set(self.protected)):
            raise ValueError(f"removes protected blocks {clash}")
        return self

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what most plans do not have."""
        found: dict[str, Any] = write(self)
        for name in ("saving", "prompts_seen"):
            if not getattr(self, name):
                found.pop(name, None)
        return found

    @property
    def seen(self) -> frozenset[str]:
        """The prompts by whose answers the cut was made."""
        return frozenset(re.findall(".{12}", self.prompts_seen))

    def saw(self, texts: Calibration) -> list[str]:
        """Those of ``texts`` by which blocks were chosen or a repair was fitted."""
        made_by = [self.calibration, *([self.repair.calibration] if self.repair else ())]
        known = {source.sha256 for made in made_by if made for source in made.sources}
        return [source.spec for source in texts.sources if source.sha256 in known]

    def seeing(self, prompts: Collection[str]) -> Plan:
        """The plan of a cut that was made by the answers to these ``prompts`` too."""
        return self.model_copy(update={"prompts_seen": "".join(sorted(self.seen | {*prompts}))})

    @property
    def saw_unknown(self) -> bool:
        """Whether prompts had a part in making the cut, and an older sleb did not write which."""
        return "answers_search" in self.split and not self.prompts_seen

    @property
    def parts(self) -> tuple[int, ...]:
        """Of what is removed, the attention or MLP of blocks that stay."""
        return parts_in(self.removed)

    @property
    def of_runs(self) -> bool:
        """Whether rounds scored runs of neighbours, each named by its first block."""
        return self.strategy == "window"

    @property
    def strategy_label(self) -> str:
        """The strategy and how sets were scored, as ``greedy, racing, compiled``."""
        how = {"racing": self.racing, "compiled": self.compiled}
        return ", ".join([self.strategy, *(name for name, used in how.items() if used)])

    def at_depth(self, depth: int | None) -> tuple[int, ...]:
        """The first ``depth`` removals, sorted; all of them for None.

        Raises:
            InputError: ``depth`` is outside 1..len(order).
        """
        if depth is None:
            return self.removed
        if not 1 <= depth <= len(self.order):
            raise InputError(
                f"--depth {depth} is outside this plan's 1..{len(self.order)}; "
                "search again with a larger --remove to go deeper"
            )
        return canonical(self.order[:depth])

    def without_last(self) -> Plan:
        """The plan with its last removal taken back, and no repair, which would be of another."""
        order = self.order[:-1]
        cut = {"order": order, "removed": canonical(order), "repair": None}
        return self.model_copy(update={**cut, "rounds": rounds_behind(self.rounds, order)})

    def to_json(self) -> str:
        """Indented JSON in which each score is one line, so that plans diff well."""
        return _pretty(self.model_dump(mode="json")) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read and check a plan.

        Raises:
            InputError: missing, too large, not JSON, another schema version, or inconsistent.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no plan at {path}; make one with: sleb search MODEL -o {path}")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB: not a plan")
        raw = path.read_bytes()
        version = re.search(rb'"schema_version"\s*:\s*(\d{1,9})', raw)
        if version and not 1 <= int(version[1]) <= SCHEMA:
            raise InputError(
                f"{path} has plan schema {int(version[1])}, this sleb reads 1 to {SCHEMA}: "
                "upgrade sleb"
            )
        try:
            return cls.model_validate_json(raw)
        except ValidationError as error:
            raise InputError(f"{path} is not a valid plan: {first_mistake(error)}") from None


def upgrade(data: dict[str, Any]) -> dict[str, Any]:
    """A plan's JSON of any schema version, as one of this version; what is no plan stays as it is.

    Schema 2 knew blocks alone. Schema 1 had ``"greedy, racing, compiled"`` as one string, and
    called the final comparison ``finals``.
    """
    if data.get("schema_version", SCHEMA) not in (1, 2):
        return data
    new = {**data, "schema_version": SCHEMA}
    if data["schema_version"] == 2:
        return new
    if isinstance(new.get("strategy"), str):
        name, *manner = new["strategy"].split(", ")
        new |= {"strategy": name, "racing": "racing" in manner, "compiled": "compiled" in manner}
    if "finals" in new:
        new["final_comparison"] = compared = new.pop("finals")
        if isinstance(compared, dict) and "own" in compared:
            rest = {key: value for key, value in compared.items() if key != "own"}
            new["final_comparison"] = {**rest, "self_generated": compared["own"]}
    return new


def parse_removal(target: float | str) -> tuple[int | None, float | None]:
    """A number of blocks, or a percentage of them, as it was written.

    Raises:
        InputError: it is neither, or nothing.
    """
    text = str(target).strip()
    match = re.fullmatch(r"(\d{1,6})|(\d{1,3}(?:\.\d{1,6})?)\s*%", text)
    if match and not float(match[1] or match[2]):
        raise InputError(f"--remove {text} removes nothing; give at least 1")
    if match:
        return (int(match[1]), None) if match[1] else (None, float(match[2]))
    if re.fullmatch(r"0?\.\d{1,6}", text) and float(text):
        share = f"{100 * float(text):.6g}%"
        raise InputError(
            f"--remove {text} is neither a number of blocks nor a percentage: {share}?"
        )
    raise InputError(
        f"--remove {text!r} is neither a number of blocks nor a percentage; give for example 6 or "
        "20%"
    )


def blocks_to_remove(target: float | str, n_blocks: int, protected: int = 0) -> int:
    """Number of blocks for ``6``, ``"6"`` or ``"20%"``; a percentage is rounded up (as in SLEB). So
    many as are ``protected`` cannot go, which the error tells.

    Raises:
        InputError: as :func:`parse_removal`, or not fewer than ``n_blocks``.
    """
    text = str(target).strip()
    count, percent = parse_removal(text)
    # Round before the ceiling: 0.07 * 100 is 7.000000000000001 in binary.
    n = math.ceil(round(percent / 100 * n_blocks, 6)) if percent is not None else count or 0
    if n >= n_blocks:
        most = f"at most {n_blocks - max(1, protected)} can go"
        most += f", as {protected} are protected (--protect)" if protected else ""
        raise InputError(f"--remove {text} is {n} of the model's {n_blocks} blocks; {most}")
    return n


def parse_blocks(text: str, n_blocks: int) -> frozenset[int]:
    """Block ids from a ``--protect`` such as ``"0,5-7,-1"``; negative ids count from the end, an
    empty string is no block.

    Raises:
        InputError: not a block list, or a block that the model does not have.
    """
    blocks: set[int] = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"(-?\d{1,6})(?:-(\d{1,6}))?", part)
        if not match:
            raise InputError(
                f"--protect '{part}' in '{text}' is not a block; write for example 0,5-7,-1"
            )
        first = int(match[1]) + (n_blocks if int(match[1]) < 0 else 0)
        last = int(match[2]) if match[2] else first
        if not 0 <= first <= last < n_blocks:
            raise InputError(f"--protect '{part}' is outside the model's blocks 0..{n_blocks - 1}")
        blocks.update(range(first, last + 1))
    return frozenset(blocks)


def _pretty(value: Any, indent: int = 0) -> str:
    """JSON in which a container of scalars that fits in 100 columns is one line."""
    flat = json.dumps(value, ensure_ascii=False)
    pad = " " * (indent + 2)
    if not isinstance(value, (dict, list)) or not value:
        return flat
    items: list[Any] = list(value.values()) if isinstance(value, dict) else value
    if len(flat) + indent <= 98 and not any(isinstance(v, (dict, list)) for v in items):
        return flat
    if isinstance(value, dict):
        rows = [f"{pad}{json.dumps(k)}: {_pretty(v, indent + 2)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"
    rows = [pad + _pretty(v, indent + 2) for v in items]
    return "[\n" + ",\n".join(rows) + "\n" + " " * indent + "]"
