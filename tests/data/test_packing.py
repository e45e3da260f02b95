"""Datasets packed into parquet shards."""

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.data.stores.test_store import photos
from tests.web import FileServer
from vitft.cli.app import app
from vitft.data import packing
from vitft.data.decoder import MAX_PIXELS, decode
from vitft.data.packing import Packed, pack
from vitft.data.sources.identity import content_hashes
from vitft.data.sources.source import Source, class_indices, open_dataset
from vitft.data.stores.store import UnreadableError
from vitft.data.streaming import blocks
from vitft.data.streaming.remote import SUMS
from vitft.errors import UsageError

SIZES = [(100 + i, 64) for i in range(20)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos with a train and a test split."""
    photos(tmp_path / "photos", SIZES)
    for kind in ("cat", "dog"):
        (tmp_path / "photos/test" / kind).mkdir(parents=True)
        Image.new("RGB", (30, 20), "red" if kind == "cat" else "blue").save(tmp_path / f"photos/test/{kind}/new.jpg")
    return tmp_path / "photos"


def packed(folder: Path, output: Path, **options: Any) -> Packed:
    return pack(open_dataset(str(folder)), output, **{"max_pixels": MAX_PIXELS} | options)


def content(source: Source, split: str) -> Counter[tuple[str, str]]:
    """What the images and their classes are."""
    rows = source.splits[split]
    names = [source.labels[label] for label in class_indices(rows).tolist()]
    return Counter(zip(content_hashes(rows, np.arange(len(rows))), names, strict=True))


def files_of(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(output.iterdir())}


@pytest.mark.parametrize("forks", [0, 2])
def test_shards_hold_the_same_images_bit_for_bit(
    folder: Path, tmp_path: Path, forks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "processes", lambda: forks)
    monkeypatch.setattr(packing, "_ROW_GROUP", 3)
    done = packed(folder, tmp_path / "out", shard_bytes=20_000)
    before, after = open_dataset(str(folder)), open_dataset(str(tmp_path / "out"))
    assert after.labels == before.labels == ("cat", "dog")
    for split in ("train", "test"):
        assert content(after, split) == content(before, split)
    assert (done.images, done.shards, done.skipped) == (22, len(list((tmp_path / "out").glob("*.parquet"))), [])
    assert done.shards > 3


def test_datasets_reads_the_shards(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "out", shard_bytes=20_000)
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 20, "test": 2}
    assert loaded["train"].features["label"].names == ["cat", "dog"]
    image = loaded["test"][0]["image"]
    assert image.size == (30, 20)


def test_a_shard_is_as_large_as_it_may_be(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "out", shard_bytes=20_000)
    sizes = []
    for file in sorted((tmp_path / "out").glob("train-*.parquet")):
        images = pq.read_table(file).column("image").to_pylist()
        sizes.append([len(image["bytes"]) for image in images])
    assert all(sum(of_shard) <= 20_000 for of_shard in sizes)
    assert all(sum(of_shard) + of_next[0] > 20_000 for of_shard, of_next in pairwise(sizes))
    alone = packed(folder, tmp_path / "single", shard_bytes=1)
    assert alone.shards == alone.images


def test_images_are_in_an_order_that_does_not_depend_on_their_names(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "out")
    (tmp_path / "renamed").mkdir()
    renamed = folder.rename(tmp_path / "renamed" / "photos")
    for number, file in enumerate(sorted(renamed.rglob("*.png"), reverse=True)):
        file.rename(file.with_name(f"x{number}.png"))
    packed(renamed, tmp_path / "again")

    def order(output: Path) -> list[bytes]:
        images = pq.read_table(output / "train-00000-of-00001.parquet").column("image").to_pylist()
        return [image["bytes"] for image in images]

    assert order(tmp_path / "out") == order(tmp_path / "again")
    labels = pq.read_table(tmp_path / "out/train-00000-of-00001.parquet").column("label").to_pylist()
    assert labels not in (sorted(labels), sorted(labels, reverse=True))


def test_larger_images_are_shrunk_and_others_copied(tmp_path: Path) -> None:
    place = tmp_path / "photos" / "a"
    place.mkdir(parents=True)
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    upright = Image.Exif()
    upright[0x0112] = 6  # to be rotated by a quarter
    smooth.resize((400, 200), Image.Resampling.BICUBIC).save(place / "wide.jpg", quality=95, exif=upright)
    smooth.resize((300, 301), Image.Resampling.BICUBIC).save(place / "square.png")
    smooth.resize((100, 500), Image.Resampling.BICUBIC).save(place / "small.jpg")
    packed(tmp_path / "photos", tmp_path / "out", resize=100)
    table = pq.read_table(tmp_path / "out/train-00000-of-00001.parquet").column("image").to_pylist()
    images = {Path(image["path"]).name: image["bytes"] for image in table}
    assert images["small.jpg"] == (place / "small.jpg").read_bytes()
    for name, size, kind in (("wide.jpg", (100, 200), "JPEG"), ("square.png", (100, 100), "PNG")):
        image = Image.open(BytesIO(images[name]))
        assert (image.size, image.format) == (size, kind)
        wanted = Image.fromarray(decode(place / name)).resize(size, Image.Resampling.LANCZOS)
        error = np.abs(np.asarray(image, np.int16) - np.asarray(wanted, np.int16))
        assert error.max() <= (0 if kind == "PNG" else 12)
        assert error.mean() < 1


def test_images_of_more_than_8_bits_are_shrunk_only_by_a_range(tmp_path: Path) -> None:
    (tmp_path / "photos/a").mkdir(parents=True)
    deep = np.arange(120 * 130, dtype=np.uint16).reshape(120, 130) % 4096
    file = tmp_path / "photos/a/scan.png"
    Image.fromarray(deep).save(file)

    def image_of(**options: Any) -> bytes:
        output = tmp_path / f"out{len(options)}"
        packed(tmp_path / "photos", output, resize=60, **options)
        (only,) = pq.read_table(output / "train-00000-of-00001.parquet").column("image").to_pylist()
        return bytes(only["bytes"])

    assert image_of() == file.read_bytes()
    shrunk = Image.open(BytesIO(image_of(value_range=(0.0, 4095.0))))
    assert (shrunk.size, shrunk.mode) == ((65, 60), "RGB")
    assert np.asarray(shrunk).max() > 200


def test_colors_of_16_bits_are_copied(tmp_path: Path) -> None:
    (tmp_path / "photos/a").mkdir(parents=True)
    file = tmp_path / "photos/a/deep.png"
    rows = b"".join(b"\0" + bytes(range(120)) * 6 for _ in range(100))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 120, 100, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    packed(tmp_path / "photos", tmp_path / "out", resize=60)
    (only,) = pq.read_table(tmp_path / "out/train-00000-of-00001.parquet").column("image").to_pylist()
    assert only["bytes"] == file.read_bytes()


def test_paths_in_an_archive_and_in_packed_data_are_kept(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(folder, "photos")
    packed(tmp_path / "photos.tar", tmp_path / "out")
    packed(tmp_path / "out", tmp_path / "again")
    for output in ("out", "again"):
        images = pq.read_table(tmp_path / output / "test-00000-of-00001.parquet").column("image").to_pylist()
        assert {image["path"] for image in images} == {"photos/test/cat/new.jpg", "photos/test/dog/new.jpg"}


def test_paths_of_this_machine_are_not_kept(folder: Path, tmp_path: Path) -> None:
    table = {"image": [str(file) for file in sorted(folder.glob("test/*/*"))], "label": ["cat", "dog"]}
    pq.write_table(pa.table(table), folder / "train.parquet")
    pack(open_dataset(str(folder / "train.parquet")), tmp_path / "out", max_pixels=MAX_PIXELS)
    images = pq.read_table(tmp_path / "out/train-00000-of-00001.parquet").column("image").to_pylist()
    assert [image["path"] for image in images] == [None, None]


def test_row_groups_of_large_photos_have_fewer_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def groups() -> list[int]:
        packed(folder, tmp_path / str(len(list(tmp_path.iterdir()))))
        file = pq.ParquetFile(max(tmp_path.glob("*/train-*.parquet"), key=lambda file: file.stat().st_mtime_ns))
        return [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]

    size = max(file.stat().st_size for file in folder.glob("train/*/*"))
    assert groups() == [20]
    monkeypatch.setattr(packing, "_LARGE_GROUP", 6 * size)
    few = groups()
    assert len(few) > 2
    assert min(few[:-1]) >= 6
    monkeypatch.setattr(packing, "_ROW_GROUP", 5)
    monkeypatch.setattr(packing, "_SMALL_GROUP", 1)
    assert groups() == [5, 5, 5, 5]


@pytest.mark.parametrize(
    "names", [("train", "train_extra"), ("fold1", "fold2"), ("train.full", "test"), ("a/b", "test")]
)
def test_splits_that_would_be_read_as_others_are_refused(folder: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    source = open_dataset(str(folder))
    splits = datasets.DatasetDict(zip(names, source.splits.values(), strict=True))
    with pytest.raises(UsageError, match=r"split .*: no file name would be read back as this split; name the"):
        pack(replace(source, splits=splits), tmp_path / "out", max_pixels=MAX_PIXELS)
    assert not (tmp_path / "out").exists()


def test_checksums_are_those_of_the_files(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "out", shard_bytes=20_000)
    listed = dict(reversed(line.split("  ")) for line in (tmp_path / "out" / SUMS).read_text().splitlines())
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert listed == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_bad_image_is_an_error_or_is_left_out(folder: Path, tmp_path: Path) -> None:
    bad = sorted((folder / "train/cat").iterdir())[2]
    whole = bad.read_bytes()
    bad.write_bytes(b"no image")
    with pytest.raises(
        UnreadableError,
        match=rf"^train/cat/{bad.name}: is not an image .*; fix or remove it and choose a new folder, or add",
    ):
        packed(folder, tmp_path / "out", shard_bytes=20_000)
    done = packed(folder, tmp_path / "skipped", shard_bytes=20_000, skip_bad=True)
    assert (done.images, [one.name for one in done.skipped]) == (21, [f"train/cat/{bad.name}"])
    again = packed(folder, tmp_path / "skipped", shard_bytes=20_000, skip_bad=True)
    assert again == done  # the shards remember it
    bad.write_bytes(whole)
    with pytest.raises(UsageError, match="was packed from other images, or with other settings; choose a new folder"):
        packed(folder, tmp_path / "skipped", shard_bytes=20_000, skip_bad=True)


@pytest.mark.parametrize("forks", [0, 2])
def test_what_is_streamed_is_packed_again_and_fetched_once(
    server: FileServer, digit_shards: Path, tmp_path: Path, forks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "processes", lambda: forks)
    before = open_dataset(str(digit_shards))
    done = pack(open_dataset(f"{server.url}/digits"), tmp_path / "out", shard_bytes=40_000, max_pixels=MAX_PIXELS)
    fetched = [(one.name, one.first) for one in server.fetched()]
    assert len(fetched) == len({*fetched})
    after = open_dataset(str(tmp_path / "out"))
    assert after.labels == before.labels
    for split in ("train", "test"):
        assert content(after, split) == content(before, split)
    train = sorted((tmp_path / "out").glob("train-*.parquet"))
    assert (done.images, len(train)) == (1797, 6)  # of 3
    for file in train[:-1]:
        images = pq.read_table(file).column("image").to_pylist()
        assert 25_000 < sum(len(image["bytes"]) for image in images) < 41_000
    first = pq.read_table(train[0]).column("image").to_pylist()
    assert len({image["path"].split("/")[0] for image in first[:100]}) == 3  # shards, of which the first images are


def test_packing_what_is_streamed_goes_on_where_its_server_failed(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "processes", lambda: 0)
    url, options = f"{server.url}/digits", {"shard_bytes": 20_000, "max_pixels": MAX_PIXELS}
    pack(open_dataset(url), tmp_path / "whole", **options)
    blocks.clear()
    source = open_dataset(url)
    server.fault = lambda request, number: 404 if "test-" in request.name else None
    with pytest.raises(UnreadableError, match=r"cannot be fetched: there is no such file or folder; it may be intact"):
        pack(source, tmp_path / "out", skip_bad=True, **options)
    there = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.parquet")}
    assert {name.split("-")[0] for name in there} == {"train"}
    server.fault = lambda request, number: None
    with pytest.raises(UsageError, match="was packed from other images"):
        pack(replace(source, revision="of other shards"), tmp_path / "out", skip_bad=True, **options)
    pack(source, tmp_path / "out", skip_bad=True, **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in there.items())


@pytest.mark.parametrize("change", [{"resize": 50}, {"shard_bytes": 10_000}])
def test_shards_of_other_settings_are_not_mixed(folder: Path, tmp_path: Path, change: dict[str, int]) -> None:
    packed(folder, tmp_path / "out", shard_bytes=20_000)
    before = files_of(tmp_path / "out")
    (tmp_path / "out" / sorted(before)[-1]).unlink()
    with pytest.raises(UsageError, match=r"choose a new folder"):
        packed(folder, tmp_path / "out", **{"shard_bytes": 20_000} | change)
    assert len(files_of(tmp_path / "out")) == len(before) - 1


def test_a_folder_with_anything_else_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"out holds notes\.txt, which is no part of this dataset"):
        packed(folder, tmp_path / "out")
    assert files_of(tmp_path / "out") == {"notes.txt": b"mine"}
    with pytest.raises(UsageError, match=r"notes\.txt is a file; choose a new folder"):
        packed(folder, tmp_path / "out/notes.txt")


def test_what_a_file_manager_left_is_passed_over(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "out")
    before = files_of(tmp_path / "out")
    left = dict.fromkeys((".DS_Store", "Thumbs.db", "desktop.ini"), b"left")
    for name, content in left.items():
        (tmp_path / "out" / name).write_bytes(content)
    packed(folder, tmp_path / "out")
    assert files_of(tmp_path / "out") == before | left


def test_what_was_killed_goes_on_with_the_shards_that_are_missing(folder: Path, tmp_path: Path) -> None:
    """Killed for real, at three moments."""
    whole = packed(folder, tmp_path / "whole", shard_bytes=3000)
    assert whole.shards > 10
    code = (
        "import sys, time\nfrom vitft.data import packing\nreal = packing._packed\n"
        "def slow(*given, **how):\n    time.sleep(0.05)\n    return real(*given, **how)\n"
        "packing._packed = slow\npacking.processes = lambda: 0\n"
        "from vitft.data.sources.source import open_dataset\n"
        "packing.pack(open_dataset(sys.argv[1]), packing.Path(sys.argv[2]), shard_bytes=3000, max_pixels=50_000_000)\n"
    )
    output = tmp_path / "out"
    for wanted in (2, 6, 9):
        running = subprocess.Popen([sys.executable, "-c", code, str(folder), str(output)])
        while len(list(output.glob("*.parquet"))) < wanted and running.poll() is None:
            time.sleep(0.005)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        assert not (output / SUMS).exists()
    there = {file.name: file.stat().st_mtime_ns for file in output.glob("*.parquet")}
    assert len(there) >= 9
    assert packed(folder, output, shard_bytes=3000).shards == whole.shards
    assert files_of(output) == files_of(tmp_path / "whole")
    assert all((output / name).stat().st_mtime_ns == time for name, time in there.items())


def test_two_commands_do_not_write_to_one_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with packing.lock_folder(tmp_path / "out"), pytest.raises(UsageError, match="another process is writing it"):
        packed(folder, tmp_path / "out")


def test_the_command_says_what_it_wrote_and_what_is_next(folder: Path, tmp_path: Path) -> None:
    run = CliRunner(env={"COLUMNS": "120"})
    (folder / "train/cat/bad.png").write_bytes(b"")
    output = tmp_path / "out"
    failed = run.invoke(app, ["data", "pack", str(folder), str(output)])
    assert (failed.exit_code, failed.stderr.count("error: train/cat/bad.png: is empty")) == (3, 1)
    done = run.invoke(app, ["data", "pack", str(folder), str(output), "--on-bad-image", "skip"])
    assert done.exit_code == 0, done.output
    assert "22 images in 2 shards, " in done.stdout
    assert (
        "2 images in 1 shard, " in run.invoke(app, ["data", "pack", str(folder / "test"), str(tmp_path / "1")]).stdout
    )
    assert f"next: vitft train --dataset {output}\n" in done.stdout
    assert "left out train/cat/bad.png: is empty" in done.stderr
    said = json.loads(
        run.invoke(app, ["data", "pack", str(folder), str(output), "--on-bad-image", "skip", "--json"]).stdout
    )
    assert (said["images"], said["shards"], said["skipped"][0]["name"]) == (22, 2, "train/cat/bad.png")
