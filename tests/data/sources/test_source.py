"""Opening datasets by name or path, as splits with columns image and label."""

import io
import json
import logging
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitft import TrainConfig
from vitft.data.decoder import decode
from vitft.data.sources import arrays, hub
from vitft.data.sources.identity import sample_id
from vitft.data.sources.schema import image_structs, make_split
from vitft.data.sources.source import ALIASES, class_indices, open_dataset, source_of
from vitft.errors import DataError, UsageError


def draw(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), color).save(path)
    return path


def png(value: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (2, 2), value).save(stream, "PNG")
    return stream.getvalue()


def labels_of(source, split: str = "train") -> list[str]:
    return [source.labels[i] for i in class_indices(source.splits[split])]


def ids_of(source, split: str = "train") -> list[str]:
    rows = source.splits[split]
    return [sample_id(rows, row) for row in range(len(rows))]


def pixels_of(source, row: int = 0, split: str = "train") -> np.ndarray:
    image = source.splits[split][row]["image"]
    assert set(image) == {"bytes", "path"}
    return decode(image["bytes"] if image["bytes"] is not None else Path(image["path"]))


def refused(dataset, match: str, **options) -> str:
    with pytest.raises(DataError, match=match) as caught:
        open_dataset(str(dataset), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _cache_stays_empty(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    yield
    assert list(cache.iterdir()) == []


def test_folder_of_class_folders(tmp_path):
    draw(tmp_path / "Pets" / "dog" / "b.png", "blue")
    draw(tmp_path / "Pets" / "cat" / "a.JPG")
    draw(tmp_path / "Pets" / "dog" / "deep" / "er" / "c.webp")
    source = open_dataset(str(tmp_path / "Pets"))
    assert (source.name, source.labels, source.revision) == ("Pets", ("cat", "dog"), None)
    assert list(source.splits) == ["train"]
    assert ids_of(source) == ["cat/a.JPG", "dog/b.png", "dog/deep/er/c.webp"]
    assert labels_of(source) == ["cat", "dog", "dog"]
    assert pixels_of(source, 1)[0, 0].tolist() == [0, 0, 255]
    features = source.splits["train"].features
    assert features["image"] == datasets.Image(decode=False)
    assert features["label"] == datasets.ClassLabel(names=["cat", "dog"])


def test_sample_ids_survive_a_selection_and_do_not_depend_on_where_the_folder_lies(tmp_path):
    for root in (tmp_path / "one", tmp_path / "other place" / "ü#%20"):
        for name in "abc":
            draw(root / "cat" / f"{name} x.png")
        source = open_dataset(str(root))
        assert ids_of(source) == ["cat/a x.png", "cat/b x.png", "cat/c x.png"]
        assert sample_id(source.splits["train"].select([2, 0]), 0) == "cat/c x.png"


def test_relative_paths_and_the_home_folder(tmp_path, monkeypatch):
    draw(tmp_path / "pets" / "cat" / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    draw(tmp_path / "~pets" / "cat" / "a.png")
    assert ids_of(open_dataset("~pets")) == ["cat/a.png"]
    for spelled in ("pets", "./pets", "~/pets", "pets/../pets"):
        source = open_dataset(spelled)
        assert (source.name, ids_of(source)) == ("pets", ["cat/a.png"])
    monkeypatch.chdir(tmp_path / "pets")
    assert open_dataset(".").name == "pets"


@pytest.mark.parametrize("names", [("train", "validation", "test"), ("train", "val", "test"), ("Train", "dev")])
def test_split_folders_share_one_list_of_classes(tmp_path, names):
    first, *others = names
    draw(tmp_path / first / "cat" / "1.png")
    draw(tmp_path / first / "dog" / "2.png")
    for name in others:
        draw(tmp_path / name / "dog" / "3.png")  # no cat here
        draw(tmp_path / name / "emu" / "4.png")  # only here
    source = open_dataset(str(tmp_path))
    assert list(source.splits) == list(names)
    assert source.labels == ("cat", "dog", "emu")
    assert labels_of(source, first) == ["cat", "dog"]
    assert labels_of(source, others[0]) == ["dog", "emu"]
    assert ids_of(source, others[0])[0] == f"{others[0]}/dog/3.png"


def test_classes_that_are_called_like_splits(tmp_path):
    for name in ("train", "plane", "boat"):
        draw(tmp_path / name / "1.png")
    source = open_dataset(str(tmp_path))
    assert (list(source.splits), source.labels) == (["train"], ("boat", "plane", "train"))


def test_junk_is_ignored(tmp_path):
    draw(tmp_path / "cat" / "1.png")
    for name in (
        ".ipynb_checkpoints/2.png",
        "__MACOSX/cat/3.png",
        "cat/.4.png",
        "cat/.ipynb_checkpoints/5.png",
    ):
        draw(tmp_path / name)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "cat/Thumbs.db", "cat/notes.txt", "cat/film.mpg"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    source = open_dataset(str(tmp_path))
    assert (ids_of(source), source.labels) == (["cat/1.png"], ("cat",))


def test_a_loop_of_links_ends(tmp_path):
    draw(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path / "cat")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    draw(tmp_path / "elsewhere" / "real" / "2.png")
    (tmp_path / "dog").symlink_to(tmp_path / "elsewhere" / "real")
    source = open_dataset(str(tmp_path))
    assert ids_of(source).count("cat/1.png") == 1
    assert "dog/2.png" in ids_of(source)


def test_folders_without_classes_say_so(tmp_path):
    refused(tmp_path, "expected root/class/image.jpg")
    draw(tmp_path / "1.png")
    refused(tmp_path, "no class folders")
    refused(draw(tmp_path / "1.png"), "is not a dataset")


def test_class_order_of_folders_is_by_name(tmp_path):
    for name in ("10", "2", "b", "B"):
        draw(tmp_path / name / "1.png")
    assert open_dataset(str(tmp_path)).labels == ("10", "2", "B", "b")


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    folder = os.fsencode(tmp_path / "cat")
    (tmp_path / "cat").mkdir()
    try:
        Path(os.fsdecode(folder + b"/\xff.png")).write_bytes(png())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    refused(tmp_path, "not UTF-8; rename it")


def write_parquet(path: Path, table: dict | pa.Table, features: datasets.Features | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(table)
    if features is not None:
        meta = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
        table = table.replace_schema_metadata(meta)
    pq.write_table(table, path)


HUB = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ant"])})
IMAGES = [{"bytes": png(value), "path": None} for value in (10, 20)]


@pytest.mark.parametrize("folder", ["", "data", "plain_text"])
def test_folder_of_parquet_files(tmp_path, folder):
    for name in ("train-00000-of-00002-ab.parquet", "train-00001-of-00002-cd.parquet", "test.parquet"):
        write_parquet(tmp_path / folder / name, {"img": IMAGES, "label": [1, 0]}, HUB)
    source = open_dataset(str(tmp_path))
    assert list(source.splits) == ["train", "test"]
    assert source.labels == ("zebra", "ant")  # the dataset's own order
    assert labels_of(source) == ["ant", "zebra"] * 2
    assert ids_of(source, "test") == ["row 0", "row 1"]
    assert sample_id(source.splits["train"].select([3, 1]), 0) == "row 3"
    assert pixels_of(source, 1)[0, 0].tolist() == [20, 20, 20]


def test_parquet_without_split_names_or_features(tmp_path):
    write_parquet(tmp_path / "0000.parquet", {"image": IMAGES, "class": ["b", "a"], "note": ["x", "y"]})
    write_parquet(tmp_path / "0001.parquet", {"image": IMAGES, "class": ["a", "c"], "note": ["x", "y"]})
    source = open_dataset(str(tmp_path))
    assert (source.labels, labels_of(source)) == (("a", "b", "c"), ["b", "a", "a", "c"])
    assert open_dataset(str(tmp_path / "0000.parquet")).labels == ("a", "b")
    write_parquet(tmp_path / "train.parquet", {"image": IMAGES, "class": ["a", "c"], "note": ["x", "y"]})
    assert {str(name): len(split) for name, split in open_dataset(str(tmp_path)).splits.items()} == {
        "unnamed": 4, "train": 2
    }  # fmt: skip


def test_parquet_in_split_folders(tmp_path):
    write_parquet(tmp_path / "train" / "0000.parquet", {"img": IMAGES, "label": [1, 0]}, HUB)
    write_parquet(tmp_path / "validation" / "0000.parquet", {"img": IMAGES, "label": [1, 0]}, HUB)
    assert list(open_dataset(str(tmp_path)).splits) == ["train", "validation"]


def test_parquet_in_several_folders_is_ambiguous(tmp_path):
    for name in ("cropped", "full"):
        write_parquet(tmp_path / name / "train.parquet", {"img": IMAGES, "label": [1, 0]}, HUB)
    refused(tmp_path, "2 folders: cropped, full; give one")


def test_a_parquet_file_of_more_rows_than_memory_holds_is_refused(tmp_path, monkeypatch):
    table = {"image": pa.nulls(100_000, pa.binary()), "label": pa.array(["x"] * 100_000)}
    write_parquet(tmp_path / "train.parquet", pa.table(table))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=5_000_000))
    refused(tmp_path / "train.parquet", r"its 100,000 rows need 6\.\d MB, but this machine has 5\.0 MB of memory")


def test_broken_parquet(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nothing")
    refused(tmp_path, "not a readable parquet file")
    write_parquet(tmp_path / "train.parquet", {"img": IMAGES, "label": [1, 9]}, HUB)
    refused(tmp_path, "label 9 but only 2 class names")


def test_an_unlabeled_split_is_left_out(tmp_path):
    write_parquet(tmp_path / "train.parquet", {"img": IMAGES, "label": [1, 0]}, HUB)
    write_parquet(tmp_path / "test.parquet", {"img": IMAGES, "label": [-1, -1]}, HUB)
    assert list(open_dataset(str(tmp_path)).splits) == ["train"]
    write_parquet(tmp_path / "test.parquet", {"img": IMAGES})
    assert list(open_dataset(str(tmp_path), label_column="label").splits) == ["train"]
    write_parquet(tmp_path / "train.parquet", {"img": IMAGES, "label": [1, -1]}, HUB)
    refused(tmp_path, r"1 of 2 images have no label \(first: row 1\)")


def test_a_missing_image_counts_as_zero_bytes(tmp_path):
    write_parquet(tmp_path / "train.parquet", {"img": [IMAGES[0], None], "label": [1, 0]}, HUB)
    assert open_dataset(str(tmp_path)).splits["train"][1]["image"]["bytes"] == b""


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([10, 2], ("2", "10")),
        ([True, False], ("false", "true")),
        ([1.0, 3.0], ("1", "3")),
        (["b", "a"], ("a", "b")),
    ],
)
def test_labels_of_any_kind_become_classes(tmp_path, values, names):
    write_parquet(tmp_path / "train.parquet", {"image": IMAGES, "label": values})
    source = open_dataset(str(tmp_path))
    assert source.labels == names
    assert labels_of(source) == [str(v).lower().removesuffix(".0") for v in values]


def test_columns_are_found_or_asked_for(tmp_path):
    features = datasets.Features(
        {
            "left": datasets.Image(),
            "right": datasets.Image(),
            "coarse": datasets.ClassLabel(names=["x", "y"]),
            "fine": datasets.ClassLabel(names=["u", "v"]),
        }
    )
    table = {"left": IMAGES, "right": IMAGES[::-1], "coarse": [0, 1], "fine": [1, 0]}
    write_parquet(tmp_path / "train.parquet", table, features)
    assert "left, right" in refused(tmp_path, "--image-column")
    assert "coarse, fine" in refused(tmp_path, "--label-column", image_column="right")
    source = open_dataset(str(tmp_path), image_column="right", label_column="fine")
    assert (source.labels, labels_of(source)) == (("u", "v"), ["v", "u"])
    assert pixels_of(source)[0, 0, 0] == 20
    refused(tmp_path, "did you mean right", image_column="rigth")
    write_parquet(tmp_path / "train.parquet", {"image": IMAGES, "score": [0.5, 0.7]})
    refused(tmp_path, "no labels; the columns are image")
    refused(tmp_path, "the labels are real numbers", label_column="score")
    write_parquet(tmp_path / "train.parquet", {"text": ["a"], "label": [1]})
    refused(tmp_path, "no image column")


def test_fine_labels_win_over_coarse_ones(tmp_path):
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=["u", "v"]),
            "coarse_label": datasets.ClassLabel(names=["x"]),
        }
    )
    write_parquet(tmp_path / "train.parquet", {"img": IMAGES, "fine_label": [1, 0], "coarse_label": [0, 0]}, features)
    assert open_dataset(str(tmp_path)).labels == ("u", "v")
    assert open_dataset(str(tmp_path), label_column="coarse_label").labels == ("x",)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_table_of_path_and_label(tmp_path, suffix):
    rows = [("a b/1.png", "dog", "train"), ("2.png", "cat", "train"), ("./3.png", "dog", "val")]
    for path, *_ in rows:
        draw(tmp_path / path, "blue")
    file = tmp_path / f"pets.{suffix}"
    if suffix == "jsonl":
        lines = [json.dumps(dict(zip(("path", "label", "split"), row, strict=True))) for row in rows]
    else:
        comma = {"csv": ",", "tsv": "\t"}[suffix]
        lines = ["\ufeff" + comma.join(("path", "label", "split")), *(comma.join(row) for row in rows)]
    file.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    source = open_dataset(str(file))
    assert (source.name, source.labels, list(source.splits)) == ("pets", ("cat", "dog"), ["train", "val"])
    assert ids_of(source) == ["a b/1.png", "2.png"]
    assert labels_of(source, "val") == ["dog"]
    assert pixels_of(source)[0, 0].tolist() == [0, 0, 255]


def test_table_columns_of_other_names(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("where,species\n1.png,cat\n")
    refused(file, "the columns are where, species; choose one with --image-column")
    draw(tmp_path / "1.png")
    assert open_dataset(str(file)).labels == ("cat",)
    file.write_text("file_name,width,kind\n1.png,3,cat\n")
    refused(file, "width, kind could be the label; choose one with --label-column")
    assert open_dataset(str(file), label_column="kind").labels == ("cat",)
    refused(file, "did you mean kind", label_column="kidn")


def test_whole_numbers_in_a_table_are_ordered_by_value(tmp_path):
    draw(tmp_path / "1.png")
    draw(tmp_path / "2.png")
    (tmp_path / "t.csv").write_text("path,label\n1.png,10\n2.png,9\n")
    assert open_dataset(str(tmp_path / "t.csv")).labels == ("9", "10")


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../b.png", "", "a\0b"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path, path):
    file = tmp_path / "t.jsonl"
    draw(tmp_path / "ok.png")
    file.write_text(json.dumps({"path": "ok.png", "label": "x"}) + "\n" + json.dumps({"path": path, "label": "x"}))
    refused(file, "line 2")


def test_where_it_is_asked_for_a_path_may_leave_the_folder(tmp_path):
    draw(tmp_path / "photos" / "a.png")
    draw(tmp_path / "photos" / "b.png", "blue")
    (tmp_path / "lists").mkdir()
    file = tmp_path / "lists" / "t.csv"
    file.write_text(f"path,label\n../photos/a.png,x\n{tmp_path}/photos/b.png,y\n")
    refused(file, r"line 2: \.\./photos/a\.png is outside of .*add --allow-outside")
    source = open_dataset(str(file), allow_outside=True)
    assert pixels_of(source, 1)[0, 0].tolist() == [0, 0, 255]


def test_an_absolute_path_may_stay_inside(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(f"path,label\n{tmp_path}/a.png,x\n")
    assert pixels_of(open_dataset(str(tmp_path / "t.csv"))).shape[2] == 3


@pytest.mark.parametrize("column", [pa.struct({"bytes": pa.binary(), "path": pa.string()}), pa.string()])
def test_a_parquet_file_reads_images_only_of_its_own_folder(tmp_path, column):
    draw(tmp_path / "data" / "inside.png", "blue")
    draw(tmp_path / "secret.png")

    def stored(name: str) -> Path:
        rows = [name if column == pa.string() else {"bytes": None, "path": name}] * 2
        table = pa.table({"image": pa.array(rows, column), "label": ["x", "y"]})
        write_parquet(tmp_path / "data" / "train.parquet", table)
        return tmp_path / "data" / "train.parquet"

    source = open_dataset(str(stored("inside.png")), image_column="image")
    assert pixels_of(source)[0, 0].tolist() == [0, 0, 255]
    for name in ("../secret.png", str(tmp_path / "secret.png"), "/etc/passwd"):
        refused(stored(name), "is outside of", image_column="image")
    assert pixels_of(open_dataset(str(stored("../secret.png")), image_column="image", allow_outside=True)).any()


def test_a_hub_dataset_names_no_file_of_this_machine(tmp_path, monkeypatch):
    draw(tmp_path / "secret.png")
    images = image_structs(None, [str(tmp_path / "secret.png")] * 2)
    hostile = make_split(images, ["x", "y"], root=tmp_path)  # its column `name` claims that our reader named its files
    builder = SimpleNamespace(
        hash="0" * 40, base_path=None, info=SimpleNamespace(download_checksums={}),
        download_and_prepare=lambda: None, as_dataset=lambda: {"train": hostile},
    )  # fmt: skip
    monkeypatch.setattr(hub, "answers", lambda *asked: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *asked, **how: builder)
    refused("some/body", r"secret\.png is outside of")


def test_a_column_name_of_the_dataset_itself_names_no_images(tmp_path):
    table = {"image": IMAGES, "label": [1, 0], "name": ["a.png", "b.png"]}
    write_parquet(tmp_path / "data" / "train.parquet", table)
    datasets.Dataset.from_dict(table).save_to_disk(str(tmp_path / "saved"))
    for folder in ("data", "saved"):
        source = open_dataset(str(tmp_path / folder))
        assert ids_of(source) == ["row 0", "row 1"]
        assert "name" not in source.splits["train"].column_names


def test_images_of_a_metadata_file_are_named_from_the_root_however_it_is_spelled(tmp_path):
    draw(tmp_path / "pets" / "train" / "1.png")
    (tmp_path / "pets" / "train" / "metadata.csv").write_text("file_name,label\n1.png,cat\n")
    for spelled in ("pets", "pets/../pets"):
        assert ids_of(open_dataset(str(tmp_path / spelled))) == ["train/1.png"]


def test_broken_tables(tmp_path):
    file = tmp_path / "t.jsonl"
    for content, message in (
        (b"{}\n[1]\n", "line 2"),
        (b"{'a'}\n", "line 1"),
        (b"\xff\xfe\n", "utf-16 text"),
        (b"", "no rows"),
    ):
        file.write_bytes(content)
        refused(file, message)
    draw(tmp_path / "a.png")
    file.write_text('{"path": "a", "label": "x"}\n{"path": "b", "label": 3}\n')
    refused(file, "several types")
    file.write_text('{"path": "a", "label": "x"}\n{"path": "b"}\n')
    refused(file, "have no label")


CIFAR = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)


def write_cifar10(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    meta = {b"label_names": [b"plane", b"car"], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, 2))
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {b"batch_label": b"x", b"labels": [1, 0], b"data": CIFAR, b"filenames": [b"a", b"b"]}
        (folder / name).write_bytes(pickle.dumps(batch, 2))


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_original_cifar10_batches(tmp_path, inner):
    write_cifar10(tmp_path / inner)
    source = open_dataset(str(tmp_path))
    assert source.labels == ("plane", "car")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 10, "test": 2}
    assert labels_of(source)[:2] == ["car", "plane"]
    expected = CIFAR[1].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(pixels_of(source, 1), expected)


def test_batches_of_cifar10_are_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    for number in range(1, 6):
        batch = {b"labels": [number % 2] * number, b"data": np.repeat(CIFAR[:1], number, 0)}
        (tmp_path / f"data_batch_{number}").write_bytes(pickle.dumps(batch, 2))
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda *how: sorted(glob(*how), reverse=True))  # as a folder may list them
    assert class_indices(open_dataset(str(tmp_path)).splits["train"]).tolist() == [1, 0, 0, 1, 1, 1, *[0] * 4, *[1] * 5]


def test_original_cifar100_batches(tmp_path):
    meta = {b"fine_label_names": [b"apple", b"bed"], b"coarse_label_names": [b"fruit"]}
    (tmp_path / "meta").write_bytes(pickle.dumps(meta, 2))
    for name in ("train", "test"):
        batch = {b"fine_labels": [1, 0], b"coarse_labels": [0, 0], b"data": CIFAR}
        (tmp_path / name).write_bytes(pickle.dumps(batch, 2))
    source = open_dataset(str(tmp_path))
    assert source.labels == ("apple", "bed")
    assert {name: labels_of(source, name) for name in source.splits} == {
        "train": ["bed", "apple"], "test": ["bed", "apple"],
    }  # fmt: skip
    assert open_dataset(str(tmp_path), label_column="coarse_label").labels == ("fruit",)


class Hostile:
    """Touches a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_hostile_pickle_is_refused_unread(tmp_path):
    write_cifar10(tmp_path / "data")
    (tmp_path / "data" / "data_batch_1").write_bytes(pickle.dumps({b"data": Hostile(tmp_path / "owned")}, 2))
    refused(tmp_path / "data", "uses (posix|nt).mkdir, which no CIFAR batch needs")
    assert not (tmp_path / "owned").exists()
    (tmp_path / "data" / "data_batch_1").write_bytes(b"cbuiltins\neval\n(Vprint(1)\ntR.")
    refused(tmp_path / "data", "builtins.eval")
    # A dotted name below an allowed module must not lead on to others.
    (tmp_path / "data" / "data_batch_1").write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.")
    refused(tmp_path / "data", "numpy.ndarray.dumps")
    for name in ("numpy.core.multiarray scalar", "os _reconstruct", "numpy _reconstruct"):
        (tmp_path / "data" / "data_batch_1").write_bytes("c{}\n{}\n.".format(*name.split()).encode())
        refused(tmp_path / "data", f"uses {name.replace(' ', '.')}, which no CIFAR batch needs")
    for code in ("u1", "|u1", b"u1", b"|u1"):
        assert arrays._uint8(code) == np.uint8
    for code in ("i1", "u2", "f8", "O8", b"O"):
        with pytest.raises(pickle.UnpicklingError, match="images are bytes"):
            arrays._uint8(code)


def test_broken_cifar_batches(tmp_path):
    write_cifar10(tmp_path)
    for content in (b"", b"junk", pickle.dumps([1], 2), pickle.dumps({b"labels": [1]}, 2)):
        (tmp_path / "data_batch_2").write_bytes(content)
        refused(tmp_path, "data_batch_2 is not a CIFAR batch")
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"labels": [5], b"data": CIFAR[:1]}, 2))
    refused(tmp_path, "label 5 but only 2 class names")
    for names in (None, b"plane", [1, 2], {0: b"plane"}):
        (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, 2))
        refused(tmp_path, "batches.meta has no label_names; unpack the archive again")


def test_classes_that_one_split_declares_are_not_doubted() -> None:
    """Elsewhere a class of one image is doubtful, and numbers are regression targets."""
    declared = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["0.5", "1.5", "2.5"])})
    images = [Image.new("L", (2, 2), level) for level in (10, 20, 30)]
    train = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2]}, declared)
    test = datasets.Dataset.from_dict({"image": images, "label": ["0.5", "1.5", "2.5"]}).cast_column(
        "image", datasets.Image()
    )
    source = open_dataset({"train": train, "test": test})
    assert (source.labels, source.warnings) == (("0.5", "1.5", "2.5"), ())
    with pytest.raises(DataError, match="the labels are real numbers"):
        open_dataset({"test": test})


def test_digits_are_bundled():
    from sklearn.datasets import load_digits

    source = open_dataset("digits")
    assert (source.name, source.revision) == ("digits", None)
    assert source.labels == tuple("0123456789")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 1438, "test": 359}
    test = np.bincount(class_indices(source.splits["test"]))
    train = np.bincount(class_indices(source.splits["train"]))
    assert (np.abs(test - (test + train) / 5) < 1).all()
    known = {
        image.astype(np.uint8).tobytes(): label for image, label in zip(*load_digits(return_X_y=True), strict=True)
    }
    seen = set()
    for name in ("train", "test"):
        for row in range(0, len(source.splits[name]), 7):
            pixels = pixels_of(source, row, name)
            assert pixels.shape == (8, 8, 3)
            key = np.rint(pixels[..., 0] * (16 / 255)).astype(np.uint8).tobytes()
            assert known[key] == source.splits[name][row]["label"]
            assert key not in seen
            seen.add(key)


def test_an_alias_wins_over_a_folder_unless_spelled_as_a_path(tmp_path, monkeypatch):
    draw(tmp_path / "digits" / "cat" / "1.png")
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset("digits").labels) == 10
    assert open_dataset("./digits").labels == ("cat",)


def test_unknown_names():
    assert "did you mean cifar10" in refused("cifar1O", "no dataset 'cifar1O'")
    assert "digits" in refused("", "no dataset")
    refused("digits", "no column 'kind'", label_column="kind")
    refused("./nowhere", "no file or folder ./nowhere")
    refused("a/b/c", "no file or folder a/b/c")
    refused("x" * 5000, "no dataset")


def test_a_revision_belongs_to_the_hub(tmp_path):
    draw(tmp_path / "cat" / "1.png")
    for dataset in ("digits", str(tmp_path)):
        with pytest.raises(UsageError, match="not on the hub"):
            open_dataset(dataset, revision="main")


def test_aliases_are_the_names_of_hub_ids():
    assert {name: alias.repo.partition("/")[2] for name, alias in ALIASES.items()} == {name: name for name in ALIASES}
    assert ALIASES["svhn"].config == "cropped_digits"


@pytest.mark.parametrize(
    ("name", "labels"), [("cifar100", "fine_label coarse_label"), ("oxford-iiit-pet", "label kind")]
)
def test_an_alias_is_read_from_the_hub_at_the_revision_that_is_asked_for(monkeypatch, name, labels):
    kinds = {label: datasets.ClassLabel(names=[f"{label} {i}" for i in range(2)]) for label in labels.split()}
    features = datasets.Features({"img": datasets.Image(), **kinds})
    rows = {"img": [{"bytes": png(value), "path": None} for value in (1, 2)], **{label: [1, 0] for label in kinds}}
    raw = {"train": datasets.Dataset.from_dict(rows, features=features)}
    asked = []
    monkeypatch.setattr(hub, "read", lambda *how: (asked.append(how), (raw, "0" * 40))[1])
    first, other = kinds
    source = source_of(TrainConfig(dataset=name, dataset_revision="v2"))
    assert (source.name, source.revision, labels_of(source)) == (name, "0" * 40, [f"{first} 1", f"{first} 0"])
    assert labels_of(source_of(TrainConfig(dataset=name, label_column=other))) == [f"{other} 1", f"{other} 0"]
    assert asked == [(ALIASES[name].repo, None, "v2"), (ALIASES[name].repo, None, None)]


def test_progress_bars_and_log_lines_of_the_hub_are_put_back():
    kinds = (datasets.utils.logging, huggingface_hub.utils.logging)
    before = [one.get_verbosity() for one in kinds]
    bars = datasets.utils, huggingface_hub.utils
    for hidden in (False, True):
        for one in bars:
            (one.disable_progress_bars if hidden else one.enable_progress_bars)()
        with hub._quiet():
            assert [one.are_progress_bars_disabled() for one in bars] == [True, True]
            assert [one.get_verbosity() for one in kinds] == [logging.CRITICAL] * 2
        assert [one.are_progress_bars_disabled() for one in bars] == [hidden, hidden]
        assert [one.get_verbosity() for one in kinds] == before
    for one in bars:
        one.enable_progress_bars()


def test_the_commit_of_a_builder_is_its_hash_or_in_its_addresses():
    def commit(name, base=None, **checksums):
        return hub._commit(
            SimpleNamespace(hash=name, base_path=base, info=SimpleNamespace(download_checksums=checksums or None))
        )

    one, other = "0123456789abcdef" * 2 + "01234567", "f" * 40
    assert commit(one) == one
    assert commit("a" * 16, f"hf://datasets/owner/name@{one}") == one
    assert (
        commit("a" * 16, "", **{"https://hub/readme": {}, f"hf://datasets/owner/name@{other}/x.parquet": {}}) == other
    )
    assert commit("a" * 16) is None


def test_a_source_is_called_as_its_folder_or_file(tmp_path):
    draw(tmp_path / "pets.v2" / "cat" / "1.png")
    assert open_dataset(str(tmp_path / "pets.v2")).name == "pets.v2"
    (tmp_path / "pets.v2" / "small list.v3.csv").write_text("path,label\ncat/1.png,cat\n")
    assert open_dataset(str(tmp_path / "pets.v2" / "small list.v3.csv")).name == "small-list.v3"


@pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion_mnist"])
def test_shared_data(name):
    folder = Path(__file__).parents[4] / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    source = open_dataset(str(folder))
    assert (source.name, len(source.labels), len(source.splits["test"])) == (name, 10, 10_000)
    side = 32 if name == "cifar10" else 28
    assert pixels_of(source, 9_999, "test").shape == (side, side, 3)


def test_a_hub_dataset_that_cannot_be_built_says_why(monkeypatch):
    def fail(*args, **kwargs):
        try:
            raise OSError("disk full\nand more")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr("vitft.data.sources.hub.answers", lambda *asked: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    said = refused("owner/name:small", "^hub dataset owner/name:small: the hub's copy cannot be used: OSError: ")
    assert said.endswith("OSError: disk full; offline, use a local folder or --dataset digits.")


def test_an_unknown_configuration_is_explained_over_two_lines(monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("BuilderConfig 'x' not found.\nAvailable: ['a', 'b']\nand more")

    monkeypatch.setattr("vitft.data.sources.hub.answers", lambda *asked: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    said = refused("owner/name:x", "cannot be used: ValueError: BuilderConfig 'x' not found")
    assert "Available: ['a', 'b'];" in said


SECRETS = ("hf_AbCdEfGhIjKlMnOp", "s3cret", "4f3a9c")


@pytest.mark.parametrize(
    "text",
    [
        "https://user:s3cret@hub.example/x", "http://hf_AbCdEfGhIjKlMnOp@hub.example", "Bearer hf_AbCdEfGhIjKlMnOp",
        "for url: https://cdn.example/a.parquet?X-Amz-Signature=4f3a9c&x=1 (403)", "https://hub.example/x?token=s3cret",
    ],
)  # fmt: skip
def test_no_token_in_a_url_is_printed(monkeypatch, text):
    def fail(*args, **kwargs):
        raise ValueError(f"could not read\n{text}")

    monkeypatch.setattr("vitft.data.sources.hub.answers", lambda *asked: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    said = refused("owner/name", "the hub's copy cannot be used")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: (_ for _ in ()).throw(ConnectionError()))
    monkeypatch.setattr("vitft.io.hub_errors.constants.ENDPOINT", text)
    said += refused("owner/name", "could not be reached")
    if "://" in text.split()[0]:
        monkeypatch.setattr("vitft.data.streaming.remote._WAIT_S", 0.0)
        monkeypatch.setattr("vitft.data.streaming.remote._listed", fail)
        said += refused(text, "could not read")
    assert not [secret for secret in SECRETS if secret in said], said
