"""Tables, beyond the corpus: the cost of reading, and how commands use it."""

import json
import os
from array import array
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.corpus import photos
from vitft import TrainConfig
from vitft.cli.app import app
from vitft.data.sources.schema import MISSING, Notes, ReadOptions
from vitft.data.sources.source import open_dataset, source_of
from vitft.data.sources.tables import columns
from vitft.data.sources.tables.image_paths import ImagePaths
from vitft.data.sources.tables.rows import Table
from vitft.data.validation.check import check
from vitft.training.setup import absolute


def write(folder: Path, table: str, *images: str) -> str:
    """Write a table and images beside it; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in photos(*images).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "t.csv").write_text(table, encoding="utf-8")
    return str(folder / "t.csv")


@pytest.mark.parametrize("name", ["train/{}/{}.png", "{}/{}.png", "{}/{}"])
def test_a_folder_is_listed_once_and_no_row_costs_a_look_at_the_disk(tmp_path, monkeypatch, name: str) -> None:
    images = [f"train/{i % 3}/{i}.png" for i in range(60)]
    rows = [f"{name.format(i % 3, i)},{'ab'[i % 2]}" for i in range(60)]
    table = write(tmp_path, "\n".join(["path,label", *rows]), *images)
    listed: Counter[str] = Counter()
    looked: Counter[str] = Counter()
    scandir, stat = os.scandir, os.stat
    monkeypatch.setattr(os, "scandir", lambda folder=".": (listed.update([str(folder)]), scandir(folder))[1])
    monkeypatch.setattr(os, "stat", lambda file, **how: (looked.update([str(file)]), stat(file, **how))[1])
    source = open_dataset(table)
    assert len(source.splits["train"]) == 60
    assert max(listed.values()) == 1
    assert not [file for file in looked if file.endswith(".png")]


def test_the_panel_of_reading_is_what_a_reader_is_asked() -> None:
    panel = [name for name, field in TrainConfig.model_fields.items() if field.json_schema_extra["panel"] == "Reading"]  # type: ignore[index,call-overload]
    assert panel == list(ReadOptions.__dataclass_fields__)


def test_every_command_that_reads_a_table_takes_a_fold(tmp_path) -> None:
    table = write(tmp_path, "path,label,fold\n0.png,a,0\n1.png,b,1\n2.png,a,1\n", "0.png", "1.png", "2.png")
    done = CliRunner().invoke(app, ["data", "info", table, "--fold", "1", "--fold-column", "fold", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert {split["name"]: split["count"] for split in document["splits"]} == {"train": 1, "validation": 2}
    assert any("folds: column 'fold': 1 (2) is validation" in sentence for sentence in document["decisions"])
    source = source_of(TrainConfig(dataset=table, fold=0))
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 2, "validation": 1}
    done = CliRunner().invoke(app, ["data", "check", table, "--json"])
    found = json.loads(done.stdout)["findings"]
    assert [one["detail"] for one in found if one["kind"] == "reading"] == list(open_dataset(table).warnings) != []
    for command in (["eval"], ["data", "check"], ["train"]):
        text = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command, "--help"]).stdout
        assert all(
            flag in text for flag in ("--split-column", "--fold ", "--fold-column", "--image-folder", "--encoding")
        )


def test_images_may_lie_in_a_folder_that_is_named(tmp_path, monkeypatch) -> None:
    write(tmp_path / "lists", "id,label\na,x\nb,y\n")
    write(tmp_path / "images", "", "a.jpg", "b.jpg")
    monkeypatch.chdir(tmp_path)
    config = absolute(TrainConfig(dataset="lists/t.csv", image_folder="images"))
    monkeypatch.chdir("/")  # a run is resumed from anywhere
    images = source_of(config).splits["train"][:]["image"]
    assert [Path(image["path"]).relative_to(tmp_path) for image in images] == [
        Path("images/a.jpg"),
        Path("images/b.jpg"),
    ]


def test_tables_of_other_splits_beside_it_are_named(tmp_path) -> None:
    table = Path(write(tmp_path, "path,label\n0.png,a\n1.png,b\n", "0.png", "1.png"))
    for name in ("train.csv", "val.csv", "test_labels.csv", "notes.csv"):
        (tmp_path / name).write_bytes(table.read_bytes())
    told = open_dataset(str(tmp_path / "train.csv")).decisions
    assert any(sentence.startswith("not read: test_labels.csv, val.csv; to use") for sentence in told)
    assert not any("to use several tables" in sentence for sentence in open_dataset(str(table)).decisions)


def test_labels_that_are_written_in_two_ways_are_named(tmp_path) -> None:
    labels = ["7", "07", "7.0", "8", "True", "TRUE", "caf\u00e9", "cafe\u0301", "10", "100"]
    rows = [f'{i}.png,"{label}"' for i, label in enumerate(labels)]
    source = open_dataset(write(tmp_path, "\n".join(["path,label", *rows]), *(f"{i}.png" for i in range(10))))
    found = {one.path for one in check(source) if one.kind == "similar-labels"}
    assert found == {"7", "7.0", "True"}
    assert len(source.labels) == 9  # the two forms of café are one class: there is nothing to tell


@pytest.mark.parametrize("labels", [["cat ", "cat"], ["cat ", "cat  "]])  # in the second one, none is without spaces
def test_labels_that_differ_only_in_spaces_are_one_class_and_named(tmp_path, labels: list[str]) -> None:
    rows = [f"{i}.png,{label}" for i, label in enumerate([*labels, "dog"])]
    source = open_dataset(write(tmp_path, "\n".join(["path,label", *rows]), "0.png", "1.png", "2.png"))
    assert source.labels == ("cat", "dog")
    assert any(all(repr(label) in sentence for label in labels) for sentence in source.warnings)


def test_what_pandas_takes_for_missing_is_no_label() -> None:
    from pandas._libs.parsers import STR_NA_VALUES

    assert STR_NA_VALUES <= MISSING
    assert not MISSING & {"-1", "0", "none", "missing", "no"}


def test_a_cell_that_names_a_folder_leaves_its_images_to_be_found(tmp_path) -> None:
    write(tmp_path, "", "a/0.png")
    for folder in ("a/", "a/.", "a/b/.."):
        names = ImagePaths(tmp_path / "t.csv", None, allow_outside=False)
        assert names.guess(folder) == (None, False)
        parent = folder.rpartition("/")[0]
        expected = tmp_path / os.path.normpath(f"{parent}/0.png")
        assert names.find(f"{parent}/0.png") == (str(expected), expected.exists())


def table(cells: dict[str, list[str]]) -> Table:
    """A table of these columns, from a file that does not exist."""
    count = len(next(iter(cells.values())))
    return Table(Path("nowhere/t.csv"), cells, array("q", range(2, count + 2)))


def test_the_usual_names_of_columns_are_known() -> None:
    """Names from datasets on Kaggle and the hub, in tables where only the name tells which column is which."""
    for name in ("path", "File", "filename", "file_name", "filepath", "filepaths", "image_path", "image_file", "image",
                 "Image File Name", "ImageName", "images", "img", "img_path", "img_name", "photo", "picture",
                 "image_id", "img_id", "Id", "name"):  # fmt: skip
        rows = table({"note": ["x", "y"], name: ["0.png", "1.png"]})
        names = ImagePaths(rows.path, None, allow_outside=False)
        assert columns.image_column(rows, names, None, Notes()) == name
    for name in ("label", "Labels", "fine_label", "label_name", "class", "classes", "className", "class_label",
                 "category", "category_name", "target", "ClassId", "label_id", "category_id"):  # fmt: skip
        rows = table({"path": ["0.png", "1.png"], "note": ["x", "y"], name: ["cat", "dog"]})
        assert columns.label_columns(rows, None) == {name}
        assert columns.read_labels(rows, {"path"}, "path", None, [], Notes()) == (["cat", "dog"], [name])


def assigned(cells: dict[str, list[str]]) -> tuple[list[str] | None, list[str]]:
    """The split of each row, and the warnings."""
    notes = Notes()
    return columns.read_splits(table(cells), set(), ReadOptions(), notes)[0], notes.warnings


def test_the_usual_names_of_columns_of_splits_and_folds_are_known() -> None:
    for name in ("split", "data_split", "Splits"):  # used whatever the splits are called
        assert assigned({name: ["web", "book"]})[0] == ["web", "book"]
    for name in ("subset", "partition", "Usage", "set", "dataset", "phase"):
        rows, (warning,) = assigned({name: ["web", "book"]})
        assert rows is None
        assert f"column {name!r} looks like a split (web, book) and is not used" in warning
    for name in ("fold", "folds", "kfold", "fold_id", "cv_fold", "CV", "fold5"):
        rows, (warning,) = assigned({name: ["0", "1"]})
        assert rows is None
        assert f"column {name!r} looks like folds (0, 1) and is not used; --fold K" in warning


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("train", "train is_train training is_training is_training_image is_training_img"),
        ("validation", "val is_val valid is_valid validation is_validation dev is_dev"),
        ("test", "test is_test testing is_testing"),
    ],
)
def test_the_usual_names_of_columns_of_yes_and_no_are_known(role: str, names: str) -> None:
    other = "is_test" if role == "train" else "is_train"
    for name in names.split():
        for yes, no in ("10", ("1.0", "0.0"), "TF", ("True", "False"), ("yes", "no"), "YN"):
            rows, warnings = assigned({name: [yes, no], other: [no, yes]})
            assert rows == [role, other.removeprefix("is_")]
            assert warnings == []


@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("train", "train Training trn train_set training-set trainval train_valid"),
        ("validation", "validation valid val dev eval evaluation devel development val_set validation_set PublicTest"),
        ("test", "test Testing tst test_set PrivateTest held-out holdout"),
    ],
)
def test_words_for_splits_are_known(role: str, words: str) -> None:
    known = {"train": "train", "validation": "val", "test": "test"}
    others = [word for other, word in known.items() if other != role]
    for word in words.split():
        rows, warnings = assigned({"whatever": [word, *others]})
        assert rows is not None
        assert [columns._ROLE_OF[columns.simplify(name)] for name in rows[:1]] == [role]
        assert rows[1:] == others
        assert warnings == []
