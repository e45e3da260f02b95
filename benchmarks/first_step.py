"""Seconds from the command to the end of its first training step, imports and decoding included.

python benchmarks/first_step.py --dataset CIFAR10_FOLDER --model VIT_FOLDER --image-size 98 [flags of `vitft train`]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="as for `vitft train`")
    parser.add_argument("--model", default="vit-micro", help="as for `vitft train`")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    given, given.others = parser.parse_known_args()
    taken = sorted(first_step_s(given) for _ in range(given.rounds))
    print(
        f"first step after {statistics.median(taken):.1f} s ({taken[0]:.1f} to {taken[-1]:.1f}; {given.rounds} starts)"
    )


def first_step_s(given: argparse.Namespace) -> float:
    """Seconds until the first line of metrics stands in the run folder; the run is then ended."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        words = {
            "dataset": given.dataset, "model": given.model, "image-size": given.image_size, "output": run,
            "max-train-samples": given.images, "epochs": 1, "log-every": 1,
        }  # fmt: skip
        flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
        started = time.perf_counter()
        running = subprocess.Popen(
            [sys.executable, "-m", "vitft", "train", *flags, *given.others],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and running.poll() is None:
            time.sleep(0.02)
        taken = time.perf_counter() - started
        if running.poll() is not None:
            raise SystemExit(f"vitft train ended by itself, with {running.returncode}")
        running.kill()
        running.wait()
    return taken


if __name__ == "__main__":
    main()
