"""Paths and names: as settings and messages have them, as file systems take them, and new ones for output."""

import os
import re
import unicodedata
from collections.abc import Callable, Container
from itertools import count
from pathlib import Path

from vitft.errors import UsageError


def shown(path: Path) -> str:
    """The path with the home folder abbreviated to `~`."""
    home = os.path.expanduser("~")  # noqa: PTH111 (Path.home() raises where there is none)
    text = str(path)
    inside = home != "/" and (text == home or text.startswith(home + os.sep))
    return "~" + text.removeprefix(home) if inside else text


def expanded(path: str | Path) -> Path:
    """Expand `~` and `~user`, unless a file with that name exists or there is no such user."""
    first = Path(path).parts[:1]
    if first != ("~",) and (not str(path).startswith("~") or os.path.lexists(first[0])):
        return Path(path)
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, no home folder
        return Path(path)


def numbered(stem: Path) -> Path:
    """`stem` with the first number behind it that is free, such as runs/digits-1."""
    return next(path for number in count(1) if not (path := stem.with_name(f"{stem.name}-{number}")).exists())


def partial_name(file: Path) -> Path:
    """What a file that grows is called until it is whole: predictions.partial.csv."""
    return file.with_name(f"{file.stem}.partial{file.suffix}")


def make_output(choose: Callable[[], Path], *, named: bool) -> Path:
    """Create the folder that `choose` returns. Unless it was `named`, it must be new, or else another is chosen.

    So commands that start together have a folder each. Raises UsageError.
    """
    while True:
        folder = choose()
        try:
            folder.mkdir(parents=True, exist_ok=named)
        except FileExistsError:
            if named:
                raise UsageError(f"output {folder}: a file; choose a folder.") from None
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"output {folder}: cannot be created: {reason}; choose another.") from error
        else:
            return folder


def is_url(text: str) -> bool:
    """Whether a text has the form of a URL, and is not a path."""
    return re.match(r"[A-Za-z][\w+.-]+://.", text) is not None


def cache_folder(name: str) -> Path:
    """Where vitft keeps what it can make again: below VITFT_CACHE, else below the user's cache folder.

    Raises UsageError if there is neither.
    """
    if own := os.environ.get("VITFT_CACHE"):
        return expanded(own) / name
    home = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if home.parts[:1] == ("~",):
        raise UsageError("this user has no home folder to cache in; set VITFT_CACHE to a folder.")
    return home / "vitft" / name


def shipped(name: str, source: str | None = None) -> Path:
    """A folder of files that ship with vitft: in the package, or of a checkout (an editable install).

    Args:
        name: Its name in the installed package.
        source: Its path in a checkout, if it is another.
    """
    from importlib.resources import files  # several milliseconds, which `vitft --help` does not need

    package = Path(str(files("vitft")))
    return installed if (installed := package / name).is_dir() else package.parent / (source or name)


def composed(name: str) -> str:
    """Normalize a name to NFC: macOS stores é as two code points, other systems as one."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8: no bytes of another encoding, and no half of a surrogate pair."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def cut(name: str, length: int) -> str:
    """The start of a name that takes at most so many bytes, which is what file systems limit."""
    while len(os.fsencode(name)) > length:
        name = name[:-1]
    return name


def absolute(value: str, names: Container[str]) -> str:
    """Make a path absolute if it exists; known `names` and everything else are returned unchanged."""
    path = expanded(value)
    exists = value not in names and os.path.exists(path)  # noqa: PTH110 (Path.exists raises for a very long text)
    return shown(path.resolve()) if exists else value
