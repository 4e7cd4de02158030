"""The model card of every checkpoint that is written, and sections that are added to one.

The metadata is what a hub shows, searches by, and takes the licence from. What is carried over from
the original's card was written by others, so it is checked against the form that the hub documents
for each field, and left out where it has another.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sleb.core.plan import Origin, Plan
from sleb.core.printable import printable

logger = logging.getLogger(__name__)

MAX_CARD = 2**20
"""Longest card that is read, in bytes."""
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8}){0,3}")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}")
_LINK = re.compile(r"https?://[^\s<>\"'`]{1,500}|[A-Za-z0-9][\w.-]{0,127}")
_LINE = re.compile(r"[^\x00-\x1f\x7f\u0085\u2028\u2029]{1,128}")
_RESULTS = re.compile(r"^model-index:\n(?:(?:- |  ).*\n)*", re.MULTILINE)
_LICENCE_FILE = re.compile(r"(LICEN[CS]E|COPYING)(\.(txt|md))?", re.IGNORECASE)

_CARD = """{front}

# {name} without {gone} of its {blocks} transformer blocks

Removed blocks (original numbering, first is 0): {removed}; {left} remain. {changed} \
{how}The order of removal, and the scores behind it, are in `plan.json`.

{measured}

```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

## Provenance

| | |
| --- | --- |
{provenance}

## Check

```
sha256sum -c SHA256SUMS
sleb verify PATH --model ORIGINAL
```

The second proves that it is the original without these blocks.
{rollback}
Method: SLEB (Song et al., ICML 2024, arXiv:2402.09025).
"""
_ROLLBACK = """
## Roll back

The original is kept too: `sleb restore PATH -o ORIGINAL` rebuilds it bit for bit from this \
folder and its `rollback/`, `--depth K` a smaller cut.
"""
_ROLLBACK_FOLDER = """
## Roll back

The original, a .gguf file, was read as a folder of 16-bit weights. `sleb restore PATH -o \
ORIGINAL` rebuilds that folder bit for bit from this one and its `rollback/`, `--depth K` a \
smaller cut; it does not rebuild the .gguf file.
"""


Rebuilt = Literal["", "original", "folder"]


def rebuilt(kept: bool, *, gguf: bool) -> Rebuilt:
    """What a cut's side-car rebuilds, if it is ``kept``: of a ``gguf`` file the folder that this
    was read as."""
    return "" if not kept else "folder" if gguf else "original"


def cut_card(
    plan: Plan,
    source: Path,
    *,
    model: str | None = None,
    how: str = "",
    command: str = "",
    measured: Sequence[str] = (),
    kept: Rebuilt = "",
    results: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a cut by ``plan``; ``source`` is the original's folder, ``model`` the original
    as the user named it. ``how``: a sentence on how it came about; ``command``: that made it;
    ``measured``: lines of Markdown on what it costs, and ``results``: the same as a hub lists it
    (see :func:`front_matter`); ``kept``: see :func:`rebuilt`."""
    of = plan.model
    told = "\n".join(measured) or "It was not measured: do so before you rely on it."
    return _CARD.format(
        front=front_matter(source, model, images=_reads_images(of.architecture), **(results or {})),
        loader=f"AutoModelFor{'ImageTextToText' if _reads_images(of.architecture) else 'CausalLM'}",
        name=_title(model, of.architecture or of.model_type),
        gone=len(plan.removed),
        blocks=of.blocks,
        removed=", ".join(map(str, plan.removed)),
        left=of.blocks - len(plan.removed),
        changed=_changed(plan),
        how=f"{how} " if how else "",
        measured="\n".join([*([*_fenced(command), ""] if command else []), told.rstrip()]),
        provenance="\n".join(_provenance(plan, source, model)),
        rollback={"original": _ROLLBACK, "folder": _ROLLBACK_FOLDER}.get(kept, ""),
    )


def with_section(folder: Path, title: str, lines: Iterable[str]) -> str:
    """The card in ``folder``, if there is one, and below it a section on what was done since, of
    which what is said above is not true. The metadata's results are left out."""
    card = folder / "README.md"
    before = card.read_text(encoding="utf-8") if card.is_file() else ""
    above = [_RESULTS.sub("", before, count=1).rstrip(), ""] if before else []
    since = ["What is said above is of the checkpoint before that, weights and figures alike.", ""]
    parts = [*above, f"## {title}", "", *(since if above else []), *lines]
    return "\n".join(parts) + "\n"


def _reads_images(architecture: str) -> bool:
    """Whether the original is a decoder with towers for images beside it, by its class's name;
    encoder-decoders, which are called so too, are not cut."""
    return architecture.endswith("ForConditionalGeneration")


def front_matter(
    source: Path, model: str | None = None, *, images: bool = False, **results: Any
) -> str:
    """Lines from ``---`` to ``---``, valid YAML. ``source`` is the original's folder, ``model``
    the original as the user named it: it becomes the base model if it is an id on the hub;
    ``images``: the model reads images too; ``results``: ``model_name`` and ``eval_results`` of
    huggingface_hub, the list that a hub shows beside the card.

    The hub knows four relations to a base model (adapter, finetune, merge, quantized); a cut is
    shown under the second, which is the one for changed weights.
    """
    from huggingface_hub import ModelCardData

    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if images else "text-generation",
        "tags": ["sleb", "pruned", "block-pruning"],
        **inherited(source),
        **results,
    }
    if base := _hub_id(model, source):
        fields |= {"base_model": base, "base_model_relation": "finetune"}
    data = ModelCardData(**fields)
    return f"---\n{data.to_yaml()}\n---"


def inherited(source: Path) -> dict[str, Any]:
    """Licence and language from the original's card, as far as they have the hub's form. Where it
    names no licence, but a licence file lies beside it, that is what is named."""
    stated = _stated(source / "README.md")
    found: dict[str, Any] = {}
    license = stated.get("license")
    if isinstance(license, list) and len(license) == 1:
        license = license[0]
    if isinstance(license, str) and _LICENSE.fullmatch(license.lower()):
        found["license"] = license.lower()
    for key, form in (("license_name", _LINE), ("license_link", _LINK)):
        if isinstance(value := stated.get(key), str) and form.fullmatch(value):
            found[key] = value
    if "license" not in found and (name := _licence_file(source)):
        found = {"license": "other", "license_name": "see-license-file", "license_link": name}
    languages = stated.get("language")
    languages = languages if isinstance(languages, list) else [languages]
    # to YAML, Norwegian is a way to say false
    named = ["no" if one is False else one for one in languages]
    if known := [one for one in named if isinstance(one, str) and _LANGUAGE.fullmatch(one)]:
        found["language"] = known[:500]
    return found


def _stated(card: Path) -> dict[str, Any]:
    """The metadata of a card; empty if it has none that can be read."""
    from huggingface_hub import metadata_load

    try:
        if card.stat().st_size > MAX_CARD:
            raise ValueError(f"larger than {MAX_CARD} bytes")
        found: Any = metadata_load(card)
    except Exception as error:  # missing, or not a card: no reason to lose a finished search
        logger.info("no metadata from %s: %s", card, error)
        return {}
    return found if isinstance(found, dict) else {}


def _licence_file(source: Path) -> str | None:
    names = (path.name for path in source.iterdir() if path.is_file())
    return min((name for name in names if _LICENCE_FILE.fullmatch(name)), default=None)


def _hub_id(model: str | None, source: Path) -> str | None:
    """The original's id on the hub: as it was given, or by the place of a snapshot in the cache."""
    named = (model or "").partition("@")[0]
    if named and not Path(named).expanduser().exists() and _HUB_ID.fullmatch(named):
        return named
    origin = Origin.of(source)
    return origin.repository if origin and _HUB_ID.fullmatch(origin.repository) else None


def _title(model: str | None, otherwise: str) -> str:
    """The original's name in one line: its last part, if it is a path."""
    return " ".join(printable((Path(model).name if model else "") or otherwise).split())


def _changed(plan: Plan) -> str:
    """Which weights are not the original's, in a sentence."""
    if plan.repair is None or not plan.repair.tensors:
        return "No weight was changed and nothing was trained."
    if healed := plan.repair.healed:
        return (
            f"After the cut, {len(healed)} tensors of its blocks were trained to predict what the "
            "original predicts; `heal.json` says how."
        )
    names = plan.repair.tensors
    return (
        f"{len(names)} matrices around the gaps were re-fitted in closed form, to make up for the "
        f"missing blocks ({', '.join(f'`{name}`' for name in names)}); nothing was trained."
    )


def _provenance(plan: Plan, source: Path, model: str | None) -> Iterable[str]:
    """Rows of Markdown: what it was made from, with what, under which licence."""
    base, licence = _hub_id(model, source), inherited(source).get("license")
    tools = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    of, origin = plan.model, plan.origin or Origin.of(source)
    rows = {
        "original": f"[{base}](https://huggingface.co/{base})"
        if base
        else _title(model, "see `plan.json`"),
        **({"revision": f"`{origin.revision}`"} if base and origin else {}),
        "architecture": f"{of.architecture or of.model_type}, {of.blocks} blocks",
        "SHA-256 of its tensors": f"`{of.weights_sha256}`",
        "blocks chosen by": f"{plan.strategy_label}, {plan.metric} ({plan.unit}), in {plan.dtype}",
        "with": tools or "not recorded",
        "licence": f"the original's: {licence}"
        if licence
        else "the original's; its card named none",
    }
    for name, value in rows.items():
        shown = " ".join(printable(value.replace("|", "\\|"), 2000).split())
        yield f"| {name} | {shown} |"


def _fenced(text: str) -> list[str]:
    """Lines of a code block that ``text`` cannot end."""
    text = printable(text, None)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, text, fence]
