"""What a model said about every image of a split, in a parquet file: for reports, calibration and your own analysis."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitft.errors import ModelError, UsageError, first_line
from vitft.io.atomic import new_file

LARGEST = 2**26
"""Up to so many numbers, images times classes, probabilities are kept: 268 MB."""
_FACTS = b"vitft"


@dataclass(frozen=True)
class Predictions:
    """The probabilities of n images of one split, in its order, for the K classes of the model.

    `truth` has class numbers: those of `labels`, and after them those of `others`, classes that the model does not
    have. `ids` are paths relative to the dataset, or hashes of the images' content, and `rows` the row numbers in the
    dataset's split `source`, as `data check` has them.
    """

    split: str
    hash: str
    source: str
    labels: tuple[str, ...]
    others: tuple[str, ...]
    ids: tuple[str, ...]
    rows: NDArray[np.int64]
    truth: NDArray[np.int64]
    probabilities: NDArray[np.float32]  # (n, K)

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each image, of equals the first: (n,). See `most_probable`."""
        best: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return best

    @cached_property
    def confidence(self) -> NDArray[np.float32]:
        """The probability of that class: (n,)."""
        return self.probabilities[np.arange(len(self.truth)), self.predicted]

    def mistakes(self) -> NDArray[np.int64]:
        """The positions of misclassified images, those that the model was surest of first."""
        wrong = np.flatnonzero(self.predicted != self.truth)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]

    def name(self, place: int) -> str:
        """What to call an image: its path, or its row where images have none."""
        image = self.ids[place]
        return f"row {self.rows[place]}" if re.fullmatch("[0-9a-f]{16}", image) else image

    def class_name(self, number: int) -> str:
        """The name of a class of the model or of the images."""
        return (self.labels + self.others)[number]

    def write(self, file: Path) -> None:
        """Write them, with columns id, row, label, predicted, confidence and probabilities."""
        names = np.array([*self.labels, *self.others], object)
        table = pa.table(
            {
                "id": pa.array(self.ids, pa.string()),
                "row": pa.array(self.rows, pa.int64()),
                "label": pa.array(names[self.truth], pa.string()),
                "predicted": pa.array(names[self.predicted], pa.string()),
                "confidence": pa.array(self.confidence, pa.float32()),
                "probabilities": pa.FixedSizeListArray.from_arrays(
                    pa.array(self.probabilities.ravel(), pa.float32()), len(self.labels)
                ),
            }
        )
        facts = {"split": self.split, "hash": self.hash, "source": self.source, "labels": self.labels,
                 "others": self.others, "truth": self.truth.tolist()}  # fmt: skip
        with new_file(file) as temporary:
            pq.write_table(
                table.replace_schema_metadata({_FACTS: json.dumps(facts).encode()}), temporary, compression="zstd"
            )

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what `write` wrote. Raises ModelError."""
        try:
            table = pq.read_table(file)
            facts = json.loads(table.schema.metadata[_FACTS])
            labels = tuple(facts["labels"])
            probabilities = table["probabilities"].combine_chunks().flatten().to_numpy().reshape(-1, len(labels))
            return cls(
                str(facts["split"]), str(facts["hash"]), str(facts["source"]), labels, tuple(facts["others"]),
                tuple(table["id"].to_pylist()), table["row"].to_numpy(), np.array(facts["truth"], np.int64),
                probabilities,
            )  # fmt: skip
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file}: no predictions that vitft wrote ({first_line(error)}).") from error


def most_probable(probabilities: Tensor, count: int) -> Tensor:
    """The classes with the highest of probabilities (..., K), best first: (..., count).

    Of equals, which bf16 logits often are, the first comes first, as in `argmax`; the order of `topk` is undefined.
    """
    if probabilities.device.type == "mps":  # Apple's GPUs order few types
        return probabilities.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    # The bits of numbers that are not negative are in their order; no two classes have the same key.
    bits = probabilities.float().contiguous().view(torch.int32).long()
    keys = (bits << 32) - torch.arange(probabilities.shape[-1], device=probabilities.device)
    return keys.topk(count, dim=-1).indices


def require(found: "Predictions | None") -> Predictions:
    """The predictions. Raises UsageError if they were too many to keep."""
    if found is None:
        raise UsageError(f"images times classes are over {LARGEST:,}: too many to keep every probability.")
    return found


def of_split(
    split: Any, truth: NDArray[np.int64], probabilities: NDArray[np.float32], labels: Any, others: Any
) -> Predictions:  # fmt: skip
    """The predictions for a `Split`, whose classes the model numbers as `truth` does."""
    ids = tuple(map(str, split.ids))
    return Predictions(
        split.name, split.hash, split.source, tuple(labels), tuple(others), ids, split.numbers, truth, probabilities
    )
