"""Threads, for work on images that releases the GIL, and forked processes, for work that holds it."""

import atexit
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

from vitft.errors import TrainingError
from vitft.hardware.device import cpus

A = TypeVar("A")
B = TypeVar("B")


@cache
def thread_pool() -> ThreadPoolExecutor:
    """The threads that decode and resize, which both release the GIL."""
    return ThreadPoolExecutor(cpus(), thread_name_prefix="vitft-image")


def map_in_threads(work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`map` in the thread pool; in a forked process, which has one CPU, without threads."""
    return map(work, items) if _in_fork else thread_pool().map(work, items)


_in_fork = False


def map_ahead(work: Callable[[A], B], items: Iterable[A], ahead: int) -> Generator[B, None, None]:
    """`map` in the thread pool, `ahead` items ahead of the reader and no more: for any number of them."""
    if _in_fork:
        yield from map(work, items)
        return
    pending: deque[Future[B]] = deque()
    try:
        for item in items:
            pending.append(thread_pool().submit(work, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def map_in_groups(work: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
    """`map` in the thread pool for work of microseconds: in groups, because submitting a task takes as long."""
    groups = [items[start : start + _GROUP] for start in range(0, len(items), _GROUP)]
    for results in map_in_threads(lambda group: [work(item) for item in group], groups):
        yield from results


_GROUP = 64


def processes(shared_bytes: int = 0) -> int:
    """How many forked processes this one may start to work ahead; 0 if it has to do without.

    `shared_bytes` is what a result takes in shared memory, of which containers may have little.
    """
    count = cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if sys.platform != "linux" or count < 2 or multiprocessing.current_process().daemon:
        return 0
    if shared_bytes:
        count = min(count, shutil.disk_usage("/dev/shm").free // (2 * (_AHEAD + 1) * shared_bytes))
    return count


def shared_lock() -> Any:
    """A lock that processes share which are forked later."""
    return _forking().Lock() if sys.platform == "linux" else threading.Lock()


_AHEAD = 2  # results that each process prepares


def map_in_processes(
    work: Callable[[A], B], items: Sequence[A], count: int, *, pin: bool = False
) -> Generator[B, None, None]:  # fmt: skip
    """`map` in `count` forked processes, in order and ahead of the reader. Raises what `work` raises.

    The processes see this process's memory as it is now, so `work` may be a closure over anything but a GPU. Tensors
    in the results come back in shared memory, or with `pin` in page-locked memory, which a GPU copies faster. The
    processes end when the generator is exhausted or closed.
    """
    results = _results(work, items, count, pin)
    _open.add(results)
    return results


_open: WeakSet[Generator[Any, None, None]] = WeakSet()


@atexit.register
def _close_all() -> None:
    """End the processes of iterators that are still referenced: multiprocessing would terminate them less quietly."""
    for results in list(_open):
        results.close()


def _results(work: Callable[[A], B], items: Sequence[A], count: int, pin: bool) -> Generator[B, None, None]:
    loader: DataLoader[Any] = DataLoader(
        _Work(work), batch_size=None, sampler=items, collate_fn=_unchanged, pin_memory=pin, prefetch_factor=_AHEAD,
        num_workers=count, multiprocessing_context=_forking(), worker_init_fn=partial(_begin_worker, os.getpid()),
        generator=torch.Generator(),  # else it draws from the global one
    )  # fmt: skip
    try:
        for result, error in loader:
            if error is not None:
                raise error from None
            yield result
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise TrainingError("a process that prepares images was killed; is there enough memory?") from error


class _Work(Dataset[tuple[B | None, Exception | None]], Generic[A, B]):
    """The work as a dataset. Errors are returned: DataLoader would add the worker's traceback to their message."""

    def __init__(self, work: Callable[[A], B]) -> None:
        self._work = work

    def __getitem__(self, item: A) -> tuple[B | None, Exception | None]:
        try:
            return self._work(item), None
        except Exception as error:
            return None, error


def _unchanged(result: Any) -> Any:
    return result


@cache
def _forking() -> Any:
    """Forked processes that the one that started them ends by SIGKILL, because they ignore SIGTERM."""
    from multiprocessing.context import ForkContext, ForkProcess
    from multiprocessing.popen_fork import Popen

    class Killed(Popen):
        def terminate(self) -> None:
            self.kill()

    class Process(ForkProcess):
        _Popen = Killed

    context = ForkContext()
    context.Process = Process  # type: ignore[misc]
    return context


_PR_SET_PDEATHSIG = 1  # of Linux: which signal to get when the parent ends


def _begin_worker(parent: int, _number: int) -> None:
    """In a new process: no threads, signals are for the one that started it, and an end with it.

    SLURM and systemd send SIGTERM to all processes of a job, and that one needs these until it has saved. DataLoader
    ends its processes if that one is killed, but not those that wait for it to read a result.
    """
    global _in_fork
    _in_fork = True
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        signal.raise_signal(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # what `cpus` reads
    cpus.cache_clear()
