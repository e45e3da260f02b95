"""Pictures in a folder of the user: each says which command wrote it, and only such pictures are replaced."""

import os
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vitft.errors import UsageError

_KEY = "Software"  # of a PNG's text chunks (PNG specification, section 11.3.3.2)


def save(picture: Image.Image, file: Path, command: str) -> None:
    """Write a PNG that says which `command` wrote it.

    Raises UsageError if there is another file, or it cannot be written.
    """
    flag = command.split()[-1]
    if os.path.lexists(file) and not is_by(file, command):
        raise UsageError(f"{flag} {file.parent}: {file.name} is there already; choose another folder.")
    about = PngInfo()
    about.add_text(_KEY, command)
    try:
        picture.save(file, pnginfo=about)
    except OSError as error:
        raise UsageError(f"{flag} {file}: cannot be written: {error.strerror or error}.") from error


def is_by(file: Path, command: str) -> bool:
    """Whether `command` wrote this picture."""
    try:
        with Image.open(file) as picture:
            return not file.is_symlink() and picture.info.get(_KEY) == command
    except (OSError, Image.DecompressionBombError):  # no image, or one that is too large to be ours
        return False
