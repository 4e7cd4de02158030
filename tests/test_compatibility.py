"""Configs in the form of models of 2025 and 2026, with sizes shrunk and random weights: each is
inspected, searched, cut, verified and restored, and the cut read by other runtimes.

`make test-runtimes` runs it and writes docs/compatibility.md. SLEB_TEST_TRANSFORMERS_4 and
SLEB_TEST_MLX are the Pythons that have them, SLEB_COMPATIBILITY is the file to write.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

import sleb
from gguf_of import can_be_gguf, write_gguf_of
from hub_configs import FILES, HUB, MODELS, hub_folder
from plan_tools import plan_of
from runtime_tools import next_logprobs
from sleb.core.errors import UnsupportedModel
from sleb.core.plan import Plan
from sleb.runtimes import compatibility
from sleb.runtimes.compatibility import Verdict, check_runtimes
from sleb.runtimes.worker import Worker
from sleb.surgery.gguf_cut import cut_gguf
from wrappers import PUBLISHED, wrapper_folder

pytestmark = pytest.mark.runtimes

FEW = {"windows": 2, "heldout": 0, "length": 32, "protect": "", "device": "cpu"}
PROMPTS = [[3, 200, 77, 5], [(7 * i * i) % 250 + 3 for i in range(96)]]
PERIODS = {"jamba"}
"""A search takes blocks one by one, and here whole periods alone can go."""
SOURCES: dict[str, str | None] = {
    **{r["of"]: r.get("source") for r in FILES["models"].values() if "of" in r},
    **{of: source for of, (_, source, _) in PUBLISHED.items()},
}
"""Where each published model's file was read; None: written from memory."""
HEAD = """\
# Compatibility

Written by `make test-runtimes` (tests/test_compatibility.py), not by hand. Each row is a
config.json in the form of the named model's: its type, the words of its fields, and how its blocks
alternate, with eight blocks (six in the decoders of some vision-language models), small widths and
random weights. Where a number follows the name, the model's own file, or what a public repository
quotes of it, was read there ([below](#where-the-files-were-read); some quote a part of it); the
others are written from memory, *unconfirmed*. Each was inspected, searched (jamba: cut by hand,
since only whole periods of its pattern can go), cut, verified in transformers {transformers}, and
restored to the byte.

The cut was then read by the other runtimes. Figures are the mean absolute deviation of
log-probabilities from transformers {transformers}'s, in nats per token: of the original, and of the
cut from the original with its blocks bypassed. They must be alike, as `sleb verify --runtime` has
it. *moves*: what the cut itself moves log-probabilities by.

llama.cpp (xllamacpp {llama}) reads the same weights as a GGUF file that is written for this table,
where that takes no more than names, and the cut as `sleb apply` makes it of the file; its figures
are of the next token after two prompts.

- *wrong*, *does not load*: it goes by a block's place; `sleb verify --runtime` refuses the cut, by
  rule too where the runtime is not installed
- *otherwise*: it computes the original otherwise than transformers {transformers} as well
- *refused*: sleb does not cut the file so, as llama.cpp would not run it exactly
- –: it does not take the original, or no file was written

| model | type | removed | moves | transformers {older} | its cut | mlx-lm {mlx} | its cut | \
llama.cpp | its cut |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


@dataclass
class Table:
    """The rows, and the versions of the runtimes that were asked."""

    rows: list[str]
    versions: dict[str, str | None]


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    made = Table(rows=[], versions={"llama": None})
    if apple := os.environ.get("SLEB_TEST_MLX"):
        asked = "import importlib.metadata as m; print(m.version('xllamacpp'), end='')"
        made.versions["llama"] = subprocess.check_output([apple, "-c", asked], text=True)
    yield made
    if file := os.environ.get("SLEB_COMPATIBILITY"):
        head = HEAD.format(transformers=version("transformers"), **made.versions)
        read = [source for source in SOURCES.values() if source]
        where = "".join(f"{i}. {source}\n" for i, source in enumerate(dict.fromkeys(read), 1))
        rows = "\n".join(made.rows) + "\n\n## Where the files were read\n\n"
        Path(file).write_text(head + rows + where, encoding="utf-8")


def reference(name: str) -> str:
    """The number of a model's source in the list, or that there is none."""
    read = list(dict.fromkeys(source for source in SOURCES.values() if source))
    source = SOURCES[name]
    return f"[{read.index(source) + 1}]" if source else "*unconfirmed*"


class Resident(Worker):
    """A child that stays: to import a runtime takes longer than all that these models do there."""

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def residents() -> Iterator[None]:
    """One child for each interpreter, and another when that ends."""
    kept: dict[str | None, Resident] = {}

    def resident(name: str, python: str | None = None) -> Resident:
        if python not in kept or kept[python]._child._process.poll() is not None:
            kept[python] = Resident(name, python)
        return kept[python]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compatibility, "Worker", resident)
        yield
    for child in kept.values():
        child._child.close()


def cells(found: Verdict) -> str:
    """A verdict's two figures, or why there are none."""
    if found.dense is None:
        return "– | –"
    if found.pruned is None:
        return f"{found.dense:.1g} | *does not load*"
    said = {"accepted": "", "refused": " *wrong*", "undecided": " *otherwise*"}[found.verdict]
    return f"{found.dense:.1g} | {found.pruned:.1g}{said}"


def llama_cpp(source: Path, out: Path, plan: Plan, python: str, folder: Path) -> tuple[float, ...]:
    """Mean absolute deviation of log-probabilities, of the original's file and, unless sleb refuses
    it, of its cut, from transformers'; none if no file can be written."""
    if not can_be_gguf(source):
        return ()
    files, models = [write_gguf_of(source, folder / "model.gguf")], [source, out]
    with suppress(UnsupportedModel):
        files.append(cut_gguf(plan, files[0], folder / "cut.gguf", other_weights=True).out)
    deviations = []
    for found, model in zip(next_logprobs(python, files, PROMPTS), models, strict=False):
        loaded = sleb.load(model, dtype="float32", device="cpu").model
        with torch.inference_mode():
            logits = [loaded(input_ids=torch.tensor([ids])).logits[0, -1] for ids in PROMPTS]
        expected = torch.stack(logits).log_softmax(-1).numpy()
        deviations.append(float(np.abs(found - expected).mean()))
    return tuple(deviations)


def published(name: str, folder: Path) -> Path:
    """A random model with the config of a published one."""
    for key, of in MODELS.items():
        if of == name:
            return hub_folder(key, folder)
    key, _, changes = PUBLISHED[name]
    return wrapper_folder(key, folder, changes=changes)


def python(name: str) -> str:
    return os.environ.get(name) or pytest.skip(f"{name} is not set; `make test-runtimes` sets it")


@pytest.mark.parametrize("name", SOURCES)
def test_a_cut_is_the_same_model_everywhere(name, tmp_path, table):
    older, mlx = python("SLEB_TEST_TRANSFORMERS_4"), python("SLEB_TEST_MLX")
    source, out = published(name, tmp_path / "model"), tmp_path / "cut"
    kind = sleb.describe(source).model_type
    if kind in PERIODS:
        plan = plan_of(source, *HUB[kind][1][0])
    else:
        plan = sleb.search(source, remove=2, **FEW)
    sleb.apply(plan, source, out, keep=True)
    sleb.verify(out, model=source).require()
    sleb.restore(out, tmp_path / "back")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()

    given = {"model": source, "plan": plan}
    asked = {"transformers": older, "mlx-lm": mlx}
    found = check_runtimes(out, **given, runtimes=list(asked), pythons=asked)
    assert found.moved is not None
    assert all(verdict.version for verdict in found.verdicts), found.verdicts
    before, apple = found.verdicts
    (ruled,) = check_runtimes(out, **given, runtimes=["mlx-lm"]).verdicts
    table.versions |= {"older": before.version, "mlx": apple.version}
    removed = ", ".join(map(str, plan.removed))
    row = [f"{name} {reference(name)}", kind, removed, f"{found.moved:.2f}"]
    row += [cells(before), cells(apple)]
    dense, *pruned = llama_cpp(source, out, plan, mlx, tmp_path) or (None,)
    row += ["–" if dense is None else f"{dense:.1g}"]
    row += ["–" if dense is None else f"{pruned[0]:.1g}" if pruned else "*refused*"]
    table.rows.append(f"| {' | '.join(row)} |")
    assert all(deviation <= 3 * dense + 0.001 for deviation in pruned)
    assert before.verdict != "refused", before.why
    if apple.verdict != "undecided":
        assert ruled.verdict == apple.verdict, apple.why
