"""The processes that torchrun or `accelerate launch` started, which share the work of one command."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

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
        isinstance(error, RuntimeError) and re.search("(closed|reset) by peer|remote process", str(error)) is not None
    )


def restarts() -> int:
    """How often torchrun has started this command again, after one of its processes failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch() -> str | None:
    """What a command and its restarts by torchrun have in common; None if torchrun did not start it."""
    if "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # of --rdzv-id or --standalone
    return str(os.getppid()) if name == "none" else name


def meet_again(device: str) -> None:
    """After a restart, meet the other processes under a new name.

    torchrun's store still has the addresses of the processes that ended, under the same keys, and one that reads them
    before they are overwritten waits for nobody.
    """
    if not restarts() or os.environ.get("WORLD_SIZE", "1") == "1":
        return
    import torch.distributed as distributed

    if distributed.is_initialized():
        return
    if device == "cuda":
        import torch

        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(distributed.rendezvous("env://"))  # type: ignore[attr-defined]
    named = distributed.PrefixStore(f"restart-{restarts()}", store)  # type: ignore[attr-defined]
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, store=named, rank=rank, world_size=world, timeout=PATIENCE)


def join_processes(device: str) -> Processes:
    """Meet the other processes, if there are any; each has a GPU of its own."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    meet_again(device)
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    return Processes(state.process_index, state.num_processes)
