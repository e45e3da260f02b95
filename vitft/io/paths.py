"""Paths as they are written down: absolute, with the home folder as `~`."""

import os
import unicodedata
from collections.abc import Container
from pathlib import Path


def shown(path: Path) -> str:
    """A path as a person writes it."""
    home = os.path.expanduser("~")  # noqa: PTH111 (Path.home() raises where there is none)
    text = str(path)
    inside = home != "/" and (text == home or text.startswith(home + os.sep))
    return "~" + text.removeprefix(home) if inside else text


def expanded(path: str | Path) -> Path:
    """A path with `~` or `~user` as that home folder; a name that merely begins with ~ as it stands."""
    first = Path(path).parts[:1]
    if first != ("~",) and (not str(path).startswith("~") or os.path.lexists(first[0])):
        return Path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, no home folder
        return Path(path)


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC): macOS writes é as e and an accent, others as one letter."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def absolute(value: str, names: Container[str]) -> str:
    """What exists here as a file or folder, by its absolute path; known names and all else as they are."""
    path = expanded(value)
    return shown(path.resolve()) if value not in names and path.exists() else value
