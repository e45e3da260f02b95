"""Which folders are splits and which are classes: root/class/image, root/split/class/image, and their variants.

Taking a split's folder for a class, or leaving images out, always leaves a note. Ambiguous datasets are refused.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np

from vitft.data.sources.folders import Folder, Listing, describe_others, relative
from vitft.data.sources.schema import COLUMNS, OF_TEXT, Notes, ReadOptions, Splits, group_rows, role_of, split_of_files
from vitft.data.sources.tables.files import read_table
from vitft.errors import DataError
from vitft.io.console import counted
from vitft.io.paths import composed

Classes = dict[str, list[str]]
"""The image paths of each class, by class name in composed form (NFC)."""
_ONE_FOLDER_EACH = "put each class into a folder of its own"


def read_folder(root: Path, listing: Listing, options: ReadOptions, notes: Notes) -> Splits:
    """Read root/class/**/image, or root/split/class/**/image where folders are named like splits.

    A class is a folder directly under the root or split with at least one image at any depth. For other layouts see
    `_Layout`. Files `metadata.csv` or `.jsonl` with a column file_name give the labels instead, as in the imagefolder
    of `datasets`. Raises DataError.
    """
    notes.decide(*listing.remarks)
    if (by_metadata := _read_metadata(_Layout(listing.tree, notes), options, notes)) is not None:
        return by_metadata
    options.refuse(f"{root} is a folder of images, not a table", *COLUMNS, *OF_TEXT)
    splits = splits_of(listing.tree, notes)
    if listing.duplicates:
        path, original = (relative(file, listing.tree.path) for file in listing.duplicates[0])
        notes.warn(
            f"{counted(len(listing.duplicates), 'image')} read twice through links (first: {path} is {original})"
        )
    names = sorted({name for classes in splits.values() for name in classes})
    return {split: _dataset(root, classes, names) for split, classes in splits.items()}


def splits_of(tree: Folder, notes: Notes) -> dict[str, Classes]:
    """The classes of each split. Raises DataError."""
    splits = _Layout(tree, notes).splits()
    _note_files(tree, notes)
    return splits


def _note_files(tree: Folder, notes: Notes, used: Collection[Path] = ()) -> None:
    """Notes about files that are not read, and about images that were recognized by content."""
    others = ((path, kind) for path, kind in tree.other_files() if Path(path) not in used)
    decisions, warnings = describe_others(others, tree.path)
    notes.decide(*decisions)
    notes.warn(*warnings)
    if by_content := [f"{folder.path}{os.sep}{name}" for folder in tree.walk() for name in folder.by_content]:
        are = "1 file is an image" if len(by_content) == 1 else f"{len(by_content):,} files are images"
        notes.decide(f"{are} by content, not by name (first: {relative(by_content[0], tree.path)})")


def _dataset(root: Path, classes: Classes, names: list[str]) -> datasets.Dataset:
    paths = [path for name in names for path in classes.get(name, ())]
    labels = np.repeat(np.arange(len(names)), [len(classes.get(name, ())) for name in names])
    return split_of_files(paths, labels, names, root)


def _names(folders: Iterable[Folder] | Iterable[str]) -> str:
    names = [folder if isinstance(folder, str) else folder.name for folder in folders]
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


class _Layout:
    """Finds the splits and classes in a tree of folders."""

    def __init__(self, tree: Folder, notes: Notes) -> None:
        self.tree, self.notes = tree, notes
        self.top = _unwrap(tree)
        if self.top is not tree:
            notes.decide(f"the dataset is read from {self._relative(self.top)}, the only folder with images")
        inner = self.top.with_images
        self.roles = _split_roles(inner, self.top.path)  # of each split's folder, by name
        self.folders = {folder.name: folder for folder in inner if folder.name in self.roles}
        self.parts = {name: _unwrap(folder) for name, folder in self.folders.items()}  # the folders of the classes
        training = [part for name, part in self.parts.items() if self.roles[name] == "train"]
        classes = {folder.name for part in training for folder in part.with_images}
        for name, folder in self.folders.items():
            if classes & {inner.name for inner in folder.with_images}:  # it has a single class, with folders in it
                self.parts[name] = folder
        self.others = [folder for folder in inner if folder.name not in self.roles]

    def _relative(self, folder: Folder) -> str:
        return relative(folder.path, self.tree.path)

    def splits(self) -> dict[str, Classes]:
        """The classes of each split. Raises DataError."""
        if not self.tree.count:
            raise DataError(_no_class_folders(self.tree))
        inner = self.top.with_images
        if not self.parts:
            if (by_class := self._splits_in_classes(inner)) is not None:
                return by_class
            self.notes.decide("no folder is named like a split: every folder is a class, all images are for training")
            return {"train": self._classes(self.top, inner)}
        with_classes = {name: part for name, part in self.parts.items() if part.with_images}
        if with_classes and (not self.others or any(self.roles[name] == "train" for name in with_classes)):
            return self._by_folders(with_classes)
        classes = {composed(folder.name) for part in with_classes.values() for folder in part.with_images}
        if self.others and classes & {composed(folder.name) for folder in self.others}:  # root/cat and root/test/cat
            self.notes.decide(f"folders beside {_names(with_classes)} are the training split: {_names(self.others)}")
            parts = self._by_folders(with_classes, others_are_train=True)
            return {"train": self._classes(self.top, self.others), **parts}
        flat = [name for name in self.parts if name not in with_classes]
        if with_classes or not self.others or (len(flat) > 1 and "train" in map(self.roles.get, flat)):
            raise DataError(self._why_no_splits(flat, with_classes))
        for name in flat:
            self.notes.warn(
                f"the folder {name} is read as a class, like {_names(self.others)}; if it is a split, put class "
                "folders into it, or give a table with path, label and split"
            )
        return {"train": self._classes(self.top, inner)}

    def _why_no_splits(self, flat: list[str], with_classes: Mapping[str, Folder]) -> str:
        """Why folders that are named like splits cannot be read as splits."""
        nearby = {folder.name.lower() for parent in (self.tree, self.top) for folder in parent.folders}
        if nearby & {"labels", "annotations"}:
            return (
                f"{self.tree.path} has images beside labels or annotations, as for object detection; vitft classifies "
                f"whole images: {_ONE_FOLDER_EACH}, or give a table with path and label."
            )
        if not flat:
            return (
                f"{self.top.path} has {_names(with_classes)}, named like splits, beside {_names(self.others)}; "
                "put the class folders of the training images into train."
            )
        remedy = _suggest_table(self.top) or f"{_ONE_FOLDER_EACH}, or give a CSV with path, label and split."
        hold = "hold" if len(flat) > 1 else "holds"
        return f"{self.top.path}: {_names(flat)} {hold} images but no class folders; {remedy}"

    def _by_folders(self, parts: Mapping[str, Folder], others_are_train: bool = False) -> dict[str, Classes]:
        """One split for each of these folders. Other images are left out, with a warning. Raises DataError."""
        for role in dict.fromkeys(self.roles.values()):
            if len(same := [name for name in self.parts if self.roles[name] == role]) > 1:
                raise DataError(f"{self.top.path}: {_names(same)} are all {role} splits; merge them, or keep one.")
        for name, part in self.parts.items():
            if part is not self.folders[name]:
                self.notes.decide(f"{name} is read from {self._relative(part)}")
        self.notes.decide(f"the folders {_names(self.parts)} are splits, the folders in them classes")
        train = next((part for name, part in parts.items() if self.roles[name] == "train"), None)
        known = {composed(folder.name) for folder in train.with_images} if train else set()
        splits = {}
        for name, part in self.parts.items():
            inner = part.with_images
            names, why = {composed(folder.name) for folder in inner}, ""
            if len(known) > 1 and len(inner) == 1 and not names & known:  # images/, test/ or unknown/
                if (classes := _read_annotations(part, inner[0], known)) is not None:
                    self.notes.decide(f"the classes of {name} are read from its annotations")
                    splits[name] = classes
                else:
                    why = f"its only folder, {names.pop()}, is not a class of the training split"
            elif name in parts:
                splits[name] = self._classes(part, inner)
                if known and not known & names:
                    which = f"none of the {len(inner)} classes of {name} is in the training split"
                    self.notes.warn(f"{which}: {_names(inner)}")
            else:
                why = "it has no class folders"
            if why:
                self.notes.warn(f"{name} is left out, with {counted(part.count, 'image')}: {why}")
        if self.others and not others_are_train:
            count = sum(folder.count for folder in self.others)
            self.notes.warn(f"{counted(count, 'image')} in {_names(self.others)} left out: not named like a split")
        if self.top.images:
            self.notes.warn(
                f"{counted(len(self.top.images), 'image')} directly in {self.top.path} left out: not in a split"
            )
        return {name if role_of(name) else self.roles[name]: classes for name, classes in splits.items()}

    def _classes(self, folder: Folder, class_folders: list[Folder]) -> Classes:
        """The images of each class. Two folders with one name in two Unicode forms are one class. Raises DataError."""
        if not class_folders:
            raise DataError(_no_class_folders(folder))
        where = self._relative(folder)
        if folder.images:
            self.notes.warn(
                f"{counted(len(folder.images), 'image')} directly in {where} left out: not in a class folder"
            )
        for empty in (inner for inner in folder.folders if not inner.count):
            self._note_empty(empty)
        classes: Classes = {}
        for inner in class_folders:
            name = composed(inner.name)
            if name in classes:
                self.notes.decide(f"two folders {name} in {where} differ only in Unicode form and are one class")
            classes.setdefault(name, []).extend(inner.files())
        return classes

    def _note_empty(self, folder: Folder) -> None:
        """Note that a folder without images is not a class. Raises DataError if it holds unreadable pictures."""
        others = list(folder.other_files())
        where = self._relative(folder)
        if any(kind for _, kind in others):
            _, pictures = describe_others(others, self.tree.path)
            raise DataError(f"the folder {where} has no readable image: {'; '.join(pictures)}.")
        if others:
            self.notes.warn(f"the folder {where} is not a class: it has {counted(len(others), 'file')} and no image")
        else:
            self.notes.decide(f"the folder {where} is not a class: it is empty")

    def _splits_in_classes(self, classes: list[Folder]) -> dict[str, Classes] | None:
        """root/class/split/image, if every class is divided; None if none is. Raises DataError if some are."""
        divided = [f for f in classes if not f.images and all(role_of(part.name) for part in f.with_images)]
        inside = [f for f in divided if any(len(part.with_images) > 1 and not part.images for part in f.with_images)]
        if inside:
            are = "are datasets" if len(inside) > 1 else "is a dataset"
            raise DataError(
                f"{self.top.path} holds {_names(classes)}, of which {_names(inside)} {are} with splits; "
                f"give one dataset: {inside[0].path}"
            )
        if not divided:
            return None
        if len(divided) < len(classes):
            rest = [folder for folder in classes if folder not in divided]
            raise DataError(
                f"{self.top.path}: the folders in {_names(divided)} are named like splits, those in {_names(rest)} are "
                "not; use one layout: split/class/image."
            )
        splits: dict[str, Classes] = {}
        for folder in divided:
            for part in folder.with_images:
                splits.setdefault(part.name, {}).setdefault(composed(folder.name), []).extend(part.files())
        self.notes.decide(f"the splits are the folders {_names(splits)} in each class folder")
        return splits


def _unwrap(folder: Folder) -> Folder:
    """Descend while a folder holds one folder and nothing else: seg_train/seg_train/, archive/dataset/."""
    here = folder
    while not here.images and len(inner := here.with_images) == 1:
        if role_of(inner[0].name) not in (None, role_of(here.name)):
            break
        here = inner[0]
    return folder if here.images or not here.with_images else here  # a class, or only images


def _split_roles(folders: list[Folder], where: str) -> dict[str, str]:
    """The role of each folder that is named like a split: train, or seg_train if there is also seg_test.

    Raises DataError for several such families.
    """
    if exact := {folder.name: role for folder in folders if (role := role_of(folder.name))}:
        return exact
    families: dict[str, dict[str, str]] = {}
    for folder in folders:
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", folder.name)
        if len(roles := [(word, role) for word in words if (role := role_of(word))]) == 1:
            ((word, role),) = roles
            families.setdefault(folder.name.replace(word, "*", 1).casefold(), {})[folder.name] = role
    families = {key: family for key, family in families.items() if "train" in family.values() and len(family) > 1}
    if len(families) > 1:
        names = "; ".join(map(_names, families.values()))
        raise DataError(f"{where} has {len(families)} sets of splits: {names}; use folders train/class and test/class.")
    return next(iter(families.values()), {})


def _read_annotations(part: Folder, images: Folder, known: set[str]) -> Classes | None:
    """The classes from a text file beside a folder of images, like Tiny ImageNet's val_annotations.txt.

    Each line must begin with a file name and a known class.
    """
    paths = {os.path.basename(path): path for path in images.files()}  # noqa: PTH119  (hot loop)
    for folder in part.walk():
        for file in (Path(folder.path, other.name) for other in folder.others):
            if file.suffix not in (".txt", ".csv", ".tsv") or not file.is_file():  # in an archive there is no file
                continue
            classes: Classes = {}
            with file.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    name, label, *_ = [*re.split(r"[\t,; ]+", line.strip()), "", ""]
                    if name not in paths or composed(label) not in known:
                        break
                    classes.setdefault(composed(label), []).append(paths[name])
                else:
                    if sum(map(len, classes.values())) == len(paths):
                        return {label: sorted(files) for label, files in classes.items()}
    return None


# -- metadata.csv -----------------------------------------------------------------------------------


def _read_metadata(layout: _Layout, options: ReadOptions, notes: Notes) -> Splits | None:
    """The splits from metadata.csv or .jsonl files; None if there are none, or none with labels."""
    tree, top = layout.tree, layout.top
    files = {name: file for name, folder in (("", top), *layout.folders.items()) if (file := _metadata_file(folder))}
    if not files:
        return None
    splits: Splits = {}
    options = replace(options, image_column=options.image_column or "file_name")
    for name, file in files.items():
        where, own_notes = relative(str(file), tree.path), Notes()
        try:
            in_file = read_table(file, options, own_notes, Path(tree.path))
        except DataError as error:
            if any(part.with_images for part in (layout.parts.values() or [top])):
                notes.decide(f"{where} has no labels, so the class folders are used: {error}")
                return None
            raise
        notes.decide(*(f"{where}: {sentence}" for sentence in own_notes.decisions))
        notes.warn(*(f"{where}: {sentence}" for sentence in own_notes.warnings))
        if list(in_file) == ["train"]:
            in_file = {name: in_file["train"]} if name else _by_first_folder(in_file["train"], file.parent)
        for split, rows in in_file.items():
            if split in splits:
                raise DataError(f"{tree.path}: two metadata files list the split {split}; keep one of them.")
            splits[split] = rows
    notes.decide(f"the labels are those of {_names(relative(str(file), tree.path) for file in files.values())}")
    listed = sum(map(len, splits.values()))
    if listed < tree.count:
        notes.warn(f"{tree.count - listed:,} of {tree.count:,} images are left out: not listed in any metadata file")
    _note_files(tree, notes, files.values())
    return splits


def _metadata_file(folder: Folder) -> Path | None:
    """The folder's metadata file that has a column file_name."""
    for other in folder.others:
        if other.name.lower() in ("metadata.csv", "metadata.jsonl", "metadata.tsv"):
            with Path(folder.path, other.name).open("rb") as lines:
                if b"file_name" in lines.readline(65_536):
                    return Path(folder.path, other.name)
    return None


def _by_first_folder(rows: datasets.Dataset, folder: Path) -> Splits:
    """A table's rows by the first folder in their paths, if all of these are named like splits."""
    paths = rows.data.column("image").combine_chunks().field("path").to_pylist()
    first = [relative(path, str(folder)).partition("/")[0] for path in paths]
    if not all(map(role_of, set(first))):
        return {"train": rows}
    return {name: rows.select(selected) for name, selected in group_rows(first).items()}


# -- messages ---------------------------------------------------------------------------------------


def _no_class_folders(tree: Folder) -> str:
    table = _suggest_table(tree)
    if tree.images:
        remedy = table or f"{_ONE_FOLDER_EACH}, or give a CSV with path and label."
        return f"{tree.path} holds images but no class folders; {remedy}"
    _, pictures = describe_others(tree.other_files(), tree.path)
    hint = table or (f"{'; '.join(pictures)}." if pictures else "expected root/class/image.jpg.")
    return f"no class folders with images, parquet files or CIFAR batches in {tree.path}; {hint}"


def _suggest_table(tree: Folder) -> str:
    """A question, if there are tables in the folder or one level below."""
    tables = [
        Path(folder.path, other.name)
        for folder in (tree, *tree.folders)
        for other in folder.others
        if other.name.lower().endswith((".csv", ".tsv", ".jsonl", ".ndjson"))
    ]
    best = sorted(
        tables, key=lambda path: (len(path.parts), not re.search("train|label", path.name.lower()), path.name)
    )
    return f"did you mean the file {best[0]}?" if best else ""
