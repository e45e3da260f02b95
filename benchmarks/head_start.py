"""What the start of a new head costs, beside an epoch of training; and its fit beside scikit-learn's.

python benchmarks/head_start.py --dataset CIFAR10_FOLDER --model VIT_S14_FOLDER --image-size 98 [--rounds 3]

In turns: features of the training images, the fit, the same fit by scikit-learn (the same penalties, the same held-out
fifth, also started from the last), and as many steps as an epoch has, or --steps of them, scaled. The least of all
rounds counts: other programs only add to it.
"""

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from vitft.config.train import TrainConfig
from vitft.hardware.device import make_accelerator, resolve_auto, threads
from vitft.models.features import backbone
from vitft.models.head_init import fit_head
from vitft.models.logistic import STRENGTHS, location_and_scale
from vitft.training.linear_probe import read_features
from vitft.training.setup import prepare
from vitft.training.step import Learner


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="as for `vitft train`")
    parser.add_argument("--model", default="vit-micro", help="as for `vitft train`")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--held-out", type=int, default=1000, help="other training images that score the fits")
    parser.add_argument("--steps", type=int, default=20, help="steps of training that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    config = resolve_auto(TrainConfig.parse({
        "dataset": given.dataset, "model": given.model, "image_size": given.image_size, "epochs": 1, "skip_test": True,
        "max_train_samples": given.images + given.held_out, "val_fraction": 0.0, "head_init": "features",
    }, "flags"))  # fmt: skip
    learner = Learner(make_accelerator(config), prepare(config).decode())
    loader, classes = learner.loader, learner.unwrapped.config.num_labels
    order = np.random.default_rng(0).permutation(len(loader.labels))
    train, held_out = order[: -given.held_out], order[-given.held_out :]

    def features(positions: Any) -> Tensor:
        learner.unwrapped.eval()
        read = backbone(learner.unwrapped, config.device, config.precision)
        return read_features(
            loader, read, config, positions, mirror=False, gather=lambda parts: parts, progress=lambda done, count: None
        )  # fmt: skip

    labels = loader.labels[torch.from_numpy(train)]
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, what: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        done = what()
        seconds[name].append(time.perf_counter() - start)
        return done

    def steps() -> None:
        for step in range(given.steps):
            learner.step(step)

    with threads(config.threads):
        others = features(held_out)
        others_labels = loader.labels[torch.from_numpy(held_out)]
        score = {}
        for _ in range(given.rounds):
            read = timed("features", lambda: features(train))
            fit = timed("fit", lambda read=read: fit_head(read, labels, classes))
            score.setdefault("fit", right(others @ fit.weight.T + fit.bias, others_labels))
            predict = timed("scikit-learn", lambda read=read: sklearn_fit(read, labels))
            score.setdefault("scikit-learn", right(predict(others), others_labels))
            timed("steps", steps)
    least = {name: min(values) for name, values in seconds.items()}
    epoch = least["steps"] * (len(train) / config.batch_size) / given.steps
    print(f"{len(train):,} images, {classes} classes, {config.precision}, the least of {given.rounds} rounds:")
    share = least["features"] / epoch
    print(f"features {least['features']:.1f} s, {100 * share:.0f} % of an epoch of training, {epoch:.1f} s")
    for name in ("fit", "scikit-learn"):
        print(f"{name}: {least[name]:.2f} s, {100 * score[name]:.1f} % of {len(held_out):,} other images right")


def sklearn_fit(features: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """As `fit_head`, with scikit-learn's logistic regression: it does not penalize the bias."""
    mean, scale = location_and_scale(features)
    scaled, targets = ((features - mean) / scale).numpy(), labels.numpy()
    held_out = len(targets) // 5
    lowest, chosen = math.inf, STRENGTHS[0]
    for strength in STRENGTHS:
        model = LogisticRegression(C=1 / (strength * (len(targets) - held_out)), max_iter=1000)
        model.fit(scaled[held_out:], targets[held_out:])
        logits = torch.from_numpy(model.decision_function(scaled[:held_out])).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[:held_out]).item()
        if loss >= lowest:
            break
        lowest, chosen = loss, strength
    model = LogisticRegression(C=1 / (chosen * len(targets)), max_iter=1000).fit(scaled, targets)
    return lambda others: torch.from_numpy(model.decision_function(((others - mean) / scale).numpy()))


def right(logits: Tensor, labels: Tensor) -> float:
    """The fraction of logits (N, C) whose largest is that of the label."""
    return (logits.argmax(dim=1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
