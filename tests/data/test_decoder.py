"""The decoder: every kind of image is decoded correctly, and anything else raises BadImage."""

import contextlib
import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

import vitft.data.decoder
from tests import icc
from vitft.data.decoder import BadImage, decode, formats, header, image_info, suffixes, unused_range
from vitft.data.limits import jxl_size
from vitft.errors import DataError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
GRAY_RGB = np.repeat(GRAY[..., None], 3, 2)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[..., None].astype(np.float64) / 255
    return np.floor(color * opacity + 255 * (1 - opacity) + 0.5).astype(np.uint8)


def test_rgb_is_exact_contiguous_and_writable():
    pixels = decode(encoded(Image.fromarray(RGB)))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (5, 7, 3)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert_array_equal(pixels, RGB)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
def test_opaque_8_bit_images_match_pillow(mode, kind):
    try:
        data = encoded(Image.fromarray(np.tile(RGB, (4, 3, 1))).convert(mode), kind)
    except (OSError, ValueError):
        pytest.skip(f"{kind} cannot hold {mode}")
    if (kind, mode) == ("TIFF", "YCbCr") and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 does not read the TIFF of YCbCr that it writes")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert_array_equal(decode(data), expected)


def test_grayscale_repeats_its_value():
    assert_array_equal(decode(encoded(Image.fromarray(GRAY))), GRAY_RGB)


def test_one_bit_is_black_and_white():
    bits = GRAY > 127
    assert_array_equal(decode(encoded(Image.fromarray(bits)))[..., 1], np.where(bits, 255, 0))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_composited_over_white(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = Image.fromarray(np.dstack([RGB, GRAY]))
    assert_array_equal(decode(encoded(image, kind, **options)), over_white(RGB, GRAY))


def test_gray_premultiplied_and_palette_alpha():
    gray_alpha = Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(GRAY[::-1].copy())])
    expected = over_white(GRAY_RGB, GRAY[::-1])
    assert_array_equal(decode(encoded(gray_alpha)), expected)
    rgba = Image.fromarray(np.dstack([RGB, np.where(GRAY > 99, 255, 0).astype(np.uint8)]))
    assert_array_equal(decode(rgba.convert("RGBa")), over_white(RGB, np.asarray(rgba)[..., 3]))
    pa = gray_alpha.convert("PA")
    rgba = np.asarray(pa.convert("RGBA"))
    assert_array_equal(decode(pa), over_white(rgba[..., :3], rgba[..., 3]))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry_becomes_white(kind):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    pixels = decode(encoded(image, kind, transparency=1))
    assert pixels[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


def test_palette_with_an_alpha_for_each_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    pixels = decode(encoded(image, transparency=bytes([255, 51])))
    assert pixels[0].tolist() == [[10, 20, 30], [212, 214, 216]]  # 40 * 0.2 + 255 * 0.8


def test_transparent_color_without_alpha_channel():
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert decode(encoded(rgb, transparency=(1, 2, 3)))[0].tolist() == [[255, 255, 255], [4, 5, 6]]
    gray = Image.fromarray(np.array([[1, 9]], np.uint8))
    assert decode(encoded(gray, transparency=9))[0].tolist() == [[1, 1, 1], [255, 255, 255]]
    deep = Image.fromarray(np.array([[257, 514]], np.uint16))
    assert decode(encoded(deep, transparency=514))[0].tolist() == [[1, 1, 1], [255, 255, 255]]


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2")])
def test_16_bit_is_divided_by_257(kind, dtype):
    deep = np.array([[0, 128, 129, 257, 32_768, 65_406, 65_407, 65_535]], dtype)
    pixels = decode(encoded(Image.fromarray(deep), kind))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]
    assert (pixels == pixels[..., :1]).all()


def shown(values: np.ndarray, kind: str = "TIFF", value_range=None, **options) -> np.ndarray:
    """The gray levels of one row of values."""
    pixels = decode(encoded(Image.fromarray(np.atleast_2d(values)), kind, **options), value_range=value_range)
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0]


def tags(**values: tuple[int, float]) -> dict[str, TiffImagePlugin.ImageFileDirectory_v2]:
    """TIFF tags by name: their type and value."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    numbers = {"sample_format": 339, "smin": 340, "smax": 341}
    for name, (kind, value) in values.items():
        directory.tagtype[numbers[name]] = kind
        directory[numbers[name]] = value
    return {"tiffinfo": directory}


def test_an_outlier_pixel_does_not_change_the_others() -> None:
    """A float slightly above 1, or an integer below zero, leaves all other pixels unchanged."""
    ramp = np.linspace(0, 1, 100, dtype=np.float32)
    plain = shown(ramp)
    assert plain[0] == 0
    assert plain[-1] == 255
    assert len(np.unique(plain)) == 100
    for last in (1.0000002, 1.02, 1.9):
        assert_array_equal(shown(np.append(ramp, np.float32(last)))[:-1], plain)
    whole = np.arange(0, 3000, 30, dtype=np.int32)
    ranged = shown(whole, value_range=(0, 3000))
    assert_array_equal(ranged, np.floor(whole / 3000 * 255 + 0.5))
    for first in (-1, -500, 5999):
        assert_array_equal(shown(np.append(np.int32(first), whole), value_range=(0, 3000))[1:], ranged)


def test_floats_are_0_to_1() -> None:
    assert shown(np.float32([0, 0.5, 1])).tolist() == [0, 128, 255]
    assert shown(np.float32([0, 0.25, 0.5, 0.75, np.nan])).tolist() == [0, 64, 128, 191, 0]
    assert shown(np.float32([0.1] * 200 + [np.inf, -np.inf]))[-2:].tolist() == [255, 0]
    assert shown(np.float32([np.nan, np.nan])).tolist() == [0, 0]


def test_an_unknown_value_range_must_be_given() -> None:
    for values in (np.int32([0, 3000]), np.int32([-5, 5]), np.int16([-5, 5]), np.uint32([0, 9])):
        file = io.BytesIO()
        Image.fromarray(values.astype(np.int32)[None]).save(file, "TIFF")
        with pytest.raises(BadImage, match=r"integers, whose black and white are unknown; .*--value-range BLACK:WHITE"):
            decode(file.getvalue())
    signed = encoded(Image.fromarray(np.uint8([[0, 127, 128, 255]])), "TIFF", **tags(sample_format=(3, 2)))
    with pytest.raises(BadImage, match="has signed integers"):
        decode(signed)
    assert decode(signed, value_range=(-128, 127))[0, :, 0].tolist() == [128, 255, 0, 127]


def test_values_that_do_not_fit_the_range_are_refused() -> None:
    """Values of 0 to 255 in a float image are neither clipped to white nor rescaled."""
    for values in (np.linspace(0, 255, 50), np.r_[np.zeros(80), np.full(20, 200)], np.linspace(-1, 1, 50)):
        with pytest.raises(BadImage, match=r"% of its values outside 0 to 1, the range of its format; .*--value-range"):
            shown(values.astype(np.float32))
    assert shown(np.float32([0, 12.4, 254.6]), value_range=(0, 255)).tolist() == [0, 12, 255]
    assert shown(np.float32([-1, 0, 1]), value_range=(-1, 1)).tolist() == [0, 128, 255]
    with pytest.raises(BadImage, match="outside 0 to 1, its --value-range"):
        shown(np.uint16([500, 600]), value_range=(0, 1))


def test_the_range_of_tiff_tags() -> None:
    deep = np.uint16([0, 2048, 4095])
    assert shown(deep).tolist() == [0, 8, 16]
    assert shown(deep, **tags(smin=(3, 0), smax=(3, 4095))).tolist() == [0, 128, 255]
    assert shown(np.float32([0, 500, 1000]), **tags(smin=(11, 0.0), smax=(11, 1000.0))).tolist() == [0, 128, 255]
    assert shown(deep, value_range=(0, 8190), **tags(smin=(3, 0), smax=(3, 4095))).tolist() == [
        0,
        64,
        128,
    ]  # the given range takes precedence
    twelve = bytearray(encoded(Image.fromarray(np.zeros((1, 2), np.uint16)), "TIFF"))
    at = twelve.index(struct.pack("<HHIHH", 258, 3, 1, 16, 0))
    twelve[at + 8] = 12
    twelve[-4:-1] = bytes([0xFF, 0xF8, 0x00])  # 4095 and 2048 in 12 bits each
    assert decode(bytes(twelve))[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize("values", [np.uint16([0, 65_535]), np.float32([0, 1])])
def test_white_is_zero(values: np.ndarray) -> None:
    data = bytearray(encoded(Image.fromarray(values[None]), "TIFF"))
    at = data.index(struct.pack("<HHIHH", 262, 3, 1, 1, 0))
    data[at + 8] = 0
    assert decode(bytes(data))[0, :, 0].tolist() == [255, 0]


def test_a_png_with_sbit_fills_all_16_bits() -> None:
    """By the specification, the 12 bits are the upper ones."""
    scaled = np.uint16([0, 2048, 4095]) << 4 | np.uint16([0, 2048, 4095]) >> 8
    plain = encoded(Image.fromarray(scaled[None]))
    chunk = b"sBIT" + bytes([12])
    marked = plain[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[33:]
    assert decode(marked)[0, :, 0].tolist() == decode(plain)[0, :, 0].tolist() == [0, 128, 255]


def test_a_value_range_needs_all_bits() -> None:
    """Pillow reads 8 bits of 16-bit colors, so a range of 16-bit values cannot be applied."""
    rgb = bytearray(encoded(Image.new("RGB", (1, 1))))
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    rgb[16:33] = header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    end = rgb.index(b"IDAT") - 4
    body = b"IDAT" + zlib.compress(b"\0" + bytes([200, 0, 100, 0, 50, 0]))
    idat = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    deep = bytes(rgb[:end]) + idat + bytes(rgb[-12:])
    assert decode(deep)[0, 0].tolist() == [200, 100, 50]
    with pytest.raises(BadImage, match="16 bits per color, of which Pillow reads the upper 8"):
        decode(deep, value_range=(0, 4095))


def test_12_bit_images_in_16_bits_are_reported() -> None:
    dark = [encoded(Image.fromarray(np.full((2, 2), value, np.uint16))) for value in (7, 4000, 90)]
    assert unused_range(dark) == (
        "16-bit images that reach 4,000 of 65,535 become nearly black; if they hold 12 bits, add --value-range 0:4095"
    )
    assert unused_range([*dark, encoded(Image.fromarray(np.full((2, 2), 40_000, np.uint16)))]) is None
    assert unused_range([*dark, encoded(Image.fromarray(RGB))]) is None
    assert unused_range([b"nothing"]) is None
    small = Image.fromarray(np.full((2, 2), 4000, np.uint16))
    stream = io.BytesIO()
    small.save(stream, "TIFF", tiffinfo={340: 0, 341: 4095})
    assert decode(stream.getvalue())[0, 0].tolist() == [249, 249, 249]
    assert unused_range([stream.getvalue()]) is None


# -- color profiles -----------------------------------------------------------------------------------


def converted(image: Image.Image, profile: bytes) -> np.ndarray:
    """Converted from the profile with Pillow's own function."""
    image_ = ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert image_ is not None
    return np.asarray(image_)


WIDE = icc.rgb()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colors_are_converted_to_srgb(kind: str) -> None:
    data = encoded(Image.fromarray(RGB), kind, icc_profile=WIDE)
    expected = converted(Image.open(io.BytesIO(data)), WIDE)
    assert_array_equal(decode(data), expected)
    assert np.abs(expected.astype(int) - np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).max() > 20
    green = encoded(Image.new("RGB", (1, 1), (100, 200, 100)), icc_profile=WIDE)
    red, green_level, blue = decode(green)[
        0, 0
    ].tolist()  # Adobe RGB's green is more saturated: sRGB needs less red and blue
    assert red < 60
    assert 198 <= green_level <= 203
    assert blue < 100


def test_an_srgb_or_damaged_profile_changes_nothing() -> None:
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"no profile", b"", WIDE[:200]):
        assert_array_equal(decode(encoded(Image.fromarray(RGB), icc_profile=profile)), RGB)
        gray = encoded(Image.fromarray(GRAY), icc_profile=profile)
        assert_array_equal(decode(gray), GRAY_RGB)


def test_a_profile_for_another_kind_of_image_is_ignored() -> None:
    assert_array_equal(decode(encoded(Image.fromarray(RGB), icc_profile=icc.gray(1.0))), RGB)
    assert_array_equal(decode(encoded(Image.fromarray(GRAY), icc_profile=WIDE)), GRAY_RGB)


def test_gray_profiles_with_8_and_16_bits_and_alpha() -> None:
    linear = icc.gray(1.0)
    expected = converted(Image.fromarray(GRAY), linear)
    assert expected.mean() > GRAY.mean() + 20  # linear light has lower numbers
    assert_array_equal(decode(encoded(Image.fromarray(GRAY), icc_profile=linear)), expected)
    deep = Image.fromarray(GRAY.astype(np.uint16) * 257)
    assert_array_equal(decode(encoded(deep, icc_profile=linear)), expected)
    alpha = GRAY[::-1].copy()
    both = Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(alpha)])
    assert_array_equal(decode(encoded(both, icc_profile=linear)), over_white(expected, alpha))


def test_profiles_with_alpha_and_palette() -> None:
    rgba = Image.fromarray(np.dstack([RGB, GRAY]))
    expected = over_white(converted(Image.fromarray(RGB), WIDE), GRAY)
    assert_array_equal(decode(encoded(rgba, icc_profile=WIDE)), expected)
    palette = Image.fromarray(RGB).quantize(16)
    expected = converted(palette.convert("RGB"), WIDE)
    assert_array_equal(decode(encoded(palette, icc_profile=WIDE)), expected)


def test_cmyk_with_and_without_a_profile() -> None:
    """Adobe's JPEGs store inverted inks, 0 for full ink; white paper decodes as white in both formats."""
    inks = Image.fromarray(np.uint8([[[0, 0, 0, 0], [0, 0, 0, 255], [0, 255, 255, 0]]]), "CMYK").resize((24, 8), 0)
    lightness = np.full((2, 2, 2, 2), 60.0)
    lightness[0, 0, 0, 0], lightness[:, :, :, 1] = 100, 10
    for kind, options in (("JPEG", {"quality": 100, "subsampling": 0}), ("TIFF", {})):
        plain = decode(encoded(inks, kind, **options))
        assert (plain[0, 0] >= 254).all()
        assert (plain[0, 12] <= 1).all()
        assert (np.abs(plain[0, 20].astype(int) - [255, 0, 0]) <= 2).all()
        printed = decode(encoded(inks, kind, icc_profile=icc.cmyk(lightness), **options))
        assert (printed[0, 0] >= 253).all()
        assert printed[0, 12].mean() <= 35  # its darkest
        assert 120 <= printed[0, 20].mean() <= 150  # L* 60, a gray
        assert np.ptp(printed[0, 20]) <= 2


# -- plugin formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["HEIF", "JXL", "AVIF"])
def test_heic_jpeg_xl_and_avif_are_read(kind: str, tmp_path: Path) -> None:
    assert kind in formats()
    assert {"HEIF": ".heic", "JXL": ".jxl", "AVIF": ".avif"}[kind] in suffixes()
    large = Image.fromarray(np.uint8([[200, 30], [90, 250]])).resize((64, 32), 0).convert("RGB")
    (tmp_path / "x").write_bytes(encoded(large, kind, quality=95))
    for source in (tmp_path / "x", (tmp_path / "x").read_bytes()):
        assert np.abs(decode(source).astype(int) - np.asarray(large)).mean() < 6
        with pytest.raises(BadImage, match="over --max-pixels 2,047"):
            decode(source, 2047)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_heic_is_rotated_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste("red", (0, 0, 16, 32))
    data = encoded(upright, "HEIF", exif=exif.tobytes(), quality=95)
    plain = Image.new("RGB", (64, 32), "white")
    plain.paste("red", (0, 0, 16, 32))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(plain, "PNG", exif=exif)))))
    pixels = decode(data)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).mean() < 8


@pytest.mark.parametrize(
    "size",
    [(8, 8), (256, 256), (120, 100), (40, 30), (300, 200), (16, 9), (500, 400), (60, 30), (1600, 901), (64, 3000),
     (5000, 2)],
)  # fmt: skip
@pytest.mark.parametrize("container", [False, True])
def test_the_size_of_a_jpeg_xl_is_read_from_its_header(size: tuple[int, int], container: bool) -> None:
    import pillow_jxl  # noqa: F401

    data = encoded(Image.new("RGB", size), "JXL", use_container=container, effort=1)
    stream = io.BytesIO(data)
    assert jxl_size(stream) == size


def test_a_missing_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitft.data.decoder, "formats", lambda: ("JPEG", "PNG"))
    for kind, name in (("HEIF", "HEIC"), ("JXL", "JPEG XL")):
        with pytest.raises(BadImage, match=rf"is {name}; to read it: pip install 'vitft\[heic\]'"):
            decode(encoded(Image.fromarray(np.tile(RGB, (9, 9, 1))), kind))


def test_lab_becomes_rgb():
    white = Image.new("LAB", (1, 1), (255, 128, 128))
    assert (decode(encoded(white, "TIFF")) >= 254).all()


def test_an_animation_yields_its_first_frame():
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_matches_pillow(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    pixels = decode(data)
    assert pixels.flags.c_contiguous
    assert pixels.shape == ((7, 5, 3) if orientation > 4 else (5, 7, 3))
    assert_array_equal(pixels, expected)


def test_orientation_of_16_bit_images():
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = (GRAY.astype(np.uint16) * 257).astype(np.uint16)
    pixels = decode(encoded(Image.fromarray(deep), "PNG", exif=exif))
    assert_array_equal(pixels[..., 0], np.rot90(GRAY, -1))


def test_a_damaged_exif_block_is_ignored():
    plain = encoded(Image.fromarray(RGB), "JPEG")
    broken = encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0" + b"\x07" * 40)
    assert_array_equal(decode(broken), decode(plain))


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
def test_extreme_shapes(size):
    assert decode(encoded(Image.new("RGB", size, "white"))).shape == (size[1], size[0], 3)


def test_a_file_and_an_image_are_decoded_like_bytes(tmp_path):
    data = encoded(Image.fromarray(RGB), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    assert_array_equal(decode(tmp_path / "a.jpg"), decode(data))
    assert_array_equal(decode(Image.open(io.BytesIO(data))), decode(data))


def test_errors_say_what_is_wrong(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image at all")
    for source, message in (
        (b"", "zero bytes"),
        (tmp_path / "empty.jpg", "zero bytes"),
        (tmp_path / "text.jpg", "not an image"),
        (tmp_path / "none.jpg", "does not exist"),
        (tmp_path, "not a file"),
        (Image.new("RGB", (0, 3)), "no pixels"),
    ):
        with pytest.raises(BadImage, match=message) as caught:
            decode(source)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == DataError.exit_code == 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_a_truncated_file_is_an_error(kind):
    data = encoded(Image.fromarray(np.tile(RGB, (20, 20, 1))), kind)
    for fraction in (0.3, 0.6, 0.9):
        with pytest.raises(BadImage):
            decode(data[: int(len(data) * fraction)])


def test_max_pixels_is_checked_before_decoding():
    header_only = encoded(Image.new("1", (20_000, 6_000)))[:60]  # no pixel data at all
    with pytest.raises(BadImage, match=r"120\.0 million pixels, over --max-pixels 50,000,000"):
        decode(header_only)
    with pytest.raises(BadImage, match=r"^has 35 pixels, over --max-pixels 34 \(7 x 5\)"):
        decode(encoded(Image.fromarray(RGB)), max_pixels=34)
    assert decode(encoded(Image.fromarray(RGB)), max_pixels=35).shape == (5, 7, 3)


def test_pillows_own_limit_is_a_bad_image_and_is_raised_by_max_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = encoded(Image.fromarray(RGB))
    with pytest.raises(BadImage, match=r"^has 35 pixels, over --max-pixels 20$"):
        decode(data, max_pixels=20)
    assert Image.MAX_IMAGE_PIXELS == 10
    assert decode(data, max_pixels=35).shape == (5, 7, 3)


@pytest.mark.parametrize("read", [decode, header, image_info])
def test_pillow_warnings_are_silenced_in_threads_too(read, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow warns above this
    image = Image.new("P", (4, 4))
    noisy = encoded(image, transparency=bytes([0, 9]))  # "Palette images with Transparency ..."
    exif = encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()  # an earlier ignore filter would come after the next one
        warnings.simplefilter("always")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, [noisy, exif] * 20))
    # Files that another test left open may be collected now.
    assert [str(warning.message) for warning in caught if warning.category is not ResourceWarning] == []


def test_header_reads_size_and_format():
    assert header(encoded(Image.fromarray(RGB), "JPEG")) == (7, 5, "JPEG")
    with pytest.raises(BadImage):
        header(b"nothing")


def test_unsupported_formats_are_excluded():
    other = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF", "BLP", "ICNS", "ICO", "IPTC", "FITS"}
    assert other.isdisjoint(formats())
    assert {"JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"} <= set(formats())
    assert {".jpg", ".jpeg", ".png", ".webp"} <= suffixes()
    assert suffixes().isdisjoint({".pdf", ".mpg", ".eps", ".h5", ".txt"})
    with pytest.raises(BadImage):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


PHOTO = Image.fromarray(np.tile(RGB, (6, 6, 1)))
VALID = [encoded(PHOTO, kind) for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "TGA")]
VALID += [encoded(PHOTO.convert("P"), "PNG", transparency=3), encoded(PHOTO, "TIFF", compression="tiff_lzw")]


def image_or_bad(data: bytes) -> None:
    with contextlib.suppress(BadImage):
        pixels = decode(data, max_pixels=1_000_000)
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert pixels.dtype == np.uint8


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM"])
)
def test_random_bytes_raise_nothing_but_bad_image(data, magic):
    image_or_bad(magic + data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_raise_nothing_but_bad_image(data):
    whole = bytearray(data.draw(st.sampled_from(VALID)))
    for _ in range(data.draw(st.integers(0, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    image_or_bad(bytes(whole[: data.draw(st.integers(0, len(whole)))]))


def test_shared_photos_match_pillow():
    folder = Path(__file__).parents[3] / "shared" / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    import pyarrow.parquet as pq

    for row in pq.read_table(folder / "test.parquet").slice(0, 50).column("img").to_pylist():
        expected = np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB"))
        assert_array_equal(decode(row["bytes"]), expected)


def photo(width: int, height: int, orientation: int = 1) -> bytes:
    """A JPEG of smooth waves, rotated by its EXIF block."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / width * a + y / height * b) for a, b in ((6, 2), (3, 9), (11, 4))]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("enough", "shape"), [(224, (300, 400)), (301, (600, 800)), (100, (150, 200)), (5000, (1200, 1600))]
)
def test_a_large_jpeg_is_decoded_no_larger_than_training_needs(
    orientation: int, enough: int, shape: tuple[int, int]
) -> None:
    stored = photo(1600, 1200, orientation)
    small = decode(stored, min_side=enough)
    assert small.shape[:2] == (shape if orientation == 1 else shape[::-1])
    whole = Image.fromarray(decode(stored)).resize(small.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(small.astype(int) - np.asarray(whole)).mean() < 2


def test_other_formats_are_decoded_at_full_size() -> None:
    file = io.BytesIO()
    Image.new("RGB", (800, 600), "red").save(file, "PNG")
    assert decode(file.getvalue(), min_side=50).shape == (600, 800, 3)


def test_a_truncated_jpeg_is_bad_at_any_size() -> None:
    with pytest.raises(BadImage, match="truncated"):
        decode(photo(1600, 1200)[:20_000], min_side=100)


def test_a_plugin_may_register_its_suffixes_while_they_are_listed(monkeypatch) -> None:
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.registered_extensions()))
    monkeypatch.setattr(vitft.data.decoder, "_register_plugins", lambda: Image.register_extension("PNG", ".pngx"))
    try:
        vitft.data.decoder.formats.cache_clear()
        vitft.data.decoder.suffixes.cache_clear()
        assert ".pngx" in vitft.data.decoder.suffixes()
    finally:
        vitft.data.decoder.formats.cache_clear()
        vitft.data.decoder.suffixes.cache_clear()
