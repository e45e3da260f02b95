"""Files that are whole or absent: written under a temporary name in the same place, then renamed.

Until then they are called `.NAME.vitft-new`; what they replace, `.NAME.vitft-old`; what is being removed,
`.NAME.vitft-gone`. So whatever a kill leaves is known, and nobody else's files are taken for it.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_NEW, _OLD, _GONE = ".vitft-new", ".vitft-old", ".vitft-gone"


def _aside(path: Path, suffix: str) -> Path:
    """The name that a file or folder has beside its own place."""
    return path.parent / f".{path.name}{suffix}"


def write_text(path: Path, text: str) -> None:
    """Replace a file's text, whole."""
    temporary = _aside(path, _NEW)  # what a kill leaves is replaced by the next writing of this file
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_json(path: Path, document: Any) -> None:
    """Replace a file by a JSON document, whole."""
    write_text(path, json_text(document))


def json_text(document: Any) -> str:
    """A JSON document as it is written here."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Whether this process alone holds a folder, until it leaves or ends, however that happens; it leaves no file.

    Where folders cannot be held (no such system call, some network disks) the answer is always True.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield True
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:
            yield True
        else:
            yield True
    finally:
        os.close(handle)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; on leaving, it takes the place of `path`, or vanishes on an error.

    Its files get the permissions that this process gives to new ones, whatever the writer gave them.
    """
    temporary, previous = _aside(path, _NEW), _aside(path, _OLD)
    if previous.exists() and not path.exists():  # a kill fell between the two renames below
        previous.rename(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    mode = temporary.stat().st_mode & 0o666  # safetensors makes files that only their owner may read
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                file.chmod(mode)
            _sync(file)
        _sync(temporary)
        shutil.rmtree(previous, ignore_errors=True)
        if path.exists():
            path.rename(previous)
        temporary.rename(path)
        _sync(path.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if previous.exists() and not path.exists():
            previous.rename(path)
        raise


def remove_folder(path: Path) -> None:
    """Remove a folder, which is there whole or not at all."""
    gone = _aside(path, _GONE)
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def heal(folder: Path) -> None:
    """Undo in a folder what a kill left half done: the former of two renames, and all that is under another name."""
    for left in folder.glob(".?*.vitft-*"):
        whole = folder / left.stem.removeprefix(".")
        if left.suffix == _OLD and not whole.exists():
            left.rename(whole)
        elif left.suffix in (_NEW, _OLD, _GONE):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _sync(path: Path) -> None:
    with suppress(OSError):  # some systems cannot open a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
