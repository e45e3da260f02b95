"""Work in threads and forked processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from vitft.data.augment import Preprocess
from vitft.data.decoder import BadImage
from vitft.data.stores import store
from vitft.data.stores.store import decode_all
from vitft.errors import DataError, TrainingError
from vitft.hardware import pools
from vitft.hardware.device import cpus
from vitft.hardware.pools import map_in_processes, processes
from vitft.io.signals import StopSignals

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


def test_results_come_in_order_from_other_processes() -> None:
    results = list(map_in_processes(lambda n: (n, os.getpid()), range(20), 2))
    assert [n for n, _ in results] == list(range(20))
    assert len({pid for _, pid in results}) == 2
    assert os.getpid() not in {pid for _, pid in results}


def test_the_global_generator_is_untouched() -> None:
    before = torch.get_rng_state()
    assert list(map_in_processes(abs, [-1, 2], 2)) == [1, 2]
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_arrives_as_it_was_raised() -> None:
    def work(n: int) -> int:
        if n == 3:
            raise BadImage("is empty (zero bytes)")
        return n

    results = map_in_processes(work, range(6), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(BadImage, match=r"^is empty \(zero bytes\)$"):
        next(results)


def test_a_killed_process_is_reported_in_one_line() -> None:
    def work(n: int) -> int:
        if n == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return n

    with pytest.raises(TrainingError, match="was killed") as raised:
        list(map_in_processes(work, range(4), 2))
    assert "\n" not in str(raised.value)


def test_a_signal_to_all_processes_of_a_job_leaves_them_to_the_one_that_reads() -> None:
    """SLURM stops a job so; the run then saves its last step."""
    before = set(psutil.Process().children())
    with StopSignals() as signals:
        results = map_in_processes(abs, range(1000), 2)
        first = [next(results), next(results)]  # one of each process
        for process in {*psutil.Process().children(), psutil.Process()} - before:
            process.send_signal(signal.SIGTERM)
        assert [*first, *results] == list(range(1000))
        assert signals.received() == signal.SIGTERM


def test_processes_end_with_the_reader() -> None:
    before = {child.pid for child in psutil.Process().children()}
    results = map_in_processes(abs, range(sys.maxsize), 2)
    assert next(results) == 0
    started = [child for child in psutil.Process().children() if child.pid not in before]
    assert len(started) >= 2
    del results
    assert not psutil.wait_procs(started, timeout=60)[1]


def test_a_process_ends_if_its_program_was_killed_before_it_began() -> None:
    begin = "from vitft.hardware.pools import _begin_worker; _begin_worker(-1, 0)"  # not who started it
    assert subprocess.run([sys.executable, "-c", begin]).returncode == -signal.SIGKILL
    begin = "import os; from vitft.hardware.pools import _begin_worker; _begin_worker(os.getppid(), 0)"
    assert subprocess.run([sys.executable, "-c", begin]).returncode == 0


def test_processes_end_quietly_with_the_program() -> None:
    """Even if something still refers to the iterator then."""
    program = (
        "from vitft.hardware.pools import map_in_processes\n"
        "results = map_in_processes(abs, range(10**6), 2)\n"
        "print(next(results))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_processes_end_with_a_program_that_is_killed() -> None:
    """Even while they wait for it to read a result."""
    program = (
        "import psutil, time\n"
        "from vitft.hardware.pools import map_in_processes\n"
        "results = map_in_processes(lambda n: bytes(10**6), range(10**6), 2)\n"
        "next(results)\n"
        "print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        started = [psutil.Process(int(pid)) for pid in running.stdout.readline().split()]
        running.kill()
        assert len(started) >= 2
        _, alive = psutil.wait_procs(started, timeout=60)
        for process in alive:
            process.kill()
    assert not alive


def test_threads_work_in_a_forked_process() -> None:
    """Its parent's threads do not exist there."""
    assert list(pools.thread_pool().map(abs, [-1])) == [1]
    work = lambda n: [cpus(), *pools.map_in_groups(abs, [n])]  # noqa: E731
    assert list(map_in_processes(work, [-5, -6], 2)) == [[1, 5], [1, 6]]


def test_no_processes_where_they_cannot_be_started_or_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "cpus", lambda: 8)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert processes() == 8
    assert processes(shared_bytes=10**15) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert processes() == 0
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(pools.sys, "platform", "darwin")
    assert processes() == 0


@pytest.mark.parametrize("as_files", [False, True])
def test_many_tiny_images_are_decoded_in_processes_to_the_same_store(
    tmp_path: Path, as_files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    drawn = np.random.default_rng(1).integers(0, 256, (150, 8, 8, 3), np.uint8)
    cells = []
    for number, pixels in enumerate(drawn):
        file = tmp_path / f"{number}.png"
        Image.fromarray(pixels).save(file)
        if number == 140:
            file.write_bytes(file.read_bytes()[:-30])
        cells.append({"path": str(file), "bytes": None if as_files else file.read_bytes()})
    rows = datasets.Dataset.from_dict({"image": cells, "label": [0] * 150, "row": list(range(150))})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    started: list[int] = []

    def counted(work, items, count):  # type: ignore[no-untyped-def]
        started.append(count)
        return map_in_processes(work, items, count)

    monkeypatch.setattr(store, "map_in_processes", counted)
    monkeypatch.setattr(store, "processes", lambda: 2)
    options = {"crops": False, "max_pixels": 10**6, "skip_bad": True}
    (plain, skipped), seen = decode_all(rows, Preprocess(16, 16), **options), []  # type: ignore[arg-type]
    monkeypatch.setattr(store, "_MANY", 150)
    forked, skipped_too = decode_all(rows, Preprocess(16, 16), **options, progress=lambda *at: seen.append(at))  # type: ignore[arg-type]
    assert started == [2]
    assert plain.digest == forked.digest
    assert torch.equal(plain.pixels, forked.pixels)
    assert [image.position for image in skipped] == [140]
    assert skipped == skipped_too
    assert seen == [(n, 150) for n in range(1, 151)]
    with pytest.raises(DataError, match="140"):
        decode_all(rows, Preprocess(16, 16), **options | {"skip_bad": False})  # type: ignore[arg-type]
