"""An opened image's samples, whatever they are, to 8-bit sRGB.

**Which value is black and which is white** follows from the file's format and tags, or from `value_range`; the pixels
of an image never move it, so the same value is the same gray in every image of a data set:

- 8 bits a sample: 0 to 255.
- 16 unsigned bits: 0 to 65535. A PNG's sBIT does not change that: its samples fill all 16 bits (PNG, 11.3.2.7).
  Pillow scales those of JPEG 2000 and PGM to 16 bits, whatever they have.
- TIFF with another BitsPerSample n: 0 to 2^n - 1. SMinSampleValue and SMaxSampleValue win over that (TIFF 6.0,
  section 19). MinSampleValue and MaxSampleValue are statistics, not to be shown (section 8), and are not used.
- Floating point: 0 to 1, as is usual.
- Signed integers, and those of 32 bits: nothing is usual, so they are refused without `value_range`.

In between the scale is linear, what lies outside is clipped, and not-a-number is black. An image that does not fit its
range is refused rather than shown wrong: over a quarter of the samples outside, or over a hundredth of them
outside by more than the range is wide. 16 bits of RGB or of gray with alpha are reduced to the upper 8 by Pillow.

**Colors** are those of sRGB. An embedded ICC profile is applied (perceptual intent, LittleCMS), to CMYK too; one that
is sRGB's already, that is damaged, or that is for another kind of image is left out. A PNG's gAMA and cHRM are left
out too.

**Transparency** is laid over white.
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

STRIP = 1 << 20  # pixels that are converted at a time: what that takes beside the image stays small
_OUTSIDE, _FAR = 0.25, 0.01  # shares of the samples

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT, _S_MIN, _S_MAX = 258, 262, 339, 340, 341  # TIFF's tags
_SIGNED, _WHITE_IS_ZERO = 2, 0


class RangeError(ValueError):
    """Nothing says which value is black or white, or what says so does not fit the samples."""


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in pieces of whole rows, each with its first."""
    width, height = image.size
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def converter(image: Image.Image, value_range: Range | None) -> Callable[[Image.Image], NDArray[np.uint8]]:
    """What turns the loaded image, or a piece of it, into RGB in its stored orientation: uint8, (H, W, 3).

    `value_range`, black and white, is for samples of more than 8 bits. Raises RangeError.
    """
    if is_deep(image):
        return _deep(image, value_range)
    if image.mode == "LAB":
        lab = ImageCms.buildTransform(ImageCms.createProfile("LAB"), _SRGB, "LAB", "RGB")
        return lambda part: np.array(lab.apply(part), np.uint8)
    profile, see_through = image.info.get("icc_profile"), image.has_transparency_data
    base = {"L": "L", "LA": "L", "La": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    to_srgb = _to_srgb(profile, base) if isinstance(profile, bytes) and image.mode != "1" else None

    def convert(part: Image.Image) -> NDArray[np.uint8]:
        alpha = None
        if see_through:
            part = part.convert("RGBA")
            alpha = np.asarray(part.getchannel("A"))
            part = part.getchannel("R") if base == "L" and to_srgb is not None else part.convert("RGB")
        if to_srgb is not None:
            part = to_srgb.apply(part if part.mode == base else part.convert(base))
        colors = np.array(part if part.mode == "RGB" else part.convert("RGB"))
        return colors if alpha is None else _over_white(colors, alpha)

    return convert


def is_deep(image: Image.Image) -> bool:
    """Whether its samples are gray and wider than 8 bits, or signed."""
    if image.mode == "L":
        return bool(_tag(image, _SAMPLE_FORMAT) == _SIGNED)
    return image.mode.startswith("I;16") or image.mode in ("I", "F")


def is_cut(image: Image.Image) -> bool:
    """Whether Pillow reads but the upper 8 bits of its samples; told before it is loaded."""
    return not is_deep(image) and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _deep(image: Image.Image, value_range: Range | None) -> Callable[[Image.Image], NDArray[np.uint8]]:
    low, high = _range(image) if value_range is None else value_range
    width = high - low
    outside = far = count = 0
    for _, part in strips(image):
        stored = samples(part, image)
        count += stored.size
        outside += int(((stored < low) | (stored > high)).sum())
        far += int(((stored < low - width) | (stored > high + width)).sum())
    if outside > _OUTSIDE * count or far > _FAR * count:
        raise RangeError(
            f"has {outside / count:.0%} of its values outside {low:g} to {high:g}, "
            f"{'its --value-range' if value_range else 'the range of its format'}; name theirs with"
        )
    inverted = _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO
    see_through, profile = image.info.get("transparency"), image.info.get("icc_profile")
    to_srgb = _to_srgb(profile, "L") if isinstance(profile, bytes) else None

    def convert(part: Image.Image) -> NDArray[np.uint8]:
        stored = samples(part, image)
        values = np.clip((np.nan_to_num(stored.astype(np.float64), nan=low) - low) / width, 0, 1)
        gray = np.floor((1 - values if inverted else values) * 255 + 0.5).astype(np.uint8)
        if isinstance(see_through, int):
            gray = np.where(stored == see_through, np.uint8(255), gray)
        if to_srgb is not None:
            return np.array(to_srgb.apply(Image.fromarray(gray)))
        return np.repeat(gray[:, :, None], 3, axis=2)

    return convert


def samples(part: Image.Image, image: Image.Image) -> Array:
    """The stored values of a piece of an image: (H, W)."""
    stored = np.asarray(part)
    return stored.view(np.int8) if stored.dtype == np.uint8 else stored  # Pillow takes signed bytes for unsigned ones


def _range(image: Image.Image) -> Range:
    """Black and white, by format and tags. Raises RangeError."""
    low, high = _tag(image, _S_MIN), _tag(image, _S_MAX)
    if low is not None and high is not None and low < high:
        return float(low), float(high)
    if image.mode == "F":
        return 0.0, 1.0
    if image.format == "TIFF" and not (image.mode.startswith("I;16") and _tag(image, _SAMPLE_FORMAT) != _SIGNED):
        kind = "signed" if _tag(image, _SAMPLE_FORMAT) == _SIGNED else "32-bit"
        raise RangeError(f"has {kind} integers, and nothing says which is white; name their range with")
    bits = _tag(image, _BITS_PER_SAMPLE)
    return 0.0, float(2 ** int(bits) - 1 if bits else 65_535)


def _tag(image: Image.Image, tag: int) -> Any:
    """The first number of a TIFF's tag; None where there is none."""
    found = getattr(image, "tag_v2", {}).get(tag)
    found = found[0] if isinstance(found, tuple) and found else found
    return found if isinstance(found, int | float) and np.isfinite(found) else None


_SRGB = ImageCms.createProfile("sRGB")


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What makes sRGB of an image's colors; None where they are sRGB already, or the profile cannot be used."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        transform = ImageCms.buildTransform(source, _SRGB, mode, "RGB")
    except Exception:  # damaged, or for images of another kind: colors as they stand are near enough
        return None
    if mode == "CMYK":
        return transform
    steps = np.arange(0, 256, 15).astype(np.uint8)
    colors = steps[None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    moved = np.asarray(transform.apply(Image.fromarray(colors)), np.int16)
    plain = colors[..., None] if mode == "L" else colors
    return None if np.abs(moved - plain).max() <= _SAME else transform


_SAME = 2  # of 255: what sRGB profiles differ by


def _over_white(colors: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    share = alpha[..., None].astype(np.uint16)
    return ((colors * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)  # at most 65,152
