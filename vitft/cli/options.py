"""Typer options from the fields of TrainConfig: the only place that makes flags."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
import typer.main
from rich.markup import escape

from vitft.errors import as_flag

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

Command = Callable[..., Any]


def options_from(settings: str, *only: str) -> Callable[[Command], Command]:
    """Give a command one flag for each field, or for the panels and fields in `only`; it receives what was typed.

    It receives that as `overrides`. `settings`, such as "vitft.config.train:TrainConfig", is imported when the command
    is asked for (see `with_flags`), so that the help of the others needs no pydantic. A flag's default is None, so that
    what was not typed is told from what was: help shows the field's own default. Bounds are checked by the field alone.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "overrides"]
        _sign(command, own)
        command.make_flags = lambda: _flagged(command, own, resolve_name(settings), only)  # type: ignore[attr-defined]
        return command

    return decorate


def with_flags(command: Any) -> Any:
    """The command as Typer built it, with its flags if `options_from` promised it some."""
    make_flags = getattr(command.callback, "make_flags", None)
    if make_flags is None:
        return command
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    alone.command(command.name, help=command.help)(make_flags())
    return typer.main.get_command(alone)


def _flagged(command: Command, own: list[inspect.Parameter], config: "type[BaseModel]", only: Sequence[str]) -> Command:
    wanted = {*only} or {_panel(field) for field in config.model_fields.values()}
    fields = {name: field for name, field in config.model_fields.items() if wanted & {name, _panel(field)}}

    def wrapper(**given: Any) -> Any:
        overrides = _typed(fields, given)
        return command(**given, overrides=overrides)

    flags = [flag for name, field in fields.items() for flag in _parameters(name, field)]
    last = _panel([*fields.values()][-1])
    # The command's own options open the last panel, for they steer the run as a whole.
    place = next(i for i, flag in enumerate(flags) if flag.annotation.__metadata__[0].rich_help_panel == last)
    _sign(wrapper, [*flags[:place], *own, *flags[place:]])
    return wrapper


def _typed(fields: "Mapping[str, FieldInfo]", given: dict[str, Any]) -> dict[str, Any]:
    """Take the flags of the fields out of `given`; returns the settings that were typed."""
    from vitft.config.base import unsets

    values = {name: given.pop(name) for name in fields}
    undone = {name: False for name in fields if given.pop(f"no_{name}", None)}
    typed = {name: value for name, value in values.items() if value is not None}
    return {name: None if unsets(value, fields[name]) else value for name, value in typed.items()} | undone


def overrides_of(settings: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that were typed, among the values of all options of a command that has a flag for each."""
    return _typed(resolve_name(settings).model_fields, dict(given))


def _number(field: "FieldInfo", kind: type) -> Callable[[str], Any]:
    """Reads a flag's number, or what stands for none."""
    from vitft.config.base import unsets

    def read(text: str) -> Any:
        try:
            return text if unsets(text, field) else kind(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not a valid {'integer' if kind is int else 'number'}.") from None

    return read


def _sign(command: Command, parameters: list[inspect.Parameter]) -> None:
    """Typer reads a command's options from its signature."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}


def _parameters(name: str, field: "FieldInfo") -> list[inspect.Parameter]:
    """A field's flag; a switch has a second one that undoes a recipe's, and that help does not list."""
    united = NoneType in get_args(field.annotation)
    several = get_origin(field.annotation) in (Union, UnionType)
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType] if several else [field.annotation]
    kind: Any = kinds[0]
    flag = as_flag(name)
    choices = [str(choice) for one in kinds if get_origin(one) is Literal for choice in get_args(one)]
    numbers = ["N"] if choices and len(kinds) > 1 else []  # a number, or one of these words
    option = typer.Option(
        flag,
        help=_help(field, f" {as_flag(f'no_{name}')} undoes it." if kind is bool else ""),
        show_default=False,  # the flag's own default is always None
        rich_help_panel=_panel(field),
        metavar="|".join(numbers + choices) or (f"<{kind.__name__}>" if united and kind in (int, float) else None),
        autocompletion=(lambda: choices) if choices else None,
        parser=_number(field, kind) if united and kind in (int, float) and not choices else None,
    )
    # A choice is a string to Typer: the field checks it, and names the nearest.
    flags = [_parameter(name, str if choices else kind, option)]
    if kind is bool:
        flags.append(_parameter(f"no_{name}", bool, typer.Option(as_flag(f"no_{name}"), hidden=True)))
    return flags


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _panel(field: "FieldInfo") -> str:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["panel"])


def _help(field: "FieldInfo", undo: str) -> str:
    default = field.default
    shown = "" if default is None or default is False else f" [dim]\\[default: {default}][/]"
    return f"{escape(field.description or '')}{undo}{shown}"
