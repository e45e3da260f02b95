"""Images a second through the input path, after the first pass: stored uint8 -> float32 model input.

    python benchmarks/input.py --dataset ../cifar10 --images 6400

Prints, for each kind of augmentation, the median and the spread of several passes.
"""

import argparse
import time

import numpy as np
import torch

from vitft.data.augment import Preprocess
from vitft.data.loader import TrainLoader
from vitft.data.sources import class_indices, open_source
from vitft.data.store import decode_all


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="as for `vitft train`")
    parser.add_argument("--images", type=int, default=1400, help="how many of its training images")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--passes", type=int, default=5)
    given = parser.parse_args()
    source = open_source(given.dataset)
    rows = source.splits["train"].select(range(min(given.images, len(source.splits["train"]))))
    how = Preprocess(given.image_size, given.image_size)
    print(f"{len(rows)} images of {source.name} to {how.height}x{how.width} float32, batches of {given.batch_size},")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads;", end=" ")
    print(f"images/s, median (least to most) of {given.passes} passes")
    for kind in ("none", "flip", "crop"):
        started = time.perf_counter()
        store, _ = decode_all(rows, how, crops=kind == "crop", max_pixels=10**8, skip_bad=False)
        first = len(rows) / (time.perf_counter() - started)
        loader = TrainLoader(store, class_indices(rows), how, kind=kind, seed=0, batch_size=given.batch_size,
                             device=torch.device("cpu"))  # fmt: skip
        rates = []
        for epoch in range(given.passes + 1):
            started = time.perf_counter()
            seen = 0
            for step in range(loader.steps_per_epoch):
                seen += len(loader.batch(epoch * loader.steps_per_epoch + step).pixels)
            rates.append(seen / (time.perf_counter() - started))
        rates = rates[1:]  # the first pass makes the memory that later ones use again
        spread = f"({min(rates):,.0f} to {max(rates):,.0f})"
        print(f"{kind:>5}: {np.median(rates):8,.0f} {spread:>18}   decoding once: {first:,.0f} images/s")


if __name__ == "__main__":
    main()
