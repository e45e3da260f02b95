"""TrivialAugment of a batch: `vitft.data.augmentation` beside kornia's, image by image and one operation for all.

pip install kornia && python benchmarks/operations.py [--images 64] [--size 32] [--threads 1]

kornia draws one operation for a whole batch. To draw one for each image, it has to be called image by image. In turns;
the least of all rounds counts: other programs only add to it.
"""

import argparse
import time
from collections.abc import Callable

import kornia
import numpy as np
import torch
from kornia.augmentation.auto import TrivialAugment

from vitft.data.augmentation.policies import operate
from vitft.data.augmentation.settings import Augmentation


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    pixels = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (given.images, given.size, given.size, 3), np.uint8)
    )
    floats = pixels.permute(0, 3, 1, 2).float().div(255).contiguous()
    ours, fill, index = Augmentation(kind="trivial", seed=0), torch.zeros(3, dtype=torch.uint8), np.arange(given.images)
    theirs = TrivialAugment()
    ways: dict[str, Callable[[int], object]] = {
        "vitft": lambda number: operate(pixels, ours, fill, number, index),
        "kornia, image by image": lambda number: torch.cat([theirs(one[None]) for one in floats]),
        "kornia, one operation for all": lambda number: theirs(floats),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way(number)
            seconds[name].append(time.perf_counter() - started)
    print(f"{given.images} images of {given.size}x{given.size}, {given.threads} threads, kornia {kornia.__version__}")
    for name, values in seconds.items():
        print(f"{name}: median {1000 * sorted(values)[len(values) // 2]:.1f} ms, least {1000 * min(values):.1f} ms")


if __name__ == "__main__":
    main()
