"""Parquet files and hub datasets with any schema: which columns are found, and how they are normalized."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitft.data.decoder import decode
from vitft.data.sources import hub
from vitft.data.sources.features import find_columns
from vitft.data.sources.schema import Notes
from vitft.data.sources.source import Source, class_indices, open_dataset
from vitft.errors import DataError, UsageError


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (2, 2), value).save(stream, "PNG")
    return stream.getvalue()


FILES = [png(10), png(20)]
STRUCTS = [{"bytes": file, "path": None} for file in FILES]


def write(path: Path, table: Any, features: datasets.Features | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table if isinstance(table, pa.Table) else pa.table(table)
    if features is not None:
        written = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
        table = table.replace_schema_metadata(written)
    pq.write_table(table, path)
    return path


def seen(source: Source, split: str = "train") -> list[tuple[int, str]]:
    """The gray value and the class of each row."""
    rows = source.splits[split]
    labels = class_indices(rows)
    cells = [rows[row]["image"] for row in range(len(rows))]
    grays = [int(decode(one["bytes"] or Path(one["path"]))[0, 0, 0]) for one in cells]
    return [(gray, source.labels[label]) for gray, label in zip(grays, labels, strict=True)]


EXPECTED = [(10, "b"), (20, "a")]
LABELS = ["b", "a"]


@pytest.mark.parametrize(
    "columns",
    [
        {"image": pa.array(STRUCTS), "label": LABELS},
        {"image": pa.array(FILES, pa.large_binary()), "label": pa.array(LABELS, pa.large_string())},
        {"image": pa.array(FILES), "label": pa.array(LABELS).dictionary_encode()},
        {"image": pa.array(FILES, pa.binary_view()), "label": pa.array(LABELS, pa.string_view())},
        {"image": pa.array([list(file) for file in FILES], pa.list_(pa.uint8())), "label": LABELS},
        {"image": pa.array([[one] for one in STRUCTS]), "label": pa.array([["b"], ["a"]])},
        {"image": pa.array([[one] for one in FILES]), "label": LABELS},
        {"data": pa.array([{"image": one, "label": label} for one, label in zip(STRUCTS, LABELS, strict=True)])},
        {"jpg": STRUCTS, "cls": LABELS, "__key__": ["x", "y"], "__url__": ["u", "u"]},
        {"content": FILES, "breed": LABELS},
        {"image": FILES, "label": [b"b", b"a"]},
        {"image": FILES, "label": pa.array([b"b", b"a"], pa.binary_view())},
        {"image": FILES, "breed": LABELS, "score": [0.5, 1.5], "file_name": ["0.png", "1.png"]},
        {"image": FILES, "label": LABELS, "extra": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int32()))},
    ],
    ids=["structs", "large", "dictionary", "views", "integers", "lists-of-one", "lists-of-bytes", "nested",
         "webdataset", "only-other-column", "bytes-as-text", "bytes-views", "beside-numbers", "beside-a-map"],
)  # fmt: skip
def test_images_and_class_names_are_read_from_any_storage_type(tmp_path: Path, columns: dict[str, Any]) -> None:
    assert seen(open_dataset(str(write(tmp_path / "train.parquet", columns)))) == EXPECTED


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (2, 3, 3), (3, 2, 5)])
def test_pixels_as_nested_lists_are_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = [np.full(shape, value, np.uint8).tolist() for value in (10, 20)]
    assert seen(open_dataset(str(write(tmp_path / "train.parquet", {"image": pixels, "label": LABELS})))) == EXPECTED


@pytest.mark.parametrize(
    "kind", [datasets.Array3D((2, 3, 3), "uint8"), datasets.Array2D((2, 3), "uint8")], ids=lambda kind: kind._type
)
def test_pixels_that_are_declared_as_arrays_are_images(tmp_path: Path, kind: Any) -> None:
    features = datasets.Features({"image": kind, "note": datasets.Array2D((1, 1), "uint8"),
                                  "label": datasets.ClassLabel(names=["a", "b"])})  # fmt: skip
    columns = {"image": [np.full(kind.shape, value) for value in (10, 20)], "note": [[[1]]] * 2, "label": [1, 0]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "train.parquet"))
    assert seen(open_dataset(str(tmp_path / "train.parquet"))) == EXPECTED


@pytest.mark.parametrize("values", [[[0.5, 1.0]], [[-1, 300]]])
def test_numbers_that_are_not_pixels_are_refused(tmp_path: Path, values: list[list[float]]) -> None:
    file = write(tmp_path / "train.parquet", {"image": [values, values], "label": LABELS})
    with pytest.raises(DataError, match=r"column 'image' holds lists that are not pixels from 0 to 255"):
        open_dataset(str(file))


def test_a_column_of_paths_names_files_beside_the_parquet(tmp_path: Path) -> None:
    for number, file in enumerate(FILES):
        (tmp_path / f"{number}.png").write_bytes(file)
    source = open_dataset(str(write(tmp_path / "t.parquet", {"file_name": ["0.png", "1.png"], "label": LABELS})))
    assert seen(source) == EXPECTED


def test_one_of_several_image_columns_is_chosen_by_name_and_noted(tmp_path: Path) -> None:
    features = datasets.Features(
        {"mask": datasets.Image(), "image": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"]),
         "label": datasets.ClassLabel(names=["a", "b"])}
    )  # fmt: skip
    table = {"mask": STRUCTS[::-1], "image": STRUCTS, "kind": [0, 1], "label": [1, 0]}
    source = open_dataset(str(write(tmp_path / "train.parquet", table, features)))
    assert seen(source) == EXPECTED
    assert "the image is column 'image', by its name; not read: mask" in source.decisions
    assert "the label is column 'label', by its name; not read: kind" in source.decisions
    source = open_dataset(str(write(tmp_path / "test.parquet", {"image": STRUCTS, "breed": LABELS})))
    assert "the label is column 'breed', the only other one with names or whole numbers" in source.decisions


def test_the_usual_names_of_columns_are_known() -> None:
    """Names from datasets on the hub, in tables where only the name tells which column is which."""
    image, text = datasets.Image(), datasets.Value("string")

    def found(**features: Any) -> tuple[str, str | None]:
        image, label = find_columns(features, None, None, Notes())
        return image.path[-1], None if label is None else label.path[-1]

    for name in ("image", "img", "images", "picture", "photo", "pixel_values", "pixels", "jpg", "jpeg", "png", "webp"):
        assert found(mask=image, **{name: image}, label=text) == (name, "label")
    for name in ("file_name", "filename", "file", "path", "filepath", "file_path", "image_path", "image_file"):
        assert found(note=text, **{name: text}, label=text) == (name, "label")
        assert found(image=image, **{name: text}, breed=text) == ("image", "breed")
    for name in ("label", "labels", "fine_label", "class", "class_name", "category", "target", "cls"):
        assert found(image=image, note=text, **{name: text}) == ("image", name)
    for name in ("id", "idx", "index", "image_id", "key", "__key__", "__url__", "url", "width", "height", "split",
                 "fold"):  # fmt: skip
        assert found(image=image, breed=text, **{name: text}) == ("image", "breed")
    assert found(image=image, breed=text, note=text) == ("image", None)


@pytest.mark.parametrize("labels", [[["b", "a"], ["a"]], [[], ["a"]]])
def test_several_labels_an_image_are_refused_with_the_row(tmp_path: Path, labels: list[list[str]]) -> None:
    file = write(tmp_path / "train.parquet", {"image": FILES, "labels": labels})
    with pytest.raises(DataError, match=rf"train.parquet: column 'labels' holds {len(labels[0])} labels in row 0; "):
        open_dataset(str(file))


def test_several_images_are_refused_with_the_row_of_the_file(tmp_path: Path) -> None:
    table = pa.table({"image": [FILES[:1], FILES[:1], FILES[:1], FILES], "label": LABELS * 2})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=2)  # each group becomes an array
    with pytest.raises(DataError, match="column 'image' holds 2 images in row 3; "):
        open_dataset(str(tmp_path))


def test_numbers_of_classes_that_differ_from_file_to_file_go_by_name(tmp_path: Path) -> None:
    for number, names in enumerate((["a", "b"], ["b", "a"])):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        write(tmp_path / f"train-{number}.parquet", {"image": STRUCTS, "label": [1, 0]}, features)
    assert seen(open_dataset(str(tmp_path))) == [(10, "b"), (20, "a"), (10, "a"), (20, "b")]
    file = write(tmp_path / "train-1.parquet", {"image": STRUCTS, "label": [1, 2]}, features)
    with pytest.raises(DataError, match=f"{file}: label 2 but only 2 class names"):
        open_dataset(str(tmp_path))
    write(file, {"image": STRUCTS, "label": pa.nulls(2, pa.int64())}, features)
    with pytest.raises(DataError, match="split train: 2 of 4 images have no label"):
        open_dataset(str(tmp_path))


def test_files_of_other_types_of_one_split_are_joined(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", {"image": STRUCTS, "label": pa.array(LABELS, pa.large_string())})
    write(tmp_path / "1.parquet", {"img": FILES, "label": LABELS, "note": ["x", "y"]})
    assert seen(open_dataset(str(tmp_path))) == EXPECTED * 2
    write(tmp_path / "2.parquet", {"image": FILES, "label": [1, 2]})
    with pytest.raises(DataError, match=r"split train: its files have different label types \(int64, string\)"):
        open_dataset(str(tmp_path))


def test_a_split_without_labels_is_left_out_and_noted(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    write(tmp_path / "train.parquet", {"image": STRUCTS, "label": [1, 0]}, features)
    write(tmp_path / "test.parquet", {"image": STRUCTS, "label": [-1, -1]}, features)
    source = open_dataset(str(tmp_path))
    assert list(source.splits) == ["train"]
    assert "split test is left out: none of its 2 images has a label" in source.decisions


def test_a_column_of_splits_divides_the_only_file(tmp_path: Path) -> None:
    splits = ["train", "train", "test", "test"]
    table = {"image": FILES * 2, "label": LABELS * 2, "subset": splits, "fold": [0, 1, 0, 1]}
    file = write(tmp_path / "all.parquet", table)
    source = open_dataset(str(file))
    assert {name: seen(source, str(name)) for name in source.splits} == {"train": EXPECTED, "test": EXPECTED}
    source = open_dataset(str(file), fold=1)
    assert {name: seen(source, str(name)) for name in source.splits} == {
        "train": EXPECTED[:1], "validation": EXPECTED[1:], "test": EXPECTED,
    }  # fmt: skip
    for name in ("train", "test"):
        write(tmp_path / "two" / f"{name}.parquet", table)
    with pytest.raises(UsageError, match="has its own splits"):
        open_dataset(str(tmp_path / "two"), split_column="subset")


@pytest.mark.parametrize(
    "names",
    [
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test.parquet"),
        ("mnist_trainset.parquet", "mnist_testset.parquet"),
        ("Train.parquet", "TEST-1.parquet"),
        ("x-train2.parquet",),
    ],
)
def test_splits_are_found_by_the_names_of_files_and_folders(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write(tmp_path / name, {"image": FILES, "label": LABELS})
    source = open_dataset(str(tmp_path))
    assert [str(name) for name in source.splits] == ["train", "test"][: len(names)]
    assert all(seen(source, str(name)) == EXPECTED for name in source.splits)


def test_a_dataset_saved_by_datasets_is_read(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    made = datasets.Dataset.from_dict({"image": STRUCTS, "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "saved"))
    source = open_dataset(str(tmp_path / "saved"))
    assert {name: seen(source, str(name)) for name in source.splits} == {"train": EXPECTED, "test": EXPECTED}
    state = tmp_path / "saved" / "train" / "state.json"
    state.write_text(state.read_text().replace("data-", "../test/data-"))
    with pytest.raises(DataError, match="outside of its folder"):
        open_dataset(str(tmp_path / "saved"))
    for wrong in ('{"_data_f', "{}", "[]", '{"_data_files": [1]}'):
        state.write_text(wrong)
        with pytest.raises(DataError, match=r"state\.json is not what save_to_disk writes .*; save the dataset again"):
            open_dataset(str(tmp_path / "saved"))
    made.save_to_disk(str(tmp_path / "one"))
    source = open_dataset(str(tmp_path / "one"))
    assert {name: seen(source, str(name)) for name in source.splits} == {"train": EXPECTED}
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    assert "one cannot be loaded by datasets: " in refusal(tmp_path / "one")


def test_a_hub_dataset_is_read_by_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"data": [{"image": one, "label": label} for one, label in zip(STRUCTS, LABELS, strict=True)],
                      "usage": ["Training", "PrivateTest"]})  # fmt: skip
    raw = datasets.Dataset(table)
    monkeypatch.setattr(hub, "read", lambda *asked: ({"train": raw.select([1, 0])}, "0" * 40))
    source = open_dataset("some/body")
    assert {name: seen(source, str(name)) for name in source.splits} == {"Training": EXPECTED[:1], "test": EXPECTED[1:]}


def test_an_unknown_column_is_refused_with_a_list_of_all(tmp_path: Path) -> None:
    table = {"data": [{"image": one, "label": "x"} for one in STRUCTS], "tags": [["u"], ["v"]]}
    file = write(tmp_path / "train.parquet", table)
    with pytest.raises(DataError, match=r"no column 'data.lable'; did you mean data.label\?; the columns"):
        open_dataset(str(file), label_column="data.lable")
    assert seen(open_dataset(str(file), label_column="tags")) == [(10, "u"), (20, "v")]


def test_a_class_in_two_unicode_forms_is_one(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", {"image": FILES, "label": ["caf\u00e9", "tea"]})
    write(tmp_path / "test.parquet", {"image": FILES, "label": ["cafe\u0301", "tea"]})
    source = open_dataset(str(tmp_path))
    assert source.labels == ("caf\u00e9", "tea")
    assert seen(source) == seen(source, "test")


def declared(*names: Any) -> datasets.Features:
    """Features with a ClassLabel of these names."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x"] * bool(names))})
    features["label"].names = list(names)
    return features


@pytest.mark.parametrize(
    "labels",
    [
        pa.array(["b", "a"]), pa.array([" b", "a "]), pa.array(["b", "a"], pa.large_string()),
        pa.array(["b", "a"]).dictionary_encode(), pa.array([b"b", b"a"]), pa.array(["1", " 0"]),
        pa.array([1, 0], pa.int8()), pa.array([1, 0], pa.uint64()), pa.array([True, False]), pa.array([1.0, 0.0]),
        pa.array([1, 0], pa.float16()), pa.array([1, 0], pa.decimal128(5, 2)), pa.array([["b"], ["a"]]),
    ],
    ids=lambda labels: str(labels.type),
)  # fmt: skip
def test_declared_classes_are_read_however_their_labels_are_stored(tmp_path: Path, labels: pa.Array) -> None:
    file = write(tmp_path / "train.parquet", {"image": FILES, "label": labels}, declared("a", "b", "c"))
    source = open_dataset(str(file))
    assert source.labels == ("a", "b", "c")
    assert seen(source) == EXPECTED


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [(["nan", "9"], ("9", "nan"), [(10, "nan"), (20, "9")]), ([1, 0], (7, 8), [(10, "8"), (20, "7")])],
)
def test_a_declared_class_name_is_never_read_as_a_number(
    tmp_path: Path, labels: list[Any], names: tuple[Any, ...], expected: list[tuple[int, str]]
) -> None:
    file = write(tmp_path / "train.parquet", {"image": FILES, "label": labels}, declared(*names))
    assert seen(open_dataset(str(file))) == expected


MISSING = "1 of 2 images have no label"


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (["a", ""], MISSING), (["a", "N/A"], MISSING), (["a", "-1"], MISSING), ([0.0, float("nan")], MISSING),
        ([0, None], MISSING), ([None, None], "no image has a label"),
        (["a", "c"], "'c', which is not one of the 2 class"), (["a", "2"], "'2', which is not one of the 2 class"),
        (["a", "\u0663"], "not one of the 2 class names"), (["a", "9" * 5000], "not one of the 2 class names"),
        (["a", "x\ny"], r"'x\ny', which is not"), ([0, 2], "label 2 but only 2 class names"),
        ([0, 0.5], "holds 0.5; a class must be"), ([0, float("inf")], "holds inf; a class must be"),
        (pa.array([0, 2**64 - 1], pa.uint64()), "holds 1.84467e+19; a class must be"),
        (pa.array([0, 1], pa.date32()), "holds date32[day]; a class must be"),
        (pa.array([{"a": 0}, {"a": 1}]), "holds struct<a: int64>; a class must be"),
    ],
)  # fmt: skip
def test_labels_that_are_none_of_the_declared_classes_are_refused(tmp_path: Path, labels: Any, error: str) -> None:
    file = write(tmp_path / "train.parquet", {"image": FILES, "label": labels}, declared("a", "b"))
    assert error in refusal(file)


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (pa.array([1, 2], pa.date32()), "holds date32[day]; a class must be"),
        (pa.array([[("a", 1)], [("b", 2)]], pa.map_(pa.string(), pa.int64())), "a class must be"),
        (pa.array([b"a", b"\xff"]), "holds bytes that are not UTF-8 text"),
        ([1.0, float("inf")], "holds inf; a class must be"), ([1.0, 1e300], "holds 1e+300; a class must be"),
    ],
    ids=["date", "map", "bytes", "infinite", "large"],
)  # fmt: skip
def test_labels_of_a_type_that_no_class_has_are_refused(tmp_path: Path, labels: Any, error: str) -> None:
    assert error in refusal(write(tmp_path / "train.parquet", {"image": FILES, "label": labels}))


def refusal(file: Path) -> str:
    """The one-line error for a file."""
    with pytest.raises(DataError) as caught:
        open_dataset(str(file))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_small_numbers_of_half_precision_are_classes(tmp_path: Path) -> None:
    labels = pa.array([1, 0], pa.float16())
    assert seen(open_dataset(str(write(tmp_path / "train.parquet", {"image": FILES, "label": labels})))) == [
        (10, "1"), (20, "0"),
    ]  # fmt: skip
