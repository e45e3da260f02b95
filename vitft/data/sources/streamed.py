"""Datasets of parquet shards behind a URL: labels are read now, images when they are needed."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from huggingface_hub import HfApi

from vitft.data.sources import features, hub
from vitft.data.sources.folders import Folder, OtherFile
from vitft.data.sources.local import find_files
from vitft.data.sources.schema import BLOCK, NAME, Notes, ReadOptions, Splits, image_structs, in_memory
from vitft.data.streaming.remote import RemoteFile, in_requests, list_files
from vitft.data.streaming.shards import Shard, addresses, open_shard, read_columns
from vitft.errors import DataError
from vitft.io.console import without_secrets

_SUFFIX = ".parquet"
_CONVERTED = "refs/convert/parquet"  # where the hub keeps what it has made of datasets in other formats
_SORTED = 0.5  # how much more often two images that are fetched together are of one class than any two


def read(url: str, options: ReadOptions, notes: Notes, inside: str = "") -> tuple[Splits, str]:
    """Raw splits, and a hash that changes when the shards do. Raises VitftError.

    `inside`: the folder, below the URL, to which shards are restricted.
    """
    shown, files = without_secrets(url), list_files(url, _SUFFIX)
    base = _folder(files)
    files = [file for file in files if file.url.removeprefix(base).startswith(inside and f"{inside}/")]
    if not files:
        where = f"{shown}/{inside}" if inside else shown
        raise DataError(
            f"{where} has no parquet files; `vitft data pack DATASET FOLDER` makes them, then copy the folder."
        )
    by_path = {Path(file.url.removeprefix(base)): file for file in files}
    names = find_files(_tree(by_path, shown), lambda name: name.endswith(_SUFFIX))
    chosen = {split: [by_path[path.relative_to(shown)] for path in paths] for split, paths in names.items()}
    every = [file for of_split in chosen.values() for file in of_split]
    disk = 0 if url.startswith("file:") else int(options.stream_gb * 1e9)
    shards = dict(zip((file.url for file in every), in_requests(partial(open_shard, disk=disk), every), strict=True))
    starts = np.cumsum([0, *(len(shards[file.url].first) for file in every)])[:-1].tolist()
    first_block = dict(zip(shards, starts, strict=True))
    splits = {}
    for name, of_split in chosen.items():
        parts = [_part(name, shards[file.url], options, notes) for file in of_split]
        split = features.concatenate(parts, name)
        columns = {column: split.data.column(column) for column in split.column_names}
        own = [shards[file.url] for file in of_split]
        columns[NAME] = pa.array(_names(own, base), pa.string())
        columns[BLOCK] = pa.array(np.concatenate([first_block[shard.file.url] + _blocks(shard) for shard in own]))
        label = split.features.get("label")
        splits[name] = in_memory(columns, label.names if isinstance(label, datasets.ClassLabel) else None, name)
    first = next(iter(shards.values()))

    def read_all(names: list[str]) -> pa.Table:
        return pa.concat_tables([read_columns(shard, names) for shard in shards.values()], promote_options="permissive")

    divided = features.divide(splits, _features(first), read_all, Path(shown), options, notes)
    for name, split in divided.items():
        _tell_sorted(name, split, notes)
    return divided, _version(every, base)


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
        if any(file.endswith(_SUFFIX) for file in files):
            return read(f"hf://datasets/{repo}@{commit}", options, notes, config or "")[0], commit
        if revision is not None:
            break
    raise DataError(f"hub dataset {repo} has no parquet files, so that it cannot be streamed; leave --streaming out.")


def _folder(files: Sequence[RemoteFile]) -> str:
    """What the URLs of files begin with: the folder that all are in, with a slash."""
    levels = zip(*(file.url.split("?")[0].split("/")[:-1] for file in files), strict=False)
    return "".join(f"{names[0]}/" for names in takewhile(lambda names: len({*names}) == 1, levels))


def _tree(files: Any, root: str) -> Folder:
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


def _features(shard: Shard) -> dict[str, Any]:
    return features.features_of(shard.metadata.schema.to_arrow_schema())


def _part(split: str, shard: Shard, options: ReadOptions, notes: Notes) -> tuple[str, features.Normalized]:
    """A shard's images, as addresses, and labels."""
    where, schema = without_secrets(shard.file.url), shard.metadata.schema.to_arrow_schema()

    def read_part(names: list[str]) -> pa.Table:
        image, *others = names
        kind = schema.field(image).type
        inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
            raise DataError(
                f"{where}: column {image!r} holds {kind}; only encoded images can be streamed: see `vitft data pack`."
            )
        columns = {image: image_structs(None, addresses(shard, image))}
        if others:
            columns |= zip(others, read_columns(shard, others).columns, strict=True)
        return pa.table(columns)

    try:
        return where, features.normalize(split, _features(shard), read_part, options, notes)
    except DataError as error:
        raise error if where in str(error) else DataError(f"{where}: {error}") from error


def _names(shards: Sequence[Shard], base: str) -> Iterator[str]:
    for shard in shards:
        name = shard.file.url.removeprefix(base).split("?")[0]
        yield from (f"{name}/{row}" for row in range(shard.metadata.num_rows))


def _blocks(shard: Shard) -> Any:
    """The number of each row's row group: (n,)."""
    sizes = [end - start for start, end in pairwise([*shard.first.tolist(), shard.metadata.num_rows])]
    return np.repeat(np.arange(len(sizes)), sizes)


def _version(files: Sequence[RemoteFile], base: str) -> str:
    """16 hex digits, of the names, sizes and versions of files."""
    known = sorted((file.url.removeprefix(base), file.size, file.version) for file in files)
    return hashlib.blake2b(repr(known).encode(), digest_size=8).hexdigest()


def _tell_sorted(name: str, split: datasets.Dataset, notes: Notes) -> None:
    """Warn if images that are fetched together are mostly of the same class: batches would be, too."""
    if "label" not in split.features or not len(split):
        return
    labels = np.unique(np.asarray(split.data.column("label").to_pandas().astype(str)), return_inverse=True)[1]
    blocks = np.asarray(split.data.column(BLOCK), np.int64)
    everywhere = np.bincount(labels) / len(labels)
    pairs, counts = np.unique(blocks * (labels.max() + 1) + labels, return_counts=True)
    of_block = np.bincount(blocks)[pairs // (labels.max() + 1)]
    alike = float((counts * counts / of_block).sum() / len(labels))  # the chance that two of a block have one class
    if alike - float((everywhere**2).sum()) > _SORTED:
        notes.warn(
            f"split {name}: its shards are sorted by class, so that a batch has few classes at a time; "
            "`vitft data pack` makes shards in random order"
        )
