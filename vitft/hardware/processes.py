"""The processes that torchrun or `accelerate launch` started, which share the work of one command."""

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar
from uuid import uuid4

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """How many processes there are, and the number of this one; the first, 0, writes and speaks."""

    rank: int = 0
    count: int = 1

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in the order of their numbers. All have to call it."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        found: list[Any] = gather_object(items)
        return found

    def by_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on the first process, which alone calls it. All have to call this."""
        if self.count == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        done: T = broadcast_object_list([work() if self.rank == 0 else None])[0]
        return done

    def share_files(self, make: Callable[[], list[int]]) -> list[int]:
        """Descriptors of the files that `make` opens, which may have no names: the same for all processes of a machine.

        Its first process makes them; the system removes them when the last one ends, however it ends. A process that
        may not open those of another has its own. All have to call this.
        """
        local = int(os.environ.get("LOCAL_RANK", "0"))
        made = make() if self.is_first_here else []
        if self.count == 1:
            return made
        pid, there = self.gather([(os.getpid(), made)])[self.rank - local]
        if not made:
            try:
                made = [os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR) for file in there]
            except OSError:  # no Linux, or another container
                made = make()
        self.gather([None])  # the first one may end from here on
        return made

    @property
    def here(self) -> int:
        """How many of them are on this machine."""
        return 1 if self.count == 1 else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    @property
    def is_first_here(self) -> bool:
        """Whether this is the first one of this machine."""
        return self.count == 1 or os.environ.get("LOCAL_RANK", "0") == "0"


PATIENCE = timedelta(hours=3)
"""How long processes wait for one that does alone what cannot be shared, such as a download."""

ALONE = Processes()
"""One process."""


def lost_another(error: Exception) -> bool:
    """Whether this is what a process meets when another one has ended, of whatever that died."""
    return (
        isinstance(error, RuntimeError)
        and re.search("(closed|reset) by peer|remote process|connectFullMesh failed", str(error)) is not None
    )


def remember(key: str, text: str) -> None:
    """Tell something to the processes that torchrun will start in place of these, if any of them fails."""
    if (store := _store()) is not None:
        store.set(f"vitft/{key}", text)


def remembered(key: str) -> str | None:
    """What `remember` was told by the processes that these replace; None without torchrun, and at the first start."""
    store = _store()
    known = store is not None and store.check([f"vitft/{key}"])
    return store.get(f"vitft/{key}").decode() if known else None


@contextmanager
def after_first() -> Iterator[None]:
    """Within, the first process does alone what the others have to find done: they wait until it has left this context.

    All have to enter it, also before they have met by `meet`. Should the first one fail, the others wait until they
    are ended with it.
    """
    if _count() == 1:
        yield
        return
    key = f"done-{next(_waits)}"
    if os.environ["RANK"] == "0":
        yield
        _meeting().set(key, "")
    else:
        _meeting().wait([key], PATIENCE)
        yield


_waits = itertools.count()


def meet(device: str) -> None:
    """Meet the other processes, if there are any; each has a GPU of its own."""
    import torch.distributed as distributed

    if _count() == 1 or distributed.is_initialized():
        return
    if device == "cuda":
        import torch

        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend, rank = "nccl" if device == "cuda" else "gloo", int(os.environ["RANK"])
    distributed.init_process_group(backend, store=_meeting(), rank=rank, world_size=_count(), timeout=PATIENCE)


def _count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _store() -> Any:
    """Where processes find each other; torchrun's own outlives them. None for one process without torchrun."""
    if _count() == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return _connected(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])


@cache
def _connected(_host: str, _port: str) -> Any:
    import torch.distributed as distributed

    store, _, _ = next(distributed.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
    return store


def _meeting() -> Any:
    """The same under a name that only the processes of now have.

    torchrun's store still has the addresses of processes that ended, and one that reads those waits for nobody. The
    count of restarts, which torchrun gives to each, is no such name: every machine counts its own.
    """
    import torch.distributed as distributed

    return distributed.PrefixStore(_agreed(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]), _store())  # type: ignore[attr-defined]


@cache
def _agreed(_host: str, _port: str) -> str:
    """A name that the first process chooses and tells to whoever asks now, each under a word of its own."""
    store, mine, rank = _store(), uuid4().hex, int(os.environ["RANK"])
    if rank:
        store.set(f"vitft/asks-{rank}", mine)
        name: str = store.get(f"vitft/told-{mine}").decode()  # waits for it
        store.set(f"vitft/heard-{name}-{rank}", "")
        return name
    asked: dict[int, str] = {}
    missing = set(range(1, _count()))
    while missing:
        for other in sorted(missing):
            if not store.check([f"vitft/asks-{other}"]):
                continue
            word = store.get(f"vitft/asks-{other}").decode()
            if asked.get(other) != word:  # the first one may be of a process that has ended
                asked[other] = word
                store.set(f"vitft/told-{word}", mine)
            elif store.check([f"vitft/heard-{mine}-{other}"]):
                missing.remove(other)
        time.sleep(0.01)
    return mine


def join_processes(device: str) -> Processes:
    """Meet the other processes, if there are any; each has a GPU of its own."""
    if _count() == 1:
        return ALONE
    meet(device)
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes)
