"""Atomic writes: the order of syncs and renames, and folder locks."""

import os
from pathlib import Path
from typing import Any

import pytest

from vitft.io import atomic


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The names of files synced and renamed from now on, in order."""
    recorded: list[tuple[str, str]] = []
    sync, rename, replace = os.fsync, Path.rename, Path.replace

    def synced(handle: int) -> None:
        recorded.append(("sync", Path(f"/proc/self/fd/{handle}").readlink().name))
        sync(handle)

    def renamed(self: Path, target: Path) -> Any:
        recorded.append(("rename", f"{self.name} > {target.name}"))
        return rename(self, target)

    def replaced(self: Path, target: Path) -> Any:
        recorded.append(("rename", f"{self.name} > {target.name}"))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", replaced)
    return recorded


def test_a_file_is_synced_before_it_is_renamed(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    file = tmp_path / "a.txt"
    file.write_text("before")
    atomic.write_text(file, "é\r\nü\n")
    assert events == [("sync", ".a.txt.vitft-new"), ("rename", ".a.txt.vitft-new > a.txt"), ("sync", tmp_path.name)]
    assert file.read_bytes() == "é\r\nü\n".encode()  # UTF-8 and unchanged line ends, on every platform
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "a.txt", tmp_path / "link"
    target.write_text("before")
    link.symlink_to("elsewhere/a.txt")
    for text in ("after", "of a link to nothing"):
        atomic.write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
        target.unlink()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    kinds = {"folder": IsADirectoryError, "gone/a.txt": FileNotFoundError, "file/a": NotADirectoryError}
    for name, kind in kinds.items():
        with pytest.raises(kind) as caught:
            atomic.write_text(tmp_path / name, "text")
        assert str(caught.value).endswith(f": '{tmp_path / name}'")
    with pytest.raises(FileNotFoundError) as missing, atomic.new_file(tmp_path / "a.txt"):
        pass  # whatever should have written it did not
    assert str(missing.value).endswith(f": '{tmp_path / 'a.txt'}'")
    for name, inside in (("gone/new", ""), ("new", "gone/a.txt")):
        with pytest.raises(FileNotFoundError) as caught, atomic.new_folder(tmp_path / name) as new:
            (new / inside).write_text("text")
        assert str(caught.value).endswith(f": '{tmp_path / name / inside}'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_pipe_or_a_device_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    handle = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    atomic.write_text(pipe, "text")
    assert os.read(handle, 10) == b"text"
    os.close(handle)
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_the_json_format_does_not_change() -> None:
    """Checksums of existing checkpoints depend on it."""
    assert atomic.json_text({"ä": [1, 0.5], "b": {}}) == '{\n  "ä": [\n    1,\n    0.5\n  ],\n  "b": {}\n}\n'


def test_a_folder_is_synced_before_it_is_renamed(tmp_path: Path, events: list[tuple[str, str]]) -> None:
    folder = tmp_path / "folder"
    for content in ("first", "second"):
        events.clear()
        with atomic.new_folder(folder) as new:
            (new / "inner").mkdir()
            (new / "inner" / "b").write_text(content)
            (new / "a").write_text(content)
    assert events == [
        ("sync", "a"), ("sync", "inner"), ("sync", "b"), ("sync", ".folder.vitft-new"),
        ("rename", "folder > .folder.vitft-old"), ("rename", ".folder.vitft-new > folder"), ("sync", tmp_path.name),
    ]  # fmt: skip
    assert (folder / "inner" / "b").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_locked_once_and_released_afterwards(tmp_path: Path) -> None:
    with atomic.lock_folder(tmp_path) as mine:
        assert mine
        with atomic.lock_folder(tmp_path) as another:
            assert not another
    with atomic.lock_folder(tmp_path) as again:
        assert again
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("refused", ["open", "flock"])
def test_a_folder_that_cannot_be_locked_counts_as_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def refuse(*given: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.open" if refused == "open" else "fcntl.flock", refuse)
    with atomic.lock_folder(tmp_path) as mine:
        assert mine is True


def test_removing_a_folder_also_removes_the_leftovers_of_an_earlier_attempt(tmp_path: Path) -> None:
    for name in ("step", ".step.vitft-gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").touch()
    atomic.remove_folder(tmp_path / "step")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_set_aside_before_a_kill_is_restored_when_the_next_write_fails(tmp_path: Path) -> None:
    old = tmp_path / ".folder.vitft-old"
    old.mkdir()
    (old / "a").touch()

    def fail() -> None:
        with atomic.new_folder(tmp_path / "folder"):
            assert (tmp_path / "folder" / "a").is_file()  # before the next write can fail
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "a").is_file()
    old.mkdir()  # next to a complete folder, the leftover is not restored
    with atomic.new_folder(tmp_path / "folder") as new:
        (new / "b").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "b"]
