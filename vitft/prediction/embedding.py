"""Write the features of images to a parquet file, for search, clustering and other classifiers."""

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vitft import __version__
from vitft.data.augment import normalize
from vitft.data.decoder import MAX_PIXELS, suffixes
from vitft.data.sources.identity import has_names
from vitft.data.sources.schema import NAME, ROW
from vitft.data.sources.source import DatasetLike, Source, open_dataset
from vitft.errors import DataError, ModelError, UsageError, as_flag
from vitft.evaluation.loading import load_model
from vitft.hardware.device import find_device, threads
from vitft.hardware.pools import map_in_threads
from vitft.hardware.processes import Processes, join_processes
from vitft.io import console
from vitft.io.atomic import new_file
from vitft.io.paths import expanded
from vitft.models.features import backbone
from vitft.models.resize import resize_model
from vitft.prediction.inputs import find_images, printable, read_image

_BATCH = 64  # images per forward pass
_ROW_GROUP = 4096  # images that are written at once
FEATURES = "features"
_MEANINGS = {
    "path": "file of the image, if it has one",
    "split": "split of the dataset",
    "row": "number of the image in its split",
    "label": "name of its class",
}

Chunk = tuple[list[Any], dict[str, list[Any]]]
"""Images as `read_image` takes them, and the other columns of their rows."""


@dataclass(frozen=True)
class _Read:
    """What came of a chunk: the rows of the images that could be read, and the others, with the reason."""

    rows: pa.RecordBatch | None
    unreadable: list[tuple[str, str]]
    width: int = 0
    finite: bool = True


@dataclass(frozen=True)
class Embedded:
    """A written file: its columns and what they hold, its images, and those that could not be read, with the reason."""

    output: Path
    columns: dict[str, str]
    images: int
    width: int  # numbers per image
    unreadable: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        bad = [{"path": path, "error": reason} for path, reason in self.unreadable]
        return {"output": str(self.output), "columns": self.columns, "images": self.images, "features": self.width,
                "unreadable": bad}  # fmt: skip


def embed(
    images: Sequence[str | Path] | str | Path | DatasetLike, model: str | Path, output: str | Path, *,
    dataset_revision: str | None = None, model_revision: str | None = None, image_size: int | None = None,
    device: str = "auto", max_pixels: int = MAX_PIXELS, value_range: str | None = None, overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, count: None, **reading: Any,
) -> Embedded:  # fmt: skip
    """Write the features that a model's head would read, float32, of each image to a parquet file, whole or not at all.

    Args:
        images: files, folders (with every image below them) and globs; or one dataset, by name, path or as an object of
            `datasets`, whose rows get their split and label. A folder of class folders is a dataset.
        model: a run (its best checkpoint is taken), one of its checkpoints, or a Transformers folder or hub id, with or
            without a head.
        output: the .parquet file.
        dataset_revision: the commit, branch or tag of a dataset on the hub.
        model_revision: the same of a model.
        image_size: height and width of the model input in pixels; by default the model's own.
        device: auto, cpu, cuda or mps.
        max_pixels: images with more pixels cannot be read.
        value_range: black and white of images with more than 8 bits, as `0:4095`; by default the checkpoint's.
        overwrite: replace an existing file.
        progress: called with the number of images done and the total.
        reading: how to read a dataset: the arguments of `open_dataset`.

    Processes that torchrun started share the images: the first writes them, in order, and all return the same.

    Raises:
        VitftError: the model or the images cannot be used, or no image at all can be read.
    """
    file = check_output(output, overwrite=overwrite)
    device = find_device(device)
    processes = join_processes(device)
    source, place = _dataset_of(images, reading | {"revision": dataset_revision})
    given: list[str | Path] = [images] if isinstance(images, str | Path) else [] if source else list(images)
    found = [] if source else [str(one) for one in find_images(given)]
    chunks = _of_files(found, processes) if source is None else _of_dataset(source, place, processes)
    count = len(found) if source is None else sum(map(len, source.splits.values()))
    loaded = load_model(model, revision=model_revision, headless=True)
    network, how = loaded.model, loaded.preprocess.with_value_range(value_range)
    if image_size is not None and (how.height, how.width) != (image_size, image_size):
        network, how = resize_model(network, image_size), how.with_size(image_size)
    features = backbone(network.to(device).eval(), device, "fp32")
    kinds = {"path": pa.string(), "split": pa.string(), "row": pa.int64(), "label": pa.string()}
    names = ["path"] if source is None else [*kinds]
    size = [how.height, how.width]
    about = {"model": str(model), "revision": loaded.revision, "image_size": size, "vitft": __version__}
    schema = pa.schema(
        [(name, kinds[name]) for name in names] + [(FEATURES, pa.list_(pa.float32()))],
        metadata={"vitft": json.dumps(about)},
    )
    unreadable: list[tuple[str, str]] = []
    written = width = 0

    def read(chunk: Chunk) -> _Read:
        cells, others = chunk
        results = list(map_in_threads(lambda cell: read_image(cell, how, max_pixels), cells))
        good = [place for place, result in enumerate(results) if isinstance(result, torch.Tensor)]
        bad = [(_name(others, place), result) for place, result in enumerate(results) if isinstance(result, str)]
        if not good:
            return _Read(None, bad)
        pixels = torch.cat([results[place] for place in good]).to(device)  # type: ignore[misc]
        rows = features(normalize(pixels, how)).flatten(1).cpu()
        flat = pa.array(rows.numpy().ravel())
        column = pa.ListArray.from_arrays(pa.array(range(0, rows.numel() + 1, rows.shape[1]), pa.int32()), flat)
        arrays = [pa.array([others[name][place] for place in good], kinds[name]) for name in names]
        return _Read(
            pa.RecordBatch.from_arrays([*arrays, column], schema=schema),
            bad,
            rows.shape[1],
            bool(rows.isfinite().all()),
        )

    with ExitStack() as opened, threads():
        writer = None
        if processes.rank == 0:
            writer = opened.enter_context(pq.ParquetWriter(opened.enter_context(new_file(file)), schema))

        def write(batches: list[pa.RecordBatch]) -> None:
            if writer is not None:
                writer.write_table(pa.Table.from_batches(batches))

        held: list[pa.RecordBatch] = []
        mine = map(read, chunks)
        while parts := [part for part in processes.gather([next(mine, None)]) if part is not None]:
            for part in parts:
                if not part.finite:
                    raise ModelError(
                        f"{model}: its features are not finite: its weights are corrupt; use another model."
                    )
                unreadable += part.unreadable
                if part.rows is not None:
                    written, width = written + len(part.rows), part.width
                    held.append(part.rows)
                progress(written + len(unreadable), count)
            if sum(map(len, held)) >= _ROW_GROUP:
                write(held)
                held = []
        if not written:
            path, reason = unreadable[0]
            raise DataError(f"none of {count:,} images can be read; the first is {path}: {reason}")
        if held:
            write(held)
    columns = {name: _MEANINGS[name] for name in names} | {FEATURES: f"list of {width:,} float32"}
    return Embedded(file, columns, written, width, tuple(unreadable))


def check_output(output: str | Path, *, overwrite: bool) -> Path:
    """The file to write. Raises UsageError unless it is a .parquet file that may be written."""
    file = expanded(output)
    if file.suffix.lower() != ".parquet" or not file.parent.is_dir() or file.is_dir():
        raise UsageError(f"output {output}: give a .parquet file in a folder that exists.")
    if file.exists() and not overwrite:
        raise UsageError(f"output {output}: the file exists; choose another, or add --overwrite to replace it.")
    return file


def _dataset_of(images: Any, reading: dict[str, Any]) -> tuple[Source | None, str]:
    """The dataset that was named, or None for image files; and the folder that its names are relative to."""
    words = [images] if isinstance(images, str | Path) else images
    if not isinstance(words, list | tuple):
        return open_dataset(words, **reading), ""
    path = expanded(words[0]) if len(words) == 1 else Path()
    is_glob = glob.has_magic(str(path)) and not path.exists()
    if len(words) != 1 or is_glob or path.suffix.lower() in suffixes():
        if typed := [name for name, value in reading.items() if value]:
            raise UsageError(f"{as_flag(typed[0])} applies to one dataset, not to image files.")
        return None, ""
    if not path.is_dir():
        of_paths = reading.get("image_folder") or Path(words[0]).parent  # of a table
        return open_dataset(words[0], **reading), str(of_paths) if path.is_file() else ""
    try:
        return open_dataset(words[0], **reading), str(words[0])
    except DataError as error:
        if any(reading.values()):
            raise
        console.note(f"embedding all images below {words[0]}, without labels, because it is no dataset: {error}")
        return None, ""


def _of_files(found: Sequence[str], processes: Processes) -> Iterator[Chunk]:
    for start in range(_BATCH * processes.rank, len(found), _BATCH * processes.count):
        part = list(found[start : start + _BATCH])
        yield part, {"path": [*map(printable, part)]}


def _of_dataset(source: Source, place: str, processes: Processes) -> Iterator[Chunk]:
    places = [(name, start) for name, split in source.splits.items() for start in range(0, len(split), _BATCH)]
    for name, start in places[processes.rank :: processes.count]:
        split = source.splits[name]
        part = split[start : start + _BATCH]
        cells, paths = part["image"], [cell["path"] for cell in part["image"]]
        if has_names(split):
            paths = [str(Path(place) / file) for file in part[NAME]]
        labels = [source.labels[label] for label in part["label"]]
        yield cells, {"path": paths, "split": [str(name)] * len(cells), "row": part[ROW], "label": labels}


def _name(others: dict[str, list[Any]], place: int) -> str:
    """What an unreadable image is called."""
    path = others["path"][place]
    return str(path) if path is not None else f"{others['split'][place]}, row {others['row'][place]}"
