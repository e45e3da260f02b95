"""Data validation: find problems of a dataset in one pass over its images.

Each finding has a kind, and each kind a severity: an error stops training, a warning makes scores less meaningful, a
note is worth knowing.
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

from vitft.data.color import Range
from vitft.data.decoder import MAX_PIXELS, BadImage, choose_map, decode, encoded, image_info, unused_range
from vitft.data.sources.folders import Listing, relative
from vitft.data.sources.identity import rows_to_look_at, sample_id, sample_names
from vitft.data.sources.source import Source, class_indices, exclusion_line
from vitft.data.stores.store import naming
from vitft.io.console import counted

Severity = Literal["error", "warning", "note"]
Progress = Callable[[int, int], None]

KINDS: dict[str, tuple[Severity, str]] = {
    "empty": ("error", "zero bytes"),
    "not-an-image": ("error", "not in a readable image format"),
    "truncated": ("error", "the end of the file is missing"),
    "unreadable": ("error", "corrupt, missing, or not accessible"),
    "too-large": ("error", "more pixels than --max-pixels"),
    "value-range": ("error", "readable with another --value-range, or without"),
    "leak": ("warning", "the same pixels in two splits: scores count memorized images"),
    "near-leak": ("warning", "near duplicates in two splits"),
    "other-label": ("warning", "the same pixels with two labels"),
    "duplicate": ("warning", "the same pixels twice in a split"),
    "near-duplicate": ("note", "near duplicates in a split"),
    "not-compared": ("note", "too many photos to compare all of them for near duplicates"),
    "doubtful-label": ("warning", "the label may be wrong (vitft data doubt)"),
    "missing-class": ("warning", "a class without images in a split"),
    "similar-labels": ("warning", "labels that differ only in case, spacing or number format"),
    "reading": ("warning", "the dataset may have been read differently than intended"),
    "imbalance": ("note", "the largest class has over ten times the images of the smallest"),
    "wrong-extension": ("note", "the file extension does not match the format"),
    "rotated": ("note", "has an EXIF orientation, which other programs may ignore"),
    "unused-range": ("warning", "16-bit images so dark that they may have fewer bits"),
    "unusual-mode": ("note", "not 8-bit RGB or gray; it is converted"),
    "extreme-shape": ("note", "over four times as long as wide: most of it is squeezed or cropped away"),
    "passed-over": ("note", "a file beside the images that is not read"),
}
MIN_PHOTO = 64  # pixels of the shorter side: small pictures look alike by the thousand
MAX_PHOTOS = 100_000  # that are compared with each other
_MAX_ASPECT, _MAX_IMBALANCE = 4, 10
_MAX_HASH_DISTANCE, _MIN_CORRELATION = 12, 0.97  # of near duplicates: differing bits of 64, and of the thumbnails
_CHUNK = 256  # rows read at a time
_ROWS, _COLUMNS = 256, 1024  # size of a block of the comparison matrix


@dataclass(frozen=True)
class Finding:
    """A problem: its split, where (an image's id, a class or a split), its kind, and details."""

    split: str
    path: str
    kind: str
    severity: Severity
    detail: str

    @property
    def place(self) -> str:
        """Split and path, without repeating the split."""
        return self.path if not self.split or self.path.startswith(f"{self.split}/") else f"{self.split}: {self.path}"


@dataclass(frozen=True)
class _Image:
    """What is remembered of an image."""

    split: str
    path: str
    label: int
    problems: tuple[tuple[str, str], ...]  # kind and detail
    digest: bytes | None = None  # of the pixels; None if it could not be decoded
    phash: int | None = None  # 64-bit perceptual hash
    thumb: NDArray[np.float32] | None = None  # 16 x 16 thumbnail with mean 0 and norm 1: (256,)


def check(
    source: Source, folder: Path | None = None, *, max_pixels: int = MAX_PIXELS,
    value_range: Range | None = None, progress: Progress = lambda done, count: None,
) -> list[Finding]:  # fmt: skip
    """All findings. `folder` is where the images are, if they are files.

    Sorted by kind, errors first, and within a kind in the order of the dataset. Raises UnreadableError for an image
    that cannot be read now, but may be intact.
    """
    images: list[_Image] = []
    count = sum(len(split) for split in source.splits.values())
    for name, split in source.splits.items():
        for image in _inspect_split(str(name), split, max_pixels, value_range):
            images.append(image)
            progress(len(images), count)
    findings = [_finding(image.split, image.path, *problem) for image in images for problem in image.problems]
    findings += _exact_duplicates(images, source.labels)
    findings += _near_duplicates(images)
    findings += check_labels(source)
    findings += [_finding("", source.name, "reading", warning) for warning in source.warnings]
    if value_range is None:
        findings += [_finding(str(name), str(name), "unused-range", message) for name, split in source.splits.items()
                     if (message := unused_range(samples(split)))]  # fmt: skip
    if folder is not None:
        findings += _unused_files(folder, source)
    order = {kind: position for position, kind in enumerate(KINDS)}
    return sorted(findings, key=lambda finding: order[finding.kind])


def document(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as JSON-ready data."""
    counts = Counter(finding.kind for finding in findings)
    return {"findings": [asdict(finding) for finding in findings], "counts": dict(counts)}


def quarantine_lines(findings: Sequence[Finding]) -> list[str]:
    """Lines for `excluding`: the images that stop training, and all but one of exact duplicates.

    If two splits share an image, the later split keeps it: train gives way to test. Images that only need a value range
    are not left out.
    """
    errors = {kind for kind, (severity, _) in KINDS.items() if severity == "error"}
    kinds = {"duplicate", "leak", *errors} - {"value-range"}
    return list(dict.fromkeys(exclusion_line(f.split, f.path) for f in findings if f.kind in kinds))


def _finding(split: str, path: str, kind: str, detail: str) -> Finding:
    return Finding(split, path, kind, KINDS[kind][0], detail)


def samples(split: datasets.Dataset, count: int = 32) -> Iterator[bytes | Path]:
    """Encoded images, evenly spaced over a split. Raises UnreadableError for one that cannot be fetched now."""
    for row in rows_to_look_at(split, count):
        with naming(sample_id(split, row)):
            image = encoded(split[row]["image"])
        yield image


# -- one image ------------------------------------------------------------------------------------


def _inspect_split(
    split: str, rows: datasets.Dataset, max_pixels: int, value_range: Range | None
) -> Iterator[_Image]:  # fmt: skip
    labels = class_indices(rows)
    for start in range(0, len(rows), _CHUNK):
        index = np.arange(start, min(start + _CHUNK, len(rows)))
        cells = rows[start : start + _CHUNK]["image"]
        jobs = zip(sample_names(rows, index), labels[index].tolist(), cells, strict=True)
        yield from choose_map(cells)(lambda job: _inspect(split, job[0], job[1], job[2], max_pixels, value_range), jobs)


def _inspect(
    split: str, path: str, label: int, cell: dict[str, Any], max_pixels: int, value_range: Range | None
) -> _Image:  # fmt: skip
    try:
        with naming(path):
            source = encoded(cell)
            pixels = decode(source, max_pixels, value_range=value_range)
            info = image_info(source, max_pixels)
    except BadImage as error:
        return _Image(split, path, label, ((_error_kind(str(error)), str(error)),))
    problems = []
    suffix = Path(path).suffix.lower()
    expected = Image.registered_extensions().get(suffix)
    named = expected is not None or isinstance(source, Path)
    if named and expected != info.format and {expected, info.format} != {"JPEG", "MPO"}:
        problems.append(("wrong-extension", f"{suffix or 'no suffix'}, but it is a {info.format}"))
    if info.orientation != 1:
        problems.append(("rotated", f"EXIF orientation {info.orientation}"))
    if info.mode not in ("RGB", "L"):
        problems.append(("unusual-mode", info.mode))
    height, width = pixels.shape[:2]
    if max(height, width) > _MAX_ASPECT * min(height, width):
        problems.append(("extreme-shape", f"{width} x {height}"))
    digest = hashlib.blake2b(np.array(pixels.shape).tobytes() + pixels.tobytes(), digest_size=16).digest()
    phash, thumb = _fingerprint(pixels) if min(height, width) >= MIN_PHOTO else (None, None)
    return _Image(split, path, label, tuple(problems), digest, phash, thumb)


def _error_kind(reason: str) -> str:
    """The kind of a decoder's error message."""
    if any(words in reason for words in ("--value-range", "has 16 bits per color")):
        return "value-range"
    starts = {"is empty": "empty", "is not an image": "not-an-image", "is truncated": "truncated", "has ": "too-large"}
    return next((kind for start, kind in starts.items() if reason.startswith(start)), "unreadable")


def _fingerprint(pixels: NDArray[np.uint8]) -> tuple[int | None, NDArray[np.float32] | None]:
    """A photo's perceptual hash (Zauner 2010: signs of its lowest frequencies) and its thumbnail.

    Single-color images have neither, since they would all look alike.
    """
    from imagehash import phash

    small = Image.fromarray(pixels).convert("L").resize((64, 64), Image.Resampling.BOX)
    thumb = np.asarray(small.resize((16, 16), Image.Resampling.BOX), np.float32).ravel()
    thumb -= thumb.mean()
    if (length := float(np.linalg.norm(thumb))) < 16:
        return None, None
    return int(str(phash(small)), 16), thumb / length


# -- duplicates -----------------------------------------------------------------------------------


def _exact_duplicates(images: Sequence[_Image], labels: Sequence[str]) -> Iterator[Finding]:
    """Images with identical pixels. A finding names the image in the earlier split, or the later one in a split."""
    first: dict[bytes, dict[str, _Image]] = {}  # the first image with these pixels in each split
    for image in images:
        if image.digest is None:
            continue
        others = first.setdefault(image.digest, {})
        for split, other in others.items():
            if split == image.split:
                yield _finding(split, image.path, "duplicate", f"as {other.path}")
            else:
                yield _finding(split, other.path, "leak", f"as {image.path} of {image.split}")
            if other.label != image.label:
                detail = f"{labels[image.label]} here, {labels[other.label]} for {other.path} of {split}"
                yield _finding(image.split, image.path, "other-label", detail)
        others.setdefault(image.split, image)


def _near_duplicates(images: Sequence[_Image]) -> Iterator[Finding]:
    """Photos that look alike, each with the first match in each split; exact duplicates are left out.

    In the worst case all pairs are compared, at over 10^8 a second in NumPy. For photos with many matches, like video
    frames, the search ends at the first one. At most MAX_PHOTOS are compared, with a note about it.
    """
    photos = [image for image in images if image.phash is not None]
    if len(photos) > MAX_PHOTOS:
        detail = f"{len(photos):,} photos; the first {MAX_PHOTOS:,} were compared with each other"
        yield _finding("", "", "not-compared", detail)
        photos = photos[:MAX_PHOTOS]
    if len(photos) < 2:
        return
    hashes = np.array([photo.phash for photo in photos], np.uint64)
    thumbs = np.stack([photo.thumb for photo in photos if photo.thumb is not None])
    numbers: dict[bytes | None, int] = {}
    pixels = np.array([numbers.setdefault(photo.digest, len(numbers)) for photo in photos])
    splits = np.array([photo.split for photo in photos])
    for name in dict.fromkeys(splits.tolist()):
        members = np.flatnonzero(splits == name)
        members = members[np.sort(np.unique(pixels[members], return_index=True)[1])]  # without exact duplicates
        for row, earlier, correlation in _first_matches(hashes, thumbs, pixels, members):
            photo, other = photos[row], photos[earlier]
            detail = f"{min(99, int(100 * correlation))} % alike: "  # 100 % would be the same pixels
            if photo.split == other.split:
                yield _finding(photo.split, photo.path, "near-duplicate", detail + other.path)
            else:
                yield _finding(other.split, other.path, "near-leak", f"{detail}{photo.path} of {photo.split}")


def _first_matches(
    hashes: NDArray[np.uint64], thumbs: NDArray[np.float32], pixels: NDArray[np.int64], members: NDArray[np.int64]
) -> Iterator[tuple[int, int, float]]:
    """For each of n photos, the first earlier member that looks alike: both indices, and the correlation.

    hashes: (n,); thumbs: (n, 256); pixels: (n,), equal for exact duplicates; members: (m,) sorted indices.
    """
    for start in range(int(members[0]) + 1, len(hashes), _ROWS):
        unmatched = np.arange(start, min(start + _ROWS, len(hashes)))
        for begin in range(0, len(members), _COLUMNS):
            others = members[begin : begin + _COLUMNS]
            if len(unmatched) == 0 or others[0] >= unmatched[-1]:
                break
            near = np.bitwise_count(hashes[unmatched, None] ^ hashes[None, others]) <= _MAX_HASH_DISTANCE
            candidates = np.flatnonzero(near.any(axis=1))
            if len(candidates) == 0:
                continue
            rows = unmatched[candidates]
            correlation = thumbs[rows] @ thumbs[others].T
            match = near[candidates] & (correlation >= _MIN_CORRELATION)
            match &= (others < rows[:, None]) & (pixels[others] != pixels[rows, None])
            matched = np.flatnonzero(match.any(axis=1))
            for row, column in zip(matched.tolist(), match[matched].argmax(axis=1).tolist(), strict=True):
                yield int(rows[row]), int(others[column]), float(correlation[row, column])
            unmatched = np.delete(unmatched, candidates[matched])


# -- labels and files -----------------------------------------------------------------------------


def check_labels(source: Source) -> Iterator[Finding]:
    """Findings from the labels alone, without reading images."""
    for name, split in source.splits.items():
        counts = np.bincount(class_indices(split), minlength=len(source.labels))
        for index in np.flatnonzero(counts == 0):
            yield _finding(str(name), source.labels[index], "missing-class", "no image of it here")
        if (detail := imbalance(counts, source.labels)) is not None:
            yield _finding(str(name), str(name), "imbalance", detail)
    first: dict[str, str] = {}
    for label in source.labels:
        if (other := first.setdefault(_normalized(label), label)) != label:
            yield _finding("", label, "similar-labels", f"differs from {other!r} only in spelling")


def imbalance(counts: NDArray[np.int64], labels: Sequence[str]) -> str | None:
    """The largest and the smallest class, if one has over ten times the images of the other; else None.

    `counts`, (C,), are the images of each class; those without any do not count.
    """
    present = counts[counts > 0]
    if len(present) < 2 or present.max() <= _MAX_IMBALANCE * present.min():
        return None
    most, least = (labels[np.flatnonzero(counts == count)[0]] for count in (present.max(), present.min()))
    return f"{counted(present.max(), 'image')} of {most}, {present.min():,} of {least}"


def _normalized(label: str) -> str:
    """A label without differences in case, spacing and Unicode form; `07` and `7.0` become 7."""
    text = unicodedata.normalize("NFKC", label).casefold()
    if re.fullmatch(r"\d{1,15}(\.0*)?", text):
        return str(int(float(text)))
    return "".join(text.replace("_", " ").replace("-", " ").split())


def _unused_files(folder: Path, source: Source) -> Iterator[Finding]:
    """Files in a folder that are not read, and images that are in no split."""
    tree = Listing(folder).tree
    for path, kind in tree.other_files():
        detail = f"{kind}, which cannot be read" if kind else "not an image"
        yield _finding("", relative(path, tree.path), "passed-over", detail)
    read = {name for rows in source.splits.values() for name in sample_names(rows, np.arange(len(rows)))}
    for path in tree.files():
        if (name := relative(path, tree.path)) not in read:
            yield _finding("", name, "passed-over", "an image in no split")
