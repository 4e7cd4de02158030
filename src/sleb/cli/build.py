"""From a verb's declaration to its typer command: arguments, and an option per field of its
configuration, under the headings of the groups."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import annotated_types
import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from sleb.cli.argument import HELP, Argument
from sleb.config import GROUPS, Options, declared, group_of, in_order
from sleb.core.errors import InputError, did_you_mean


def built(
    name: str,
    call: Callable[[typer.Context, dict[str, Any]], int],
    *,
    arguments: tuple[Argument, ...],
    config: type[Options],
    help: str,
    example: str,
) -> Any:
    """A command that hands the values of all its parameters to ``call``, by name."""

    def command(context: typer.Context, **given: Any) -> int:
        return call(context, given)

    hints: dict[str, Any] = {"context": typer.Context}
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY)]
    declarations = [_of_argument(argument) for argument in arguments]
    declarations += [
        _of_field(config, name, config.model_fields[name]) for name in in_order(config)
    ]
    for key, hint, default in declarations:
        hints[key] = hint
        parameters.append(
            inspect.Parameter(
                key,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=hint,
                default=inspect.Parameter.empty if default is ... else default,
            )
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = hints
    alone = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=HELP)
    alone.command(name, help=help, epilog=f"Example: {example}", cls=_Command)(command)
    return typer.main.get_command(alone)


_METAVARS = {int: "N", int | None: "N", float: "X", float | None: "X", str: "NAME"}
"""What stands for a value in the help, by its type, unless its option says it."""


def _of_argument(argument: Argument) -> tuple[str, Any, Any]:
    """Name, annotation and default of a parameter."""
    if argument.flag:
        info: Any = typer.Option(
            *argument.flag.split(), help=argument.help, rich_help_panel=argument.group
        )
    else:
        info = typer.Argument(help=argument.help)
    info.metavar = argument.metavar or _METAVARS.get(argument.type)
    return argument.name, Annotated[argument.type, info], argument.default


def _of_field(kind: type[Options], name: str, field: FieldInfo) -> tuple[str, Any, Any]:
    """The same for an option."""
    extra = declared(kind, name)
    flag = extra["flag"] or f"--{name.replace('_', '-')}"
    least = next((m.ge for m in field.metadata if isinstance(m, annotated_types.Ge)), None)
    info = typer.Option(
        *flag.split(),
        help=field.description,
        metavar=extra["metavar"] or _METAVARS.get(_shown_type(field.annotation)),
        min=least,  # type: ignore[arg-type]
        show_default=not extra["hide"],
        rich_help_panel=group_of(kind, name) or None,
    )
    default = list(field.default) or None if isinstance(field.default, tuple) else field.default
    return name, Annotated[_shown_type(field.annotation), info], default


def _shown_type(annotation: Any) -> Any:
    """A field's type as typer parses it: what may be text is text, a tuple is repeatable."""
    if get_origin(annotation) is tuple:
        return list[str] | None
    if get_origin(annotation) not in (Union, UnionType):
        return annotation
    parts = get_args(annotation)
    kind = str if str in parts else next(p for p in parts if p is not type(None))
    return kind | None if type(None) in parts else kind


def as_config(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """The checked options among ``given``. Of a repeatable option None means none.

    Raises:
        InputError: see :meth:`sleb.config.Options.of`; or a name that is none of the choices.
    """
    fields = kind.model_fields
    for name in fields:
        choose(name.replace("_", "-"), given.get(name), declared(kind, name)["choices"])
    values = {k: v for k, v in given.items() if k in fields}
    return kind.of(
        {k: () if v is None and fields[k].default == () else v for k, v in values.items()}
    )


def choose(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise InputError for what is none of ``choices``, where there are some."""
    if choices and value is not None and value not in choices:
        raise InputError(
            f"unknown {name} '{value}'{did_you_mean(str(value), choices)}; known: "
            f"{', '.join(choices)}"
        )


_HEADINGS = ("Arguments", "Options", *(group.title() for group in GROUPS))


class _Command(TyperCommand):
    """A command whose help has a heading per group of options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the parameters, those of no group first."""
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in _HEADINGS}
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            if row is not None:
                kind = "Arguments" if param.param_type_name == "argument" else "Options"
                title = getattr(param, "rich_help_panel", None) or kind
                if kind == "Arguments":  # typer adds the type, as Python writes it
                    row = (re.sub(r" <[^<>]*>$", "", row[0]), row[1])
                sections[title].append(row)
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
