"""Many classes and many files: the seconds to list, split, record and score them, and the memory.

    python benchmarks/many_classes.py FOLDER

The folder is created, with 200,000 small files, unless it exists.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

import vitft.evaluation.counts  # noqa: F401  (as in a run, where all is imported by then)
from vitft.data.sources.source import open_dataset
from vitft.data.splits import make_splits, manifest
from vitft.evaluation.metrics import score


def make_files(root: Path, classes: int, files: int) -> None:
    """Write small files that are not images: nothing that is measured decodes them."""
    for number in range(files):
        folder = root / f"class {number % classes:05d}"
        if number < classes:
            folder.mkdir(parents=True)
        (folder / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + number.to_bytes(8, "big"))


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=200_000)
    given = parser.parse_args()
    root, classes = given.folder, given.classes
    if not root.exists():
        make_files(root, classes, given.files)
    said = {}

    def timed(name: str, started: tuple[float, float]) -> tuple[float, float]:
        now = time.perf_counter(), time.process_time()
        said[name] = {"s": round(now[0] - started[0], 2), "cpu_s": round(now[1] - started[1], 2)}
        return now

    clock = time.perf_counter(), time.process_time()
    source = open_dataset(str(root))
    clock = timed("listing", clock)
    splits = make_splits(source, val_fraction=0.1, max_train_samples=None, max_eval_samples=None, seed=0)
    clock = timed("split", clock)
    document = json.dumps(manifest(source, splits))
    clock = timed("manifest", clock)
    truth = splits["validation"].labels
    top = (truth[:, None] + np.arange(5)) % classes
    metrics = score(truth, top, np.ones(len(truth)), source.labels, split="validation", split_hash="", elapsed_s=1.0)
    clock = timed("scoring", clock)
    metrics.summary()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    counts = {"validation": len(truth), "manifest_bytes": len(document), "peak_GB": round(peak, 2)}
    print(json.dumps(said | counts, indent=2))


if __name__ == "__main__":
    main()
