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
    lesson: Annotated[list[str] | None, typer.Argument(metavar="LESSON", help="Names or numbers; textbook is one, too. Default: all.", show_default=False)] = None,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Copy them here.")] = None,
    json: Json = False,
) -> None:  # fmt: skip
    """List the lessons of the course on fine-tuning and the textbook, or copy them: lessons as notebooks.

    Each lesson runs in minutes, without network, on the digits and the small ViT that come with vitft.
    """
    from vitft.learning import textbook
    from vitft.learning.lessons import copy, find, lessons, notebooks

    names = lesson or []
    chosen = [find(name) for name in names if name != textbook.NAME] if names else lessons()
    if output is None:
        if names and not json:
            raise UsageError("add --output FOLDER to copy lessons; vitft learn without a name lists them.")
        rows = [{"number": one.number, "name": one.name, "title": one.title, "about": one.summary} for one in chosen]
        document = {"lessons": rows, "textbook": textbook.title()}
        console.say_json(document) if json else console.say(tables.lessons_table(chosen, textbook.title()))
        return
    book = textbook.pages() if not names or textbook.NAME in names else {}
    for file in copy(notebooks(chosen) | book, output):
        if file.suffix != ".png":
            console.say_text(f"{file}\n")
