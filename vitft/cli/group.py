"""Command groups, which turn an error into one line and an exit code."""

from traceback import clear_frames
from typing import Any

import typer
from typer.core import TyperGroup

from vitft.cli.options import with_flags
from vitft.cli.usage import in_one_line, is_usage_error, shows_help
from vitft.errors import Stopped, UsageError, VitftError, typed_flags
from vitft.hardware.processes import lost_another
from vitft.io import console


class Group(TyperGroup):
    """Commands whose errors are one line, with an exit code by kind."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As in Typer, but `--debug` may be anywhere."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args = ["--debug", *(word for word in args[:end] if word != "--debug"), *args[end:]]
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if not is_usage_error(error):
                raise
            raise _told(error) from error

    def get_params(self, ctx: Any) -> list[Any]:
        """As in Typer; for help."""
        return _switches_shown_bare(super().get_params(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """As in Typer, but create the command's flags now."""
        name, command, rest = super().resolve_command(ctx, args)
        command = command and with_flags(command)
        if command is not None:
            _switches_shown_bare(command.get_params(ctx))
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises typer.Exit with the exit code of an error, after printing its line."""
        try:
            with typed_flags():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            clear_frames(error.__traceback__)  # otherwise Python waits for queued decoding at exit
            console.fail("interrupted", of_all=True)
            raise typer.Exit(130) from error
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if shows_help(error):
                raise
            if is_usage_error(error):
                raise _told(error) from error
            if ctx.find_root().params.get("debug"):
                console.traceback()
            if isinstance(error, VitftError):
                console.fail(str(error), of_all=isinstance(error, Stopped))  # all are told to stop
            elif isinstance(error, OSError):
                console.fail(f"{error.filename or 'a file'}: {error.strerror or error}.")
            elif lost_another(error):
                console.fail("another process of this command has ended; it says why, unless it was killed.")
            else:
                console.fail(f"{type(error).__name__}: {error} (unexpected; `vitft --debug ...` shows where)")
            raise typer.Exit(error.exit_code if isinstance(error, VitftError) else 1) from error


def _told(error: Exception) -> typer.Exit:
    """Print what was wrong with what was typed; returns the exit."""
    console.fail(in_one_line(error))
    return typer.Exit(UsageError.exit_code)


def _switches_shown_bare(options: list[Any]) -> list[Any]:
    """Hide the `<bool>` that Typer's help shows for switches."""
    for option in options:
        if getattr(option, "is_flag", False):
            option.metavar = ""
    return options
