"""Decoded photos on disk, for the next run: found by a fingerprint of what they were made from, bounded, removable.

An entry is a folder that is complete or absent: it is written under another name, then renamed. Of two runs
that decode the same images at once, the second finds its entry there and drops its own. What is removed while
a run has it mapped stays with that run until it ends.

    KEY/pixels        the images end to end, uint8
    KEY/index.npz     offsets, shapes, digest
    KEY/entry.json    what it was made from, for people
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import datasets
import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitft.files import held

_FORMAT = 1
_ABANDONED_S = 600.0  # an unfinished entry this long untouched that no process holds is a killed run's
_CHUNK = 1000


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
    return Path(os.environ.get("VITFT_CACHE") or Path(home) / "vitft").expanduser() / "decoded"


def fingerprint(rows: datasets.Dataset, *made_by: Any) -> str:
    """A name for these images, as `made_by` these settings: of files the path, size and time, of bytes all of them."""
    found = hashlib.blake2b(repr((_FORMAT, PIL.__version__, torch.__version__, made_by)).encode(), digest_size=16)
    for start in range(0, len(rows), _CHUNK):
        for cell in rows[start : start + _CHUNK]["image"]:
            if cell["bytes"] is None:
                with suppress(OSError):  # what is wrong with the file, the decoder says
                    status = Path(cell["path"]).stat()
                    found.update(repr((cell["path"], status.st_size, status.st_mtime_ns)).encode())
            else:
                found.update(len(cell["bytes"]).to_bytes(8, "little") + cell["bytes"])
    return found.hexdigest()


def read(key: str) -> tuple[Tensor, dict[str, NDArray[Any]]] | None:
    """Pixels, mapped and private to this process, and the index; None where there is no such entry."""
    folder = root() / key
    try:
        with np.load(folder / "index.npz", allow_pickle=False) as index:
            arrays = dict(index)
        pixels = np.memmap(folder / "pixels", np.uint8, "c", shape=(int(arrays["offsets"][-1]),))
        os.utime(folder)
    except (OSError, ValueError, KeyError, BadZipFile):  # absent, removed this moment, or damaged
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return torch.from_numpy(pixels), arrays


def write(key: str, name: str, pixels: Tensor, index: dict[str, NDArray[Any]], limit: int) -> bool:
    """Keep an entry, dropping those that were not used for longest; not kept if it is over `limit` bytes or disk."""
    if pixels.nbytes > limit:
        return False
    try:
        root().mkdir(parents=True, exist_ok=True)
        _make_room(limit - pixels.nbytes)
        fresh = Path(tempfile.mkdtemp(prefix=".", dir=root()))
        try:
            with held(fresh):
                pixels.numpy().tofile(fresh / "pixels")
                np.savez(fresh / "index.npz", **index)  # type: ignore[arg-type]
                (fresh / "entry.json").write_text(json.dumps({"name": name, "images": len(index["shapes"])}))
                fresh.rename(root() / key)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError:  # another run was first, or the disk is full: this run has its images all the same
        return False
    return True


def entries() -> list[Entry]:
    """What is kept, the last used first."""
    found = []
    for folder in root().glob("[!.]*"):
        try:
            about = json.loads((folder / "entry.json").read_text())
            size = sum(file.stat().st_size for file in folder.iterdir())
            found.append(Entry(folder, about["name"], about["images"], size, folder.stat().st_mtime))
        except (OSError, ValueError, KeyError):  # removed this moment, or not ours
            continue
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def clear() -> int:
    """Remove all entries; how many bytes they had."""
    freed = 0
    for entry in entries():
        shutil.rmtree(entry.folder, ignore_errors=True)
        freed += entry.size
    _remove_abandoned()
    return freed


def _make_room(limit: int) -> None:
    """Remove entries, the least recently used first, until the rest has at most `limit` bytes."""
    _remove_abandoned()
    kept = entries()
    while kept and sum(entry.size for entry in kept) > limit:
        shutil.rmtree(kept.pop().folder, ignore_errors=True)


def _remove_abandoned() -> None:
    for folder in root().glob(".*"):
        with suppress(OSError), held(folder) as alone:  # it may become an entry this moment
            touched = max(file.stat().st_mtime for file in (folder, *folder.iterdir()))
            if alone and time.time() - touched > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
