"""What the commands do once their options are read: call a room, show what it gives."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from vitft import console
from vitft.errors import DataError, UsageError


def train(
    recipe: str | None, output: Path | None, overwrite: bool, resume: Path | None, dry_run: bool,
    overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Train, resume, or say what training would do."""
    if resume is not None:
        if recipe is not None or output is not None or overwrite or dry_run:
            raise UsageError(
                "--resume goes on with a run as it is; leave --recipe, --output, --overwrite, --dry-run out."
            )
        from vitft import trainer

        console.say_text(console.training_report(trainer.resume(resume, overrides)))
        return
    from vitft.config import named_dataset
    from vitft.recipe import load_config

    config = load_config(recipe, overrides)
    named_dataset(config)  # said before torch is loaded
    if dry_run:
        from vitft.plan import plan

        console.say(console.plan_report(plan(config, output, overwrite)))
        return
    from vitft import trainer

    console.say_text(console.training_report(trainer.train(config, output=output, overwrite=overwrite)))


def evaluate(checkpoint: str, options: dict[str, Any], plot: Path | None, as_json: bool) -> None:
    """Score a checkpoint and show the report."""
    from vitft.evaluation import evaluate as score

    _writable(plot)
    with console.working("evaluating") as progress:
        metrics = score(checkpoint, **options, progress=progress, report_skipped=_report_skipped)
    if plot is not None:
        from vitft.figures import plot_confusion

        plot_confusion(metrics, plot)
        console.note(f"confusion matrix: {plot}")
    console.say_json(metrics.to_dict()) if as_json else console.say(console.metrics_report(metrics))


def predict(paths: list[str], checkpoint: str, top_k: int, device: str, max_pixels: int | None, form: str) -> None:
    """Classify images and show the rows; an unreadable image makes it exit code 3."""
    from vitft.prediction import predict as classify

    limit = {} if max_pixels is None else {"max_pixels": max_pixels}
    rows = classify(paths, checkpoint, top_k=top_k, device=device, **limit)
    match form:
        case "json":
            console.say_json({"predictions": [row.to_dict() for row in rows]})
        case "jsonl":
            console.say_text("".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows))
        case "csv":
            console.say_text(_csv(rows, top_k))
        case _:
            console.say(console.predictions_report(rows))
    bad = [row for row in rows if row.error is not None]
    if bad:
        first = f"the first is {bad[0].path}: {bad[0].error}"
        raise DataError(f"{len(bad)} of {len(rows)} images could not be read; {first}")


def data_info(dataset: str, options: dict[str, Any], preview: Path | None, as_json: bool) -> None:
    """Describe a data set."""
    from vitft.data.info import describe
    from vitft.data.sources import open_source

    _writable(preview)
    source = open_source(dataset, **options)
    if preview is not None:
        from vitft.data.preview import preview as draw

        draw(source, preview)
        console.note(f"preview: {preview}")
    described = describe(source)
    console.say_json(described) if as_json else console.say(console.data_report(described))


def _report_skipped(skipped: list[Any]) -> None:
    for one in skipped:
        console.warn(f"skipped {one.name}: {one.reason}")


def _writable(picture: Path | None) -> None:
    """A picture's path is checked before the work, not after. Raises UsageError."""
    if picture is not None and (picture.suffix.lower() != ".png" or not picture.parent.is_dir()):
        raise UsageError(f"{picture}: give a .png file in a folder that exists.")


def _csv(rows: list[Any], top_k: int) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", *(f"{name}_{k}" for k in range(1, top_k + 1) for name in ("label", "score")), "error"])
    for row in rows:
        cells = [cell for label, score in row.top for cell in (label, f"{score:.6f}")]
        writer.writerow([row.path, *cells, *[""] * (2 * top_k - len(cells)), row.error or ""])
    return text.getvalue()
