"""Files behind URLs (https://, s3://, gs://, hf://, ...): list them, and read parts of them, through fsspec."""

import errno
import io
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import fsspec

from vitft.errors import DataError, UsageError
from vitft.io.console import without_secrets

A = TypeVar("A")
B = TypeVar("B")

SUMS = "SHA256SUMS"
"""A list of files with this name, as `vitft data pack` writes it, tells what a web server has."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_ATTEMPTS, _FIRST_ATTEMPTS = 7, 3
_WAIT_S = 0.5  # after the first attempt, then twice as long each time: half a minute in all
_GIVE_UP_S = 120.0  # after which no attempt begins: each may take half a minute of silence
_CONNECT_S, _SILENCE_S = 10, 30
_REQUESTS = 16  # at a time
_VERSIONS = ("ETag", "etag", "generation", "blob_id", "oid", "mtime", "LastModified")  # of filesystems' `info`


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL: its bytes, and what changes when its content does (empty if the server does not say)."""

    url: str
    size: int
    version: str


class Seekable(io.RawIOBase):
    """A file of this length for libraries that seek in it; its `read` begins at `place`, and moves it on."""

    def __init__(self, length: int) -> None:
        self.length, self.place = length, 0

    def wanted(self, count: int) -> int:
        """How many bytes a `read` of `count` is to return: -1 asks for all, and the file may end before."""
        left = self.length - self.place
        return left if count < 0 else min(count, left)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As in `io.IOBase`, like those that follow."""
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        return self.place

    def tell(self) -> int:
        """The place."""
        return self.place

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True


def in_requests(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`map` for work that waits for a server, several at a time."""
    # Daemon threads, and not a pool of concurrent.futures: after an error, or Ctrl-C, nobody waits for the others.
    waiting: SimpleQueue[tuple[Future[B], A] | None] = SimpleQueue()

    def serve() -> None:
        while (job := waiting.get()) is not None:
            future, item = job
            try:
                future.set_result(work(item))
            except BaseException as error:
                future.set_exception(error)

    jobs = [(Future[B](), item) for item in items]
    for job in jobs:
        waiting.put(job)
    threads = [Thread(target=serve, name="vitft-request", daemon=True) for _ in range(min(_REQUESTS, len(jobs)))]
    try:
        for thread in threads:
            waiting.put(None)
            thread.start()
        for future, _ in jobs:
            yield future.result()
    finally:
        with suppress(Empty):
            while True:  # what has not begun is not needed
                waiting.get_nowait()
        for _ in threads:
            waiting.put(None)


def list_files(url: str, suffixes: str | tuple[str, ...]) -> list[RemoteFile]:
    """The files with one of these suffixes that a URL stands for, at any depth, sorted.

    The URL is of a file, a folder, or of several files: `train-*.parquet`, `train-{00000..00012}.parquet`. Raises
    DataError if there are none, or if the server does not answer, UsageError if a package is missing.
    """
    kind = re.split(r"[+:]", url, maxsplit=1)[0].lower()
    try:
        filesystem, _ = _opened(url)
    except ValueError as error:
        raise UsageError(f"{without_secrets(url)}: {kind}:// is not supported; download the files first.") from error
    except ImportError as error:
        remedy = f"pip install 'vitft[{_EXTRAS[kind]}]'" if kind in _EXTRAS else f"{error}"
        raise UsageError(f"{without_secrets(url)}: reading {kind}:// needs another package: {remedy}") from error
    try:
        listed = lambda: sorted(_listed(filesystem, url, suffixes), key=lambda file: file.url)  # noqa: E731
        return _retried(listed, url, _FIRST_ATTEMPTS)  # it may have been mistyped
    except OSError as error:
        raise DataError(f"{without_secrets(url)}: {reason(error)}.") from error


def _listed(filesystem: Any, url: str, suffixes: str | tuple[str, ...]) -> Iterator[RemoteFile]:
    scheme = url.split("://")[0]
    web = scheme in ("http", "https")
    if "{" in url:
        yield from in_requests(_described, _expanded(url))
    elif url.split("?")[0].endswith(suffixes) and "*" not in url:
        yield _described(url)
    elif web and (named := _named(filesystem, url, suffixes)):
        yield from in_requests(_described, named)
    else:
        path = _opened(url)[1]
        found = filesystem.glob(path, detail=True) if "*" in url else filesystem.find(path, detail=True)
        names = [name for name in found if str(name).endswith(suffixes)]
        if not names and "*" not in url and not filesystem.exists(path):
            raise FileNotFoundError(errno.ENOENT, "there is nothing", url)
        if web:  # an index page does not tell sizes
            yield from in_requests(_described, names)
        else:
            yield from (_file(filesystem.unstrip_protocol(name), found[name]) for name in names)


def _named(filesystem: Any, url: str, suffixes: str | tuple[str, ...]) -> list[str]:
    """The URLs of the files that a list in a folder names."""
    folder = url.rstrip("/")
    try:
        text = filesystem.cat_file(f"{folder}/{SUMS}").decode()
    except (FileNotFoundError, UnicodeDecodeError):
        return []
    names = [line.split(maxsplit=1)[1].lstrip("*") for line in text.splitlines() if len(line.split(maxsplit=1)) == 2]
    return [f"{folder}/{name}" for name in names if name.endswith(suffixes) and ".." not in name]


def _expanded(url: str) -> list[str]:
    """The URLs that {00000..00012} or {a,b} stands for."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*))\}", url)
    if match is None:
        return [url]
    first, last, words = match.groups()
    parts = words.split(",") if first is None else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    return [more for part in parts for more in _expanded(url[: match.start()] + part + url[match.end() :])]


def _described(url: str) -> RemoteFile:
    filesystem, path = _opened(url)
    return _file(url, filesystem.info(path))


def _file(url: str, info: dict[str, Any]) -> RemoteFile:
    if info.get("size") is None:
        raise OSError(errno.EINVAL, "the server does not say how large it is", url)
    return RemoteFile(url, int(info["size"]), next((str(info[key]) for key in _VERSIONS if info.get(key)), ""))


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a file. What fails is tried again for half a minute. Raises OSError."""

    def read() -> bytes:
        filesystem, path = _opened(url)
        data = bytes(filesystem.cat_file(path, start=start, end=end, **_unbuffered(filesystem)))
        if len(data) > end - start:
            raise NotImplementedError("the server sends whole files when it is asked for a part")
        if len(data) < end - start:
            raise OSError(errno.EIO, f"{len(data):,} of {end - start:,} bytes came", url)
        return data

    return _retried(read, url, _ATTEMPTS)


def _unbuffered(filesystem: Any) -> dict[str, str]:
    """What keeps filesystems that read through a file, such as the hub's, from reading ahead."""
    own = type(filesystem).cat_file is not fsspec.AbstractFileSystem.cat_file or filesystem.async_impl
    return {} if own else {"cache_type": "none"}


def _opened(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, which fsspec keeps for each process, and the path in it."""
    scheme = url.split("://")[0]
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
        options["client_kwargs"] = {"timeout": timeout}
    elif scheme in ("s3", "s3a"):
        options["config_kwargs"] = {"connect_timeout": _CONNECT_S, "read_timeout": _SILENCE_S}
        options["config_kwargs"]["retries"] = {"total_max_attempts": 1}  # `_retried` does that
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    if hasattr(filesystem, "retries"):
        filesystem.retries = 1  # of s3fs, likewise
    _used[id(filesystem)] = filesystem
    return filesystem, str(path)


# A forked process must not clean up what its parent uses: closing an inherited connection makes the parent deaf to it.
_used: dict[int, Any] = {}


def _retried(work: Callable[[], B], url: str, attempts: int) -> B:
    """The result of work that may fail for a moment. Raises OSError with the last failure."""
    began = time.monotonic()
    for attempt in range(attempts):
        try:
            return work()
        except Exception as error:  # aiohttp, botocore, huggingface_hub and fsspec each raise their own
            late = time.monotonic() - began > _GIVE_UP_S
            if not _is_final(error) and not late and attempt + 1 < attempts:
                time.sleep(_WAIT_S * 2**attempt * random.uniform(0.75, 1.25))
                continue
            raise OSError(errno.EIO, reason(error), without_secrets(url)) from error
    raise AssertionError("unreachable")


_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")  # of botocore, which may be missing


def _is_final(error: Exception) -> bool:
    """Whether to try again would not help."""
    final = isinstance(error, FileNotFoundError | PermissionError | NotImplementedError)
    return final or type(error).__name__ in _NO_CREDENTIALS


def reason(error: BaseException) -> str:
    """Why a request failed, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file or folder"
    if isinstance(error, PermissionError):
        return "access is denied; are the credentials set?"
    if type(error).__name__ in _NO_CREDENTIALS:
        return "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true"
    if isinstance(error, TimeoutError) and not error.strerror:  # aiohttp's, of which fsspec keeps nothing
        return "the server is silent"
    text = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
    return without_secrets(str(text))[:200]
