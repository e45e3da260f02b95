"""Predictions on their way to files, folders and the screen, a batch at a time, until the end or a signal."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from vitft.errors import DataError, Stopped
from vitft.io.console import counted
from vitft.io.signals import Interrupted, StopSignals
from vitft.prediction.outputs import Writer
from vitft.prediction.predictor import Prediction

Batches = Generator[list[Prediction], None, None]


@dataclass
class Tally:
    """How many images have a row, how many could not be read, and the first of these."""

    done: int = 0
    unreadable: int = 0
    first: str = ""

    def write(self, rows: Sequence[Prediction]) -> None:
        """Count some more."""
        bad = [row for row in rows if row.error is not None]
        if bad and not self.first:
            self.first = f"; the first is {bad[0].path}: {bad[0].error}"
        self.done, self.unreadable = self.done + len(rows), self.unreadable + len(bad)

    def check(self) -> None:
        """Raise DataError if images could not be read."""
        if self.unreadable:
            raise DataError(f"{self.unreadable:,} of {self.done:,} images could not be read{self.first}")


def run(batches: Batches, writers: Sequence[Writer], tally: Tally, progress: Callable[[int], None]) -> None:
    """Give each batch to every writer; `progress` is called with the number of images done.

    Raises Stopped after SIGINT and SIGTERM, which interrupt a forward pass, but no writing.
    """
    try:
        with StopSignals() as signals:
            while True:
                with signals.interruptible():
                    rows = next(batches, None)
                if rows is None:
                    return
                for writer in (*writers, tally):
                    writer.write(rows)
                progress(tally.done)
    except Interrupted as signal:
        raise Stopped(f"stopped after {counted(tally.done, 'image')}", signal.number) from None
    finally:
        batches.close()
