"""The images in a request, which are read as they arrive, up to a limit, and never by name from a disk."""

import asyncio
import base64
import binascii
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from vitft.errors import first_line
from vitft.io.console import counted

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every form that is refused

MEGABYTE = 1_000_000
FILES = 'files of multipart/form-data, an image as the body, or JSON as {"images": ["<base64>", ...]}'
_MARKS = 10  # brackets and commas of JSON, for each image: millions of them would be gigabytes of Python objects


@dataclass(frozen=True)
class Limits:
    """What a request may bring: bytes, images, pixels of an image, and seconds to arrive in."""

    upload_bytes: int = 32 * MEGABYTE
    files: int = 32
    arrival_s: float = 60.0


class Upload(NamedTuple):
    """An encoded image, and what its sender calls it, which is never more than text."""

    name: str
    data: bytes


class Room:
    """Memory for requests that are being read: those that find none wait for others to be done."""

    def __init__(self, size: int, wait_s: float) -> None:
        self._left, self._wait_s = size, wait_s
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        """Room for so many bytes, while entered. Raises HTTPException."""
        try:
            async with asyncio.timeout(self._wait_s), self._freed:
                await self._freed.wait_for(lambda: self._left >= size)
                self._left -= size
        except TimeoutError as error:
            raise HTTPException(503, "too many uploads at once.", {"Retry-After": "5"}) from error
        try:
            yield
        finally:
            async with self._freed:
                self._left += size
                self._freed.notify_all()


def announced(request: Request, limits: Limits) -> int:
    """The bytes of a request's body, or the most that may come if it does not say. Raises HTTPException."""
    length = request.headers.get("content-length", "")
    size = int(length) if length.isdecimal() and len(length) < 20 else limits.upload_bytes
    if size > limits.upload_bytes:
        raise _too_large(limits)
    return size


async def uploads(request: Request, limits: Limits) -> list[Upload]:
    """The images of a request. Raises HTTPException for what cannot be taken."""
    kind = parse_options_header(request.headers.get("content-type"))[0].decode("latin-1")
    try:
        async with asyncio.timeout(limits.arrival_s):
            if kind == "multipart/form-data":
                found = await _of_form(request, limits)
            elif kind == "application/json":
                found = await asyncio.to_thread(_of_json, await _body(request, limits), limits)
            elif kind.startswith("image/") or kind == "application/octet-stream":
                found = [Upload("image 0", await _body(request, limits))]
            else:
                raise HTTPException(415, f"Content-Type {kind or 'is missing'}: send {FILES}.")
    except TimeoutError as error:
        raise HTTPException(408, f"the upload took over {limits.arrival_s:g} s; send fewer images.") from error
    if not found:
        raise HTTPException(400, f"no image in the request; send {FILES}.")
    if len(found) > limits.files:
        raise _too_many(limits)
    return found


async def _body(request: Request, limits: Limits) -> bytes:
    return b"".join([chunk async for chunk in _limited(request, limits)])


async def _limited(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    """The body as it arrives. Raises HTTPException at the first byte over the limit."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.upload_bytes:
            raise _too_large(limits)
        yield chunk


class _InMemory(MultiPartParser):
    """Starlette's parser, but nothing goes to a temporary file."""

    spool_max_size = 0  # never: 0 means that there is no limit to what is kept in memory


async def _of_form(request: Request, limits: Limits) -> list[Upload]:
    parser = _InMemory(
        request.headers, _limited(request, limits), max_files=limits.files, max_fields=limits.files, max_part_size=1000
    )
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError) as error:
        why = error.message if isinstance(error, MultiPartException) else str(error)
        if why.startswith("Too many files"):
            raise _too_many(limits) from error
        raise HTTPException(400, f"the form cannot be read: {why.rstrip('.')}; send {FILES}.") from error
    found: list[Upload] = []
    for name, value in form.multi_items():
        if not isinstance(value, UploadFile):
            raise HTTPException(400, f"{name!r} is text, not a file; with curl: -F {name}=@photo.jpg")
        found.append(Upload(value.filename or f"image {len(found)}", await value.read()))
    await form.close()
    return found


def _of_json(body: bytes, limits: Limits) -> list[Upload]:
    try:
        if sum(map(body.count, (b",", b"[", b"{"))) > _MARKS * (limits.files + 1):
            raise ValueError("too many values")
        document: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not valid JSON: {first_line(error)}.") from error
    images = document.get("images") if isinstance(document, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise HTTPException(400, 'the JSON has to be {"images": ["<base64>", ...]}.')
    return [Upload(f"image {number}", _decoded(number, image)) for number, image in enumerate(images)]


def _decoded(number: int, text: str) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise HTTPException(400, f"image {number} is not valid base64 (paths and URLs are not opened).") from error


def _too_large(limits: Limits) -> HTTPException:
    return HTTPException(413, f"the request is over {limits.upload_bytes / MEGABYTE:g} MB (--max-upload-mb).")


def _too_many(limits: Limits) -> HTTPException:
    return HTTPException(413, f"the request has over {counted(limits.files, 'image')} (--max-files); send several.")
