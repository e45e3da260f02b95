"""The splits that a run recorded in `splits.json`: the images it trained on, and those it must not train on.

The record decides whenever the run's weights are scored, resumed or fine-tuned, whatever has been added to the data.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitft.data.sampling import HELD_OUT, OPEN, TEST, TRAIN, Sides
from vitft.data.sources.identity import content_hashes, ids, is_streamed, sample_names
from vitft.data.sources.schema import ROLES, ROW, whole_numbers
from vitft.data.sources.source import Source, class_indices
from vitft.data.splits import Rows, Split, split_hash
from vitft.errors import DataError
from vitft.io.paths import composed

FILE = "splits.json"
Ids = Sequence[str | int]


@dataclass(frozen=True)
class RecordedSplit:
    """One split as a run recorded it. Runs of early versions have row numbers for ids, and no content hashes."""

    source: str
    ids: Ids
    hash: str
    contents: tuple[str, ...] | None  # content hash of each image
    lazy: bool | None = None  # whether its images were decoded when they were needed; None if that is not recorded


@dataclass(frozen=True)
class Record:
    """The splits of a run, by role."""

    run: Path
    splits: dict[str, RecordedSplit]
    images: dict[str, int] | None  # the size of each source split; None in runs of early versions

    def matches(self, card_splits: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether a checkpoint was trained on exactly these splits, according to its model card."""
        hashes = {role: split.get("hash") for role, split in card_splits.items()}
        return hashes == {role: split.hash for role, split in self.splits.items()}


def read_record(run: Path) -> Record | None:
    """The record of a run; None if it has not written one yet. Raises DataError if the file is unreadable."""
    file = run / FILE
    if not file.is_file():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        splits = {}
        for role in (role for role in ROLES if role in document["splits"]):
            entry = document["splits"][role]
            names = tuple(composed(name) if isinstance(name, str) else int(name) for name in entry["ids"])
            hashes = entry.get("contents", names if entry.get("by") == "content" else None)
            lazy = "sample" in entry if {"sample", "pixels"} & set(entry) else None
            splits[role] = RecordedSplit(
                str(entry["source"]), names, str(entry["hash"]), hashes and tuple(hashes), lazy
            )  # fmt: skip
        return Record(run, splits, document.get("images"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: not readable ({error}); start a new run from the newest checkpoint of {run}."
        ) from error


def restore_splits(record: Record, source: Source, *, moved: bool) -> dict[str, Split]:
    """The images of each recorded split that still exist, in their recorded order.

    If the dataset has `moved`, images are identified by content, or, in runs of early versions, by the whole split.
    """
    splits = {role: _restore(source, role, split, moved=moved) for role, split in record.splits.items()}
    return {role: split for role, split in splits.items() if split is not None and len(split.rows)}


def _restore(source: Source, role: str, recorded: RecordedSplit, *, moved: bool) -> Split | None:
    hashes = recorded.contents if moved else None
    names = [str(name) for name in source.splits] if moved else []
    best: Split | None = None
    for name in [recorded.source] if recorded.source in source.splits else names:
        places, rows = _find_rows(source, name, hashes or recorded.ids, by_content=hashes is not None)
        labels = class_indices(source.splits[name])[rows]
        remaining = [recorded.ids[place] for place in places]
        digest = split_hash(recorded.source, remaining, labels, source.labels)
        if best is None or len(rows) > len(best.rows):
            numbers = whole_numbers(source.splits[name], ROW)[rows]
            best = Split(role, name, rows, numbers, labels, remaining, digest)
    if moved and hashes is None and best is not None and best.hash != recorded.hash:
        return None  # names or row numbers alone could belong to any other dataset
    return best


def _find_rows(source: Source, name: str, wanted: Ids, *, by_content: bool) -> tuple[list[int], Rows]:
    """Which of the wanted images are in this split, as positions in `wanted`, and their rows."""
    split = source.splits[name]
    rows = np.arange(len(split))
    present: Ids
    if by_content and is_streamed(split):
        present = []  # to hash all images would fetch all of them
    elif by_content:
        present = content_hashes(split, rows)
    else:
        present = whole_numbers(split, ROW).tolist() if wanted and isinstance(wanted[0], int) else ids(split, rows)
    rows_of: dict[str | int, list[int]] = defaultdict(list)
    for row, image in enumerate(present):
        rows_of[image].append(row)
    places, found = [], []
    for place, image in enumerate(wanted):
        if same := rows_of.get(image):
            places.append(place)
            found.append(same.pop(0) if len(same) > 1 else same[0])
    return places, np.array(found, np.int64)


def describe_changes(record: Record, source: Source, splits: Mapping[str, Split]) -> list[str]:
    """What has changed since the run began, in sentences: how many images are new, and how many are gone."""
    sentences = []
    for name, split in source.splits.items():
        restored = sum(len(own.rows) for own in splits.values() if own.source == name)
        recorded = sum(len(own.ids) for own in record.splits.values() if own.source == name)
        unused = (record.images or {}).get(str(name), 0) - recorded
        if record.images is not None and (new := len(split) - restored - max(unused, 0)) > 0:
            sentences.append(f"{new:,} images of {name} are new: in no split of {record.run}")
    for role, own in record.splits.items():
        present = len(splits[role].rows) if role in splits else 0
        if present < len(own.ids):
            sentences.append(f"{len(own.ids) - present:,} of {len(own.ids):,} {role} images of {record.run} are gone")
    return sentences


def recorded_sides(records: Sequence[Record], moved: Sequence[bool], source: Source) -> dict[str, Sides]:
    """The side that earlier runs had each image on, by source split; `moved` says, for each run, if its data moved.

    An image that any run trained on counts as trained on, even if others held it out.
    """
    sides = {str(name): np.full(len(split), OPEN, np.int8) for name, split in source.splits.items()}
    for record, has_moved in zip(records, moved, strict=True):
        splits = restore_splits(record, source, moved=has_moved)
        for role, held_out in (("validation", HELD_OUT), ("test", TEST)):
            if role in splits:
                side, rows = sides[splits[role].source], splits[role].rows
                side[rows[side[rows] == OPEN]] = held_out
        if "train" in splits:
            sides[splits["train"].source][splits["train"].rows] = TRAIN
    return sides


def refuse_leak(records: Sequence[Record], source: Source, split: Split, remedy: str) -> None:
    """Raise DataError, with their number, if one of the runs was trained on images of a held-out split.

    Images that the run itself held out are no leak, even if the dataset has the same image in train and test.
    """
    for record in records:
        train, own = record.splits.get("train"), record.splits.get(split.name)
        if train is None or train.contents is None:
            continue
        trained = set(train.contents) - set((own and own.contents) or ())
        hashes = content_hashes(source.splits[split.source], split.rows)
        if leaked := [row for row, image in zip(split.rows.tolist(), hashes, strict=True) if image in trained]:
            first = sample_names(source.splits[split.source], np.array(leaked[:1]))[0]
            raise DataError(
                f"{len(leaked):,} of the {len(hashes):,} {split.name} images were trained on by {record.run} "
                f"(the first is {first}), so their score would be meaningless; {remedy}"
            )
