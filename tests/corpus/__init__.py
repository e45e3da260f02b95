"""A corpus of real-world datasets in miniature, each with the expected result.

`tables` has files of path and label, `folders` folders and parquet files. `test_corpus.py` opens every one.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

Files = Mapping[str, str | bytes]
Splits = Mapping[str, Mapping[str, int | str | tuple[str, ...]]]


@dataclass(frozen=True)
class Case:
    """A dataset, and either its splits or its one-line error.

    `splits` has for each split and class the images: how many, or their names, separated by spaces or as a tuple.
    Each of the other texts must be part of a note; a dataset with other warnings fails.
    """

    name: str
    files: Files | Callable[[Path], None]  # contents by relative path, or what writes them into a folder
    dataset: str  # the file or folder that is opened, relative
    splits: Splits = field(default_factory=dict)
    error: tuple[str, ...] | str = ()  # what the one line of the error says
    decided: tuple[str, ...] | str = ()
    warned: tuple[str, ...] | str = ()
    options: Mapping[str, Any] = field(default_factory=dict)  # of open_dataset

    def write(self, folder: Path) -> str:
        """Write the dataset to an empty folder; return the path to open."""
        if callable(self.files):
            self.files(folder)
        else:
            for name, content in self.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(folder / self.dataset)


def listed(texts: tuple[str, ...] | str) -> tuple[str, ...]:
    """A single text as a tuple."""
    return (texts,) if isinstance(texts, str) else texts


def photo(name: str = ".png", value: int = 0) -> bytes:
    """An image of 3 x 2 pixels, in the format of the name's suffix."""
    stream = io.BytesIO()
    kind = Image.registered_extensions().get(Path(f"x{name}").suffix.lower(), "PNG")
    Image.new("RGB", (3, 2), (value % 256, 7, 9)).save(stream, kind)
    return stream.getvalue()


def photos(*names: str) -> dict[str, bytes]:
    """Images with these names and different pixels."""
    return {name: photo(name, number) for number, name in enumerate(names)}
