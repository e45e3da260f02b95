"""Atomic writes: files and folders are written under a temporary name in the same folder, then renamed.

The temporary name is `.NAME.vitft-new`. What is being replaced is called `.NAME.vitft-old`, and what is being removed
`.NAME.vitft-gone`. `clean_up` recognizes these names after a kill, and no other files.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_NEW, _OLD, _GONE = ".vitft-new", ".vitft-old", ".vitft-gone"


def _sibling(path: Path, suffix: str) -> Path:
    """The temporary name of a file or folder."""
    return path.parent / f".{path.name}{suffix}"


def write_text(path: Path, text: str) -> None:
    """Atomically write a text file, as UTF-8 with the line ends in `text`."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, document: Any) -> None:
    """Atomically write a JSON file. Raises ValueError for NaN and infinity."""
    write_text(path, json_text(document))


def json_text(document: Any) -> str:
    """Serialize a JSON document. Checksums depend on this format, so it must not change."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _name_target(error: BaseException, temporary: Path, path: Path) -> None:
    """Make an OSError name what was to be written: nobody knows the temporary name, which is gone by then."""
    if not isinstance(error, OSError) or error.errno is None:  # without a number, the name would replace the message
        return
    name = str(error.filename or temporary)  # writing names no file, unlike opening
    if name == str(temporary) or name.startswith(f"{temporary}{os.sep}"):
        error.filename = str(path) + name.removeprefix(str(temporary))
        if error.filename2 is not None:  # of the renaming
            del error.filename2


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the name of a temporary file to write, which replaces `path` on exit, or is deleted on an error.

    If `path` is a link, what it points to is replaced. A pipe or a device, like /dev/null, is yielded itself. Raises
    IsADirectoryError for a folder; an OSError names `path`.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    temporary = _sibling(path, _NEW)  # overwrites any leftover of a killed process
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        _name_target(error, temporary, path)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def lock_folder(folder: Path) -> Iterator[bool]:
    """Try to lock a folder while entered (or until the process ends); yields whether this process has the lock.

    No lock file is written. Where folders cannot be locked (Windows, some network disks), it always yields True.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield True
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError as error:
        locked = not isinstance(error, BlockingIOError)
    try:
        yield locked
    finally:
        os.close(handle)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` on exit, or is deleted on an error.

    Files get the default permissions of the process (umask), whatever their writer set. An OSError names `path`, or a
    file in it.
    """
    temporary, previous = _sibling(path, _NEW), _sibling(path, _OLD)
    if previous.exists() and not path.exists():  # a kill came between the two renames below
        previous.rename(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        mode = temporary.stat().st_mode & 0o666  # safetensors creates files that only the owner can read
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
    except BaseException as error:
        _name_target(error, temporary, path)
        shutil.rmtree(temporary, ignore_errors=True)
        if previous.exists() and not path.exists():
            previous.rename(path)
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder atomically: it is either complete or gone."""
    gone = _sibling(path, _GONE)
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def clean_up(folder: Path) -> None:
    """Clean up after a killed process: restore what was being replaced, and delete temporary files and folders."""
    for leftover in folder.glob(".?*.vitft-*"):
        original = folder / leftover.stem.removeprefix(".")
        if leftover.suffix == _OLD and not original.exists():
            leftover.rename(original)
        elif leftover.suffix in (_NEW, _OLD, _GONE):
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


def _sync(path: Path) -> None:
    with suppress(OSError):  # some systems cannot open a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
