"""Sort images into a folder for each class: copies or links, which overwrite nothing."""

import filecmp
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from vitft.errors import DataError, UsageError
from vitft.io.paths import composed, cut, expanded
from vitft.prediction.predictor import Prediction

UNSURE, NONE = "unsure", "none of these"
Link = Literal["hard", "symbolic"]
_LONGEST = 255  # bytes of a file's name
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)  # by Windows


class Sorter:
    """Puts each image into FOLDER/CLASS/, FOLDER/unsure/ or FOLDER/none of these/, by its prediction.

    Images with the same name in a class are told apart by a hash of their paths, so the same call again changes
    nothing. Images that could not be read are left out.
    """

    def __init__(self, folder: str | Path, labels: Sequence[str], *, link: Link | None = None) -> None:
        self.folder, self.link = expanded(folder), link
        self._real, self._folders = self.folder.resolve(), folder_names(labels)
        self._used: dict[Path, str] = {}  # which image of this call has a name
        self.counts: Counter[str] = Counter()  # images by folder

    def write(self, rows: Sequence[Prediction]) -> None:
        """Sort some more images, as `place` does."""
        for row in rows:
            self.place(row)

    def place(self, row: Prediction) -> Path | None:
        """Copy or link an image, unless that was done before: where it is now. Raises VitftError."""
        if row.error is not None:
            return None
        source = Path(os.path.abspath(expanded(row.path)))  # noqa: PTH100 (a link stays one)
        if source.resolve().is_relative_to(self._real):
            raise UsageError(f"--sort-into {self.folder}: {row.path} is inside it; sort into another folder.")
        name = NONE if row.none_of_these else UNSURE if row.unsure else self._folders[row.top[0][0]]
        folder = self.folder / name
        mark = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            target = self._free(folder, source, mark)
            if not os.path.lexists(target):
                self._put(source, target)
        except OSError as error:
            raise DataError(
                f"--sort-into {self.folder}: {row.path} could not be {self._verb()}: {error.strerror or error}."
            ) from error
        self._used[target] = mark
        self.counts[folder.name] += 1
        return target

    def _verb(self) -> str:
        return "copied" if self.link is None else f"linked ({self.link})"

    def _free(self, folder: Path, source: Path, mark: str) -> Path:
        """The first name that is free, or has this image already."""
        number, target = 1, folder / source.name
        while self._used.get(target, mark) != mark or (os.path.lexists(target) and not self._is_there(source, target)):
            ending = f"-{mark}{f'-{number}' if number > 1 else ''}{source.suffix}"
            target, number = folder / (cut(source.stem, _LONGEST - len(os.fsencode(ending))) + ending), number + 1
        return target

    def _is_there(self, source: Path, target: Path) -> bool:
        with suppress(OSError):  # a broken link
            if target.samefile(source):
                return True
            return self.link is None and target.is_file() and filecmp.cmp(source, target, shallow=False)
        return False

    def _put(self, source: Path, target: Path) -> None:
        if self.link == "symbolic":
            target.symlink_to(source)
        elif self.link == "hard":
            target.hardlink_to(source.resolve())
        else:
            temporary = target.parent / f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}.vitft-new"
            try:
                shutil.copy2(source, temporary)
                temporary.rename(target)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise


def check_apart(flag: str, folder: str | Path, given: Iterable[str]) -> None:
    """Raise UsageError if a folder that images come from contains the one, of this flag, that files go to."""
    for one in given:
        path = expanded(one)
        if os.path.isdir(path) and expanded(folder).resolve().is_relative_to(path.resolve()):  # noqa: PTH112
            raise UsageError(f"{flag} {folder}: is inside {one}, where the images come from; choose another.")


def folder_names(labels: Sequence[str]) -> dict[str, str]:
    """A folder's name for each class: what a file system somewhere does not allow becomes _, and no two are alike."""
    taken = {UNSURE, NONE}
    names: dict[str, str] = {}
    for label in labels:
        if label in names:
            continue
        plain = name = _folder_name(label)
        number = 2
        while name.casefold() in taken:
            name, number = f"{plain} ({number})", number + 1
        taken.add(name.casefold())
        names[label] = name
    return names


def _folder_name(label: str) -> str:
    text = composed(label.encode("utf-8", "replace").decode())
    text = "".join(c if c.isprintable() and c not in '<>:"/\\|?*' else "_" for c in text)
    text = cut(text.strip(" "), 200).rstrip(". ")
    if text.startswith("."):
        text = f"_{text[1:]}"  # it would be hidden
    return f"_{text}" if _RESERVED.fullmatch(text) or not text else text
