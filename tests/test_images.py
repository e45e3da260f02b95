"""The decoder: every kind of image comes out right, and what is none is a BadImage."""

import contextlib
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vitft.data.images import BadImage, decode, formats, header, suffixes
from vitft.errors import DataError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(np.float64) / 255
    return np.floor(color * share + 255 * (1 - share) + 0.5).astype(np.uint8)


def test_rgb_is_exact_contiguous_and_writable():
    pixels = decode(encoded(Image.fromarray(RGB)))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (5, 7, 3)
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, RGB)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr", "RGBA"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
def test_opaque_8_bit_images_are_what_pillow_makes_of_them(mode, kind):
    try:
        data = encoded(Image.fromarray(np.tile(RGB, (4, 3, 1))).convert(mode), kind)
    except (OSError, ValueError):
        pytest.skip(f"{kind} cannot hold {mode}")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)


def test_grayscale_repeats_its_value():
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(GRAY))), np.repeat(GRAY[..., None], 3, 2))


def test_one_bit_is_black_and_white():
    bits = GRAY > 127
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(bits)))[..., 1], np.where(bits, 255, 0))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_laid_over_white(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = Image.fromarray(np.dstack([RGB, GRAY]))
    np.testing.assert_array_equal(decode(encoded(image, kind, **options)), over_white(RGB, GRAY))


def test_gray_alpha_premultiplied_and_palette_alpha():
    gray_alpha = Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(GRAY[::-1].copy())])
    expected = over_white(np.repeat(GRAY[..., None], 3, 2), GRAY[::-1])
    np.testing.assert_array_equal(decode(encoded(gray_alpha)), expected)
    rgba = Image.fromarray(np.dstack([RGB, np.where(GRAY > 99, 255, 0).astype(np.uint8)]))
    np.testing.assert_array_equal(decode(rgba.convert("RGBa")), over_white(RGB, np.asarray(rgba)[..., 3]))
    pa = gray_alpha.convert("PA")
    rgba = np.asarray(pa.convert("RGBA"))
    np.testing.assert_array_equal(decode(pa), over_white(rgba[..., :3], rgba[..., 3]))


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
    deep = np.array([[0, 128, 129, 257, 32_768, 65_406, 65_535]], dtype)
    pixels = decode(encoded(Image.fromarray(deep), kind))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255]
    assert (pixels == pixels[..., :1]).all()


def test_32_bit_integers():
    assert decode(Image.fromarray(np.array([[0, 257, 65_535]], np.int32)))[0, :, 0].tolist() == [0, 1, 255]
    assert decode(Image.fromarray(np.array([[-10, 0, 10]], np.int32)))[0, :, 0].tolist() == [0, 128, 255]
    assert decode(Image.fromarray(np.array([[0, 2**31 - 1]], np.int32)))[0, :, 0].tolist() == [0, 255]


def test_floats():
    def gray(*values: float) -> list[int]:
        return decode(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF"))[0, :, 0].tolist()

    assert gray(0, 0.5, 1) == [0, 128, 255]
    assert gray(0, 12.4, 254.6) == [0, 12, 255]
    assert gray(-1, 0, 1) == [0, 128, 255]
    assert gray(0, 1000) == [0, 255]
    assert gray(np.nan, 0.5, np.inf) == [0, 128, 128]
    assert gray(np.nan, np.nan) == [0, 0]


def test_lab_becomes_rgb():
    white = Image.new("LAB", (1, 1), (255, 128, 128))
    assert (decode(encoded(white, "TIFF")) >= 254).all()


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_as_pillow_applies_it(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    pixels = decode(data)
    assert pixels.flags.c_contiguous
    assert pixels.shape == ((7, 5, 3) if orientation > 4 else (5, 7, 3))
    np.testing.assert_array_equal(pixels, expected)


def test_orientation_of_16_bit_images():
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = (GRAY.astype(np.uint16) * 257).astype(np.uint16)
    pixels = decode(encoded(Image.fromarray(deep), "PNG", exif=exif))
    np.testing.assert_array_equal(pixels[..., 0], np.rot90(GRAY, -1))


def test_a_damaged_exif_block_does_not_spoil_the_pixels():
    plain = encoded(Image.fromarray(RGB), "JPEG")
    broken = encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0" + b"\x07" * 40)
    np.testing.assert_array_equal(decode(broken), decode(plain))


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
def test_extreme_shapes(size):
    assert decode(encoded(Image.new("RGB", size, "white"))).shape == (size[1], size[0], 3)


def test_a_file_and_an_image_are_decoded_like_bytes(tmp_path):
    data = encoded(Image.fromarray(RGB), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    np.testing.assert_array_equal(decode(tmp_path / "a.jpg"), decode(data))
    np.testing.assert_array_equal(decode(Image.open(io.BytesIO(data))), decode(data))


def test_bad_files_say_what_is_wrong(tmp_path):
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
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(BadImage):
            decode(data[: int(len(data) * share)])


def test_max_pixels_is_checked_before_decoding():
    header_only = encoded(Image.new("1", (20_000, 6_000)))[:60]  # no pixel data at all
    with pytest.raises(BadImage, match=r"120\.0 million pixels, over --max-pixels 50,000,000"):
        decode(header_only)
    with pytest.raises(BadImage, match=r"^has 35 pixels, over --max-pixels 34 \(7 x 5\)"):
        decode(encoded(Image.fromarray(RGB)), max_pixels=34)
    assert decode(encoded(Image.fromarray(RGB)), max_pixels=35).shape == (5, 7, 3)


def test_pillows_own_limit_is_a_bad_image_and_gives_way_to_a_greater_max_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    data = encoded(Image.fromarray(RGB))
    with pytest.raises(BadImage, match=r"^has 35 pixels, over --max-pixels 20$"):
        decode(data, max_pixels=20)
    assert Image.MAX_IMAGE_PIXELS == 10
    assert decode(data, max_pixels=35).shape == (5, 7, 3)


def test_pillows_warnings_are_silent_in_threads_too():
    image = Image.new("P", (4, 4))
    noisy = encoded(image, transparency=bytes([0, 9]))  # "Palette images with Transparency ..."
    exif = encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(decode, [noisy, exif] * 20))
    assert [str(warning.message) for warning in caught] == []


def test_header_reads_size_and_format():
    assert header(encoded(Image.fromarray(RGB), "JPEG")) == (7, 5, "JPEG")
    with pytest.raises(BadImage):
        header(b"nothing")


def test_formats_that_need_other_programs_are_left_out():
    assert "EPS" not in formats()
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
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM"]),
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


def test_shared_photos_are_what_pillow_makes_of_them():
    folder = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    import pyarrow.parquet as pq

    for row in pq.read_table(folder / "test.parquet").slice(0, 50).column("img").to_pylist():
        expected = np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB"))
        np.testing.assert_array_equal(decode(row["bytes"]), expected)


def photo(width: int, height: int, orientation: int = 1) -> bytes:
    """A JPEG of soft waves, turned by its EXIF block."""
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
    small = decode(stored, enough=enough)
    assert small.shape[:2] == (shape if orientation == 1 else shape[::-1])
    whole = Image.fromarray(decode(stored)).resize(small.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(small.astype(int) - np.asarray(whole)).mean() < 2


def test_what_is_no_jpeg_is_decoded_whole() -> None:
    file = io.BytesIO()
    Image.new("RGB", (800, 600), "red").save(file, "PNG")
    assert decode(file.getvalue(), enough=50).shape == (600, 800, 3)


def test_a_torn_jpeg_is_bad_at_any_size() -> None:
    with pytest.raises(BadImage, match="truncated"):
        decode(photo(1600, 1200)[:20_000], enough=100)
