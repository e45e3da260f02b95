"""Folders of images: what lies in them, found in one pass over the names."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from vitft.data.images import suffixes
from vitft.data.schema import image_structs, make_split, role_of
from vitft.data.tables import TABLE_SUFFIXES
from vitft.errors import DataError

_JUNK = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "@eadir", "lost+found", "system volume information"}
_DEEPEST = 100  # folders within one another
_OFTEN = 100  # times that links may lead to one folder: of 30 folders, each with two links to the next, 2**30 are made


@dataclass(slots=True)
class Folder:
    """A folder and all below it; hidden files and what systems leave behind are not in it."""

    path: str  # as the one above it was given
    name: str
    images: list[str] = field(default_factory=list)  # names of the images directly in it, sorted
    others: list[str] = field(default_factory=list)  # names of its other files, sorted
    folders: "list[Folder]" = field(default_factory=list)  # sorted by name
    count: int = 0  # images at any depth

    def walk(self) -> "Iterator[Folder]":
        """This folder and all below it, those above first."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def files(self) -> Iterator[str]:
        """Paths of the images at any depth."""
        return (f"{folder.path}{os.sep}{name}" for folder in self.walk() for name in folder.images)


def scan(root: Path) -> Folder:
    """List a folder and all below it. Links are followed, but none that leads back to a folder it lies in.

    Raises OSError for a folder that cannot be read, DataError for one that is too deep.
    """
    return _scan(str(root), root.name, (), {})


def _scan(path: str, name: str, above: tuple[tuple[int, int], ...], visits: dict[tuple[int, int], int]) -> Folder:
    folder = Folder(path, name)
    if len(above) > _DEEPEST:
        raise DataError(f"{path} lies over {_DEEPEST} folders deep; give the folder that holds the images.")
    status = os.stat(path)  # noqa: PTH116  (hot loop)
    this = (status.st_dev, status.st_ino)
    visits[this] = visits.get(this, 0) + 1
    if this in above or visits[this] > _OFTEN:
        return folder
    with os.scandir(path) as entries:
        found = sorted((entry for entry in entries if not _is_junk(entry.name)), key=lambda entry: entry.name)
    known = suffixes()
    for entry in found:
        if _is_folder(entry):
            folder.folders.append(_scan(entry.path, entry.name, (*above, this), visits))
        elif os.path.splitext(entry.name)[1].lower() in known:  # noqa: PTH122  (hot loop)
            folder.images.append(entry.name)
        else:
            folder.others.append(entry.name)
    folder.count = len(folder.images) + sum(inner.count for inner in folder.folders)
    return folder


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK


def read_folder(root: Path, tree: Folder) -> dict[str, datasets.Dataset]:
    """Read root/class/**/image, or root/split/class/**/image where folders are named as splits.

    A class is a folder directly under the root or split that holds at least one image, at any depth.
    """
    roles = {folder.name: folder for folder in tree.folders if role_of(folder.name)}
    classes = {split: found for split, folder in roles.items() if (found := _classes(folder))}
    if not any(role_of(split) == "train" for split in classes):  # folders that are only called like splits
        classes = {"train": _classes(tree)}
    names = sorted({folder.name for of_split in classes.values() for folder in of_split})
    if not names:
        raise DataError(_nothing_in(root, tree))
    return {split: _split(root, of_split, names) for split, of_split in classes.items() if of_split}


def _classes(folder: Folder) -> list[Folder]:
    return [inner for inner in folder.folders if inner.count]


def _split(root: Path, classes: list[Folder], names: list[str]) -> datasets.Dataset:
    index = {name: number for number, name in enumerate(names)}
    paths = [path for folder in classes for path in folder.files()]
    labels = np.repeat([index[folder.name] for folder in classes], [folder.count for folder in classes])
    try:
        return make_split(image_structs(None, paths), labels, names, root)
    except UnicodeEncodeError as error:
        raise DataError(f"the file name {error.object!r} is not UTF-8; rename it.") from error


def _nothing_in(root: Path, tree: Folder) -> str:
    if tree.images:
        return (
            f"{root} holds images but no class folders; put each class into a folder of its own, "
            "or give a CSV of path and label."
        )
    tables = [name for name in tree.others if Path(name).suffix.lower() in TABLE_SUFFIXES]
    hint = f"; did you mean the file {root / tables[0]}?" if tables else "; expected root/class/image.jpg."
    return f"no class folders with images, parquet files or CIFAR batches in {root}{hint}"


def image_files(folder: Path) -> Iterator[Path]:
    """Image files at any depth, those of a folder before those of the folders in it, in order of name."""
    return map(Path, scan(folder).files())


def passed_over(folder: Path) -> Iterator[Path]:
    """Files below a folder of images that `image_files` leaves out, in order of name."""
    read = set(image_files(folder))
    yield from (file for file in sorted(folder.rglob("*")) if file not in read and file.is_file())
