"""Paths as they are written down: absolute, with the home folder as `~`."""

import os
from collections.abc import Container
from pathlib import Path


def shown(path: Path) -> str:
    """A path as a person writes it."""
    home = os.path.expanduser("~")  # noqa: PTH111 (Path.home() raises where there is none)
    text = str(path)
    inside = home != "/" and (text == home or text.startswith(home + os.sep))
    return "~" + text.removeprefix(home) if inside else text


def absolute(value: str, names: Container[str]) -> str:
    """What exists here as a file or folder, by its absolute path; known names and all else as they are."""
    path = Path(value).expanduser()
    return shown(path.resolve()) if value not in names and path.exists() else value
