"""THE decoder: bytes, a file or a Pillow image -> uint8 RGB (H, W, 3).

Training, evaluation, prediction and export all see an image as this file makes it, so what Pillow
does differently from mode to mode is settled here, once.
"""

import re
import warnings
from collections.abc import Callable
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

# Documents, films and containers that Pillow opens only by way of other programs, or not at all.
_NO_PIXELS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


class BadImage(DataError):  # noqa: N818  (it reads as what it is)
    """No readable image; the text says what is wrong with it. Who knows its name puts it in front."""


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
            return _pixels(source, max_pixels, enough)
        with _open(source, max_pixels) as image:
            return _pixels(image, max_pixels, enough)
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


def about(source: bytes | Path) -> About:
    """Format, mode and orientation. Raises BadImage."""
    _silence_pillow()
    try:
        with _open(source, MAX_PIXELS) as image:
            return About(str(image.format), image.mode, _orientation(image))
    except Exception as error:
        raise _bad(error, MAX_PIXELS) from error


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(name for name in Image.ID if name in Image.OPEN and name not in _NO_PIXELS)


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


def _pixels(image: Image.Image, max_pixels: int, enough: int | None) -> NDArray[np.uint8]:
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(f"{_too_many(width * height, max_pixels)} ({width} x {height})")
    if width * height == 0:
        raise BadImage(f"has no pixels ({width} x {height})")
    if enough is not None and image.format == "JPEG":
        image.draft(None, (enough, enough))
    image.load()
    return np.ascontiguousarray(_TURN.get(_orientation(image), _upright)(_rgb(image)))


def _rgb(image: Image.Image) -> Array:
    """The loaded image in its stored orientation: uint8, (H, W, 3)."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        stored = np.asarray(image)
        gray = _float_to_8_bit(stored) if image.mode == "F" else _integer_to_8_bit(stored)
        if isinstance(see_through := image.info.get("transparency"), int):
            gray = np.where(stored == see_through, np.uint8(255), gray)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        return np.array(converted, np.uint8)
    if not image.has_transparency_data:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    rgba = np.asarray(image.convert("RGBA"), np.uint16)
    color, alpha = rgba[..., :3], rgba[..., 3:]
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)  # at most 65,152


def _integer_to_8_bit(stored: Array) -> NDArray[np.uint8]:
    """16-bit values by 1/257 (65535 -> 255); wider or negative ones stretched from least to greatest."""
    if stored.min() < 0 or stored.max() > 65_535:
        return _stretch(stored.astype(np.float64))
    return ((stored.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _float_to_8_bit(stored: Array) -> NDArray[np.uint8]:
    """0..1 times 255, 0..255 as they are, others stretched; not-a-number is black."""
    finite = stored[np.isfinite(stored)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(stored.astype(np.float64), nan=low, posinf=high, neginf=low)
    values[np.isnan(stored)] = low if low < 0 else 0.0
    if low < 0 or high > 255:
        return _stretch(values)
    return np.asarray(np.floor(values * (255 if high <= 1 else 1) + 0.5), np.uint8)


def _stretch(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    low, high = values.min(), values.max()
    scaled = (values - low) / max(high - low, 1e-300)
    return np.asarray(np.floor(scaled * 255 + 0.5), np.uint8)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 when there is none or the EXIF block is damaged (the pixels are not)."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def _upright(pixels: Array) -> Array:
    return pixels


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
        return BadImage("is not an image that Pillow reads")
    if isinstance(error, MemoryError):
        return BadImage("does not fit in memory")
    if isinstance(error, OSError) and error.strerror:
        return BadImage(f"cannot be read: {error.strerror}")
    return BadImage(f"is {'truncated' if 'truncated' in text.lower() else 'damaged'}: {text}")


def _too_many(pixels: int, max_pixels: int) -> str:
    count = f"{pixels / 1e6:,.1f} million" if pixels >= 1e6 else f"{pixels:,}"
    return f"has {count} pixels, over --max-pixels {max_pixels:,}"
