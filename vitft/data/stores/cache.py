"""A disk cache of decoded photos for later runs: keyed by its inputs, verified, bounded in size, removable.

An entry is a folder that is complete or absent: it is written under another name and then renamed, and removed the
other way around. It never changes in between. If two runs decode the same images at once, the second finds an entry
and drops its own. A run that reads an entry keeps it open, even if it is removed.

    KEY/pixels        the images end to end, uint8
    KEY/index         height, width and XXH3 checksum of the pixels of each image, uint64
    KEY/entry.json    name and size, for people; the digest; the checksums of the index and of this file

Nothing in an entry is trusted: a run reads all of it once and verifies the checksums before it uses an image.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from stat import S_ISREG
from typing import Any

import datasets
import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import features
from torch import Tensor
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest, xxh3_128

from vitft.hardware.pools import map_in_groups
from vitft.io import console
from vitft.io.atomic import json_text, lock_folder
from vitft.io.paths import cache_folder

_FORMAT = 3  # part of the key: entries of another format are never read, but are evicted first and can be cleared
_ABANDONED_S = 600.0  # an unfinished entry that is untouched for so long and that no process holds: its run was killed
_CHUNK = 1000  # rows
_SAMPLE = 4096  # bytes at a file's head, middle and tail
_BLOCK = 1 << 20  # bytes read at a time
_KEY = "[0-9a-f]" * 32  # glob of an entry's name


@dataclass(frozen=True)
class Entry:
    """One cached split, for listing: its folder, name, number of images, bytes, and when it was last used."""

    folder: Path
    name: str
    images: int
    size: int
    used: float


def root() -> Path:
    """The folder of the entries."""
    return cache_folder("decoded")


def fingerprint(rows: datasets.Dataset, *made_by: Any, whole: bool = False) -> str | None:
    """The key of these images as decoded with the settings `made_by`; None if a file cannot be read.

    Images stored as bytes are hashed completely. A file is identified by its size, its times, and its head, middle
    and tail, or, with `whole`, all of its content. The times are mtime, which `cp -p`, `rsync -t` and archives set
    freely, and ctime, which nobody can set: it reveals a replaced or edited file even if the three samples are the
    same. A copied dataset has new times and is decoded again; a renamed folder does not. The path is left out for
    that reason, and so is the inode, which network disks and containers assign anew on each mount.
    """
    cells = (rows[start : start + _CHUNK]["image"] for start in range(0, len(rows), _CHUNK))
    try:
        return key_of(
            (one for some in cells for one in map_in_groups(lambda cell: identity(cell, whole), some)),
            *made_by, whole=whole,
        )  # fmt: skip
    except OSError:  # the decoder will report it
        return None


def key_of(identities: Iterable[bytes], *made_by: Any, whole: bool) -> str:
    """The key of images with these identities: see `fingerprint`."""
    key = hashlib.blake2b(repr((_FORMAT, _decoder(), made_by, whole)).encode(), digest_size=16)
    for one in identities:
        key.update(one)
    return key.hexdigest()


def identity(cell: dict[str, Any], whole: bool) -> bytes:
    """16 bytes that tell one encoded image, {"bytes", "path"}, from another. Raises OSError."""
    if cell["bytes"] is not None:
        return xxh3_128(len(cell["bytes"]).to_bytes(8, "little") + cell["bytes"]).digest()
    handle = os.open(cell["path"], os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
    try:
        status = os.fstat(handle)
        if not S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a file", cell["path"])
        hashed = xxh3_128()
        if whole or status.st_size <= 3 * _SAMPLE:
            while block := os.read(handle, _BLOCK):
                hashed.update(block)
        else:
            for offset in (0, (status.st_size - _SAMPLE) // 2, status.st_size - _SAMPLE):
                hashed.update(os.pread(handle, _SAMPLE, offset))
    finally:
        os.close(handle)
    hashed.update(repr((status.st_size, status.st_mtime_ns, status.st_ctime_ns)).encode())
    return hashed.digest()


@cache
def _decoder() -> tuple[Any, ...]:
    """What turns files into pixels: the versions of the libraries, and the source of the code here."""
    libraries = [features.version_codec(name) for name in features.get_supported_codecs()]
    code = [xxh3_128((files("vitft.data") / f"{name}.py").read_bytes()).hexdigest() for name in _CODE]
    return PIL.__version__, torch.__version__, libraries, code


_CODE = ("augment", "color", "decoder", "stores/store")


class OpenEntry:
    """An entry that a run reads: heights and widths (N, 2), checksums (N,), and the digest of all pixels.

    The index and the description are verified at once. Raises ValueError if they are corrupt, and OSError.
    """

    def __init__(self, folder: Path) -> None:
        self.key = folder.name
        description = _read_description(folder)
        raw = (folder / "index").read_bytes()
        if xxh3_64_hexdigest(raw) != description["index"]:
            raise ValueError("the index does not match its checksum")
        index = np.frombuffer(raw, "<u8").reshape(-1, 3)
        self.shapes, self.sums = index[:, :2].astype(np.int64), index[:, 2].astype(np.uint64)
        self.digest: str = description["digest"]
        self._ends = np.cumsum(3 * self.shapes.prod(axis=1))
        # The file stays open, because the entry may be removed meanwhile. It is read, not mapped: if a mapped file is
        # truncated by someone, or its disk fails, the system kills the process without a message.
        self._file = (folder / "pixels").open("rb")

    @property
    def size(self) -> int:
        """Bytes of all pixels."""
        return int(3 * self.shapes.prod(axis=1).sum())

    def verify(self, progress: Callable[[int, int], None], out: Tensor | None) -> bool:
        """Whether every image matches its checksum. Reads all of them, into `out`, uint8 (size,), if it is given."""
        if os.fstat(self._file.fileno()).st_size != self.size:
            return False
        memory = None if out is None else out.numpy()

        def is_intact(position: int) -> bool:
            height, width = self.shapes[position].tolist()
            end = int(self._ends[position])
            view = None if memory is None else memory[end - 3 * height * width : end].reshape(height, width, 3)
            return self.image(position, view) is not None

        count = len(self.shapes)
        for start in range(0, count, _CHUNK):
            positions = range(start, min(start + _CHUNK, count))
            for position, intact in zip(positions, map_in_groups(is_intact, positions), strict=True):
                if not intact:
                    return False
                progress(position + 1, count)
        return True

    def image(self, position: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8] | None:
        """An image (H, W, 3), read and verified now; None if its bytes have changed."""
        height, width = self.shapes[position].tolist()
        image = np.empty((height, width, 3), np.uint8) if out is None else out
        raw = image.data.cast("B")
        start, done = int(self._ends[position]) - len(raw), 0
        while done < len(raw):
            count = os.preadv(self._file.fileno(), [raw[done:]], start + done)
            if count == 0:
                return None
            done += count
        return image if checksum(image) == int(self.sums[position]) else None


def checksum(image: NDArray[np.uint8]) -> int:
    """The 64-bit XXH3 checksum of an image's pixels (C-contiguous)."""
    return xxh3_64_intdigest(image.data.cast("B"))


def read(
    key: str, count: int, in_memory: int, progress: Callable[[int, int], None] = lambda done, count: None
) -> tuple[OpenEntry, Tensor] | None:
    """The entry of `count` images, verified, and its pixels if they take at most `in_memory` bytes, else no pixels.

    None if there is no such entry, or if it cannot be read at the moment. A corrupt entry is removed, if this process
    may, with a warning.
    """
    folder = root() / key
    try:
        entry = OpenEntry(folder)
        fits = entry.size <= in_memory
        pixels = torch.empty(entry.size if fits else 0, dtype=torch.uint8)
        corrupt = len(entry.shapes) != count or not entry.verify(progress, pixels if fits else None)
    except (ValueError, FileNotFoundError):
        if not folder.is_dir():
            return None
        corrupt = True
    except OSError:  # too many open files, no memory, no permission: the entry may be intact
        return None
    if corrupt:
        discard(key)
        return None
    with suppress(OSError):  # mark it as used; fails in somebody else's cache
        os.utime(folder)
    return entry, pixels


def peek(key: str, count: int) -> OpenEntry | None:
    """Like `read`, but no pixels are read: `OpenEntry.image` verifies each image that is."""
    folder = root() / key
    try:
        entry = OpenEntry(folder)
        corrupt = len(entry.shapes) != count
    except (ValueError, FileNotFoundError):
        corrupt = folder.is_dir()
        entry = None
    except OSError:
        return None
    if corrupt:
        discard(key)
        return None
    with suppress(OSError):
        os.utime(folder)
    return entry


def discard(key: str) -> None:
    """Remove an entry that is corrupt, if this process may, with a warning."""
    folder = root() / key
    outcome = "the entry was removed" if _remove(folder) else "the entry cannot be removed from here"
    console.warn(f"{folder}: cached photos are corrupt and are decoded again; {outcome}. Is the disk failing?")


def _read_description(folder: Path) -> dict[str, Any]:
    """An entry's description, verified. Raises as `OpenEntry`."""
    text = (folder / "entry.json").read_text(encoding="utf-8")
    document = json.loads(text)
    exact = isinstance(document, dict) and text == json_text(document)  # whitespace could differ otherwise
    if not exact or document.pop("xxh3", None) != _description_checksum(document):
        raise ValueError("entry.json does not match its checksum")
    return dict(document)


def _description_checksum(document: dict[str, Any]) -> str:
    return xxh3_64_hexdigest(json_text(document).encode())


def write(
    key: str, name: str, images: Iterable[NDArray[np.uint8]], shapes: NDArray[np.int64], sums: Sequence[int],
    digest: str, limit: int,
) -> bool:  # fmt: skip
    """Cache an entry, evicting the least recently used; False if it exceeds `limit` bytes or the disk.

    `images` have the pixels of all, in order, in pieces of any size.
    Its permissions follow from the umask and the folder, as for any file, so a group can share a cache.
    """
    size = int(3 * shapes.prod(axis=1).sum())
    if size > limit:
        return False
    index = np.concatenate([shapes.astype("<u8"), np.array(sums, "<u8")[:, None]], axis=1).tobytes()
    description = {"name": name, "images": len(shapes), "digest": digest, "index": xxh3_64_hexdigest(index)}
    try:
        root().mkdir(parents=True, exist_ok=True)
        _evict(limit - size)
        unfinished = _hidden_name(key)
        unfinished.mkdir()
        try:
            with lock_folder(unfinished):
                with (unfinished / "pixels").open("wb") as file:
                    for image in images:
                        image.tofile(file)
                (unfinished / "index").write_bytes(index)
                text = json_text(description | {"xxh3": _description_checksum(description)})
                (unfinished / "entry.json").write_text(text, encoding="utf-8")
                unfinished.rename(root() / key)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError:  # another run was first, or the disk is full: this run has its images anyway
        return False
    return True


def entries() -> list[Entry]:
    """All entries, the most recently used first, including corrupt ones and those of other versions."""
    found = []
    for folder in root().glob(_KEY):
        with suppress(OSError):  # removed just now, or unreadable
            size = sum(file.stat().st_size for file in folder.iterdir())
            try:
                description = _read_description(folder)
            except (ValueError, FileNotFoundError):
                description = {"name": "(corrupt, or of another version)", "images": 0}
            found.append(Entry(folder, description["name"], description["images"], size, folder.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def clear() -> int:
    """Remove all entries; returns the number of bytes freed."""
    freed = sum(entry.size for entry in entries() if _remove(entry.folder))
    _remove_abandoned()
    return freed


def _evict(limit: int) -> None:
    """Remove the least recently used entries until the others take at most `limit` bytes."""
    _remove_abandoned()
    remaining = entries()
    while remaining and sum(entry.size for entry in remaining) > limit:
        _remove(remaining.pop().folder)


def _remove(folder: Path) -> bool:
    """Remove an entry at once, so that nobody finds a part of it; False if this process may not."""
    removed = _hidden_name(folder.name)
    try:
        folder.rename(removed)
    except OSError:
        return False
    shutil.rmtree(removed, ignore_errors=True)
    return True


def _hidden_name(key: str) -> Path:
    """A unique name for an entry that is not finished, or is being removed."""
    return root() / f".{key}.{secrets.token_hex(4)}"


def _remove_abandoned() -> None:
    for folder in root().glob(f".{_KEY}.*"):
        with suppress(OSError), lock_folder(folder) as alone:  # it may be renamed just now
            touched = max(file.stat().st_mtime for file in (folder, *folder.iterdir()))
            if alone and time.time() - touched > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
