"""`vitft` in processes of its own that start at once: forked from one that has imported everything."""

import importlib
import multiprocessing as mp
import os
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.training.test_trainer import config
from vitft.io import console
from vitft.training.callbacks import recorded

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["tests.preloaded"])
Process = Any

# What takes so long hangs, however busy the machine. The `timeout` of a test is longer: it would leave it running.
HANGS_S = 600

# 320 images in batches of 8: 40 steps an epoch, 80 in all.
LONGER = {"batch_size": 8, "max_train_samples": 320, "save_every": 10, "epochs": 2}


def flags(**changes: object) -> list[str]:
    """Those of a small run, with changes."""
    given = config(**LONGER | changes).model_dump(exclude_defaults=True)
    return [
        word
        for name, value in given.items()
        for word in ([f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)])
    ]


def start(
    *words: str,
    log: Path,
    before: Callable[[], None] | None = None,
    largest_file: int | None = None,
    environment: dict[str, str] | None = None,
) -> Process:
    """`vitft` with these words; what it says goes to `log`, what it may write to one file is `largest_file` bytes.

    `before` runs first, in the process: a module's function.
    """
    process = _context.Process(target=_run, args=(words, log, before, largest_file, environment or {}))
    process.start()
    return process


def barrier(parties: int) -> Barrier:
    """Where so many processes wait for each other; `start` passes it on, within `before`."""
    return _context.Barrier(parties)


def finish(*words: str, log: Path, **how: Any) -> tuple[int, str]:
    """Run to the end: the exit code, and all that was said."""
    return ended(start(*words, log=log, **how)), log.read_text()


def finish_two(*words: str, log: Path, before: Callable[[], None] | None = None) -> list[tuple[int, str]]:
    """Run as two processes of one training: see `finish_together`."""
    return finish_together(2, *words, log=log, before=before)


def finish_together(
    count: int, *words: str, log: Path, before: Callable[[], None] | None = None, machines: int = 1
) -> list[tuple[int, str]]:  # fmt: skip
    """Run as processes of one training, as torchrun starts them: of each the exit code, and what it said.

    Where one is killed, the others are told to stop, as torchrun does. As on several machines, each has its share.
    """
    here = count // machines
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # any free port
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
             "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(here),
             "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
    logs = [log.with_name(f"{log.name}-{rank}") for rank in range(count)]
    all_ = [
        start(*words, log=own, before=before, environment=place | {"RANK": str(rank), "LOCAL_RANK": str(rank % here)})
        for rank, own in enumerate(logs)
    ]
    while all(process.is_alive() for process in all_):
        wait([process.sentinel for process in all_])
    if any((process.exitcode or 0) < 0 for process in all_):
        for process in all_:
            process.terminate()
    return [(ended(process), own.read_text()) for process, own in zip(all_, logs, strict=True)]


def ended(process: Process) -> int:
    """The exit code of a process, once it has ended; one that hangs is killed, and fails the test."""
    process.join(HANGS_S)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("it does not end")
    return int(process.exitcode)


def within(extra_bytes: int, call: Callable[..., Any], *arguments: Any) -> str:
    """What a function came to in a process that may take so many bytes beside those it has: its repr, or its error."""
    receiving, sending = _context.Pipe(duplex=False)
    process = _context.Process(target=_within, args=(extra_bytes, sending, call, arguments))
    process.start()
    sending.close()
    try:
        return str(receiving.recv())
    except EOFError:
        process.join()
        return f"the process ended with {process.exitcode}"
    finally:
        ended(process)


def _within(extra_bytes: int, sending: Any, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        said = repr(call(*arguments))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    sending.send(said)


def steps_done(run: Path) -> int:
    """The last step that a run has written down."""
    return max((line["step"] for line in recorded(run)), default=0)


def wait_for_step(alive: Callable[[], bool], run: Path, step: int) -> None:
    """Until a running process has got there."""
    wait_until(lambda: steps_done(run) >= step, alive)


def wait_until(reached: Callable[[], bool], alive: Callable[[], bool] = lambda: True) -> None:
    """Until a running process has got so far."""
    limit = time.monotonic() + HANGS_S
    while not reached():
        assert alive(), "the run ended by itself"
        assert time.monotonic() < limit, "the run does not get on"
        time.sleep(0.002)


def _run(
    words: tuple[str, ...],
    log: Path,
    before: Callable[[], None] | None,
    largest_file: int | None,
    environment: dict[str, str],
) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.argv = ["vitft", *words]
    os.environ.update(environment)
    console.log.handlers.clear()  # otherwise each warning would be printed twice
    importlib.reload(console)  # it asks when it is imported whether this is the process that speaks
    if before is not None:
        before()
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    from vitft.cli.app import main

    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
