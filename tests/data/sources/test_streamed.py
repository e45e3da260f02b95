"""Datasets of parquet shards behind URLs: the same images and labels as in the folder they are from."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from tests.conftest import BUCKET
from tests.hub import CIFAR10, DATASET, StandInHub, make_dataset
from tests.web import FileServer
from vitft.data.decoder import BadImage, decode, encoded
from vitft.data.sources import streamed
from vitft.data.sources.identity import blocks_of, content_hashes, is_streamed, sample_names
from vitft.data.sources.schema import Notes, ReadOptions
from vitft.data.sources.source import Source, class_indices, open_dataset
from vitft.data.streaming import tars
from vitft.errors import DataError, UsageError

pytestmark = pytest.mark.usefixtures("fetched")


def content(source: Source) -> dict[str, list[tuple[str, str]]]:
    """The images and classes of each split."""
    return {
        str(name): [
            (image, source.labels[label])
            for image, label in zip(
                content_hashes(split, np.arange(len(split))), class_indices(split).tolist(), strict=True
            )
        ]
        for name, split in source.splits.items()
    }


def write(folder: Path, name: str, row_group_size: int = 5, **columns: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name, row_group_size=row_group_size)


def images(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"bytes": b"image %d" % (first + number), "path": None} for number in range(count)]


def opened(folder: Path, **options: Any) -> Source:
    return open_dataset(f"file://{folder}", **options)


def test_shards_on_a_web_server_are_read_as_those_in_a_folder(server: FileServer, digit_shards: Path) -> None:
    here, there = open_dataset(str(digit_shards)), open_dataset(f"{server.url}/digits")
    assert there.labels == here.labels
    assert [{*one} for one in (here.splits, there.splits)] == [{"train", "test"}] * 2
    before = len(server.fetched())
    labels = {name: class_indices(split).tolist() for name, split in there.splits.items()}
    assert labels == {name: class_indices(split).tolist() for name, split in here.splits.items()}
    assert len(server.fetched()) == before  # no image was needed
    assert content(there) == content(here)
    assert there.name == "digits"
    assert all(map(is_streamed, there.splits.values()))
    first = sample_names(there.splits["train"], np.array([0, 488, 489]))
    assert first == [f"train-0000{shard}-of-00003.parquet/{row}" for shard, row in ((0, 0), (0, 488), (1, 0))]


def test_the_ways_to_write_the_url_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a b%2F", "train.parquet", image=images(6), label=list("ababab"))
    expected = content(open_dataset(str(tmp_path / "a b%2F")))
    for form in (
        "file://{}/a b%2F",
        "file://localhost{}/a%20b%252F",
        "FILE://{}/a%20b%252F/train.parquet",
        "file://{}/a b%2F/t*.parquet",
    ):
        assert content(open_dataset(form.format(tmp_path))) == expected, form
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^file://a: the path .* is absolute: file://{tmp_path}/a; or leave file://"):
        open_dataset("file://a")


@pytest.mark.usefixtures("bucket")
def test_shards_in_a_bucket(digit_shards: Path) -> None:
    there = open_dataset(BUCKET)
    assert content(there) == content(open_dataset(str(digit_shards)))
    one = open_dataset(f"{BUCKET}/train-00001-of-00003.parquet")
    assert content(one)["train"] == content(there)["train"][489:977]
    with pytest.raises(DataError, match=r"^s3://photos/sets/letters: there is no such file or folder\.$"):
        open_dataset("s3://photos/sets/letters")
    with pytest.raises(DataError, match=r"^s3://other/sets: there is no such file or folder\.$"):
        open_dataset("s3://other/sets")


@pytest.mark.usefixtures("bucket")
def test_a_bucket_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        open_dataset(BUCKET)


def test_the_shards_of_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, hf_file_system

    make_dataset(tmp_path / "datasets" / DATASET)
    with StandInHub(tmp_path) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hf_file_system.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        source = open_dataset("cifar10", streaming=True)
        found = content(source)
        assert source.revision == hub.sha("datasets", DATASET)
        by_url = open_dataset(f"hf://datasets/{DATASET}/plain_text")
        assert content(by_url) == found
        assert source.revision in by_url.splits["train"][0]["image"]["path"]  # pinned
        with pytest.raises(DataError, match=r"hub dataset owner/none: the hub at .* has none that you may read"):
            open_dataset("hf://datasets/owner/none")
    assert source.name == "cifar10"
    assert source.labels == CIFAR10
    assert {name: len(rows) for name, rows in found.items()} == {"train": 40, "test": 20}
    own = open_dataset(str(tmp_path / "datasets" / DATASET / "plain_text"))
    assert found == content(own)


def test_a_configuration_of_a_hub_dataset_and_a_part_of_one(tmp_path: Path) -> None:
    write(tmp_path / "one", "main/train/0.parquet", image=images(12), label=["cat", "dog"] * 6)
    notes = Notes()
    splits, _ = streamed.read(f"file://{tmp_path}/one", ReadOptions(), notes, inside="main")
    assert {name: len(split) for name, split in splits.items()} == {"train": 12}
    assert splits["train"]["name"][0] == "main/train/0.parquet/0"  # whatever other splits there are
    write(tmp_path / "part", "main/partial-train/0.parquet", image=images(12), label=["cat", "dog"] * 6)
    with pytest.raises(DataError, match="the hub has converted only a part of it; leave --streaming out"):
        streamed.read(f"file://{tmp_path}/part", ReadOptions(), notes, inside="main")


def test_a_revision_of_a_url_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train.parquet", image=images(12), label=[0, 1] * 6)
    with pytest.raises(UsageError, match=r"revision main: .* is a URL, which has none; leave it out\."):
        opened(tmp_path, revision="main")


def test_an_image_whose_path_is_any_url_is_a_bad_image() -> None:
    made = datasets.Dataset.from_dict({"image": ["https://example.org/cat.jpg"] * 2, "label": [0, 1]})
    rows = open_dataset(made.cast_column("image", datasets.Image(decode=False))).splits["train"]
    with pytest.raises(BadImage):
        decode(encoded(rows[0]["image"]))


def test_splits_are_found_in_names_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "a", "data/train-0.parquet", image=images(12), label=["cat", "dog"] * 6)
    write(tmp_path / "a", "data/test-0.parquet", image=images(4, 12), label=["dog", "cat"] * 2)
    write(tmp_path / "b", "train/0.parquet", image=images(12), label=["cat", "dog"] * 6)
    write(tmp_path / "b", "test/0.parquet", image=images(4, 12), label=["dog", "cat"] * 2)
    write(
        tmp_path / "c",
        "part-0.parquet",
        image=images(12),
        label=["cat", "dog"] * 6,
        split=["train", "test", "train"] * 4,
    )
    for name in "abc":
        assert content(opened(tmp_path / name)) == content(open_dataset(str(tmp_path / name))), name
    rows = opened(tmp_path / "c").splits["test"]
    assert sample_names(rows, np.arange(4)) == [f"part-0.parquet/{row}" for row in (1, 4, 7, 10)]


def test_columns_are_found_as_in_a_folder(tmp_path: Path) -> None:
    more = {"id": range(12), "caption": ["a cat"] * 12}
    write(tmp_path, "train.parquet", picture=[one["bytes"] for one in images(12)], category=[1, 2, 3] * 4, **more)
    found, here = opened(tmp_path), open_dataset(str(tmp_path))
    assert content(found) == content(here)
    assert found.decisions == here.decisions
    with pytest.raises(DataError, match=r"no column 'pictures'.*did you mean picture"):
        opened(tmp_path, image_column="pictures")


@pytest.mark.parametrize("text", ["s3:/bucket/photos", "https:/example.org/photos"])
def test_a_slash_too_few_is_noticed(text: str) -> None:
    with pytest.raises(DataError, match=f"did you mean {text.replace(':/', '://')}"):
        open_dataset(text)


def test_what_cannot_be_streamed_is_said(tmp_path: Path) -> None:
    write(tmp_path / "names", "x.parquet", file_name=["a.jpg", "b.jpg"], label=[0, 1])
    with pytest.raises(DataError, match="column 'file_name' holds string; only encoded images can be streamed"):
        opened(tmp_path / "names")
    write(tmp_path / "none", "x.parquet", image=images(3))
    with pytest.raises(DataError, match="no labels"):
        opened(tmp_path / "none")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"photos has no .* files; for a folder of images leave file:// out\."):
        opened(tmp_path / "photos")
    for name in "ab":
        write(tmp_path / "two", f"{name}/x.parquet", image=images(3), label=[0, 1, 2])
    with pytest.raises(DataError, match=r"two/? holds parquet files in 2 folders: a, b; give one of them\.$"):
        opened(tmp_path / "two")


def test_shards_that_are_sorted_by_class_are_warned_of(tmp_path: Path) -> None:
    labels = [name for name in ("ant", "bee", "cat", "dog") for _ in range(20)]
    write(tmp_path / "sorted", "train.parquet", image=images(80), label=labels)
    mixed = [labels[place] for place in np.random.default_rng(0).permutation(80)]
    write(tmp_path / "mixed", "train.parquet", image=images(80), label=mixed)
    assert any("sorted by class" in warning for warning in opened(tmp_path / "sorted").warnings)
    assert not any("sorted by class" in warning for warning in opened(tmp_path / "mixed").warnings)


def test_a_version_is_refused_once_the_shards_have_changed(tmp_path: Path) -> None:
    write(tmp_path, "train.parquet", image=images(12), label=[0, 1] * 6)
    version = opened(tmp_path).revision
    assert opened(tmp_path, revision=version).revision == version
    write(tmp_path, "train.parquet", image=images(12, 1), label=[0, 1] * 6)
    os.utime(tmp_path / "train.parquet", (1, 1))
    with pytest.raises(DataError, match=r"its shards have changed since the run began\.$"):
        opened(tmp_path, revision=version)


def test_shards_of_other_programs(tmp_path: Path) -> None:
    """ClassLabel features, as `datasets` writes them."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["dog", "cat"]))
    made = datasets.Dataset.from_dict({"image": images(6), "label": [0, 1, 0, 1, 1, 0]}, features=features)
    made.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    assert opened(tmp_path).labels == ("dog", "cat")
    assert content(opened(tmp_path)) == content(open_dataset(str(tmp_path)))


def write_tar(file: Path, rows: list[tuple[str, bytes, str | None]], form: str = "cls") -> None:
    """A WebDataset shard of images by name, each with its label in a .cls, or in a .json, or in none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, image, label in rows:
            text = label if form == "cls" else json.dumps({"label": label, "caption": "x" * 700})
            members = [(f"{name}.jpg", image), *([] if label is None else [(f"{name}.{form}", str(text).encode())])]
            for path, data in members:
                info = tarfile.TarInfo(path)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def jpegs(count: int, first: int = 0) -> list[tuple[str, bytes, str | None]]:
    """Images of many sizes, of three classes."""
    return [
        (f"{number:06}", bytes([number % 256]) * (number % 7 * 900 + 1), ("ant", "bee", "cat")[number % 3])
        for number in range(first, first + count)
    ]


@pytest.mark.parametrize("form", ["cls", "json"])
def test_webdataset_shards(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(tars, "_WINDOW", 4096)
    for number in range(2):
        write_tar(tmp_path / f"set/train-{number:05}.tar", jpegs(60, 60 * number), form)
    write_tar(tmp_path / "set/test-00000.tar", jpegs(20, 200), form)
    here = open_dataset(str(tmp_path / "set"))
    with FileServer(tmp_path) as server:
        there = open_dataset(f"{server.url}/set")
        assert content(there) == content(here)
        assert there.labels == ("ant", "bee", "cat")
        assert sample_names(there.splits["train"], np.array([0, 61])) == [
            "train-00000.tar/000000.jpg",
            "train-00001.tar/000061.jpg",
        ]
        sizes = np.unique(blocks_of(there.splits["train"]), return_counts=True)[1]
        assert len(sizes) > 10
        before = len(server.fetched())
        again = open_dataset(f"{server.url}/set")  # the pass over the shards is not repeated
        assert len(server.fetched()) == before
        assert content(again) == content(here)


def test_tars_that_cannot_be_streamed(tmp_path: Path) -> None:
    write_tar(tmp_path / "none/train.tar", [(name, image, None) for name, image, _ in jpegs(3)])
    with pytest.raises(DataError, match=r"train\.tar has no image with a \.cls or \.json beside it"):
        opened(tmp_path / "none")
    write_tar(tmp_path / "some/train.tar", [*jpegs(3), ("x", b"image", None)])
    with pytest.raises(DataError, match="1 of 4 images have no label"):
        opened(tmp_path / "some")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/train.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(DataError, match=r"train\.tar is not a readable archive: "):
        opened(tmp_path / "bad")
    write_tar(tmp_path / "flipped/train.tar", jpegs(30))
    whole = bytearray((tmp_path / "flipped/train.tar").read_bytes())
    whole[whole.index(b"000017.jpg")] ^= 1
    (tmp_path / "flipped/train.tar").write_bytes(bytes(whole))
    with pytest.raises(DataError, match=r"train\.tar is not a readable archive: the header at byte .* is damaged"):
        opened(tmp_path / "flipped")
    write_tar(tmp_path / "cut/train.tar", jpegs(30))
    raw = (tmp_path / "cut/train.tar").read_bytes()
    (tmp_path / "cut/train.tar").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"train\.tar is not a readable archive: "):
        opened(tmp_path / "cut")
