"""Folders of images: list what is in them, once, and tell which files are images.

Most files are known by their suffix. The few with an unknown suffix, or none, are known by their first bytes.
"""

import os
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vitft.data.decoder import BadImage, format_of_plugin, formats, header, suffixes
from vitft.errors import DataError

_JUNK = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "@eadir", "lost+found", "system volume information"}
_MAX_DEPTH = 100  # nested folders
_MAX_VISITS = 100  # of one folder, by links: 30 folders with two links each to the next one would make 2**30

# Never opened to see whether they are images: some datasets have one such file for each image.
_NO_IMAGES = {
    ".avi", ".csv", ".gz", ".html", ".ipynb", ".json", ".jsonl", ".md", ".mat", ".mov", ".mp4", ".npy", ".npz",
    ".parquet", ".pt", ".pth", ".py", ".pyc", ".safetensors", ".tar", ".tsv", ".txt", ".xml", ".yaml", ".yml", ".zip",
}  # fmt: skip
# A TIFF reader accepts these, but shows only the thumbnail.
_RAW = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw"}
# Formats whose first bytes are proof enough, even of a truncated file. Files of other formats are opened to be sure.
_SURE = {"JPEG", "PNG", "GIF", "WEBP", "TIFF", "JPEG2000", "AVIF", "HEIF", "JXL"}
_REMEDY = {"HEIC": "pip install 'vitft[heic]'", "JPEG XL": "pip install 'vitft[heic]'"}


class OtherFile(NamedTuple):
    """A file that is not read. `kind` is its format if it is a picture, else empty."""

    name: str
    kind: str


@dataclass
class Folder:
    """A folder and everything below it, without hidden files and those that operating systems leave behind."""

    path: str
    name: str
    images: list[str] = field(default_factory=list)  # names of the images directly in it, sorted
    by_content: list[str] = field(default_factory=list)  # those recognized by content, not by their suffix
    others: list[OtherFile] = field(default_factory=list)  # its other files, sorted by name
    folders: "list[Folder]" = field(default_factory=list)  # sorted by name

    @cached_property
    def count(self) -> int:
        """Images at any depth."""
        return len(self.images) + sum(inner.count for inner in self.folders)

    @property
    def with_images(self) -> "list[Folder]":
        """The folders directly in it that hold images at any depth."""
        return [folder for folder in self.folders if folder.count]

    def walk(self) -> "Iterator[Folder]":
        """This folder and all below it, parents first."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def files(self) -> Iterator[str]:
        """Paths of the images at any depth."""
        return (f"{folder.path}{os.sep}{name}" for folder in self.walk() for name in folder.images)

    def other_files(self) -> Iterator[tuple[str, str]]:
        """Paths and kinds of the other files at any depth."""
        return ((f"{folder.path}{os.sep}{file.name}", file.kind) for folder in self.walk() for file in folder.others)


class Listing:
    """A folder and everything below it, listed once. Links are followed unless they lead back to a parent folder.

    Raises OSError for an unreadable folder, DataError for one that is nested too deeply.
    """

    def __init__(self, root: Path) -> None:
        self.remarks: list[str] = []  # about links that were not followed
        self.duplicates: list[tuple[str, str]] = []  # pairs of paths that links make the same image
        self._root = str(root)
        self._visits: Counter[tuple[int, int]] = Counter()
        self._linked: dict[tuple[int, int], str] = {}
        self.tree = self._scan(self._root, root.name, ())

    def _scan(self, path: str, name: str, parents: tuple[tuple[int, int], ...]) -> Folder:
        folder = Folder(path, name)
        if len(parents) > _MAX_DEPTH:
            raise DataError(f"{path} is over {_MAX_DEPTH} folders deep; give the folder that holds the images.")
        status = os.stat(path)  # noqa: PTH116  (hot loop)
        inode = (status.st_dev, status.st_ino)
        self._visits[inode] += 1
        if inode in parents or self._visits[inode] > _MAX_VISITS:
            why = "leads back to a parent folder" if inode in parents else f"was followed {_MAX_VISITS} times already"
            self.remarks.append(f"the link {relative(path, self._root)} is not followed: it {why}")
            return folder
        with os.scandir(path) as entries:
            visible = sorted((entry for entry in entries if not is_junk(entry.name)), key=lambda entry: entry.name)
        for entry in visible:
            if _is_folder(entry):
                folder.folders.append(self._scan(entry.path, entry.name, (*parents, inode)))
            elif os.path.splitext(entry.name)[1].lower() in suffixes():  # noqa: PTH122  (hot loop)
                folder.images.append(entry.name)
                if entry.is_symlink():
                    self._note_duplicate(entry)
            elif (kind := _kind(entry)) == _IMAGE:
                folder.images.append(entry.name)
                folder.by_content.append(entry.name)
            else:
                folder.others.append(OtherFile(entry.name, kind))
        return folder

    def _note_duplicate(self, link: "os.DirEntry[str]") -> None:
        try:
            status = link.stat()
        except OSError:  # a broken link; decoding it reports the error
            return
        first = self._linked.setdefault((status.st_dev, status.st_ino), link.path)
        if first != link.path:
            self.duplicates.append((link.path, first))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_junk(name: str) -> bool:
    """Whether a file or folder is hidden, or left behind by an operating system."""
    return name.startswith(".") or name.lower() in _JUNK


def relative(path: str, root: str) -> str:
    """A path relative to a folder above it, with `/`."""
    return path.removeprefix(root).strip(os.sep).replace(os.sep, "/") or "."


# -- recognizing images -----------------------------------------------------------------------------

_IMAGE = "image"


def _kind(entry: "os.DirEntry[str]") -> str:
    """_IMAGE if the first bytes are of a readable image; the format of an unreadable picture; else empty."""
    suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122  (hot loop)
    if suffix in _NO_IMAGES:
        return ""
    if suffix in _RAW:
        return "camera raw"
    try:
        if not stat.S_ISREG(entry.stat().st_mode):  # a pipe would block
            return ""
        with open(entry.path, "rb", buffering=0) as file:  # noqa: PTH123  (hot loop)
            head = file.read(64)
    except OSError:
        return ""
    if (accepted := _accepting(head)) & _SURE:
        return _IMAGE
    if accepted:
        with suppress(BadImage):
            header(Path(entry.path))
            return _IMAGE
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    if kind := format_of_plugin(head):
        return kind
    if suffix == ".svg":
        return "SVG"
    by_suffix = Image.registered_extensions().get(suffix, "")
    return by_suffix if by_suffix in Image.OPEN and by_suffix not in formats() else ""


def _accepting(head: bytes) -> set[str]:
    """The readable formats whose own test accepts the first 16 bytes."""
    accepting = set()
    for name in formats():
        accept = Image.OPEN[name][1]
        with suppress(SyntaxError, IndexError, TypeError, struct.error):  # as Pillow does for files that are too short
            if accept is not None and accept(head[:16]) is True:
                accepting.add(name)
    return accepting


# -- describing the other files ---------------------------------------------------------------------


def describe_others(files: Iterable[tuple[str, str]], root: str) -> tuple[list[str], list[str]]:
    """Sentences about files that are not read: notes about non-images, warnings about unreadable pictures."""
    by_kind: dict[str, list[str]] = {}
    for path, kind in files:
        by_kind.setdefault(kind, []).append(path)
    notes = []
    if no_images := by_kind.pop("", []):
        endings = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in no_images)  # noqa: PTH122
        counts = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(4))
        more = ", ..." if len(endings) > 4 else ""
        first = relative(no_images[0], root)
        are = "1 file is not an image" if len(no_images) == 1 else f"{len(no_images):,} files are not images"
        notes.append(f"{are}: {counts}{more} (first: {first})")
    warnings = []
    for kind, paths in by_kind.items():
        are = "1 file is" if len(paths) == 1 else f"{len(paths):,} files are"
        remedy = _REMEDY.get(kind, "convert to JPEG or PNG")
        warnings.append(f"{are} {kind}, which cannot be read (first: {relative(paths[0], root)}): {remedy}")
    return notes, warnings
