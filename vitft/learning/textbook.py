"""The textbook of `vitft.scratch`, with its figures and the answers to its exercises, to be copied."""

import re
from pathlib import Path

import vitft
from vitft.io.paths import shipped

NAME = "textbook"
_ANSWERS = ("test_exercises.py", "gradients.py")


def title() -> str:
    """Its first line."""
    return _book().partition("\n")[0].removeprefix("# ")


def pages() -> dict[str, bytes]:
    """The files of a copy, by their path in it. Its links lead to the other files and to the chapters' code."""
    root = _root()
    answers = {name: (root / "tests" / "scratch" / name).read_text(encoding="utf-8") for name in _ANSWERS}
    texts = {"textbook.md": _linked(_book())}
    texts |= {name: text.replace("from tests.scratch.gradients", "from gradients") for name, text in answers.items()}
    figures = sorted((root / "docs" / "textbook").glob("*.png"))
    return {name: text.encode() for name, text in texts.items()} | {
        f"textbook/{file.name}": file.read_bytes() for file in figures
    }


def _root() -> Path:
    return shipped("textbook", ".")


def _book() -> str:
    return (_root() / "docs" / "textbook.md").read_text(encoding="utf-8")


def _linked(text: str) -> str:
    code = Path(vitft.__file__).parent.as_posix()
    text = text.replace("](../vitft/", f"]({code}/").replace("](../tests/scratch/", "](")
    text = re.sub(r"\[([^\]]+)\]\([a-z]+\.md\)", r"\1", text)  # of other pages, which are not copied
    return text.replace("pytest tests/scratch/", "pytest ")
