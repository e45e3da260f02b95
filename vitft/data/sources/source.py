"""Open a dataset by name or path: its splits, always with columns `image` and `label`."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from numpy.typing import NDArray

from vitft.config.train import TrainConfig, require_dataset
from vitft.data.sources import arrays, hub, local, streamed
from vitft.data.sources.features import normalize_splits
from vitft.data.sources.identity import has_names, sample_names
from vitft.data.sources.schema import OF_TEXT, Notes, ReadOptions, Splits, standardize, whole_numbers
from vitft.data.sources.tables.image_paths import resolve_paths
from vitft.errors import DataError, UsageError, nearest
from vitft.io.console import counted, without_secrets
from vitft.io.paths import composed, expanded, is_url


class Alias(NamedTuple):
    """Where a well-known dataset is on the hub."""

    repo: str
    config: str | None = None


ALIASES = {
    "beans": Alias("AI-Lab-Makerere/beans"),
    "cats_vs_dogs": Alias("microsoft/cats_vs_dogs"),
    "cifar10": Alias("uoft-cs/cifar10"),
    "cifar100": Alias("uoft-cs/cifar100"),
    "fashion_mnist": Alias("zalando-datasets/fashion_mnist"),
    "food101": Alias("ethz/food101"),
    "imagenet-1k": Alias("ILSVRC/imagenet-1k"),
    "mnist": Alias("ylecun/mnist"),
    "oxford-iiit-pet": Alias("timm/oxford-iiit-pet"),
    "svhn": Alias("ufldl-stanford/svhn", "cropped_digits"),
    "tiny-imagenet": Alias("zh-plus/tiny-imagenet"),
}
DIGITS = "digits"
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::(.+))?")


DatasetLike = Any  # str | Path | datasets.Dataset | datasets.DatasetDict: the last two have no types
"""What `open_dataset` accepts."""


@dataclass(frozen=True)
class Source:
    """An open dataset. Nothing is decoded yet.

    Every split has columns `image` ({"bytes", "path"}, one of them None), `label` (ClassLabel) and `row`; splits of
    files that vitft named itself also have `name`, the path relative to the dataset's folder; those of shards behind a
    URL that, with a row, and `block`, the number of what is fetched together.
    """

    name: str  # short, for run folders: "cifar10", or the folder's name
    splits: datasets.DatasetDict
    labels: tuple[str, ...]  # class names in index order
    revision: str | None  # the resolved commit on the hub
    decisions: tuple[str, ...] = ()  # what readers chose, and why: see `schema.Notes`
    warnings: tuple[str, ...] = ()  # what is probably wrong


def open_dataset(
    dataset: DatasetLike,
    *,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    fold_column: str | None = None,
    fold: int | None = None,
    image_folder: str | None = None,
    encoding: str | None = None,
    allow_outside: bool = False,
    streaming: bool = False,
    stream_gb: float = 20.0,
) -> Source:
    """Open a dataset: its splits, with an image and a label in every row. No image is decoded.

    `dataset` is an alias such as cifar10, `digits`, a hub id with an optional `:config`, a local folder, table, parquet
    file or archive, the URL of parquet shards, or a Dataset or DatasetDict. An alias wins over a folder of the same
    name; `./cifar10` means the folder. With `streaming`, the shards of a hub dataset are fetched when they are needed,
    as those of a URL are; of these, `stream_gb` are kept on this disk. The other arguments are those of `vitft train`,
    for datasets that are ambiguous by themselves. Raises DataError if nothing usable is found, UsageError for a
    revision of a dataset that is not on the hub.
    """
    options = ReadOptions(
        image_column, label_column, split_column, fold_column, fold, image_folder, encoding, allow_outside,
        streaming, stream_gb,
    )  # fmt: skip
    notes, commit = Notes(), None
    if not isinstance(dataset, str | Path):
        options.refuse("the dataset was loaded in Python", *OF_TEXT)
        name, raw = _loaded(dataset)
        return _source("dataset", name, raw, commit, options, notes, folders=None)
    dataset = str(dataset)
    if is_url(dataset):
        raw, version = streamed.read(dataset, options, notes)
        if revision is not None and not re.fullmatch("[0-9a-f]{16}", revision):
            raise UsageError(f"revision {revision}: {without_secrets(dataset)} is a URL, which has none; leave it out.")
        if revision not in (None, version):
            raise DataError(f"{without_secrets(dataset)}: its shards have changed since the run began.")
        name = re.split(r"[/\\@]", dataset.split("?")[0].rstrip("/"))[-1].removesuffix(".parquet")
        return _source(dataset, name, raw, version, options, notes, folders=None, is_normalized=True)
    path = expanded(dataset) if dataset else Path()
    hub_id = ALIASES.get(dataset) or (Alias(*match.groups()) if (match := _HUB_ID.fullmatch(dataset)) else None)
    is_here = bool(dataset.strip()) and os.path.exists(path)  # noqa: PTH110  (False, too, for impossible names)
    if revision is not None and dataset not in ALIASES and (is_here or dataset == DIGITS):
        raise UsageError(f"revision {revision}: {dataset} is not on the hub; leave the revision out.")
    if dataset == DIGITS:
        options.refuse(f"{DIGITS} is not a text file", *OF_TEXT)
        name, raw = DIGITS, arrays.read_digits()
    elif is_here and dataset not in ALIASES:
        name = path.resolve().stem if path.is_file() else path.resolve().name
        raw = local.read(path, options, notes)
        folder = path if path.is_dir() else path.parent
        return _source(dataset, name, raw, commit, options, notes, folders=[folder], is_normalized=True)
    elif hub_id is not None and streaming:
        name = dataset if dataset in ALIASES else hub_id.repo.split("/")[1]
        raw, commit = streamed.read_hub(hub_id.repo, hub_id.config, revision, options, notes)
        return _source(dataset, name, raw, commit, options, notes, folders=None, is_normalized=True)
    elif hub_id is not None:
        options.refuse(f"{dataset} is a dataset of the hub, not a text file", *OF_TEXT)
        name = dataset if dataset in ALIASES else hub_id.repo.split("/")[1]
        raw, commit = hub.read(hub_id.repo, hub_id.config, revision)
    else:
        raise DataError(_unknown(dataset))
    return _source(dataset, name, raw, commit, options, notes, folders=hub.caches())


def _loaded(dataset: Any) -> tuple[str, Splits]:
    """The name and the splits of a dataset that was loaded in Python. Raises UsageError for any other object."""
    if isinstance(dataset, datasets.Dataset):
        dataset = {str(dataset.split or "train"): dataset}
    if not isinstance(dataset, Mapping) or not all(isinstance(split, datasets.Dataset) for split in dataset.values()):
        kind = type(next(iter(dataset.values()), dataset) if isinstance(dataset, Mapping) else dataset).__name__
        raise UsageError(f"dataset: got {kind}; give a name, a path, or a Dataset or DatasetDict of datasets.")
    names = {split.info.dataset_name for split in dataset.values()} - {None}
    return names.pop() if names else "", {str(name): split for name, split in dataset.items()}


def _source(
    dataset: str, name: str, raw: Splits, commit: str | None, options: ReadOptions,
    notes: Notes, *, folders: Sequence[Path] | None, is_normalized: bool = False,
) -> Source:  # fmt: skip
    """Standardize raw splits. Paths that the dataset's author wrote down must be in `folders`, if given."""
    try:
        if not is_normalized:
            raw = normalize_splits(raw, Path(dataset), options, notes)
        splits, labels = standardize(raw, notes)
        for split_name, split in splits.items():
            if folders is not None and not has_names(split):
                splits[split_name] = resolve_paths(str(split_name), split, folders, allow_outside=options.allow_outside)
    except DataError:
        raise
    except Exception as error:  # columns whose content contradicts their type fail anywhere
        raise DataError(f"{dataset}: its columns cannot be read: {' '.join(str(error).split())[:300]}") from error
    name = re.sub(r"[^\w.-]+", "-", name) or "data"  # usable as the name of a folder
    return Source(name, splits, labels, commit, tuple(notes.decisions), tuple(notes.warnings))


def source_of(config: TrainConfig, dataset: DatasetLike | Source | None = None) -> Source:
    """Open the dataset of a run's settings, or the given one, without the images that `exclude` lists.

    Raises VitftError.
    """
    source = require_dataset(config) if dataset is None else dataset
    if not isinstance(source, Source):
        options = {name: getattr(config, name) for name in ReadOptions.__dataclass_fields__}
        source = open_dataset(source, revision=config.dataset_revision, **options)
    return source if config.exclude is None else excluding(source, Path(config.exclude))


def exclusion_line(split: str, image: str) -> str:
    """A line in a list of images to leave out: SPLIT<tab>IMAGE. Names with tabs or newlines are written as JSON."""
    return "\t".join(
        json.dumps(name) if name.startswith('"') or any(mark in name for mark in "\t\n\r") else name
        for name in (split, image)
    )


def read_exclusions(file: Path, setting: str) -> list[str]:
    """The lines of a list of images to leave out. Raises DataError, which names the setting that gave the file."""
    try:
        # Not splitlines(), which also splits at U+2028 in names.
        lines = expanded(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise DataError(f"{setting} {file}: {reason}; give a list from vitft data check --quarantine.") from error
    return [line for line in lines if line.strip()]


def excluding(source: Source, file: Path) -> Source:
    """The source without the images that a file lists, as `vitft data check --quarantine` writes it.

    Raises DataError for an unreadable file, UsageError for a line that names no image of the source.
    """
    line_of: dict[tuple[str, str], str] = {}  # by split and image
    for line in read_exclusions(file, "exclude"):
        split, _, name = line.partition("\t")
        with suppress(ValueError):  # invalid JSON matches no image
            split, name = (str(json.loads(text)) if text.startswith('"') else text for text in (split, name))
        line_of[composed(split), composed(name)] = line
    splits, found = dict(source.splits), set()
    for split_name, rows in source.splits.items():
        own = composed(str(split_name))
        if any(split == own for split, _ in line_of):
            named = [(own, composed(name)) for name in sample_names(rows, np.arange(len(rows)))]
            splits[split_name] = rows.select([row for row, image in enumerate(named) if image not in line_of])
            found.update(named)
    if unknown := [line for image, line in line_of.items() if image not in found]:
        raise UsageError(
            f"exclude {file}: {unknown[0]!r} names no image of {source.name}; write a line as SPLIT, a tab, IMAGE."
        )
    left = (f"{counted(len(line_of), 'image')} left out: listed in {file.name}",) if line_of else ()
    return replace(source, splits=datasets.DatasetDict(splits), decisions=source.decisions + left)


def class_indices(split: datasets.Dataset) -> NDArray[np.int64]:
    """The class index of every row of a split: (n,)."""
    return whole_numbers(split, "label")


def _unknown(dataset: str) -> str:
    known = sorted([*ALIASES, DIGITS])
    if found := re.match(r"(\w{2,}):/(?!/)(.+)", dataset):
        return f"no dataset {dataset!r}; did you mean {found[1]}://{found[2]}?"
    if dataset.startswith((".", "~", os.sep)) or dataset.count("/") > 1:
        return f"no file or folder {dataset}; give an existing one, or one of {', '.join(known)}."
    return (
        f"no dataset {dataset!r}: not a file or folder here, a hub id (owner/name) or one of "
        f"{', '.join(known)}{nearest(dataset, known) or '; offline, use a local folder or digits.'}"
    )
