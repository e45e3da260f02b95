"""How many planted label errors `vitft data doubt` finds, and how many of those that it lists are such.

    python benchmarks/doubt.py CIFAR10_FOLDER VIT_S14_FOLDER --image-size 98 --images 4000 --rate 0.05 --seeds 5

The labels of a fraction of the training images are replaced by other ones, drawn from the seed. Real errors of the
dataset count as false alarms. The features are read once. --cleanlab adds what cleanlab (pip install cleanlab) lists at
its defaults, by the same probabilities.
"""

import argparse
import time

import numpy as np
import torch
from scipy.special import softmax

from vitft.config.train import TrainConfig
from vitft.evaluation.label_noise import label_noise
from vitft.hardware.device import resolve_auto, threads
from vitft.probing.classifiers import Examples
from vitft.probing.doubt import FOLDS, _out_of_fold
from vitft.probing.probe import examples
from vitft.training.setup import prepare


def main() -> None:
    """Measure, and print a row for each rate, seed and probability from which labels are listed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("model")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rate", type=float, nargs="+", default=[0.05])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folds", type=int, default=FOLDS)
    parser.add_argument("--cleanlab", action="store_true")
    parser.add_argument("--features", help="a file to keep the features in, or to read them from")
    given = parser.parse_args()
    known = features(given)
    classes = int(known.labels.max()) + 1
    truth = known.labels.numpy()
    print("rate, seed, estimated rate, from, listed, found, precision, s")
    for rate in given.rate:
        for seed in range(given.seeds):
            rng = np.random.default_rng(seed)
            planted = rng.random(len(truth)) < rate
            labels = np.where(planted, (truth + rng.integers(1, classes, len(truth))) % classes, truth)
            started = time.perf_counter()
            logits = _out_of_fold(Examples(known.features, torch.from_numpy(labels)), classes, given.folds, seed)
            noise = label_noise(logits, labels)
            seconds = time.perf_counter() - started
            found_by = {bound: noise.wrong >= bound for bound in (0.5, 0.3)}
            if given.cleanlab:
                from cleanlab.filter import find_label_issues

                found_by["cleanlab"] = find_label_issues(labels, softmax(logits, axis=1))
            for bound, listed in found_by.items():
                hits = int((planted & listed).sum())
                found, precision = hits / max(1, planted.sum()), hits / max(1, listed.sum())
                row = (f"{rate:g}", seed, f"{noise.rate:.3f}", bound, listed.sum(), f"{found:.1%}", f"{precision:.1%}")
                print(*row, f"{seconds:.0f}", sep=", ")


def features(given: argparse.Namespace) -> Examples:
    """The features and labels of the images, read once."""
    try:
        return Examples(*torch.load(given.features))
    except (TypeError, AttributeError, FileNotFoundError):
        pass
    config = TrainConfig(
        dataset=given.dataset, model=given.model, image_size=given.image_size, max_train_samples=given.images,
        val_fraction=0, skip_test=True, augment="none",
    )  # fmt: skip
    prepared = prepare(resolve_auto(config))
    with threads(prepared.config.threads):
        known, _ = examples(prepared.decode(), "train")
    if given.features:
        torch.save((known.features, known.labels), given.features)
    return known


if __name__ == "__main__":
    main()
