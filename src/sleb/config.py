"""Every option of every verb, declared once: its type, default, check and help.

The command line, sleb.toml and the keywords of the Python functions are made from these classes. A
class of a few options is a group: a panel of the help, a table of the file. A verb's configuration
is the groups that it takes. Later values replace earlier ones: defaults, then a file, then the
command line (:meth:`Options.replaced`). Needs neither torch nor numpy.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from typing_extensions import Self

from sleb.core.errors import SHELL, InputError, SlebError, did_you_mean
from sleb.core.memory import as_specs
from sleb.core.showing import shown


def option(
    default: Any,
    help: str,
    *,
    flag: str = "",
    metavar: str = "",
    hide: bool = False,
    choices: tuple[str, ...] = (),
    **checks: Any,
) -> Any:
    """A field of :class:`Options`.

    ``flag`` is the name on the command line, where that is not the field's own with dashes
    (``"--keep/--no-keep"``, ``"--out -o"``); ``hide`` leaves the default out of the help, where the
    help says more than the value would; ``choices``: what the command line takes, while a program
    may have registered more; ``checks`` are pydantic's (``ge``, ``gt``, ...).
    """
    extra: dict[str, Any] = {"flag": flag, "metavar": metavar, "hide": hide, "choices": choices}
    return Field(default, description=help, json_schema_extra=extra, **checks)


def like(kind: type[Options], name: str, default: Any = ..., help: str = "") -> Any:
    """A field as that of another class, for a verb that takes only this one of its group, or has
    another ``default`` or ``help`` for it."""
    field = copy.copy(kind.model_fields[name])
    field.default = field.default if default is ... else default
    field.description = help or field.description
    field.json_schema_extra = {**declared(kind, name), "group": group_of(kind, name)}
    return field


def declared(kind: type[Options], name: str) -> dict[str, Any]:
    """What :func:`option` keeps of a field beside pydantic's own."""
    extra = kind.model_fields[name].json_schema_extra
    return dict(extra) if isinstance(extra, dict) else {}


def group_of(kind: type[Options], name: str) -> str:
    """The heading under which a field stands in the help: the title of its group; empty for the
    options of one verb alone."""
    if group := declared(kind, name).get("group"):
        return str(group)
    home = next(c for c in kind.__mro__ if name in vars(c).get("__annotations__", {}))
    return home.title() if home in GROUPS else ""


def in_order(kind: type[Options]) -> list[str]:
    """The fields of a class in the order of the help: its own, then those of each group."""
    names = [name for home in kind.__mro__ for name in vars(home).get("__annotations__", {})]
    return [name for name in dict.fromkeys(names) if name in kind.model_fields]


class Options(BaseModel):
    """A frozen set of options."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        defer_build=True,  # a command builds the checks of its own options alone
    )

    @classmethod
    def title(cls) -> str:
        """The docstring's first line."""
        return (cls.__doc__ or "").splitlines()[0].rstrip(".")

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Checked ``values``; ``where`` begins the message, as the file that they are from.

        Raises:
            InputError: an unknown option, a value that is not possible, or two that exclude each
                other.
        """
        with spoken_in_python():
            try:
                return cls.model_validate(
                    {name: cls._as_field(name, value) for name, value in values.items()}
                )
            except ValidationError as error:
                raise InputError(_said(error.errors()[0], cls, where)) from None

    @classmethod
    def _as_field(cls, name: str, value: Any) -> Any:
        """A value as its field takes it: one of several may stand alone."""
        field = cls.model_fields.get(name)
        if field is None or get_origin(field.annotation) is not tuple:
            return _plain(value)
        if name == "text":
            return as_specs(value)
        return _plain([value] if isinstance(value, (str, os.PathLike)) else value)

    def replaced(self, values: Mapping[str, Any], where: str = "") -> Self:
        """These options with ``values``, which come from nearer to the user, in place of theirs.

        Raises:
            InputError: as :meth:`of`.
        """
        return self.of({**self.model_dump(exclude_unset=True), **values}, where)

    def part(self, kind: type[O]) -> O:
        """The options of ``kind`` among these, as those of another verb."""
        return kind(**{k: v for k, v in self if k in kind.model_fields})


O = TypeVar("O", bound=Options)  # noqa: E741 (as in typing's own documentation)
R = TypeVar("R")


def _plain(value: Any) -> Any:
    """Paths as text."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _said(error: ErrorDetails, kind: type[Options], where: str) -> str:
    """One line for the first thing that pydantic found wrong: by its flag, or by its place in the
    file ``where``."""
    path = [str(part) for part in error["loc"]] or ["options"]
    while len(path) > 1 and (table := _table(kind, path[0])):
        where, kind, path = f"{where}[{path[0]}] ", table, path[1:]
    name, said = path[0], f"{error['msg'][:1].lower()}{error['msg'][1:]}"
    if error["type"] == "extra_forbidden":
        return f"{where}there is no option {name}{did_you_mean(name, kind.model_fields)}"
    flag = name if where else f"--{name.replace('_', '-')}"
    value = "" if error["type"] == "missing" else f" {error['input']!r}"
    return f"{where}{flag}{value}: {said}"


def _table(kind: type[Options], name: str) -> type[Options] | None:
    """The class of a field that is a group of options itself."""
    field = kind.model_fields.get(name)
    found = field.annotation if field else None
    return found if inspect.isclass(found) and issubclass(found, Options) else None


def takes(kind: type[Options]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """For ``function(..., config, ...)``: take the fields of ``kind`` as keywords too.

    ``search(model, remove=6)``, ``search(model, SearchConfig(remove=6))`` and
    ``search(model, config, remove=6)`` are one call. ``config`` must follow the parameters that
    are given by position.
    """

    def wrap(function: Callable[..., R]) -> Callable[..., R]:
        own = inspect.signature(function)
        names = {*own.parameters, *kind.model_fields} - {"config"}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            fields = {name: kwargs.pop(name) for name in [*kwargs] if name in kind.model_fields}
            for name in kwargs:
                if name not in own.parameters:
                    raise InputError(f"there is no option {name}{did_you_mean(name, names)}")
            given = own.bind_partial(*args, **kwargs)
            config = given.arguments.get("config")
            config = kind.of(fields) if config is None else config.replaced(fields)
            given.arguments["config"] = config
            if "progress" in given.arguments:
                given.arguments["progress"] = shown(given.arguments["progress"])
            with spoken_in_python():
                return function(*given.args, **given.kwargs)

        _document(call, kind)
        return call

    return wrap


def keywords_of(kind: type[Options]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """For ``function(..., **options)`` that hands them on as fields of ``kind``: say so to
    :func:`help`."""

    def wrap(function: Callable[..., R]) -> Callable[..., R]:
        _document(function, kind)
        return function

    return wrap


def _document(function: Callable[..., Any], kind: type[Options]) -> None:
    """Add the fields of ``kind`` to a function's signature and docstring."""
    own = inspect.signature(function)
    parameters = {
        p.name: p.replace(default=None) if p.name == "config" else p
        for p in own.parameters.values()
        if p.kind is not p.VAR_KEYWORD
    }
    lines = ["Options:"]
    for name in in_order(kind):
        field = kind.model_fields[name]
        if name not in parameters:
            parameters[name] = inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=field.annotation,
            )
        told = field.default not in (None, ()) and not declared(kind, name)["hide"]
        head = f"{name}={field.default!r}" if told else name
        said = f"    {head}: {in_python(field.description or '')}"
        lines += textwrap.wrap(said, 76, subsequent_indent=8 * " ", break_on_hyphens=False)
    function.__signature__ = own.replace(parameters=[*parameters.values()])  # type: ignore[attr-defined]
    text, raises, rest = inspect.cleandoc(function.__doc__ or "").partition("Raises:")
    function.__doc__ = "\n".join([text.rstrip(), "", *lines, *(["", raises + rest] * bool(raises))])


@contextmanager
def spoken_in_python() -> Iterator[None]:
    """Name options in the messages of errors as a program gives them, unless a person types."""
    try:
        yield
    except SlebError as error:
        if not SHELL.get():
            error.args = (in_python(str(error)),)
        raise


def in_python(message: str) -> str:
    """``--repair-tokens`` as ``repair_tokens``, ``--no-repair`` as ``repair=False``; options of
    other programs as they are."""
    known = _python_names()
    return re.sub(r"(?<![\w-])(--[a-z][a-z-]*|-o)\b", lambda m: known.get(m[1], m[1]), message)


@functools.cache
def _python_names() -> dict[str, str]:
    """Options as they are typed, and as keywords."""
    names = {f"--{name}": name for name in ("model", "plan", "record", "heal", "quantize", "lang")}
    names |= {"--out": "out", "-o": "out", "--as": "form"}
    kinds = [k for k in globals().values() if inspect.isclass(k) and issubclass(k, Options)]
    for kind in kinds:
        for name in kind.model_fields:
            typed = declared(kind, name)["flag"] if declared(kind, name) else ""
            yes, _, no = (typed or f"--{name.replace('_', '-')}").partition("/")
            names |= dict.fromkeys(yes.split(), name)
            names |= {no: f"{name}=False"} if no else {}
    return names


# --- groups ------------------------------------------------------------------------------------


class TargetOptions(Options):
    """Target (give one)."""

    remove: int | float | str | None = option(None, "Blocks to remove, 6 or 20%.", metavar="N")
    max_loss_increase: float | None = option(
        None,
        "As many blocks as keep the held-out loss within NATS per token of the dense model's (95 % "
        "bound); 0.1 is 10.5 % more perplexity.",
        metavar="NATS",
    )
    keep_answers: float | str | None = option(
        None,
        "As many blocks as keep this share of the tokens of the model's answers to --prompts, say "
        "0.95 (95 % bound).",
        metavar="SHARE",
    )
    speedup: float | None = option(
        None, "X times as fast at generating (estimated), say 1.25.", metavar="X"
    )
    size: int | str | None = option(None, "Weights of at most, say, 100MB.", metavar="BYTES")
    curve: bool = option(
        False, "Measure every depth on held-out text, for choosing one.", flag="--curve"
    )

    @field_validator("keep_answers", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        """A number, also of text as typed."""
        if not isinstance(value, str):
            return value
        try:
            return float(value)
        except ValueError:
            percent = re.fullmatch(r"(\d{1,2}(?:\.\d{1,6})?)\s*%", value.strip())
            hint = f": {float(percent[1]) / 100:.6g}?" if percent else "; give for example 0.95"
            raise InputError(f"--keep-answers {value} is not a share of tokens{hint}") from None


UnitKind = Literal["block", "attention", "mlp", "any"]


class SelectionOptions(Options):
    """Choice of blocks."""

    unit: UnitKind = option(
        "block",
        "What is removed: whole blocks, the attention or the MLP of blocks alone, or any of these. "
        "See docs/units.md.",
    )
    save: Literal["time", "memory", "kv"] | None = option(
        None,
        "With --unit attention, mlp or any: weigh each by what it saves of the time of a written "
        "token (measured here), of the weights, or of the cache of keys and values. Default with "
        "any: time.",
    )
    prompt_length: int | None = option(
        None,
        "With --save: tokens that each text begins with. Default: 2048, or what the model reads.",
        ge=1,
    )
    sequences: int = option(1, "With --save: texts that are written at once.", ge=1)
    metric: str | None = option(
        None,
        "loss (SLEB), one-shot-loss, cosine, kl, repaired-loss, or answers: divergence on answers "
        "to --prompts. See docs/method.md. Default: loss; answers for prune --heal and "
        "--unit, where the model gives any.",
        metavar="NAME",
        choices=("loss", "one-shot-loss", "cosine", "kl", "repaired-loss", "answers"),
    )
    strategy: str | None = option(
        None,
        "greedy, one-shot, window, beam, refine or greedy-or-window. Default: the metric's own; "
        "the last one for prune --remove with a repair.",
        metavar="NAME",
        choices=("greedy", "one-shot", "window", "beam", "refine", "greedy-or-window"),
    )
    exact: bool = option(
        False,
        "Score all candidates, as published; or give up early on those clearly worse.",
        flag="--exact/--race",
    )
    protect: str = option("0,-1", "Blocks that stay: 0,5-7,-1; '' for none.", metavar="BLOCKS")
    min_similarity: float | str | None = option(
        None, "Candidates are blocks at least this similar; or auto.", metavar="X"
    )

    @property
    def chosen_by(self) -> str:
        """The metric: by default SLEB's."""
        return self.metric or "loss"


class TextOptions(Options):
    """Text to measure on."""

    text: tuple[str, ...] = option(
        (),
        "Text to measure on; repeat for several. A .txt, .jsonl or .parquet file, or "
        "hub:DATASET/CONFIG:SPLIT; append @2 for twice the share. Default: an embedded sample.",
        metavar="SPEC",
    )
    windows: int | None = option(
        None,
        "Windows of the text to choose blocks by. Default: at most 32.",
        ge=1,
    )
    seed: int = option(0, "Choice of windows.")


LossOn = Literal["answers", "all"]


class LossOptions(Options):
    """Text to measure on."""

    loss_on: LossOn = option(
        "answers", "Of chats in --text: count only what the assistant says, or all."
    )


class LengthOptions(Options):
    """Text to measure on."""

    length: int = option(256, "Tokens per window.", ge=2)


class HeldoutOptions(Options):
    """Text to measure on."""

    heldout: int = option(16, "Windows to set aside for quality.", ge=0)


NO_PROMPTS = "none"
"""Stands for no prompts, where there would be some by default."""
DEFAULT_PROMPTS = "default"
"""Stands for the embedded prompts."""
MAX_PROMPTS, NEW_TOKENS = {"cpu": 64, "cuda": 1024}, {"cpu": 96, "cuda": 256}
"""How many prompts are answered, and with how many tokens at most, by default."""


class PromptOptions(Options):
    """Prompts to be answered as now."""

    prompts: tuple[str, ...] = option(
        (),
        "Prompts like those of the real job, which the dense model answers: blocks are chosen, "
        "repaired and measured by these answers too. A .jsonl, .json, .parquet or .txt file; "
        "repeat for several; none for none. Default: of prune, run and heal 300 embedded ones, "
        "where the model answers chats.",
        metavar="FILE",
    )
    max_prompts: int | None = option(
        None,
        "Answer so many at most. Default: {cpu}, on a GPU {cuda}.".format(**MAX_PROMPTS),
        ge=1,
    )
    new_tokens: int | None = option(
        None,
        "Longest answer, in tokens. Default: {cpu}, on a GPU {cuda}.".format(**NEW_TOKENS),
        ge=1,
    )
    run_code: bool = option(
        False,
        "Judge answers to rows with tests by running their code: in a child with limits of time "
        "and memory, a scratch folder and no network. It can read what you can, and write where "
        "you may: use a machine or container that may be lost.",
        flag="--run-code",
    )

    @model_validator(mode="after")
    def _alone(self) -> Self:
        if NO_PROMPTS in self.prompts and len(self.prompts) > 1:
            raise InputError("--prompts none stands alone; leave it or the files out")
        return self


DTYPES = ("float32", "bfloat16", "float16", "auto")


class TrustOptions(Options):
    """Model and devices."""

    trust_remote_code: bool = option(
        False, "Run Python code that the model brings.", flag="--trust-remote-code"
    )


class DeviceOptions(TrustOptions):
    """Model and devices."""

    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto.", metavar="NAME")
    dtype: str = option(
        "auto",
        "float32, bfloat16, float16 or auto: the model's own.",
        metavar="NAME",
        choices=DTYPES,
    )


class BatchOptions(Options):
    """Model and devices."""

    batch: int | None = option(None, "Windows per forward pass. Default: what fits.", ge=1)


class ThreadsOptions(Options):
    """Model and devices."""

    threads: int | None = option(None, "CPU threads. Default: one a core.", ge=1)


class LoadOptions(DeviceOptions):
    """Model and devices."""

    stream: bool = option(
        False, "Read blocks from disk as they run; one fits in memory.", flag="--stream"
    )
    device_map: str | None = option(
        None,
        "For a model larger than a device: auto spreads it over GPUs, memory and disk; or a JSON "
        "file of places. See docs/distributed.md.",
        metavar="MAP",
    )
    tp: int = option(1, "N processes of torchrun hold the model together.", metavar="N", ge=1)


class ComputeOptions(BatchOptions, ThreadsOptions):
    """Model and devices."""

    max_memory: int | str | None = option(
        None, "With --stream: hidden states to hold, say 8GB. Default: half free.", metavar="BYTES"
    )
    compile: bool = option(
        False,
        "Run blocks through torch.compile; for long searches on a GPU.",
        flag="--compile",
    )


class RepairOptions(Options):
    """Repair."""

    repair: bool | None = option(
        None,
        "Re-fit matrices around the gaps to make up for them. Default: where possible.",
        flag="--repair/--no-repair",
    )
    repair_tokens: int | None = option(
        None,
        "Tokens that a repair is fitted on, about, besides answers: whole windows, one in three "
        "the model's own. By default 100,000, on a GPU up to 400,000.",
        ge=1,
        hide=True,
    )


class OutputOptions(Options):
    """Output."""

    force: bool = option(False, "Replace an existing output.", flag="--force")


class KeepOptions(OutputOptions):
    """Output."""

    keep: bool = option(
        True,
        "Keep in OUT/rollback what sleb restore needs to take the cut back.",
        flag="--keep/--no-keep",
    )


class RunConfig(OutputOptions):
    """`sleb run`."""

    settings: tuple[str, ...] = option(
        (),
        "Replace a setting of the file, as search.remove=3; repeat for several.",
        flag="--set",
        metavar="KEY=VALUE",
    )


class DepthOptions(Options):
    """Plan."""

    depth: int | None = option(None, "Use only the plan's first DEPTH removals.")


GROUPS: tuple[type[Options], ...] = (
    TargetOptions,
    SelectionOptions,
    TextOptions,
    LossOptions,
    LengthOptions,
    HeldoutOptions,
    PromptOptions,
    RepairOptions,
    DepthOptions,
    DeviceOptions,
    LoadOptions,
    BatchOptions,
    ThreadsOptions,
    ComputeOptions,
    TrustOptions,
    OutputOptions,
    KeepOptions,
)
"""In the order of the help. Several may share a title."""


# --- verbs -------------------------------------------------------------------------------------


class InspectConfig(TrustOptions):
    """`sleb inspect`."""

    full: bool = option(
        False,
        "Also build the model's structure in transformers, without weights: only that tells for "
        "sure whether sleb can cut it. Takes some seconds.",
        flag="--full",
    )


class SimilarityConfig(TextOptions, LengthOptions, LoadOptions, BatchOptions):
    """`sleb similarity`."""

    measure: str = option(
        "cosine",
        "cosine, angular, correlation, cka or relative-l2.",
        metavar="NAME",
        choices=("cosine", "angular", "correlation", "cka", "relative-l2"),
    )


class SearchConfig(
    TargetOptions,
    SelectionOptions,
    TextOptions,
    LossOptions,
    LengthOptions,
    HeldoutOptions,
    PromptOptions,
    LoadOptions,
    ComputeOptions,
):
    """`sleb search`."""

    @model_validator(mode="after")
    def _answers(self) -> Self:
        by_answers = self.keep_answers is not None or self.metric == "answers"
        if by_answers and self.prompts == (NO_PROMPTS,):
            asked = "--metric answers" if self.keep_answers is None else "--keep-answers"
            raise InputError(f"{asked} needs prompts: leave out --prompts none, or give files")
        return self


class TransferConfig(SearchConfig):
    """`sleb transfer`."""


class PruneConfig(SearchConfig, RepairOptions, KeepOptions):
    """`sleb prune`."""


class RepairConfig(DepthOptions, PromptOptions, DeviceOptions):
    """`sleb.repair`."""

    stream: bool = like(LoadOptions, "stream")
    device_map: str | None = like(LoadOptions, "device_map")
    text: tuple[str, ...] = like(TextOptions, "text")
    loss_on: LossOn = like(LossOptions, "loss_on")
    length: int = like(LengthOptions, "length")
    repair_tokens: int | None = like(RepairOptions, "repair_tokens")


class WriteConfig(KeepOptions, TrustOptions):
    """How a cut is written."""


class ApplyConfig(RepairConfig, KeepOptions):
    """`sleb apply`."""

    repair: bool | None = like(
        RepairOptions,
        "repair",
        help="Re-fit matrices around the gaps, on --text, or leave the plan's repair out. Default: "
        "the plan's repair, if it has one.",
    )
    repaired: str | None = option(
        None,
        "Checkpoint that has the tensors of the plan's repair. Default: the plan's folder.",
        metavar="FOLDER",
    )
    format: Literal["nemotron-nas"] | None = option(
        None,
        "Where parts of blocks go: a folder for vLLM, SGLang, TensorRT-LLM and mlx-lm. All but the "
        "last need --trust-remote-code for a configuration class of a few lines in it.",
    )
    adapter: str | None = option(
        None,
        "LoRA adapter of MODEL, as PEFT saves it: written for the cut too, as OUT-adapter.",
        metavar="FOLDER",
    )
    other_weights: bool = option(
        False,
        "From GGUF to GGUF: the plan is of the same model in another form, such as the "
        "checkpoint that the file was made from.",
        flag="--other-weights",
    )

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.text or self.prompts) and not self.repair:
            given = "--text" if self.text else "--prompts"
            raise InputError(
                f"{given} is what --repair is fitted on; give --repair too, or leave it out"
            )
        if (self.stream or self.device_map) and not self.repair:
            raise InputError(
                "only --repair loads blocks, which --stream or --device-map place; give --repair "
                "too, or leave them out"
            )
        if self.repair is not None and self.repaired:
            raise InputError(
                "--repaired brings the plan's repair, --repair fits another, --no-repair leaves it "
                "out: give one of them"
            )
        return self


class RestoreConfig(DepthOptions, OutputOptions, TrustOptions):
    """`sleb restore`."""

    depth: int | None = like(
        DepthOptions,
        "depth",
        help="Cut again, by the plan's first DEPTH removals. Default: the original.",
    )


class CheckOptions(DepthOptions, DeviceOptions):
    """How a checkpoint is loaded to be checked."""

    device: str = like(DeviceOptions, "device", "cpu")
    dtype: str = like(DeviceOptions, "dtype", "float32")
    stream: bool = like(LoadOptions, "stream")


class VerifyConfig(CheckOptions):
    """`sleb verify`."""

    gate: str | None = option(
        None,
        "File of limits on what OUT/run.json has recorded: exit code 3 if one is not kept.",
        metavar="FILE",
    )
    recorded: bool = option(
        False,
        "Take the proof that OUT/run.json has, if by their checksums the files of OUT are still "
        "those that it is of and MODEL is the plan's, in place of another. For a folder of your "
        "own: who can write run.json can write anything there.",
        flag="--recorded",
    )
    runtimes: str | None = option(
        None,
        "Try it there too: transformers, vllm, llama-cpp, mlx-lm; several with commas.",
        flag="--runtime",
        metavar="NAMES",
    )
    pythons: tuple[str, ...] = option(
        (),
        "Interpreter that has a runtime, as vllm=/venv/bin/python; repeat for several.",
        flag="--python",
        metavar="NAME=PATH",
    )
    runtime_dtype: str | None = option(
        None,
        "What runtimes compute in, and are compared in. Default: that of --dtype.",
        metavar="NAME",
        choices=DTYPES,
    )

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.pythons and self.runtimes is None:
            raise InputError("--python is for --runtime; give that too, or leave it out")
        return self


class EvalConfig(DepthOptions, TextOptions, LossOptions, PromptOptions, LoadOptions, BatchOptions):
    """`sleb eval`."""

    windows: int | None = like(
        TextOptions, "windows", help="Windows of the text to measure on. Default: all."
    )
    length: int | None = like(
        LengthOptions, "length", None, "Tokens per window. Default: 2048, or what the model reads."
    )
    run_code: bool = like(
        PromptOptions,
        "run_code",
        help="Judge answers to rows with tests by running their code, in a child with limits of "
        "time and memory, a scratch folder and no network; and allow tasks that run code in the "
        "harness's own way, which has a limit of time alone. It can read what you can, and write "
        "where you may: use a machine or container that may be lost.",
    )
    prompts: tuple[str, ...] = like(
        PromptOptions,
        "prompts",
        help="Prompts that the model answers, and how much of these answers the cut of --plan "
        "keeps; those that it was made by are left out. A .jsonl, .json, .parquet or .txt file; "
        "repeat for several.",
    )
    plan: str | None = option(None, "Also score the model cut by this plan.", metavar="FILE")
    task: tuple[str, ...] = option(
        (),
        "Score a task in place of text; repeat for several. Your own .jsonl of questions, or a "
        "name that lm-evaluation-harness knows.",
        metavar="NAME",
    )
    tasks_folder: str | None = option(
        None, "Where further tasks are defined (YAML).", metavar="FOLDER"
    )
    limit: int | None = option(None, "Items per task.", ge=1)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.depth is not None and self.plan is None:
            raise InputError("--depth is a depth of a plan; give the plan with --plan")
        if self.prompts and self.plan is None:
            raise InputError("--prompts compares a cut with the model; give its plan with --plan")
        if self.prompts and (self.text or self.task):
            raise InputError("--prompts, --text and --task are measured one at a time; give one")
        if self.task and (self.text or self.windows or self.length):
            raise InputError(
                "--task scores items, not windows of --text; run sleb eval once for each"
            )
        if (self.tasks_folder or self.limit) and not self.task:
            raise InputError("--tasks-folder and --limit are for tasks; name them with --task")
        return self


SCHEMES = ("w4a16", "w8a16", "awq", "int8")


class QuantizeConfig(TextOptions, LengthOptions, OutputOptions, TrustOptions):
    """`sleb quantize`."""

    scheme: str = option(
        "w4a16",
        "w4a16 or w8a16 (GPTQ, calibrated on --text), awq (on a GPU), or int8.",
        metavar="NAME",
        choices=SCHEMES,
    )
    windows: int | None = like(
        TextOptions, "windows", help="Windows to calibrate on. Default: at most 32."
    )
    length: int = like(LengthOptions, "length", 512)


Optimizer = Literal["adamw", "adamw-host", "adamw-8bit"]
HEAL_TOKENS = {"cpu": 100_000, "cuda": 5_000_000}
"""Tokens that a healing trains on by default: a few minutes of a small model on a CPU, or of one
with two billion parameters on a large GPU."""
HEAL_PROMPTS = {"cpu": 64, "cuda": 4096}
"""Prompts that are answered for it: on a GPU more than for a repair, which sees each once."""
HEAL_BATCH, HEAL_AT_ONCE = 16, {"cpu": 1024, "cuda": 16384}
"""Windows of a step, and tokens of a pass, by default."""
AS_CUT = {"text", "seed"}.union(
    *(group.model_fields for group in (PromptOptions, OutputOptions, DeviceOptions))
)
"""Options of a healing that are those of the cut, where both are made in one command."""


class HealConfig(PromptOptions, OutputOptions, DeviceOptions):
    """`sleb heal`."""

    text: tuple[str, ...] = like(TextOptions, "text")
    loss_on: LossOn = like(LossOptions, "loss_on")
    seed: int = like(TextOptions, "seed")
    tokens: int | None = option(
        None,
        "Tokens to train on in all. Default: {cpu:,}, on a GPU {cuda:,}; with --minutes, what they "
        "allow.".format(**HEAL_TOKENS),
        ge=1,
    )
    length: int | None = like(
        LengthOptions,
        "length",
        None,
        "Tokens per window. Default: 1024, or what the model reads; fewer in a short run.",
    )
    lr: float | None = option(
        None, "Highest learning rate. Default: found on a tenth of the run.", gt=0
    )
    batch: int | None = option(
        None,
        f"Windows per optimizer step, or as many tokens. Default: {HEAL_BATCH}, fewer in a short "
        "run.",
        ge=1,
    )
    at_once: int | None = option(
        None,
        "Windows per pass; fewer need less memory. Default: {cuda} tokens, on a CPU {cpu}; half as "
        "many where these do not fit.".format(**HEAL_AT_ONCE),
        ge=1,
    )
    minutes: float | None = option(None, "Train for so long, or at most with --tokens.", gt=0)
    heldout: int | None = option(
        None, "Windows to set aside for validation. Default: 32, fewer in a short run.", ge=1
    )
    max_prompts: int | None = like(
        PromptOptions,
        "max_prompts",
        None,
        "Answer so many at most. Default: {cpu}, on a GPU {cuda}.".format(**HEAL_PROMPTS),
    )
    optimizer: Optimizer = option(
        "adamw",
        "AdamW on float32 copies of the weights, 16 bytes a parameter; on copies in the machine's "
        "memory, 2 on the device; or with states of 8 bits on the bfloat16 weights themselves, "
        "rounded at random: 6.",
    )
    lora: int | None = option(None, "Train adapters only, for a large model.", metavar="RANK", ge=1)
    recompute: bool = option(False, "Less memory, a third more time.", flag="--recompute")
    stages: int = option(
        1,
        "Heal shallower cuts first: so many stages in all, each with as large a part of the "
        "training.",
        ge=1,
    )
    local_first: bool = option(
        False,
        "First train the blocks beside gaps alone, on the original's hidden states.",
        flag="--local-first",
    )
    hidden_loss: float | None = option(
        None,
        "Learn the original's hidden states behind gaps too, with this weight beside that of its "
        "predictions.",
        gt=0,
    )

    @classmethod
    def after(cls, cut: PruneConfig, own: Mapping[str, Any], where: str = "") -> HealConfig:
        """Options ``own`` of a healing that follows ``cut`` in one command, on the same texts and
        prompts.

        Raises:
            InputError: the cut is made of a model that is not on one device; or as :meth:`of`.
        """
        if cut.stream or cut.device_map or cut.tp > 1:
            raise InputError(
                "healing trains a model on one device: leave out --heal, or --stream, --device-map "
                "and --tp"
            )
        given = {name: value for name, value in cut if name in AS_CUT}
        return cls.of(given).replaced(own, where)


class CompareConfig(DeviceOptions):
    """`sleb compare`."""

    new_tokens: int = like(PromptOptions, "new_tokens", 256, "Longest answer, in tokens.")


class BenchConfig(DeviceOptions, ThreadsOptions):
    """`sleb bench`."""

    runs: int = option(6, "Times each case is run.", ge=1)
    quick: bool = option(False, "Smaller cases, for a CPU.", flag="--quick")
    draft: bool = option(
        False, "Time each OUT as the draft of MODEL, and nothing else.", flag="--draft"
    )
    draft_tokens: int = option(4, "Tokens drafted at a time.", ge=1)


class ExportConfig(DepthOptions, OutputOptions, TrustOptions):
    """`sleb export`."""


class PushConfig(Options):
    """`sleb push`."""

    private: bool = option(
        False, "Make the repository private; refuse a public one.", flag="--private"
    )
    revision: str | None = option(
        None, "Branch. Default: main.", flag="--revision --branch", metavar="NAME"
    )
    with_rollback: bool = option(
        False, "Upload the removed blocks as well.", flag="--with-rollback"
    )
    dry_run: bool = option(
        False, "Check the folder and list the files; send nothing.", flag="--dry-run"
    )
