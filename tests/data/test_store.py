"""Images decoded once, and the batches that are made of them."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor

from vitft.data.augment import (
    CROP_AREA,
    Preprocess,
    draw_crop_boxes,
    draw_flips,
    normalize,
    random_crops,
    resize_and_crop,
)
from vitft.data.decoder import decode
from vitft.data.loader import EvalLoader, Prefetcher, TrainLoader
from vitft.data.sources.source import open_dataset
from vitft.data.store import Store, check_headers, decode_all, move_to_device
from vitft.errors import DataError
from vitft.randomness import order, uniform

HOW = Preprocess(32, 32)


def photos(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    drawn = np.random.default_rng(5)
    for i, (width, height) in enumerate(sizes):
        place = folder / "train" / ("cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        smooth = Image.fromarray(drawn.integers(0, 256, (6, 6, 3), np.uint8)).resize((width, height))
        smooth.save(place / f"{i:03}.png")
    return folder


def stored(
    folder: Path, *, crops: bool = False, skip_bad: bool = False, cache_gb: float = 0
) -> tuple[Store, list[str]]:
    rows = open_dataset(str(folder)).splits["train"]
    store, skipped = decode_all(
        rows, HOW, crops=crops, max_pixels=10**6, skip_bad=skip_bad, cache_gb=cache_gb, name="photos"
    )
    return store, [one.name for one in skipped]


def test_equal_small_images_are_kept_whole(tmp_path: Path) -> None:
    store, _ = stored(photos(tmp_path, [(20, 16)] * 6))
    images = store.gather(np.array([4, 0]))
    assert isinstance(images, Tensor)
    assert images.shape == (2, 16, 20, 3)
    first = sorted((tmp_path / "train" / "cat").iterdir())[0]
    assert (images[1].numpy() == decode(first)).all()


def test_large_images_are_reduced_for_evaluation_and_less_so_for_crops(tmp_path: Path) -> None:
    folder = photos(tmp_path, [(100, 64), (64, 100), (20, 10), (300, 40)])
    exact, _ = stored(folder)
    assert sorted(map(tuple, exact.shapes.tolist())) == [(10, 20), (32, 32), (32, 32), (32, 32)]
    cropped, _ = stored(photos(tmp_path / "larger", [(800, 450), (450, 800), (200, 64), (1600, 50)]), crops=True)
    # As many pixels as make the smallest crop 32 x 32, and never enlarged.
    assert round(32 * 32 / CROP_AREA) == 12_800
    assert sorted(map(tuple, cropped.shapes.tolist())) == [(20, 640), (64, 200), (85, 151), (151, 85)]


def test_the_digest_names_the_pixels(tmp_path: Path) -> None:
    folder = photos(tmp_path, [(20, 16)] * 4)
    before = stored(folder)[0].digest
    assert stored(folder)[0].digest == before
    file = next((folder / "train" / "cat").iterdir())
    image = Image.open(file).copy()
    image.putpixel((3, 3), (1, 2, 3))
    image.save(file)
    assert stored(folder)[0].digest != before


def test_a_bad_image_stops_the_run_by_name_or_is_listed(tmp_path: Path) -> None:
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
def test_every_image_is_told_of_as_it_is_done(tmp_path: Path, step: str) -> None:
    rows = open_dataset(str(photos(tmp_path, [(20, 16)] * 3))).splits["train"]
    (tmp_path / "train" / "dog" / "002.png").write_bytes(b"")  # the last one
    done: list[tuple[int, int]] = []
    if step == "decoding":
        _, skipped = decode_all(
            rows, HOW, crops=False, max_pixels=10**6, skip_bad=True, progress=lambda *how: done.append(how)
        )
    else:
        skipped = check_headers(rows, max_pixels=10**6, skip_bad=True, progress=lambda *how: done.append(how))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert [(one.position, one.name, one.reason) for one in skipped] == [
        (2, "train/dog/002.png", "is empty (zero bytes)")
    ]


def test_a_photo_that_is_gone_is_named_as_such(tmp_path: Path) -> None:
    folder = photos(tmp_path / "d", [(90, 90)] * 3)
    source = open_dataset(str(folder))
    gone = sorted(folder.rglob("*.png"))[1]
    gone.unlink()
    with pytest.raises(DataError, match=rf"{gone.name}: does not exist; fix or remove it"):
        decode_all(
            source.splits["train"], Preprocess(32, 32), crops=False, max_pixels=10**6, skip_bad=False, cache_gb=1
        )


def digits_loader(**changes: object) -> TrainLoader:
    rows = open_dataset("digits").splits["train"].select(range(53))
    store, _ = decode_all(rows, HOW, crops=False, max_pixels=10**6, skip_bad=False)
    labels = np.arange(53) % 10
    options = {"kind": "crop", "seed": 3, "batch_size": 8, "device": torch.device("cpu")}
    return TrainLoader(store, labels, HOW, **options | changes)  # type: ignore[arg-type]


LOADER = digits_loader()


@settings(max_examples=20, deadline=None)
@given(step=st.integers(0, 40), world=st.integers(1, 5))
def test_the_shares_of_all_processes_join_to_the_whole_batch(step: int, world: int) -> None:
    whole = LOADER.batch(step)
    pixels, labels = whole.pixels.clone(), whole.labels
    shares = [digits_like(rank, world).batch(step) for rank in range(world)]
    assert torch.equal(torch.cat([share.pixels.clone() for share in shares]), pixels)
    assert torch.equal(torch.cat([share.labels for share in shares]), labels)


def digits_like(rank: int, world: int) -> TrainLoader:
    return TrainLoader(
        LOADER.store, LOADER.labels.numpy(), HOW, kind="crop", seed=3, batch_size=8,
        device=torch.device("cpu"), rank=rank, world=world,
    )  # fmt: skip


def test_a_batch_depends_on_its_step_alone() -> None:
    fresh = digits_like(0, 1)
    later = fresh.batch(9).pixels.clone()
    for step in (0, 30, 2, 9):
        again = fresh.batch(step).pixels.clone()
    assert torch.equal(later, again)


def test_an_epoch_sees_each_image_once_in_an_order_of_its_own() -> None:
    epochs = [np.concatenate([LOADER.samples(step) for step in range(e * 7, e * 7 + 7)]) for e in (0, 1)]
    for seen in epochs:
        assert sorted(seen) == list(range(53))
    assert (epochs[0] != epochs[1]).any()


def test_the_draws_of_a_run_are_those_of_earlier_versions() -> None:
    """A run that one of them began goes on with the same batches, flips and crops."""
    assert LOADER.samples(7).tolist() == order(3, "order", 1, 53)[:8].tolist()
    index = np.arange(20)
    assert draw_flips(3, 1, index).tolist() == (uniform(3, "flip", 1, index)[:, 0] < 0.5).tolist()


@pytest.mark.parametrize("world", [1, 2, 3, 60])
def test_evaluation_sees_each_image_on_one_process_once(world: int) -> None:
    options = {"batch_size": 4, "device": torch.device("cpu"), "world": world}
    loaders = [EvalLoader(LOADER.store, LOADER.labels.numpy(), HOW, rank=rank, **options) for rank in range(world)]
    seen = [index for loader in loaders for batch in loader for index in batch.index]
    assert seen == list(range(53))


def test_a_centre_crop_is_made_once(tmp_path: Path) -> None:
    """Stored before its crop: an evaluated image is the predicted one."""
    how = Preprocess(32, 32, shortest_edge=40)
    folder = photos(tmp_path, [(100, 64), (64, 90)])
    rows = open_dataset(str(folder)).splits["train"]
    store, _ = decode_all(rows, how, crops=False, max_pixels=10**6, skip_bad=False)
    (batch,) = EvalLoader(store, np.zeros(2, np.int64), how, batch_size=2, device=torch.device("cpu"))
    files = sorted((folder / "train").rglob("*.png"))
    expected = [normalize(resize_and_crop(torch.from_numpy(decode(file))[None], how), how)[0] for file in files]
    assert torch.equal(batch.pixels, torch.stack(expected))


def test_a_large_store_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos(tmp_path, [(20, 16)] * 6)
    in_memory, _ = stored(folder)
    monkeypatch.setattr("vitft.data.store.IN_MEMORY", 100)
    mapped, _ = stored(folder, cache_gb=1e-5)
    everything = np.arange(6)
    first, second = in_memory.gather(everything), mapped.gather(everything)
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor)
    assert torch.equal(first, second)
    assert mapped.digest == in_memory.digest


@pytest.mark.parametrize("bound", [0, 2000, 4000])
def test_what_exceeds_the_bound_is_decoded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: int) -> None:
    folder = photos(tmp_path, [(20, 16)] * 5)
    (folder / "train" / "cat" / "bad.png").write_bytes(b"no image")
    photos(tmp_path / "more", [(20, 16), (16, 20)])
    (tmp_path / "more" / "train" / "dog" / "000.png").rename(folder / "train" / "dog" / "900.png")
    (tmp_path / "more" / "train" / "cat" / "001.png").rename(folder / "train" / "dog" / "901.png")
    whole, bad = stored(folder, skip_bad=True)
    monkeypatch.setattr("vitft.data.store.IN_MEMORY", bound)
    streamed, also = stored(folder, skip_bad=True)
    assert bad == also
    assert len(streamed.pixels) <= bound < len(whole.pixels)
    assert streamed.digest == whole.digest
    for a, b in zip(whole.gather(np.arange(7)), streamed.gather(np.arange(7)), strict=True):
        assert torch.equal(a, b)
    sizes = np.flatnonzero(whole.shapes[:, 0] == 16)
    assert len(sizes) == 6
    assert torch.equal(torch.stack(list(whole.gather(sizes))), torch.stack(list(streamed.gather(sizes))))


def test_a_streamed_image_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos(tmp_path, [(20, 16)] * 4)
    monkeypatch.setattr("vitft.data.store.IN_MEMORY", 0)
    store, _ = stored(folder)
    (folder / "train" / "cat" / "001.png").unlink()
    with pytest.raises(DataError, match=r"cat/001.png: does not exist; it has changed since the run began"):
        store.gather(np.arange(4))


def test_a_streamed_image_that_has_changed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos(tmp_path, [(20, 16)] * 4)
    monkeypatch.setattr("vitft.data.store.IN_MEMORY", 0)
    store, _ = stored(folder)
    file = folder / "train" / "cat" / "001.png"
    Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
    with pytest.raises(
        DataError, match=r"cat/001.png: decodes to different pixels; it has changed since the run began"
    ):
        store.gather(np.arange(4))


def test_what_is_read_from_its_file_moves_to_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitft.data.store._CHUNK", 3)
    folder = photos(tmp_path, [(20, 16)] * 7)
    whole, _ = stored(folder)
    monkeypatch.setattr("vitft.data.store.IN_MEMORY", 0)
    streamed, _ = stored(folder)
    assert len(streamed.pixels) == 0
    moved = move_to_device(streamed, torch.device("cpu"), 10 * whole.size)
    assert torch.equal(moved.pixels, whole.pixels)
    assert moved.load is None
    assert move_to_device(streamed, torch.device("cpu"), 10 * whole.size - 1) is streamed


# -- what crops are cut from ----------------------------------------------------------------------


def scene(width: int, height: int) -> Image.Image:
    """Discs of many sizes before one another, whose edges are as sharp on every scale: as natural images are."""
    drawn = np.random.default_rng(7)
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    for radius in np.concatenate([np.geomspace(width / 4, 20, 300), 2 / np.sqrt(drawn.uniform(0.001, 1, 9000))]):
        x, y = drawn.random() * width, drawn.random() * height
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(drawn.integers(0, 256, 3).tolist()))
    return image


def sharpness(images: Tensor) -> float:
    """The mean squared difference of neighbors."""
    gray = images.float().mean(dim=3)
    return float((gray.diff(dim=1) ** 2).mean() + (gray.diff(dim=2) ** 2).mean())


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png"])
@pytest.mark.parametrize("size", [(1200, 800), (800, 1000), (300, 200)])
def test_crops_are_as_sharp_as_if_cut_from_the_photo(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    """Large ones and small ones: those of 8/7 of the model's side have 0.48 and 0.24 of the gradient energy."""
    how = Preprocess(64, 64)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    scene(*size).save(tmp_path / "train" / "cat" / name, quality=95)
    rows = open_dataset(str(tmp_path)).splits["train"]
    store, _ = decode_all(rows, how, crops=True, max_pixels=10**7, skip_bad=False, training=True)
    photo = torch.from_numpy(decode(tmp_path / "train" / "cat" / name))
    assert store.size <= 3 * 64 * 64 / CROP_AREA * 1.01
    for small in (False, True):
        index = np.arange(400)
        boxes = draw_crop_boxes(np.tile(photo.shape[:2], (400, 1)), 0, 0, index)
        area = boxes[:, 2:].prod(axis=1) / (photo.shape[0] * photo.shape[1])
        index = index[area < 0.2][:24] if small else index[:40]
        from_store = random_crops(store.gather(np.zeros(len(index), np.int64), stacked=False), how, 0, 0, index)
        from_photo = random_crops([photo] * len(index), how, 0, 0, index)
        assert sharpness(from_store) == pytest.approx(sharpness(from_photo), rel=0.15)


def test_crops_of_photos_are_cut_from_views(tmp_path: Path) -> None:
    store, _ = stored(photos(tmp_path, [(20, 16)] * 4))
    one, two = store.gather(np.array([3, 1]), stacked=False)
    assert one.data_ptr() == store.pixels[3 * 960 :].data_ptr()
    assert two.data_ptr() == store.pixels[960:].data_ptr()


def test_a_small_store_of_equal_images_moves_to_the_device(tmp_path: Path) -> None:
    """No GPU is needed to see the rule: the meta device has no numbers, but a place."""
    meta = torch.device("meta")
    equal, _ = stored(photos(tmp_path / "equal", [(20, 16)] * 4))
    assert move_to_device(equal, meta, 10 * equal.pixels.nbytes).pixels.device == meta
    assert move_to_device(equal, meta, 10 * equal.pixels.nbytes - 1) is equal
    mixed, _ = stored(photos(tmp_path / "mixed", [(20, 16), (16, 20)] * 2))
    assert move_to_device(mixed, meta, 10**12) is mixed


def test_a_full_disk_is_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos(tmp_path, [(20, 16)] * 4)
    whole, _ = stored(folder)
    monkeypatch.setattr("vitft.data.store.IN_MEMORY", 900)
    disk = tempfile.TemporaryFile

    def small(buffering: int) -> object:
        file = disk(buffering=buffering)
        write = file.write
        file.write = lambda raw: write(raw[: 2000 - file.tell()])  # type: ignore[method-assign]
        return file

    monkeypatch.setattr("vitft.data.store.tempfile.TemporaryFile", small)
    streamed, _ = stored(folder, cache_gb=1e-5)
    assert len(streamed.pixels) == 2 * 20 * 16 * 3
    for a, b in zip(whole.gather(np.arange(4)), streamed.gather(np.arange(4)), strict=True):
        assert torch.equal(a, b)


def test_only_training_takes_what_the_decoder_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def spy(source: object, max_pixels: int, enough: int | None, value_range: object) -> np.ndarray:
        asked.append(enough)
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr("vitft.data.store.decode", spy)
    rows = open_dataset("digits").splits["train"].select(range(1))
    how = Preprocess(224, 224)
    for training, cropped in ((False, False), (True, False), (True, True)):
        decode_all(rows, how, crops=cropped, max_pixels=10**8, skip_bad=False, training=training)
    edge = Preprocess(224, 224, shortest_edge=248)
    decode_all(rows, edge, crops=False, max_pixels=10**8, skip_bad=False, training=True)
    assert asked == [None, 224, 1188, 248]  # of crops 1.5 times what is stored of a square: 224 / sqrt(0.08)


# -- what a GPU leaves to the host ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "flip", "crop"])
def test_batches_that_are_prefetch_are_the_same(tmp_path: Path, kind: str) -> None:
    """As where a GPU trains and the images stay in the host's memory; here of several sizes."""
    folder = photos(tmp_path, [(40, 30), (20, 16), (33, 70), (32, 32), (9, 50)] * 3)
    rows = open_dataset(str(folder)).splits["train"]
    store, _ = decode_all(rows, HOW, crops=kind == "crop", max_pixels=10**6, skip_bad=False)
    options = {"kind": kind, "seed": 3, "batch_size": 4, "device": torch.device("cpu")}
    plain, ahead = (TrainLoader(store, np.zeros(15, np.int64), HOW, **options) for _ in range(2))  # type: ignore[arg-type]
    ahead._prefetch = Prefetcher(ahead._augment_on_host)
    for step in (0, 1, 2, 3, 4, 9, 8, 2):
        one, other = plain.batch(step), ahead.batch(step)
        assert torch.equal(one.pixels, other.pixels)
        assert one.index.tolist() == other.index.tolist()


def test_two_results_are_begun_ahead_and_errors_are_passed_on() -> None:
    begun: list[int] = []

    def work(number: int) -> torch.Tensor:
        begun.append(number)
        return torch.tensor(10 // (number - 5))

    ahead = Prefetcher(work, end=8)
    assert ahead(0) == -2
    ahead._thread.submit(lambda: None).result()  # the thread does one after the other
    assert begun == [0, 1, 2]
    assert [int(ahead(number)) for number in (1, 2, 3, 4)] == [-3, -4, -5, -10]
    with pytest.raises(ZeroDivisionError):
        ahead(5)
    assert ahead(7) == 5
    ahead._thread.submit(lambda: None).result()
    assert begun == [0, 1, 2, 3, 4, 5, 6, 7]


def test_evaluation_prefetch_is_the_same() -> None:
    loader = EvalLoader(LOADER.store, LOADER.labels.numpy(), HOW, batch_size=8, device=torch.device("cpu"))
    ahead = Prefetcher(loader._load, len(loader))
    assert all(torch.equal(normalize(ahead(number), HOW), batch.pixels) for number, batch in enumerate(loader))
