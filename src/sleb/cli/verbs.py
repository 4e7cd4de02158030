"""The verbs: for each one the public function that it calls, and how it is shown."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sleb
from sleb.cli.argument import Argument
from sleb.core.errors import InputError
from sleb.core.files import (
    check_demo,
    check_folder,
    existing_record,
    record_path,
    writable_target,
)
from sleb.core.printable import LONGEST_MESSAGE, printable
from sleb.core.process_group import Lost, group, leave_group

if TYPE_CHECKING:
    import typer

    from sleb.config import Options, SearchConfig

Given = Mapping[str, Any]
"""The values of a command's parameters, by name."""


MODEL = Argument("model", "Folder, hub id, or .gguf file.", metavar="MODEL")
REVISION = Argument(
    "revision",
    "Branch, tag or commit of a MODEL on the hub; or write MODEL@REVISION.",
    "--revision",
    "REVISION",
    str | None,
    None,
    "Model and devices",
)
PLAN = Argument("plan", "Plan from sleb search.", metavar="PLAN")
CUT = Argument("cut", "The pruned checkpoint, from prune or apply.", metavar="OUT")
PRUNED = Argument("out", "The pruned checkpoint.", metavar="OUT")
OUT = Argument("out", "Folder for the new checkpoint.", "--out -o", "PATH", group="Output")
FOLDER_OR_FILE = replace(OUT, help="Folder or .gguf file for the new checkpoint.")
PROMPTS = "Your prompts: .jsonl, or .txt with one a line."


def _file(default: str, help: str = "File to write.") -> Argument:
    return Argument("out", help, "--out -o", "FILE", default=default, group="Output")


def _original(help: str = "The original model.", default: Any = ...) -> Argument:
    optional = str if default is ... or isinstance(default, str) else str | None
    return Argument("model", help, "--model", "MODEL", type=optional, default=default)


def _text(name: str, help: str, flag: str, metavar: str | None = None) -> Argument:
    """An option that need not be given."""
    return Argument(name, help, flag, metavar, str | None, None)


def _switch(name: str, help: str, flag: str = "") -> Argument:
    return Argument(name, help, flag or f"--{name}", type=bool, default=False, group="Output")


JSON = _switch("json", "Print the result as JSON on stdout.")
QUIET = _switch("quiet", "The result and errors alone: no progress, no hints.", "--quiet -q")
VERBOSE = _switch("verbose", "Also what libraries say, and short phases.", "--verbose -v")
FORCE = _switch("force", "Replace an existing output.")
DRY_RUN = _switch("estimate", "Say what it would take, and do nothing.", "--dry-run")
RECORD = Argument(
    "record",
    "Add the result to RUN/run.json, for limits and report.",
    "--record",
    "RUN",
    str | None,
    None,
    "Output",
)


def _written(result: Any, given: Given) -> Iterable[str]:
    return (f"checkpoint written to {given['out']}",)


def _require(result: Any) -> int:
    """The exit code: an error of the result's own, or 0."""
    if hasattr(result, "require"):
        result.require()
    return 0


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One verb. ``run`` is the name of its public function in :mod:`sleb`, or of another in a
    module of it, which gets all values by name but those of ``own``, the command line's."""

    name: str
    help: str
    example: str
    arguments: tuple[Argument, ...]
    group: str
    """Its heading in the list of verbs."""
    config: str = "Options"
    """The name of its class in :mod:`sleb.config`."""
    run: str = ""
    check: Callable[[Given], None] = lambda given: None
    """Finds mistakes that can be seen before torch is imported, beside those of every verb."""
    facts: Callable[[Any], Any] = lambda result: result
    """What --json prints."""
    drawn: Callable[[Any], Any] | None = None
    """What is drawn for a person, where that is not the facts."""
    notes: Callable[[Any, Given], Iterable[str]] = lambda result, given: ()
    """Last lines: what was written, what to do next."""
    dry: str = ""
    """The function that --dry-run calls in place of ``run``: what that would take."""
    filter: bool = False
    """Whether stdout is for another program: the result's text, unless it goes to a file, and no
    notes."""
    code: Callable[[Any], int] = _require
    sections: Callable[[Any, Given], dict[str, Any]] | None = None
    """What a run record gets of the result; None where there is no --record."""
    json: bool = True
    shared: bool = False
    """Whether the processes of a job share the work; else the first does it alone."""

    @property
    def model(self) -> str | None:
        """The name of the argument that is MODEL; None too where --revision means another thing."""
        if self.name in ("push", "demo"):
            return None
        names = {argument.name for argument in self.arguments}
        return next((name for name in ("model", "ref") if name in names), None)

    @property
    def own(self) -> tuple[Argument, ...]:
        """The options that are the command line's alone."""
        return (
            *([RECORD] if RECORD in self.arguments else []),
            *([DRY_RUN] if self.dry else []),
            *([JSON] if self.json else []),
            QUIET,
            VERBOSE,
        )

    @property
    def summary(self) -> str:
        """The help up to its first full stop or semicolon."""
        return re.split(r"[.;] ", self.help)[0].rstrip(".")

    @property
    def options(self) -> type[Options]:
        """The class of its configuration; importing it imports pydantic."""
        kind: type[Options] = getattr(import_module("sleb.config"), self.config)
        return kind

    @property
    def function(self) -> Callable[..., Any]:
        """The public function; importing it imports torch."""
        return self.named(self.run or self.name)

    @staticmethod
    def named(where: str) -> Callable[..., Any]:
        """A function of sleb, or of a module of it."""
        module, _, name = where.rpartition(".")
        found: Callable[..., Any] = getattr(
            import_module(f"sleb.{module}") if module else sleb, name
        )
        return found


# --- what single verbs do beside calling their function ----------------------------------------


def _new_folder(given: Given) -> None:
    writable_target(Path(given["out"]), force=given["force"])


def _new_file(given: Given) -> None:
    if given["out"]:
        writable_target(Path(given["out"]), force=given["force"], folder=False)


def _check_plan(given: Given) -> None:
    from sleb.core.plan import Plan

    Plan.load(given["plan"]).at_depth(given["depth"])


def _new_checkpoint(given: Given) -> None:
    """A folder, or a file whose name says so."""
    out = Path(given["out"])
    writable_target(out, force=given["force"], folder=out.suffix != ".gguf")


def _check_apply(given: Given) -> None:
    _check_plan(given)
    _new_checkpoint(given)


def _check_verify(given: Given) -> None:
    from sleb.core.plan import Plan

    out = Path(given["out"])
    if out.is_dir() or given["plan"]:
        Plan.load(given["plan"] or out / "plan.json")
    elif not out.is_file():
        check_folder(out)
    if given["gate"]:
        from sleb.core.toml import LIMITS_HINT, read_toml

        read_toml(given["gate"], LIMITS_HINT)


def _check_restore(given: Given) -> None:
    _new_folder(given)
    if not Path(given["cut"]).is_file():
        check_folder(Path(given["cut"]), "give one that sleb apply or prune wrote")


def _check_heal(given: Given) -> None:
    _new_folder(given)
    check_folder(Path(given["cut"]), "make one with: sleb prune")


def _check_compare(given: Given) -> None:
    if not given["out"].endswith(".gguf"):
        check_folder(Path(given["out"]))


def _check_bench(given: Given) -> None:
    from sleb.models.source import find

    for out in given["outs"] or ():
        if not (Path(out) / "plan.json").is_file():
            find(out)


def _check_transfer(given: Given) -> None:
    from sleb.config import TransferConfig
    from sleb.evaluation.transfer_texts import check_texts

    check_texts(TransferConfig.of({k: given[k] for k in TransferConfig.model_fields}))


def _check_eval(given: Given) -> None:
    if given["plan"]:
        _check_plan(given)
    elif given["record"]:
        raise InputError("--record is for a pruned model's record; give its plan with --plan")
    for task in given["task"]:
        if task.endswith(".jsonl"):
            from sleb.evaluation.questions import read_questions

            read_questions(task)


def _check_prune(given: Given) -> None:
    _new_checkpoint(given)
    out = Path(given["out"])
    if out.suffix == ".gguf" and (given["heal"] or given["quantize"]):
        raise InputError(
            f"-o {out} is a GGUF file, and --heal and --quantize are for folders; leave them out"
        )
    if given["quantize"]:
        from sleb.cli.build import choose
        from sleb.config import SCHEMES

        choose("scheme", given["quantize"], SCHEMES)
        beside = out.with_name(f"{out.name}-{given['quantize']}")
        writable_target(beside, force=given["force"])


def _check_report(given: Given) -> None:
    _new_file(given)
    for run in map(Path, given["run"]):
        record = record_path(run)
        if not record.is_file():
            raise InputError(f"no run record at {record}: sleb prune or sleb run writes one")


def _check_project(given: Given) -> None:
    from sleb.project_file import ProjectFile

    project = ProjectFile.read(given["path"], given["settings"])
    _check_texts(project.search.text, project.search.prompts)
    _check_search(project.search, project.source)


def _described(found: Any) -> Any:
    from sleb.views.description import description
    from sleb.views.locale import Locale

    return description(Locale("en"), found)


def _applied_facts(a: Any) -> dict[str, Any]:
    facts = {"out": str(a.out), "removed": a.removed, "blocks": a.blocks}
    if a.gguf:
        facts |= {"plan": str(a.gguf.plan), "nbytes": a.gguf.nbytes}
        facts |= {"other_weights": a.gguf.other_weights}
        facts |= {"imatrices": [str(path) for path in a.gguf.imatrices]}
        facts["requantized"] = [tensor.stored for tensor in a.gguf.requantized]
    if a.repair:
        facts["repair"] = a.repair.model_dump(mode="json")
    if a.adapter:
        facts["adapter"] = {"lost": a.adapter.lost, "repaired": a.adapter.repaired}
    return facts


def _applied_notes(a: Any, given: Given) -> Iterator[str]:
    if a.repair and not a.fitted:
        yield f"repaired with the plan's {len(a.repair.tensors)} tensors (--no-repair: without)"
    if a.fitted and not a.self_generated:
        yield (
            "the repair was fitted on all of the given texts (blocks that are fetched when they "
            "run write none)"
        )
    if a.adapter:
        lost, repaired = len(a.adapter.lost), ", ".join(a.adapter.repaired)
        yield f"{given['out']}-adapter: the adapter without {lost} modules of removed blocks"
        if repaired:
            yield f"it was trained beside other matrices than the repaired {repaired}: measure it"
    if not a.gguf:
        yield f"next: sleb verify {given['out']} --model {given['model']}"
        return
    if a.gguf.other_weights:
        yield (
            "the plan's blocks were chosen, and their cost measured, on other weights of this "
            "model: measure this file before you ship it"
        )
    if a.gguf.imatrices:
        yield f"importance matrices cut along: {', '.join(map(str, a.gguf.imatrices))}"
    yield f"plan as used: {a.gguf.plan}; next: llama-cli -m {given['out']}"


def _verified_facts(v: Any) -> Any:
    parts = {"verification": v.verification, "runtimes": v.runtimes, "gate": v.gate}
    shown = {name: part for name, part in parts.items() if part}
    return v.verification if [*shown] == ["verification"] else shown


def _verified_drawn(v: Any) -> Any:
    found = _verified_facts(v)
    if v.gate is None:
        return found
    from sleb.record import RunRecord

    return {**found, "gate": _limits(v.gate, RunRecord.load(v.record))}


def _limits(gate: Any, record: Any) -> Any:
    """Limits as the report says them, where the record tells what was timed."""
    from sleb.views import proof
    from sleb.views.results import T

    return tuple(proof.gate(T, gate.rows, record.speed))


def _pruned_facts(p: Any) -> Any:
    return p.record if p.quantized is None else {"run": p.record, "quantized": p.quantized}


def _pruned_drawn(p: Any) -> Any:
    from sleb.views.results import depths

    return (p.record, *depths(p.plan), *([] if p.quantized is None else [p.quantized]))


def _not_there(model: str) -> Iterator[str]:
    """That no model is at a path; whether a hub id is one is not asked."""
    from sleb.models.source import find

    try:
        find(model)
    except InputError as error:
        yield f"note: {error}"


def _pruned_notes(p: Any, given: Given) -> Iterator[str]:
    if p.gguf:
        yield f"written: {p.path}, with {p.gguf.plan.name} and {p.path.stem}.run.json beside it"
        if given["keep"]:
            yield f"to go back: {given['model']} is unchanged (--keep is for folders)"
        yield f"next: llama-cli -m {p.path}; sleb report {p.path}"
        return
    yield from _left(p, given)
    if p.quantized is not None:
        yield f"quantized checkpoint written to {p.quantized.path}"


def _left(p: Any, given: Given) -> Iterator[str]:
    """What lies where, and how it becomes a GGUF file."""
    file, model = p.path / "plan.json", given["model"]
    if p.plan.parts:
        yield f"plan written to {file}: sleb.load({str(model)!r}, plan={str(file)!r})"
    else:
        yield from _written(p, given)
    if str(model).endswith(".gguf"):
        if p.record.healed:
            yield f"for a GGUF file of it: sleb apply {file} {model} -o {p.path}.gguf"
        else:
            yield f"for a file as the model's own, in its quantization: -o {p.path}.gguf"


def _quantized_notes(q: Any, given: Given) -> Iterator[str]:
    if q.twice:
        yield (
            f"{Path(given['model']).name} is a GGUF file: its weights had been rounded before, and "
            "now are twice; a model in its original precision gives a better result"
        )
    yield from _written(q, given)


def _evaluated(result: Any, given: Given) -> dict[str, Any]:
    if given["task"]:
        return {"tasks": result}
    if given["prompts"]:
        return {"prompts": result}
    from sleb.record import EvaluationText

    text = EvaluationText(
        windows=result.windows,
        length=result.length,
        source="given",
        texts=tuple(given["text"] or ["default"]),
    )
    return {"evaluation": result, "evaluation_text": text}


def _demonstrated(d: Any) -> Any:
    from sleb.views.model import Text

    lines = (
        f"a prompt of 256 tokens: {d.speedup:.2f}x as fast here (median of 7 pairs of runs)",
        "",
        f"{d.prompt} …",
        f"  original: {d.texts[0]}",
        f"  pruned:   {d.texts[1]}",
        "",
        f"A small sample, chosen to finish in minutes: {d.searched:,} tokens to search, "
        f"{d.measured:,} to measure. The intervals show how little it pins down. For real use, "
        "give text of your own job with --text and more --windows. Nothing was trained.",
        "",
        f"The checkpoint is in {d.pruned.path}: plain transformers loads it, without sleb.",
    )
    plan, record = d.pruned.plan, d.pruned.record
    return (plan, record.verification, record, *map(Text, lines))


def _reports(record: Any, given: Given) -> Iterator[str]:
    from sleb.project import Project

    project = Project.load(given["path"], given["settings"])
    for lang in project.measure.reports:
        yield f"report written to {project.target / f'report.{lang}.html'}"


FORMS = ("mergekit", "llama-cpp", "modelopt-list", "vllm-args", "layer-map")
START, STEPS, MEASURE, AFTER, PROJECT = (
    "Start here",
    "Step by step",
    "Measure",
    "After a cut",
    "All in one file",
)

VERBS = (
    Verb(
        name="demo",
        group=START,
        run="demo.demo",
        help="Prune a small real model by 20 % and show what came of it.",
        example="sleb demo",
        arguments=(
            _text(
                "model",
                "The model. Default: SmolLM2-135M-Instruct, from make demo or the hub.",
                "--model",
                "MODEL",
            ),
            _file("sleb-demo", "Folder to write."),
        ),
        check=lambda given: check_demo(Path(given["out"])),
        drawn=_demonstrated,
        json=False,
    ),
    Verb(
        name="inspect",
        group=START,
        run="describe",
        help="Show a model's blocks, depth-dependent config fields, and what a cut would save.",
        example="sleb inspect HuggingFaceTB/SmolLM2-135M-Instruct",
        arguments=(Argument("ref", MODEL.help, metavar="MODEL"),),
        config="InspectConfig",
        drawn=_described,
        code=lambda found: 4 if found.supported is False else 0,
    ),
    Verb(
        name="prune",
        group=START,
        help="Search, cut, repair and prove; OUT holds the checkpoint, plan, run record and card. "
        "Of a .gguf file OUT may be one too: model.gguf -o smaller.gguf.",
        example="sleb prune ./model --remove 20% -o ./smaller",
        arguments=(
            MODEL,
            FOLDER_OR_FILE,
            _switch(
                "heal", "Train the cut for a while: see sleb heal. OUT-cut is as it was before."
            ),
            _text(
                "quantize",
                "Also write OUT-SCHEME, quantized: w4a16, w8a16, awq or int8. See sleb quantize.",
                "--quantize",
                "SCHEME",
            ),
        ),
        config="PruneConfig",
        dry="pipeline.estimate",
        check=_check_prune,
        facts=_pruned_facts,
        drawn=_pruned_drawn,
        notes=_pruned_notes,
        shared=True,
    ),
    Verb(
        name="similarity",
        group=STEPS,
        help="Compare the outputs of blocks: the first of the method's three stages.",
        example="sleb similarity ./model --text mail.jsonl --measure angular",
        arguments=(MODEL,),
        config="SimilarityConfig",
        shared=True,
    ),
    Verb(
        name="search",
        group=STEPS,
        help="Find the blocks whose removal costs least, and write the plan.",
        example="sleb search ./model --curve --text mail.jsonl -o plan.json",
        arguments=(MODEL, _file("plan.json", "Plan file to write."), FORCE),
        config="SearchConfig",
        dry="verbs.estimate_search",
        check=_new_file,
        notes=lambda plan, given: (
            f"plan written to {given['out']}; next: sleb apply {given['out']} {given['model']} "
            "-o OUT",
        ),
        shared=True,
    ),
    Verb(
        name="apply",
        group=STEPS,
        run="verbs.applied",
        help="Write the checkpoint without the plan's blocks, shard by shard, without loading it; "
        "or cut a GGUF file, if MODEL and OUT both end in .gguf.",
        example="sleb apply plan.json ./model -o ./smaller --depth 3",
        arguments=(PLAN, MODEL, FOLDER_OR_FILE),
        config="ApplyConfig",
        check=_check_apply,
        facts=_applied_facts,
        notes=_applied_notes,
    ),
    Verb(
        name="verify",
        group=STEPS,
        help="Prove that a checkpoint is the original without the plan's blocks, and with "
        "--runtime, that these run it as such. Exit code 3 if not, or if a limit (--gate) is "
        "not kept.",
        example="sleb verify ./smaller --model ./model --plan plan.json",
        arguments=(
            PRUNED,
            _original(),
            _text("plan", "The plan. Default: OUT/plan.json.", "--plan", "FILE"),
        ),
        config="VerifyConfig",
        check=_check_verify,
        facts=_verified_facts,
        drawn=_verified_drawn,
        notes=lambda found, given: (
            ["the proof is run.json's: files and model are those that it is of"]
            if given["recorded"]
            else []
        ),
        sections=lambda found, given: found.sections(),
    ),
    Verb(
        name="restore",
        group=STEPS,
        help="Take a cut back, bit for bit: the original, or a smaller cut, from OUT and "
        "OUT/rollback.",
        example="sleb restore ./smaller -o ./model-again",
        arguments=(CUT, replace(OUT, help="Folder for the restored model.")),
        config="RestoreConfig",
        check=_check_restore,
    ),
    Verb(
        name="eval",
        group=MEASURE,
        run="evaluate",
        help="Perplexity or tasks, with 95 % intervals; with --plan, dense and pruned side by "
        "side, or with --prompts how much of the answers a cut keeps.",
        example="sleb eval ./model --text test.txt --plan plan.json",
        arguments=(MODEL, RECORD),
        config="EvalConfig",
        check=_check_eval,
        sections=_evaluated,
        shared=True,
    ),
    Verb(
        name="compare",
        group=MEASURE,
        help="Your own prompts through both models: what changed in the answers.",
        example="sleb compare ./model ./smaller --prompts prompts.jsonl",
        arguments=(MODEL, PRUNED, Argument("prompts", PROMPTS, "--prompts", "FILE"), RECORD),
        config="CompareConfig",
        check=_check_compare,
        sections=lambda found, given: {"answers": found},
    ),
    Verb(
        name="bench",
        group=MEASURE,
        help="Speed and memory, dense and pruned in turn, against what is possible.",
        example="sleb bench ./model ./smaller --quick",
        arguments=(
            MODEL,
            Argument("outs", "Pruned checkpoints.", "", "[OUT]...", list[str] | None, None),
            _text("prompts", "Prompts to draft for. Default: embedded text.", "--prompts", "FILE"),
            RECORD,
        ),
        config="BenchConfig",
        check=_check_bench,
        sections=lambda found, given: {"draft" if given["draft"] else "speed": found},
    ),
    Verb(
        name="transfer",
        group=MEASURE,
        help="Search on each --text and on all of them, and score every choice on every text.",
        example="sleb transfer ./model --text mail=mail.jsonl --text code=code.txt --remove 20%",
        arguments=(MODEL, RECORD),
        config="TransferConfig",
        check=_check_transfer,
        sections=lambda found, given: {"transfer": found},
        shared=True,
    ),
    Verb(
        name="heal",
        shared=True,
        group=AFTER,
        help="Optional second stage: train the cut model to predict what the original predicts.",
        example="sleb heal ./smaller --model ./model --text mail.jsonl -o ./healed",
        arguments=(
            CUT,
            _original("The original model, the teacher."),
            replace(OUT, help="Folder for the healed checkpoint."),
        ),
        config="HealConfig",
        check=_check_heal,
        facts=_pruned_facts,
        notes=_left,
    ),
    Verb(
        name="quantize",
        group=AFTER,
        help="Round the weights of a model, pruned or not, to 4 or 8 bits.",
        example="sleb quantize ./smaller --scheme w4a16 --text mail.jsonl -o ./smaller-w4a16",
        arguments=(MODEL, OUT),
        config="QuantizeConfig",
        check=_new_folder,
        notes=_quantized_notes,
    ),
    Verb(
        name="export",
        group=AFTER,
        help="Put a plan in the words of another tool, on stdout or in a file.",
        example="sleb export plan.json --as mergekit --model ./model -o merge.yml",
        notes=lambda done, given: [f"note: {note}" for note in done.notes],
        arguments=(
            PLAN,
            Argument(
                "form",
                f"{', '.join(FORMS)}.",
                "--as",
                "FORM",
                choices=FORMS,
            ),
            _original(default=None),
            replace(OUT, help="File to write. Default: stdout.", type=str | None, default=None),
        ),
        config="ExportConfig",
        check=_new_file,
        json=False,
        filter=True,
    ),
    Verb(
        name="push",
        group=AFTER,
        help="Upload a checkpoint, checked against its checksums, to the Hugging Face hub.",
        example="sleb push ./smaller me/smaller --private",
        arguments=(PRUNED, Argument("repo", "OWNER/NAME on the hub.", metavar="REPO")),
        config="PushConfig",
    ),
    Verb(
        name="init",
        group=PROJECT,
        help="Write a commented project file for sleb run.",
        example="sleb init --model ./model",
        arguments=(
            _file("sleb.toml"),
            _original("Folder, hub id, or .gguf file.", "./model"),
        ),
        config="OutputOptions",
        check=_new_file,
        notes=lambda out, given: (
            f"{out} written; set the texts in it, then: sleb run {out}",
            *_not_there(given["model"]),
        ),
        json=False,
    ),
    Verb(
        name="run",
        group=PROJECT,
        help="Do all that a project file asks for, from search to report. Exit code 3 if a "
        "limit ([gate]) is not kept.",
        example="sleb run sleb.toml --set search.remove=3",
        arguments=(Argument("path", "Project file from sleb init.", metavar="FILE"),),
        config="RunConfig",
        dry="project.estimate",
        check=_check_project,
        drawn=lambda r: (r, _limits(r.gate, r)) if r.gate else r,
        notes=_reports,
        code=lambda record: _require(record.gate),
    ),
    Verb(
        name="report",
        group=PROJECT,
        help="Write what a run measured as one HTML page; of several runs, side by side.",
        example="sleb report ./smaller -o report.html --lang ja",
        arguments=(
            Argument(
                "run",
                "Folders or .gguf files from sleb prune or run.",
                "",
                "RUN...",
                list[str],
            ),
            _file("report.html"),
            Argument("lang", "en or ja.", "--lang", "LANG", default="en", choices=("en", "ja")),
        ),
        config="OutputOptions",
        check=_check_report,
        notes=lambda out, given: (f"report written to {given['out']}",),
        json=False,
    ),
)


# --- doing one ---------------------------------------------------------------------------------


class Interrupted(Exception):
    """Ctrl-C while a verb ran; says how to go on."""


def command(verb: Verb) -> Any:
    """Its typer command; making it imports pydantic."""
    from sleb.cli.build import built

    revision = [REVISION] if verb.model else []
    last = [argument for argument in verb.own if argument is not RECORD]
    return built(
        verb.name,
        _interruptible(verb),
        arguments=(*verb.arguments, *revision, *last),
        config=verb.options,
        help=verb.help,
        example=verb.example,
    )


def _run(verb: Verb, given: dict[str, Any], command: str, began: float | None) -> int:
    """``command``: the line; ``began``: when it was, None for the moment this process began."""
    config = _configured(verb, given)
    given = {**given, **dict(config)}
    _check(verb, config, given)
    if given["verbose"]:
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    from sleb.core.display import LONG_S, since
    from sleb.core.progress import spelled
    from sleb.core.showing import terminal_progress

    progress = terminal_progress(quiet=given["quiet"], verbose=given["verbose"])
    if given.get("estimate"):
        return _foretold(verb, config, given, progress)
    with progress.stage("starting", None):  # torch and transformers are imported
        function = verb.function
    _check_record(given)
    own = {argument.name for argument in verb.own}
    values = {name: value for name, value in given.items() if name not in own}
    if verb.name in ("prune", "heal"):
        values["command"] = command
    if verb.name not in ("init", "report"):
        values["progress"] = progress
    result = function(**values)
    _close(progress)
    as_json = given.get("json", False)
    if verb.filter:
        sys.stdout.write("" if given["out"] else result.text)
    elif as_json:
        _show(verb.facts(result), json=True)
    elif not isinstance(result, Path):
        _show((verb.drawn or verb.facts)(result))
    sections = verb.sections(result, given) if verb.sections else {}
    folder = given["record"] if "record" in given else given["out"] if sections else None
    if folder is not None and sections and group().is_main:
        from sleb.record import RunRecord

        RunRecord.update(folder, **sections)
        _note(f"recorded in {record_path(Path(folder))}", as_json)
    for line in verb.notes(result, given) if not given["quiet"] else ():
        _note(line, as_json or verb.filter)
    if not given["quiet"] and (spent := since(began)) >= LONG_S:
        _note(f"took {spelled(spent)}, from the command to here", True)
    return verb.code(result)


def _configured(verb: Verb, given: dict[str, Any]) -> Options:
    """The checked options among what was given."""
    from sleb.cli.build import as_config

    if verb.model and (revision := given.pop("revision")):
        given[verb.model] = f"{given[verb.model]}@{revision}"
    if given.get("text"):  # texts themselves are for programs
        from sleb.calibration.sources import check_sources

        check_sources(given["text"])
    return as_config(verb.options, given)


def _foretold(verb: Verb, config: Options, given: Given, progress: Any) -> int:
    """What a run would take."""
    from sleb.config import HealConfig, PruneConfig

    places = {name: given[name] for name in ("model", "out", "path") if name in given}
    how: dict[str, Any] = {"progress": progress}
    if isinstance(config, PruneConfig) and given["heal"]:
        how["heal"] = HealConfig.after(config, {})
    found = verb.named(verb.dry)(**places, config=config, **how)
    if given["json"]:
        _show(found, json=True)
    for line in () if given["json"] else found.lines:
        _note(line, False)
    return 0


def _close(progress: Any) -> None:
    """The last phase has ended."""
    if hasattr(progress, "finish"):
        progress.finish()


def _check(verb: Verb, config: Options, given: Given) -> None:
    """Find mistakes before torch is imported, which takes seconds."""
    from sleb.cli.build import choose
    from sleb.config import SearchConfig

    for argument in verb.arguments:
        choose(argument.name, given[argument.name], argument.choices)
    verb.check(given)
    if given.get("record"):
        existing_record(Path(given["record"]))
    if isinstance(config, SearchConfig):
        from sleb.selection.goal import Goal

        Goal.of(config)
    if asked := given.get("prompts"):
        _check_texts((), [asked] if isinstance(asked, str) else asked)
    if given.get("device"):
        from sleb.models.on_disk import check_device

        check_device(given["device"])
    if verb.model and given[verb.model] is not None and verb.name not in ("init", "demo"):
        from sleb.models.source import find

        found = find(given[verb.model])
        if isinstance(config, SearchConfig):
            _check_depth(config, found)


def _check_search(config: SearchConfig, model: str) -> None:
    """The same of a search that a project file asks for."""
    from sleb.models.on_disk import check_device
    from sleb.models.source import find
    from sleb.selection.goal import Goal

    Goal.of(config)
    check_device(config.device)
    _check_depth(config, find(model))


def _check_depth(config: SearchConfig, found: Any) -> None:
    """Refuse what cannot be removed from so many blocks; ``found``: see find."""
    from sleb.models.on_disk import stated_depth
    from sleb.selection.goal import Goal

    if isinstance(found, Path) and config.unit == "block" and (n := stated_depth(found)):
        Goal.of(config).check_depth(n, config.protect)


def _check_texts(texts: Sequence[str], prompts: Iterable[str]) -> None:
    """Find out that files are not there."""
    from sleb.calibration.rows import existing_file
    from sleb.calibration.sources import check_sources
    from sleb.config import DEFAULT_PROMPTS, NO_PROMPTS

    check_sources(texts)
    for file in prompts:
        if file not in (NO_PROMPTS, DEFAULT_PROMPTS):
            existing_file(file)


def _show(facts: Any, json: bool = False) -> None:
    """On stdout. Facts that are drawn already are a list; the views of all others know all types
    of results, and so import torch."""
    if json or isinstance(facts, list):
        from sleb.views import terminal

        terminal.write_json(facts) if json else terminal.draw(facts, terminal.console())
    else:
        from sleb.views.results import show

        show(facts)


def _note(text: str, aside: bool) -> None:
    """A last line; on stderr if stdout is for a program."""
    print(printable(text, LONGEST_MESSAGE), file=sys.stderr if aside else sys.stdout)


def _check_record(given: Given) -> None:
    """Refuse --record early where nothing could be recorded."""
    folder = given.get("record")
    if folder is None:
        return
    from sleb.record import RunRecord

    known = RunRecord.load(folder)
    if not given.get("plan"):
        return
    from sleb.core.plan import Plan

    plan = Plan.load(given["plan"])
    if given.get("prompts") and plan.saw_unknown:
        raise InputError(
            f"{given['plan']} is of an older sleb and does not say by which prompts the cut was "
            "made, so what --prompts measures may be no held-out figure: prune again, or leave out "
            "--record"
        )
    removed = plan.at_depth(given["depth"])
    if known.removed != removed:
        raise InputError(
            f"--record {folder} is of a model without blocks {list(known.removed)}, and these are "
            f"{list(removed)}; give the plan that it was made with"
        )


def _interruptible(verb: Verb) -> Callable[[typer.Context, dict[str, Any]], int]:
    def call(context: typer.Context, given: dict[str, Any]) -> int:
        if group().several and not verb.shared and not leave_group():
            return 0
        try:
            code = _run(verb, given, *context.obj)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            why = "interrupted, or another process has ended" if group().several else "interrupted"
            raise Interrupted(f"{why}; {_how_to_go_on(verb, given)}") from None
        except Lost as error:
            raise Lost(f"{error}; {_how_to_go_on(verb, given)}") from None
        except BrokenPipeError:  # the reader of stdout has gone, as `head` does
            return 0
        finally:
            try:
                sys.stdout.flush()
            except OSError:  # reported by now; else Python would meet it again when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return call


def _how_to_go_on(verb: Verb, given: Given) -> str:
    out = given.get("out")
    if given.get("estimate"):
        return "nothing was written"
    if verb.name == "run":
        return "what is finished is kept: repeat the command to go on"
    with_any = ", with any number of processes" if group().several else ""
    heals = given.get("heal")
    cut = f"{out}-cut" if heals else f"{out}"  # what is searched for, before a healing
    for beside, what in {
        f"{out}.heal": "the training so far is in {}: repeat the command to go on",
        f"{out}.stages": "the stages so far are in {}: repeat the command to go on",
        f"{cut}.journal": f"scores so far are in {{}}: repeat the command to go on{with_any}",
        **({cut: "the cut stays in {}: repeat the command to go on"} if heals else {}),
    }.items():
        if out and Path(beside).exists():
            return what.format(beside)
    return "nothing was written"
