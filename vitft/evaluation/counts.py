"""The sums behind a score, as a metric of the `evaluate` library.

It is defined here, since `evaluate.load` fetches its code from the network; and in a module of its own, imported when
there is something to score, since `evaluate` imports what serves every other task.
"""

from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value


class Classification(evaluate.Metric):  # type: ignore[misc]
    """Accuracy, top-5, mean loss, F1 and the confusions of a classifier over C classes, of n images.

    `compute(references, predictions, found, losses, classes=C, known=K)` takes, each (n,), the true class, the best
    class, whether the true one is among the best five, and the loss, which counts for images of the first K classes.
    Precision and recall are 0 where nothing was predicted or nothing is true, and macro F1 is the mean over the classes
    that are true or predicted somewhere: scikit-learn's `f1_score` does both. Balanced accuracy is the mean recall
    over the classes that are true somewhere, as in scikit-learn. Confusions are `cells`, (k, 3): a true class, a
    predicted one, how many images, sorted; so memory is in proportion to images and classes, never to C x C.
    """

    def _info(self) -> Any:
        kinds = {"references": "int64", "predictions": "int64", "found": "bool", "losses": "float64"}
        return evaluate.MetricInfo(
            description="Scores of an image classifier.",
            citation="",
            inputs_description=self.__doc__,
            features=Features({name: Value(kind) for name, kind in kinds.items()}),
        )

    def _compute(
        self, predictions: Any, references: Any, found: Any, losses: Any, classes: int, known: int
    ) -> dict[str, Any]:  # fmt: skip
        best, truth = np.asarray(predictions), np.asarray(references)
        pairs, sizes = np.unique(truth * classes + best, return_counts=True)
        true, predicted = np.bincount(truth, minlength=classes), np.bincount(best, minlength=classes)
        hits = np.bincount(truth[truth == best], minlength=classes)
        f1 = 2 * hits / np.maximum(true + predicted, 1)
        recall = hits / np.maximum(true, 1)
        return {
            "correct": int(hits.sum()),
            "top5": float(np.mean(found)),
            "loss": float(np.mean(np.asarray(losses)[truth < known])),
            "macro_f1": float(f1[true + predicted > 0].mean()),
            "balanced_accuracy": float(recall[true > 0].mean()),
            "precision": hits / np.maximum(predicted, 1),
            "recall": recall,
            "f1": f1,
            "count": true,
            "cells": np.stack([pairs // classes, pairs % classes, sizes], axis=1),
        }
