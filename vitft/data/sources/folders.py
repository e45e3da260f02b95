"""Folders of images: what lies in them, listed once, and which of the files are images.

Most files are known by their names. The few of an unknown suffix, or of none, are known by their first bytes.
"""

import os
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vitft.data.decoder import BadImage, formats, header, suffixes
from vitft.errors import DataError

_JUNK = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "@eadir", "lost+found", "system volume information"}
_DEEPEST = 100  # folders within one another
_OFTEN = 100  # times that links may lead to one folder: of 30 folders, each with two links to the next, 2**30 are made

# Not opened to see whether they are images: data sets have a file of these for each image.
_NO_IMAGES = {
    ".avi", ".csv", ".gz", ".html", ".ipynb", ".json", ".jsonl", ".md", ".mat", ".mov", ".mp4", ".npy", ".npz",
    ".parquet", ".pt", ".pth", ".py", ".pyc", ".safetensors", ".tar", ".tsv", ".txt", ".xml", ".yaml", ".yml", ".zip",
}  # fmt: skip
# TIFF files to a reader of TIFF, which would show the thumbnail.
_RAW = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw"}
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_JXL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
# What is an image by these bytes alone, were it cut short; what other readers accept is opened before it is believed.
_SURE = {"JPEG", "PNG", "GIF", "WEBP", "TIFF", "JPEG2000", "AVIF", "HEIF", "JXL"}
_REMEDY = {"HEIC": "pip install 'vitft[heic]'", "JPEG XL": "pip install 'vitft[heic]'"}


class Passed(NamedTuple):
    """A file that is not read; `kind` is what picture it is, or nothing."""

    name: str
    kind: str


@dataclass(slots=True)
class Folder:
    """A folder and all below it; hidden files and what systems leave behind are not in it."""

    path: str  # as the one above it was given
    name: str
    images: list[str] = field(default_factory=list)  # names of the images directly in it, sorted
    unnamed: list[str] = field(default_factory=list)  # those of them whose names do not say so
    others: list[Passed] = field(default_factory=list)  # its other files, sorted by name
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

    def passed(self) -> Iterator[tuple[str, str]]:
        """Paths and kinds of the other files at any depth."""
        return ((f"{folder.path}{os.sep}{one.name}", one.kind) for folder in self.walk() for one in folder.others)


class Listing(NamedTuple):
    """A folder, and what there is to say of how it was listed."""

    tree: Folder
    remarks: list[str]  # of links that were not followed
    doubles: list[tuple[str, str]]  # images, by links, that are there under another path as well


def scan(root: Path) -> Listing:
    """List a folder and all below it. Links are followed, but none that leads back to a folder it lies in.

    Raises OSError for a folder that cannot be read, DataError for one that is too deep.
    """
    scanner = _Scanner(str(root))
    return Listing(scanner.scan(str(root), root.name, ()), scanner.remarks, scanner.doubles)


class _Scanner:
    def __init__(self, root: str) -> None:
        self.root = root
        self.remarks: list[str] = []
        self.doubles: list[tuple[str, str]] = []
        self._visits: Counter[tuple[int, int]] = Counter()
        self._linked: dict[tuple[int, int], str] = {}
        self._known = suffixes()

    def scan(self, path: str, name: str, above: tuple[tuple[int, int], ...]) -> Folder:
        folder = Folder(path, name)
        if len(above) > _DEEPEST:
            raise DataError(f"{path} lies over {_DEEPEST} folders deep; give the folder that holds the images.")
        status = os.stat(path)  # noqa: PTH116  (hot loop)
        this = (status.st_dev, status.st_ino)
        self._visits[this] += 1
        if this in above or self._visits[this] > _OFTEN:
            why = "leads back to a folder it lies in" if this in above else f"is there {_OFTEN} times already"
            self.remarks.append(f"the link {relative(path, self.root)} is not followed: it {why}")
            return folder
        with os.scandir(path) as entries:
            found = sorted((entry for entry in entries if not is_junk(entry.name)), key=lambda entry: entry.name)
        for entry in found:
            if _is_folder(entry):
                folder.folders.append(self.scan(entry.path, entry.name, (*above, this)))
            elif os.path.splitext(entry.name)[1].lower() in self._known:  # noqa: PTH122  (hot loop)
                folder.images.append(entry.name)
                if entry.is_symlink():
                    self._tell_double(entry)
            elif kind := _kind(entry):
                if kind == _IMAGE:
                    folder.images.append(entry.name)
                    folder.unnamed.append(entry.name)
                else:
                    folder.others.append(Passed(entry.name, kind))
            else:
                folder.others.append(Passed(entry.name, ""))
        folder.count = len(folder.images) + sum(inner.count for inner in folder.folders)
        return folder

    def _tell_double(self, link: "os.DirEntry[str]") -> None:
        try:
            status = link.stat()
        except OSError:  # it leads nowhere, which whoever opens it says
            return
        first = self._linked.setdefault((status.st_dev, status.st_ino), link.path)
        if first != link.path:
            self.doubles.append((link.path, first))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def is_junk(name: str) -> bool:
    """Whether a file or folder is hidden, or one that a system leaves behind."""
    return name.startswith(".") or name.lower() in _JUNK


def relative(path: str, root: str) -> str:
    """A path below a folder as seen from there, with /."""
    return path.removeprefix(root).strip(os.sep).replace(os.sep, "/") or "."


# -- what a file is ---------------------------------------------------------------------------------

_IMAGE = "image"


def _kind(entry: "os.DirEntry[str]") -> str:
    """`image` for one that is read, by the first bytes of the file; what picture it is that is not; or nothing."""
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
    accepted = [name for name, accept in _readers() if _takes(accept, head[:16])]
    if _SURE.intersection(accepted) or (accepted and _opens(entry.path)):
        return _IMAGE
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
        return "HEIC"
    if head.startswith(_JXL):
        return "JPEG XL"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    if suffix == ".svg":
        return "SVG"
    known = Image.registered_extensions().get(suffix, "")
    return known if known in Image.OPEN and known not in formats() else ""


_Accept = Callable[[bytes], bool | str]


@cache
def _readers() -> list[tuple[str, _Accept]]:
    """Pillow's test of the first 16 bytes, for each format that is read and has one."""
    return [(name, accept) for name in formats() if (accept := Image.OPEN[name][1]) is not None]


def _takes(accept: _Accept, head: bytes) -> bool:
    try:
        return accept(head) is True
    except (SyntaxError, IndexError, TypeError, struct.error):  # what Pillow takes for no, of a file too short
        return False


def _opens(path: str) -> bool:
    try:
        header(Path(path))
    except BadImage:
        return False
    return True


# -- what is said of it -----------------------------------------------------------------------------


def told(passed: Iterable[tuple[str, str]], root: str) -> tuple[list[str], list[str]]:
    """Sentences on files that are not read: on those that are no images, and on pictures that cannot be read."""
    kinds: dict[str, list[str]] = {}
    for path, kind in passed:
        kinds.setdefault(kind, []).append(path)
    plain = kinds.pop("", [])
    notes = []
    if plain:
        endings = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in plain)  # noqa: PTH122
        listed = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(4))
        more = ", ..." if len(endings) > 4 else ""
        notes.append(
            f"{_files(len(plain))} no image and not read: {listed}{more} (the first is {relative(plain[0], root)})"
        )
    warnings = []
    for kind, paths in kinds.items():
        remedy = _REMEDY.get(kind, "convert to JPEG or PNG")
        first = f"the first is {relative(paths[0], root)}"
        warnings.append(f"{_files(len(paths))} {kind}, which is not read ({first}): {remedy}")
    return notes, warnings


def _files(count: int) -> str:
    return "1 file is" if count == 1 else f"{count:,} files are"
