"""Decoded photos on disk: found again when nothing changed, bounded, safe with two runs, removable."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.test_store import photos
from vitft.cli import app
from vitft.data import cache
from vitft.data.augment import Preprocess
from vitft.data.images import decode
from vitft.data.sources import open_source
from vitft.data.store import Store, decode_all
from vitft.files import held


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photos(tmp_path / "photos", [(100, 64), (64, 100), (70, 90), (80, 50)])


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was decoded, image by image."""
    seen: list[object] = []

    def spy(source: object, *others: object) -> object:
        seen.append(source)
        return decode(source, *others)  # type: ignore[arg-type]

    monkeypatch.setattr("vitft.data.store.decode", spy)
    return seen


def stored(folder: Path, size: int = 32, *, crops: bool = False, cache_gb: float = 1.0) -> Store:
    rows = open_source(str(folder)).splits["train"]
    how = Preprocess(size, size)
    return decode_all(rows, how, crops=crops, max_pixels=10**6, skip_bad=True, cache_gb=cache_gb, name="photos")[0]


def same(one: Store, other: Store) -> bool:
    index = np.arange(len(one))
    pairs = zip(one.gather(index), other.gather(index), strict=True)
    return one.digest == other.digest and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("crops", [False, True])
def test_photos_are_decoded_once_for_all_runs(folder: Path, decoded: list[object], crops: bool) -> None:
    first = stored(folder, crops=crops)
    assert len(decoded) == 4
    second = stored(folder, crops=crops)
    assert len(decoded) == 4
    assert same(first, second)


def test_whatever_changes_the_pixels_changes_the_fingerprint(folder: Path, decoded: list[object]) -> None:
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


def test_images_as_bytes_are_known_by_their_bytes(folder: Path) -> None:
    rows = open_source(str(folder)).splits["train"]

    def named(cells: list[bytes]) -> str:
        import datasets

        fake = datasets.Dataset.from_dict({"image": [{"bytes": cell, "path": None} for cell in cells]})
        return cache.fingerprint(fake, "how")

    contents = [Path(cell["path"]).read_bytes() for cell in rows["image"]]
    assert named(contents) == named(contents)
    assert named(contents) != named(contents[::-1])
    assert named([contents[0], contents[1]]) != named([contents[0] + contents[1], b""])


def test_small_images_are_not_kept(tmp_path: Path, place: Path) -> None:
    stored(photos(tmp_path / "small", [(20, 16)] * 4))
    assert cache.entries() == []


def test_without_a_bound_nothing_is_kept(folder: Path, place: Path) -> None:
    stored(folder, cache_gb=0)
    assert not place.exists()


def test_a_split_with_a_bad_image_is_not_kept(folder: Path) -> None:
    (folder / "train" / "cat" / "zzz.png").write_bytes(b"no image")
    stored(folder)
    assert cache.entries() == []  # it may be mended, and has to be named again until then


def test_the_bound_drops_what_was_not_used_for_longest(folder: Path) -> None:
    stored(folder, 32)
    stored(folder, 31)
    for age, entry in enumerate(sorted(cache.entries(), key=lambda entry: entry.size), 1):
        os.utime(entry.folder, (1e9 + age, 1e9 + age))  # that of 31 was used before that of 32
    stored(folder, 32)  # used again now
    both = sum(entry.size for entry in cache.entries())
    stored(folder, 30, cache_gb=(both + 100) / 1e9)
    sizes = sorted(int(np.load(entry.folder / "index.npz")["shapes"][0, 0]) for entry in cache.entries())
    assert sizes == [30, 32]
    stored(folder, 29, cache_gb=1e-9)
    assert sorted(entry.images for entry in cache.entries()) == [4, 4]  # it would not fit: nothing is dropped for it


def test_two_runs_at_once_keep_one_whole_entry(folder: Path, place: Path) -> None:
    found: list[Store] = []
    runs = [threading.Thread(target=lambda: found.append(stored(folder))) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(found) == 4
    assert all(same(found[0], other) for other in found)
    assert [entry.images for entry in cache.entries()] == [4]
    assert [one.name for one in place.iterdir() if one.name.startswith(".")] == []
    assert same(stored(folder), found[0])


def test_what_is_removed_while_it_is_used_stays_with_the_run(folder: Path) -> None:
    first = stored(folder, cache_gb=0)
    stored(folder)
    mapped = stored(folder)
    assert cache.clear() > 0
    assert same(first, mapped)
    assert cache.entries() == []


def test_a_mapped_entry_cannot_be_written_through(folder: Path) -> None:
    stored(folder)
    stored(folder).pixels.zero_()
    assert same(stored(folder), stored(folder, cache_gb=0))


@pytest.mark.parametrize("fault", ["short", "missing", "torn"])
def test_a_damaged_entry_is_as_none(folder: Path, decoded: list[object], fault: str) -> None:
    stored(folder)
    entry = cache.entries()[0].folder
    if fault == "short":
        (entry / "pixels").write_bytes(b"123")
    elif fault == "missing":
        (entry / "pixels").unlink()
    else:
        (entry / "index.npz").write_bytes((entry / "index.npz").read_bytes()[:100])
    again = stored(folder)
    assert len(decoded) == 8
    assert same(again, stored(folder, cache_gb=0))
    stored(folder)
    assert len(decoded) == 12  # a whole one has taken its place: only the one without a cache decoded again


def test_what_a_killed_run_left_is_removed_and_what_is_being_written_is_not(folder: Path, place: Path) -> None:
    for name in (".killed", ".writing", ".young", ".filling"):
        (place / name).mkdir(parents=True)
        (place / name / "pixels").write_bytes(b"1")
        if name != ".filling":
            os.utime(place / name / "pixels", (1e9, 1e9))
        if name != ".young":
            os.utime(place / name, (1e9, 1e9))
    with held(place / ".writing") as alone:
        assert alone
        stored(folder)
        assert {path.name for path in place.glob(".*")} == {".writing", ".young", ".filling"}


def test_a_folder_that_cannot_be_written_keeps_nothing_and_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITFT_CACHE", str(tmp_path / "file"))
    assert len(stored(folder)) == 4


def test_the_command_lists_and_removes(folder: Path) -> None:
    run = CliRunner()
    assert run.invoke(app, ["data", "cache", "ls"]).stdout.startswith("nothing is kept")
    stored(folder)
    listed = run.invoke(app, ["data", "cache", "ls"]).stdout
    assert "photos" in listed
    assert "vitft data cache clear removes it" in " ".join(listed.split())
    (entry,) = json.loads(run.invoke(app, ["data", "cache", "ls", "--json"]).stdout)
    assert (entry["name"], entry["images"]) == ("photos", 4)
    assert entry["bytes"] > 4 * 32 * 32 * 3
    assert run.invoke(app, ["data", "cache", "clear"]).stdout.startswith("removed ")
    assert cache.entries() == []
