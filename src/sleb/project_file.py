"""sleb.toml as it is read: its tables, and the options that they become. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from typing_extensions import Self

from sleb.calibration.sources import parse_source
from sleb.config import (
    AS_CUT,
    DEFAULT_PROMPTS,
    NO_PROMPTS,
    CompareConfig,
    EvalConfig,
    HealConfig,
    LoadOptions,
    Options,
    PruneConfig,
    like,
)
from sleb.core.errors import InputError
from sleb.core.files import file_sha256
from sleb.core.toml import read_toml, replace_value

ELSEWHERE = {
    "text": "texts have names here: give them in [text]",
    "curve": "sleb run always measures it",
    "force": "give it to sleb run",
}
"""Options of `sleb prune` that do not stand in [search], and why."""


class Measure(Options):
    """[measure]: what is measured on the result; see `sleb compare`, `eval --task`, `bench`."""

    prompts: str | None = None
    new_tokens: int = like(CompareConfig, "new_tokens")
    tasks: tuple[str, ...] = ()
    tasks_folder: str | None = like(EvalConfig, "tasks_folder")
    limit: int | None = like(EvalConfig, "limit")
    bench: bool = True
    bench_quick: bool | None = None
    transfer: bool = False
    reports: tuple[Literal["en", "ja"], ...] = ("en",)


class ProjectFile(Options):
    """sleb.toml. Paths in it are relative to its own folder.

    ``heal``: the cut is OUT-cut, and ``out`` that healed, on the texts and prompts of the search.
    ``search`` holds all options of `sleb prune`: [search], the texts of [text], and those of
    loading, which may stand above the tables, as they hold for what is measured too.
    """

    model: str
    out: str
    text: dict[str, str] = Field(min_length=1)
    search: PruneConfig
    heal: HealConfig | None = None
    measure: Measure = Measure()
    gate: dict[str, Any] | None = None
    folder: Path = Path()

    @classmethod
    def read(cls, path: str | Path, settings: Sequence[str] = ()) -> Self:
        """Read and check a project file, with ``settings`` such as ``search.remove=3`` in place of
        its own.

        Raises:
            InputError: missing, not TOML, or a key or value that is not possible.
        """
        values = {**read_toml(path, "make one with: sleb init"), "folder": Path(path).parent}
        for setting in settings:
            replace_value(values, setting)
        loading = {name: values.pop(name) for name in LoadOptions.model_fields if name in values}
        asked = values.get("search", {})
        if isinstance(asked, dict):
            values["search"] = _options(loading, asked, f"{path}: ")
        own = values.pop("heal", None)
        if own is not None and not isinstance(own, dict):
            raise InputError(f"{path}: heal is a table: [heal]")
        for name in AS_CUT & {*(own or {})}:
            raise InputError(f"{path}: [heal] {name}: it is that of [search]; leave it out")
        project = cls.of(values, f"{path}: ")
        texts = {
            "text": [f"{name}={project._text(spec)}" for name, spec in project.text.items()],
            "prompts": [project._prompts(spec) for spec in project.search.prompts],
        }
        search = project.search.replaced(texts)
        healing = None if own is None else HealConfig.after(search, own, f"{path}: [heal] ")
        return project.model_copy(update={"search": search, "heal": healing})

    def beside(self, name: str) -> str:
        """A path in the file, as seen from the current folder."""
        return str(self.folder / Path(name).expanduser())

    @property
    def source(self) -> str:
        """The model: a path beside the file, or a hub id."""
        path = self.beside(self.model)
        return path if Path(path).exists() or self.model[0] in "./~" else self.model

    @property
    def tasks(self) -> list[str]:
        """The tasks: paths of .jsonl files, or names."""
        return [self.beside(t) if t.endswith(".jsonl") else t for t in self.measure.tasks]

    @property
    def target(self) -> Path:
        """The folder that gets the checkpoint, the record and the reports."""
        return self.folder / self.out

    def _text(self, spec: str) -> str:
        return spec if spec.startswith("hub:") or spec == "default" else self.beside(spec)

    def _prompts(self, spec: str) -> str:
        return spec if spec in (DEFAULT_PROMPTS, NO_PROMPTS) else self.beside(spec)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that the cut depends on, named as in the file; of files the SHA-256, read once."""
        search, heal = self.search, self.heal
        asked = search.model_dump(mode="json", exclude={"text", "prompts"})
        healing = heal.model_dump(mode="json", exclude={*AS_CUT}) if heal else {}
        files = [*(parse_source(spec).location for spec in search.text), *search.prompts]
        return {
            "model": self.model,
            **{f"text.{name}": spec for name, spec in self.text.items()},
            **{f"search.{name}": value for name, value in asked.items()},
            "search.prompts": [self._given(spec) for spec in search.prompts],
            **{f"heal.{name}": value for name, value in healing.items()},
            **{self._given(path): digest for path in files if (digest := _digest(path))},
        }

    def _given(self, path: str) -> str:
        """A path as it stands in the file, which is the same wherever one stands."""
        inside = Path(path).is_relative_to(self.folder)
        return str(Path(path).relative_to(self.folder)) if inside else path

    def keys(self) -> dict[str, str]:
        """For each stage a hash of all that its result depends on."""
        measure = self.measure
        folder, tasks = measure.tasks_folder, [*measure.tasks, *map(_digest, self.tasks)]
        own = {
            "prune": [],
            "similarity": [],
            "tasks": [tasks, folder, measure.limit],
            "answers": [measure.new_tokens, _digest(self.beside(measure.prompts or ""))],
            "speed": [measure.bench_quick],
            "transfer": [],
        }
        return {
            stage: hashlib.sha256(json.dumps([self.settings, needs]).encode()).hexdigest()
            for stage, needs in own.items()
        }


def _options(loading: dict[str, Any], search: dict[str, Any], where: str) -> PruneConfig:
    """What [search] and the options of loading above it ask for."""
    for name in search:
        if name in ELSEWHERE:
            raise InputError(f"{where}[search] {name}: {ELSEWHERE[name]}")
        if name in loading:
            raise InputError(f"{where}{name} stands above the tables and in [search]: give one")
    above = PruneConfig.of({"curve": True}).replaced(loading, where)
    return above.replaced(search, f"{where}[search] ")


def _digest(path: str) -> str:
    """SHA-256 of a file; empty for what is none, as a task's name."""
    return file_sha256(Path(path)) if Path(path).is_file() else ""
