"""`vitft report`: everything that is known of a finished run on one page, which needs nothing else."""

import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from vitft.checkpoints.checkpoint import is_run, read_config
from vitft.config.train import TrainConfig, range_of
from vitft.data.sources.identity import is_streamed
from vitft.data.sources.schema import ROLES
from vitft.data.sources.source import DatasetLike, Source, source_of
from vitft.data.split_record import read_record, restore_splits
from vitft.errors import DataError, ModelError, UsageError, VitftError
from vitft.evaluation.calibration import Calibration, at_temperature, calibration, coverage_curve, describe
from vitft.evaluation.label_noise import DOUBTED_FROM, LabelNoise, noise_of
from vitft.evaluation.results import Results, read_results
from vitft.evaluation.split_predictions import Predictions
from vitft.io.atomic import write_text
from vitft.io.console import duration, percent, safe, without_secrets
from vitft.io.pages import shared_style
from vitft.io.paths import composed, expanded, is_url, shown
from vitft.reporting.charts import Axis, Line, chart
from vitft.reporting.looks import add_looks
from vitft.reporting.pictures import CROSSED, OF_A_CELL, Gallery, add_scored, add_training
from vitft.training.callbacks import recorded

FILE = "report.html"
CONFUSIONS = 40  # else so many of the most frequent ones are listed
LISTED = 200  # doubtful labels by name
_Progress = Callable[[int, int], None]


def write_report(
    run: Path | str, file: Path | str | None = None, *, dataset: DatasetLike | None = None,
    progress: _Progress = lambda done, count: None,
) -> Path:  # fmt: skip
    """Write the report of a finished run.

    Args:
        run: the run folder.
        file: where to write it; by default `report.html` in the run.
        dataset: where the dataset is now, or the object that was passed to `train`.
        progress: called with the number of pictures read and their total.

    Returns:
        The file.

    Raises:
        VitftError: with one line that says what is wrong: ModelError if the folder is no finished run.
    """
    run = expanded(run)
    file = run / FILE if file is None else expanded(file)
    if not is_run(run):
        raise ModelError(f"{run}: no run folder (no config.yaml and checkpoints/ in it); give the folder of a run.")
    results = read_results(run)
    if results is None:
        raise ModelError(
            f"{run}: has no results yet; finish it, or have them written: vitft train --resume {shlex.quote(str(run))}"
        )
    page = _environment().from_string(_text("report.html")).render(_facts(run, results, dataset, progress))
    try:
        write_text(file, page)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written: {error.strerror or error}; choose another.") from error
    return file


def _environment() -> Environment:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["percent"] = percent
    return environment


def _text(name: str) -> str:
    return files("vitft.reporting").joinpath(name).read_text(encoding="utf-8")


def _facts(run: Path, results: Results, dataset: DatasetLike | None, progress: _Progress) -> dict[str, Any]:
    """What the template shows."""
    config = read_config(run)
    split = "test" if "test" in results.splits else next(iter(results.splits), None)
    scores = results.splits.get(str(split), {})
    predictions = results.predictions(split) if split else None
    noise = None if predictions is None else noise_of(predictions)
    pictures, missing = _pictures(run, config, dataset, predictions, noise, progress)
    classes = [safe(row["label"]) for row in scores.get("per_class", ())]
    data, lines = _data(run, [row["label"] for row in scores.get("per_class", ())]), recorded(run)
    return {
        "name": safe(run.name), "style": shared_style() + _text("report.css"), "script": _text("report.js"),
        "config": config, "model": safe(Path(config.model).name), "dataset": safe(_readable(config.dataset)),
        "split": split, "scores": scores, "results": results, "others": _others(results, split),
        "classes": classes, "rows": scores.get("per_class", []), "crossed": len(classes) <= CROSSED,
        "confusion": _confusion(scores, classes), "pictures": pictures, "missing": missing,
        "of_a_cell": OF_A_CELL,
        "doubts": _doubts(predictions, noise), "charts": _charts(lines), "trust": _trust(predictions, scores),
        "data": data, "roles": [role for role in ROLES if role == split or role in data["counts"]],
        "speed": _speed(lines), "times": _times(results.seconds), "settings": _settings(config),
        "machine": _machine(run),
        "again": f"vitft train --recipe {shlex.quote(str(run / 'config.yaml'))}",
        "document": {"classes": classes, "images": pictures.images, "cells": pictures.cells},
    }  # fmt: skip


def _pictures(
    run: Path, config: TrainConfig, dataset: DatasetLike | None, predictions: Predictions | None,
    noise: LabelNoise | None, progress: _Progress,
) -> tuple[Gallery, str]:  # fmt: skip
    """The images to show, and why there are none. Images are found by what they are called, or by their content."""
    if predictions is None:
        return Gallery(), "there are too many images and classes to keep what was said of each"
    try:
        source = _source(config, dataset)
        record = read_record(run)
        splits = {} if record is None else restore_splits(record, source, moved=dataset is not None)
        if (split := splits.get(predictions.split)) is None:
            return Gallery(), "none of them is in the dataset any more"
        row_of = dict(zip(map(str, split.ids), split.rows.tolist(), strict=True))
        rows = source.splits[split.source]
        found = Gallery(config.max_pixels, range_of(config.value_range))
        if (train := splits.get("train")) is not None and not is_streamed(source.splits[train.source]):
            known = {composed(label): place for place, label in enumerate(predictions.labels + predictions.others)}
            class_of = np.array([known.get(composed(label), len(known)) for label in source.labels])
            add_training(found, source.splits[train.source], train, class_of[train.labels], len(known))
        add_scored(found, predictions, noise, [row_of.get(image) for image in predictions.ids], rows, progress)
        add_looks(found, rows, run)
        return found, ""
    except (VitftError, OSError) as error:
        return Gallery(), str(error)


def _source(config: TrainConfig, dataset: DatasetLike | None) -> Source:
    if isinstance(dataset, str | Path):
        config, dataset = config.model_copy(update={"dataset": str(dataset), "dataset_revision": None}), None
    if config.dataset is None and dataset is None:
        raise DataError("the dataset was loaded in Python")
    return source_of(config, dataset)


def _doubts(predictions: Predictions | None, noise: LabelNoise | None) -> dict[str, Any]:
    """The labels that may be wrong, the worst first. Empty where nothing can be said."""
    if predictions is None or noise is None:
        return {}
    rows = [
        {"name": safe(predictions.name(place)), "label": safe(predictions.class_name(predictions.truth[place])),
         "likely": safe(predictions.class_name(noise.likely[place])), "wrong": float(noise.wrong[place])}
        for place in noise.places()
    ]  # fmt: skip
    return {"rate": noise.rate, "from": DOUBTED_FROM, "rows": rows, "listed": rows[:LISTED]}


def _others(results: Results, split: str | None) -> list[dict[str, Any]]:
    return [{"split": name} | scores for name, scores in results.splits.items() if name != split]


def _confusion(scores: Mapping[str, Any], classes: list[str]) -> dict[str, Any]:
    """The matrix with the fraction of its row in each cell, or the most frequent confusions."""
    found = scores.get("confusion", {})
    if "matrix" in found:  # of an early version
        dense = np.array(found["matrix"], int)
        cells = [(int(i), int(j), int(dense[i, j])) for i, j in np.argwhere(dense)]
    else:
        cells = [(i, j, count) for i, j, count in found.get("cells", ())]
    if len(classes) <= CROSSED and cells:
        matrix = np.zeros((len(classes),) * 2, int)
        for i, j, count in cells:
            matrix[i, j] = count
        fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        return {"counts": matrix.tolist(), "fractions": fractions.round(4).tolist()}
    wrong = [cell for cell in cells if cell[0] != cell[1]]
    return {"worst": sorted(wrong, key=lambda cell: -cell[2])[:CONFUSIONS], "kinds": len(wrong)}


def _charts(lines: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Loss, accuracy and learning rate by epoch."""

    def line(split: str, name: str, kind: str) -> Line:
        found = (one for one in lines if one["split"] == split and name in one)
        return Line(split, [(float(one["epoch"]), float(one[name])) for one in found], kind)

    drawn = []
    for name, title, style in (("loss", "Loss", "plain"), ("accuracy", "Accuracy", "percent"),
                               ("lr", "Learning rate", "power")):  # fmt: skip
        both = [line("train", name, "two"), line("validation", name, "one")]
        svg = chart(both, Axis("epoch", low=0), Axis(title, style), f"{title} by epoch")
        drawn.append({"title": title, "svg": svg})
    return [one for one in drawn if one["svg"]]


def _trust(predictions: Predictions | None, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Reliability before and at the temperature, and accuracy by coverage."""
    if predictions is None or not len(predictions.truth):
        return {}
    temperature = scores.get("calibration", {}).get("temperature")
    lines = [
        Line("perfect", [(0.0, 0.0), (1.0, 1.0)], "faint"),
        _reliability("as it is", calibration(predictions), "two"),
    ]
    if temperature is not None:
        after = calibration(at_temperature(predictions, temperature))
        lines.append(_reliability(f"at temperature {temperature:.2f}", after, "one"))
    confidence = Axis("confidence", "percent", low=0, high=1)
    accuracy = Axis("accuracy", "percent", low=0, high=1)
    curve = [(one.coverage, one.accuracy) for one in coverage_curve(predictions)]
    return {
        "said": scores.get("calibration") or describe(predictions, None),
        "reliability": chart(lines, confidence, accuracy, "Accuracy by confidence"),
        "coverage": chart(
            [Line("accuracy", curve)], Axis("images decided, surest first", "percent", low=0, high=1),
            Axis("accuracy", "percent"), "Accuracy by coverage",
        ),
    }  # fmt: skip


def _reliability(name: str, found: Calibration, kind: str) -> Line:
    return Line(name, [(one.confidence, one.accuracy) for one in found.bins], kind)


def _data(run: Path, names: Sequence[str]) -> dict[str, Any]:
    """What the run recorded of its data: splits, images by class, how it was read, what was left out.

    `counts` has of each class, by its number in `names`, the images in each split. Runs of early versions lack some.
    """
    try:
        document = json.loads((run / "splits.json").read_text(encoding="utf-8"))
        splits = [{"role": role, "source": safe(str(one["source"])), "count": int(one["count"]),
                   "hash": str(one["hash"]),
                   "skipped": [(safe(str(name)), safe(str(why))) for name, why in one.get("skipped", ())]}
                  for role, one in document["splits"].items()]  # fmt: skip
        labels = {composed(label): place for place, label in enumerate(document["labels"])}
        of_class = {
            role: list(map(int, one["classes"])) for role, one in document["splits"].items() if "classes" in one
        }
        same = list(document["labels"]) == list(names)  # also where two classes share a name, as in ImageNet
        places = range(len(names)) if same else [labels.get(composed(name)) for name in names]
        taken = Counter[str]()
        for one in splits:
            taken[one["source"]] += one["count"]
        unused = [(safe(name), count - taken[safe(name)], count) for name, count in document.get("images", {}).items()]
        return {
            "splits": splits, "counts": {role: [0 if place is None else int(found[place]) for place in places]
                                          for role, found in of_class.items()},
            "unused": [one for one in unused if one[1] > 0],
            "decisions": [_sentence(text) for text in document.get("decisions", ())],
            "warnings": [_sentence(text) for text in document.get("warnings", ())],
        }  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return {"splits": [], "counts": {}, "unused": [], "decisions": [], "warnings": []}


def _sentence(text: object) -> str:
    """A sentence of those who read the data, without what is private."""
    return safe(without_secrets(str(text))).replace(f"{expanded('~')}/", "~/")


def _speed(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The median speed, and the median fraction of the time spent waiting for input."""
    trained = [line for line in lines if line["split"] == "train" and "images_per_s" in line]
    if not trained:
        return {}
    names = ("images_per_s", "data_wait")
    return {name: float(np.median([line[name] for line in trained if name in line])) for name in names}


_PHASES = {
    "opening": "opening and decoding", "tuning": "trying out settings", "head": "fitting the head",
    "steps": "steps", "data_wait": "waiting for data", "validation": "validation", "saving": "saving",
    "scoring": "final scores", "other": "everything else",
}  # fmt: skip


def _times(seconds: Mapping[str, float]) -> dict[str, Any]:
    """The phases that took time, with their share of all of it. Empty for runs of early versions."""
    total = sum(seconds.values())
    if not total:
        return {}
    parts = [
        {"kind": name, "title": _PHASES.get(name, safe(name)), "share": took / total, "took": duration(took)}
        for name, took in seconds.items() if round(took, 1) > 0
    ]  # fmt: skip
    return {"total": duration(total), "parts": parts}


def _settings(config: TrainConfig) -> list[tuple[str, str]]:
    """What differs from the defaults."""
    fields = TrainConfig.model_fields
    changed = ((name, getattr(config, name)) for name in fields if getattr(config, name) != fields[name].default)
    return [(name, safe(_readable(value))) for name, value in changed]


def _readable(value: object) -> str:
    """A setting, with a path or URL as it may be seen."""
    text = without_secrets(str(value))
    return shown(Path(text)) if "/" in text and not is_url(text) else text


def _machine(run: Path) -> list[tuple[str, str]]:
    try:
        found = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        hardware, versions = found["hardware"], found["versions"]
        rows = [(name, str(versions[name])) for name in versions]
        gpus = ", ".join(hardware.get("gpus") or ()) or "none"
        return [("processor", f"{hardware['cpu']}, {hardware['cores']} cores"), ("GPU", gpus), *rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
