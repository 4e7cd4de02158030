"""What `sleb inspect` shows. Needs no torch, so that it is there at once."""

from __future__ import annotations

from collections.abc import Callable

from sleb.models.describe import Description, Saving
from sleb.views.locale import Locale
from sleb.views.model import Facts, Item, Table


def description(t: Locale, d: Description) -> list[Item]:
    """A model's facts, and what a cut would save."""
    rows = {"model": d.model, "architecture": f"{d.architecture} ({d.model_type})"}
    if d.supported is False:
        rows["supported"] = f"no: {d.reason}"
        return [Facts(tuple(rows.items()))]
    rows["supported"] = (
        "yes" if d.supported else "nothing in its files speaks against it; --full makes sure"
    )
    if d.gguf:
        rows["as .gguf"] = f"no: {d.gguf}"
    if d.blocks is None:
        return [Facts(tuple(rows.items()))]
    low, high = t.size(min(d.block_bytes)), t.size(max(d.block_bytes))
    each = low if low == high else f"{low} to {high}"
    kind = f"{d.block_class} " if d.block_class else ""
    rows["blocks"] = f"{d.blocks} x {kind}at {d.block_path}, {each} each"
    stored = f"stored as {', '.join(d.dtypes)}, {t.size(d.nbytes or 0)}"
    rows["parameters"] = f"{t.large(d.parameters or 0)} {stored}"
    rows["tied weights"] = "yes: the head is the embedding" if d.tied_weights else "no"
    rows |= {f"config {field.name}": field.kind for field in d.depth_fields}
    rows |= {f"the file's {name}": str(value) for name, value in d.carried}
    if not d.depth_fields and d.gguf is None:
        rows["config"] = "nothing depends on depth but the number of blocks"
    as_gguf = d.gguf is not None
    columns: dict[str, Callable[[Saving], str]] = {
        "removed": lambda s: f"{s.percent} %",
        "blocks": lambda s: str(s.blocks),
        "parameters": lambda s: t.large(s.parameters),
        "as .gguf" if as_gguf else "on disk": lambda s: t.size(s.nbytes),
        "as a folder, 16 bit" if as_gguf else "in memory, 16 bit": lambda s: t.size(s.memory),
        "ideal speed-up": lambda s: t.times(s.ideal_speedup),
    }
    savings = Table(
        columns=tuple(columns),
        rows=tuple(tuple(cell(s) for cell in columns.values()) for s in d.savings),
    )
    return [Facts(tuple(rows.items())), savings]
