"""Typer's errors of usage, which it shows in a box, as one line: what, got, remedy."""

import re
from collections.abc import Collection
from typing import Any

from vitft.errors import as_flag, from_synonym, joined, nearest

# Errors are told by what they have: recent versions of Typer have classes of their own, older ones those of click.


def shows_help(error: BaseException) -> bool:
    """Whether Typer raised this to show the help of a command without arguments."""
    return type(error).__name__ == "NoArgsIsHelpError"


def is_usage_error(error: BaseException) -> bool:
    """Whether Typer raised this because of what was typed."""
    return hasattr(error, "format_message") and not shows_help(error)


def in_one_line(error: Any) -> str:
    """What is wrong with what was typed, in the words that checks of settings use."""
    message = " ".join(error.message.removeprefix("Value error, ").removeprefix("Input ").split())
    option, parameter = getattr(error, "option_name", None), getattr(error, "param", None)
    if option and not hasattr(error, "possibilities"):
        return f"{option} needs a value" if "requires an argument" in message else message.rstrip(".")
    command, help_of = f"`{_typed(error.ctx)}`", f"`{_typed(error.ctx)} --help`"
    flags = [flag for each in error.ctx.command.params for flag in each.opts if flag.startswith("--")]
    if option:
        known = from_synonym(option, [each.name for each in error.ctx.command.params])
        hint = f"; did you mean {as_flag(known)}?" if known else nearest(option, flags)
        return f"{option}: {command} has no such flag" + (hint or f"; {help_of} lists them")
    if match := re.match("No such command '(.*?)'", message):
        hint = nearest(match[1], error.ctx.command.commands)
        return f"{match[1]}: {command} has no such command" + (hint or f"; {help_of} lists them")
    if match := re.match(r"Got unexpected extra argument(?:\(s\)|s|) \((.*)\)", message):
        return f"{match[1]}: {command} takes no such argument" + (_meant(match[1], flags) or f"; see {help_of}")
    if parameter is None:
        return f"{message.rstrip('.')}; see {help_of}"
    name = next((flag for flag in parameter.opts if flag.startswith("--")), parameter.metavar or parameter.name.upper())
    if not message and "|" in name:
        return f"say what to {error.ctx.info_name}: {joined(name.split('|'), 'or')}; see {help_of}"
    if not message:
        return f"{name} is missing; see {help_of}"
    if match := re.fullmatch(r"'(.*)' is not one of (.*)\.", message):
        choices = re.findall("'(.*?)'", match[2])
        should = joined([repr(choice) for choice in choices], "or")
        return f"{name} should be {should}, got {match[1]!r}{nearest(match[1], choices)}"
    got = error.__cause__.errors()[0]["input"] if hasattr(error.__cause__, "errors") else None
    message = message.partition(", unable")[0].rstrip(".")
    return f"{name} {message}" + ("" if got is None or repr(got) in message else f", got {got!r}")


def _meant(argument: str, flags: Collection[str]) -> str:
    """A hint at the flag whose value was given without it: a recipe or a dataset."""
    from vitft.config.recipe import names

    is_recipe = argument.endswith((".yaml", ".yml")) or argument in names()
    flag = "--recipe" if is_recipe and "--recipe" in flags else "--dataset"
    value = "" if " " in argument else f" {argument}"  # one with a space in it, or several
    return f"; did you mean {flag}{value}?" if flag in flags else ""


def _typed(context: Any) -> str:
    """The command, however vitft was started."""
    names = []
    while context.parent is not None:
        names.append(context.info_name)
        context = context.parent
    return " ".join(["vitft", *reversed(names)])
