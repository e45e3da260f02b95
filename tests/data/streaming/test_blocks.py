"""Blocks on this disk: fetched once, bounded, verified, shared by processes."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pytest

from vitft.data.streaming import blocks

SIZE = 1000  # bytes of a block's only image; its file has some more


class Giver:
    """Gives the block of a name, and remembers of which ones it was asked."""

    def __init__(self, size: int = SIZE) -> None:
        self.size, self.asked = size, list[str]()

    def get(self, name: str, limit: int = 10**9) -> bytes:
        def fetch() -> pa.LargeBinaryArray:
            self.asked.append(name)
            return pa.array([self.content(name)], pa.large_binary())

        blocks._mapped.clear()  # as in another process
        blocks._allowed.left = 0
        return bytes(blocks.images(name, limit, fetch)[0].as_buffer())

    def content(self, name: str) -> bytes:
        return (name.encode() * self.size)[: self.size]


@pytest.fixture
def giver(fetched: Path) -> "Giver":
    return Giver()


def ages(fetched: Path, seconds: float) -> None:
    """Let what is there have been opened so long ago."""
    for file in fetched.glob("*.*"):
        os.utime(file, (time.time() - seconds,) * 2)


def test_a_block_is_fetched_once(fetched: Path, giver: Giver) -> None:
    for _ in range(3):
        assert giver.get("a") == giver.content("a")
    assert giver.get("b") == giver.content("b")
    assert giver.asked == ["a", "b"]
    size = blocks.kept().size
    assert blocks.kept().blocks == 2
    assert blocks.clear() == size > 2 * SIZE
    assert blocks.kept() == (0, 0, 0)
    assert giver.get("a") == giver.content("a")
    assert giver.asked == ["a", "b", "a"]


def test_blocks_keep_to_their_limit(fetched: Path, giver: Giver) -> None:
    """Three quarters are for those that stay: which, never changes, so that the next epoch finds them."""
    giver.get("0", limit=10**9)
    each = blocks.kept().size
    limit = 8 * each + each // 2
    for number in range(40):
        giver.get(str(number), limit)
        assert blocks.kept().size <= limit
        time.sleep(0.015)  # so that the times of files differ: some systems count them in hundredths of a second
    giver.asked.clear()
    for number in range(40):
        giver.get(str(number), limit)
    assert giver.asked == [str(number) for number in range(6, 40)]
    giver.asked.clear()
    giver.get("39", limit)  # has just passed through
    assert giver.asked == []


def test_blocks_are_not_listed_for_each_that_is_written(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, listing = [], blocks._files
    monkeypatch.setattr(blocks, "_files", lambda: listed.append(1) or listing())
    monkeypatch.setattr(blocks, "_allowed", type(blocks._allowed)())
    limit, most = 1_000_000, 0
    for number in range(1500):
        blocks.images(str(number), limit, lambda: pa.array([bytes(1000)], pa.large_binary()))
        if number % 50 == 0:
            most = max(most, sum(file.stat().st_size for file in fetched.glob("*.*")))
    assert 900_000 < most <= limit
    assert len(listed) < 400


def test_blocks_of_another_user_are_used(fetched: Path, giver: Giver, monkeypatch: pytest.MonkeyPatch) -> None:
    giver.get("a")

    def denied(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", denied)
    for _ in range(2):
        assert giver.get("a") == giver.content("a")
    assert giver.asked == ["a"]


def test_blocks_of_data_that_nobody_uses_any_more_make_room(fetched: Path, giver: Giver) -> None:
    giver.get("old", limit=10**9)
    limit = 4 * blocks.kept().size
    for number in range(2):
        giver.get(f"old {number}", limit)
    ages(fetched, 86400 + 60)
    for number in range(3):
        giver.get(f"new {number}", limit)
    assert {file.suffix for file in fetched.glob("*.*")} == {".kept"}
    giver.asked.clear()
    for number in range(3):
        giver.get(f"new {number}", limit)
    assert giver.asked == []


@pytest.mark.parametrize("where", [0.02, 0.5, 0.98])
def test_a_block_whose_file_has_changed_is_fetched_again(fetched: Path, giver: Giver, where: float) -> None:
    giver.get("a")
    (file,) = fetched.glob("*.kept")
    raw = bytearray(file.read_bytes())
    raw[int(where * len(raw))] ^= 1
    file.write_bytes(raw)
    assert giver.get("a") == giver.content("a")
    file.write_bytes(b"")
    assert giver.get("a") == giver.content("a")
    file.write_bytes(bytes(raw[: len(raw) // 2]))
    assert giver.get("a") == giver.content("a")


def test_a_changed_length_of_an_image_is_noticed(fetched: Path) -> None:
    fetch = lambda: pa.array([b"a" * 1000, b"b" * 2000, b"c" * 500], pa.large_binary())  # noqa: E731
    blocks.images("a", 10**9, fetch)
    (file,) = fetched.glob("*.kept")
    raw = file.read_bytes()
    assert raw.count((3000).to_bytes(8, "little")) == 1
    file.write_bytes(raw.replace((3000).to_bytes(8, "little"), (2900).to_bytes(8, "little")))
    blocks._mapped.clear()
    assert blocks.images("a", 10**9, fetch)[1].as_py() == b"b" * 2000


def test_without_a_disk_blocks_are_in_memory(fetched: Path, giver: Giver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert giver.get("a", limit=0) == giver.content("a")
    assert not fetched.exists()
    fetched.parent.mkdir(exist_ok=True)
    fetched.write_text("a file, where the folder would be")
    assert giver.get("b") == giver.content("b")
    fetched.unlink()

    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(pa.ipc, "new_file", full)
    assert giver.get("c") == giver.content("c")
    assert blocks.kept().blocks == 0


def test_a_group_may_share_blocks(fetched: Path, giver: Giver) -> None:
    before = os.umask(0o002)
    try:
        giver.get("a")
    finally:
        os.umask(before)
    assert all(stat.S_IMODE(file.stat().st_mode) & 0o060 == 0o060 for file in fetched.glob("*.kept"))


def test_one_thread_fetches_for_all(fetched: Path) -> None:
    asked = []

    def fetch() -> pa.LargeBinaryArray:
        asked.append(1)
        time.sleep(0.05)
        return pa.array([b"image"], pa.large_binary())

    found: list[bytes] = []
    work = lambda: found.append(blocks.images("a", 10**9, fetch)[0].as_py())  # noqa: E731
    threads = [Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"image"] * 8
    assert len(asked) == 1


SCRIPT = """
import sys, time, pyarrow as pa
from pathlib import Path
from vitft.data.streaming import blocks

def fetch():
    with open(sys.argv[1], "a") as file:
        file.write("x")
    time.sleep(0.2)
    return pa.array([b"image"], pa.large_binary())

assert blocks.images("a", 10**9, fetch)[0].as_py() == b"image"
"""


def test_one_process_fetches_for_all(fetched: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    run = [sys.executable, "-c", SCRIPT, str(asked)]
    processes = [subprocess.Popen(run) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert asked.read_text() == "x"


def test_what_a_killed_process_was_writing_is_removed_a_day_later(fetched: Path, giver: Giver) -> None:
    giver.get("a")
    unfinished = fetched / ".0123.kept.17.42"
    unfinished.write_bytes(b"half a block")
    giver.get("b")
    assert unfinished.exists()  # it may be of a process that still writes
    os.utime(unfinished, (time.time() - 86400 - 60,) * 2)
    giver.get("c")
    assert not unfinished.exists()
    unfinished.write_bytes(b"half a block")
    os.utime(unfinished, (time.time() - 60,) * 2)
    blocks.clear()
    assert not unfinished.exists()


def test_a_killed_process_leaves_nothing_that_is_taken_for_a_block(fetched: Path, tmp_path: Path) -> None:
    script = SCRIPT.replace("return pa", "import os; os.kill(os.getpid(), 9)\n    return pa")
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "asked")], check=False)
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "asked")], check=True)
    assert (tmp_path / "asked").read_text() == "xx"
