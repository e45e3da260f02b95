"""A name or a path -> the splits of a data set, always with columns `image` and `label`."""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from numpy.typing import NDArray

from vitft.config.train import TrainConfig, require_dataset
from vitft.data.sources import arrays, hub, local
from vitft.data.sources.features import plain_splits
from vitft.data.sources.identity import has_own_files, numbered, sample_names
from vitft.data.sources.schema import Notes, Reading, standardize
from vitft.data.sources.tables import located
from vitft.errors import DataError, UsageError, nearest
from vitft.io.hub_errors import without_secrets
from vitft.io.paths import expanded


class Alias(NamedTuple):
    """Where a well-known data set lies on the hub."""

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


Given = Any  # str | Path | datasets.Dataset | datasets.DatasetDict: the last two have no types
"""What may stand for a dataset: see `open_dataset`."""


@dataclass(frozen=True)
class Source:
    """A data set, opened: nothing is decoded yet.

    Every split has columns `image` (rows of {"bytes", "path"}, one of them set), `label` (ClassLabel) and `row`.
    """

    name: str  # short, for run folders: "cifar10", the folder's name
    splits: datasets.DatasetDict
    labels: tuple[str, ...]  # class names in index order
    revision: str | None  # the hub commit that was really used
    decisions: tuple[str, ...] = ()  # what readers took for what, and why: see `schema.Notes`
    warnings: tuple[str, ...] = ()  # what is probably not as it was meant


def open_dataset(
    dataset: Given,
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
) -> Source:
    """Open a dataset: its splits, with an image and a label for every row. No image is decoded.

    `dataset` is an alias such as cifar10, `digits`, a hub id with an optional `:config`, a local folder, table, parquet
    file or archive, or what `datasets` has already loaded. An alias wins over a folder of the same name; `./cifar10`
    means the folder. The other arguments are those of `vitft train`, and say how to read it where it does not say so
    itself. Raises DataError where nothing usable is found, UsageError for a revision of what has none.
    """
    if not isinstance(dataset, str | Path):
        return _opened(dataset, Reading(image_column, label_column, split_column, fold_column, fold))
    dataset = str(dataset)
    path = expanded(dataset) if dataset else Path()
    hub_id = _HUB_ID.fullmatch(dataset)
    alias = ALIASES.get(dataset)
    is_here = bool(dataset.strip()) and os.path.exists(path)  # noqa: PTH110  (False, too, for impossible names)
    if revision is not None and alias is None and (is_here or dataset == DIGITS):
        raise UsageError(f"revision {revision} asked of {dataset}, which is not on the hub; leave it out.")
    used, notes = None, Notes()
    reading = Reading(
        image_column, label_column, split_column, fold_column, fold, image_folder, encoding, allow_outside
    )
    if alias is not None:
        name = dataset
        raw, used = hub.read(alias.repo, alias.config, revision)
    elif dataset == DIGITS:
        name, raw = DIGITS, arrays.read_digits()
    elif is_here:
        name = path.resolve().stem if path.is_file() else path.resolve().name
        raw = local.read(path, reading, notes)
    elif hub_id is not None:
        name = hub_id[1].split("/")[1]
        raw, used = hub.read(hub_id[1], hub_id[2], revision)
    else:
        raise DataError(_unknown(dataset))
    try:
        if alias is not None or dataset == DIGITS or not is_here:
            raw = plain_splits(raw, Path(dataset), reading, notes)
        splits, labels = standardize(raw, notes)
        for split_name, split in splits.items():
            if not has_own_files(split):  # what others wrote names no file but their own
                folders = hub.caches() if not is_here else (path if path.is_dir() else path.parent,)
                split = located(str(split_name), split, folders, allow_outside=allow_outside)
            splits[split_name] = numbered(split)
    except DataError:
        raise
    except Exception as error:  # columns of other contents than their types say fail wherever they are read
        raise DataError(f"{dataset}: its columns cannot be read: {' '.join(str(error).split())[:300]}") from error
    return Source(_short(name), splits, labels, used, tuple(notes.decisions), tuple(notes.warnings))


def _opened(given: Any, reading: Reading) -> Source:
    """A dataset that was loaded in Python. Raises DataError, and UsageError for what is none."""
    if isinstance(given, datasets.Dataset):
        given = {str(given.split or "train"): given}
    if not isinstance(given, Mapping) or not all(isinstance(split, datasets.Dataset) for split in given.values()):
        got = type(next(iter(given.values()), given) if isinstance(given, Mapping) else given).__name__
        raise UsageError(f"dataset: got {got}; give a name, a path, or a Dataset or DatasetDict of datasets.")
    raw = {str(name): split for name, split in given.items()}
    names = {split.info.dataset_name for split in raw.values()} - {None}
    notes = Notes()
    try:
        splits, labels = standardize(plain_splits(raw, Path("dataset"), reading, notes), notes)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"dataset: its columns cannot be read: {' '.join(str(error).split())[:300]}") from error
    splits = datasets.DatasetDict({name: numbered(split) for name, split in splits.items()})
    name = _short(names.pop() if names else "")
    return Source(name, splits, labels, None, tuple(notes.decisions), tuple(notes.warnings))


def source_of(config: TrainConfig, given: Any = None) -> Source:
    """Open the data set of a run's settings, or one `given` in Python, without the images that the settings leave out.

    Raises VitftError.
    """
    reading = {name: getattr(config, name) for name in Reading.__dataclass_fields__}
    dataset = require_dataset(config) if given is None else given
    source = dataset if isinstance(dataset, Source) else open_dataset(
        dataset, revision=config.dataset_revision, **reading
    )  # fmt: skip
    return source if config.exclude is None else excluding(source, Path(config.exclude))


def _short(name: str) -> str:
    """The name with nothing in it that a folder's name may not have."""
    return re.sub(r"[^\w.-]+", "-", name) or "data"


def listed(split: str, image: str) -> str:
    """An image's line in a list of images to leave out: SPLIT<tab>IMAGE, what has tabs or line ends in it as JSON."""
    return "\t".join(
        json.dumps(one) if one.startswith('"') or any(mark in one for mark in "\t\n\r") else one
        for one in (split, image)
    )


def excluding(source: Source, file: Path) -> Source:
    """The source without the images that a file lists, as `vitft data check --quarantine` writes it.

    Raises DataError for a file that cannot be read, UsageError for a line that names no image of the source.
    """
    try:
        # Not splitlines(): it would also end lines where names have U+2028.
        lines = [line for line in expanded(file).read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise DataError(f"exclude {file}: {reason}; give a list as vitft data check --quarantine writes it.") from error
    wanted: dict[str, dict[str, str]] = {}
    for line in lines:
        split, _, name = line.partition("\t")
        with suppress(ValueError):  # then it names no image
            split, name = (str(json.loads(one)) if one.startswith('"') else one for one in (split, name))
        wanted.setdefault(split, {})[name] = line
    splits = dict(source.splits)
    for name, rows in source.splits.items():
        out = wanted.get(str(name), {})
        if out:
            names = sample_names(rows, np.arange(len(rows)))
            splits[name] = rows.select([row for row, one in enumerate(names) if one not in out])
            for one in names:
                out.pop(one, None)
    if left := [line for out in wanted.values() for line in out.values()]:
        raise UsageError(f"exclude {file}: {left[0]!r} names no image of {source.name}; a line is SPLIT, a tab, IMAGE.")
    return replace(source, splits=datasets.DatasetDict(splits))


def class_indices(split: datasets.Dataset) -> NDArray[np.int64]:
    """The class index of every row of a split: (n,)."""
    labels = np.asarray(split.data.column("label").combine_chunks(), np.int64)
    return labels if split._indices is None else labels[split._indices.column(0).to_numpy()]


def _unknown(dataset: str) -> str:
    known = sorted([*ALIASES, DIGITS])
    if re.match(r"\w+://", dataset):
        shown = without_secrets(dataset)
        return f"{shown} is an address; give a hub id (owner/name), or download it and give the file or folder."
    if dataset.startswith((".", "~", os.sep)) or dataset.count("/") > 1:
        return f"no file or folder {dataset}; give one that exists, or one of {', '.join(known)}."
    return (
        f"no data set {dataset!r}: no file or folder here, no hub id (owner/name) and none of "
        f"{', '.join(known)}{nearest(dataset, known) or '; offline, use a local folder or digits.'}"
    )
