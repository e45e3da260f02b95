"""The lessons of the course, and copies of them as notebooks.

A lesson is a Markdown file. Its Python blocks are the cells of the notebook; a block of text below one is what it
printed, and is left out of the notebook, like the plots, because the notebook has its own.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitft.errors import UsageError, nearest
from vitft.io.atomic import json_text, new_file
from vitft.io.paths import expanded, shipped
from vitft.learning.textbook import NAME as TEXTBOOK

BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL)
"""A Python block, and what it printed, if anything."""
_LINK = re.compile(r"\]\((\d\d-\w+)\.md\)")
_PLOT = re.compile(r"^!\[.*\]\(images/.*\)\n(?:\n\*.*?\*\n)?", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Lesson:
    """A lesson: its name, such as `rate`; its number, title and first sentence; and its text."""

    name: str
    number: int
    title: str
    summary: str
    text: str

    @property
    def code(self) -> list[str]:
        """Its Python blocks, in order."""
        return [block["code"] for block in BLOCK.finditer(self.text)]

    @property
    def outputs(self) -> list[str]:
        """What each block printed when the lesson was written; empty where it printed nothing."""
        return [block["output"] or "" for block in BLOCK.finditer(self.text)]


def lessons() -> list[Lesson]:
    """All lessons, in order."""
    return [_read(file) for file in sorted(shipped("course", "docs/course").glob("[0-9][0-9]-*.md"))]


def _read(file: Path) -> Lesson:
    number, _, name = file.stem.partition("-")
    text = file.read_text(encoding="utf-8")
    title, _, rest = text.removeprefix("# ").partition("\n")
    summary = re.split(r"(?<=[.?!])\s", rest.strip(), maxsplit=1)[0]
    return Lesson(name, int(number), title, " ".join(summary.split()), text)


def find(name: str) -> Lesson:
    """A lesson by name or number. Raises UsageError."""
    known = lessons()
    for lesson in known:
        if name in (lesson.name, str(lesson.number)):
            return lesson
    hint = nearest(name, [*(lesson.name for lesson in known), TEXTBOOK])
    raise UsageError(f"lesson {name}: unknown{hint or '; vitft learn lists them.'}")


def notebooks(chosen: list[Lesson]) -> dict[str, bytes]:
    """Lessons as the files of a copy."""
    return {f"{one.number:02}-{one.name}.ipynb": json_text(notebook(one)).encode() for one in chosen}


def copy(pages: dict[str, bytes], folder: str | Path) -> list[Path]:
    """Write files into a folder, by their path in it. Raises UsageError if one is there, and writes nothing then."""
    target = expanded(folder)
    files = {target / name: page for name, page in pages.items()}
    if there := [file for file in files if file.exists()]:
        raise UsageError(f"{there[0]}: exists; choose another folder, or remove it.")
    try:
        for file, page in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with new_file(file) as temporary:
                temporary.write_bytes(page)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written: {error.strerror or error}; choose another folder.") from error
    return list(files)


def notebook(lesson: Lesson) -> dict[str, Any]:
    """The lesson in the format of Jupyter notebooks, version 4.5."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, text: str, **more: Any) -> None:
        if text := text.strip("\n"):
            cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": text} | more)

    text, place = _LINK.sub(r"](\1.ipynb)", _PLOT.sub("", lesson.text)), 0
    for block in BLOCK.finditer(text):
        add("markdown", text[place : block.start()])
        add("code", block["code"], execution_count=None, outputs=[])
        place = block.end()
    add("markdown", text[place:])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
