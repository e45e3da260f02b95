"""How well streamed shards are shuffled, and how fast they are read: vitft, and others in environments of their own.

python benchmarks/shuffle.py write FOLDER [--images 100000]       # with pyarrow: the set, as parquet
python benchmarks/shuffle.py vitft|datasets|mosaicml|litdata FOLDER

The set is 25 shards of numbered images of 3 kB in row groups of 200. MosaicML Streaming and litdata first write it in
formats of their own, in as many shards. A process then reads an epoch, without decoding, with each library's defaults,
and seed 0: images/s, how far apart in that order are two images that are neighbors in a shard, and from how many
of the set's groups of 200 neighbors the images of a batch of 256 are.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.pop(0)  # the streaming.py beside this file is not MosaicML's
SHARDS, GROUP, BATCH, BYTES = 25, 200, 256, 3000
QUANTILES = (1, 10, 50, 90, 99)


def main() -> None:
    """Print a row of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", *READERS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=100_000)
    given = parser.parse_args()
    if given.what == "write":
        write(given.folder / "parquet", given.images)
        return
    start, order = time.perf_counter(), []
    for number in READERS[given.what](given.folder.resolve()):
        start = start if order else time.perf_counter()  # what opens the set is another question
        order.append(number)
    seconds = time.perf_counter() - start
    print(
        f"{given.what}: {len(order):,} images, {len(set(order)):,} different ones, {len(order) / seconds:,.0f} images/s"
    )
    print("  neighbors apart, quantiles", dict(zip(QUANTILES, distances(order), strict=True)))
    batches = [{number // GROUP for number in order[i : i + BATCH]} for i in range(0, len(order) - BATCH + 1, BATCH)]
    print(f"  groups in a batch of {BATCH}: {np.mean([len(groups) for groups in batches]):.0f}")


def distances(order: list[int]) -> list[int]:
    """Quantiles of how far apart neighbors in a shard are in an epoch's order."""
    place = np.empty(max(order) + 1, np.int64)
    place[order] = np.arange(len(order))
    apart = np.abs(np.diff(place))
    inside = (
        np.arange(1, len(place)) % (len(place) // SHARDS) != 0
    )  # the last of a shard and the first of the next are not
    return [int(value) for value in np.percentile(apart[inside], QUANTILES)]


def image(number: int) -> bytes:
    """What stands for an image: its number, and bytes that cannot be compressed."""
    return number.to_bytes(8, "little") + np.random.default_rng(number).bytes(BYTES - 8)


def numbered(contents: Iterable[bytes]) -> Iterator[int]:
    """The number of each."""
    return (int.from_bytes(content[:8], "little") for content in contents)


def images(folder: Path) -> Iterator[bytes]:
    """Those of the set, in their order."""
    import pyarrow.parquet as pq

    for file in sorted((folder / "parquet").iterdir()):
        for one in pq.read_table(file).column("image").to_pylist():
            yield one["bytes"]


def write(folder: Path, count: int) -> None:
    """The set, as shards that vitft and `datasets` read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for shard, numbers in enumerate(np.array_split(np.arange(count), SHARDS)):
        cells = [{"bytes": image(number), "path": None} for number in numbers.tolist()]
        table = pa.table({"image": cells, "label": numbers % 10})
        file = folder / f"train-{shard:05}-of-{SHARDS:05}.parquet"
        pq.write_table(table, file, row_group_size=GROUP, compression="none")


def vitft(folder: Path) -> Iterator[int]:
    """The order of a training, and the blocks fetched as it does."""
    os.environ["VITFT_CACHE"] = str(folder / "cache")
    from vitft.data.sampling import streamed_order
    from vitft.data.sources.identity import blocks_of
    from vitft.data.sources.source import open_dataset
    from vitft.data.streaming import blocks, shards

    rows: Any = open_dataset(f"file://{folder}/parquet").splits["train"]
    blocks.clear()
    order = streamed_order(blocks_of(rows), 0, 0, BATCH)
    cells = [[cell["path"] for cell in rows[order[i : i + BATCH]]["image"]] for i in range(0, len(order), BATCH)]
    for step, addresses in enumerate(cells):
        shards.fetch_ahead(address for some in cells[step : step + 4] for address in some)
        yield from numbered(map(shards.read_image, addresses))


def datasets(folder: Path) -> Iterator[int]:
    """A buffer of 1,000 images, as in its documentation."""
    from datasets import load_dataset

    files = {"train": f"{folder}/parquet/*.parquet"}
    rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
    return numbered(row["image"]["bytes"] for row in rows.shuffle(seed=0, buffer_size=1000))


def mosaicml(folder: Path) -> Iterator[int]:
    """With its own shards, of as many images as those of the set."""
    from streaming import MDSWriter, StreamingDataset

    there = folder / "mosaicml"
    if not there.exists():
        each = list(images(folder))
        size = (BYTES + 20) * len(each) // SHARDS
        with MDSWriter(out=str(there), columns={"image": "bytes"}, size_limit=size) as writer:
            for one in each:
                writer.write({"image": one})
    rows = StreamingDataset(local=str(there), shuffle=True, shuffle_seed=0, batch_size=BATCH)
    return numbered(row["image"] for row in rows)


def litdata(folder: Path) -> Iterator[int]:
    """With its own chunks, of as many images as the shards of the set."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    there = folder / "litdata"
    if not there.exists():
        each = list(images(folder))
        writer = BinaryWriter(str(there), chunk_size=len(each) // SHARDS)
        for number, one in enumerate(each):
            writer[number] = one
        writer.done()
        writer.merge()
    return numbered(StreamingDataset(str(there), shuffle=True, seed=0))


READERS = {"vitft": vitft, "datasets": datasets, "mosaicml": mosaicml, "litdata": litdata}

if __name__ == "__main__":
    main()
