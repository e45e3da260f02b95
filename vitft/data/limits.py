"""Limits on the cost of decoding an image, checked on its bytes before a decoder sees them.

Decoders believe the file: they read all of it, allocate the chunk length it claims, and repeat as many scans as it
has. So a small file, or a sparse one, could take all memory, or minutes.
"""

import struct
from typing import BinaryIO

from PIL import Image, ImageFile

_CHUNK = 16_000_000  # bytes of a PNG chunk, which is read at once; profiles and texts have a hundredth of that
_BYTES_PER_PIXEL = 8  # stored: four channels of 16 bits
_WHOLE_BYTES_PER_PIXEL = 2  # in compressed formats whose whole file is read, twice, before a pixel is decoded
_PASSES = 20  # over the allowed pixels: a progressive JPEG has about ten, one for each scan
_JXL_CODESTREAM, _JXL_CONTAINER = b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n"


def check_bytes(stream: BinaryIO, size: int, max_pixels: int) -> str | None:
    """Why an encoded image of `size` bytes is too large; None if it is not."""
    head = stream.read(16)
    whole = (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:8] == b"ftyp" or is_jxl(head)
    allowed = (_WHOLE_BYTES_PER_PIXEL if whole else _BYTES_PER_PIXEL) * max_pixels + 1_000_000
    if size > allowed:
        return f"has {size:,} bytes, over the {allowed:,} that --max-pixels {max_pixels:,} allows for this format"
    return _long_chunk(stream) if head[:8] == b"\x89PNG\r\n\x1a\n" and size > _CHUNK else None


def _long_chunk(stream: BinaryIO) -> str | None:
    stream.seek(8)
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if length > _CHUNK and kind not in (b"IDAT", b"fdAT"):
            return f"has a chunk of {length:,} bytes besides its pixels, over {_CHUNK:,}; save it without metadata"
        stream.seek(length + 4, 1)
    return None


def check_scans(image: Image.Image, max_pixels: int) -> str | None:
    """Why an opened JPEG has too many scans; None if it does not.

    Each scan is a pass over all pixels, however few bytes it has. libjpeg-turbo leaves the limit to its callers
    (`djpeg -maxscans`, "Two Issues with the JPEG Standard", 2015).
    """
    if image.format not in ("JPEG", "MPO") or not isinstance(image, ImageFile.ImageFile) or image.fp is None:
        return None
    at = image.fp.tell()  # Pillow has read the header of the first scan, which lists its components
    components = getattr(image, "layers", 0)
    image.fp.seek(max(0, at - 8 - 2 * components))
    head = image.fp.read(5)
    scans = 1
    if image.info.get("progressive") or head[:2] != b"\xff\xda" or head[4] != components:
        scans += image.fp.read().count(b"\xff\xda")  # within a scan, 0xff is followed by 0x00 or a restart marker
    image.fp.seek(at)
    width, height = image.size
    allowed = _PASSES * max_pixels // max(1, width * height)
    if scans > allowed:
        return f"has {scans:,} scans, over the {allowed:,} that --max-pixels {max_pixels:,} allows at this size"
    return None


def is_jxl(head: bytes) -> bool:
    """Whether a file that begins with these bytes is JPEG XL."""
    return head.startswith((_JXL_CODESTREAM, _JXL_CONTAINER))


def jxl_size(stream: BinaryIO) -> tuple[int, int] | None:
    """Width and height from a JPEG XL header (ISO/IEC 18181-1, SizeHeader); None if there is no header.

    The Pillow plugin decodes the whole image when it opens it.
    """
    head = stream.read(12)
    if head == _JXL_CONTAINER:
        while len(box := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", box)
            skipped = 8
            if length == 1:
                (length,), skipped = struct.unpack(">Q", stream.read(8).rjust(8, b"\0")), 16
            if kind in (b"jxlc", b"jxlp"):
                stream.seek(4 if kind == b"jxlp" else 0, 1)  # a partial codestream begins with its number
                head = stream.read(12)
                break
            if length < skipped:  # the box extends to the end of the file, or is invalid
                return None
            stream.seek(length - skipped, 1)
    if not head.startswith(_JXL_CODESTREAM):
        return None
    rest = int.from_bytes(head[2:], "little")  # bit fields, lowest bit first; past the end, bits are 0

    def take(count: int) -> int:
        nonlocal rest
        value = rest & ((1 << count) - 1)
        rest >>= count
        return value

    def side() -> int:
        return 8 * (1 + take(5)) if small else 1 + take((9, 13, 18, 30)[take(2)])

    small = take(1)
    height = side()
    ratio = take(3)
    over, under = _RATIOS[ratio]
    return side() if ratio == 0 else height * over // under, height


_RATIOS = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
