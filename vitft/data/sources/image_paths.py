"""Which files a data set's names mean: in its own folder alone, unless more is asked for.

A table's names are looked up in listings of folders, each read once, so that a million rows cost no stat. Where
a name is no file as it stands, these are tried, and what was found is told: the same text in another Unicode
form, `\\` for `/`, a known extension added, and the folders one level below (`train/` beside `train.csv`; a table
that is called after another split than the test takes no image from the test's folder, nor the reverse).
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from vitft.data.decoder import suffixes
from vitft.data.sources.schema import Notes, role_of
from vitft.io.paths import composed


class Misnamed(Exception):  # noqa: N818  (a reason, that whoever knows the row makes an error of)
    """Why a name means no file that may be read; whoever knows the row says where."""


def absolute(folders: Iterable[Path]) -> list[str]:
    """Folders as absolute text, links in them not followed."""
    return [os.path.abspath(folder) for folder in folders]  # noqa: PTH100  (resolve() would follow links)


def named_file(folders: Sequence[str], name: Any, *, allow_outside: bool) -> str:
    """The file that a data set in these folders names, there or not. Raises Misnamed for one outside of them.

    By name alone: a link that the folder's owner put there may lead where it likes.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise Misnamed(f"{name!r} is no path of an image.")
    if re.match(r"(https?|s3|gs|ftp)://", name):
        raise Misnamed(f"{name} is on the network; download the images, and name the files.")
    file = os.path.normpath(os.path.join(folders[0], name))  # noqa: PTH118  (hot loop)
    if not allow_outside and not any(file.startswith(f"{folder}{os.sep}") for folder in folders):
        raise Misnamed(f"{name} leads out of {folders[0]}; where that is meant, add --allow-outside.")
    return file


@cache
def role_within(name: str) -> str | None:
    """The role that one of a name's words tells: `labels_train.csv`, `seg_test`; None for no or several roles."""
    roles = {role for word in re.split(r"[\W\d_]+", name) if (role := role_of(word))}
    return roles.pop() if len(roles) == 1 else None


class Names:
    """The files that a table's cells mean; what was done to find them is counted, to be told once."""

    def __init__(self, table: Path, image_folder: Path | None, *, allow_outside: bool) -> None:
        folders = [table.parent] if image_folder is None else [image_folder, table.parent]
        self.folders = absolute(folders)
        self.role = role_within(table.stem)
        self.allow_outside = allow_outside
        self._listings: dict[str, _Listing] = {}
        self._parents: dict[str, tuple[str, _Listing]] = {}
        self._ways: Counter[tuple[str, str]] = Counter()

    def find(self, name: str, role: str | None = None) -> tuple[str, bool]:
        """The absolute path that a cell means, and whether it is there. Raises Misnamed.

        `role` is of the row's split, if a column tells it: of two files, that in a folder called so is meant.
        """
        found, how = self._lookup(name, role)
        if found is None:
            return named_file(self.folders, name, allow_outside=self.allow_outside), False
        if how is not None:
            self._ways[how] += 1
        return found, True

    def meant(self, name: str) -> tuple[str | None, bool]:
        """The file that a cell may mean, and whether by its name as it stands; for who does not know what it is."""
        try:
            found, how = self._lookup(name, None)
        except Misnamed:
            return None, False
        return found, found is not None and how is None

    def tell(self, notes: Notes) -> None:
        """Write down how the files were found, where it was not by their names as they stand."""
        for how in dict.fromkeys(how for _, how in self._ways):
            counts = {below: count for (below, way), count in self._ways.items() if way == how}
            first, *others = [f"{below}{os.sep}" for below in counts if below] or [""]
            where = f" in {first}" + (f" and {len(others):,} more folders" if others else "") if first else ""
            notes.decide(f"{sum(counts.values()):,} of the images are found{where}{f' {how}' if how else ''}")

    def _lookup(self, name: str, role: str | None) -> tuple[str | None, tuple[str, str] | None]:
        """The file, and the folder below and the way that it was found by; None for its name as it stands."""
        head, _, tail = name.rpartition("/")
        known = self._parents.get(head)
        if known is None or tail in ("", ".", ".."):
            file = named_file(self.folders, name, allow_outside=self.allow_outside)
            folder, tail = os.path.split(file)
            known = folder, self._listing(folder)
            if not name.endswith(("/", "/.", "/..")):
                self._parents[head] = known
        folder, listing = known
        if tail in listing.files:
            return f"{folder}{os.sep}{tail}", None
        found, how = self._match(folder, tail)
        if found is not None:
            return found, ("", how)
        if "\\" in name:
            return self._lookup(name.replace("\\", "/"), role)
        return self._one_below(name, role)

    def _match(self, folder: str, tail: str) -> tuple[str | None, str]:
        """The file in a folder that a name may mean, and what was done to it. Raises Misnamed for two."""
        if not self._listing(folder).there:
            folder = self._composed(folder) or folder
        found, how = self._listing(folder).match(tail)
        if len(found) > 1:
            raise Misnamed(f"{tail} may be {found[0]} or {found[1]}; write the extension.")
        return (f"{folder}{os.sep}{found[0]}", how) if found else (None, "")

    def _composed(self, folder: str) -> str | None:
        """The folder that is there under this name in another Unicode form."""
        parent, name = os.path.split(folder)
        if not name or folder.isascii():
            return None
        if not self._listing(parent).there:
            parent = self._composed(parent) or parent
        same = [other for other in self._listing(parent).folders if composed(other) == composed(name)]
        return os.path.join(parent, same[0]) if same else None  # noqa: PTH118

    def _one_below(self, name: str, role: str | None) -> tuple[str | None, tuple[str, str] | None]:
        first = name.removeprefix("./").partition("/")[0]
        stem = os.path.splitext(first)[0]  # noqa: PTH122
        children = dict.fromkeys(child for key in (first, composed(first), stem) for child in self._below.get(key, ()))
        found: dict[str, tuple[str, str]] = {}
        for child in children:
            its = role_within(child)
            if (
                its is not None
                and self.role is not None
                and "test" in {self.role, its}
                and its not in (self.role, role)
            ):
                continue
            file = named_file(self.folders, f"{child}/{name}", allow_outside=self.allow_outside)
            here, how = self._match(*os.path.split(file))
            if here is not None:
                found[child] = here, how
        if len(found) > 1:
            own: dict[str, tuple[str, str]] = {}
            for wanted in filter(None, (role, self.role)):
                own = own or {child: here for child, here in found.items() if role_within(child) == wanted}
            if len(own) != 1:
                one, other, *_ = found
                raise Misnamed(f"{name} is in {one} and in {other}; name the folder of the images with --image-folder.")
            found = own
        for child, (here, how) in found.items():
            return here, (child, how)
        return None, None

    @cached_property
    def _below(self) -> dict[str, tuple[str, ...]]:
        """For each name, and name without extension, one level below the first folder: the folders that hold it."""
        found: dict[str, tuple[str, ...]] = {}
        for child in sorted(self._listing(self.folders[0]).folders):
            inner = self._listing(os.path.join(self.folders[0], child))  # noqa: PTH118
            for key in {*inner.files, *inner.folders, *inner.stems, *inner.composed}:
                found[key] = (*found.get(key, ()), child)
        return found

    def _listing(self, folder: str) -> "_Listing":
        if (listing := self._listings.get(folder)) is None:
            listing = self._listings[folder] = _Listing(folder)
        return listing


class _Listing:
    """The names in a folder."""

    def __init__(self, folder: str) -> None:
        self.files: set[str] = set()
        self.folders: list[str] = []
        self.there = True
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        if not entry.name.startswith("."):
                            self.folders.append(entry.name)
                    else:
                        self.files.add(entry.name)
        except (OSError, ValueError):  # not there, not to be read, or no possible name
            self.there = False

    def match(self, name: str) -> tuple[list[str], str]:
        """The files that a name may mean, and what was done to it."""
        if name in self.files:
            return [name], ""
        if (other := self.composed.get(composed(name))) is not None:
            return [other], "in another Unicode form"
        if found := self.stems.get(composed(name)):
            return found, f"with {os.path.splitext(found[0])[1]} added"  # noqa: PTH122
        stem, suffix = os.path.splitext(composed(name))  # noqa: PTH122
        found = [file for file in self.stems.get(stem, ()) if file.lower().endswith(suffix.lower())] if suffix else []
        return found, "with the extension in other case"

    @cached_property
    def composed(self) -> dict[str, str]:
        """Names that are not in Unicode's composed form, by that form."""
        return {composed(name): name for name in self.files if not name.isascii()}

    @cached_property
    def stems(self) -> dict[str, list[str]]:
        """Images by their names without the extension."""
        found: dict[str, list[str]] = {}
        known = suffixes()
        for name in sorted(self.files):
            stem, suffix = os.path.splitext(name)  # noqa: PTH122
            if suffix.lower() in known:
                found.setdefault(composed(stem), []).append(name)
        return found
