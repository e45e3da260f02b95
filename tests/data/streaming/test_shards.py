"""Parquet shards behind URLs: what is fetched of them, and when."""

import io
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.web import FileServer
from vitft.data.streaming import parquet, remote
from vitft.data.streaming.parquet import ParquetShard, open_parquet
from vitft.data.streaming.remote import RemoteFile, list_files
from vitft.data.streaming.shards import fetch_ahead, read_image
from vitft.errors import DataError
from vitft.hardware.pools import map_in_processes

pytestmark = pytest.mark.usefixtures("fetched")
DISK = 10**9


def first_shard(server: FileServer) -> ParquetShard:
    return open_parquet(next(iter(list_files(f"{server.url}/digits", ".parquet"))), DISK)


def written(table: pa.Table, folder: Path, **options: object) -> RemoteFile:
    """A file of this table, by its URL."""
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "x.parquet", **options)
    return list_files(f"file://{folder}/x.parquet", ".parquet")[0]


def test_images_and_columns_are_those_of_the_file(server: FileServer, digit_shards: Path) -> None:
    shard, table = first_shard(server), pq.read_table(min(digit_shards.glob("*.parquet")))
    where = shard.addresses("image")
    assert [read_image(address) for address in where] == table.column("image").combine_chunks().field(
        "bytes"
    ).to_pylist()
    assert shard.read_columns(["label"]).column("label").to_pylist() == table.column("label").to_pylist()


def test_only_what_is_needed_is_fetched(server: FileServer, digit_shards: Path) -> None:
    shard = first_shard(server)
    assert len(server.fetched()) == 1  # the footer
    groups, size = shard.metadata.num_row_groups, min(digit_shards.glob("*.parquet")).stat().st_size
    assert groups > 5
    shard.read_columns(["label"])
    small = server.fetched()[1:]
    assert len(small) == groups
    assert sum(one.last - one.first + 1 for one in small if one.first is not None and one.last) < size / 10
    where = shard.addresses("image")
    for row in (70, 71, 127, 64):
        read_image(where[row])
    (block,) = server.fetched()[1 + groups :]
    assert block.last is not None
    assert block.first is not None
    assert size / groups / 2 < block.last - block.first < 1.5 * size / groups


def test_blocks_that_will_be_needed_are_fetched_ahead(server: FileServer) -> None:
    where, before = first_shard(server).addresses("image"), len(server.fetched())
    fetch_ahead(where[:200])
    deadline = time.monotonic() + 60
    while len(server.fetched()) < before + 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    for address in where[:200]:
        read_image(address)
    assert len(server.fetched()) == before + 4
    fetch_ahead(where[:200])
    time.sleep(0.1)
    assert len(server.fetched()) == before + 4


def test_what_cannot_be_fetched_ahead_is_left_to_the_reader(server: FileServer) -> None:
    where = first_shard(server).addresses("image")
    server.fault = lambda request, number: 404
    fetch_ahead(where)
    with pytest.raises(OSError, match="no such file"):
        read_image(where[0])
    server.fault = lambda request, number: None
    assert read_image(where[0])


def test_a_forked_process_fetches_for_itself(server: FileServer) -> None:
    where = first_shard(server).addresses("image")
    fetch_ahead(where[:1])  # its threads are not there in the child
    read_image(where[0])

    def work(start: int) -> list[int]:
        fetch_ahead(where[start : start + 300])
        return [len(read_image(address)) for address in where[start::7]]

    read = list(map_in_processes(work, range(7), 2))
    assert read == [[len(read_image(address)) for address in where[start::7]] for start in range(7)]
    names = [(one.name, one.first) for one in server.fetched()]
    assert len(names) == len(set(names))  # one process fetches for all


def test_damage_on_the_way_is_noticed(server: FileServer) -> None:
    """The pages of packed shards have checksums: a block is fetched once more, and then given up."""
    where, good = first_shard(server).addresses("image"), server.fetched()
    number = len(server.requests)
    server.fault = lambda request, count: "damaged" if count == number else None
    image = read_image(where[0])
    assert len(server.fetched()) == len(good) + 2
    server.fault = lambda request, count: None
    assert image == read_image(where[0])
    server.fault = lambda request, count: "damaged"
    with pytest.raises(ValueError, match="CRC"):
        read_image(where[-1])


@pytest.mark.parametrize(("column", "stride"), [("label", 1), ("image", 61)])
def test_no_changed_byte_goes_unnoticed(
    digit_shards: Path, column: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gives an error, or what was packed: some bytes of a page's header mean nothing."""
    shard = open_parquet(list_files(f"file://{digit_shards}", ".parquet")[-1], 0)
    good, real, noticed = parquet._fetch_group(shard, 2, [column]), remote.read_range, 0
    chunks = parquet._chunks(shard.metadata, 2, column)
    length = max(end for _, end in chunks) - min(start for start, _ in chunks)
    for place in range(0, length, stride):

        def damaged(url: str, start: int, end: int, place: int = place) -> bytes:
            data = bytearray(real(url, start, end))
            data[place] ^= 1
            return bytes(data)

        monkeypatch.setattr(remote, "read_range", damaged)
        try:
            assert parquet._fetch_group(shard, 2, [column]).equals(good), place
        except ValueError:
            noticed += 1
    assert noticed > 0.5 * length / stride


def test_footers_of_any_length(tmp_path: Path) -> None:
    table = pa.table({"image": [bytes([i % 256]) for i in range(3000)], "label": [f"class {i}" for i in range(3000)]})
    file = written(table, tmp_path / "set", row_group_size=1)
    shard = open_parquet(file, DISK)
    assert shard.metadata.num_row_groups == 3000
    assert int.from_bytes((tmp_path / "set/x.parquet").read_bytes()[-8:-4], "little") > 1 << 16
    assert read_image(shard.addresses("image")[1234]) == bytes([1234 % 256])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet " * 10, b"PAR1" + bytes(100) + b"\xff\xff\xff\x7fPAR1"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.parquet is not a readable parquet file\.$"):
        open_parquet(RemoteFile(f"file://{tmp_path}/x.parquet", len(content), ""), DISK)


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})]
)
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_kinds_of_image_columns(tmp_path: Path, kind: pa.DataType, compression: str) -> None:
    images = [bytes([i]) * 50 for i in range(9)]
    cells = [{"bytes": image, "path": "x"} for image in images] if pa.types.is_struct(kind) else images
    table = pa.table({"other": range(9), "image": pa.array(cells, kind), "more": range(9)})
    shard = open_parquet(written(table, tmp_path / "set", row_group_size=4, compression=compression), DISK)
    assert [read_image(address) for address in shard.addresses("image")] == images


def test_a_row_group_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(pa.table({"image": [bytes(3000)]}), tmp_path / "set", compression="none")
    monkeypatch.setattr(parquet, "_LARGEST", 2000)
    with pytest.raises(DataError, match=r"row group 0 has 9\.1 kB, and is read as a whole; write smaller ones"):
        open_parquet(file, DISK)


def test_shards_that_datasets_has_written(tmp_path: Path) -> None:
    pixels = [np.full((8, 8, 3), i, np.uint8) for i in range(5)]
    made = datasets.Dataset.from_dict({"image": pixels, "label": list(range(5))}).cast_column("image", datasets.Image())
    made.to_parquet(tmp_path / "x.parquet")
    shard = open_parquet(list_files(f"file://{tmp_path}/x.parquet", ".parquet")[0], DISK)
    from PIL import Image

    read = [np.asarray(Image.open(io.BytesIO(read_image(one)))) for one in shard.addresses("image")]
    assert all((one == other).all() for one, other in zip(read, pixels, strict=True))
