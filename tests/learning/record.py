"""Run lessons of the course: `python -m tests.learning.record [LESSON ...]` writes what they print, and their plots."""

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vitft.learning.lessons import BLOCK, Lesson, find, lessons

COURSE = Path(__file__).parents[2] / "docs" / "course"


def run(lesson: Lesson, plots: Path) -> list[str]:
    """What each Python block prints, in this process and the working directory; its plots become `plots/NAME-N.png`."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    drawn = 0

    def show(*given: Any, **named: Any) -> None:
        nonlocal drawn
        drawn += 1
        plots.mkdir(exist_ok=True)
        plt.savefig(plots / f"{lesson.name}-{drawn}.png", dpi=110, bbox_inches="tight")
        plt.close("all")

    plt.show, before = show, plt.show
    logger = logging.getLogger("vitft")
    level = logger.level  # lessons change it
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    try:
        for number, code in enumerate(lesson.code, 1):
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(compile(code, f"{lesson.name}, block {number}", "exec"), names)
            printed.append(stream.getvalue())
    finally:
        plt.show = before
        logger.setLevel(level)
    return printed


def record(lesson: Lesson) -> None:
    """Write the outputs of a lesson into its file."""
    started, here = time.perf_counter(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            printed = iter(run(lesson, COURSE / "images"))
        finally:
            os.chdir(here)
    sys.stdout.write(f"{lesson.name}: {time.perf_counter() - started:.0f} s\n")

    def with_output(block: re.Match[str]) -> str:
        output = next(printed)
        text = f"```python\n{block['code']}```\n"
        return text + (f"\n```text\n{output.rstrip()}\n```\n" if output.strip() else "")

    file = COURSE / f"{lesson.number:02}-{lesson.name}.md"
    file.write_text(BLOCK.sub(with_output, file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    for one in [find(name) for name in sys.argv[1:]] or lessons():
        record(one)
