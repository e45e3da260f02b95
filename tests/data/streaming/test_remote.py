"""Files behind URLs: how they are listed and read, and what happens when that fails."""

import gc
from pathlib import Path
from threading import Event
from threading import enumerate as enumerate_threads

import fsspec
import pytest
from huggingface_hub import HfFileSystem

from tests.conftest import BUCKET
from tests.web import FaultyStore, FileServer
from vitft.data.streaming import remote
from vitft.data.streaming.remote import RemoteFile, in_requests, list_files, read_range
from vitft.errors import DataError, UsageError
from vitft.hardware.pools import map_in_processes
from vitft.io.paths import is_url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five small files, two of them not parquet."""
    (tmp_path / "set/inner").mkdir(parents=True)
    for number, name in enumerate(
        ("train-00000.parquet", "train-00001.parquet", "inner/test.parquet", "a.txt", "b.csv")
    ):
        (tmp_path / "set" / name).write_bytes(bytes(range(100 + number)))
    return tmp_path


def names(files: list[RemoteFile]) -> list[str]:
    return [file.url.rsplit("/set/", 1)[1] for file in files]


ALL = ["inner/test.parquet", "train-00000.parquet", "train-00001.parquet"]
TRAIN = ALL[1:]


def test_a_path_is_no_url() -> None:
    assert all(map(is_url, ("https://a/b", "s3://bucket/x", "hf://datasets/a/b", "file:///a")))
    assert not any(map(is_url, ("a/b", "/a/b", "./a", "cifar10", "C:\\a", "C:/a", "owner/name:config", "https://", "")))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("/set", ALL),
        ("/set/", ALL),
        ("/set/train-00000.parquet", TRAIN[:1]),
        ("/set/train-{00000..00001}.parquet", TRAIN),
        ("/set/train-0000{1,0}.parquet", TRAIN),
        ("/set/train-*.parquet", TRAIN),
        ("/set/**/*.parquet", ALL),
    ],
)
@pytest.mark.parametrize("kind", ["https", "file", "memory"])
def test_forms_of_a_url(folder: Path, form: str, expected: list[str], kind: str) -> None:
    if kind == "https":
        with FileServer(folder) as server:
            found = list_files(server.url + form, ".parquet")
    elif kind == "file":
        found = list_files(f"file://{folder}{form}", ".parquet")
    else:
        fsspec.filesystem("memory").put(str(folder / "set"), f"{folder}/set", recursive=True)
        found = list_files(f"memory://{folder}{form}", ".parquet")
    assert names(found) == expected
    sizes = {"train-00000.parquet": 100, "train-00001.parquet": 101, "inner/test.parquet": 102}
    assert [file.size for file in found] == [sizes[name] for name in names(found)]


def test_a_list_of_checksums_stands_for_an_index(folder: Path) -> None:
    sums = "".join(f"{'0' * 64}  {name}\n" for name in [*TRAIN, "b.csv", "../outside.parquet"])
    (folder / "set/SHA256SUMS").write_text(sums)
    with FileServer(folder) as server:
        server.lists = False
        assert names(list_files(f"{server.url}/set", ".parquet")) == TRAIN


def test_a_version_changes_with_the_content(folder: Path) -> None:
    with FileServer(folder) as server:
        url = f"{server.url}/set/train-00000.parquet"
        (before,) = list_files(url, ".parquet")
        (same,) = list_files(url, ".parquet")
        (folder / "set/train-00000.parquet").write_bytes(bytes(100))
        (after,) = list_files(url, ".parquet")
    assert before == same
    assert before.size == after.size
    assert before.version != after.version


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 100), (17, 53), (99, 100)])
def test_a_range(folder: Path, start: int, end: int) -> None:
    with FileServer(folder) as server:
        assert read_range(f"{server.url}/set/train-00000.parquet", start, end) == bytes(range(100))[start:end]
    assert server.fetched()[-1][2:] == (start, end - 1)


@pytest.mark.parametrize("fault", [503, 500, 429, "cut", "stall"])
def test_what_fails_for_a_moment_is_tried_again(
    folder: Path, fault: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "_SILENCE_S", 1)
    with FileServer(folder) as server:
        server.fault = lambda request, number: fault if number % 3 else None
        server.requests.append(remote)  # type: ignore[arg-type]  # so that the first one fails
        assert read_range(f"{server.url}/set/train-00000.parquet", 10, 90) == bytes(range(10, 90))
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("fault", "attempts", "why"),
    [
        (404, 1, "there is no such file or folder"),
        ("whole", 1, "the server sends whole files when it is asked for a part"),
        (503, 7, "503"),
        ("cut", 7, ""),
        ("stall", 7, "the server is silent"),
    ],
)
def test_what_fails_for_good(
    folder: Path, fault: int | str, attempts: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "_SILENCE_S", 0.2)
    with FileServer(folder) as server:
        server.fault = lambda request, number: fault
        with pytest.raises(OSError, match="127") as caught:
            read_range(f"{server.url}/set/train-00000.parquet", 10, 90)
    assert why in remote.reason(caught.value)
    assert len(server.requests) == attempts


@pytest.mark.parametrize(
    ("fault", "why"),
    [(503, "Please reduce your request rate."), (500, "We encountered an internal error."), ("cut", "not completed"),
     ("stall", "the server is silent")],
)  # fmt: skip
def test_a_bucket_is_asked_as_often_as_any_server(
    bucket: FaultyStore, fault: int | str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs and botocore have their own ways to try again, which would multiply."""
    monkeypatch.setattr(remote, "_SILENCE_S", 0.5)
    monkeypatch.setattr(remote, "_ATTEMPTS", 3)
    (file,) = list_files(f"{BUCKET}/test-*.parquet", ".parquet")
    before = len(bucket.requests)
    bucket.fault = lambda request, number: fault
    with pytest.raises(OSError, match="s3://photos/sets/digits/test") as caught:
        read_range(file.url, 0, 1000)
    assert why in remote.reason(caught.value)
    assert len(bucket.requests) == before + 3


def test_what_comes_slowly_is_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may take longer than a server may be silent."""
    monkeypatch.setattr(remote, "_SILENCE_S", 1)
    monkeypatch.setattr(remote, "_ATTEMPTS", 1)
    with FileServer(folder) as server:
        server.fault = lambda request, number: "slow"
        assert read_range(f"{server.url}/set/train-00000.parquet", 0, 100) == bytes(range(100))


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAIT_S", 0.001)
    with FileServer(Path()) as server:
        gone = server.url
    with pytest.raises(DataError, match=r"^http://127\.0\.0\.1:\d+/set: .*[Cc]onnect"):
        list_files(f"{gone}/set", ".parquet")


@pytest.mark.parametrize(("form", "why"), [("/nothing", "no such file"), ("/set/train-7.parquet", "no such file")])
def test_nothing_at_a_url(folder: Path, form: str, why: str) -> None:
    with FileServer(folder) as server, pytest.raises(DataError, match=why):
        list_files(server.url + form, ".parquet")
    with pytest.raises(DataError, match="no such file"):
        list_files(f"file://{folder}{form}", ".parquet")


def test_an_unknown_kind_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^what://is/this: what:// is not supported; download the files first\.$"):
        list_files("what://is/this", ".parquet")

    def missing(*args: object, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UsageError, match=r"pip install 'vitft\[s3\]'"):
        list_files("s3://bucket/data", ".parquet")


def test_a_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAIT_S", 0.001)
    with pytest.raises(DataError) as caught:
        list_files("http://me:hunter2@127.0.0.1:9/set?token=hunter2", ".parquet")
    assert "hunter2" not in str(caught.value)


def test_a_forked_process_does_not_make_its_parent_deaf(folder: Path) -> None:
    """Were its filesystem collected there, the connections of both would close, and the parent would wait in vain."""
    with FileServer(folder) as server:
        url = f"{server.url}/set/train-00000.parquet"
        read_range(url, 0, 10)

        def work(start: int) -> bytes:
            data = read_range(url, start, 50)
            gc.collect()
            return data

        assert list(map_in_processes(work, [1, 2], 1)) == [bytes(range(start, 50)) for start in (1, 2)]
        before = len(server.requests)
        assert read_range(url, 3, 9) == bytes(range(3, 9))
        assert len(server.requests) == before + 1  # the answer to the first one was heard


def test_what_is_abandoned_is_not_waited_for() -> None:
    never = Event()
    requests = in_requests(lambda item: item or never.wait(), [1, *[0] * 100])
    assert next(requests) == 1
    requests.close()
    waiting = [thread for thread in enumerate_threads() if thread.name == "vitft-request"]
    assert all(thread.daemon for thread in waiting)
    never.set()


def test_requests_come_in_order_and_raise_what_the_work_raises() -> None:
    assert list(in_requests(str, range(50))) == [str(number) for number in range(50)]
    assert list(in_requests(str, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(in_requests(lambda number: 1 // number, [1, 0, 1]))


def test_the_hub_is_not_read_ahead() -> None:
    assert remote._unbuffered(HfFileSystem()) == {"cache_type": "none"}
    assert remote._unbuffered(fsspec.filesystem("http")) == {}
