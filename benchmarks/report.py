"""How long the report of a run takes to write and to open, and how large it is.

    python benchmarks/report.py CIFAR10_FOLDER VIT_FOLDER FOLDER --image-size 98

Three runs are made in FOLDER, unless they are there: CIFAR-10 with all 10,000 test images and the given model, cats and
dogs alone, and the 10,000 images in 1,000 classes that were drawn by chance, so that nearly all are mistakes. `vitft
report` is timed as a command, Python's start included, also in CPU time, which other programs hardly change. Opening is
timed by Chromium, until its load event.
"""

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, load_dataset
from playwright.sync_api import sync_playwright

CLASSES, CAT, DOG = 1000, 3, 5
ROUNDS = 5


def main() -> None:
    """Measure, and print a row of a table for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--image-size", type=int, default=224)
    given = parser.parse_args()
    size = ["--image-size", str(given.image_size)]
    runs = {
        "10 classes": trained(given.folder / "cifar10", given.dataset, given.model, *size),
        "2 classes": trained(given.folder / "two", two(given), "vit-micro"),
        "1,000 classes": trained(given.folder / "thousand", thousand(given), "vit-micro"),
    }
    print(
        "| run | pictures | written in | CPU time | size | opened in | console errors |\n|---|---|---|---|---|---|---|"
    )
    for name, run in runs.items():
        file = run / "report.html"
        elapsed, busy = seconds([sys.executable, "-m", "vitft", "report", str(run)])
        pictures, opened, errors = in_browser(file)
        size_mb = file.stat().st_size / 1e6
        cells = (
            name,
            f"{pictures:,}",
            f"{elapsed:.1f} s",
            f"{busy:.1f} s",
            f"{size_mb:.1f} MB",
            f"{opened:.2f} s",
            errors,
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def trained(run: Path, data: Path, model: str, *flags: str) -> Path:
    """A run of a few steps, and all test images scored."""
    if not (run / "results.json").is_file():
        few = ["--max-train-samples", "2000", "--max-steps", "20", "--reference-images", "0", "--report", "off"]
        words = ["--dataset", str(data), "--model", model, "--output", str(run), "--overwrite", *few, *flags]
        subprocess.run([sys.executable, "-m", "vitft", "train", *words], check=True)
    return run


def two(given: argparse.Namespace) -> Path:
    """Cats and dogs."""

    def only(split: Dataset) -> Dataset:
        labels = np.array(split["label"])
        chosen = split.select(np.flatnonzero((labels == CAT) | (labels == DOG)))
        return relabeled(chosen, (np.array(chosen["label"]) == DOG).astype(int), ["cat", "dog"])

    return written(given, "cats-and-dogs", only)


def thousand(given: argparse.Namespace) -> Path:
    """The images in classes that were drawn."""

    def drawn(split: Dataset) -> Dataset:
        labels = np.random.default_rng(0).integers(0, CLASSES, len(split))
        return relabeled(split, labels, [f"class {number:03}" for number in range(CLASSES)])

    return written(given, "by-chance", drawn)


def relabeled(split: Dataset, labels: Any, names: list[str]) -> Dataset:
    """The images with other labels."""
    split = split.remove_columns("label").add_column("label", labels)
    return split.cast_column("label", ClassLabel(names=names))


def written(given: argparse.Namespace, name: str, change: Any) -> Path:
    """The changed dataset as parquet files."""
    folder: Path = given.folder / name
    for split in ("train", "test"):
        file = folder / f"{split}.parquet"
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            change(load_dataset("parquet", data_files=str(given.dataset / file.name), split="train")).to_parquet(file)
    return folder


def seconds(command: list[str]) -> tuple[float, float]:
    """Seconds that a command takes, and its CPU time."""

    def busy() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    started, before = time.perf_counter(), busy()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started, busy() - before


def in_browser(file: Path) -> tuple[int, float, int]:
    """The number of pictures, the seconds until the load event, and the number of errors in the console."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    errors: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        taken = []
        for _ in range(ROUNDS):
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
            page.goto(file.absolute().as_uri())
            taken.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"))
            pictures = page.evaluate("data.images.length")
            page.close()
        browser.close()
    return pictures, statistics.median(taken), len(errors)


if __name__ == "__main__":
    main()
