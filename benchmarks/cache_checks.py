"""What it costs to check decoded photos that were kept, of a run's first epoch: `docs/benchmarks.md` has the rows.

    python benchmarks/cache_checks.py [--photos 1000] [--folder FOLDER]

Trains a small ViT for one epoch on photos of 500x375, twice, so that the second run finds them decoded. Of that run:
seconds, by the clock, to identify the photos and to bring them into memory with their checksums compared; of those, to
bring them into memory alone, which a run without checks would need too; and of its epoch.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from photos import make_photos

from vitft import TrainConfig, train
from vitft.data.stores import cache


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="of photos made by this before")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["VITFT_CACHE"] = f"{scratch}/cache"
        photos = given.folder or Path(scratch) / "photos"
        if not photos.is_dir():
            make_photos(photos, given.photos)
        for augment in ("flip", "crop"):
            config = TrainConfig.parse({
                "dataset": str(photos), "model": "vit-micro", "from_scratch": True, "image_size": 112, "patch_size": 16,
                "augment": augment, "epochs": 1, "val_fraction": 0.0, "check": "off",
            }, "flags")  # fmt: skip
            train(config, output=f"{scratch}/{augment}-1")
            seconds: dict[str, float] = {}
            for name in ("fingerprint", "read"):
                setattr(cache, name, timed(getattr(cache, name), name, seconds))
            run = train(config, output=f"{scratch}/{augment}-2").run
            loads = []
            (kept,) = (
                entry for entry in cache.entries() if entry.images == given.photos and entry.used > time.time() - 60
            )
            for _ in range(3):
                started = time.perf_counter()
                np.fromfile(kept.folder / "pixels", np.uint8)
                loads.append(time.perf_counter() - started)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            steps = [line for line in lines if line["split"] == "train"]
            before = [0, *(line["step"] for line in steps)]
            epoch_s = sum(
                min((line["step"] - first) * config.batch_size, given.photos) / line["images_per_s"]
                for first, line in zip(before, steps, strict=False)
            )
            identity_s, read_s, load_s = seconds["fingerprint"], seconds["read"], min(loads)
            checking = (identity_s + max(read_s - load_s, 0.0)) / epoch_s
            print(
                f"{augment}: kept {kept.size / 1e6:.0f} MB; identity {identity_s:.2f} s; read, proved {read_s:.2f} s,",
                f"reading alone {load_s:.2f} s; epoch {epoch_s:.1f} s; checking {checking:.1%} of it",
                flush=True,
            )
            cache.clear()


def timed(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    """The function, adding up what it takes."""

    def call(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    return call


if __name__ == "__main__":
    main()
