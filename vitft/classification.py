"""The sums behind a score, as a metric of the `evaluate` library.

It is defined here, since `evaluate.load` fetches its code from the network; and in a room of its own, which
is entered when there is something to score, since `evaluate` imports what serves every other task.
"""

from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value


class Classification(evaluate.Metric):  # type: ignore[misc]
    """Accuracy, top-5, mean loss, F1 and confusion matrix of a classifier over C classes.

    `compute(references=(n,), predictions=(n, k), losses=(n,), classes=C)` takes the true classes, the
    k best classes of each image, best first, and the loss of each image. Top-5 looks at the k given.
    Precision and recall are 0 where nothing was predicted or nothing is true, and macro F1 is the
    mean over the classes that are true or predicted somewhere: scikit-learn's `f1_score` does both.
    """

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description="Scores of an image classifier.",
            citation="",
            inputs_description=self.__doc__,
            features=Features(predictions=List(Value("int64")), references=Value("int64"), losses=Value("float64")),
        )

    def _compute(
        self,
        predictions: list[list[int]],
        references: list[int],
        losses: list[float],
        classes: int,
    ) -> dict[str, Any]:
        top, truth = np.array(predictions), np.array(references)  # (n, k), (n,)
        cells = truth * classes + top[:, 0]
        matrix = np.bincount(cells, minlength=classes**2).reshape(classes, classes)
        hits, true, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
        f1 = 2 * hits / np.maximum(true + predicted, 1)
        return {
            "correct": int(hits.sum()),
            "top5": float((top == truth[:, None]).any(axis=1).mean()),
            "loss": float(np.mean(losses)),
            "macro_f1": float(f1[true + predicted > 0].mean()),
            "precision": (hits / np.maximum(predicted, 1)).tolist(),
            "recall": (hits / np.maximum(true, 1)).tolist(),
            "f1": f1.tolist(),
            "count": true.tolist(),
            "matrix": matrix.tolist(),
        }
