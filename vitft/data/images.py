"""THE decoder: bytes, a file or a Pillow image -> uint8 RGB (H, W, 3).

Training, evaluation, prediction and export all see an image as this file makes it, so what Pillow
does differently from mode to mode is settled here, once.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from vitft.config import TrainConfig
from vitft.errors import DataError

Array = NDArray[Any]

MAX_PIXELS: int = TrainConfig.model_fields["max_pixels"].default

# Documents and films that Pillow opens only by way of other programs, or not at all; and containers of an
# image in another format, whose size their own header does not tell.
_NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"} | {"BLP", "ICNS", "ICO", "IPTC"}

# How many pixels of an ordinary JPEG or PNG a pixel counts as: by the memory of its decoder (8 bytes a pixel
# for those; docs/reliability.md has all), or by its time, where Pillow has a decoder written in Python: over a
# second for a million pixels.
_WEIGHT = {"progressive JPEG": 1.1, "AVIF": 1.5, "WEBP": 2.0, "JPEG2000": 2.5}
_BY_PYTHON = 50.0

_COMMON = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # a format that is tried in vain takes as long as a tiny image


class BadImage(DataError):  # noqa: N818  (it reads as what it is)
    """No readable image; the text says what is wrong with it. Who knows its name puts it in front."""


def encoded(cell: dict[str, Any]) -> bytes | Path:
    """The encoded image of a row of a data set, {"bytes", "path"}: its bytes, or its file."""
    return Path(cell["path"]) if cell["bytes"] is None else cell["bytes"]


def decode(
    source: bytes | Path | Image.Image, max_pixels: int = MAX_PIXELS, enough: int | None = None
) -> NDArray[np.uint8]:
    """Turn an encoded image into upright RGB: uint8, (H, W, 3), C-contiguous, writable.

    Transparent parts are laid over white, 16 bits become 8 by dividing by 257, of an animation the
    first frame counts, and the EXIF orientation is applied. An opaque 8-bit image comes out exactly
    as Pillow's `convert("RGB")`. With `enough`, for training alone, a JPEG is decoded at a half, a
    quarter or an eighth where its shorter side still has that many pixels: several times as fast.

    Raises BadImage, and nothing else, for anything that is not wholly readable or that has more than
    `max_pixels` pixels (checked before any pixel is decoded).
    """
    _silence_pillow()
    try:
        if isinstance(source, Image.Image):
            return _upright(*_pixels(source, max_pixels, enough))
        return _upright(*_read(source, max_pixels, enough))  # the file's own copy of the pixels is gone by now
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


class About(NamedTuple):
    """What a file says of its image before a pixel is decoded; orientation is EXIF's, 1 for upright."""

    format: str
    mode: str
    orientation: int


def about(source: bytes | Path, max_pixels: int = MAX_PIXELS) -> About:
    """Format, mode and orientation. Raises BadImage, for one of too many pixels too: some EXIF follows the pixels."""
    _silence_pillow()
    try:
        with _open(source, max_pixels) as image:
            _check_size(image, max_pixels)
            return About(str(image.format), image.mode, _orientation(image))
    except Exception as error:
        raise _bad(error, max_pixels) from error


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, in the order in which they are tried."""
    Image.init()
    return tuple(name for name in dict.fromkeys((*_COMMON, *Image.ID)) if name in Image.OPEN and name not in _NO_PIXELS)


@cache
def suffixes() -> frozenset[str]:
    """Lower-case suffixes, dot included, of files that are taken for images."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats())


def _open(source: bytes | Path, max_pixels: int) -> Image.Image:
    # Pillow refuses over twice its own limit. Who asks for more than that gets it: the limit is only
    # ever raised, so threads that decode at the same time cannot disturb one another.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    if not isinstance(source, Path):
        if not source:
            raise BadImage("is empty (zero bytes)")
        return Image.open(BytesIO(source), formats=formats())
    if not source.is_file():  # a pipe would block, a folder has no pixels
        raise BadImage("is not a file" if source.exists() else "does not exist")
    if source.stat().st_size == 0:
        raise BadImage("is empty (zero bytes)")
    return Image.open(source, formats=formats())


def _read(source: bytes | Path, max_pixels: int, enough: int | None) -> tuple[NDArray[np.uint8], int]:
    with _open(source, max_pixels) as image:
        return _pixels(image, max_pixels, enough)


def _pixels(image: Image.Image, max_pixels: int, enough: int | None) -> tuple[NDArray[np.uint8], int]:
    """RGB as stored, and the orientation."""
    _check_size(image, max_pixels)
    if enough is not None and image.format == "JPEG":
        image.draft(None, (enough, enough))
    image.load()
    width, height = image.size
    convert = _converter(image)
    if width * height <= _STRIP:
        return convert(image), _orientation(image)
    pixels = np.empty((height, width, 3), np.uint8)
    for top, strip in _strips(image):
        pixels[top : top + strip.height] = convert(strip)
    return pixels, _orientation(image)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    kind = "progressive JPEG" if image.info.get("progressive") else str(image.format)
    tiles = getattr(image, "tile", None)
    weight = _BY_PYTHON if tiles and tiles[0][0] in Image.DECODERS else _WEIGHT.get(kind, 1.0)
    if width * height * weight > max_pixels:
        each = f", and a pixel of {kind} counts as {weight:g}" if weight > 1 else ""
        raise BadImage(f"{_too_many(width * height, max_pixels)} ({width} x {height}{each})")
    if width * height == 0:
        raise BadImage(f"has no pixels ({width} x {height})")


_STRIP = 1 << 20  # pixels that are converted at a time: what that takes beside the image stays small


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in pieces of whole rows, each with its first."""
    width, height = image.size
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _converter(image: Image.Image) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """What turns the loaded image, or a piece of it, into RGB in its stored orientation: uint8, (H, W, 3)."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        to_8_bit = _float_to_8_bit(image) if image.mode == "F" else _integer_to_8_bit(image)
        see_through = image.info.get("transparency")

        def convert(part: Image.Image) -> NDArray[np.uint8]:
            stored = np.asarray(part)
            gray = to_8_bit(stored)
            if isinstance(see_through, int):
                gray = np.where(stored == see_through, np.uint8(255), gray)
            return np.repeat(gray[:, :, None], 3, axis=2)

        return convert
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
        return lambda part: np.array(ImageCms.applyTransform(part, transform), np.uint8)
    if image.has_transparency_data:
        return _over_white
    return lambda part: np.array(part if part.mode == "RGB" else part.convert("RGB"))


def _over_white(image: Image.Image) -> NDArray[np.uint8]:
    rgba = np.asarray(image.convert("RGBA"), np.uint16)
    color, alpha = rgba[..., :3], rgba[..., 3:]
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)  # at most 65,152


def _integer_to_8_bit(image: Image.Image) -> Callable[[Array], NDArray[np.uint8]]:
    """16-bit values by 1/257 (65535 -> 255); wider or negative ones stretched from least to greatest."""
    ends = [(int(stored.min()), int(stored.max())) for _, part in _strips(image) for stored in [np.asarray(part)]]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if low < 0 or high > 65_535:
        return lambda stored: _stretch(stored.astype(np.float64), low, high)
    return lambda stored: ((stored.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _float_to_8_bit(image: Image.Image) -> Callable[[Array], NDArray[np.uint8]]:
    """0..1 times 255, 0..255 as they are, others stretched; not-a-number is black."""
    low, high, gaps = np.inf, -np.inf, False
    for _, part in _strips(image):
        stored = np.asarray(part)
        finite = stored[np.isfinite(stored)]
        low, high = float(finite.min(initial=low)), float(finite.max(initial=high))
        gaps = gaps or bool(np.isnan(stored).any())
    low, high = (low, high) if low <= high else (0.0, 0.0)
    black = min(low, 0.0)
    least = black if gaps else low

    def convert(stored: Array) -> NDArray[np.uint8]:
        values = np.nan_to_num(stored.astype(np.float64), nan=black, posinf=high, neginf=low)
        if low < 0 or high > 255:
            return _stretch(values, least, high)
        return np.asarray(np.floor(values * (255 if high <= 1 else 1) + 0.5), np.uint8)

    return convert


def _stretch(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    scaled = (values - low) / max(high - low, 1e-300)
    return np.asarray(np.floor(scaled * 255 + 0.5), np.uint8)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 when there is none or the EXIF block is damaged (the pixels are not)."""
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
