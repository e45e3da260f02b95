"""How fast `vitft predict` is beside decoding alone and the model alone, and how much memory it takes.

    python benchmarks/predict.py RUN FOLDER [--photos REAL_PHOTOS] [--rounds 3]

FOLDER gets 2,000 JPEGs of 500x375, unless it is there: random crops of the photos in another folder, else pictures that
only decode as photos do. Then the three take turns on all of them, and the command line writes a CSV file for a list of
2,000 and one of 20,000 paths, which repeats them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE"}  # as the command line sets it, before torch is loaded

import numpy as np
import torch
from photos import make_photos
from PIL import Image, ImageOps

from vitft import Predictor
from vitft.hardware.pools import map_ahead
from vitft.prediction.inputs import find_images
from vitft.prediction.predictor import _AHEAD, BATCH

COUNT, MANY = 2000, 20_000
WIDTH, HEIGHT = 500, 375


def main() -> None:
    """Measure, and print images/s of each round and their medians, and the most resident memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", help="a folder of real photos")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--many", type=int, default=MANY)
    given = parser.parse_args()
    if not given.folder.exists():
        cut(given.photos, given.folder, given.count) if given.photos else make_photos(given.folder, given.count)
    files = sorted(map(str, given.folder.rglob("*.jpg")))[: given.count]
    predictor = Predictor(given.run)
    predictor(files[:BATCH])  # the first forward pass is slow
    pixels = torch.stack(list(map_ahead(predictor.read, files, _AHEAD)))
    work = {
        "decoding": lambda: sum(1 for _ in map_ahead(predictor.read, files, _AHEAD)),
        "model": lambda: [predictor.score(part) for part in pixels.split(BATCH)],
        "predict": lambda: sum(1 for _ in predictor.stream(files)),
    }
    rates: dict[str, list[float]] = {name: [] for name in work}
    for number in range(given.rounds):
        for name, do in work.items():
            started = time.perf_counter()
            do()
            rates[name].append(len(files) / (time.perf_counter() - started))
        print(f"round {number + 1}:", ", ".join(f"{name} {found[-1]:.1f}" for name, found in rates.items()), flush=True)
    decoding, model, predict = (statistics.median(found) for found in rates.values())
    best = 1 / (1 / decoding + 1 / model)
    print(f"images/s of {len(files):,}: decoding alone {decoding:.1f}, model alone {model:.1f}, predict {predict:.1f}")
    print(
        f"{predict / min(decoding, model):.0%} of the slower half; where both share the cores, {best:.1f} is the most"
    )
    for count in (given.count, given.many):
        print(f"{count:,} images: at most {memory(given.run, files, count):.0f} MB", flush=True)


def cut(photos: str, folder: Path, count: int) -> None:
    """Write crops of real photos, of a random size and place, as JPEGs of quality 90."""
    sources, rng = list(find_images([photos])), np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        image = ImageOps.exif_transpose(Image.open(sources[number % len(sources)])).convert("RGB")
        share = rng.uniform(0.5, 1)
        width = share * min(image.width, image.height * WIDTH / HEIGHT)
        height = width * HEIGHT / WIDTH
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box).save(folder / f"{number:05}.jpg", quality=90)


def memory(run: str, files: list[str], count: int) -> float:
    """The most resident memory in MB of the command that classifies a list of so many paths."""
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "paths.txt"
        listed.write_text("\n".join(files[number % len(files)] for number in range(count)))
        words = ["predict", "--paths-from", str(listed), "--checkpoint", run, "--output", f"{folder}/said.csv"]
        process = subprocess.Popen([sys.executable, "-m", "vitft", *words], stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0
        return used.ru_maxrss / 1024


if __name__ == "__main__":
    main()
