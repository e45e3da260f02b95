"""Convert the samples of an opened image, whatever they are, to 8-bit sRGB.

**Black and white** follow from the file's format and tags, or from `value_range`, and never from the pixels. So a
value has the same gray level in every image of a dataset:

- 8 bits per sample: 0 to 255.
- 16 unsigned bits: 0 to 65535. A PNG's sBIT does not change that: its samples fill all 16 bits (PNG, 11.3.2.7).
  Pillow scales samples of JPEG 2000 and PGM to 16 bits.
- TIFF with another BitsPerSample n: 0 to 2^n - 1. SMinSampleValue and SMaxSampleValue take precedence (TIFF 6.0,
  section 19). MinSampleValue and MaxSampleValue are statistics, not meant for display (section 8), and are ignored.
- Floating point: 0 to 1, by convention.
- Signed and 32-bit integers: there is no convention, so they are refused without `value_range`.

Values in between are scaled linearly, values outside are clipped, and NaN is black. An image that does not fit its
range is refused instead of shown wrong: if over a quarter of the samples are outside, or over a hundredth are outside
by more than the width of the range. Pillow reduces 16-bit RGB, and 16-bit gray with alpha, to the upper 8 bits.

**Colors** are sRGB. An embedded ICC profile is applied (perceptual intent, LittleCMS), to CMYK too. A profile that is
sRGB already, is damaged, or is for another kind of image is ignored, and so are a PNG's gAMA and cHRM.

**Transparent** pixels are composited over white.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

Array = NDArray[Any]
Range = tuple[float, float]
Convert = Callable[[Image.Image], NDArray[np.uint8]]

STRIP = 1 << 20  # pixels converted at a time, so that the conversion needs little memory besides the image
_OUTSIDE, _FAR = 0.25, 0.01  # fractions of the samples

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT, _S_MIN, _S_MAX = 258, 262, 339, 340, 341  # TIFF tags
_SIGNED, _WHITE_IS_ZERO = 2, 0


class RangeError(ValueError):
    """The value range of the samples is unknown, or the samples do not fit it."""


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in strips of whole rows, each with the number of its first row."""
    width, height = image.size
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def converter(image: Image.Image, value_range: Range | None) -> Convert:
    """A function that turns the loaded image, or a strip of it, into RGB as stored: uint8 (H, W, 3).

    `value_range`, (black, white), is for samples of more than 8 bits. Raises RangeError.
    """
    if has_gray_range(image):
        return _gray_converter(image, value_range)
    if image.mode == "LAB":
        lab = ImageCms.buildTransform(ImageCms.createProfile("LAB"), _SRGB, "LAB", "RGB")
        return lambda strip: np.array(lab.apply(strip), np.uint8)
    profile, has_alpha = image.info.get("icc_profile"), image.has_transparency_data
    base = {"L": "L", "LA": "L", "La": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    to_srgb = _to_srgb(profile, base) if isinstance(profile, bytes) and image.mode != "1" else None

    def convert(strip: Image.Image) -> NDArray[np.uint8]:
        alpha = None
        if has_alpha:
            strip = strip.convert("RGBA")
            alpha = np.asarray(strip.getchannel("A"))
            strip = strip.getchannel("R") if base == "L" and to_srgb is not None else strip.convert("RGB")
        if to_srgb is not None:
            strip = to_srgb.apply(strip if strip.mode == base else strip.convert(base))
        colors = np.array(strip if strip.mode == "RGB" else strip.convert("RGB"))
        if alpha is None:
            return colors
        opacity = alpha[..., None].astype(np.uint16)  # over white; the sum is at most 65,152
        return ((colors * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)

    return convert


def has_gray_range(image: Image.Image) -> bool:
    """Whether the samples are gray and either signed or wider than 8 bits."""
    if image.mode == "L":
        return bool(_tag(image, _SAMPLE_FORMAT) == _SIGNED)
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def loses_low_bits(image: Image.Image) -> bool:
    """Whether Pillow reads only the upper 8 bits of the samples. Call it before the image is loaded."""
    return not has_gray_range(image) and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _gray_converter(image: Image.Image, value_range: Range | None) -> Convert:
    low, high = own_range(image) if value_range is None else value_range
    width = high - low
    outside = far = count = 0
    for _, strip in strips(image):
        values = samples(strip, image)
        count += values.size
        outside += int(((values < low) | (values > high)).sum())
        far += int(((values < low - width) | (values > high + width)).sum())
    if outside > _OUTSIDE * count or far > _FAR * count:
        raise RangeError(
            f"has {outside / count:.0%} of its values outside {low:g} to {high:g}, "
            f"{'its --value-range' if value_range else 'the range of its format'}; give their range with"
        )
    inverted = _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO
    transparent, profile = image.info.get("transparency"), image.info.get("icc_profile")
    to_srgb = _to_srgb(profile, "L") if isinstance(profile, bytes) else None

    def convert(strip: Image.Image) -> NDArray[np.uint8]:
        values = samples(strip, image)
        level = np.clip((np.nan_to_num(values.astype(np.float64), nan=low) - low) / width, 0, 1)
        gray = np.floor((1 - level if inverted else level) * 255 + 0.5).astype(np.uint8)
        if isinstance(transparent, int):
            gray = np.where(values == transparent, np.uint8(255), gray)
        if to_srgb is not None:
            return np.array(to_srgb.apply(Image.fromarray(gray)))
        return np.repeat(gray[:, :, None], 3, axis=2)

    return convert


def samples(strip: Image.Image, image: Image.Image) -> Array:
    """The stored values of a strip of an image: (H, W)."""
    values = np.asarray(strip)
    return values.view(np.int8) if values.dtype == np.uint8 else values  # Pillow reads signed bytes as unsigned


def own_range(image: Image.Image) -> Range:
    """Black and white of gray samples, by format and tags. Raises RangeError."""
    low, high = _tag(image, _S_MIN), _tag(image, _S_MAX)
    if low is not None and high is not None and low < high:
        return float(low), float(high)
    if image.mode == "F":
        return 0.0, 1.0
    signed = _tag(image, _SAMPLE_FORMAT) == _SIGNED
    if image.format == "TIFF" and (signed or not image.mode.startswith("I;16")):
        kind = "signed" if signed else "32-bit"
        raise RangeError(f"has {kind} integers, whose black and white are unknown; give their range with")
    bits = _tag(image, _BITS_PER_SAMPLE)
    return 0.0, float(2 ** int(bits) - 1 if bits else 65_535)


def _tag(image: Image.Image, tag: int) -> Any:
    """The first number of a TIFF tag; None if there is none."""
    value = getattr(image, "tag_v2", {}).get(tag)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int | float) and np.isfinite(value) else None


_SRGB = ImageCms.createProfile("sRGB")


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform of a profile to sRGB; None if its colors are sRGB already, or the profile is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        transform = ImageCms.buildTransform(source, _SRGB, mode, "RGB")
    except Exception:  # damaged, or for another kind of image: the colors as stored are close enough
        return None
    if mode == "CMYK":
        return transform
    steps = np.arange(0, 256, 15).astype(np.uint8)
    colors = steps[None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    converted = np.asarray(transform.apply(Image.fromarray(colors)), np.int16)
    unchanged = colors[..., None] if mode == "L" else colors
    return None if np.abs(converted - unchanged).max() <= _SAME else transform


_SAME = 2  # of 255: the difference between sRGB profiles
