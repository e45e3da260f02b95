"""Pack a dataset into parquet shards, which vitft, `datasets` and the hub read: few large files instead of many small.

Shards have their images in random order, so that each is a sample of its split. Which images they have depends on the
dataset and the settings alone; each is whole or absent and says of what it is a part, so that a killed command goes on.
What is streamed is fetched once, in the order of a training: images move among some dozens of the parts it comes in.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from vitft.data.color import Range
from vitft.data.decoder import BadImage, Unavailable, decode, encoded, header, image_info
from vitft.data.sampling import streamed_order
from vitft.data.sources.identity import (
    blocks_of,
    content_hashes,
    has_names,
    is_streamed,
    keys_of,
    sample_id,
    sample_names,
)  # fmt: skip
from vitft.data.sources.local import by_split
from vitft.data.sources.source import Source, class_indices
from vitft.data.stores.store import Skipped, UnreadableError
from vitft.data.streaming.remote import SUMS
from vitft.data.streaming.shards import fetch_ahead, is_address, mean_size
from vitft.errors import UsageError
from vitft.hardware.pools import map_in_groups, map_in_processes, processes
from vitft.io.atomic import clean_up, lock_folder, new_file, write_text

# Images of a row group, which readers load at once: more if they have fewer bytes, and fewer if they have more.
_ROW_GROUP, _SMALL_GROUP, _LARGE_GROUP = 200, 4_000_000, 16_000_000
_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF", "JXL")
_META = "vitft"
_CHUNK = 1000  # rows


@dataclass(frozen=True)
class Packed:
    """What was written: shards, images, bytes, and the images that could not be read."""

    folder: Path
    shards: int
    images: int
    size: int
    skipped: list[Skipped]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"folder": str(self.folder)}


@dataclass(frozen=True)
class _Shard:
    """A file to write: its name, and the rows of a split that it has."""

    name: str
    split: str
    rows: NDArray[np.int64]


def pack(
    source: Source, folder: Path, *, resize: int | None = None, shard_bytes: int = 500_000_000, skip_bad: bool = False,
    max_pixels: int, value_range: Range | None = None, progress: Callable[[int, int], None] = lambda done, count: None,
) -> Packed:  # fmt: skip
    """Write every split of a dataset to `folder` as SPLIT-00000-of-N.parquet, and the checksums of the files.

    A shard has at most `shard_bytes` of encoded images, or a single one; of streamed ones, which are not looked at
    before, so many that they have that on average. With `resize`, images whose shorter side is
    longer than that are decoded and shrunk to it; all others are copied bit for bit, and so are those of more than 8
    bits, unless `value_range` says what is black and white in them. Shards that an earlier, killed
    call has written stay. Raises UsageError for a folder with anything else in it, and UnreadableError for images that
    cannot be read, unless `skip_bad`.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose a new folder.")
    # What is streamed is identified by its place, and by the version of the dataset: see `_digest`.
    hashes = {
        str(name): (sample_names if is_streamed(split) else content_hashes)(split, np.arange(len(split)))
        for name, split in source.splits.items()
    }
    shards = [shard for name in hashes for shard in _plan(source, name, hashes[name], shard_bytes)]
    _check_names(shards)
    plan = _digest(source, shards, hashes, [resize, max_pixels, value_range])
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder) as alone:
        if not alone:
            raise UsageError(f"{folder}: another process is writing it.")
        _check_folder(folder, plan, {shard.name for shard in shards})
        clean_up(folder)
        missing = [shard for shard in shards if not (folder / shard.name).exists()]
        make = partial(_packed, resize=resize, max_pixels=max_pixels, value_range=value_range)
        write = partial(_write, source, folder, plan, make, skip_bad)
        count = min(processes(), len(missing))
        for number, bad in enumerate(map_in_processes(write, missing, count) if count else map(write, missing)):
            if bad and not skip_bad:
                raise UnreadableError.of(bad, "fix or remove it and choose a new folder")
            progress(len(shards) - len(missing) + number + 1, len(shards))
        files = [folder / shard.name for shard in shards]
        sums = list(map_in_groups(_sha256, files))
        write_text(folder / SUMS, "".join(f"{each}  {file.name}\n" for each, file in zip(sums, files, strict=True)))
    heads = [pq.read_metadata(file) for file in files]
    skipped = [Skipped(*one) for head in heads for one in _about(head)["skipped"]]
    return Packed(
        folder, len(files), sum(head.num_rows for head in heads), sum(file.stat().st_size for file in files), skipped
    )


def _plan(source: Source, name: str, hashes: list[str], shard_bytes: int) -> Iterator[_Shard]:
    """The shards of a split: its images in the order of a hash of their content hashes, or as they are streamed."""
    split = source.splits[name]
    if is_streamed(split):
        order = streamed_order(blocks_of(split), seed=0, epoch=0, batch_size=1)
    else:
        order = np.argsort(keys_of(hashes), kind="stable")
    ends, filled = [], 0
    for place, size in enumerate(_sizes(split)[order].tolist()):
        if filled and filled + size > shard_bytes:
            ends.append(place)
            filled = 0
        filled += size
    parts = np.split(order, ends) if len(order) else []
    for number, part in enumerate(parts):
        yield _Shard(f"{name}-{number:05}-of-{len(parts):05}.parquet", name, part)


def _sizes(split: datasets.Dataset) -> NDArray[np.int64]:
    """Bytes of each encoded image, 0 where there is no file; of one that is streamed, the mean of its shard: (n,)."""

    def size(cell: dict[str, Any]) -> int:
        if is_address(cell["path"]):
            return mean_size(cell["path"])
        source = encoded(cell)
        if not isinstance(source, Path):
            return len(source)
        return source.stat().st_size if source.is_file() else 0

    starts = range(0, len(split), _CHUNK)
    return np.array([n for s in starts for n in map_in_groups(size, split[s : s + _CHUNK]["image"])], np.int64)


def _check_names(shards: Sequence[_Shard]) -> None:
    """Raise UsageError if the shards would be read as other splits than they are of."""
    read = {file.name: split for split, files in by_split([Path(s.name) for s in shards]).items() for file in files}
    for shard in shards:
        if read.get(shard.name) != shard.split:
            raise UsageError(
                f"split {shard.split}: no file name would be read back as this split; name the splits train, "
                "validation and test."
            )


def _digest(source: Source, shards: Sequence[_Shard], hashes: dict[str, list[str]], settings: list[Any]) -> str:
    """What the shards depend on, as a hash."""
    if any(map(is_streamed, source.splits.values())):
        settings = [*settings, source.revision]
    digest = hashlib.blake2b(json.dumps([list(source.labels), settings]).encode(), digest_size=8)
    for shard in shards:
        digest.update("".join([shard.name, *(hashes[shard.split][row] for row in shard.rows.tolist())]).encode())
        digest.update(class_indices(source.splits[shard.split])[shard.rows].tobytes())
    return digest.hexdigest()


def _check_folder(folder: Path, plan: str, names: set[str]) -> None:
    """Raise UsageError if there is anything but shards of this plan, and what file managers leave in every folder."""
    for file in sorted(folder.iterdir()):
        if file.name in {SUMS, ".DS_Store", "Thumbs.db", "desktop.ini"}:
            continue
        if file.name in {f".{name}.vitft-new" for name in (*names, SUMS)}:
            continue
        if file.name not in names:
            raise UsageError(f"{folder} holds {file.name}, which is no part of this dataset; choose a new folder.")
        try:
            same = _about(pq.read_metadata(file))["plan"] == plan
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UsageError(f"{file} was packed from other images, or with other settings; choose a new folder.")


def _about(metadata: pq.FileMetaData) -> dict[str, Any]:
    return dict(json.loads((metadata.metadata or {})[_META.encode()]))


def _write(
    source: Source, folder: Path, plan: str, make: Callable[[bytes | Path], bytes], skip_bad: bool, shard: _Shard
) -> list[Skipped]:  # fmt: skip
    """Write a shard of the bytes that `make` gives of each image; returns the images that cannot be read.

    If there are any, it is written only with `skip_bad`.
    """
    split, labels, bad = source.splits[shard.split], class_indices(source.splits[shard.split]), []
    schema = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(source.labels))
    ).arrow_schema
    with suppress(_Stop), new_file(folder / shard.name) as file:
        with pq.ParquetWriter(
            file, schema, compression="none", use_dictionary=["label"], write_page_checksum=True
        ) as writer:  # fmt: skip
            images: list[dict[str, Any]] = []
            kept: list[int] = []
            size = 0
            for start in range(0, len(shard.rows), _ROW_GROUP):
                rows = shard.rows[start : start + _ROW_GROUP]
                if is_streamed(split):
                    coming = split[shard.rows[start : start + 2 * _ROW_GROUP]]["image"]
                    fetch_ahead(cell["path"] for cell in coming)
                for row, cell in zip(rows.tolist(), split[rows]["image"], strict=True):
                    name = sample_id(split, row)
                    # Paths of files that have no such name may be of this machine alone.
                    path = name if has_names(split) else cell["path"] if cell["bytes"] is not None else None
                    try:
                        raw = make(encoded(cell))
                    except Unavailable as error:
                        raise UnreadableError.for_now(name, error) from error
                    except BadImage as error:
                        bad.append(Skipped(row, name, str(error)))
                        continue
                    images.append({"bytes": raw, "path": path})
                    kept.append(row)
                    size += len(raw)
                    if size >= (_SMALL_GROUP if len(images) >= _ROW_GROUP else _LARGE_GROUP):
                        writer.write_table(pa.table({"image": images, "label": labels[kept]}, schema))
                        images, kept, size = [], [], 0
            if images:
                writer.write_table(pa.table({"image": images, "label": labels[kept]}, schema))
            about = {"plan": plan, "skipped": [[one.position, one.name, one.reason] for one in bad]}
            writer.add_key_value_metadata({_META: json.dumps(about)})
        if bad and not skip_bad:
            raise _Stop
    return bad


class _Stop(Exception):  # noqa: N818
    """Raised to leave a file unwritten."""


def _packed(source: bytes | Path, *, resize: int | None, max_pixels: int, value_range: Range | None) -> bytes:
    """An image's bytes, of a shrunk copy if it is larger than `resize`. Raises BadImage."""
    deep = value_range is None and image_info(source, max_pixels).is_deep
    width, height, kind = header(source, max_pixels)
    if resize is None or deep or min(width, height) <= resize:
        try:
            return source.read_bytes() if isinstance(source, Path) else source
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
    image = Image.fromarray(decode(source, max_pixels, value_range=value_range))
    scale = resize / min(image.size)
    width, height = (max(resize, round(side * scale)) for side in image.size)
    stream = BytesIO()
    shrunk = image.resize((width, height), Image.Resampling.LANCZOS)
    if kind in _LOSSY:
        shrunk.save(stream, "JPEG", quality=95, subsampling=0)
    else:
        shrunk.save(stream, "PNG")
    return stream.getvalue()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
