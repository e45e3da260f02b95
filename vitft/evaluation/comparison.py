"""Is one run better than another? Paired tests on the same images, and what changed for each class."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import binomtest

from vitft.checkpoints.checkpoint import is_run, read_config
from vitft.config.train import TrainConfig
from vitft.errors import DataError, ModelError, UsageError
from vitft.evaluation.results import read_results
from vitft.evaluation.split_predictions import Predictions
from vitft.io.paths import expanded

RESAMPLES = 2000
_Z = 1.96  # of 95 %


@dataclass(frozen=True)
class Difference:
    """A difference of a metric, as fractions, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A run beside the first one, on the same images.

    `gained` images are right only in this run, `lost` ones only in the first. `p` is the probability of so uneven a
    pair, or a more uneven one, if both runs were equally good: the exact test of McNemar (1947).
    """

    run: str
    accuracy: float
    macro_f1: float
    gained: int
    lost: int
    p: float
    difference: Difference
    f1_difference: Difference
    recalls: dict[str, float]  # difference of the recall of each class


@dataclass(frozen=True)
class Compared:
    """Runs beside the first: what was compared on, the first one's scores, the others, and the settings that differ.

    `groups` joins runs that differ only in their seed: their number, and the mean and standard deviation of accuracy.
    """

    split: str
    hash: str
    images: int
    first: str
    accuracy: float
    macro_f1: float
    others: tuple[Comparison, ...]
    settings: dict[str, list[Any]]  # of each setting that differs, the value of every run
    groups: tuple[tuple[tuple[str, ...], float, float | None], ...]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        groups = [{"runs": list(runs), "mean": mean, "spread": spread} for runs, mean, spread in self.groups]
        return asdict(self) | {"others": [asdict(one) for one in self.others], "groups": groups}


def compare(runs: Sequence[str | Path], *, split: str | None = None, seed: int = 0) -> Compared:
    """Compare finished runs on the images of a split, which must be the same for all.

    Args:
        runs: run folders; the others are compared with the first.
        split: test or validation; by default test if all have it, else validation.
        seed: of the bootstrap.

    Raises:
        VitftError: with one line that says what is wrong: DataError if the runs were scored on other images.
    """
    if len(runs) < 2:
        raise UsageError("compare needs at least two runs; give their folders.")
    folders = [expanded(run) for run in runs]
    if twice := next((run for number, run in enumerate(folders) if run in folders[:number]), None):
        raise UsageError(f"{twice}: is given twice; give different runs.")
    read = [_read(run, split, folders) for run in folders]
    first, *others = read
    for run, one in zip(folders[1:], others, strict=True):
        if one.hash != first.hash:
            raise DataError(
                f"{run} was scored on other {one.split} images than {folders[0]} (split {one.hash}, not {first.hash}), "
                "so they cannot be compared; train both with the same data, --split-seed and fractions."
            )
        if one.labels != first.labels:
            raise DataError(f"{run} and {folders[0]} have other classes; their scores cannot be compared.")
    configs = [read_config(run) for run in folders]
    names = [str(run) for run in folders]
    return Compared(
        first.split, first.hash, len(first.truth), names[0], _accuracy(first), macro_f1(first.truth, first.predicted),
        tuple(_beside(name, one, first, seed) for name, one in zip(names[1:], others, strict=True)),
        _differing(configs), _groups(names, configs, [_accuracy(one) for one in read]),
    )  # fmt: skip


def _read(run: Path, split: str | None, runs: Sequence[Path]) -> Predictions:
    if not is_run(run):
        raise ModelError(f"{run}: no run folder (no config.yaml and checkpoints/ in it); give the folder of a run.")
    results = read_results(run)
    if results is None:
        raise ModelError(f"{run}: has no results yet; finish it with vitft train --resume, which writes them.")
    if split is None:
        every = [set(found.splits) for one in runs if (found := read_results(one)) is not None]
        split = "test" if all("test" in names for names in every) else "validation"
    if split not in results.splits:
        raise UsageError(f"split {split}: {run} was scored on {', '.join(results.splits) or 'nothing'}.")
    said = results.predictions(split)
    if said is None:
        raise ModelError(f"{run}: there is no predictions-{split}.parquet in it; vitft train --resume writes it again.")
    return said


def _beside(name: str, one: Predictions, first: Predictions, seed: int) -> Comparison:
    truth = first.truth
    right, before = one.predicted == truth, first.predicted == truth
    gained, lost = int((right & ~before).sum()), int((before & ~right).sum())
    labels = first.labels + first.others
    counts = np.bincount(truth, minlength=len(labels))
    recalls = {
        label: float((right[truth == number].sum() - before[truth == number].sum()) / counts[number])
        for number, label in enumerate(labels) if counts[number]
    }  # fmt: skip
    return Comparison(
        name, _accuracy(one), macro_f1(truth, one.predicted), gained, lost, mcnemar(gained, lost),
        paired_difference(gained, lost, len(truth)),
        bootstrap_f1(truth, one.predicted, first.predicted, seed), recalls,
    )  # fmt: skip


def _accuracy(one: Predictions) -> float:
    return float((one.predicted == one.truth).mean())


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p-value of the exact test of McNemar (1947): of `gained + lost` fair coins, so many are heads."""
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def paired_difference(gained: int, lost: int, count: int) -> Difference:
    """The difference of two accuracies on the same images, with the interval of Agresti and Min (2005).

    It is Wald's, with half an image added to each of the four counts, which keeps its coverage for few images.
    """
    value = (gained - lost) / count
    b, c, n = gained + 0.5, lost + 0.5, count + 2
    middle, error = (b - c) / n, sqrt(max(b + c - (b - c) ** 2 / n, 0)) / n
    return Difference(value, middle - _Z * error, middle + _Z * error)


def macro_f1(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """The mean F1 of the classes that are true or predicted somewhere."""
    return float(_macro_f1(truth, predicted, np.ones((1, len(truth))))[0])


def _macro_f1(truth: NDArray[np.int64], predicted: NDArray[np.int64], times: NDArray[Any]) -> NDArray[np.float64]:
    """Macro F1 of R draws, (R,), in which each of n images occurs so many `times`, (R, n)."""
    classes, rows = 1 + int(max(truth.max(), predicted.max())), np.arange(len(truth))

    def counts(labels: NDArray[np.int64], which: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        weight = np.ones(len(truth)) if which is None else which.astype(float)
        summed: NDArray[np.float64] = (csr_array((weight, (labels, rows)), (classes, len(truth))) @ times.T).T
        return summed

    both = counts(truth) + counts(predicted)
    f1 = 2 * counts(truth, truth == predicted) / np.maximum(both, 1)
    mean: NDArray[np.float64] = f1.sum(axis=1) / np.maximum((both > 0).sum(axis=1), 1)
    return mean


def bootstrap_f1(
    truth: NDArray[np.int64], one: NDArray[np.int64], other: NDArray[np.int64], seed: int = 0
) -> Difference:  # fmt: skip
    """The difference in macro F1 of two classifiers on the same n images, with its 95 % bootstrap interval.

    Images are drawn with replacement, the same ones for both (Efron 1979, percentiles). Images with the same class and
    the same two answers are alike, so how often each kind is drawn is multinomial.
    """
    (of, said, before), counts = np.unique(np.stack([truth, one, other]), axis=1, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), RESAMPLES)
    drawn = _macro_f1(of, said, draws) - _macro_f1(of, before, draws)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Difference(macro_f1(truth, one) - macro_f1(truth, other), float(low), float(high))


def _differing(configs: Sequence[TrainConfig]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, apart from what does not change the result."""
    found = {}
    for name in TrainConfig.model_fields:
        values = [getattr(config, name) for config in configs]
        if not _changeable(name) and any(value != values[0] for value in values):
            found[name] = values
    return found


def _changeable(name: str) -> bool:
    extra = TrainConfig.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return bool(extra["changeable"])


def _groups(
    names: Sequence[str], configs: Sequence[TrainConfig], accuracies: Sequence[float]
) -> tuple[tuple[tuple[str, ...], float, float | None], ...]:
    """Runs whose settings differ at most in the seed, with mean and standard deviation; none if all stand alone."""
    together: dict[str, list[int]] = {}
    same = [name for name in TrainConfig.model_fields if name != "seed" and not _changeable(name)]
    for number, config in enumerate(configs):
        together.setdefault(config.model_dump_json(include={*same}), []).append(number)
    if all(len(group) == 1 for group in together.values()):
        return ()
    return tuple(
        (
            tuple(names[number] for number in group),
            float(np.mean([accuracies[number] for number in group])),
            float(np.std([accuracies[number] for number in group], ddof=1)) if len(group) > 1 else None,
        )
        for group in together.values()
    )
