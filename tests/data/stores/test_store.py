"""The store of decoded images, and the batches made from it."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from tests.forked import wait_until
from vitft.data.augment import (
    CROP_AREA,
    Preprocess,
    draw_crop_boxes,
    draw_flips,
    normalize,
    preprocess_images,
    random_crops,
)
from vitft.data.augmentation.settings import Augmentation
from vitft.data.decoder import decode
from vitft.data.loader import EvalLoader, ForkedPrefetcher, Prefetcher, TrainLoader
from vitft.data.sampling import REPEAT_BITS, balanced_order, positions
from vitft.data.sources.source import open_dataset
from vitft.data.stores import store
from vitft.data.stores.store import Store, check_headers, decode_all, move_to_device
from vitft.errors import DataError
from vitft.hardware.pools import map_in_processes
from vitft.randomness import permutation, uniform

PREPROCESS = Preprocess(32, 32)


def photos(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    drawn = np.random.default_rng(5)
    for i, (width, height) in enumerate(sizes):
        place = folder / "train" / ("cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(drawn.integers(0, 256, (6, 6, 3), np.uint8)).resize((width, height))
        smooth.save(place / f"{i:03}.png")
    return folder


def stored(folder: Path, preprocess: Preprocess = PREPROCESS, **options: Any) -> tuple[Store, list[str]]:
    rows = open_dataset(str(folder)).splits["train"]
    settings = {"crops": False, "max_pixels": 10**7, "skip_bad": False}
    store, skipped = decode_all(rows, preprocess, **settings | options)
    return store, [image.name for image in skipped]


def test_small_images_of_equal_size_are_stored_unchanged(tmp_path: Path) -> None:
    store, _ = stored(photos(tmp_path, [(20, 16)] * 6))
    images = store.gather(np.array([4, 0]))
    assert isinstance(images, Tensor)
    assert images.shape == (2, 16, 20, 3)
    first = sorted((tmp_path / "train" / "cat").iterdir())[0]
    assert (images[1].numpy() == decode(first)).all()


def test_large_images_are_shrunk_for_evaluation_and_less_for_crops(tmp_path: Path) -> None:
    folder = photos(tmp_path, [(100, 64), (64, 100), (20, 10), (300, 40)])
    exact, _ = stored(folder)
    assert sorted(map(tuple, exact.shapes.tolist())) == [(10, 20), (32, 32), (32, 32), (32, 32)]
    cropped, _ = stored(photos(tmp_path / "larger", [(800, 450), (450, 800), (200, 64), (1600, 50)]), crops=True)
    # Enough pixels for a smallest crop of 32 x 32, and never enlarged.
    assert round(32 * 32 / CROP_AREA) == 12_800
    assert sorted(map(tuple, cropped.shapes.tolist())) == [(20, 640), (64, 200), (85, 151), (151, 85)]


def test_the_digest_identifies_the_pixels(tmp_path: Path) -> None:
    folder = photos(tmp_path, [(20, 16)] * 4)
    before = stored(folder)[0].digest
    assert stored(folder)[0].digest == before
    file = next((folder / "train" / "cat").iterdir())
    image = Image.open(file).copy()
    image.putpixel((3, 3), (1, 2, 3))
    image.save(file)
    assert stored(folder)[0].digest != before


def test_a_bad_image_is_an_error_or_is_skipped(tmp_path: Path) -> None:
    folder = photos(tmp_path, [(20, 16)] * 6)
    bad = folder / "train" / "dog" / "004.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(DataError, match=r"dog/004\.png.*truncated.*; fix or remove it, or add --on-bad-image skip"):
        stored(folder)
    store, skipped = stored(folder, skip_bad=True)
    assert len(store) == 5
    assert skipped == ["train/dog/004.png"]
    (folder / "train" / "cat" / "001.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cat/001\.png: is empty .*\(and 1 more\); fix"):
        stored(folder)


@pytest.mark.parametrize("step", ["decoding", "headers"])
def test_progress_is_reported_for_every_image(tmp_path: Path, step: str) -> None:
    rows = open_dataset(str(photos(tmp_path, [(20, 16)] * 3))).splits["train"]
    (tmp_path / "train" / "dog" / "002.png").write_bytes(b"")  # the last one
    done: list[tuple[int, int]] = []
    if step == "decoding":
        _, skipped = decode_all(
            rows, PREPROCESS, crops=False, max_pixels=10**6, skip_bad=True, progress=lambda *counts: done.append(counts)
        )
    else:
        skipped = check_headers(rows, max_pixels=10**6, skip_bad=True, progress=lambda *counts: done.append(counts))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert [(image.position, image.name, image.reason) for image in skipped] == [
        (2, "train/dog/002.png", "is empty (zero bytes)")
    ]


def test_a_missing_photo_is_named(tmp_path: Path) -> None:
    folder = photos(tmp_path / "d", [(90, 90)] * 3)
    source = open_dataset(str(folder))
    gone = sorted(folder.rglob("*.png"))[1]
    gone.unlink()
    with pytest.raises(DataError, match=rf"{gone.name}: does not exist; fix or remove it"):
        decode_all(source.splits["train"], PREPROCESS, crops=False, max_pixels=10**6, skip_bad=False, cache_gb=1)


CPU = torch.device("cpu")
DIGITS = open_dataset("digits").splits["train"].select(range(53))
STORE, _ = decode_all(DIGITS, PREPROCESS, crops=False, max_pixels=10**6, skip_bad=False)
LABELS = np.arange(53) % 10


UNEVEN = np.array([0] * 30 + [2] * 3 + [1] * 19 + [4])


def digits_loader(rank: int = 0, world: int = 1, labels: np.ndarray = LABELS, **options: Any) -> TrainLoader:
    options = {"augmentation": Augmentation("crop", 3), "batch_size": 8} | options
    return TrainLoader(STORE, labels, PREPROCESS, classes=10, device=CPU, rank=rank, world=world, **options)


LOADER = digits_loader()


@settings(max_examples=20, deadline=None)
@given(step=st.integers(0, 40), world=st.integers(1, 5))
def test_the_shards_of_all_processes_concatenate_to_the_batch(step: int, world: int) -> None:
    whole = LOADER.batch(step)
    pixels, labels = whole.pixels.clone(), whole.labels
    shards = [digits_loader(rank, world).batch(step) for rank in range(world)]
    assert torch.equal(torch.cat([shard.pixels.clone() for shard in shards]), pixels)
    assert torch.equal(torch.cat([shard.labels for shard in shards]), labels)


@pytest.mark.parametrize("sampling", ["uniform", "balanced"])
def test_a_batch_depends_only_on_its_step(sampling: str) -> None:
    fresh = digits_loader(labels=UNEVEN, sampling=sampling)
    later = fresh.batch(9).pixels.clone()
    for step in (0, 30, 2, 9):
        again = fresh.batch(step).pixels.clone()
    assert torch.equal(later, again)


def test_each_epoch_sees_every_image_once_in_its_own_order() -> None:
    epochs = [np.concatenate([LOADER.samples(step) for step in range(e * 7, e * 7 + 7)]) for e in (0, 1)]
    for seen in epochs:
        assert sorted(seen) == list(range(53))
    assert (epochs[0] != epochs[1]).any()


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any),
    seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000),
)  # fmt: skip
def test_a_balanced_epoch_has_each_class_equally_often(sizes: list[int], seed: int, epoch: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    drawn = balanced_order(labels, seed, epoch)
    assert len(drawn) == len(set(drawn.tolist())) == len(labels)  # an image drawn again has another key
    positions, repeats = drawn % 2**REPEAT_BITS, drawn >> REPEAT_BITS
    often = np.bincount(labels[positions], minlength=len(sizes))[np.array(sizes) > 0]
    assert often.max() - often.min() <= 1
    for label in np.unique(labels):
        times = np.bincount(positions, minlength=len(labels))[labels == label]
        assert times.max() - times.min() <= 1  # all images of a class alike
    for position in np.unique(positions):
        assert sorted(repeats[positions == position]) == list(range((positions == position).sum()))


def test_the_classes_of_a_balanced_epoch_are_mixed() -> None:
    """A batch has about as many of each, and neighbors are of one class as often as by chance."""
    labels = np.repeat(np.arange(4), [400, 300, 200, 100])
    classes = labels[positions(balanced_order(labels, 3, 1))]
    assert np.abs([np.bincount(batch, minlength=4) - 12.5 for batch in classes.reshape(-1, 50)]).max() < 12
    assert 0.2 < (classes[1:] == classes[:-1]).mean() < 0.3


def test_balanced_epochs_differ_and_sum_to_all_images_of_a_large_class() -> None:
    loader = digits_loader(labels=UNEVEN, sampling="balanced")
    epochs = [np.concatenate([loader.samples(step) for step in range(e * 7, e * 7 + 7)]) for e in range(20)]
    assert all(len(epoch) == len(UNEVEN) for epoch in epochs)
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 20
    assert set(np.concatenate(epochs)) == set(range(len(UNEVEN)))
    # No class is always, and none never, the one that an odd number of draws favors: 53 = 4 * 13 + 1.
    most = {int(np.bincount(UNEVEN[epoch]).argmax()) for epoch in epochs}
    assert most == {0, 1, 2, 4}


@pytest.mark.parametrize("kind", ["crop", "flip"])
def test_an_image_that_is_drawn_again_is_augmented_differently(kind: str) -> None:
    how = Augmentation(kind, 3)
    loader = digits_loader(labels=UNEVEN, augmentation=how, batch_size=53, sampling="balanced")
    batch = loader.batch(0)
    only = batch.pixels[torch.from_numpy(batch.index == 52)]  # of its class
    assert len(only) in (13, 14)
    assert len({tuple(image.ravel().tolist()) for image in only}) == (len(only) if kind == "crop" else 2)
    assert (batch.labels == torch.from_numpy(UNEVEN[batch.index])).all()


def test_random_draws_match_earlier_versions() -> None:
    """A run begun by an earlier version resumes with the same batches, flips and crops."""
    assert LOADER.samples(7).tolist() == permutation(3, "order", 1, 53)[:8].tolist()
    index = np.arange(20)
    assert draw_flips(3, 1, index).tolist() == (uniform(3, "flip", 1, index)[:, 0] < 0.5).tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 60])
def test_evaluation_sees_each_image_exactly_once(world: int) -> None:
    options = {"batch_size": 4, "device": CPU, "world": world}
    loaders = (EvalLoader(STORE, LABELS, PREPROCESS, rank=rank, **options) for rank in range(world))
    seen = [index for loader in loaders for batch in loader for index in batch.index]
    assert seen == list(range(53))


def test_the_center_crop_is_applied_once(tmp_path: Path) -> None:
    """Images are stored before the crop, so evaluation and prediction see the same pixels."""
    preprocess = Preprocess(32, 32, shortest_edge=40)
    folder = photos(tmp_path, [(100, 64), (64, 90)])
    store, _ = stored(folder, preprocess)
    (batch,) = EvalLoader(store, np.zeros(2, np.int64), preprocess, batch_size=2, device=CPU)
    images = [torch.from_numpy(decode(file)) for file in sorted((folder / "train").rglob("*.png"))]
    assert torch.equal(batch.pixels, preprocess_images(images, preprocess))


def assert_same(first: Store, second: Store) -> None:
    index = np.arange(len(first))
    assert first.digest == second.digest
    for a, b in zip(first.gather(index), second.gather(index), strict=True):
        assert torch.equal(a, b)


def test_a_large_store_is_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos(tmp_path, [(20, 16)] * 6)
    in_memory, _ = stored(folder)
    monkeypatch.setattr("vitft.data.stores.store.IN_MEMORY", 100)
    made, real = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **how: made.append(real(**how)) or made[-1])
    mapped, _ = stored(folder, cache_gb=1e-5)
    assert len(made) == 1
    assert_same(mapped, in_memory)


@pytest.mark.parametrize("bound", [0, 2000, 4000])
def test_images_over_the_limit_are_decoded_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    folder = photos(tmp_path, [(20, 16)] * 5)
    (folder / "train" / "cat" / "bad.png").write_bytes(b"no image")
    photos(tmp_path / "more", [(20, 16), (16, 20)])
    (tmp_path / "more" / "train" / "dog" / "000.png").rename(folder / "train" / "dog" / "900.png")
    (tmp_path / "more" / "train" / "cat" / "001.png").rename(folder / "train" / "dog" / "901.png")
    in_memory, bad = stored(folder, skip_bad=True)
    monkeypatch.setattr("vitft.data.stores.store.IN_MEMORY", bound)
    on_demand, also = stored(folder, skip_bad=True)
    assert bad == also
    assert len(on_demand.pixels) <= bound < len(in_memory.pixels)
    assert_same(on_demand, in_memory)
    sizes = np.flatnonzero(in_memory.shapes[:, 0] == 16)
    assert len(sizes) == 6
    assert torch.equal(torch.stack(list(in_memory.gather(sizes))), torch.stack(list(on_demand.gather(sizes))))


@pytest.mark.parametrize(
    ("change", "message"),
    [(Path.unlink, "does not exist"), (lambda file: ImageOps.mirror(Image.open(file)).save(file), "different pixels")],
)
def test_an_image_changed_since_the_run_began_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], message: str
) -> None:
    folder = photos(tmp_path, [(20, 16)] * 4)
    monkeypatch.setattr("vitft.data.stores.store.IN_MEMORY", 0)
    store, _ = stored(folder)
    change(folder / "train" / "cat" / "001.png")
    with pytest.raises(DataError, match=rf"cat/001.png: .*{message}; it has changed since the run began"):
        store.gather(np.arange(4))


def test_images_decoded_on_demand_move_to_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitft.data.stores.store._CHUNK", 3)
    folder = photos(tmp_path, [(20, 16)] * 7)
    in_memory, _ = stored(folder)
    monkeypatch.setattr("vitft.data.stores.store.IN_MEMORY", 0)
    on_demand, _ = stored(folder)
    assert len(on_demand.pixels) == 0
    moved = move_to_device(on_demand, CPU, 10 * in_memory.size)
    assert torch.equal(moved.pixels, in_memory.pixels)
    assert moved.load is None
    assert move_to_device(on_demand, CPU, 10 * in_memory.size - 1) is on_demand


# -- sources of crops ----------------------------------------------------------------------


def scene(width: int, height: int) -> Image.Image:
    """Overlapping discs of many sizes, whose edges are equally sharp on every scale, as in natural images."""
    drawn = np.random.default_rng(7)
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for radius in np.concatenate([np.geomspace(width / 4, 20, 300), 2 / np.sqrt(drawn.uniform(0.001, 1, 9000))]):
        x, y = drawn.random() * width, drawn.random() * height
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(drawn.integers(0, 256, 3).tolist()))
    return image


def sharpness(images: Tensor) -> float:
    """The mean squared difference of neighboring pixels."""
    gray = images.float().mean(dim=3)
    return float((gray.diff(dim=1) ** 2).mean() + (gray.diff(dim=2) ** 2).mean())


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png"])
@pytest.mark.parametrize("size", [(1200, 800), (800, 1000), (300, 200)])
def test_crops_are_as_sharp_as_from_the_original_photo(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    """Large and small crops. Storing 8/7 of the model's side would leave 0.48 and 0.24 of the gradient energy."""
    preprocess = Preprocess(64, 64)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    scene(*size).save(tmp_path / "train" / "cat" / name, quality=95)
    store, _ = stored(tmp_path, preprocess, crops=True, training=True)
    photo = torch.from_numpy(decode(tmp_path / "train" / "cat" / name))
    assert store.size <= 3 * 64 * 64 / CROP_AREA * 1.01
    for small in (False, True):
        index = np.arange(400)
        boxes = draw_crop_boxes(np.tile(photo.shape[:2], (400, 1)), 0, 0, index)
        area = boxes[:, 2:].prod(axis=1) / (photo.shape[0] * photo.shape[1])
        index = index[area < 0.2][:24] if small else index[:40]
        from_store = random_crops(store.gather(np.zeros(len(index), np.int64), stacked=False), preprocess, 0, 0, index)
        from_photo = random_crops([photo] * len(index), preprocess, 0, 0, index)
        assert sharpness(from_store) == pytest.approx(sharpness(from_photo), rel=0.15)


def test_unstacked_images_are_views(tmp_path: Path) -> None:
    store, _ = stored(photos(tmp_path, [(20, 16)] * 4))
    last, second = store.gather(np.array([3, 1]), stacked=False)
    assert last.data_ptr() == store.pixels[3 * 960 :].data_ptr()
    assert second.data_ptr() == store.pixels[960:].data_ptr()


def test_a_small_store_of_equal_sizes_moves_to_the_device(tmp_path: Path) -> None:
    """The meta device stands in for a GPU: it has no values, but it is a device."""
    meta = torch.device("meta")
    equal, _ = stored(photos(tmp_path / "equal", [(20, 16)] * 4))
    assert move_to_device(equal, meta, 10 * equal.pixels.nbytes).pixels.device == meta
    assert move_to_device(equal, meta, 10 * equal.pixels.nbytes - 1) is equal
    mixed, _ = stored(photos(tmp_path / "mixed", [(20, 16), (16, 20)] * 2))
    assert move_to_device(mixed, meta, 10**12) is mixed


def test_a_full_disk_is_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos(tmp_path, [(20, 16)] * 4)
    in_memory, _ = stored(folder)
    monkeypatch.setattr("vitft.data.stores.store.IN_MEMORY", 900)
    disk = tempfile.TemporaryFile

    def small(buffering: int) -> object:
        file = disk(buffering=buffering)
        write = file.write
        file.write = lambda raw: write(raw[: 2000 - file.tell()])  # type: ignore[method-assign]
        return file

    monkeypatch.setattr("vitft.data.stores.store.tempfile.TemporaryFile", small)
    on_demand, _ = stored(folder, cache_gb=1e-5)
    assert len(on_demand.pixels) == 2 * 20 * 16 * 3
    assert_same(on_demand, in_memory)


def test_only_training_decodes_at_smaller_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    min_sides: list[int | None] = []

    def spy(source: object, max_pixels: int, min_side: int | None, value_range: object) -> np.ndarray:
        min_sides.append(min_side)
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr("vitft.data.stores.store.decode", spy)
    square, edge = Preprocess(224, 224), Preprocess(224, 224, shortest_edge=248)
    for preprocess, training, cropped in (
        (square, False, False), (square, True, False), (square, True, True), (edge, True, False),
    ):  # fmt: skip
        decode_all(DIGITS.select([0]), preprocess, crops=cropped, max_pixels=10**8, skip_bad=False, training=training)
    assert min_sides == [None, 224, 1188, 248]  # for crops, 1.5 times the stored side of a square: 224 / sqrt(0.08)


# -- prefetching on the host for a GPU ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "flip", "crop", "trivial"])
def test_prefetched_batches_are_the_same(tmp_path: Path, kind: str) -> None:
    """As if a GPU trained and images of several sizes stayed in host memory."""
    folder = photos(tmp_path, [(40, 30), (20, 16), (33, 70), (32, 32), (9, 50)] * 3)
    store, _ = stored(folder, crops=kind == "crop")
    options = {
        "augmentation": Augmentation(kind, 3, mixup=0.4 * (kind == "trivial")),
        "classes": 10,
        "batch_size": 4,
        "device": CPU,
    }
    loaders = [TrainLoader(store, np.zeros(15, np.int64), PREPROCESS, **options) for _ in range(3)]  # type: ignore[arg-type]
    plain, ahead, forked = loaders
    before = set(psutil.Process().children())
    ahead._prefetch = Prefetcher(ahead._augment_on_host)
    forked._prefetch = ForkedPrefetcher(forked._augment_on_host, 2, pin=False)
    for step in (0, 1, 2, 3, 4, 9, 8, 2):
        expected = plain.batch(step)
        for actual in (ahead.batch(step), forked.batch(step)):
            assert torch.equal(expected.pixels, actual.pixels)
            assert expected.index.tolist() == actual.index.tolist()
    processes = set(psutil.Process().children()) - before
    assert processes
    forked.close()
    assert not any(process.is_running() and process.status() != "zombie" for process in processes)


@pytest.mark.parametrize("mirror", [False, True])
def test_unaugmented_images_are_prepared_ahead(tmp_path: Path, mirror: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU read their features and images of several sizes stayed in host memory."""
    store, _ = stored(photos(tmp_path, [(40, 30), (20, 16), (33, 70), (32, 32), (9, 50)] * 2), crops=False)
    loader = TrainLoader(store, np.zeros(10, np.int64), PREPROCESS, augmentation=Augmentation("none", 3), classes=10,
                         batch_size=4, device=CPU)  # fmt: skip
    chunks = np.split(np.arange(10)[::-1], [3, 6, 9])
    expected = list(loader.unaugmented(chunks, mirror=mirror))
    one = preprocess_images(store.gather(np.array([9]), stacked=False), PREPROCESS)
    torch.testing.assert_close(expected[0][:1], one.flip(-1) if mirror else one, atol=3 / 255, rtol=0)
    gathered, gather = list[int](), loader._gather
    monkeypatch.setattr(loader, "_gather", lambda index: gathered.append(len(index)) or gather(index))
    loader._prefetch = Prefetcher(loader._augment_on_host)
    found = loader.unaugmented(chunks, mirror=mirror)
    first = next(found)
    wait_until(lambda: len(gathered) == 3)  # two more, without being asked
    for whole, ahead in zip(expected, [first, *found], strict=True):
        assert torch.equal(whole, ahead)
    assert gathered == [3, 3, 3, 1]


def test_two_results_are_prefetched_and_errors_are_raised() -> None:
    started: list[int] = []

    def work(number: int) -> torch.Tensor:
        started.append(number)
        return torch.tensor(10 // (number - 5))

    ahead = Prefetcher(work, end=8)
    assert ahead(0) == -2
    ahead._thread.submit(lambda: None).result()  # the thread runs tasks in order
    assert started == [0, 1, 2]
    assert [int(ahead(number)) for number in (1, 2, 3, 4)] == [-3, -4, -5, -10]
    with pytest.raises(ZeroDivisionError):
        ahead(5)
    assert ahead(7) == 5
    ahead._thread.submit(lambda: None).result()
    assert started == [0, 1, 2, 3, 4, 5, 6, 7]


def test_prefetched_evaluation_is_the_same() -> None:
    loader = EvalLoader(STORE, LABELS, PREPROCESS, batch_size=8, device=CPU)
    expected = [batch.pixels.clone() for batch in loader]
    for ahead in (map(Prefetcher(loader._load, len(loader)), range(len(loader))),
                  map_in_processes(loader._load, range(len(loader)), 2)):  # fmt: skip
        actual = [normalize(images, PREPROCESS) for images in ahead]
        assert len(actual) == len(expected)
        assert all(map(torch.equal, actual, expected))


def test_headers_keep_to_the_limit_on_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = open_dataset(str(photos(tmp_path, [(64, 64), (80, 80)]))).splits["train"]
    limits, read = [], store.header
    monkeypatch.setattr(store, "header", lambda source, limit: limits.append(limit) or read(source, limit))
    decode_all(rows, Preprocess(32, 32), crops=True, max_pixels=10**9, skip_bad=False, training=True, cache_gb=0.001)
    assert limits == [10**9] * 3
