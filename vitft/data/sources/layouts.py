"""Which folders are splits, which classes: root/class/image, root/split/class/image, and what people make of these.

A split's folder is never taken for a class without a word, and what is left out is told. Where two readings are
as good, the data set is refused.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np

from vitft.data.sources.folders import Folder, Listing, relative, told
from vitft.data.sources.schema import Notes, Reading, image_structs, make_split, role_of
from vitft.data.sources.tables import read_table
from vitft.errors import DataError, UsageError, as_flag
from vitft.io.paths import composed

Classes = dict[str, list[str]]
"""Paths of the images of each class, by its name in composed form (NFC)."""


def read_folder(root: Path, listing: Listing, reading: Reading, notes: Notes) -> dict[str, datasets.Dataset]:
    """Read root/class/**/image, or root/split/class/**/image where folders are named as splits.

    A class is a folder directly under the root or split that holds at least one image, at any depth. Other layouts
    are read as `_layout` says; a `metadata.csv` or `.jsonl` with a column file_name tells the labels itself, as it
    does for the imagefolder of `datasets`. Raises DataError.
    """
    for remark in listing.remarks:
        notes.decide(remark)
    if (found := _by_metadata(_Layout(listing.tree, notes), reading, notes)) is not None:
        return found
    for name in ("image_column", "label_column", "split_column", "fold_column", "fold"):
        if (value := getattr(reading, name)) is not None:
            raise UsageError(f"{as_flag(name)} {value}: {root} holds folders of images, without columns; leave it out.")
    splits = splits_of(listing.tree, notes)
    if listing.doubles:
        path, first = (relative(one, listing.tree.path) for one in listing.doubles[0])
        notes.warn(
            f"{len(listing.doubles):,} images are there twice, by links: the first is {path}, which is {first} too"
        )
    names = sorted({name for classes in splits.values() for name in classes})
    return {split: _dataset(root, classes, names) for split, classes in splits.items()}


def splits_of(tree: Folder, notes: Notes) -> dict[str, Classes]:
    """Of each split its classes, and of each class its images. Raises DataError."""
    splits = _Layout(tree, notes).splits()
    _tell_files(tree, notes)
    return splits


def _tell_files(folder: Folder, notes: Notes, used: Iterable[Path] = ()) -> None:
    plain, pictures = told(((path, kind) for path, kind in folder.passed() if Path(path) not in used), folder.path)
    for sentence in plain:
        notes.decide(sentence)
    for sentence in pictures:
        notes.warn(sentence)
    if unnamed := [f"{inner.path}{os.sep}{name}" for inner in folder.walk() for name in inner.unnamed]:
        first = relative(unnamed[0], folder.path)
        are = "1 file is an image by its content, not by its name"
        if len(unnamed) > 1:
            are = f"{len(unnamed):,} files are images by their content, not by their names"
        notes.decide(f"{are}: the first is {first}")


def _dataset(root: Path, classes: Classes, names: list[str]) -> datasets.Dataset:
    index = {name: number for number, name in enumerate(names)}
    paths = [path for name in sorted(classes) for path in classes[name]]
    labels = np.repeat([index[name] for name in sorted(classes)], [len(classes[name]) for name in sorted(classes)])
    try:
        return make_split(image_structs(None, paths), labels, names, root)
    except UnicodeEncodeError as error:
        raise DataError(f"the file name {error.object!r} is not UTF-8; rename it.") from error


def _holding(folder: Folder) -> list[Folder]:
    return [inner for inner in folder.folders if inner.count]


def _named(folders: Iterable[Folder] | Iterable[str]) -> str:
    names = [one if isinstance(one, str) else one.name for one in folders]
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


class _Layout:
    """Finds the splits and classes of a tree of folders."""

    def __init__(self, tree: Folder, notes: Notes) -> None:
        self.tree, self.notes = tree, notes
        self.top = _inner(tree)
        if self.top is not tree:
            notes.decide(f"the data set is read from {self._at(self.top)}: no other folder holds images")
        held = _holding(self.top)
        self.roles = _split_folders(held, self.top.path)  # by name: what each split's folder is for
        self.folders = {folder.name: folder for folder in held if folder.name in self.roles}
        self.parts = {name: _inner(folder) for name, folder in self.folders.items()}  # where the classes are
        known = {one.name for name, part in self.parts.items() if self.roles[name] == "train" for one in _holding(part)}
        for name, folder in self.folders.items():
            if known & {one.name for one in _holding(folder)}:  # one class of many, with folders in it
                self.parts[name] = folder
        self.others = [folder for folder in held if folder.name not in self.roles]

    def _at(self, folder: Folder) -> str:
        return relative(folder.path, self.tree.path)

    def splits(self) -> dict[str, Classes]:
        """Of each split its classes, and of each class its images. Raises DataError."""
        if not self.tree.count:
            raise DataError(_nothing_in(self.tree))
        held = _holding(self.top)
        if not self.parts:
            if (found := self._splits_in_classes(held)) is not None:
                return found
            self.notes.decide("no folder is named as a split: all images are for training, a class is a folder")
            return {"train": self._classes(self.top, held)}
        with_classes = {name: part for name, part in self.parts.items() if _holding(part)}
        if any(self.roles[name] == "train" for name in with_classes):
            return self._by_folders(with_classes)
        inner = {composed(one.name) for part in with_classes.values() for one in _holding(part)}
        if self.others and inner & {composed(one.name) for one in self.others}:  # root/cat beside root/test/cat
            self.notes.decide(
                f"folders beside {_named(with_classes)} are taken for the training split: {_named(self.others)}"
            )
            rest = replace(self.top, folders=[one for one in self.top.folders if one.name not in self.parts])
            parts = self._by_folders(with_classes, told_others=True)
            return {"train": self._classes(rest, self.others), **parts}
        if with_classes and not self.others:
            return self._by_folders(with_classes)
        flat = [name for name in self.parts if name not in with_classes]
        if with_classes or not self.others or (len(flat) > 1 and "train" in map(self.roles.get, flat)):
            raise DataError(self._no_classes(flat, with_classes))
        for name in flat:
            self.notes.warn(
                f"the folder {name} is taken for a class, as {_named(self.others)} {_are(self.others)}; if it is a "
                "split, put class folders into it, or give a table of path, label and split"
            )
        return {"train": self._classes(self.top, held)}

    def _no_classes(self, flat: list[str], with_classes: Mapping[str, Folder]) -> str:
        """Why folders that are named as splits cannot be read as such."""
        if {"labels", "annotations"} & {one.name.lower() for folder in (self.tree, self.top) for one in folder.folders}:
            return (
                f"{self.tree.path} holds images beside labels or annotations, as for detecting objects; vitft "
                "classifies whole images: put each class into a folder of its own, or give a table of path and label."
            )
        if not flat:
            return (
                f"{self.top.path} holds {_named(with_classes)}, named as splits, beside {_named(self.others)}; "
                "put the class folders of the training images into train."
            )
        hint = (
            _tables_near(self.top) or "put each class into a folder of its own, or give a CSV of path, label and split."
        )
        hold = "hold" if len(flat) > 1 else "holds"
        return f"{self.top.path}: {_named(flat)} {hold} images but no class folders; {hint}"

    def _by_folders(self, parts: Mapping[str, Folder], told_others: bool = False) -> dict[str, Classes]:
        """The splits of these folders; all else that holds images is left out, and told. Raises DataError."""
        for role in dict.fromkeys(self.roles.values()):
            if len(same := [name for name in self.parts if self.roles[name] == role]) > 1:
                raise DataError(
                    f"{self.top.path} holds {_named(same)}, each of them a split for {role}; merge them, or keep one."
                )
        for name, part in self.parts.items():
            if part is not self.folders[name]:
                self.notes.decide(f"{name} is read from {self._at(part)}")
        self.notes.decide(f"the splits are the folders {_named(self.parts)}; a class is a folder in one")
        train = next((part for name, part in parts.items() if self.roles[name] == "train"), None)
        known = {composed(one.name) for one in _holding(train)} if train else set()
        found = {}
        for name, part in self.parts.items():
            held = _holding(part)
            if train is not None and part is not train and len(known) > 1 and len(held) == 1:
                only = composed(held[0].name)
                if only not in known:  # images/, test/ or unknown/
                    if (classes := _annotated(self.parts[name], held[0], known)) is not None:
                        self.notes.decide(f"the classes of {name} are those that its annotations tell")
                        found[name] = classes
                    else:
                        self._leave_out(name, part, f"one folder, {only}, which is no class of training")
                    continue
            if name in parts:
                found[name] = self._classes(part, held)
                if known and not known & found[name].keys():
                    self.notes.warn(f"none of the {len(held)} classes of {name} is one of training: {_named(held)}")
            else:
                self._leave_out(name, part, "no class folders")
        if self.others and not told_others:
            count = sum(one.count for one in self.others)
            self.notes.warn(f"{_images(count)} in {_named(self.others)} left out: no split is called so")
        if self.top.images:
            self.notes.warn(f"{_images(len(self.top.images))} directly in {self.top.path} left out: in no split")
        return {name if role_of(name) else self.roles[name]: classes for name, classes in found.items()}

    def _leave_out(self, name: str, part: Folder, why: str) -> None:
        self.notes.warn(f"{name} is left out, with {_images(part.count)}: it holds {why}")

    def _classes(self, folder: Folder, held: list[Folder]) -> Classes:
        """The images of each class; folders that are the same name in two Unicode forms are one. Raises DataError."""
        if not held:
            raise DataError(_nothing_in(folder))
        if folder.images:
            self.notes.warn(
                f"{_images(len(folder.images))} directly in {self._at(folder)} left out: in no class folder"
            )
        for empty in (one for one in folder.folders if not one.count):
            self._tell_empty(empty)
        classes: Classes = {}
        for one in held:
            name = composed(one.name)
            if name in classes:
                self.notes.decide(f"two folders {name} in {self._at(folder)}, in two Unicode forms, are one class")
            classes.setdefault(name, []).extend(one.files())
        return classes

    def _tell_empty(self, folder: Folder) -> None:
        """Say that a folder is no class: it holds no image. Raises DataError where it holds pictures."""
        passed = list(folder.passed())
        if any(kind for _, kind in passed):
            _, pictures = told(passed, self.tree.path)
            raise DataError(f"the folder {self._at(folder)} holds no image that is read: {'; '.join(pictures)}.")
        why = f"{len(passed):,} files in it are no images" if passed else "it is empty"
        sentence = f"the folder {self._at(folder)} is no class: {why}"
        (self.notes.warn if passed else self.notes.decide)(sentence)

    def _splits_in_classes(self, held: list[Folder]) -> dict[str, Classes] | None:
        """root/class/split/image, where every class is so; None where none is. Raises DataError where some are."""
        divided = [one for one in held if not one.images and all(role_of(inner.name) for inner in _holding(one))]
        whole = [
            one for one in divided if any(len(_holding(inner)) > 1 and not inner.images for inner in _holding(one))
        ]
        if whole:
            raise DataError(
                f"{self.top.path} holds {_named(held)}, of which {_named(whole)} "
                f"{_are(whole)} divided into splits of classes; give one data set: {whole[0].path}"
            )
        if not divided:
            return None
        if len(divided) < len(held):
            rest = [one for one in held if one not in divided]
            raise DataError(
                f"{self.top.path}: the folders in {_named(divided)} are named as splits, those in {_named(rest)} not; "
                "make one layout of it: split/class/image."
            )
        found: dict[str, Classes] = {}
        for one in divided:
            for part in _holding(one):
                found.setdefault(part.name, {}).setdefault(composed(one.name), []).extend(part.files())
        self.notes.decide(f"the splits are the folders {_named(found)} in each class's folder")
        return found


def _inner(folder: Folder) -> Folder:
    """The folder within, where folders hold nothing but one another: seg_train/seg_train/, archive/dataset/."""
    here = folder
    while not here.images and len(held := _holding(here)) == 1 and role_of(held[0].name) in (None, role_of(here.name)):
        here = held[0]
    if here.images or not _holding(here):  # it was a class, or images alone
        return folder
    return here


def _split_folders(folders: list[Folder], where: str) -> dict[str, str]:
    """What each folder that is named as a split is for: train, or seg_train where seg_test is as well.

    Raises DataError for several such families.
    """
    if exact := {folder.name: role for folder in folders if (role := role_of(folder.name))}:
        return exact
    families: dict[str, dict[str, str]] = {}
    for folder in folders:
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", folder.name)
        if len(found := [word for word in words if role_of(word)]) == 1:
            family = folder.name.replace(found[0], "*", 1).casefold()
            families.setdefault(family, {})[folder.name] = role_of(found[0]) or ""
    families = {family: roles for family, roles in families.items() if "train" in roles.values() and len(roles) > 1}
    if len(families) > 1:
        listed = "; ".join(_named(roles) for roles in families.values())
        raise DataError(
            f"{where} holds splits of {len(families)} kinds: {listed}; give folders train/class and test/class."
        )
    return next(iter(families.values()), {})


def _annotated(part: Folder, images: Folder, known: set[str]) -> Classes | None:
    """The classes that a text file beside a folder of images tells, as in Tiny ImageNet's val_annotations.txt.

    Each of its lines begins with a file and a class of training.
    """
    paths = {os.path.basename(path): path for path in images.files()}  # noqa: PTH119  (hot loop)
    for folder in part.walk():
        for name in (one.name for one in folder.others if one.name.endswith((".txt", ".csv", ".tsv"))):
            if not Path(folder.path, name).is_file():  # within an archive
                continue
            classes: Classes = {}
            with Path(folder.path, name).open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    file, label, *_ = [*re.split(r"[\t,; ]+", line.strip()), "", ""]
                    if file not in paths or composed(label) not in known:
                        break
                    classes.setdefault(composed(label), []).append(paths[file])
                else:
                    if sum(map(len, classes.values())) == len(paths):
                        return {label: sorted(files) for label, files in classes.items()}
    return None


# -- metadata.csv -----------------------------------------------------------------------------------


def _by_metadata(layout: _Layout, reading: Reading, notes: Notes) -> dict[str, datasets.Dataset] | None:
    """The splits that metadata.csv or .jsonl files tell; None where there is none, or none with labels."""
    tree, top = layout.tree, layout.top
    files = {name: file for name, folder in (("", top), *layout.folders.items()) if (file := _metadata_in(folder))}
    if not files:
        return None
    found: dict[str, datasets.Dataset] = {}
    reading = replace(reading, image_column=reading.image_column or "file_name")
    for name, file in files.items():
        inside = Notes()
        try:
            splits = read_table(file, reading, inside, Path(tree.path))
        except DataError as error:
            if any(_holding(part) for part in (layout.parts.values() or [top])):
                notes.decide(f"{relative(str(file), tree.path)} tells no labels, the class folders do: {error}")
                return None
            raise
        for sentence in inside.decisions:
            notes.decide(f"{relative(str(file), tree.path)}: {sentence}")
        for sentence in inside.warnings:
            notes.warn(f"{relative(str(file), tree.path)}: {sentence}")
        if list(splits) == ["train"]:
            splits = {name: splits["train"]} if name else _by_first_folder(splits["train"], file.parent)
        for split, rows in splits.items():
            if split in found:
                raise DataError(f"{tree.path}: two metadata files tell the split {split}; keep one of them.")
            found[split] = rows
    notes.decide(f"the labels are those of {_named(relative(str(file), tree.path) for file in files.values())}")
    named = sum(map(len, found.values()))
    if named < tree.count:
        notes.warn(f"{tree.count - named:,} of {tree.count:,} images are left out: no metadata file names them")
    _tell_files(tree, notes, files.values())
    return found


def _metadata_in(folder: Folder) -> Path | None:
    """Its metadata file with a column file_name."""
    for one in folder.others:
        stem, suffix = os.path.splitext(one.name.lower())  # noqa: PTH122
        if stem == "metadata" and suffix in (".csv", ".jsonl", ".tsv"):
            with Path(folder.path, one.name).open("rb") as lines:
                if b"file_name" in lines.readline(65_536):
                    return Path(folder.path, one.name)
    return None


def _by_first_folder(rows: datasets.Dataset, folder: Path) -> dict[str, datasets.Dataset]:
    """A table's rows by the folder that its files lie in, where all are in folders that are named as splits."""
    paths = rows.data.column("image").combine_chunks().field("path").to_pylist()
    first = [relative(path, str(folder)).partition("/")[0] for path in paths]
    if not all(map(role_of, set(first))):
        return {"train": rows}
    numbers: dict[str, list[int]] = {}
    for row, name in enumerate(first):
        numbers.setdefault(name, []).append(row)
    return {name: rows.select(chosen).flatten_indices() for name, chosen in numbers.items()}


# -- words ------------------------------------------------------------------------------------------


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _are(of: list[Folder]) -> str:
    return "are" if len(of) > 1 else "is"


def _nothing_in(tree: Folder) -> str:
    if tree.images:
        return (
            f"{tree.path} holds images but no class folders; "
            f"{_tables_near(tree) or 'put each class into a folder of its own, or give a CSV of path and label.'}"
        )
    _, pictures = told(tree.passed(), tree.path)
    hint = f"; {'; '.join(pictures)}." if pictures else "; expected root/class/image.jpg."
    return (
        f"no class folders with images, parquet files or CIFAR batches in {tree.path}{_tables_near(tree, '; ') or hint}"
    )


def _tables_near(tree: Folder, before: str = "") -> str:
    """A question, where tables lie in the folder or one below."""
    tables = [
        Path(folder.path, one.name)
        for folder in (tree, *tree.folders)
        for one in folder.others
        if one.name.lower().endswith((".csv", ".tsv", ".jsonl", ".ndjson"))
    ]
    best = sorted(
        tables, key=lambda path: (len(path.parts), not re.search("train|label", path.name.lower()), path.name)
    )
    return f"{before}did you mean the file {best[0]}?" if best else ""
