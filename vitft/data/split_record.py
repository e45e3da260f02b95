"""What a run's `splits.json` says of its images: who was trained on, and who must not be.

It rules wherever the run's weights are scored, resumed or trained on, whatever has been added to the data since.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitft.data.sampling import HELD_OUT, OPEN, TRAIN
from vitft.data.sources.identity import contents, ids, row_numbers, sample_names
from vitft.data.sources.schema import ROLES
from vitft.data.sources.source import Source, class_indices
from vitft.data.splits import Split, split_hash
from vitft.errors import DataError
from vitft.io.paths import composed

FILE = "splits.json"


@dataclass(frozen=True)
class Recorded:
    """One split as a run recorded it."""

    source: str
    ids: tuple[str | int, ...]
    hash: str
    contents: tuple[str, ...] | None  # what the images held; None in runs of old

    @property
    def by_row(self) -> bool:
        """Whether the images are known by the numbers of their rows alone, as in runs of old."""
        return bool(self.ids) and isinstance(self.ids[0], int)


@dataclass(frozen=True)
class Record:
    """The splits of a run, by role."""

    run: Path
    splits: dict[str, Recorded]
    images: dict[str, int] | None  # how many there were in all, by source split; None in runs of old

    def agrees(self, said: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether a checkpoint says that it was trained on these very splits."""
        return {role: one.get("hash") for role, one in said.items()} == {r: s.hash for r, s in self.splits.items()}


def read_record(run: Path) -> Record | None:
    """What a run recorded; None if it wrote nothing yet. Raises DataError for what is not readable."""
    file = run / FILE
    if not file.is_file():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        splits = {}
        for role in (role for role in ROLES if role in document["splits"]):
            one = document["splits"][role]
            names = tuple(composed(n) if isinstance(n, str) else int(n) for n in one["ids"])
            held = one.get("contents", names if one.get("by") == "content" else None)
            splits[role] = Recorded(str(one["source"]), names, str(one["hash"]), held and tuple(held))
        return Record(run, splits, document.get("images"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: not readable ({error}); start anew from the newest checkpoint of {run}.") from error


def recall(record: Record, source: Source, *, moved: bool) -> dict[str, Split]:
    """The images of each recorded split that are still there, in their recorded order.

    Where the data set has `moved`, images are known again by what they hold, or in runs of old as a whole split.
    """
    found = {role: _recalled(source, role, one, moved=moved) for role, one in record.splits.items()}
    return {role: split for role, split in found.items() if split is not None and len(split.rows)}


def _recalled(source: Source, role: str, one: Recorded, *, moved: bool) -> Split | None:
    by_content = moved and one.contents is not None
    names = [one.source] if one.source in source.splits else [str(name) for name in source.splits] if moved else []
    best: Split | None = None
    for name in names:
        places, rows = _places(source, name, one.contents if by_content and one.contents else one.ids, by_content)
        labels = class_indices(source.splits[name])[rows]
        kept = [one.ids[place] for place in places]
        split = Split(role, name, rows, labels, kept, split_hash(one.source, kept, labels, source.labels))
        if best is None or len(rows) > len(best.rows):
            best = split
    if moved and not by_content and best is not None and best.hash != one.hash:
        return None  # names and row numbers alone may be those of any other data set
    return best


def _places(source: Source, name: str, wanted: Sequence[str | int], by_content: bool) -> tuple[list[int], Any]:
    """Which of the wanted are in this split, and in which rows."""
    split = source.splits[name]
    every = np.arange(len(split))
    here: Iterable[str | int]
    if by_content:
        here = [f"{key:016x}" for key in contents(split, every).tolist()]
    else:
        here = row_numbers(split).tolist() if isinstance(wanted[0], int) else ids(split, every)
    rows_of: dict[str | int, list[int]] = {}
    for row, one in enumerate(here):
        rows_of.setdefault(one, []).append(row)
    places, rows = [], []
    for place, one in enumerate(wanted):
        if left := rows_of.get(one):
            places.append(place)
            rows.append(left.pop(0) if len(left) > 1 else left[0])
    return places, np.array(rows, np.int64)


def news(record: Record, source: Source, found: Mapping[str, Split]) -> list[str]:
    """What has changed since the run began: how many images are new, and how many of its own are gone."""
    said = []
    for name, split in source.splits.items():
        mine = sum(len(one.rows) for one in found.values() if one.source == name)
        then = [one for one in record.splits.values() if one.source == name]
        before = (record.images or {}).get(str(name), 0) - sum(len(one.ids) for one in then)
        if record.images is not None and (more := len(split) - mine - max(before, 0)) > 0:
            said.append(f"{more:,} images of {name} are new: in no split of {record.run}")
    for role, one in record.splits.items():
        here = len(found[role].rows) if role in found else 0
        if here < len(one.ids):
            said.append(f"{len(one.ids) - here:,} of {len(one.ids):,} {role} images of {record.run} are gone")
    return said


def settle(records: Sequence[Record], places: Sequence[bool], source: Source) -> dict[str, NDArray[np.int8]]:
    """On which side earlier runs had each image, by source split: of `records`, each on data that moved or not.

    Trained on by one is trained on, whatever others held out.
    """
    sides = {str(name): np.full(len(split), OPEN, np.int8) for name, split in source.splits.items()}
    for record, moved in zip(records, places, strict=True):
        found = recall(record, source, moved=moved)
        for role in ("validation", "test"):
            if role in found:
                side = sides[found[role].source]
                rows = found[role].rows[side[found[role].rows] == OPEN]
                side[rows] = HELD_OUT
        if "train" in found:
            sides[found["train"].source][found["train"].rows] = TRAIN
    return sides


def refuse_leak(records: Sequence[Record], source: Source, split: Split, remedy: str) -> None:
    """Raise DataError, with their number, if images of a held-out split were trained on by one of the runs.

    Those that the run itself held out are no leak, also where a data set has the same image in train and test.
    """
    for record in records:
        trained, kept = record.splits.get("train"), record.splits.get(split.name)
        if trained is None or trained.contents is None:
            continue
        held = set(kept.contents or ()) if kept else set()
        seen = set(trained.contents) - held
        here = [f"{key:016x}" for key in contents(source.splits[split.source], split.rows).tolist()]
        if leaked := [row for row, one in zip(split.rows.tolist(), here, strict=True) if one in seen]:
            first = sample_names(source.splits[split.source], np.array(leaked[:1]))[0]
            raise DataError(
                f"{len(leaked):,} of the {len(here):,} {split.name} images were trained on by {record.run} "
                f"(the first is {first}): no score of them would be honest; {remedy}"
            )
