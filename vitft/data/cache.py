"""Decoded photos on disk, for the next run: found by what they were made from, proved, bounded, removable.

An entry is a folder that is complete or absent: it is written under another name, then renamed, and it goes the same
way. Nothing changes it in between. Of two runs that decode the same images at once, the second finds its entry there
and drops its own. What is removed while a run reads it stays with that run until it ends.

    KEY/pixels        the images end to end, uint8
    KEY/index         of each image height, width and the XXH3 checksum of its pixels, uint64
    KEY/entry.json    what it was made from, for people; the digest; the checksums of the index and of this file

Nothing in an entry is believed: a run reads all of it once and compares the checksums before it uses an image.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
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

from vitft.data.augment import map_in_groups
from vitft.io import console
from vitft.io.atomic import held, json_text
from vitft.io.paths import expanded

_FORMAT = 2  # entries of another format have other keys: they are never read, are the first to go, and can be cleared
_ABANDONED_S = 600.0  # an unfinished entry this long untouched that no process holds is a killed run's
_CHUNK = 1000
_SAMPLE = 4096  # bytes of a file's head, middle and tail
_PIECE = 1 << 20  # bytes that are read at a time
_KEY = "[0-9a-f]" * 32  # how an entry is named


@dataclass(frozen=True)
class Entry:
    """One kept split: its folder, what it was made from, its bytes, and when it was last used."""

    folder: Path
    name: str
    images: int
    size: int
    used: float


def root() -> Path:
    """Where entries are kept: in VITFT_CACHE, else in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return expanded(os.environ.get("VITFT_CACHE") or Path(home) / "vitft") / "decoded"


def fingerprint(rows: datasets.Dataset, *made_by: Any, whole: bool = False) -> str | None:
    """A name for these images, as `made_by` these settings; None where a file cannot be read, as the decoder will say.

    Of bytes all of them count. Of a file its size, its times and its head, middle and tail do, or `whole` its content.
    The times are the last writing's, which `cp -p`, `rsync -t` and archives set to whatever they like, and the last
    change's (ctime), which nobody can set: with it a replaced or edited file is another one even where the three
    samples agree. A copied data set has new ones and is decoded once more, a renamed folder has not. The path does not
    count, for the same reason, and neither does the inode: network disks and containers number files anew each time
    they are mounted, and what it would tell the time of change tells already.
    """
    found = hashlib.blake2b(repr((_FORMAT, _decoder(), made_by, whole)).encode(), digest_size=16)
    try:
        for start in range(0, len(rows), _CHUNK):
            cells = rows[start : start + _CHUNK]["image"]
            for one in map_in_groups(lambda cell: _identity(cell, whole), cells):
                found.update(one)
    except OSError:
        return None
    return found.hexdigest()


def _identity(cell: dict[str, Any], whole: bool) -> bytes:
    """What tells one encoded image from another. Raises OSError."""
    if cell["bytes"] is not None:
        return len(cell["bytes"]).to_bytes(8, "little") + xxh3_128(cell["bytes"]).digest()
    handle = os.open(cell["path"], os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for who writes to it
    try:
        status = os.fstat(handle)
        if not S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "no file", cell["path"])
        hashed = xxh3_128()
        if whole or status.st_size <= 3 * _SAMPLE:
            while piece := os.read(handle, _PIECE):
                hashed.update(piece)
        else:
            for place in (0, (status.st_size - _SAMPLE) // 2, status.st_size - _SAMPLE):
                hashed.update(os.pread(handle, _SAMPLE, place))
    finally:
        os.close(handle)
    return repr((status.st_size, status.st_mtime_ns, status.st_ctime_ns)).encode() + hashed.digest()


@cache
def _decoder() -> tuple[Any, ...]:
    """What makes pixels of a file: the libraries, by version, and the code here, by what it says."""
    libraries = [features.version_codec(name) for name in features.get_supported_codecs()]
    code = [xxh3_128((files("vitft.data") / f"{name}.py").read_bytes()).hexdigest() for name in _CODE]
    return PIL.__version__, torch.__version__, libraries, code


_CODE = ("augment", "color", "decoder", "store")


class OpenEntry:
    """An entry that a run reads: heights and widths (N, 2), checksums (N,), and the digest of all pixels."""

    def __init__(self, pixels: Path, shapes: NDArray[np.int64], sums: NDArray[np.uint64], digest: str) -> None:
        self.shapes, self.sums, self.digest = shapes, sums, digest
        self._ends = np.cumsum(3 * shapes.prod(axis=1))
        # It stays open: the entry may be removed meanwhile. Read, not mapped: where a mapped file is cut short by
        # someone, or its disk fails, the system ends the process without a word.
        self._file = pixels.open("rb")

    @property
    def size(self) -> int:
        """Bytes of all pixels."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def prove(self, progress: Callable[[int, int], None], into: Tensor | None) -> bool:
        """Whether every image is what was kept; they are all read, `into` memory (size,) where it is given."""
        if os.fstat(self._file.fileno()).st_size != self.size:
            return False
        memory = None if into is None else into.numpy()

        def whole(position: int) -> bool:
            height, width = self.shapes[position].tolist()
            end = int(self._ends[position])
            own = None if memory is None else memory[end - 3 * height * width : end].reshape(height, width, 3)
            return self.image(position, own) is not None

        count = len(self.shapes)
        for start in range(0, count, _CHUNK):
            for position, one in enumerate(map_in_groups(whole, range(start, min(start + _CHUNK, count))), start):
                if not one:
                    return False
                progress(position + 1, count)
        return True

    def image(self, position: int, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8] | None:
        """An image (H, W, 3), read and proved now; None where its bytes are no longer those that were kept."""
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
    """The XXH3 checksum, 64 bits, of an image's pixels (C-contiguous)."""
    return xxh3_64_intdigest(image.data.cast("B"))


def read(
    key: str, count: int, in_memory: int, progress: Callable[[int, int], None] = lambda done, count: None
) -> tuple[OpenEntry, Tensor] | None:
    """The entry of `count` images, proved, and its pixels if they have at most `in_memory` bytes, else none of them.

    None where there is no such entry, or it cannot be read at the moment. One that is damaged is removed, where this
    process may, and said to be.
    """
    folder = root() / key
    try:
        kept = _opened(folder)
        fits = kept.size <= in_memory
        pixels = torch.empty(kept.size if fits else 0, dtype=torch.uint8)
        damaged = len(kept.shapes) != count or not kept.prove(progress, pixels if fits else None)
    except ValueError:
        damaged = True
    except FileNotFoundError:  # the entry, or a file of it
        if not folder.is_dir():
            return None
        damaged = True
    except OSError:  # too many open files, no memory, no right: that says nothing of the entry
        return None
    if damaged:
        gone = _remove(folder)
        console.warn(
            f"{folder}: kept photos are damaged, and decoded anew; "
            f"{'they were removed' if gone else 'they cannot be removed from here'}. Is the disk failing?"
        )
        return None
    with suppress(OSError):  # it was used now; a cache that others keep cannot be told so
        os.utime(folder)
    return kept, pixels


def _opened(folder: Path) -> OpenEntry:
    """An entry whose index and description are what was written. Raises ValueError if they are not, and OSError."""
    about = _about(folder)
    raw = (folder / "index").read_bytes()
    if xxh3_64_hexdigest(raw) != about["index"]:
        raise ValueError("the index is not what was written")
    index = np.frombuffer(raw, "<u8").reshape(-1, 3)
    return OpenEntry(folder / "pixels", index[:, :2].astype(np.int64), index[:, 2].astype(np.uint64), about["digest"])


def _about(folder: Path) -> dict[str, Any]:
    """An entry's description, if it is what was written. Raises as `_opened`."""
    text = (folder / "entry.json").read_text(encoding="utf-8")
    document = json.loads(text)
    whole = isinstance(document, dict) and text == json_text(document)  # other spaces would read as the same
    if not whole or document.pop("xxh3", None) != _sum(document):
        raise ValueError("entry.json is not what was written")
    return dict(document)


def _sum(document: dict[str, Any]) -> str:
    return xxh3_64_hexdigest(json_text(document).encode())


def write(
    key: str, name: str, pixels: Tensor, shapes: NDArray[np.int64], sums: Sequence[int], digest: str, limit: int
) -> bool:
    """Keep an entry, dropping those that were not used for longest; not kept if it is over `limit` bytes or disk.

    Who may read and write it follows from the umask and the folder, as of any file: a group can share a cache.
    """
    if pixels.nbytes > limit:
        return False
    index = np.concatenate([shapes.astype("<u8"), np.array(sums, "<u8")[:, None]], axis=1).tobytes()
    about = {"name": name, "images": len(shapes), "digest": digest, "index": xxh3_64_hexdigest(index)}
    try:
        root().mkdir(parents=True, exist_ok=True)
        _make_room(limit - pixels.nbytes)
        fresh = _aside(key)
        fresh.mkdir()
        try:
            with held(fresh):
                pixels.numpy().tofile(fresh / "pixels")
                (fresh / "index").write_bytes(index)
                whole = json_text(about | {"xxh3": _sum(about)})
                (fresh / "entry.json").write_text(whole, encoding="utf-8")
                fresh.rename(root() / key)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError:  # another run was first, or the disk is full: this run has its images all the same
        return False
    return True


def entries() -> list[Entry]:
    """What is kept, the last used first; also what is damaged or of another version, which takes room too."""
    found = []
    for folder in root().glob(_KEY):
        with suppress(OSError):  # removed this moment, or not to be read
            size = sum(file.stat().st_size for file in folder.iterdir())
            try:
                about = _about(folder)
            except (ValueError, FileNotFoundError):
                about = {"name": "(damaged, or of another version)", "images": 0}
            found.append(Entry(folder, about["name"], about["images"], size, folder.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def clear() -> int:
    """Remove all entries; how many bytes those had that are gone."""
    freed = sum(entry.size for entry in entries() if _remove(entry.folder))
    _remove_abandoned()
    return freed


def _make_room(limit: int) -> None:
    """Remove entries, the least recently used first, until the rest has at most `limit` bytes."""
    _remove_abandoned()
    kept = entries()
    while kept and sum(entry.size for entry in kept) > limit:
        _remove(kept.pop().folder)


def _remove(folder: Path) -> bool:
    """Take an entry away at once, so that nobody finds a part of it; False where this process may not."""
    gone = _aside(folder.name)
    try:
        folder.rename(gone)
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True


def _aside(key: str) -> Path:
    """A name of its own for an entry that is not there yet, or no longer."""
    return root() / f".{key}.{secrets.token_hex(4)}"


def _remove_abandoned() -> None:
    for folder in root().glob(f".{_KEY}.*"):
        with suppress(OSError), held(folder) as alone:  # it may become an entry this moment
            touched = max(file.stat().st_mtime for file in (folder, *folder.iterdir()))
            if alone and time.time() - touched > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
