"""ICC profiles, made by hand: LittleCMS as Pillow has it makes none but sRGB's."""

import struct

import numpy as np

# Primaries adapted to D50, as CIE XYZ: of Adobe RGB (1998), and of sRGB.
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def _profile(space: bytes, connection: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, data = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", 0, b"\0" * 4, 0x02400000, kind, space, connection) + struct.pack(
        ">6H", *(2020, 1, 1, 0, 0, 0)
    )
    head += b"acsp" + b"\0" * 28 + struct.pack(">3I", *(round(x * 65536) for x in (0.9642, 1.0, 0.8249)))
    whole = head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data
    return struct.pack(">I", len(whole)) + whole[4:]


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(x * 65536) for x in values))


def _gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def rgb(primaries: tuple[tuple[float, ...], ...] = ADOBE_RGB, gamma: float = 2.2) -> bytes:
    """A monitor's profile: three primaries and a gamma."""
    tags = {f"{c}XYZ".encode(): _xyz(xyz) for c, xyz in zip("rgb", primaries, strict=True)}
    tags |= {f"{c}TRC".encode(): _gamma(gamma) for c in "rgb"}
    return _profile(b"RGB ", b"XYZ ", b"mntr", {b"wtpt": _xyz((0.9642, 1.0, 0.8249)), **tags})


def gray(gamma: float) -> bytes:
    """A gray profile."""
    return _profile(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": _xyz((0.9642, 1.0, 0.8249)), b"kTRC": _gamma(gamma)})


def cmyk(lightness: np.ndarray) -> bytes:
    """A printer's profile without colors: (2, 2, 2, 2) of L* (0 to 100) at no and full cyan, magenta, yellow, black."""
    ramp = bytes(range(256))
    nodes = np.stack([lightness * 2.55, np.full_like(lightness, 128), np.full_like(lightness, 128)], -1)
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut += ramp * 4 + nodes.round().astype(np.uint8).tobytes() + ramp * 3
    return _profile(b"CMYK", b"Lab ", b"prtr", {b"wtpt": _xyz((0.9642, 1.0, 0.8249)), b"A2B0": lut})
