"""The doctor: what is wrong with a data set, found in one pass over all of its images.

Each finding has a kind, and each kind a severity: an error stops training, a warning makes its scores worth
less, a note is worth knowing.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitft.data.augment import choose_map
from vitft.data.color import Range
from vitft.data.decoder import MAX_PIXELS, BadImage, decode, encoded, image_info, unused_range
from vitft.data.sources.folders import relative, scan
from vitft.data.sources.identity import sample_names
from vitft.data.sources.source import Source, class_indices, listed

Severity = Literal["error", "warning", "note"]
Progress = Callable[[int, int], None]

KINDS: dict[str, tuple[Severity, str]] = {
    "empty": ("error", "zero bytes"),
    "not-an-image": ("error", "no image of a format that is read"),
    "truncated": ("error", "the end of the file is missing"),
    "unreadable": ("error", "damaged, gone, or not to be opened"),
    "too-large": ("error", "more pixels than --max-pixels"),
    "leak": ("warning", "the same pixels in two splits: the score is of what was learned by heart"),
    "near-leak": ("warning", "almost the same photo in two splits"),
    "other-label": ("warning", "the same pixels with two labels"),
    "duplicate": ("warning", "the same pixels twice in a split"),
    "near-duplicate": ("note", "almost the same photo twice in a split"),
    "not-compared": ("note", "so many photos that not all were compared by their looks"),
    "missing-class": ("warning", "a class without an image in a split"),
    "similar-labels": ("warning", "labels that differ only in case, spacing or how a number is written"),
    "reading": ("warning", "what readers took for something else than it may be"),
    "imbalance": ("note", "the largest class has over ten times the images of the smallest"),
    "wrong-extension": ("note", "its name says another format than it has"),
    "rotated": ("note", "turned upright by its EXIF orientation, which other programs may not do"),
    "unused-range": ("warning", "16-bit images so dark that they may hold fewer bits"),
    "unusual-mode": ("note", "not 8-bit RGB or gray; it is converted"),
    "extreme-shape": ("note", "over four times as long as wide: much of it is squeezed or cut off"),
    "passed-over": ("note", "a file beside the images that is not read"),
}
PHOTO = 64  # pixels of the shorter side: smaller pictures resemble one another by the thousand
MANY = 100_000  # photos that are compared with one another
_LONG, _UNEQUAL = 4, 10
_BITS, _ALIKE = 12, 0.97  # photos are almost the same within so many of 64 bits, and this correlated
_CHUNK = 256  # rows read at a time
_BLOCK, _COMPARED = 256, 1024  # photos compared at a time, and with how many


@dataclass(frozen=True)
class Finding:
    """One thing: of which split, where (an image's id, a class or a split), what kind, and the particulars."""

    split: str
    path: str
    kind: str
    severity: Severity
    detail: str

    @property
    def place(self) -> str:
        """Split and path, without saying the split twice."""
        return self.path if not self.split or self.path.startswith(f"{self.split}/") else f"{self.split}: {self.path}"


@dataclass(frozen=True)
class _Seen:
    """An image that was looked at."""

    split: str
    path: str
    label: int
    problems: tuple[tuple[str, str], ...]  # kind and detail
    digest: bytes | None = None  # of its pixels; None: it could not be decoded
    sign: int | None = None  # 64 bits that resemble those of a photo that looks like it
    thumb: NDArray[np.float32] | None = None  # 256 numbers of mean 0 and length 1


def check(
    source: Source, folder: Path | None = None, *, max_pixels: int = MAX_PIXELS,
    value_range: Range | None = None, progress: Progress = lambda done, count: None,
) -> list[Finding]:  # fmt: skip
    """Everything that is wrong with a data set; `folder` is where it lies, if it is one of class folders.

    Errors come first, and within a kind the order is the data set's.
    """
    seen: list[_Seen] = []
    count = sum(len(split) for split in source.splits.values())
    for name, split in source.splits.items():
        for one in _look(str(name), split, max_pixels, value_range):
            seen.append(one)
            progress(len(seen), count)
    found = [_finding(one.split, one.path, *problem) for one in seen for problem in one.problems]
    found += _twins(seen, source.labels)
    found += _resembling(seen)
    found += check_labels(source)
    found += [_finding("", source.name, "reading", warning) for warning in source.warnings]
    if value_range is None:
        found += [_finding(str(name), str(name), "unused-range", said) for name, split in source.splits.items()
                  if (said := unused_range(some_of(split)))]  # fmt: skip
    if folder is not None:
        found += _beside(folder, source)
    places = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(found, key=lambda finding: places[finding.kind])


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """JSON-ready."""
    counts = Counter(finding.kind for finding in findings)
    return {"findings": [asdict(finding) for finding in findings], "counts": dict(counts)}


def quarantined(findings: Sequence[Finding]) -> list[str]:
    """Lines, for `excluding`, of images better left out: those that stop training, and all but one of the same.

    Of two splits that share an image, the later one keeps it: train gives way to test.
    """
    out = {"duplicate", "leak", *(kind for kind, (severity, _) in KINDS.items() if severity == "error")}
    return list(dict.fromkeys(listed(one.split, one.path) for one in findings if one.kind in out))


def _finding(split: str, path: str, kind: str, detail: str) -> Finding:
    return Finding(split, path, kind, KINDS[kind][0], detail)


def some_of(split: datasets.Dataset, count: int = 32) -> Iterator[bytes | Path]:
    """Encoded images from all over a split."""
    for row in np.unique(np.linspace(0, len(split) - 1, count).round().astype(int)) if len(split) else ():
        yield encoded(split[int(row)]["image"])


# -- one image ------------------------------------------------------------------------------------


def _look(
    split: str, rows: datasets.Dataset, max_pixels: int, value_range: Range | None
) -> Iterator[_Seen]:  # fmt: skip
    labels = class_indices(rows)
    for start in range(0, len(rows), _CHUNK):
        index = np.arange(start, min(start + _CHUNK, len(rows)))
        cells = rows[start : start + _CHUNK]["image"]
        jobs = zip(sample_names(rows, index), labels[index].tolist(), cells, strict=True)
        yield from choose_map(cells)(
            lambda job: _examined(split, job[0], job[1], job[2], max_pixels, value_range), jobs
        )


def _examined(
    split: str, path: str, label: int, cell: dict[str, Any], max_pixels: int, value_range: Range | None
) -> _Seen:  # fmt: skip
    source = encoded(cell)
    try:
        pixels = decode(source, max_pixels, value_range=value_range)
        said = image_info(source, max_pixels)
    except BadImage as error:
        return _Seen(split, path, label, ((_kind_of(str(error)), str(error)),))
    problems = []
    suffix = Path(path).suffix.lower()
    named = Image.registered_extensions().get(suffix)
    if named is None and isinstance(source, Path):
        problems.append(("wrong-extension", f"{suffix or 'no suffix'}, but it is a {said.format}"))
    elif named not in (None, said.format) and {named, said.format} != {"JPEG", "MPO"}:
        problems.append(("wrong-extension", f"{suffix}, but it is a {said.format}"))
    if said.orientation != 1:
        problems.append(("rotated", f"EXIF orientation {said.orientation}"))
    if said.mode not in ("RGB", "L"):
        problems.append(("unusual-mode", said.mode))
    height, width = pixels.shape[:2]
    if max(height, width) > _LONG * min(height, width):
        problems.append(("extreme-shape", f"{width} x {height}"))
    digest = hashlib.blake2b(np.array(pixels.shape).tobytes() + pixels.tobytes(), digest_size=16).digest()
    sign, thumb = _photo(pixels) if min(height, width) >= PHOTO else (None, None)
    return _Seen(split, path, label, tuple(problems), digest, sign, thumb)


def _kind_of(reason: str) -> str:
    """The kind of a decoder's complaint."""
    starts = {"is empty": "empty", "is not an image": "not-an-image", "is truncated": "truncated", "has ": "too-large"}
    return next((kind for start, kind in starts.items() if reason.startswith(start)), "unreadable")


def _photo(pixels: NDArray[np.uint8]) -> tuple[int | None, NDArray[np.float32] | None]:
    """A photo's perceptual hash (Zauner 2010: signs of its lowest frequencies) and its thumbnail.

    A picture of one colour has neither: it would resemble all others of one colour.
    """
    from imagehash import phash

    small = Image.fromarray(pixels).convert("L").resize((64, 64), Image.Resampling.BOX)
    thumb = np.asarray(small.resize((16, 16), Image.Resampling.BOX), np.float32).ravel()
    thumb -= thumb.mean()
    if (length := float(np.linalg.norm(thumb))) < 16:
        return None, None
    bits = phash(small).hash.ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), thumb / length


# -- images beside one another --------------------------------------------------------------------


def _twins(seen: Sequence[_Seen], labels: Sequence[str]) -> Iterator[Finding]:
    """Images with the very same pixels; what is found is said of the earlier split, else of the later image."""
    first: dict[bytes, list[_Seen]] = {}
    for one in seen:
        if one.digest is None:
            continue
        others = first.setdefault(one.digest, [])
        same = next((other for other in others if other.split == one.split), None)
        if same is not None:
            yield _finding(one.split, one.path, "duplicate", f"as {same.path}")
        for other in others:
            if other.split != one.split:
                yield _finding(other.split, other.path, "leak", f"as {one.path} of {one.split}")
            if other.label != one.label:
                detail = f"{labels[one.label]} here, {labels[other.label]} for {other.path} of {other.split}"
                yield _finding(one.split, one.path, "other-label", detail)
        if same is None:
            others.append(one)


def _resembling(seen: Sequence[_Seen]) -> Iterator[Finding]:
    """Photos that look the same, each with the first of each split that it resembles; those with the same pixels apart.

    All pairs may have to be looked at, which NumPy does at over 10^8 a second; but of photos that resemble many
    others, as the frames of a film do, the search ends at the first. Only so many are compared, and that is said.
    """
    photos = [one for one in seen if one.sign is not None]
    if len(photos) > MANY:
        detail = f"{len(photos):,} photos; the first {MANY:,} were compared with one another"
        yield _finding("", "", "not-compared", detail)
        photos = photos[:MANY]
    if len(photos) < 2:
        return
    signs = np.array([one.sign for one in photos], np.uint64)
    thumbs = np.stack([one.thumb for one in photos if one.thumb is not None])
    numbers: dict[bytes | None, int] = {}
    pixels = np.array([numbers.setdefault(one.digest, len(numbers)) for one in photos])
    splits = np.array([one.split for one in photos])
    for name in dict.fromkeys(splits.tolist()):
        members = np.flatnonzero(splits == name)
        # Of the same pixels the first is enough.
        members = members[np.sort(np.unique(pixels[members], return_index=True)[1])]
        for row, earlier, alike in _first_alike(signs, thumbs, pixels, members):
            one, other = photos[row], photos[earlier]
            detail = f"{min(99, int(100 * alike))} % alike: "  # all of it would be the same pixels
            if one.split == other.split:
                yield _finding(one.split, one.path, "near-duplicate", detail + other.path)
            else:
                yield _finding(other.split, other.path, "near-leak", f"{detail}{one.path} of {one.split}")


def _first_alike(
    signs: NDArray[np.uint64], thumbs: NDArray[np.float32], pixels: NDArray[np.int64], members: NDArray[np.int64]
) -> Iterator[tuple[int, int, float]]:
    """For each of n photos the first of the members, before it, that looks the same: both places, and how alike."""
    for start in range(int(members[0]) + 1, len(signs), _BLOCK):
        left = np.arange(start, min(start + _BLOCK, len(signs)))  # photos that none was found for yet
        for begin in range(0, len(members), _COMPARED):
            others = members[begin : begin + _COMPARED]
            if len(left) == 0 or others[0] >= left[-1]:
                break
            near = np.bitwise_count(signs[left, None] ^ signs[None, others]) <= _BITS
            some = np.flatnonzero(near.any(axis=1))
            if len(some) == 0:
                continue
            rows = left[some]
            alike = thumbs[rows] @ thumbs[others].T
            same = near[some] & (alike >= _ALIKE)
            same &= (others < rows[:, None]) & (pixels[others] != pixels[rows, None])
            found = np.flatnonzero(same.any(axis=1))
            for place, first in zip(found.tolist(), same[found].argmax(axis=1).tolist(), strict=True):
                yield int(rows[place]), int(others[first]), float(alike[place, first])
            left = np.delete(left, some[found])


# -- labels and files -----------------------------------------------------------------------------


def check_labels(source: Source) -> Iterator[Finding]:
    """What the labels alone tell: no image is read."""
    for name, split in source.splits.items():
        counts = np.bincount(class_indices(split), minlength=len(source.labels))
        for index in np.flatnonzero(counts == 0):
            yield _finding(str(name), source.labels[index], "missing-class", "no image of it here")
        some = counts[counts > 0]
        if len(some) > 1 and some.max() > _UNEQUAL * some.min():
            most, least = (source.labels[np.flatnonzero(counts == n)[0]] for n in (some.max(), some.min()))
            detail = f"{some.max():,} images of {most}, {some.min():,} of {least}"
            yield _finding(str(name), str(name), "imbalance", detail)
    spelled: dict[str, str] = {}
    for label in source.labels:
        plain = _plain(label)
        if plain in spelled:
            yield _finding("", label, "similar-labels", f"differs from {spelled[plain]!r} in how it is written alone")
        spelled.setdefault(plain, label)


def _plain(label: str) -> str:
    """A label without what differs by hand or by program alone: case, spacing, Unicode form, `07` and `7.0` for 7."""
    text = unicodedata.normalize("NFKC", label).casefold()
    if re.fullmatch(r"\d{1,15}(\.0*)?", text):
        return str(int(float(text)))
    return "".join(text.replace("_", " ").replace("-", " ").split())


def _beside(folder: Path, source: Source) -> Iterator[Finding]:
    """Files of a folder that are not read, and images that belong to no split of the data set."""
    tree = scan(folder).tree
    for path, kind in tree.passed():
        detail = f"{kind}, which is not read" if kind else "no image"
        yield _finding("", relative(path, tree.path), "passed-over", detail)
    read = {name for rows in source.splits.values() for name in sample_names(rows, np.arange(len(rows)))}
    for path in tree.files():
        if (name := relative(path, tree.path)) not in read:
            yield _finding("", name, "passed-over", "an image of no split")
