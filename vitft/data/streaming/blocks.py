"""A part of a shard at a time on this disk: fetched by one process, read by all of this machine, bounded, verified.

A block is images that are fetched together, as an Arrow file. While there is room, blocks are kept for later epochs and
runs. What exceeds that passes through: the oldest such block makes room for the next. So of data that is larger than
the disk, every epoch fetches only the part that does not fit.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from xxhash import xxh3_64_hexdigest, xxh3_128_hexdigest

from vitft.io.paths import cache_folder

_KEPT, _PASSING, _INDEX = ".kept", ".passing", ".index"
_FOR_KEPT = 0.75  # of the room; the rest is for what passes through
_UNUSED_S = 86400.0  # kept blocks that nobody has opened for so long make room for others
# Blocks that a process has mapped into memory, in use or coming next. They can be read even after they have made room.
_OPEN = 96
_LOCKS = 256  # two blocks may share one, and then wait for each other
_SUM = b"xxh3"


class Kept(NamedTuple):
    """How many blocks are on this disk, their bytes, and when one was last opened."""

    blocks: int
    size: int
    used: float


def root() -> Path:
    """The folder of the blocks."""
    return cache_folder("streamed")


_mapped: dict[str, pa.LargeBinaryArray] = {}
_guards = [threading.Lock() for _ in range(_LOCKS)]


def _renew_guards() -> None:
    """In a forked process, those that other threads held will never be released."""
    _guards[:] = [threading.Lock() for _ in range(_LOCKS)]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_guards)


def _number(key: str) -> int:
    """The number of a block's lock."""
    return int(key[:8], 16) % _LOCKS


def images(name: str, limit: int, fetch: Callable[[], pa.LargeBinaryArray]) -> pa.LargeBinaryArray:
    """The encoded images of the block with this name: from the disk, or from `fetch`, which may take a while.

    Blocks may take `limit` bytes on the disk together. If that is 0, or nothing can be written there, a block is in
    memory. Raises what `fetch` raises.
    """
    key = xxh3_128_hexdigest(name.encode())
    with _guards[_number(key)]:  # one thread fetches for all
        found = _mapped.pop(name, None)
        if found is None:
            found = _found(key, limit, fetch) if limit else fetch()
        _mapped[name] = found  # the last one now
    with suppress(StopIteration, RuntimeError):  # other threads do the same
        while len(_mapped) > _OPEN:
            _mapped.pop(next(iter(_mapped)), None)
    return found


def _found(key: str, limit: int, fetch: Callable[[], pa.LargeBinaryArray]) -> pa.LargeBinaryArray:
    if (found := _read(key)) is not None:
        return found
    try:
        with _lock(key):
            if (found := _read(key)) is None:  # no other process was faster
                fetched = fetch()
                with suppress(OSError):  # the disk is full, or read-only
                    _write(key, fetched, limit)
                    found = _read(key, verify=False)
                found = fetched if found is None else found
            return found
    except _NoDisk:
        return fetch()


class _NoDisk(Exception):  # noqa: N818
    """Nothing can be locked there."""


def _read(key: str, *, verify: bool = True) -> pa.LargeBinaryArray | None:
    """A block, mapped into memory; None if it is not there, or is not what was written."""
    for suffix in (_KEPT, _PASSING):
        file = root() / (key + suffix)
        try:
            with pa.memory_map(str(file)) as mapped:
                reader = pa.ipc.open_file(mapped)
                found = reader.get_batch(0).column(0)
                intact = not verify or (reader.schema.metadata or {}).get(_SUM) == _checksum(found)
        except FileNotFoundError:
            continue
        except (OSError, pa.ArrowInvalid):
            intact = False
        if intact:
            with suppress(OSError):  # of another user, or read-only
                os.utime(file)
            return found
        with suppress(OSError):
            file.unlink()
    return None


def _checksum(block: pa.LargeBinaryArray) -> bytes:
    _, offsets, data = block.buffers()
    return (xxh3_64_hexdigest(memoryview(offsets or b"")) + xxh3_64_hexdigest(memoryview(data or b""))).encode()


def _write(key: str, block: pa.LargeBinaryArray, limit: int) -> None:
    if _allowed.limit != limit or _allowed.left < block.nbytes:
        _make_room(block.nbytes, limit)
    schema = pa.schema([("image", block.type)], {_SUM: _checksum(block)})
    with _renamed(root() / (key + _allowed.suffix)) as file:
        with pa.ipc.new_file(str(file), schema) as writer:
            writer.write_batch(pa.record_batch([block], schema=schema))
        _allowed.left -= file.stat().st_size


@dataclass
class _Allowed:
    """What this process may write before it lists all blocks again: to do so for each takes longer and longer."""

    limit: int = -1
    left: int = 0  # bytes
    suffix: str = _KEPT


_allowed = _Allowed()
_SHARE = 32  # of the free room is allowed at once: other processes write, too


def _make_room(size: int, limit: int) -> None:
    """Allow to write at least `size` bytes, and remove what exceeds the `limit` with them."""
    files = _files()
    kept = [(file, status) for file, status in files if file.suffix == _KEPT]
    taken, room = sum(status.st_size for _, status in kept), int(_FOR_KEPT * limit)
    for file, status in kept:
        if taken + size <= room or time.time() - status.st_mtime < _UNUSED_S:
            break
        file.unlink(missing_ok=True)
        taken -= status.st_size
    _remove_unfinished(_UNUSED_S)
    _allowed.limit, _allowed.suffix = limit, _KEPT
    if taken + size <= room:
        _allowed.left = max(size, (room - taken) // _SHARE)
        return
    passing = [(file, status) for file, status in files if file.suffix == _PASSING]
    _allowed.suffix, _allowed.left = _PASSING, max(size, (limit - taken) // _SHARE)
    excess = sum(status.st_size for _, status in passing) + _allowed.left + taken - limit
    for file, status in passing:
        if excess <= 0:
            break
        file.unlink(missing_ok=True)
        excess -= status.st_size


@contextmanager
def _renamed(file: Path) -> Iterator[Path]:
    """As `atomic.new_file`, but nothing is synced: what a power cut leaves does not match its checksum."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield unfinished
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_unfinished(seconds: float) -> None:
    """Remove what killed processes were writing, if it is that old."""
    for file in root().glob(".*"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > seconds:
                file.unlink()


def _files() -> list[tuple[Path, os.stat_result]]:
    """All blocks, those first that were opened longest ago."""
    found = []
    for file in root().glob("*.*"):
        with suppress(OSError):  # removed just now
            if file.suffix in (_KEPT, _PASSING, _INDEX):
                found.append((file, file.stat()))
    return sorted(found, key=lambda each: each[1].st_mtime)


@contextmanager
def _lock(key: str) -> Iterator[None]:
    """Let one process fetch a block; others wait for it."""
    try:
        import fcntl

        root().mkdir(parents=True, exist_ok=True)
        handle = os.open(root() / f"lock-{_number(key):03}", os.O_CREAT | os.O_RDWR, 0o666)
    except (ImportError, OSError) as error:
        raise _NoDisk from error
    try:
        with suppress(OSError):  # some network disks cannot lock
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process that was forked meanwhile has it open, too
        os.close(handle)


def index(name: str, make: Callable[[], pa.Table]) -> pa.Table:
    """The table with this name: from the disk, or from `make`, which may take a while. Raises what `make` raises."""
    file = root() / (xxh3_128_hexdigest(name.encode()) + _INDEX)
    with suppress(OSError):
        raw = file.read_bytes()
        if xxh3_64_hexdigest(raw[_DIGITS:]).encode() == raw[:_DIGITS]:
            return pa.ipc.open_stream(raw[_DIGITS:]).read_all()
    table = make()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    raw = sink.getvalue().to_pybytes()
    with suppress(OSError):  # the disk is full, or read-only
        root().mkdir(parents=True, exist_ok=True)
        with _renamed(file) as unfinished:
            unfinished.write_bytes(xxh3_64_hexdigest(raw).encode() + raw)
    return table


_DIGITS = 16  # of the checksum before a table


def kept() -> Kept:
    """What is on this disk."""
    found = [each for each in _files() if each[0].suffix != _INDEX]
    return Kept(
        len(found), sum(each.st_size for _, each in found), max((each.st_mtime for _, each in found), default=0.0)
    )


def clear() -> int:
    """Remove all blocks; returns the number of bytes freed."""
    freed = 0
    _remove_unfinished(0)
    for file, status in _files():
        with suppress(OSError):
            file.unlink()
            freed += status.st_size
    _mapped.clear()
    return freed
