"""Where the time of a run goes: the phases add up to it."""

from contextlib import suppress

from vitft.hardware.timers import Phases


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_each_second_counts_once_for_the_innermost_phase() -> None:
    clock = Clock()
    phases = Phases(clock)
    clock.time += 1
    with phases.phase("steps"):
        clock.time += 10
        with phases.phase("saving"):
            clock.time += 100
        clock.time += 20
        assert phases.seconds()["steps"] == 30, "also while it lasts"
    clock.time += 2
    found = {name: seconds for name, seconds in phases.seconds().items() if seconds}
    assert found == {"steps": 30, "saving": 100, "other": 3}
    assert sum(found.values()) == clock.time - 100


def test_an_error_ends_a_phase() -> None:
    clock = Clock()
    phases = Phases(clock)
    with suppress(KeyError), phases.phase("validation"):
        clock.time += 5
        raise KeyError
    clock.time += 7
    assert (phases.seconds()["validation"], phases.seconds()["other"]) == (5, 7)


def test_seconds_are_moved_but_never_made() -> None:
    clock = Clock()
    phases = Phases(clock)
    with phases.phase("steps"):
        clock.time += 8
    phases.move("steps", "data_wait", 3)
    assert (phases.seconds()["steps"], phases.seconds()["data_wait"]) == (5, 3)
    phases.move("steps", "data_wait", 30)
    phases.move("steps", "data_wait", -1)
    assert (phases.seconds()["steps"], phases.seconds()["data_wait"]) == (0, 8)
    phases.include({"steps": 2, "of a later version": 1})
    assert sum(phases.seconds().values()) == 11
