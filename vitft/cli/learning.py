"""The command of the course: learn."""
# ruff: noqa: E501  (one line per option)

from pathlib import Path
from typing import Annotated

import typer

from vitft.cli import tables
from vitft.cli.arguments import Json
from vitft.errors import UsageError
from vitft.io import console


def learn(
    lesson: Annotated[list[str] | None, typer.Argument(metavar="LESSON", help="Names or numbers. Default: all.", show_default=False)] = None,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Copy them here, as Jupyter notebooks.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """List the lessons of the course on fine-tuning, or copy them as notebooks.

    Each one runs in minutes, without network, on the digits and the small ViT that come with vitft.
    """
    from vitft.learning.lessons import copy, find, lessons

    chosen = [find(name) for name in lesson] if lesson else lessons()
    if output is None:
        if lesson and not json:
            raise UsageError("add --output FOLDER to copy lessons; vitft learn without a name lists them.")
        rows = [{"number": one.number, "name": one.name, "title": one.title, "about": one.summary} for one in chosen]
        console.say_json({"lessons": rows}) if json else console.say(tables.lessons_table(chosen))
        return
    for file in copy(chosen, output):
        console.say_text(f"{file}\n")
