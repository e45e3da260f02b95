"""Datasets of shards behind a URL: labels are read now, images when they are needed."""

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import HfApi

from vitft.data.sources import archives, features, hub
from vitft.data.sources.folders import Folder, OtherFile
from vitft.data.sources.local import find_files
from vitft.data.sources.schema import (
    BLOCK,
    COLUMNS,
    NAME,
    OF_TEXT,
    Notes,
    ReadOptions,
    Splits,
    image_structs,
    in_memory,
)
from vitft.data.streaming import blocks, tars
from vitft.data.streaming.parquet import ParquetShard, open_parquet
from vitft.data.streaming.remote import RemoteFile, in_requests, list_files, reason
from vitft.data.streaming.shards import Shard
from vitft.errors import DataError, UsageError
from vitft.io.console import without_secrets
from vitft.io.paths import expanded

_PARQUET, _TAR, _FILE = ".parquet", ".tar", "file://"
_CONVERTED = "refs/convert/parquet"  # where the hub keeps what it has made of datasets in other formats
_SORTED = 0.5  # how much more often two images that are fetched together are of one class than any two

Part = tuple[str, features.Normalized]  # a shard's URL, to be shown, and its images, as addresses, and labels


def read(url: str, options: ReadOptions, notes: Notes, inside: str = "") -> tuple[Splits, str]:
    """Raw splits, and a hash that changes when the shards do. Raises VitftError.

    `inside`: the folder, below the URL, to which shards are restricted.
    """
    url = _pinned(_of_file(url))
    shown, files = without_secrets(url), list_files(url, (_PARQUET, _TAR))
    base = _base(url, files)
    files = [file for file in files if file.url.removeprefix(base).startswith(inside and f"{inside}/")]
    if not files:
        where = f"{shown}/{inside}" if inside else shown
        remedy = "`vitft data pack DATASET FOLDER` makes some, then copy the folder."
        if url.startswith(_FILE):
            remedy = f"for a folder of images leave {_FILE} out."
        raise DataError(f"{where} has no .parquet or .tar files; {remedy}")
    if part := next((file.url for file in files if "/partial-" in file.url), None):  # of the hub
        raise DataError(f"{without_secrets(part)}: the hub has converted only a part of it; leave --streaming out.")
    kind = next((kind for kind in (_PARQUET, _TAR) if any(_is(kind, file.url) for file in files)), "")
    by_path = {Path(file.url.removeprefix(base)): file for file in files if _is(kind, file.url)}
    if len(by_path) < len(files):
        notes.warn(f"only the {len(by_path):,} parquet files are read, not the tar files beside them")
    names = find_files(_tree(by_path, shown), partial(_is, kind))
    chosen = {split: [by_path[path.relative_to(shown)] for path in paths] for split, paths in names.items()}
    every = [file for of_split in chosen.values() for file in of_split]
    disk = 0 if url.startswith(_FILE) else int(options.stream_gb * 1e9)
    options.refuse(f"{shown} has {kind} shards, which are not text", *OF_TEXT)
    if kind == _PARQUET:
        splits = _read_parquet(chosen, base, disk, Path(shown), options, notes)
    else:
        options.refuse(f"{shown} has {kind} shards, not a table", *COLUMNS)
        splits = _read_tars(chosen, base, disk, notes)
    for name, split in splits.items():
        _tell_sorted(name, split, notes)
    return splits, _version(every, base)


def read_hub(
    repo: str, config: str | None, revision: str | None, options: ReadOptions, notes: Notes
) -> tuple[Splits, str | None]:
    """Raw splits of a hub dataset's parquet files, or of those that the hub has made of it, and their commit.

    Raises DataError.
    """
    for branch in (revision, _CONVERTED):
        try:
            commit = HfApi().dataset_info(repo, revision=branch).sha
            files = HfApi().list_repo_files(repo, revision=commit, repo_type="dataset")
        except Exception as error:  # huggingface_hub and its HTTP client each raise their own
            raise DataError(hub.failure(repo, config, branch, error)) from error
        if any(_is(kind, file) for file in files for kind in (_PARQUET, _TAR)):
            return read(f"hf://datasets/{repo}@{commit}", options, notes, config or "")[0], commit
        if revision is not None:
            break
    raise DataError(f"hub dataset {repo} has no parquet files, so that it cannot be streamed; leave --streaming out.")


def _of_file(url: str) -> str:
    """A file:// URL as fsspec reads it, with a path that is not encoded; others unchanged. Raises UsageError."""
    match = re.match(r"file://(?:localhost(?=/))?", url, re.IGNORECASE)
    if match is None:
        return url
    path = url[match.end() :]
    if not path.startswith("/"):
        raise UsageError(
            f"{url}: the path after {_FILE} is absolute: {_FILE}{expanded(path).absolute()}; or leave {_FILE} out."
        )
    given, *pattern = re.split(r"(?=[*{?])", path, maxsplit=1)
    is_encoded = not Path(given.rpartition("/")[0] if pattern else given).exists()
    return _FILE + (unquote(path) if is_encoded else path)


def _pinned(url: str) -> str:
    """A URL of a hub dataset with its commit, so that nothing changes while it is read; others unchanged."""
    match = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)((?:/.*)?)", url)
    if match is None:
        return url
    try:
        return f"hf://datasets/{match[1]}@{HfApi().dataset_info(match[1]).sha}{match[2]}"
    except Exception as error:  # huggingface_hub and its HTTP client each raise their own
        raise DataError(hub.failure(match[1], None, None, error)) from error


def _is(kind: str, name: str) -> bool:
    return name.split("?")[0].endswith(kind)


def _base(url: str, files: Sequence[RemoteFile]) -> str:
    """What comes before the names of files: the folder that the URL gives, or for several its part before those."""
    given = re.split(r"[*{?]", url)[0]
    folder = given.rstrip("/") + "/"
    if given != url or not all(file.url.startswith(folder) for file in files):  # a file, or a pattern
        folder = given.rpartition("/")[0] + "/"
    if all(file.url.startswith(folder) for file in files):
        return folder
    levels = zip(*(file.url.split("?")[0].split("/")[:-1] for file in files), strict=False)  # the URL was rewritten
    return "".join(f"{names[0]}/" for names in takewhile(lambda names: len({*names}) == 1, levels))


def _tree(files: Collection[Path], root: str) -> Folder:
    """The folders of files, as if they were listed."""
    tree = Folder(root, root)
    for path in sorted(files):
        folder = tree
        for part in path.parts[:-1]:
            inner = next((each for each in folder.folders if each.name == part), None)
            if inner is None:
                inner = Folder(f"{folder.path}/{part}", part)
                folder.folders.append(inner)
            folder = inner
        folder.others.append(OtherFile(path.name, ""))
    return tree


def _split(name: str, parts: Sequence[Part], shards: Sequence[Shard], names: Iterator[str], block: int) -> Any:
    """A raw split of shards, whose first block has the number `block`."""
    split = features.concatenate(parts, name)
    columns = {column: split.data.column(column) for column in split.column_names}
    columns[NAME] = pa.array(names, pa.string())
    before = np.cumsum([block, *(len(shard.first) for shard in shards)])
    columns[BLOCK] = pa.array(np.concatenate([start + _blocks(shard) for start, shard in zip(before, shards)]))  # noqa: B905
    label = split.features.get("label")
    return in_memory(columns, label.names if isinstance(label, datasets.ClassLabel) else None, name)


def _blocks(shard: Shard) -> Any:
    """The number of each row's block: (n,)."""
    sizes = [end - start for start, end in pairwise([*shard.first.tolist(), shard.count])]
    return np.repeat(np.arange(len(sizes)), sizes)


# -- parquet ----------------------------------------------------------------------------------------


def _read_parquet(
    files: dict[str, list[RemoteFile]], base: str, disk: int, where: Path, options: ReadOptions, notes: Notes
) -> Splits:  # fmt: skip
    splits: Splits = {}
    shards: list[ParquetShard] = []
    for name, of_split in files.items():
        own = list(in_requests(partial(open_parquet, disk=disk), of_split))
        parts = [_parquet_part(name, shard, options, notes) for shard in own]
        names = (f"{_name(shard, base)}/{row}" for shard in own for row in range(shard.count))
        splits[name] = _split(name, parts, own, names, sum(len(shard.first) for shard in shards))
        shards += own

    def read_all(names: list[str]) -> pa.Table:
        return pa.concat_tables([shard.read_columns(names) for shard in shards], promote_options="permissive")

    return features.divide(splits, features.features_of(shards[0].schema), read_all, where, options, notes)


def _parquet_part(split: str, shard: ParquetShard, options: ReadOptions, notes: Notes) -> Part:
    where = without_secrets(shard.file.url)

    def read_part(names: list[str]) -> pa.Table:
        image, *others = names
        kind = shard.schema.field(image).type
        inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
            raise DataError(
                f"{where}: column {image!r} holds {kind}; only encoded images can be streamed: see `vitft data pack`."
            )
        columns = {image: image_structs(None, shard.addresses(image))}
        if others:
            columns |= zip(others, shard.read_columns(others).columns, strict=True)
        return pa.table(columns)

    try:
        return where, features.normalize(split, features.features_of(shard.schema), read_part, options, notes)
    except DataError as error:
        raise error if where in str(error) else DataError(f"{where}: {error}") from error


def _name(shard: Shard, base: str) -> str:
    return shard.file.url.removeprefix(base).split("?")[0]


# -- WebDataset -------------------------------------------------------------------------------------


def _read_tars(files: dict[str, list[RemoteFile]], base: str, disk: int, notes: Notes) -> Splits:
    splits: Splits = {}
    block = 0
    for name, of_split in files.items():
        tables = list(in_requests(_index, of_split))
        if all(table.column("label").null_count == len(table) for table in tables):
            where = without_secrets(of_split[0].url)
            raise DataError(f"{where} has no image with a .cls or .json beside it; see `vitft data pack`.")
        own = [
            tars.tar_shard(file, disk, table.column("start").to_numpy(), table.column("size").to_numpy())
            for file, table in zip(of_split, tables, strict=True)
        ]
        parts: list[Part] = [
            (
                without_secrets(shard.file.url),
                features.Normalized(
                    pa.chunked_array([image_structs(None, shard.addresses("image"))]), table.column("label")
                ),
            )
            for shard, table in zip(own, tables, strict=True)
        ]
        inner = zip(own, tables, strict=True)
        names = (f"{_name(shard, base)}/{one}" for shard, table in inner for one in table.column("name").to_pylist())
        splits[name] = _split(name, parts, own, names, block)
        block += sum(len(shard.first) for shard in own)
    count = sum(map(len, files.values()))
    notes.decide(f"{count:,} WebDataset shards: labels are in the .cls or .json beside each image")
    return splits


def _index(file: RemoteFile) -> pa.Table:
    """Name, label and place of each image of a tar, with a pass over it, whose result is kept. Raises DataError."""
    where = without_secrets(file.url)

    def make() -> pa.Table:
        members = ((one.name, one.size, one, content.read) for one, content in tars.walk(file))
        rows = archives.label_members(where, members)
        rows = sorted(rows, key=lambda row: row[2].start)
        return pa.table(
            {
                "name": pa.array([name for name, _, _ in rows], pa.string()),
                "label": pa.array([label for _, label, _ in rows], pa.string()),
                "start": pa.array([one.start for _, _, one in rows], pa.int64()),
                "size": pa.array([one.size for _, _, one in rows], pa.int64()),
            }
        )

    try:
        if not file.version:  # what has changed would not be noticed
            return make()
        return blocks.index(f"{file.url} {file.version} {file.size} {_TAR}", make)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{where}: {reason(error)}.") from error
    except Exception as error:  # tarfile raises many
        raise DataError(f"{where} is not a readable archive: {' '.join(str(error).split())[:200]}") from error


def _version(files: Sequence[RemoteFile], base: str) -> str:
    """16 hex digits, of the names, sizes and versions of files."""
    known = sorted((file.url.removeprefix(base), file.size, file.version) for file in files)
    return hashlib.blake2b(repr(known).encode(), digest_size=8).hexdigest()


def _tell_sorted(name: str, split: datasets.Dataset, notes: Notes) -> None:
    """Warn if images that are fetched together are mostly of the same class: batches would be, too."""
    if "label" not in split.features or not len(split):
        return
    words = pc.fill_null(split.data.column("label").cast(pa.string()), "").combine_chunks()
    labels = np.asarray(words.dictionary_encode().indices, np.int64)
    of_row = np.asarray(split.data.column(BLOCK), np.int64)
    everywhere = np.bincount(labels) / len(labels)
    pairs, counts = np.unique(of_row * (labels.max() + 1) + labels, return_counts=True)
    of_block = np.bincount(of_row)[pairs // (labels.max() + 1)]
    alike = float((counts * counts / of_block).sum() / len(labels))  # the chance that two of a block have one class
    if alike - float((everywhere**2).sum()) > _SORTED:
        notes.warn(
            f"split {name}: its shards are sorted by class, so that a batch has few classes at a time; "
            "`vitft data pack` makes shards in random order"
        )
