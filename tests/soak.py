"""Train, break, resume, score, compare, for as long as it is told to; then what grew.

python -m tests.soak --minutes 60
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import TINY_THREADS
from tests.forked import HANGS_S, LONGER, finish, flags, start
from tests.training.test_survival import assert_like_uninterrupted, begin_or_resume, left_in
from tests.training.test_trainer import config
from vitft.checkpoints.checkpoint import is_run, newest_intact, step_folders

FAULTS = ("kill", "kill", "terminate", "interrupt", "interrupt twice", "disk full", "flipped bit", "truncated file")


def main() -> int:
    """Exit code 1 if a run did not end as the uninterrupted one, or anything grew."""
    assert os.environ["OMP_NUM_THREADS"] == TINY_THREADS
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng, end = random.Random(given.seed), time.monotonic() + 60 * given.minutes
    faults: Counter[str] = Counter()
    measured: list[dict[str, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        tempfile.gettempdir()  # settled here, and elsewhere below: multiprocessing has its own until the end
        os.environ["TMPDIR"] = str(Path(folder) / "tmp")
        Path(os.environ["TMPDIR"]).mkdir()
        work = Path(folder) / "work"
        work.mkdir()
        whole = work / "whole"
        for _ in range(2):  # the first pays for the imports
            began = time.monotonic()
            assert finish("train", *flags(), "--output", str(whole), "--overwrite", log=work / "log")[0] == 0
            took_s = time.monotonic() - began
        tempfile.tempdir = os.environ["TMPDIR"]
        while time.monotonic() < end:
            run, tried = work / "run", list[str]()
            for _ in range(rng.randint(1, 3)):
                fault = rng.choice(FAULTS)
                met = disturb(run, fault, rng, took_s, work / "log")
                if met is None:
                    break
                faults[met] += 1
                tried.append(met)
            code, said = finish(*begin_or_resume(run, flags()), log=work / "log")
            assert code == 0, said
            try:
                assert_like_uninterrupted(run, whole)
            except AssertionError as error:
                raise AssertionError(f"after {tried}: {sorted(left_in(run) ^ left_in(whole))}") from error
            code, said = finish("eval", str(run), "--json", log=work / "log")
            assert code == 0, said
            in_this_process(run, work / "mine")
            shutil.rmtree(run)
            measured.append(figures(Path(folder)))
    grown = {name: growth([one[name] for one in measured]) for name in measured[0]}
    tempfile.tempdir = None
    print(json.dumps({"minutes": given.minutes, "cycles": len(measured), "faults": faults, "all_same_bits": True,
                      "first_cycles_and_last": grown}, indent=2))  # fmt: skip
    return int(any(last > 1.05 * first + 1 for first, last in grown.values()))


def disturb(run: Path, fault: str, rng: random.Random, took_s: float, log: Path) -> str | None:
    """Begin or go on with the run, and break it. Returns what it met: a kill, where there was nothing to damage yet.

    None where it was done before.
    """
    limit = rng.choice([0, 2000, 20_000]) if fault == "disk full" and is_run(run) else None
    process = start(*begin_or_resume(run, flags()), log=log, largest_file=limit)
    process.join(HANGS_S if limit is not None else rng.uniform(0.1, took_s))
    met = "disk full" if limit is not None else "kill"
    if process.exitcode is None:
        soft = {"terminate": [signal.SIGTERM], "interrupt": [signal.SIGINT], "interrupt twice": [signal.SIGINT] * 2}
        met = fault if fault in soft else "kill"
        for number in soft.get(fault, [signal.SIGKILL]):
            os.kill(process.pid, number)
            time.sleep(0.005)
    process.join(HANGS_S)
    done = process.exitcode == 0
    process.close()
    folders = step_folders(run) if is_run(run) and not done else []
    if fault in ("flipped bit", "truncated file") and len(folders) > 1:
        file = rng.choice(sorted(folders[0].iterdir()))
        content = bytearray(file.read_bytes())
        if fault == "truncated file":
            del content[len(content) // 2 :]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        met = fault
        assert newest_intact(run)[0] == folders[1], f"{file} is torn, and taken for whole"
    return None if done else met


def in_this_process(run: Path, mine: Path) -> None:
    """What a program does that uses the library: train, score, predict; nothing of it may stay."""
    from vitft import evaluate, predict, train

    train(config(**LONGER | {"max_steps": 5, "max_train_samples": 60}), output=mine)
    assert evaluate(run).count == 50
    assert predict("docs/digits", run)
    shutil.rmtree(mine)


def figures(folder: Path) -> dict[str, int]:
    """What must not grow: of this process, and of all that lies in the work folder."""
    me = psutil.Process()
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        "memory_mb": round(me.memory_info().rss / 1e6),
        "descriptors": me.num_fds(),
        "threads": me.num_threads(),
        "children": len(me.children(recursive=True)),
        "files": len(files),
        "disk_kb": sum(file.stat().st_size for file in files) // 1000,
    }


def growth(values: list[int]) -> tuple[float, float]:
    """The means of the second fifth and of the last: the first fifth warms up."""
    fifth = max(1, len(values) // 5)
    early: Any = values[fifth : 2 * fifth] or values[:1]
    return round(sum(early) / len(early), 1), round(sum(values[-fifth:]) / fifth, 1)


if __name__ == "__main__":
    sys.exit(main())
