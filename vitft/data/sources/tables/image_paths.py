"""Find the files that a table names, only within the dataset's own folder unless more is allowed.

Paths are looked up in folder listings, each read once, so a million rows need no stat calls. If a path does not exist
as written, these variants are tried, and noted: another Unicode form, `/` for `\\`, an added extension, and the
folders one level below (`train/` beside `train.csv`). A table named after another split never takes images from the
test folder, nor does a test table take them from another split's folder.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from vitft.data.decoder import suffixes
from vitft.data.sources.schema import Notes, image_structs, in_memory, role_of
from vitft.errors import DataError
from vitft.io.paths import composed


class PathError(Exception):
    """Why a path names no readable file. The caller adds the row."""


def absolute(folders: Iterable[Path]) -> list[str]:
    """Folders as absolute paths, without following links."""
    return [os.path.abspath(folder) for folder in folders]  # noqa: PTH100  (resolve() would follow links)


def resolve(folders: Sequence[str], name: Any, *, allow_outside: bool) -> str:
    """The absolute path of a file that a dataset in these folders names. Raises PathError for one outside of them.

    Only the path counts: links that the folder's owner made may lead anywhere.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise PathError(f"{name!r} is not an image path.")
    if re.match(r"(https?|s3|gs|ftp)://", name):
        raise PathError(f"{name} is a URL; download the images and give their paths.")
    file = os.path.normpath(os.path.join(folders[0], name))  # noqa: PTH118  (hot loop)
    if not allow_outside and not any(file.startswith(f"{folder}{os.sep}") for folder in folders):
        raise PathError(f"{name} is outside of {folders[0]}; if that is intended, add --allow-outside.")
    return file


def resolve_paths(
    name: str, split: datasets.Dataset, folders: Sequence[Path], *, allow_outside: bool
) -> datasets.Dataset:
    """Make the paths that a dataset's author wrote into a split absolute; they are relative to the first folder.

    Raises DataError for a path outside of the folders: a dataset must not be able to name any file on this machine.
    """
    roots = absolute(folders)
    chunks = []
    for chunk in split.data.column("image").chunks:
        data, path = chunk.flatten()
        is_path = pc.and_(pc.is_null(data), pc.is_valid(path))
        if not pc.any(is_path).as_py():
            chunks.append(chunk)
            continue
        pairs = zip(is_path.to_pylist(), path.to_pylist(), strict=True)
        try:
            files = [resolve(roots, file, allow_outside=allow_outside) if by_path else file for by_path, file in pairs]
        except PathError as error:
            raise DataError(f"split {name}: {error}") from error
        chunks.append(image_structs(data, files))
    images = pa.chunked_array(chunks, split.data.schema.field("image").type)
    columns = {column: split.data.column(column) for column in split.features} | {"image": images}
    return in_memory(columns, split.features["label"].names, name)


@cache
def role_within(name: str) -> str | None:
    """The split role that one word of a name gives: `labels_train.csv`, `seg_test`; None for no or several roles."""
    roles = {role for word in re.split(r"[\W\d_]+", name) if (role := role_of(word))}
    return roles.pop() if len(roles) == 1 else None


class Found(NamedTuple):
    """A file, and the variant of its path that exists: folder below and change. None for the path as written."""

    file: str
    variant: tuple[str, str] | None = None


class ImagePaths:
    """Finds the files that a table's cells name. Counts what was needed to find them, for one note about it."""

    def __init__(self, table: Path, image_folder: Path | None, *, allow_outside: bool) -> None:
        folders = [table.parent] if image_folder is None else [image_folder, table.parent]
        self.folders = absolute(folders)
        self.role = role_within(table.stem)
        self.allow_outside = allow_outside
        self._listing = cache(_Listing)
        self._parents: dict[str, tuple[str, _Listing]] = {}
        self._variants: Counter[tuple[str, str]] = Counter()

    def find(self, name: str, role: str | None = None) -> tuple[str, bool]:
        """The absolute path that a cell names, and whether it exists. Raises PathError.

        `role` is that of the row's split, if known. It decides between two files in folders named like splits.
        """
        found = self._lookup(name, role)
        if found is None:
            return resolve(self.folders, name, allow_outside=self.allow_outside), False
        if found.variant is not None:
            self._variants[found.variant] += 1
        return found.file, True

    def guess(self, name: str) -> tuple[str | None, bool]:
        """The file that a cell of an unknown column may name, and whether it exists exactly as written."""
        with suppress(PathError):
            if (found := self._lookup(name, None)) is not None:
                return found.file, found.variant is None
        return None, False

    def report(self, notes: Notes) -> None:
        """Note how many files were found by which variants of their paths."""
        for how in dict.fromkeys(how for _, how in self._variants):
            counts = {below: count for (below, variant), count in self._variants.items() if variant == how}
            first, *others = [f"{below}{os.sep}" for below in counts if below] or [""]
            where = f" in {first}" + (f" and {len(others):,} more folders" if others else "") if first else ""
            notes.decide(f"found {sum(counts.values()):,} of the images{where}{f' {how}' if how else ''}")

    def _lookup(self, name: str, role: str | None) -> Found | None:
        head, _, tail = name.rpartition("/")
        parent = self._parents.get(head)
        if parent is None or tail in ("", ".", ".."):
            file = resolve(self.folders, name, allow_outside=self.allow_outside)
            folder, tail = os.path.split(file)
            parent = folder, self._listing(folder)
            if not name.endswith(("/", "/.", "/..")):
                self._parents[head] = parent
        folder, listing = parent
        if tail in listing.files:
            return Found(f"{folder}{os.sep}{tail}")
        found = self._match(folder, tail)
        if found is None and "\\" in name:
            return self._lookup(name.replace("\\", "/"), role)
        return found or self._lookup_below(name, role)

    def _match(self, folder: str, tail: str, below: str = "") -> Found | None:
        """The file in a folder that a name may mean. Raises PathError for two files."""
        if not self._listing(folder).exists:
            folder = self._other_unicode_form(folder) or folder
        matches, how = self._listing(folder).match(tail)
        if len(matches) > 1:
            raise PathError(f"{tail} may be {matches[0]} or {matches[1]}; write the extension.")
        return Found(f"{folder}{os.sep}{matches[0]}", (below, how)) if matches else None

    def _other_unicode_form(self, folder: str) -> str | None:
        """The folder that exists under this name in another Unicode form."""
        parent, name = os.path.split(folder)
        if not name or folder.isascii():
            return None
        if not self._listing(parent).exists:
            parent = self._other_unicode_form(parent) or parent
        same = [other for other in self._listing(parent).folders if composed(other) == composed(name)]
        return os.path.join(parent, same[0]) if same else None  # noqa: PTH118

    def _lookup_below(self, name: str, role: str | None) -> Found | None:
        """Like `_lookup`, in the folders one level below."""
        first = name.removeprefix("./").partition("/")[0]
        stem = os.path.splitext(first)[0]  # noqa: PTH122
        children = dict.fromkeys(child for key in (first, composed(first), stem) for child in self._below.get(key, ()))
        matches: dict[str, Found] = {}
        for child in children:
            child_role = role_within(child)
            if child_role and self.role and "test" in (self.role, child_role) and child_role not in (self.role, role):
                continue
            file = resolve(self.folders, f"{child}/{name}", allow_outside=self.allow_outside)
            if (match := self._match(*os.path.split(file), child)) is not None:
                matches[child] = match
        if len(matches) > 1:
            own: dict[str, Found] = {}
            for wanted in filter(None, (role, self.role)):
                own = own or {child: match for child, match in matches.items() if role_within(child) == wanted}
            if len(own) != 1:
                a, b, *_ = matches
                raise PathError(f"{name} is in both {a} and {b}; give the folder of the images with --image-folder.")
            matches = own
        return next(iter(matches.values()), None)

    @cached_property
    def _below(self) -> dict[str, tuple[str, ...]]:
        """For each name one level below the first folder, with and without extension: the folders that hold it."""
        holders: dict[str, tuple[str, ...]] = {}
        for child in sorted(self._listing(self.folders[0]).folders):
            inner = self._listing(os.path.join(self.folders[0], child))  # noqa: PTH118
            for key in {*inner.files, *inner.folders, *inner.stems, *inner.composed}:
                holders[key] = (*holders.get(key, ()), child)
        return holders


class _Listing:
    """The names in a folder."""

    def __init__(self, folder: str) -> None:
        self.files: set[str] = set()
        self.folders: list[str] = []
        self.exists = True
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.is_dir():
                        self.files.add(entry.name)
                    elif not entry.name.startswith("."):
                        self.folders.append(entry.name)
        except (OSError, ValueError):  # missing, unreadable, or an impossible name
            self.exists = False

    def match(self, name: str) -> tuple[list[str], str]:
        """The files that a name may mean, and how the name was changed."""
        if name in self.files:
            return [name], ""
        if (other := self.composed.get(composed(name))) is not None:
            return [other], "in another Unicode form"
        if files := self.stems.get(composed(name)):
            return files, f"with {os.path.splitext(files[0])[1]} added"  # noqa: PTH122
        stem, suffix = os.path.splitext(composed(name))  # noqa: PTH122
        files = [file for file in self.stems.get(stem, ()) if file.lower().endswith(suffix.lower())] if suffix else []
        return files, "with the extension in another case"

    @cached_property
    def composed(self) -> dict[str, str]:
        """Non-ASCII names by their composed Unicode form."""
        return {composed(name): name for name in self.files if not name.isascii()}

    @cached_property
    def stems(self) -> dict[str, list[str]]:
        """Images by their names without extension."""
        by_stem: dict[str, list[str]] = {}
        known = suffixes()
        for name in sorted(self.files):
            stem, suffix = os.path.splitext(name)  # noqa: PTH122
            if suffix.lower() in known:
                by_stem.setdefault(composed(stem), []).append(name)
        return by_stem
