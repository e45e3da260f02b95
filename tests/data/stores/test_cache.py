"""The disk cache of decoded photos: hits and misses, verification, size limit, concurrent runs, removal."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.data.stores.test_store import photos
from vitft.cli.app import app
from vitft.data.augment import Preprocess
from vitft.data.augmentation.settings import Augmentation
from vitft.data.loader import TrainLoader
from vitft.data.sources.source import open_dataset
from vitft.data.stores import cache
from vitft.data.stores.store import Store, decode_all
from vitft.errors import DataError
from vitft.io.atomic import lock_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photos(tmp_path / "photos", [(100, 64), (64, 100), (70, 90), (80, 50)])


def stored(folder: Path, size: int = 32, *, crops: bool = False, cache_gb: float = 1.0) -> Store:
    rows = open_dataset(str(folder)).splits["train"]
    preprocess = Preprocess(size, size)
    return decode_all(rows, preprocess, crops=crops, max_pixels=10**6, skip_bad=True, cache_gb=cache_gb, name="photos")[
        0
    ]


def same(first: Store, second: Store) -> bool:
    index = np.arange(len(first))
    pairs = zip(first.gather(index), second.gather(index), strict=True)
    return first.digest == second.digest and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("crops", [False, True])
def test_photos_are_decoded_once_for_all_runs(folder: Path, decoded: list[object], crops: bool) -> None:
    first = stored(folder, crops=crops)
    assert len(decoded) == 4
    second = stored(folder, crops=crops)
    assert len(decoded) == 4
    assert same(first, second)


def test_pixels_are_read_into_memory_if_they_fit(folder: Path) -> None:
    stored(folder)
    key = cache.entries()[0].folder.name
    size = 4 * 32 * 32 * 3
    fits, over = (cache.read(key, 4, limit) for limit in (size, size - 1))
    assert fits is not None
    assert over is not None
    assert (fits[1].shape, over[1].shape) == ((size,), (0,))
    image = over[0].image(1)
    assert image is not None
    assert np.array_equal(fits[1].numpy().reshape(4, 32, 32, 3)[1], image)


def test_anything_that_changes_the_pixels_changes_the_fingerprint(folder: Path, decoded: list[object]) -> None:
    stored(folder)
    for change in ({"size": 31}, {"crops": True}):
        before = len(decoded)
        stored(folder, **change)  # type: ignore[arg-type]
        assert len(decoded) == before + 4, change
    file = sorted((folder / "train" / "cat").iterdir())[0]
    os.utime(file, (1, 1))
    before = len(decoded)
    stored(folder)
    assert len(decoded) == before + 4


def test_images_stored_as_bytes_are_identified_by_their_bytes(folder: Path) -> None:
    rows = open_dataset(str(folder)).splits["train"]

    def named(cells: list[bytes]) -> str | None:
        fake = datasets.Dataset.from_dict({"image": [{"bytes": cell, "path": None} for cell in cells]})
        return cache.fingerprint(fake, "settings")

    contents = [Path(cell["path"]).read_bytes() for cell in rows["image"]]
    assert named(contents) == named(contents)
    assert named(contents) != named(contents[::-1])
    assert named([contents[0], contents[1]]) != named([contents[0] + contents[1], b""])


def test_small_images_are_not_cached(tmp_path: Path, place: Path) -> None:
    stored(photos(tmp_path / "small", [(20, 16)] * 4))
    assert cache.entries() == []


def test_a_limit_of_zero_disables_the_cache(folder: Path, place: Path) -> None:
    stored(folder, cache_gb=0)
    assert not place.exists()


def test_a_split_with_a_bad_image_is_not_cached(folder: Path) -> None:
    (folder / "train" / "cat" / "zzz.png").write_bytes(b"no image")
    stored(folder)
    assert cache.entries() == []  # until it is fixed, each run has to report it again


def test_the_limit_evicts_the_least_recently_used(folder: Path) -> None:
    stored(folder, 32)
    stored(folder, 31)
    for age, entry in enumerate(sorted(cache.entries(), key=lambda entry: entry.size), 1):
        os.utime(entry.folder, (1e9 + age, 1e9 + age))  # the entry of size 31 was used before that of size 32
    stored(folder, 32)  # now the most recently used
    both = sum(entry.size for entry in cache.entries())
    cache._evict(both)
    assert len(cache.entries()) == 2  # exactly at the limit
    stored(folder, 30, cache_gb=(both + 100) / 1e9)
    sizes = sorted(int(np.fromfile(entry.folder / "index", "<u8")[0]) for entry in cache.entries())
    assert sizes == [30, 32]
    stored(folder, 29, cache_gb=1e-9)
    assert sorted(entry.images for entry in cache.entries()) == [
        4,
        4,
    ]  # it does not fit at all, so nothing is evicted for it


def test_concurrent_runs_write_one_complete_entry(folder: Path, place: Path) -> None:
    stores: list[Store] = []
    runs = [threading.Thread(target=lambda: stores.append(stored(folder))) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(stores) == 4
    assert all(same(stores[0], other) for other in stores)
    assert [entry.images for entry in cache.entries()] == [4]
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []
    assert same(stored(folder), stores[0])


def test_writing_to_a_store_does_not_change_the_entry(folder: Path) -> None:
    stored(folder)
    stored(folder).pixels.zero_()
    assert same(stored(folder), stored(folder, cache_gb=0))


# -- verification --------------------------------------------------------------------------------------


def entry_of() -> Path:
    (entry,) = cache.entries()
    return entry.folder


def assert_detected(folder: Path, decoded: list[object], damage: object) -> None:
    """The next run decodes again and writes an intact entry in place of the corrupt one."""
    before = len(decoded)
    again = stored(folder)
    assert len(decoded) == before + 4, damage
    assert stored(folder).digest == again.digest, damage
    assert len(decoded) == before + 4, damage


def check_flipped_bits(folder: Path, decoded: list[object], count: int) -> None:
    """Flip one random bit at a time, in each file of an entry; every other one in its pixels."""
    whole = stored(folder, cache_gb=0)
    stored(folder)
    drawn = np.random.default_rng(count)
    for number in range(count):
        files = sorted(entry_of().iterdir())
        assert [file.name for file in files] == ["entry.json", "index", "pixels"]
        file = files[number % 3] if number % 2 else files[2]
        content = bytearray(file.read_bytes())
        place, bit = int(drawn.integers(len(content))), int(drawn.integers(8))
        content[place] ^= 1 << bit
        file.write_bytes(content)
        assert_detected(folder, decoded, (file.name, place, bit))
    assert same(stored(folder), whole)


def test_a_flipped_bit_is_detected(folder: Path, decoded: list[object]) -> None:
    check_flipped_bits(folder, decoded, 36)


@pytest.mark.slow
def test_a_thousand_flipped_bits_are_detected(folder: Path, decoded: list[object]) -> None:
    check_flipped_bits(folder, decoded, 1000)


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize("name", ["pixels", "index", "entry.json"])
@pytest.mark.parametrize(
    "damage",
    [
        rewritten(lambda content: b""),
        rewritten(lambda content: content[:-1]),
        rewritten(lambda content: content[: len(content) // 2]),
        rewritten(lambda content: content + content[-1:]),
        rewritten(lambda content: bytes(len(content))),
        rewritten(lambda content: content[:10] + bytes(64) + content[74:]),
        rewritten(lambda content: content[len(content) // 2 :] + content[: len(content) // 2]),
        Path.unlink,
    ],
    ids=["emptied", "a byte short", "halved", "a byte long", "zeroed", "a block zeroed", "rotated", "missing"],
)
def test_a_corrupt_entry_is_removed_and_decoded_again(
    folder: Path, decoded: list[object], damage: Callable[[Path], object], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = stored(folder, cache_gb=0)
    stored(folder)
    damage(entry_of() / name)
    assert_detected(folder, decoded, name)
    assert same(stored(folder), whole)
    message = " ".join(capfd.readouterr().err.split())
    assert "cached photos are corrupt and are decoded again; the entry was removed" in message


def test_an_entry_with_another_number_of_photos_is_not_used(folder: Path) -> None:
    stored(folder)
    assert cache.read(entry_of().name, 5, 10**9) is None


def test_an_entry_whose_description_is_other_json_is_not_used(folder: Path, decoded: list[object]) -> None:
    for text in ("[]\n", "3\n", "{}\n", '{\n  "xxh3": "0"\n}\n'):
        stored(folder)
        (entry_of() / "entry.json").write_text(text)
        assert_detected(folder, decoded, text)


@pytest.fixture(params=["in memory", "in a file"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the entry exceeds the bytes that a run holds in memory."""
    if request.param == "in a file":
        monkeypatch.setattr("vitft.data.stores.store.IN_MEMORY", 100)
        return True
    return False


def test_bytes_changed_after_verification_are_not_used(folder: Path, large: bool, decoded: list[object]) -> None:
    whole = stored(folder)
    for change in (lambda content: bytes(len(content)), lambda content: content[:4000]):
        stored(folder)  # writes the entry again, because it is corrupt
        store = stored(folder)
        assert (len(store.pixels) == 0) == large
        before = len(decoded)
        with (entry_of() / "pixels").open("r+b") as file:
            content = change(file.read())
            file.seek(0)
            file.write(content)
            file.truncate()
        assert same(store, whole)
        assert (len(decoded) > before) == large  # an image whose bytes have changed is decoded again
    changed = max(folder.rglob("*.png"), key=lambda file: file.parent.name)  # one of the truncated images
    Image.new("RGB", (100, 64)).save(changed)
    if large:
        with pytest.raises(
            DataError, match=rf"{changed.name}: decodes to different pixels; it has changed since the run began"
        ):
            store.gather(np.arange(4))


def test_an_entry_removed_while_in_use_stays_readable(folder: Path, large: bool, decoded: list[object]) -> None:
    first = stored(folder)
    second = stored(folder)
    before = len(decoded)
    assert cache.clear() > 0
    assert same(first, second)
    assert len(decoded) == before
    assert cache.entries() == []


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int, of: str) -> None:
    """Make a system call fail for paths that contain `of`, and for open files."""
    real = getattr(owner, name)

    def broken(path: object, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, int) or of in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["read_text", "read_bytes", "open", "preadv"])
def test_a_temporarily_unreadable_entry_is_not_removed(
    folder: Path, decoded: list[object], monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    whole = stored(folder)
    files = {file.name: file.read_bytes() for file in entry_of().iterdir()}
    with monkeypatch.context() as patch:
        failing(patch, os if call == "preadv" else Path, call, number, "decoded")
        assert same(stored(folder), whole)
    assert len(decoded) == 8
    assert {file.name: file.read_bytes() for file in entry_of().iterdir()} == files
    assert same(stored(folder), whole)
    assert len(decoded) == 8


def test_a_temporarily_unreadable_entry_is_not_evicted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(folder)
    with monkeypatch.context() as patch:
        failing(patch, Path, "read_text", errno.EMFILE, "decoded")
        cache._evict(0)
    assert [entry.images for entry in cache.entries()] == [4]


# -- shared caches ----------------------------------------------------------------------------------


def test_a_read_only_cache_is_read(folder: Path, decoded: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    stored(folder)
    for name in ("utime", "rename", "mkdir"):
        failing(monkeypatch, os, name, errno.EROFS, "decoded")
    stored(folder)
    assert len(decoded) == 4


def test_a_corrupt_entry_in_a_read_only_cache_stays_and_is_not_used(
    folder: Path, decoded: list[object], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = stored(folder)
    pixels = entry_of() / "pixels"
    pixels.write_bytes(bytes(pixels.stat().st_size))
    failing(monkeypatch, os, "rename", errno.EPERM, "decoded")
    assert same(stored(folder), whole)
    assert len(decoded) == 8
    assert sorted(file.name for file in entry_of().iterdir()) == ["entry.json", "index", "pixels"]
    assert "the entry cannot be removed from here" in " ".join(capfd.readouterr().err.split())
    assert [path for path in cache.root().iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("mask", "of_folder", "of_file"), [(0o077, 0o700, 0o600), (0o002, 0o775, 0o664)])
def test_permissions_of_an_entry_follow_the_umask(folder: Path, mask: int, of_folder: int, of_file: int) -> None:
    before = os.umask(mask)
    try:
        stored(folder)
    finally:
        os.umask(before)
    assert entry_of().stat().st_mode & 0o777 == of_folder
    assert {file.stat().st_mode & 0o777 for file in entry_of().iterdir()} == {of_file}


def test_a_full_disk_only_prevents_caching(folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stored(folder, cache_gb=0)
    failing(monkeypatch, Path, "write_text", errno.ENOSPC, "decoded")
    assert same(stored(folder), whole)
    assert list(place.iterdir()) == []


def test_entries_of_older_versions_are_not_read_and_can_be_cleared(folder: Path, place: Path) -> None:
    old, other = place / ("0a" * 16), place / "somebody's own"
    for path in (old, other, place / ".hidden"):
        path.mkdir(parents=True)
        (path / "pixels").write_bytes(b"123")
        (path / "entry.json").write_text('{"name": "photos, train", "images": 4}')
        os.utime(path, (1e9, 1e9))
    assert [entry.size for entry in cache.entries()] == [3 + 38]
    stored(folder)
    assert len(cache.entries()) == 2
    assert cache.clear() > 41
    assert sorted(path.name for path in place.iterdir()) == [".hidden", "somebody's own"]


# -- keys -----------------------------------------------------------------------------------------


def bitmap(file: Path, places: Iterator[int] | tuple[int, ...] = ()) -> None:
    """Write a bitmap of 60 kB with 255 at these places, and always the same mtime."""
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels.reshape(-1)[list(places)] = 255
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    os.utime(file, (1e9, 1e9))


def named(folder: Path, *, whole: bool = False) -> str | None:
    return cache.fingerprint(open_dataset(str(folder)).splits["train"], "settings", whole=whole)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("ant/1.bmp", "bee/2.bmp"):
        bitmap(tmp_path / "pictures" / name)
    return tmp_path / "pictures"


HEAD, BETWEEN, MIDDLE, TAIL = 59_000, 45_000, 30_000, 300  # a bitmap stores its last row first


@pytest.mark.parametrize("place", [HEAD, BETWEEN, MIDDLE, TAIL])
@pytest.mark.parametrize("change", ["renamed over it", "written into it"])
def test_a_replaced_photo_of_the_same_name_size_and_time_is_detected(pictures: Path, place: int, change: str) -> None:
    before = named(pictures)
    file = pictures / "ant" / "1.bmp"
    size = file.stat().st_size
    if change == "renamed over it":
        bitmap(pictures.parent / "new.bmp", (place,))
        (pictures.parent / "new.bmp").rename(file)
    else:
        bitmap(file, (place,))
    assert (file.stat().st_size, file.stat().st_mtime) == (size, 1e9)
    assert named(pictures) != before


@pytest.mark.parametrize(("place", "whole", "seen"), [
    (HEAD, False, True), (MIDDLE, False, True), (TAIL, False, True), (BETWEEN, False, False), (BETWEEN, True, True),
])  # fmt: skip
def test_without_ctime_the_content_decides(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, place: int, whole: bool, seen: bool
) -> None:
    class Timeless:
        def __init__(self, real: os.stat_result) -> None:
            self.st_mode, self.st_size = real.st_mode, real.st_size
            self.st_mtime_ns, self.st_ctime_ns = real.st_mtime_ns, 0

    real = os.fstat
    monkeypatch.setattr(cache.os, "fstat", lambda handle: Timeless(real(handle)))
    before = named(pictures, whole=whole)
    bitmap(pictures / "ant" / "1.bmp", (place,))
    assert (named(pictures, whole=whole) != before) == seen


def test_a_renamed_folder_has_the_same_key(pictures: Path) -> None:
    before = named(pictures)
    assert named(pictures.rename(pictures.parent / "renamed")) == before


def test_photos_with_a_missing_or_special_file_have_no_key(pictures: Path) -> None:
    rows = open_dataset(str(pictures)).splits["train"]
    (pictures / "ant" / "1.bmp").unlink()
    assert cache.fingerprint(rows, "settings") is None
    os.mkfifo(pictures / "ant" / "1.bmp")
    assert cache.fingerprint(rows, "settings") is None  # and does not wait for a writer


def test_another_decoder_has_another_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = named(folder)
    monkeypatch.setattr(cache, "_CODE", ("decoder",))
    cache._decoder.cache_clear()
    try:
        assert named(folder) != before
    finally:
        cache._decoder.cache_clear()


def test_a_replaced_photo_is_not_mistaken_for_the_cached_one(tmp_path: Path) -> None:
    """By training, by scoring, and on resume, which is refused, although name, size and mtime are the same."""
    from vitft import TrainConfig, evaluate, train
    from vitft.training.trainer import resume

    def paint(colors: tuple[str, str]) -> None:
        for name, color in zip(("ant", "bee"), colors, strict=True):
            for number in range(8):
                file = tmp_path / "data" / name / f"{number}.bmp"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (60, 50), color).save(file)
                os.utime(file, (1e9, 1e9))

    paint(("black", "white"))
    config = TrainConfig(
        dataset=str(tmp_path / "data"), model="vit-micro", from_scratch=True, image_size=16, patch_size=4, width=16,
        layers=1, heads=1, max_steps=2, batch_size=4, val_fraction=0.5, device="cpu", precision="fp32", lr=1e-2,
    )  # fmt: skip
    run = train(config, output=tmp_path / "run").run
    assert {entry.name for entry in cache.entries()} == {"data, train", "data, validation"}
    first = evaluate(run, split="validation")
    paint(("white", "black"))
    assert evaluate(run, split="validation").accuracy == pytest.approx(1 - first.accuracy)
    with pytest.raises(DataError, match="the same names, but other pixels"):
        resume(run)


# -- cleaning up --------------------------------------------------------------------------------------


def test_leftovers_of_a_killed_run_are_removed_but_not_entries_being_written(folder: Path, place: Path) -> None:
    key = "0" * 32
    killed, writing, young, filling = (f".{key}.{state}" for state in ("killed", "writing", "young", "filling"))
    for name in (killed, writing, young, filling, ".own"):
        (place / name).mkdir(parents=True)
        (place / name / "pixels").write_bytes(b"1")
        if name != filling:
            os.utime(place / name / "pixels", (1e9, 1e9))
        if name != young:
            os.utime(place / name, (1e9, 1e9))
    with lock_folder(place / writing) as alone:
        assert alone
        stored(folder)
        assert {path.name for path in place.glob(".*")} == {writing, young, filling, ".own"}


def test_an_unwritable_cache_folder_only_prevents_caching(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITFT_CACHE", str(tmp_path / "file"))
    assert len(stored(folder)) == 4


def test_the_cache_command_lists_and_clears(folder: Path) -> None:
    run = CliRunner()
    assert run.invoke(app, ["data", "cache", "ls"]).stdout.startswith("the cache is empty")
    stored(folder)
    listed = run.invoke(app, ["data", "cache", "ls"]).stdout
    assert "photos" in listed
    assert "vitft data cache clear removes it" in " ".join(listed.split())
    (entry,) = json.loads(run.invoke(app, ["data", "cache", "ls", "--json"]).stdout)
    assert (entry["name"], entry["images"]) == ("photos", 4)
    assert entry["bytes"] > 4 * 32 * 32 * 3
    killed = cache.root() / f".{32 * 'a'}.12345678"  # an entry of a run that was killed while it wrote it
    killed.mkdir()
    (killed / "pixels").write_bytes(b"")
    for path in (killed / "pixels", killed):
        os.utime(path, (0, 0))
    assert run.invoke(app, ["data", "cache", "clear"]).stdout.startswith("removed ")
    assert not killed.exists()
    assert cache.entries() == []


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["in memory", "in a file", "on demand"])
def test_thirty_epochs_take_no_more_memory_than_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    folder = photos(tmp_path / "photos", [(300 + i, 240) for i in range(60)])
    if storage != "in memory":
        monkeypatch.setattr("vitft.data.stores.store.IN_MEMORY", 0)
    rows, preprocess = open_dataset(str(folder)).splits["train"], Preprocess(64, 64)
    for _ in range(2):
        store, _ = decode_all(
            rows, preprocess, crops=True, max_pixels=10**6, skip_bad=False, training=True,
            cache_gb=0 if storage == "on demand" else 1,
        )  # fmt: skip
    assert len(store.pixels) == (store.size if storage == "in memory" else 0)
    loader = TrainLoader(store, np.zeros(60, np.int64), preprocess, augmentation=Augmentation("crop"), classes=10,
                         batch_size=16, device=torch.device("cpu"))  # fmt: skip
    resident = []
    for epoch in range(30):
        for step in range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch):
            loader.batch(step)
        resident.append(psutil.Process().memory_info().rss)
    megabytes = [f"{bytes_ / 1e6:.1f}" for bytes_ in (resident[2], resident[-1], store.size)]
    print(f"{storage}: {megabytes} MB after 3 and 30 epochs, and stored")  # noqa: T201
    assert resident[-1] - resident[2] < 0.5 * store.size  # keeping each epoch's images would take 27 times as much
