"""A sweep shared by two real processes, one of which is killed in a trial."""

import os
import re
import signal
import time
from functools import partial
from pathlib import Path

from tests.forked import ended, flags, start, wait_until
from tests.sweeping.test_sweep import config, story
from vitft import resume_sweep, sweep
from vitft.data.loader import TrainLoader

VARY = {"lr": "1e-4,1e-3,3e-3,1e-2"}


def waits_and_dies(own: str, others: str, dies: bool) -> None:
    """From now on the first batch waits until both processes have a trial; then one kills itself."""
    batch = TrainLoader.batch

    def waiting(self: TrainLoader, step: int) -> object:
        Path(own).touch()
        while not Path(others).exists():
            time.sleep(0.01)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, step)

    TrainLoader.batch = waiting  # type: ignore[method-assign, assignment]


def test_two_processes_share_a_sweep_and_one_is_killed(tmp_path: Path) -> None:
    """The survivor does the dead one's trial again; each trial is done once, with the scores of a sweep by one."""
    settings = config(threads=1, batch_size=24)
    whole = sweep(settings, VARY, output=tmp_path / "whole")
    folder = tmp_path / "shared"
    words = [*flags(**settings.model_dump(exclude_defaults=True)), "--set", f"lr={VARY['lr']}", "--output", str(folder)]
    marks = [str(tmp_path / name) for name in ("dying", "other")]
    dying = start("sweep", *words, log=tmp_path / "log", before=partial(waits_and_dies, *marks, dies=True))
    wait_until(Path(marks[0]).exists, dying.is_alive)
    other = start(
        "sweep",
        "--resume",
        str(folder),
        log=tmp_path / "log2",
        before=partial(waits_and_dies, *marks[::-1], dies=False),
    )
    assert ended(dying) == -signal.SIGKILL
    assert ended(other) == 0, (tmp_path / "log2").read_text()
    taken = [*map(int, dict.fromkeys(re.findall(r"trial (\d) of 4", (tmp_path / "log2").read_text())))]
    assert taken[0] == 2, "the first is taken"
    assert sorted(taken) == [1, 2, 3, 4]
    said = resume_sweep(folder)
    assert [one.state for one in said.trials] == ["complete"] * 4
    assert story(said) == story(whole)
