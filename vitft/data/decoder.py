"""THE decoder: bytes, a file or a Pillow image -> uint8 RGB (H, W, 3).

Training, evaluation, prediction and export all decode images here, so the differences between Pillow's modes and
formats are handled in one place.
"""

import errno
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from vitft.config.train import TrainConfig
from vitft.data.color import STRIP as _STRIP
from vitft.data.color import Range, RangeError, converter, has_gray_range, loses_low_bits, own_range, samples, strips
from vitft.data.limits import check_bytes, check_scans, is_jxl, jxl_size
from vitft.data.streaming.remote import reason
from vitft.data.streaming.shards import is_address, read_image
from vitft.errors import DataError
from vitft.hardware.pools import map_in_threads

MAX_PIXELS: int = TrainConfig.model_fields["max_pixels"].default

# Not decoded: documents and videos, which Pillow opens with other programs or not at all; containers whose header does
# not give the size of the image inside; and FITS, because Pillow ignores BZERO and BSCALE and misreads 16-bit values.
_NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"} | {"BLP", "ICNS", "ICO", "IPTC"} | {"FITS"}

# Cost of a pixel relative to an ordinary JPEG or PNG: by the decoder's memory (8 bytes per pixel for those;
# docs/reliability.md has all), or by time for Pillow's decoders in pure Python: over a second per million pixels.
_WEIGHT = {"progressive JPEG": 1.1, "AVIF": 1.5, "WEBP": 2.0, "JPEG2000": 2.5, "JXL": 2.5}
_PURE_PYTHON = 50.0

_COMMON = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # tried first: a failed attempt costs as much as a tiny image


class BadImage(DataError):  # noqa: N818  (reads better without Error)
    """An image that cannot be decoded. The message says why; callers that know the image's name put it in front."""


class Unavailable(BadImage):
    """An image that may be intact, though it cannot be read now: a disk or a server failed, or memory ran out."""


# Of an OSError: what does not pass by itself.
_LASTING = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)


def encoded(cell: dict[str, Any]) -> bytes | Path:
    """The encoded image of a dataset row, {"bytes", "path"}: its bytes, or its file; of a shard, fetched now.

    Raises Unavailable if it cannot be fetched.
    """
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    if not is_address(cell["path"]):
        return Path(cell["path"])
    try:
        return read_image(cell["path"])
    except OSError as error:
        raise Unavailable(f"cannot be fetched: {reason(error)}") from error
    except ValueError as error:
        raise Unavailable("its shard is corrupt, or has changed") from error


def are_tiny(cells: Sequence[dict[str, Any]]) -> bool:
    """Whether decoding these encoded images, {"bytes", "path"} each, is mostly Python code, which holds the GIL."""
    with suppress(OSError, BadImage):
        files = map(encoded, cells)
        sizes = [file.stat().st_size if isinstance(file, Path) else len(file) for file in files]
        return sum(sizes) < _TINY * len(cells)
    return False


def choose_map(cells: Sequence[dict[str, Any]]) -> Callable[..., Iterator[Any]]:
    """The `map` to use for work on encoded images: the thread pool's, or Python's for tiny images in memory."""
    return map if all(cell["bytes"] is not None for cell in cells) and are_tiny(cells) else map_in_threads


_TINY = 3000  # mean bytes at which threads begin to help, measured with JPEGs of 96 and PNGs of 48 pixels


def decode(
    source: bytes | Path | Image.Image,
    max_pixels: int = MAX_PIXELS,
    min_side: int | None = None,
    value_range: Range | None = None,
) -> NDArray[np.uint8]:
    """Decode an image into upright sRGB: uint8 (H, W, 3), C-contiguous, writable.

    Transparent pixels are composited over white, ICC profiles and the EXIF orientation are applied, and an animation
    yields its first frame. Samples of more than 8 bits are scaled to 8 by the range of the file's format and tags, or
    by `value_range`, (black, white), and never by the image's own values: see `vitft.data.color`. An opaque 8-bit image
    without a profile other than sRGB is decoded exactly as by Pillow's `convert("RGB")`.

    With `min_side`, for training only, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its shorter side still has
    that many pixels: several times as fast.

    Raises BadImage, and nothing else, for an image that is not completely readable, whose value range is unknown, or
    that would take more memory or time than `max_pixels` pixels (checked before any pixel is decoded).
    """
    with _as_bad_image(max_pixels):  # broken data makes Pillow raise almost anything, MemoryError included
        return _apply_orientation(*_read(source, max_pixels, min_side, value_range))


def header(source: bytes | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int, str]:
    """Width and height in pixels, as stored (before EXIF rotation), and format. Decodes no pixels. Raises BadImage."""
    with _as_bad_image(max_pixels), _open(source, max_pixels) as image:
        return *image.size, str(image.format)


class ImageInfo(NamedTuple):
    """Properties of an image that are known before it is decoded; orientation is EXIF's, 1 for upright."""

    format: str
    mode: str
    orientation: int
    is_deep: bool  # samples of more than 8 bits, or signed ones: decoding keeps less of them


def image_info(source: bytes | Path, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """What is known of an image. Raises BadImage, also for too many pixels: some EXIF data follows the pixels."""
    with _as_bad_image(max_pixels), _open(source, max_pixels) as image:
        _check_size(image, max_pixels)
        is_deep = has_gray_range(image) or loses_low_bits(image)
        return ImageInfo(str(image.format), image.mode, _orientation(image), is_deep)


def unused_range(sources: Iterable[bytes | Path], max_pixels: int = MAX_PIXELS) -> str | None:
    """A warning if 16-bit images use so little of their range that they become nearly black; else None.

    A PNG does not say that its 16 bits hold 12; only many images show it. The warning changes none of them. A TIFF that
    says so is decoded by what it says.
    """
    brightest = 0
    for source in sources:
        with suppress(Exception), _open(source, max_pixels) as image:  # `decode` reports what is wrong with it
            if not image.mode.startswith("I;16") or own_range(image) != (0, 65_535):
                return None
            _check_size(image, max_pixels)
            brightest = max(brightest, *(int(samples(strip, image).max()) for _, strip in strips(image)))
    if not 0 < brightest < 65_536 // 4:
        return None
    bits = brightest.bit_length()
    return (
        f"16-bit images that reach {brightest:,} of 65,535 become nearly black; if they hold {bits} bits, "
        f"add --value-range 0:{2**bits - 1}"
    )


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the supported formats, in the order in which they are tried."""
    Image.init()
    _register_plugins()
    return tuple(name for name in dict.fromkeys((*_COMMON, *Image.ID)) if name in Image.OPEN and name not in _NO_PIXELS)


@cache
def suffixes() -> frozenset[str]:
    """Lower-case suffixes of image files, with the dot."""
    supported = formats()  # first: this registers the suffixes of plugins
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in supported)


def _register_plugins() -> None:
    """Let Pillow read HEIC and JPEG XL, if vitft[heic] is installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener(thumbnails=False)
    with suppress(ImportError):
        from pillow_jxl import JpegXLImagePlugin

        JpegXLImagePlugin.DECODE_THREADS = 0  # our own threads each decode an image


def _open(source: bytes | Path, max_pixels: int) -> Image.Image:
    # Pillow refuses images of more than twice its own limit. That limit is only ever raised, so that threads decoding
    # at the same time do not disturb one another.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    if not isinstance(source, Path):
        return _open_stream(BytesIO(source), len(source), max_pixels, None)
    if not source.is_file():  # a pipe would block, a folder has no pixels
        raise BadImage("is not a file" if source.exists() else "does not exist")
    with source.open("rb") as stream:
        return _open_stream(stream, source.stat().st_size, max_pixels, source)


def _open_stream(stream: BinaryIO, size: int, max_pixels: int, file: Path | None) -> Image.Image:
    if size == 0:
        raise BadImage("is empty (zero bytes)")
    if too_large := check_bytes(stream, size, max_pixels):
        raise BadImage(too_large)
    stream.seek(0)
    head = stream.read(32)
    stream.seek(0)
    if is_jxl(head) and "JXL" in formats():
        width, height = jxl_size(stream) or (0, 0)
        _check_pixels(width, height, "JXL", _WEIGHT["JXL"], max_pixels)
        stream.seek(0)
    try:
        return Image.open(file or stream, formats=formats())
    except UnidentifiedImageError:
        name = format_of_plugin(head)
        if name and {"HEIC": "HEIF", "JPEG XL": "JXL"}[name] not in formats():
            raise BadImage(f"is {name}; to read it: pip install 'vitft[heic]'") from None
        raise


def format_of_plugin(head: bytes) -> str:
    """`HEIC` or `JPEG XL`, which Pillow reads with plugins, from a file's first 32 bytes; empty for all others."""
    if is_jxl(head):
        return "JPEG XL"
    return "HEIC" if head[4:8] == b"ftyp" and re.search(b"hei[cxms]|hev[cmxs]|mif1|msf1", head[8:32]) else ""


def _read(
    source: bytes | Path | Image.Image, max_pixels: int, min_side: int | None, value_range: Range | None
) -> tuple[NDArray[np.uint8], int]:
    """RGB as stored, and the EXIF orientation. Pillow's copy of the pixels is freed on return."""
    if not isinstance(source, Image.Image):
        with _open(source, max_pixels) as image:
            return _read(image, max_pixels, min_side, value_range)
    image = source
    _check_size(image, max_pixels)
    if value_range is not None and loses_low_bits(image):
        raise BadImage("has 16 bits per color, of which Pillow reads the upper 8; save it as gray, or with 8 bits")
    if min_side is not None and image.format == "JPEG":
        image.draft(None, (min_side, min_side))
    image.load()
    width, height = image.size
    convert = converter(image, value_range)
    if width * height <= _STRIP:
        return convert(image), _orientation(image)
    pixels = np.empty((height, width, 3), np.uint8)
    for top, strip in strips(image):
        pixels[top : top + strip.height] = convert(strip)
    return pixels, _orientation(image)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    kind = "progressive JPEG" if image.info.get("progressive") else str(image.format)
    tiles = getattr(image, "tile", None)
    weight = _PURE_PYTHON if tiles and tiles[0][0] in Image.DECODERS else _WEIGHT.get(kind, 1.0)
    _check_pixels(*image.size, kind, weight, max_pixels)
    if too_many := check_scans(image, max_pixels):
        raise BadImage(too_many)


def _check_pixels(width: int, height: int, kind: str, weight: float, max_pixels: int) -> None:
    if width * height * weight > max_pixels:
        each = f", and a pixel of {kind} counts as {weight:g}" if weight > 1 else ""
        raise BadImage(f"{_too_many(width * height, max_pixels)} ({width} x {height}{each})")
    if width * height == 0:
        raise BadImage(f"has no pixels ({width} x {height})")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none, or if the EXIF block is damaged (the pixels may not be)."""
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # its decoder has rotated it, and its EXIF orientation is to be ignored (ISO/IEC 18181-2)
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def _apply_orientation(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """What ImageOps.exif_transpose does, for arrays and without rewriting the EXIF block."""
    if orientation in (3, 4, 7, 6):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels)


_PILLOW = r"PIL(\.|$)"


@contextmanager
def _as_bad_image(max_pixels: int) -> Iterator[None]:
    """Turn any exception into a BadImage, and ignore Pillow's warnings: those that matter come with an exception.

    `warnings.catch_warnings` would not be safe here, because several threads decode.
    """
    if not any(getattr(entry[3], "pattern", None) == _PILLOW for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW)
    try:
        yield
    except BadImage:
        raise
    except Exception as error:
        passing = isinstance(error, OSError) and error.errno is not None and error.errno not in _LASTING
        kind = Unavailable if passing or isinstance(error, MemoryError) else BadImage
        raise kind(_reason(error, max_pixels)) from error


def _reason(error: Exception, max_pixels: int) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        count = re.search(r"\d+", text)
        return _too_many(int(count[0]), max_pixels) if count else text
    if isinstance(error, RangeError):
        return f"{text} --value-range BLACK:WHITE"
    if isinstance(error, UnidentifiedImageError):
        return "is not an image in a supported format"
    if isinstance(error, MemoryError):
        return "does not fit in memory"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"is {'truncated' if 'truncated' in text.lower() else 'damaged'}: {text}"


def _too_many(pixels: int, max_pixels: int) -> str:
    count = f"{pixels / 1e6:,.1f} million" if pixels >= 1e6 else f"{pixels:,}"
    return f"has {count} pixels, over --max-pixels {max_pixels:,}"
