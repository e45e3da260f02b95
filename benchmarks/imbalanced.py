"""A folder of unequal classes from CIFAR-10, for `vitft train --dataset FOLDER`: exponential, 100 to 1.

python benchmarks/imbalanced.py CIFAR10_FOLDER FOLDER [--test]

Of 4,000 training images, class c has a fraction in proportion to 100^(-c/9) (Cui et al. 2019, "Class-Balanced Loss
Based on Effective Number of Samples"). `validation/` has 200 other training images of each class. With --test, `test/`
has the 10,000 test images; without it, nothing can be chosen by them.
"""

import argparse
from pathlib import Path

import numpy as np

from vitft.config.train import TrainConfig
from vitft.data.sampling import quotas
from vitft.data.sources.source import class_indices, source_of

IMAGES, RATIO, HELD_OUT = 4000, 100, 200


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar10", help="as for `vitft train --dataset`")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--test", action="store_true")
    given = parser.parse_args()
    source = source_of(TrainConfig(dataset=given.cifar10))
    labels = class_indices(source.splits["train"])
    shares = RATIO ** -(np.arange(len(source.labels)) / (len(source.labels) - 1))
    counts = quotas(np.rint(1e6 * shares).astype(np.int64), IMAGES)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    chosen: dict[str, list[int]] = {"train": [], "validation": []}
    for label, count in enumerate(counts.tolist()):
        own = shuffled[labels[shuffled] == label].tolist()
        chosen["train"] += own[:count]
        chosen["validation"] += own[count : count + HELD_OUT]
    for role, rows in chosen.items():
        write(source, "train", rows, given.folder / role)
    if given.test:
        write(source, "test", list(range(len(source.splits["test"]))), given.folder / "test")
    print(dict(zip(source.labels, counts.tolist(), strict=True)))


def write(source, name: str, rows: list[int], folder: Path) -> None:
    """Write these rows of a split as files, in a folder for each class."""
    for row in rows:
        example = source.splits[name][row]
        path = folder / source.labels[example["label"]] / f"{name}-{row:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(example["image"]["bytes"])


if __name__ == "__main__":
    main()
