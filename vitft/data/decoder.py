"""THE decoder: bytes, a file or a Pillow image -> uint8 RGB (H, W, 3).

Training, evaluation, prediction and export all see an image as this file makes it, so what Pillow
does differently from mode to mode is settled here, once.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from vitft.config.train import TrainConfig
from vitft.data.color import STRIP as _STRIP
from vitft.data.color import Range, RangeError, converter, is_cut, samples, strips
from vitft.data.limits import check_bytes, check_scans, is_jxl, jxl_size
from vitft.errors import DataError

Array = NDArray[Any]

MAX_PIXELS: int = TrainConfig.model_fields["max_pixels"].default

# Documents and films that Pillow opens only by way of other programs, or not at all; containers of an image in
# another format, whose size their own header does not tell; and FITS, whose BZERO and BSCALE Pillow leaves out, so
# that its 16-bit values come out as others.
_NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"} | {"BLP", "ICNS", "ICO", "IPTC"} | {"FITS"}

# How many pixels of an ordinary JPEG or PNG a pixel counts as: by the memory of its decoder (8 bytes a pixel
# for those; docs/reliability.md has all), or by its time, where Pillow has a decoder written in Python: over a
# second for a million pixels.
_WEIGHT = {"progressive JPEG": 1.1, "AVIF": 1.5, "WEBP": 2.0, "JPEG2000": 2.5, "JXL": 2.5}
_BY_PYTHON = 50.0

_COMMON = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # a format that is tried in vain takes as long as a tiny image


class BadImage(DataError):  # noqa: N818  (it reads as what it is)
    """No readable image; the text says what is wrong with it. Who knows its name puts it in front."""


def encoded(cell: dict[str, Any]) -> bytes | Path:
    """The encoded image of a row of a data set, {"bytes", "path"}: its bytes, or its file."""
    return Path(cell["path"]) if cell["bytes"] is None else cell["bytes"]


def decode(
    source: bytes | Path | Image.Image,
    max_pixels: int = MAX_PIXELS,
    enough: int | None = None,
    value_range: Range | None = None,
) -> NDArray[np.uint8]:
    """Turn an encoded image into upright sRGB: uint8, (H, W, 3), C-contiguous, writable.

    Transparent parts are laid over white, an ICC profile is applied, of an animation the first frame counts, and
    the EXIF orientation is applied. Samples of more than 8 bits become 8 by the range of the file's format and tags,
    or by `value_range`, its black and white (`vitft.data.color` has the rules), and never by the image's own values.
    An opaque 8-bit image without a profile other than sRGB's comes out exactly as Pillow's `convert("RGB")`.

    With `enough`, for training alone, a JPEG is decoded at a half, a quarter or an eighth where its shorter side
    still has that many pixels: several times as fast.

    Raises BadImage, and nothing else, for anything that is not wholly readable, whose range is not known, or that
    would take more memory or time than an image of `max_pixels` pixels (checked before any pixel is decoded).
    """
    _silence_pillow()
    try:
        if isinstance(source, Image.Image):
            return _upright(*_pixels(source, max_pixels, enough, value_range))
        # The file's own copy of the pixels is gone by the time they are turned.
        return _upright(*_read(source, max_pixels, enough, value_range))
    except Exception as error:  # broken data makes Pillow raise almost anything, MemoryError included
        raise _bad(error, max_pixels) from error


def header(source: bytes | Path) -> tuple[int, int, str]:
    """Width and height in pixels, as stored (before any EXIF rotation), and format; decodes no pixel.

    Raises BadImage.
    """
    _silence_pillow()
    try:
        with _open(source, MAX_PIXELS) as image:
            return *image.size, str(image.format)
    except Exception as error:
        raise _bad(error, MAX_PIXELS) from error


class ImageInfo(NamedTuple):
    """What a file says of its image before a pixel is decoded; orientation is EXIF's, 1 for upright."""

    format: str
    mode: str
    orientation: int


def image_info(source: bytes | Path, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Format, mode and orientation. Raises BadImage, for one of too many pixels too: some EXIF follows the pixels."""
    _silence_pillow()
    try:
        with _open(source, max_pixels) as image:
            _check_size(image, max_pixels)
            return ImageInfo(str(image.format), image.mode, _orientation(image))
    except Exception as error:
        raise _bad(error, max_pixels) from error


def unused_range(sources: Iterable[bytes | Path], max_pixels: int = MAX_PIXELS) -> str | None:
    """What to say where images of 16 bits use so little of them that they become nearly black; None if they do not.

    A PNG does not say that its 16 bits hold 12. That is told by many images, and said, and changes none of them.
    """
    brightest = 0
    for source in sources:
        with suppress(Exception), _open(source, max_pixels) as image:  # what is wrong with it, `decode` says
            if not image.mode.startswith("I;16"):
                return None
            _check_size(image, max_pixels)
            brightest = max(brightest, *(int(samples(part, image).max()) for _, part in strips(image)))
    if not 0 < brightest < 65_536 // 4:
        return None
    white = 2 ** brightest.bit_length() - 1
    return (
        f"16-bit images that reach {brightest:,} of 65,535 become nearly black; if they hold "
        f"{brightest.bit_length()} bits, add --value-range 0:{white}"
    )


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, in the order in which they are tried."""
    Image.init()
    _register_plugins()
    return tuple(name for name in dict.fromkeys((*_COMMON, *Image.ID)) if name in Image.OPEN and name not in _NO_PIXELS)


@cache
def suffixes() -> frozenset[str]:
    """Lower-case suffixes, dot included, of files that are taken for images."""
    read = formats()  # first: it registers the suffixes of plugins
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in read)


def _register_plugins() -> None:
    """Let Pillow read HEIC and JPEG XL, where vitft[heic] is installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener(thumbnails=False)
    with suppress(ImportError):
        from pillow_jxl import JpegXLImagePlugin

        JpegXLImagePlugin.DECODE_THREADS = 0  # each of our own threads decodes an image


def _open(source: bytes | Path, max_pixels: int) -> Image.Image:
    # Pillow refuses over twice its own limit. Who asks for more than that gets it: the limit is only
    # ever raised, so threads that decode at the same time cannot disturb one another.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    if not isinstance(source, Path):
        return _opened(BytesIO(source), len(source), max_pixels, None)
    if not source.is_file():  # a pipe would block, a folder has no pixels
        raise BadImage("is not a file" if source.exists() else "does not exist")
    with source.open("rb") as stream:
        return _opened(stream, source.stat().st_size, max_pixels, source)


def _opened(stream: BinaryIO, size: int, max_pixels: int, file: Path | None) -> Image.Image:
    if size == 0:
        raise BadImage("is empty (zero bytes)")
    if too_large := check_bytes(stream, size, max_pixels):
        raise BadImage(too_large)
    head = stream.read(32)
    stream.seek(0)
    if is_jxl(head) and "JXL" in formats():
        width, height = jxl_size(stream) or (0, 0)
        _check_pixels(width, height, "JXL", _WEIGHT["JXL"], max_pixels)
    try:
        return Image.open(file or stream, formats=formats())
    except UnidentifiedImageError:
        kind = "JPEG XL" if is_jxl(head) else "HEIC" if head[4:8] == b"ftyp" and _HEIC.search(head) else None
        if kind and {"JPEG XL": "JXL", "HEIC": "HEIF"}[kind] not in formats():
            raise BadImage(f"is {kind}, which is read with: pip install 'vitft[heic]'") from None
        raise


_HEIC = re.compile(b"hei[cxms]|hev[cmx]|mif1")


def _read(
    source: bytes | Path, max_pixels: int, enough: int | None, value_range: Range | None
) -> tuple[NDArray[np.uint8], int]:
    with _open(source, max_pixels) as image:
        return _pixels(image, max_pixels, enough, value_range)


def _pixels(
    image: Image.Image, max_pixels: int, enough: int | None, value_range: Range | None
) -> tuple[NDArray[np.uint8], int]:
    """RGB as stored, and the orientation."""
    _check_size(image, max_pixels)
    if value_range is not None and is_cut(image):
        raise BadImage("has 16 bits a color, of which Pillow reads the upper 8; save it as gray, or as 8 bits")
    if enough is not None and image.format == "JPEG":
        image.draft(None, (enough, enough))
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
    weight = _BY_PYTHON if tiles and tiles[0][0] in Image.DECODERS else _WEIGHT.get(kind, 1.0)
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
    """EXIF orientation, 1 to 8; 1 when there is none or the EXIF block is damaged (the pixels are not)."""
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # its decoder has turned it; what its EXIF says is of no account (ISO/IEC 18181-2)
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    turn = _TURN.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


# What ImageOps.exif_transpose does, for every mode and without writing the EXIF block anew.
_TURN: dict[int, Callable[[Array], Array]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


def _silence_pillow() -> None:
    """Keep Pillow's warnings quiet: a failure becomes a BadImage, the rest helps nobody.

    Not by `warnings.catch_warnings`, which is not safe where several threads decode.
    """
    if not any(getattr(entry[3], "pattern", None) == _PILLOW for entry in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW)


_PILLOW = r"PIL(\.|$)"


def _bad(error: Exception, max_pixels: int) -> BadImage:
    if isinstance(error, BadImage):
        return error
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        count = re.search(r"\d+", text)
        return BadImage(_too_many(int(count[0]), max_pixels) if count else text)
    if isinstance(error, RangeError):
        return BadImage(f"{text} --value-range BLACK:WHITE")
    if isinstance(error, UnidentifiedImageError):
        return BadImage("is not an image of a format that is read")
    if isinstance(error, MemoryError):
        return BadImage("does not fit in memory")
    if isinstance(error, OSError) and error.strerror:
        return BadImage(f"cannot be read: {error.strerror}")
    return BadImage(f"is {'truncated' if 'truncated' in text.lower() else 'damaged'}: {text}")


def _too_many(pixels: int, max_pixels: int) -> str:
    count = f"{pixels / 1e6:,.1f} million" if pixels >= 1e6 else f"{pixels:,}"
    return f"has {count} pixels, over --max-pixels {max_pixels:,}"
