"""What reading an encoded image would take, told by its bytes before a decoder sees them.

Decoders read what they are given: a whole file, a chunk as long as it says, a scan as often as it comes. So a file of
few bytes, or one with holes that take no room on the disk, could take all memory, or minutes.
"""

import struct
from typing import BinaryIO

from PIL import Image, ImageFile

_CHUNK = 16_000_000  # bytes of a PNG's chunk that is read at once; profiles and texts have a hundredth of that
_BYTES_PER_PIXEL = 8  # of a stored pixel: four colors of 16 bits
_WHOLE_BYTES_PER_PIXEL = 2  # where all of the file is read, twice, before a pixel is decoded: compressed formats
_PASSES = 20  # over the pixels that are allowed: a progressive JPEG has ten, one for each scan
_JXL_CODESTREAM, _JXL_CONTAINER = b"\xff\x0a", b"\x00\x00\x00\x0cJXL \r\n\x87\n"


def check_bytes(stream: BinaryIO, size: int, max_pixels: int) -> str | None:
    """What is too large about an encoded image of `size` bytes; None if nothing is. The stream is left at its start."""
    head = stream.read(16)
    whole = (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:8] == b"ftyp" or is_jxl(head)
    allowed = (_WHOLE_BYTES_PER_PIXEL if whole else _BYTES_PER_PIXEL) * max_pixels + 1_000_000
    found = None
    if size > allowed:
        found = f"has {size:,} bytes, over the {allowed:,} that --max-pixels {max_pixels:,} allows such a file"
    elif head[:8] == b"\x89PNG\r\n\x1a\n" and size > _CHUNK:
        found = _long_chunk(stream)
    stream.seek(0)
    return found


def _long_chunk(stream: BinaryIO) -> str | None:
    stream.seek(8)
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if length > _CHUNK and kind not in (b"IDAT", b"fdAT"):
            return f"has a chunk of {length:,} bytes beside its pixels, over {_CHUNK:,}; save it anew without"
        stream.seek(length + 4, 1)
    return None


def check_scans(image: Image.Image, max_pixels: int) -> str | None:
    """What is too much about the scans of an opened JPEG; None if nothing is.

    Each is a pass over all pixels, however few bytes it has. libjpeg-turbo leaves a limit to its callers
    (`djpeg -maxscans`, "Two Issues with the JPEG Standard", 2015).
    """
    if image.format not in ("JPEG", "MPO") or not isinstance(image, ImageFile.ImageFile) or image.fp is None:
        return None
    at = image.fp.tell()  # Pillow has read up to the first scan, and its header, which names components
    components = getattr(image, "layers", 0)
    image.fp.seek(max(0, at - 8 - 2 * components))
    head = image.fp.read(5)
    scans = 1
    if image.info.get("progressive") or head[:2] != b"\xff\xda" or head[4] != components:
        scans += image.fp.read().count(b"\xff\xda")  # within a scan 0xff is followed by 0x00 or a restart's number
    image.fp.seek(at)
    width, height = image.size
    allowed = _PASSES * max_pixels // max(1, width * height)
    if scans > allowed:
        return f"has {scans:,} scans, over the {allowed:,} that --max-pixels {max_pixels:,} allows so many pixels"
    return None


def is_jxl(head: bytes) -> bool:
    """Whether a file that begins so is JPEG XL."""
    return head.startswith((_JXL_CODESTREAM, _JXL_CONTAINER))


def jxl_size(stream: BinaryIO) -> tuple[int, int] | None:
    """Width and height as a JPEG XL's header has them (ISO/IEC 18181-1, SizeHeader); None where there is none.

    Its Pillow plugin decodes all of it when it opens it. The stream is left at its start.
    """
    try:
        return _jxl_size(stream)
    finally:
        stream.seek(0)


def _jxl_size(stream: BinaryIO) -> tuple[int, int] | None:
    head = stream.read(12)
    if head == _JXL_CONTAINER:
        while len(box := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", box)
            skipped = 8
            if length == 1:
                (length,), skipped = struct.unpack(">Q", stream.read(8).rjust(8, b"\0")), 16
            if kind in (b"jxlc", b"jxlp"):
                stream.seek(4 if kind == b"jxlp" else 0, 1)  # a part has its number first
                head = stream.read(12)
                break
            if length < skipped:  # it reaches to the end, or is none
                return None
            stream.seek(length - skipped, 1)
    if not head.startswith(_JXL_CODESTREAM):
        return None
    bits = _Bits(head[2:])
    small = bits.take(1)
    height = _side(bits, small)
    ratio = bits.take(3)
    over, under = _RATIOS[ratio]
    width = _side(bits, small) if ratio == 0 else height * over // under
    return width, height


def _side(bits: "_Bits", small: int) -> int:
    return 8 * (1 + bits.take(5)) if small else 1 + bits.take((9, 13, 18, 30)[bits.take(2)])


_RATIOS = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))


class _Bits:
    """Numbers of so many bits each, the lowest first; behind the end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self._rest = int.from_bytes(data, "little")

    def take(self, count: int) -> int:
        """The next number."""
        found = self._rest & ((1 << count) - 1)
        self._rest >>= count
        return found
