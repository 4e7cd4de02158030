"""Records, pages made of them in memory, and pages read as a browser would: by section, by table,
by link. Every figure of tests/data/run.json is made up; its plan is :func:`report_plan.plan`."""

import os
from dataclasses import dataclass, field, fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

from markupsafe import Markup
from pydantic import BaseModel

from report_plan import plan, repaired_plan
from sleb.core.finding import finding
from sleb.core.statistics import Interval
from sleb.distillation.record import Healed, HealedText
from sleb.record import EvaluationText, GateResult, RunRecord
from sleb.runtimes.bench import Skipped
from sleb.surgery.gates import Check
from sleb.views.html import render
from sleb.views.locale import Locale
from sleb.views.report import Report

HERE = Path(__file__).parent
EVIL = "<script>alert(1)</script>"
PANELS = ["worst", "removed", "quality", "servers", "untested", "rollback"]
SECTIONS = [
    *("map", "why", "rounds", "similarity", "curve", "texts", "tasks", "answers", "speed"),
    *("draft", "transfer", "exact", "runtimes", "gate", "provenance"),
]
MEASURED = (
    *(
        "evaluation",
        "evaluation_text",
        "similarity",
        "tasks",
        "answers",
        "prompts",
        "speed",
        "transfer",
    ),
    *("gate", "runtimes", "draft"),
)
VOID = {"meta", "link", "img", "br", "hr", "input"}
INLINE = {"a", "code", "span", "small", "i"}
INVISIBLE = str.maketrans({"\u00a0": " ", "\u2060": None})


def put(value, path, new):
    """``value`` with ``new`` at ``path``, such as ``speed.ratios.3.ratio.low``."""
    key, _, rest = path.partition(".")
    if isinstance(value, tuple):
        at = int(key)
        return (*value[:at], put(value[at], rest, new) if rest else new, *value[at + 1 :])
    if isinstance(value, dict):
        return {**value, key: put(value[key], rest, new) if rest else new}
    new = put(getattr(value, key), rest, new) if rest else new
    if isinstance(value, BaseModel):
        assert key in type(value).model_fields
        return value.model_copy(update={key: new})
    assert is_dataclass(value)
    assert key in {f.name for f in fields(value)}
    return replace(value, **{key: new})


def complete(**changes):
    """A record with every section."""
    return replace(RunRecord.load(HERE / "data"), **changes)


def sparse(**changes):
    """A record of `sleb prune` without text to spare: nothing but the cut and its proof."""
    return complete(**{**dict.fromkeys(MEASURED), **changes})


def repaired(**changes):
    """A complete record of a repaired cut; its plan is :func:`report_plan.repaired_plan`."""
    record = complete()
    ratios = {
        "perplexity_ratio": Interval(value=1.4321, low=1.3579, high=1.5151),
        "domains.mail.perplexity_ratio": Interval(value=1.31, low=1.2, high=1.43),
        "domains.manuals.perplexity_ratio": Interval(value=1.52, low=1.41, high=1.63),
    }
    plain = record.evaluation
    for path, ratio in ratios.items():
        plain = put(plain, path, ratio)
    checks = record.verification.checks
    first = Check(
        key="repaired-tensors",
        passed=True,
        found=finding("equal", tensors=6),
    )
    both = finding("equal", tensors=78, repaired=6)
    weights = replace(checks[3], key="weights-but-repaired", found=both)
    checks = (first, *checks[:3], weights, *checks[4:])
    record = put(record, "verification.checks", checks)
    record = replace(record, evaluation=replace(record.evaluation, unrepaired=plain))
    return replace(record, **changes)


def healed():
    """A complete record of a cut that was trained after it was made."""
    record = complete()
    q = record.evaluation
    text = HealedText(
        windows=q.windows,
        perplexity=q.perplexity,
        cut_ratio=q.perplexity_ratio,
        healed_ratio=q.perplexity_ratio,
        cut_divergence=q.divergence,
        healed_divergence=q.divergence,
    )
    calibration = plan().calibration
    done = Healed(
        path="H",
        model=record.model,
        cut="OUT",
        removed=record.removed,
        repaired=True,
        texts={"mail": text},
        overall=text,
        steps=9,
        best_step=8,
        tokens=72000,
        passes={"texts": 1.5},
        lr=1e-5,
        rates=((0.0, 0.2), (1e-5, 0.1)),
        stopped="steps",
        seconds=12.0,
        tokens_per_second=6000.0,
        teraflops=1.5,
        product_teraflops=3.0,
        trained_parameters=123456,
        checks=((0, (0.2,)), (8, (0.1,))),
        settings={"lora": None},
        calibration={"texts": calibration},
        heldout={"texts": calibration},
        cut_sha256="0" * 64,
        healed_sha256="1" * 64,
    )
    prompts = replace(record.prompts, unhealed=record.prompts.agreement, left_out=24)
    return replace(record, healed=done, prompts=prompts)


def passed_gate():
    """A gate whose limits are kept."""
    return GateResult(rows=complete().gate.rows[:2])


def page(record=None, chosen=None, lang="en"):
    """The report as values."""
    return Report(
        record=record or complete(),
        plan=chosen or plan(),
        t=Locale(lang, markup=True),
        digests={"run.json": "ab" * 32, "plan.json": "cd" * 32},
    ).page


def html(record=None, chosen=None, lang="en", charts=False):
    """The report as HTML; without ``charts``, which take time, in their places are empty ones."""
    made = page(record, chosen, lang)
    if charts:
        return render(made)
    with patch("sleb.views.html.draw", lambda *chart: Markup('<svg role="img"></svg>')):
        return render(made)


def seen(record=None, chosen=None, lang="en", charts=False):
    """The report, read."""
    return Seen(html(record, chosen, lang, charts))


def save(folder, record, chosen):
    """Write both files where a run leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    record.save(folder / "run.json")
    chosen.save(folder / "plan.json")
    return folder


def snapshot(name, text):
    """Compare with tests/snapshots; SLEB_UPDATE_SNAPSHOTS=1 writes what is to be expected."""
    path = HERE / "snapshots" / name
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    if os.environ.get("SLEB_UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{name} has changed"


def hostile(evil=EVIL, image='"><img src=x onerror=alert(1)>'):
    """A record and a plan in which whatever a person or a file names is HTML."""
    record = repaired(command=evil, model=f"models/{evil}", environment={"device": image})
    both = {evil: record.evaluation, image: record.evaluation}
    for path, new in {
        "verification.checkpoint": image,
        "evaluation.domains": both,
        "evaluation.unrepaired.domains": both,
        "evaluation_text": EvaluationText(windows=1, length=8, source="given", texts=(evil,)),
        "tasks.0.name": evil,
        "tasks.1.metric": image,
        "answers.pairs.4.prompt": evil,
        "answers.pairs.4.id": image,
        "answers.pairs.4.pruned.text": f"</p>{image}",
        "answers.pairs.3.pruned.script": evil,
        "speed.skipped": tuple(Skipped(reason="note", detail=x) for x in (evil, image)),
        "speed.device": evil,
        "draft.drafts.0.path": image,
        "runtimes.verdicts.1.why": finding("error", error=evil),
        "runtimes.verdicts.0.why": finding(image, listed=(evil,)),
        "runtimes.verdicts.2.runtime": image,
        "transfer.domains": (evil, image),
        "gate.rows.2.of": evil,
        "gate.rows.3.of": image,
        "verification.checks.0.found": finding("error", error=evil),
        "verification.checks.1.found": finding("differ", field=image),
        "verification.checks.2.found": finding("equal", fields=(evil, image)),
    }.items():
        record = put(record, path, new)
    chosen = repaired_plan(metric=evil, strategy=image, unit=evil, versions={evil: image})
    for losses in ("before", "after"):
        chosen = put(chosen, f"repair.gaps.0.{losses}", {evil: 3.2, image: 3.1})
    chosen = put(chosen, "repair.calibration.sources.0.spec", image)
    return record, put(chosen, "calibration.sources.0.spec", evil)


def big():
    """80 blocks of which 16 leave, and 200 prompts with long answers."""
    blocks, order = 80, tuple(range(10, 58, 3))
    score = plan().rounds[0].scores[0]

    def scores(gone):
        live = [b for b in range(1, 79) if b not in gone]
        return tuple(score.model_copy(update={"block": b, "mean": 2.9 + b / 97}) for b in live)

    rounds = tuple(
        put(put(plan().rounds[0], "scores", scores(order[:i])), "removed", (block,))
        for i, block in enumerate(order)
    )
    chosen = put(plan(), "model.blocks", blocks)
    chosen = chosen.model_copy(
        update={"removed": order, "order": order, "rounds": rounds, "protected": (0, 79)}
    )
    record = complete(removed=order, blocks=blocks)
    alike = record.similarity[0]
    states = tuple(tuple(alike[abs(i - j) % 13] for j in range(81)) for i in range(81))
    one = record.answers.pairs[4]
    long = put(put(one, "dense.text", "a word " * 900), "pruned.text", "many words " * 900)
    pairs = tuple(replace(long, id=str(i), agreed=i % 40) for i in range(200))
    return put(replace(record, similarity=states), "answers.pairs", pairs), chosen


@dataclass
class Seen(HTMLParser):
    """What a page has."""

    source: str
    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, list[list[str]]] = field(default_factory=dict)

    def __post_init__(self):
        super().__init__()
        self._open: list[tuple[str, str | None]] = []
        self.feed(self.source)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append((tag, named))
        if named.get("id"):
            self.ids.append(named["id"])
        if tag == "a":
            self.links.append(named["href"])
        if tag not in VOID:
            self._open.append((tag, named.get("id")))
        for place in self._places():
            if tag not in INLINE:
                self.texts.setdefault(place, []).append("\n")
            if tag == "tr":
                self.rows.setdefault(place, []).append([])
            if tag in ("td", "th"):
                self.rows[place][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        opened, _ = self._open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        shown = data.translate(INVISIBLE)
        names = [tag for tag, _ in self._open]
        for place in self._places():
            self.texts.setdefault(place, []).append(shown)
            if "td" in names or "th" in names:
                self.rows[place][-1][-1] += shown

    def _places(self):
        return [name for tag, name in self._open if name and tag in ("section", "div")]

    def text(self, place):
        """All text below the element of this id, on one line."""
        return " ".join("".join(self.texts[place]).split())

    def lines(self, place):
        """The same, a line per cell, term or paragraph."""
        found = (" ".join(line.split()) for line in "".join(self.texts[place]).split("\n"))
        return "\n".join(filter(None, found))
