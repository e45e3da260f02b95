"""Run a fuzz target in this process and print what came of it as one JSON document.

python -m tests.fuzz recipes --count 20000 --seed 1
"""

import argparse
import faulthandler
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.fuzz.mutations import mutated
from tests.fuzz.targets import TARGETS, Target

SLOW_S = 2.0
BINARY = {".parquet", ".safetensors"}


def main() -> int:
    """Exit code 1 if anything but a success or the right error came out."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="Try the one with this number alone, and show its traceback.")
    given = parser.parse_args()
    faulthandler.enable()
    # A hang shows where, and ends the process: nothing may take so long.
    with tempfile.TemporaryDirectory() as work:
        counts: Counter[str] = Counter()
        target = TARGETS[given.target](Path(work), counts)
        for number in range(20):  # imports and caches belong to the baseline
            with suppress(Exception):
                attempt(target, random.Random(number))
        counts.clear()
        baseline, slowest, wrong = peak_bytes(), (0.0, -1), []
        numbers = range(given.count) if given.only is None else [given.only]
        for number in numbers:
            faulthandler.dump_traceback_later(300, exit=True)
            started = time.process_time()  # other work on the machine makes nothing slow
            try:
                attempt(target, random.Random(f"{given.seed}.{number}"))
                counts["loaded"] += 1
            except target.refusal as error:
                counts["refused"] += 1
                if "\n" in str(error):
                    wrong.append((number, f"two lines: {error}"))
            except Exception as error:
                wrong.append((number, f"{type(error).__name__}: {error}"[:300]))
                if given.only is not None:
                    traceback.print_exc()
            slowest = max(slowest, (time.process_time() - started, number))
            if slowest[0] > SLOW_S and slowest[1] == number:
                wrong.append((number, f"took {slowest[0]:.1f} s"))
        faulthandler.cancel_dump_traceback_later()
    print(json.dumps({
        "target": given.target, "tried": len(numbers), **counts,
        "slowest_s": round(slowest[0], 2), "memory_over_baseline_mb": round((peak_bytes() - baseline) / 1e6, 1),
        "wrong": len(wrong), "first_wrong": wrong[:20],
    }, indent=2))  # fmt: skip
    return 1 if wrong else 0


def attempt(target: Target, rng: random.Random) -> None:
    """Mutate one of the seeds, and read it."""
    seed = rng.choice(list(target.seeds))
    text = seed.suffix not in BINARY and target.tokens
    alike = [data for file, data in target.seeds.items() if file.suffix == seed.suffix]
    header, tokens = (0, target.tokens) if text else (target.header, ())
    target.read(seed, mutated(target.seeds[seed], alike, rng, header=header, tokens=tokens))


def peak_bytes() -> int:
    """The most memory that this process has held; of getrusage it would be what its parent held, if that was more."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]


if __name__ == "__main__":
    sys.exit(main())
