"""Valid bytes, made invalid in the ways that break readers: a little, anywhere, most often past the header."""

import random
import re
from collections.abc import Callable, Sequence

_NUMBERS = [0, 1, 0x7F, 0x80, 0xFF]
_WORDS = [0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def mutated(
    data: bytes, others: Sequence[bytes], rng: random.Random, header: int = 0, tokens: Sequence[bytes] = ()
) -> bytes:
    """`data` with 1 to 8 changes, of which seven in ten spare the first `header` bytes.

    `others` are files of the same kind, to take pieces from, and `tokens` are words that mean something in it.
    """
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5, 8])):
        first = min(header, len(changed)) if rng.random() < 0.7 else 0
        ways = [*_WAYS, *([_token] * 3 if tokens else [])]
        rng.choice(ways)(changed, first, rng, tokens if tokens else others)
    return bytes(changed)


def _place(changed: bytearray, first: int, rng: random.Random) -> int:
    return rng.randrange(first, len(changed)) if first < len(changed) else len(changed)


def _flip(changed: bytearray, first: int, rng: random.Random, others: Sequence[bytes]) -> None:
    if (at := _place(changed, first, rng)) < len(changed):
        changed[at] ^= 1 << rng.randrange(8)


def _byte(changed: bytearray, first: int, rng: random.Random, others: Sequence[bytes]) -> None:
    if (at := _place(changed, first, rng)) < len(changed):
        changed[at] = rng.choice([*_NUMBERS, rng.randrange(256)])


def _word(changed: bytearray, first: int, rng: random.Random, others: Sequence[bytes]) -> None:
    width = rng.choice([2, 4])
    value = rng.choice(_WORDS) & (256**width - 1)
    at = _place(changed, first, rng)
    changed[at : at + width] = value.to_bytes(width, rng.choice(["big", "little"]))


def _cut(changed: bytearray, first: int, rng: random.Random, others: Sequence[bytes]) -> None:
    at = _place(changed, first, rng)
    del changed[at : at + rng.choice([1, 2, 4, 16, 256])]


def _end(changed: bytearray, first: int, rng: random.Random, others: Sequence[bytes]) -> None:
    del changed[_place(changed, first, rng) :]


def _repeat(changed: bytearray, first: int, rng: random.Random, others: Sequence[bytes]) -> None:
    at = _place(changed, first, rng)
    piece = bytes(changed[at : at + rng.choice([1, 4, 16, 256])])
    changed[at:at] = piece * rng.choice([1, 2, 50])


def _splice(changed: bytearray, first: int, rng: random.Random, others: Sequence[bytes]) -> None:
    other = rng.choice(others) if others else b"\xff" * 16
    start = rng.randrange(len(other)) if other else 0
    piece, at = other[start : start + rng.choice([4, 16, 256])], _place(changed, first, rng)
    changed[at : at + rng.choice([0, len(piece)])] = piece


def _token(changed: bytearray, first: int, rng: random.Random, tokens: Sequence[bytes]) -> None:
    """Put a word that means something in place of a value, or between two."""
    ends = [match.start() for match in re.finditer(rb"[\s:,\[\]{}\"]", bytes(changed)) if match.start() >= first]
    at = rng.choice(ends) + 1 if ends else len(changed)
    value = re.match(rb"[^\s,\]}]*", bytes(changed[at:]))
    length = len(value[0]) if value and rng.random() < 0.6 else 0
    changed[at : at + length] = rng.choice(tokens)


_WAYS: list[Callable[[bytearray, int, random.Random, Sequence[bytes]], None]] = [
    _flip, _flip, _byte, _byte, _word, _cut, _end, _repeat, _splice,
]  # fmt: skip
