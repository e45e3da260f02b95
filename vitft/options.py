"""Typer options from the fields of TrainConfig: the only place that makes flags."""

import inspect
from collections.abc import Callable
from functools import wraps
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo


def options_from(config: type[BaseModel]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one flag for each field; it receives those that were typed, as `overrides`.

    A flag's default is None, so that what was not typed is told from what was: help shows the
    field's own default. Bounds are checked by the field alone.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def wrapper(**given: Any) -> Any:
            overrides = {name: value for name in config.model_fields if (value := given.pop(name)) is not None}
            return command(**given, overrides=overrides)

        signature = inspect.signature(command)
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "overrides"]
        flags = [_parameter(name, field) for name, field in config.model_fields.items()]
        wrapper.__signature__ = signature.replace(parameters=[*flags, *own])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*own, *flags]}
        return wrapper

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    kind = next(t for t in get_args(field.annotation) if t is not NoneType) if _optional(field) else field.annotation
    flag = f"--{name.replace('_', '-')}"
    option = typer.Option(
        f"{flag}/--no-{flag.removeprefix('--')}" if kind is bool else flag,
        help=_help(field),
        show_default=False,  # the flag's own default is always None
        rich_help_panel=str(extra["panel"]),
        metavar="|".join(get_args(kind)) if get_origin(kind) is Literal else None,
        autocompletion=_completion(kind),
    )
    # Typer has no Literal with a default of None in every version: a string, checked by the field.
    typed = str if get_origin(kind) is Literal else kind
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[typed | None, option]
    )


def _help(field: FieldInfo) -> str:
    default = field.default
    return f"{field.description}" + (f" [dim]\\[default: {default}][/]" if default not in (None, False) else "")


def _optional(field: FieldInfo) -> bool:
    return NoneType in get_args(field.annotation)


def _completion(kind: Any) -> Callable[[str], list[str]] | None:
    if get_origin(kind) is not Literal:
        return None

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in get_args(kind) if choice.startswith(incomplete)]

    return complete
