"""What commands do once their options are parsed: call the package, and show the result."""

import csv
import io
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitft.cli import tables
from vitft.errors import DataError, TrainingError, UsageError, as_flag
from vitft.io import console
from vitft.io.paths import expanded


def train(
    recipe: str | None, output: Path | None, overwrite: bool, resume: Path | None, dry_run: bool,
    overrides: dict[str, Any],
) -> None:  # fmt: skip
    """Train, resume, or plan a run."""
    if resume is not None:
        if recipe is not None or output is not None or overwrite or dry_run:
            raise UsageError("--resume continues a run as it is; leave out --recipe, --output, --overwrite, --dry-run.")
        with _loading():
            from vitft.training import trainer

        console.say_text(tables.training_report(trainer.resume(resume, overrides)))
        return
    from vitft.config.recipe import load_config
    from vitft.config.train import require_dataset

    config = load_config(recipe, overrides)
    require_dataset(config)  # before torch is loaded
    if dry_run:
        with _loading():
            from vitft.training.dry_run import plan

        console.say(tables.plan_report(plan(config, output, overwrite)))
        return
    with _loading():
        from vitft.training import trainer

    console.say_text(tables.training_report(trainer.train(config, output=output, overwrite=overwrite)))


def evaluate(checkpoint: str, options: dict[str, Any], plot: Path | None, as_json: bool) -> None:
    """Evaluate a checkpoint and show the report."""
    _writable(plot)
    with _loading():
        from vitft.evaluation.evaluation import evaluate as score

    with console.working("evaluating") as progress:
        metrics = score(checkpoint, **options, progress=progress, report_skipped=_report_skipped)
    if plot is not None:
        from vitft.evaluation.plots import plot_confusion

        plot_confusion(metrics, plot)
        console.note(f"confusion matrix: {plot}")
    console.say_json(metrics.to_dict()) if as_json else console.say(tables.metrics_report(metrics))


def verify_resume(recipe: str, overrides: dict[str, Any], kills: int, seed: int, as_json: bool) -> None:
    """Train, kill, resume, compare, and show the verdict. Raises TrainingError if anything differs."""
    import tempfile

    from vitft.config.recipe import load_config
    from vitft.training.verify_resume import verify_resume

    config = load_config(recipe, overrides)
    with tempfile.TemporaryDirectory() as work:
        verdict = verify_resume(config, Path(work), kills=kills, seed=seed, say=console.note)
    same = "the same bits" if verdict.equal else "DIFFERENT WEIGHTS OR LOSSES"
    left = f"; left or missing: {', '.join(verdict.left)}" if verdict.left else ""
    if as_json:
        console.say_json(asdict(verdict) | {"repeated": verdict.repeated})
    else:
        console.say_text(
            f"kills: {len(verdict.kills)} of {kills}, in a run of {verdict.steps} steps; {same} as without "
            f"interruption; steps repeated after a kill: at most {verdict.repeated}{left}\n"
        )
    if not verdict.equal or verdict.left:
        raise TrainingError("the resumed run differs from the uninterrupted one; please report this with the recipe.")


def bench(what: Any, settings: dict[str, Any], steps: int, as_json: bool) -> None:
    """Measure this machine and show the figures."""
    with _loading():
        from vitft.training.bench import bench as measured

    found = measured(what, settings, steps)
    console.say_json(found) if as_json else console.say(tables.bench_report(found))


def predict(
    paths: list[str], checkpoint: str, top_k: int, device: str, limits: dict[str, Any], form: str
) -> None:  # fmt: skip
    """Classify images and show the rows; an unreadable image makes it exit code 3."""
    with _loading():
        from vitft.evaluation.prediction import predict as classify

    given = {name: value for name, value in limits.items() if value is not None}
    rows = classify(paths, checkpoint, top_k=top_k, device=device, **given)
    match form:
        case "json":
            console.say_json({"predictions": [row.to_dict() for row in rows]})
        case "jsonl":
            console.say_text("".join(console.json_text(row.to_dict()) + "\n" for row in rows))
        case "csv":
            console.say_text(_csv(rows, top_k))
        case _:
            console.say(tables.predictions_report(rows))
    bad = [row for row in rows if row.error is not None]
    if bad:
        first = f"the first is {bad[0].path}: {bad[0].error}"
        raise DataError(f"{len(bad)} of {len(rows)} images could not be read; {first}")


def scratch_train(recipe: str | None, output: Path | None, as_json: bool, overrides: dict[str, Any]) -> None:
    """Train a textbook network, or the scalar one, and show the result."""
    from vitft.config.recipe import SCALAR

    if recipe == SCALAR:
        _scratch_train_scalar(output, as_json, overrides)
        return
    from vitft.scratch_runner.config import load_config

    name, config = load_config(recipe, overrides)
    if config.engine == "numpy":
        # Its two threads share the work; two more of BLAS in each wait for one another (on a busy machine a step of
        # cifar10-patch4 then took 10 times as long). NumPy reads this when it is first imported: below.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from vitft.scratch_runner.report import run_report
    from vitft.scratch_runner.training import train

    result = train(config, output=output, name=name)
    if as_json:
        console.say_json({"run": str(result.run)} | result.summary)
    else:
        console.say_text(run_report(result.run, result.summary))


def scratch_figures(folder: Path) -> None:
    """Draw the textbook's figures."""
    from vitft.scratch_runner.figures import draw_figures

    try:
        written = draw_figures(expanded(folder))
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror or error}; choose another folder.") from error
    console.note(f"{len(written)} figures in {folder}")


def _scratch_train_scalar(output: Path | None, as_json: bool, overrides: dict[str, Any]) -> None:
    if output is not None or (others := [name for name in overrides if name != "seed"]):
        wrong = "--output" if output is not None else as_flag(others[0])
        raise UsageError(f"scalar has its own task and sizes, and writes no files; leave out {wrong}.")
    from vitft.scratch_runner.report import scalar_document, scalar_tables, train_scalar

    report = train_scalar(**overrides)
    console.say_json(scalar_document(report)) if as_json else console.say(scalar_tables(report))


def explain_sizes(given: dict[str, Any], batch_size: int, all_blocks: bool, as_json: bool) -> None:
    """Show a ViT's stages, or a tour if no model and no size is given."""
    from vitft.explain.table import document, resolve_spec, stage_table
    from vitft.explain.tour import next_steps, tour

    spec = resolve_spec(**given)
    if as_json:
        console.say_json(document(spec, batch_size))
    elif given:
        console.say(stage_table(spec, batch_size, all_blocks))
    else:
        for part in (tour(spec), stage_table(spec, batch_size, all_blocks), next_steps()):
            console.say(part)


def explain_image(
    image: Path | None, checkpoint: str | None, stage: str | None, folder: Path | None, page: Path | None,
    as_json: bool, others: list[str],
) -> None:  # fmt: skip
    """Follow an image through a checkpoint: a table, a stage, pictures, a page. `others`: flags that do not fit."""
    if image is None:
        option = next(name for name, given in (("--stage", stage), ("--attention", folder), ("--html", page),
                                               ("--checkpoint", checkpoint)) if given is not None)  # fmt: skip
        raise UsageError(f"{option} needs an image; add --image FILE.")
    if others:
        raise UsageError(
            f"{as_flag(others[0])} sets sizes of the table without --image; with an image, use --checkpoint."
        )
    with _loading():
        from vitft.explain.attention import draw_attention
        from vitft.explain.page import write_page
        from vitft.explain.stage import find_lessons, lesson_text
        from vitft.explain.trace import document, trace_image, trace_table

    trace = trace_image(image, checkpoint or "vit-micro")
    lessons = [] if stage is None else find_lessons(trace, stage)
    if as_json:
        result = document(trace, [lesson.stage for lesson in lessons] or None)
        for row, lesson in zip(result["stages"], lessons, strict=False):
            row["lesson"] = asdict(lesson)
        console.say_json(result)
    elif lessons:
        console.say(lesson_text(lessons))
    elif folder is None and page is None:
        console.say(trace_table(trace))
    if folder is not None:
        written = draw_attention(trace, expanded(folder))
        console.note(f"{len(written)} pictures in {folder}; {written[-1].name} has all of them")
    if page is not None:
        write_page(trace, expanded(page))
        console.note(f"{page}: open it in a browser; it needs no network")


def data_info(dataset: str, options: dict[str, Any], preview: Path | None, as_json: bool) -> None:
    """Describe a dataset."""
    from vitft.data.info import describe
    from vitft.data.sources.source import open_dataset

    _writable(preview)
    source = open_dataset(dataset, **options)
    if preview is not None:
        from vitft.data.preview import preview as draw

        draw(source, preview)
        console.note(f"preview: {preview}")
    described = describe(source)
    console.say_json(described) if as_json else console.say(tables.data_report(described))


def data_check(
    dataset: str, options: dict[str, Any], max_pixels: int | None, value_range: str | None,
    quarantine: Path | None, html: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Check a dataset and show the findings. Raises DataError in the end if one would stop training."""
    with _loading():
        from vitft.config.train import range_of
        from vitft.data.decoder import MAX_PIXELS
        from vitft.data.sources.identity import has_names
        from vitft.data.sources.source import open_dataset
        from vitft.data.validation.check import KINDS, check, document, quarantine_lines
    from vitft.io.atomic import write_text

    for file in filter(None, (quarantine, html)):
        if not file.parent.is_dir():
            raise UsageError(f"{file}: no such folder; make it first, or choose another.")
    source = open_dataset(dataset, **options)
    folder = expanded(dataset)
    of_files = folder.is_dir() and all(map(has_names, source.splits.values()))
    with console.working("checking") as progress:
        found = check(
            source, folder if of_files else None, max_pixels=max_pixels or MAX_PIXELS,
            value_range=range_of(value_range), progress=progress,
        )  # fmt: skip
    if html is not None:
        from vitft.data.validation.page import write_report

        write_report(found, source, html)
        console.note(f"report: {html}")
    if quarantine is not None:
        lines = quarantine_lines(found)
        write_text(quarantine, "".join(f"{line}\n" for line in lines))
        again = f"--dataset {shlex.quote(dataset)} --exclude {shlex.quote(str(quarantine))}"
        console.note(f"{len(lines):,} images to leave out: vitft train {again}")
    images = sum(len(split) for split in source.splits.values())
    console.say_json(document(found)) if as_json else console.say(tables.check_report(found, KINDS, images))
    if broken := sum(one.severity == "error" for one in found):
        raise DataError(f"{broken:,} of {images:,} images would stop training; fix, remove or exclude them.")


def _loading() -> Any:
    """Shown during imports that take seconds."""
    return console.working("loading PyTorch and Transformers")


def _report_skipped(skipped: list[Any]) -> None:
    for one in skipped:
        console.warn(f"skipped {one.name}: {one.reason}")


def _writable(picture: Path | None) -> None:
    """Check a picture's path before the work. Raises UsageError."""
    if picture is not None and (picture.suffix.lower() != ".png" or not picture.parent.is_dir()):
        raise UsageError(f"{picture}: give a .png file in a folder that exists.")


def _csv(rows: list[Any], top_k: int) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", *(f"{name}_{k}" for k in range(1, top_k + 1) for name in ("label", "score")), "error"])
    for row in rows:
        cells = [cell for label, score in row.top for cell in (label, f"{score:.6f}")]
        texts = [row.path, *cells, *[""] * (2 * top_k - len(cells)), row.error or ""]
        writer.writerow([_no_formula(cell) for cell in texts])
    return text.getvalue()


def _no_formula(cell: str) -> str:
    """The cell, with an apostrophe before what a spreadsheet would run as a formula (OWASP, CSV Injection).

    Numbers stay numbers. `--format jsonl` changes nothing.
    """
    if not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def cache_ls(as_json: bool) -> None:
    """Show the cache of decoded photos."""
    from vitft.data import cache

    kept = cache.entries()
    if as_json:
        console.say_json([{"name": e.name, "images": e.images, "bytes": e.size, "used": e.used} for e in kept])
    elif kept:
        console.say(tables.cache_table(kept, cache.root()))
    else:
        console.say_text("the cache is empty.\n")


def cache_clear() -> None:
    """Empty the cache of decoded photos."""
    from vitft.data import cache

    console.say_text(f"removed {console.size(cache.clear())}.\n")
