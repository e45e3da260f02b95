"""Files that are whole or absent: in what order they are written, and who holds a folder."""

import os
from pathlib import Path
from typing import Any

import pytest

from vitft.io import atomic


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is synced and renamed from now on, in order, by name."""
    events: list[tuple[str, str]] = []
    sync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(handle: int) -> None:
        events.append(("sync", Path(f"/proc/self/fd/{handle}").readlink().name))
        sync(handle)

    def renamed(self: Path, target: Path) -> Any:
        events.append(("rename", f"{self.name} > {target.name}"))
        return rename(self, target)

    def replaced(self: Path, target: Path) -> Any:
        events.append(("rename", f"{self.name} > {target.name}"))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", replaced)
    return events


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, done: list[tuple[str, str]]) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    atomic.write_text(file, "é\r\nü\n")
    assert done == [("sync", ".a.txt.vitft-new"), ("rename", ".a.txt.vitft-new > a.txt"), ("sync", tmp_path.name)]
    assert file.read_bytes() == "é\r\nü\n".encode()  # in UTF-8 and with the lines' own ends, wherever it is written
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_json_is_written_as_it_ever_was() -> None:
    """By this a checkpoint of an earlier version is proved."""
    assert atomic.json_text({"ä": [1, 0.5], "b": {}}) == '{\n  "ä": [\n    1,\n    0.5\n  ],\n  "b": {}\n}\n'


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, done: list[tuple[str, str]]) -> None:
    folder = tmp_path / "folder"
    for content in ("first", "second"):
        done.clear()
        with atomic.new_folder(folder) as new:
            (new / "inner").mkdir()
            (new / "inner" / "b").write_text(content)
            (new / "a").write_text(content)
    assert done == [
        ("sync", "a"), ("sync", "inner"), ("sync", "b"), ("sync", ".folder.vitft-new"),
        ("rename", "folder > .folder.vitft-old"), ("rename", ".folder.vitft-new > folder"), ("sync", tmp_path.name),
    ]  # fmt: skip
    assert (folder / "inner" / "b").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_held_by_one_and_free_again_afterwards(tmp_path: Path) -> None:
    with atomic.held(tmp_path) as mine:
        assert mine
        with atomic.held(tmp_path) as another:
            assert not another
    with atomic.held(tmp_path) as again:
        assert again
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("refused", ["open", "flock"])
def test_a_folder_that_cannot_be_held_is_free_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def refuse(*given: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.open" if refused == "open" else "fcntl.flock", refuse)
    with atomic.held(tmp_path) as mine:
        assert mine is True


def test_removing_a_folder_removes_what_an_earlier_try_left(tmp_path: Path) -> None:
    for name in ("step", ".step.vitft-gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    atomic.remove_folder(tmp_path / "step")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_a_kill_left_under_its_old_name_is_there_when_its_successor_fails(tmp_path: Path) -> None:
    old = tmp_path / ".folder.vitft-old"
    old.mkdir()
    (old / "a").touch()

    def fail() -> None:
        with atomic.new_folder(tmp_path / "folder"):
            assert (tmp_path / "folder" / "a").is_file()  # before anything can go wrong again
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "a").is_file()
    old.mkdir()  # and what is left beside a whole one is not taken for it
    with atomic.new_folder(tmp_path / "folder") as new:
        (new / "b").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "b"]
