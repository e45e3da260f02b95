"""The results that commands show: text and tables, at most 80 columns wide."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from vitft.io.console import brief, counted, duration, interval, percent, safe, size
from vitft.io.paths import shown

LISTED_CLASSES = 30  # up to so many classes, the report has a row for each
CROSSED_CLASSES = 12  # up to so many, the whole confusion matrix fits 80 columns
LISTED_FINDINGS = 5  # of a kind


def _table(*columns: str | Column, **options: Any) -> Table:
    return Table(*columns, box=None, pad_edge=False, **options)


def _numbers(*headers: str | Text, no_wrap: bool = False) -> list[Column]:
    return [Column(header, justify="right", no_wrap=no_wrap) for header in headers]


def _names(header: str = "", max_width: int | None = None) -> Column:
    """A column of names, which are cut where they are too long."""
    return Column(header, no_wrap=True, overflow="ellipsis", max_width=max_width)


def metrics_report(metrics: Any) -> RenderableType:
    """The report of `vitft eval`, for a `Metrics`."""
    low, high = (100 * bound for bound in metrics.accuracy_interval)
    headline = Text.assemble(
        "accuracy ",
        (percent(metrics.accuracy), "bold"),
        f" (95 % interval {low:.1f}–{high:.1f}) on {counted(metrics.count, 'image')} of {safe(metrics.split)}",
        (f" [{metrics.split_hash[:8]}]", "dim"),
    )
    # With five classes, top-5 is always 100 %.
    top5 = f"top-5 {percent(metrics.top5)}, " if len(metrics.per_class) > 5 else ""
    rest = Text(
        f"balanced accuracy {percent(metrics.balanced_accuracy)}, macro F1 {percent(metrics.macro_f1)}\n"
        f"{top5}loss {metrics.loss:.4f}, {_calibrated(metrics)}{metrics.images_per_s:.0f} images/s"
    )
    few = len(metrics.per_class) <= CROSSED_CLASSES
    confusion = _confusion_table(metrics) if few else _mistakes_table(metrics)
    return Group(headline, rest, "", *_class_table(metrics), "", *confusion)


def strangers_report(found: Any) -> RenderableType:
    """How well images of another dataset are told apart, for a `Strangers`."""
    lost = f"; {found.unreadable:,} could not be read" if found.unreadable else ""
    return Text(
        f"\n{counted(found.strangers, 'stranger')} told from {counted(found.known, f'{safe(found.split)} image')}: "
        f"AUROC {found.by_novelty:.3f} by novelty, {found.by_confidence:.3f} by confidence\n"
        f"with --none-of-these {found.kept:g}, {percent(found.found)} of the strangers are none of these, and "
        f"{percent(found.mistaken)} of the others{lost}"
    )


def _calibrated(metrics: Any) -> str:
    said = metrics.calibration
    if said is None:
        return ""
    after = f" ({percent(said['error_at_temperature'])} at T = {said['temperature']:.2f})" if len(said) > 2 else ""
    return f"calibration error {percent(said['error'])}{after}, "


def _class_table(metrics: Any) -> list[RenderableType]:
    """Precision, recall, F1 and count of every class, or of the ten classes with the lowest F1."""
    rows, title = metrics.per_class, []
    if len(rows) > LISTED_CLASSES:
        title = [f"The 10 lowest F1 of {len(rows):,} classes (--json lists all):"]
        rows = sorted((row for row in rows if row.count), key=lambda row: row.f1)[:10]
    table = _table(_names("class", 36), *_numbers("precision", "recall", "F1", "count", no_wrap=True))
    for row in rows:  # a class without images has no scores
        scores = (percent(score) if row.count else "–" for score in (row.precision, row.recall, row.f1))
        table.add_row(Text(safe(row.label)), *scores, str(row.count))
    return [*title, table]


def _confusion_table(metrics: Any) -> list[RenderableType]:
    """The confusion matrix; columns are headed by the first letters of the class name."""
    labels, matrix = [row.label for row in metrics.per_class], metrics.matrix.tolist()
    digits = len(str(max(map(max, matrix))))
    room = max(digits, min(14, 62 // len(labels) - 1))  # 18 of 80 columns for row names, 1 between columns
    heads = (Text(safe(label), no_wrap=True, overflow="crop") for label in labels)
    columns = (Column(head, justify="right", no_wrap=True, max_width=room) for head in heads)
    table = _table(_names("", min(16, 79 - len(labels) * (room + 1))), *columns, padding=(0, 1, 0, 0))
    for i, (label, counts) in enumerate(zip(labels, matrix, strict=True)):
        cells = (Text(str(n) if n else "·", "bold" if i == j else "") for j, n in enumerate(counts))
        table.add_row(Text(safe(label)), *cells)
    return ["Confusion (rows are true classes, columns predicted ones):", table]


def _mistakes_table(metrics: Any) -> list[RenderableType]:
    """The ten most frequent confusions, as `cat → dog 34`."""
    labels = [row.label for row in metrics.per_class]
    cells = (cell for cell in metrics.cells.tolist() if cell[0] != cell[1])
    worst = sorted(cells, key=lambda cell: -cell[2])[:10]
    if not worst:
        return ["No image was misclassified."]
    table = _table(_names("", 34), _names("", 34), *_numbers("", no_wrap=True), show_header=False)
    for i, j, count in worst:
        table.add_row(Text(safe(labels[i])), Text(f"→ {safe(labels[j])}"), str(count))
    return ["Most frequent confusions (true → predicted, images):", table]


def mistakes(predictions: Any, most: int) -> list[dict[str, Any]]:
    """The misclassified images that the model was surest of, as JSON values."""
    return [
        {
            "image": predictions.name(place),
            "label": predictions.class_name(predictions.truth[place]),
            "predicted": predictions.class_name(predictions.predicted[place]),
            "confidence": float(predictions.confidence[place]),
        }
        for place in predictions.mistakes()[:most]
    ]


def mistakes_report(wrong: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A table of misclassified images."""
    if not wrong:
        return "\nNo image was misclassified."
    table = _table(
        Column("image", overflow="fold"), _names("label", 20), _names("predicted", 20), *_numbers("confidence")
    )
    for one in wrong:
        names = (Text(safe(one[name])) for name in ("image", "label", "predicted"))
        table.add_row(*names, percent(one["confidence"]))
    return Group("", "Misclassified, surest first:", table)


def comparison_report(found: Any) -> RenderableType:
    """The report of `vitft compare`, for a `Compared`."""
    heads = ("accuracy", "difference", "95 % interval", "p", "macro F1")
    table = _table(Column("run", overflow="fold"), *_numbers(*heads, no_wrap=True))
    table.add_row(Text(safe(found.first)), percent(found.accuracy, 2), "", "", "", percent(found.macro_f1, 2))
    for one in found.others:
        between = f"{_signed(one.difference.low)} to {_signed(one.difference.high)}"
        p = "< 0.001" if one.p < 0.001 else f"{one.p:.3f}"
        cells = (percent(one.accuracy, 2), _signed(one.difference.value), between, p, percent(one.macro_f1, 2))
        table.add_row(Text(safe(one.run)), *cells, style="bold" if one.p < 0.05 else "")
    each = "; p is of each comparison alone" if len(found.others) > 1 else ""
    parts: list[Any] = [table, "", f"on {counted(found.images, f'{found.split} image')}, split {found.hash}{each}"]
    for one in found.others:
        f1, better = one.f1_difference, "better" if one.gained > one.lost else "worse"
        verdict = better if one.p < 0.05 else "no difference that these images can tell"
        said = (
            f"{one.run}: {verdict}; {counted(one.gained, 'image')} gained and {one.lost:,} lost; "
            f"macro F1 {_signed(f1.value)} ({_signed(f1.low)} to {_signed(f1.high)})"
        )
        parts.append(Text(safe(said)))
        changed = [pair for pair in sorted(one.recalls.items(), key=lambda pair: -abs(pair[1]))[:5] if pair[1]]
        if changed:
            recalls = ", ".join(f"{label} {_signed(change)}" for label, change in changed)
            parts.append(Text(safe(f"  recall, most changed: {recalls}")))
    for runs, mean, spread in found.groups:
        if spread is not None:
            parts.append(Text(safe(f"{len(runs)} seeds, {', '.join(runs)}: {percent(mean, 2)} ± {100 * spread:.2f}")))
    if found.settings:
        names = [Path(run).name for run in (found.first, *(one.run for one in found.others))]
        settings = _table("setting", *(Column(safe(name), overflow="fold") for name in names))
        for name, values in found.settings.items():
            settings.add_row(name, *(Text(safe(brief(value))) for value in values))
        parts += ["", settings]
    return Group(*parts)


def _signed(fraction: float) -> str:
    """A difference in percentage points."""
    return f"{100 * fraction:+.2f}"


def export_report(result: Any) -> RenderableType:
    """The report of `vitft export`, for an `Exported`: the file beside the model that it was made from."""
    proof = result.proof
    names = ["torch", f"{result.document.format} {result.document.dtype}"]
    table = _table("", *_numbers(*names, no_wrap=True))
    if proof.accuracy is not None:
        table.add_row(
            f"accuracy on {counted(proof.images, f'{proof.split} image')}",
            *map(percent, (proof.before, proof.accuracy)),
        )
    rates = [(f"{one.torch:.1f}", f"{one.file:.1f}") for one in (proof.one, proof.batch)]
    table.add_row("images/s, one at a time", *rates[0])
    table.add_row("images/s, in batches of 32", *rates[1])
    table.add_row("size", size(result.torch_bytes), size(result.bytes))
    on = counted(proof.images, "image") + (" of random noise" if proof.split is None else "")
    ties = ", the others ties" if proof.agreement < 1 and not proof.untied else ""
    same = f"same class on {percent(proof.agreement, 2)} of {on}{ties}"
    lines = [f"{same}; probabilities differ by at most {proof.largest:.2g}"]
    if (found := proof.difference) is not None:
        between = f"{_signed(found.low)} to {_signed(found.high)}"
        lines.append(f"accuracy {_signed(found.value)} points (95 % interval {between}) on split {proof.hash}")
    else:
        lines.append("nothing was proved about its accuracy: --dataset names images to compare on")
    return Group(table, "", *(Text(line) for line in lines), Text(safe(str(result.file))))


def runs_report(runs: Sequence[Any], folder: Path) -> RenderableType:
    """The report of `vitft runs ls`."""
    if not runs:
        return Text(f"no runs in {folder}; vitft train makes one")
    table = _table(
        Column("run", overflow="fold"), _names("data", 18), _names("model", 22), *_numbers("accuracy"), "of", "state",
        *_numbers("size", no_wrap=True),
    )  # fmt: skip
    for one in runs:
        score = one.score
        how = one.state if one.state in ("finished", "damaged") else f"{one.state}, {one.step}/{one.total_steps or '?'}"
        table.add_row(
            Text(safe(one.run.name)), Text(safe(one.dataset)), Text(safe(one.model)),
            "–" if score is None else percent(score.accuracy, 2), "" if score is None else score.split, how,
            size(one.bytes),
        )  # fmt: skip
    problems = [Text(safe(f"{one.run.name}: {one.problem}"), "yellow") for one in runs if one.problem]
    return Group(table, *problems)


def lessons_table(lessons: Sequence[Any], textbook: str) -> RenderableType:
    """The table of `vitft learn`."""
    table = _table(*_numbers("", no_wrap=True), Column("lesson", no_wrap=True), Column("", overflow="fold"))
    for one in lessons:
        table.add_row(str(one.number), one.name, Text(one.title))
    table.add_row("", "textbook", Text(textbook))
    said = "\nvitft learn --output FOLDER copies them: lessons as notebooks, the textbook with its figures"
    return Group(table, Text(said, "dim"))


def models_report(models: Sequence[Any], tried: str = "") -> RenderableType:
    """The report of `vitft models ls`, by how the models were trained; `tried` says how far that was tried."""
    table = _table("model", *_numbers("parameters", "input", no_wrap=True), Column("license", overflow="fold"))
    problems = []
    for number, one in enumerate(models):
        if number == 0 or one.training != models[number - 1].training:
            table.add_row(*([""] * 4)) if number else None
            table.add_row(Text(one.training, "dim"))
        side = "×".join(map(str, dict.fromkeys(one.image_size or ()))) or "any"
        parameters = f"{one.parameters / 1e6:.1f} M" if one.parameters else "–"
        table.add_row(one.model, parameters, side if one.parameters else "–", Text(safe(one.license or "–")))
        problems += [one] if one.problem else []
    if problems and all(one.problem == problems[0].problem for one in problems):
        said = [f"{len(problems)} of {len(models)}: {problems[0].problem}"]
    else:
        said = [one.problem for one in problems]
    note: list[RenderableType] = ["", Text(tried, "dim")] if tried else []
    return Group(table, *note, *([""] * bool(said)), *(Text(safe(sentence), "yellow") for sentence in said))


def probe_report(result: Any) -> RenderableType:
    """The report of `vitft probe`, for a `ProbeResult`."""
    metrics = result.metrics
    best = max(result.logistic, key=lambda trial: trial.correct)
    low, high = (100 * bound for bound in metrics.accuracy_interval)
    head = Text.assemble(
        "accuracy ",
        (percent(metrics.accuracy), "bold"),
        f" (95 % interval {low:.1f}–{high:.1f}) on {counted(metrics.count, f'{safe(metrics.split)} image')}\n",
        (f"[{metrics.split_hash[:8]}] ", "dim"),
        f"by logistic regression on {result.width:,} features from {counted(result.images, 'training image')}",
    )
    trials = _table("classifier", *_numbers("setting", "accuracy", "95 % interval", "loss", no_wrap=True), "")
    groups = (("logistic regression", "penalty", result.logistic), ("nearest neighbors", "k =", result.neighbors))
    for name, setting, found in groups:
        for number, trial in enumerate(found):
            low, high = (100 * bound for bound in trial.interval)
            loss = "" if trial.loss is None else f"{trial.loss:.3f}"
            cells = (f"{setting} {trial.setting:g}", percent(trial.accuracy), f"{low:.1f}–{high:.1f}", loss)
            marks = ("bold", "best") if trial is best else ("", "")
            trials.add_row("" if number else name, *cells, marks[1], style=marks[0])
    curve = _table(*_numbers("images per class", "in all", "accuracy", "spread", "draws", no_wrap=True))
    for point in result.few_shot:
        draws = len(point.accuracies)
        cells = (f"{point.per_class:,}", f"{point.images:,}", percent(point.mean), f"± {100 * point.spread:.1f}")
        curve.add_row(*cells, str(draws))
    curve.add_row("all", f"{result.images:,}", percent(metrics.accuracy), "", "1", style="bold")
    tuning = result.tuning
    memory = f", {size(tuning.memory_bytes)} of memory" if tuning.memory_bytes else ""
    costs = f"{tuning.epochs:g} epochs of full fine-tuning here: about {duration(tuning.seconds)}{memory}"
    title = "Accuracy by training images (mean and standard deviation of the draws):"
    return Group(head, "", trials, "", title, curve, "", *_mistakes_table(metrics), "", Text(costs))


LISTED_DOUBTS = 30


def doubt_report(result: Any) -> RenderableType:
    """The report of `vitft data doubt`: the most doubtful labels, and how many are probably wrong."""
    head = Text(
        f"about {percent(result.rate)} of {result.images:,} labels are wrong; the classifiers agree with "
        f"{percent(result.accuracy)} of all labels"
    )
    if not result.doubts:
        return Group(head, Text("no label is doubtful enough to be listed"))
    table = _table(Column("image", overflow="fold"), _names("label", 20), _names("looks like", 20), *_numbers("wrong"))
    for one in result.doubts[:LISTED_DOUBTS]:
        cells = (Text(safe(text)) for text in (one.image, one.label, one.suggested))
        table.add_row(*cells, percent(one.probability, 0))
    more = len(result.doubts) - LISTED_DOUBTS
    rest = [f"... {more:,} more; --html or --json lists them"] if more > 0 else []
    expected = round(sum(one.probability for one in result.doubts))
    wrong = f"about {expected:,} {'is' if expected == 1 else 'are'} wrong" if expected else "probably none is wrong"
    said = f"of the {len(result.doubts):,} listed, {wrong}; look at them with --html"
    return Group(head, "", table, *rest, "", Text(said))


def embedded_report(found: Any) -> RenderableType:
    """The report of `vitft embed`: what was written, and its columns."""
    table = _table("", "", show_header=False)
    for name, meaning in found.columns.items():
        table.add_row(Text(name, "bold"), meaning)
    return Group(Text(f"{safe(str(found.output))}: {counted(found.images, 'image')}", overflow="fold"), table)


def soup_report(result: Any) -> RenderableType:
    """The report of `vitft soup`: the validation accuracy of each run, best first, and of their average."""
    table = _table(Column("run", overflow="fold"), *_numbers("accuracy", "95 % interval", no_wrap=True), "in the soup")
    rows = [(part.run, part.metrics, "yes" if part.chosen else "no", "") for part in result.parts]
    for name, metrics, chosen, style in (*rows, ("soup", result.metrics, "", "bold")):
        low, high = (100 * bound for bound in metrics.accuracy_interval)
        table.add_row(Text(safe(name)), percent(metrics.accuracy, 2), f"{low:.2f}–{high:.2f}", chosen, style=style)
    return Group(table, Text(f"on {result.metrics.count:,} validation images; {result.folder}", overflow="fold"))


def sweep_report(result: Any) -> RenderableType:
    """The report of `vitft sweep`: the trials, best first, for a `SweepResult`."""
    from vitft.sweeping.sweep import interval, mean, shown, spread

    names = list(result.best.settings)
    several = any(len(one.scores) > 1 for one in result.trials)
    table = _table(
        *_numbers("trial", no_wrap=True), *(Column(name, overflow="fold") for name in names),
        *_numbers(result.by, *(["spread"] * several), *(["95 % interval"] * (result.by == "accuracy")), "time"), "",
    )  # fmt: skip
    order = {"complete": 0, "pruned": 1, "unfinished": 2, "failed": 3}
    worse = -1 if result.by != "loss" else 1
    rows = sorted(
        result.trials, key=lambda one: (order[one.state], worse * mean(one, result.by) if one.scores else 0, one.number)
    )
    for one in rows:
        values = [Text(safe(brief(one.settings.get(name)))) for name in names]
        scores = [shown(result.by, mean(one, result.by))] if one.scores else ["–"]
        if several:
            found = spread(one, result.by) if one.scores else None
            scores.append("–" if found is None else f"± {shown(result.by, found)}")
        if result.by == "accuracy":
            scores.append("{:.1f}–{:.1f}".format(*(100 * end for end in interval(one))) if one.scores else "–")
        best, given = one.number == result.best.number, one.number == result.base
        said = one.reason or ("best" if best else "") + (", " * (best and given)) + ("as given" if given else "")
        said = said if one.state != "unfinished" else "unfinished"
        table.add_row(str(one.number), *values, *scores, duration(one.seconds), Text(safe(said)), style="bold" * best)
    score, done = result.best.scores[0], len(result.trials)
    lines = [
        f"on {score.count:,} validation images [{score.split_hash[:8]}], which chose the best of {done}: "
        "its score is a little too high"
    ]
    if result.undecided:
        lines.append("the settings as given are within the interval of the best: these images cannot tell them apart")
    if (left := result.planned - sum(one.state != "unfinished" for one in result.trials)) > 0:
        lines.append(f"trials that other processes work on: {left} of {result.planned}")
    return Group(table, "", *(Text(line) for line in lines))


def training_report(result: Any) -> str:
    """The last lines of a run: scores, checkpoint, speed, next command."""
    lines = [
        interval(one.split, one.accuracy, one.accuracy_interval, one.count)
        + (f", balanced accuracy {percent(one.balanced_accuracy)}" if _unequal(one) else "")
        for one in result.scores.values()
    ]
    lines = lines or ["not evaluated: there is no validation or test split"]
    if "validation" in result.scores and "test" not in result.scores:
        remedy = "the test images were left alone" if result.skipped else "--test-fraction holds out images for one"
        lines.append(
            f"not an independent score: validation chose the checkpoint, so the score is a little too high; {remedy}"
        )
    lines.append(f"{result.checkpoint.name} checkpoint: {result.checkpoint} (step {result.step})")
    if (speed := result.speed) is not None:
        of_peak = f", {percent(speed.mfu, 0)} of this machine's {speed.precision} peak" if speed.mfu is not None else ""
        help_ = f"; {speed.remedy}" if speed.remedy else ""
        waited = f"{percent(speed.data_wait, 0)} of the time waiting for data"
        lines.append(f"{speed.images_per_s:,.0f} images/s, {waited}{of_peak}{help_}")
    lines.append(f"next: vitft eval {shlex.quote(str(result.run))}{'' if result.scores else ' --split train'}")
    return "".join(f"{line}\n" for line in lines)


def _unequal(score: Any) -> bool:
    """Whether balanced accuracy tells more than accuracy; it is not known of runs of early versions."""
    return bool(abs(score.balanced_accuracy - score.accuracy) >= 0.005)


def verdict_report(verdict: Any, kills: int) -> str:
    """The line of `vitft verify-resume`."""
    same = "the same bits" if verdict.equal else "DIFFERENT WEIGHTS OR LOSSES"
    left = f"; left or missing: {', '.join(verdict.left)}" if verdict.left else ""
    return (
        f"kills: {len(verdict.kills)} of {kills}, in a run of {counted(verdict.steps, 'step')}; {same} as without "
        f"interruption; steps repeated after a kill: at most {verdict.repeated}{left}\n"
    )


def plan_report(plan: Any) -> RenderableType:
    """The table of `vitft train --dry-run`."""
    prepared, run = plan.prepared, plan.size
    config, loaded = prepared.config, prepared.loaded
    revision = f" at {prepared.source.revision[:12]}" if prepared.source.revision else ""
    start = "new weights" if config.from_scratch else "new head" if loaded.new_head else "its own head"
    times = {"decoding": plan.decode_s, "training": run.train_s, "evaluation": run.evaluate_s}
    lines = {name: "\n".join(f"{key}: {value}" for key, value in getattr(plan, name).items())
             for name in ("given", "chosen")}  # fmt: skip
    groups = {
        "Data": {
            "dataset": f"{config.dataset}{revision}",
            "classes": f"{len(loaded.labels)}: {', '.join(loaded.labels[:8])}{', ...' * (len(loaded.labels) > 8)}",
            **{
                role: f"{counted(len(split.rows), 'image')} of {split.source}"
                for role, split in prepared.splits.items()
            },
        },
        "Model": {
            "model": f"{config.model}, {loaded.preprocess.size_text} px, {start}",
            "parameters": f"{plan.parameters:,}, of which {plan.trainable:,} are trained",
        },
        "Cost": {
            "steps": f"{run.steps:,} of {counted(config.batch_size, 'image')}, {run.steps_per_epoch:,} per epoch",
            "device": f"{config.device}, {config.precision}",
            "memory": f"about {size(plan.memory_bytes)}" if plan.memory_bytes else "unknown for this architecture",
            "time": f"about {duration(plan.total_s)}: " + ", ".join(f"{k} {duration(s)}" for k, s in times.items()),
        },
        **({} if plan.cluster is None else {_cluster_title(plan.cluster): _cluster_rows(plan.cluster)}),
        "Run": {"folder": f"{plan.folder}, in place of the run there" if plan.replaces else str(plan.folder)},
        "Settings": {
            **{name: text for name, text in lines.items() if text},
            "others": "the defaults, which vitft train --help lists; config.yaml in the run folder will have them all",
        },
    }
    table = Table.grid(padding=(0, 2))
    for number, (title, rows) in enumerate(groups.items()):
        if number:
            table.add_row()
        table.add_row(Text(title, "bold"))
        for name, value in rows.items():
            table.add_row(Text(f"  {name}"), Text(safe(value)))
    return table


def _cluster_title(plan: Any) -> str:
    return f"On {counted(plan.cluster.devices, 'device')}"


def _cluster_rows(plan: Any) -> dict[str, str]:
    step, several = plan.step, plan.cluster.devices > 1
    parts = {"computation": step.compute_s, "the optimizer": step.optimizer_s}
    if several:
        parts["communication"] = step.communicate_s - step.hidden_s
    shown = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in parts.items())
    images, each = counted(step.images, "image"), " each" * several
    rows = {"a step": f"{1000 * step.seconds:.1f} ms for {images}{each}: {shown}"}
    if step.decode_s:
        rows["first epoch"] = f"{1000 * step.seconds_with(1.0):.1f} ms a step, in which images are decoded"
    if several:
        sent, link = "weights" if plan.shards else "gradients", plan.cluster.link_gbps
        rows[sent] = f"{size(plan.exchanged_bytes)}, over links of {link:g} Gbit/s"
    speed = f", scaling efficiency {percent(plan.efficiency)}" * several
    rows["time"] = f"about {duration(plan.total_s)}{speed}"
    rows["memory"] = f"about {size(plan.memory_bytes)}{each}" if plan.memory_bytes else "unknown for this architecture"
    rows["bottleneck"] = step.bottleneck
    return rows | ({} if plan.price is None else {"price": f"{plan.price:,.2f}"})


def data_report(described: Mapping[str, Any]) -> RenderableType:
    """The report of `vitft data info`: splits, counts, sizes, classes."""
    head = Text.assemble((safe(described["name"]), "bold"), f", {counted(len(described['labels']), 'class')}")
    if described.get("revision"):
        kind = "version" if len(described["revision"]) == 16 else "commit"  # of shards, or of a hub dataset
        head.append(f", {kind} {described['revision'][:12]}", "dim")
    splits = _table("split", *_numbers("images"), "smallest", "median", "largest", "formats")
    for split in described["splits"]:
        found = split["sizes"] or {}
        sizes = ("×".join(map(str, found.get(kind, "-"))) for kind in ("smallest", "median", "largest"))
        formats = ", ".join(split["formats"])
        if split["unreadable"]:
            formats += f" ({split['unreadable']:,} of {split['looked_at']:,} unreadable)"
        splits.add_row(Text(safe(split["name"])), f"{split['count']:,}", *sizes, formats)
    classes = _table(_names("class", 40), *_numbers(*(Text(safe(split["name"])) for split in described["splits"])))
    shown = described["labels"][:LISTED_CLASSES]
    for label in shown:
        counts = (str(split["classes"].get(label, 0)) for split in described["splits"])
        classes.add_row(Text(safe(label)), *counts)
    more = len(described["labels"]) - len(shown)
    rest = [f"... and {more} more classes (--json lists all)"] if more else []
    notes = [Text(safe(sentence)) for sentence in described.get("decisions", ())]
    notes += [Text(safe(f"warning: {sentence}"), "yellow") for sentence in described.get("warnings", ())]
    some = [
        Text(f"{safe(split['name'])}: sizes and formats are those of {split['looked_at']:,} of its images", "dim")
        for split in described["splits"] if split["looked_at"] < split["count"]
    ]  # fmt: skip
    return Group(head, *notes, "", splits, *some, "", classes, *rest)


def bench_report(found: Mapping[str, Any]) -> RenderableType:
    """The report of `vitft bench`: speed, where the time of a step goes, and the machine's peak."""
    settings, rate = found["settings"], found["images_per_s"]
    also = "".join(
        f" {name} {settings[name]:g}," for name in ("color_jitter", "erase", "mixup", "cutmix") if settings[name]
    )
    steps = f"{counted(found['steps'], 'step')} of {settings['batch_size']}"
    head = Text.assemble(
        (f"{rate['median']:,.0f} images/s", "bold"),
        f" ({rate['min']:,.0f} to {rate['max']:,.0f} in {steps})\n"
        f"{found['what']}: {safe(settings['model'])} at {settings['image_size']} px, {safe(settings['dataset'])}, "
        f"augment {settings['augment']},{also} {settings['device']}, {settings['precision']}\n",
    )
    table = _table("part", *_numbers("ms per step", "min", "max", "fraction"))
    whole = sum(part["median"] for part in found["ms_per_step"].values())
    for name, part in found["ms_per_step"].items():
        table.add_row(name, *(f"{part[key]:.2f}" for key in ("median", "min", "max")), percent(part["median"] / whole))
    lines = [f"decoding, once: {found['decode_images_per_s']:,.0f} images/s"]
    if "data_wait" in found:
        lines.append(f"time spent waiting for input: {percent(found['data_wait'])}")
    if found.get("peak_flops_per_s"):
        peak = f"{found['peak_flops_per_s'] / 1e9:,.0f} GFLOP/s of a large {settings['precision']} product here"
        reached = ""
        if found["mfu"]:
            rate = found["flops_per_s"] / 1e9
            reached = f"{rate:,.{0 if rate >= 10 else 2}f} GFLOP/s, {percent(found['mfu'])} of the "
        lines.append(f"{reached}{peak}")
    memory = found["peak_memory_bytes"]
    on_device = f", {size(memory['device'])} on the device" if memory["device"] else ""
    lines.append(f"peak memory: {size(memory['process'])} in the process{on_device}")
    seen = (_profile_table(found["profile"]),) if "profile" in found else ()
    return Group(head, table, *seen, Text("\n" + "\n".join(lines)))


def _profile_table(seen: Mapping[str, Any]) -> RenderableType:
    """The longest kernels or operators of a step."""
    of = seen["of"]
    longest = _table(_names(f"\nlongest {of}", 44), *_numbers("\nms per step", "\nlaunches", f"of all\n{of}"))
    for one in seen["longest"]:
        longest.add_row(Text(safe(one["name"])), f"{one['ms']:.3f}", f"{one['launches']:,.0f}", percent(one["share"]))
    waits = "" if seen["waits"] is None else f"\nthe host waits for the GPU {seen['waits']:,.0f} times a step"
    gaps = f"idle {percent(seen['idle'])} of the time"
    return Group(longest, Text(f"\n{seen['launches']:,.0f} {of} a step; {gaps}{waits}"))


class PredictionsTable:
    """A row per image: its classes, best first, with their probabilities. The first rows set the width of columns."""

    def __init__(self, put: Callable[[RenderableType], None], width: int) -> None:
        self._put, self._width, self._path_width = put, width, 0

    def write(self, rows: Sequence[Any]) -> None:
        """Show some more."""
        first = not self._path_width
        if first:
            self._path_width = min(max(len("image"), *(cell_len(safe(row.path)) for row in rows)), self._width // 2)
        table = _table(
            Column("image", overflow="fold", width=self._path_width), Column("prediction", overflow="fold"),
            show_header=first,
        )  # fmt: skip
        for row in rows:
            best = (f"{safe(label)} {percent(score)}" for label, score in row.top)
            doubt = "none of these: " if row.none_of_these else "unsure: " if row.unsure else ""
            text = Text.assemble(doubt, (next(best, ""), "bold"), *(f"  {other}" for other in best))
            table.add_row(Text(safe(row.path)), Text(f"error: {safe(row.error)}", "red") if row.error else text)
        self._put(table)


def push_report(pushed: Any) -> RenderableType:
    """The files that would be uploaded, with their sizes."""
    table = _table(_names("file"), *_numbers("size"))
    for name, count in pushed.files.items():
        table.add_row(name, size(count))
    table.add_row("in all", size(sum(pushed.files.values())))
    return table


def recipe_table(recipes: Sequence[Any]) -> RenderableType:
    """The recipes that come with vitft; those for `vitft scratch train` are marked."""
    table = _table(Column("recipe", no_wrap=True), "what it does")
    for one in recipes:
        mark = "Textbook (vitft scratch train): " if one.textbook else ""
        table.add_row(Text(one.name, "bold"), Text.assemble((mark, "cyan"), one.summary))
    return table


def to_leave_out(count: int, before: int, listed: Path, command: str) -> str:
    """What a list of images is for, as it is written; `before` of them were listed already."""
    if count == 0:
        return f"{listed}: empty, there is no image to leave out"
    known = f" ({before:,} listed before)" if before else ""
    return f"{counted(count, 'image')} to leave out{known}: {command}"


def check_report(findings: Sequence[Any], kinds: Mapping[str, tuple[str, str]], images: int) -> RenderableType:
    """The report of `vitft data check`: findings by kind, the first few of each, and a verdict."""
    colors = {"error": "red", "warning": "yellow", "note": "cyan"}
    table = _table(Column(no_wrap=True), *_numbers(""), "", show_header=False)
    for kind, (severity, meaning) in kinds.items():
        alike = [one for one in findings if one.kind == kind]
        if not alike:
            continue
        table.add_row(Text(kind, colors[severity]), Text(f"{len(alike):,}", "bold"), Text(meaning, "dim"))
        for one in alike[:LISTED_FINDINGS]:
            table.add_row("", "", Text.assemble(safe(one.place), (f"  {safe(one.detail)}", "dim")))
        if (more := len(alike) - LISTED_FINDINGS) > 0:
            table.add_row("", "", Text(f"... {more:,} more; --json or --html lists them", "dim"))
    counts = {severity: sum(one.severity == severity for one in findings) for severity in colors}
    told = ", ".join(counted(count, name) for name, count in counts.items() if count)
    verdict = Text(f"{counted(images, 'image')}: {told or 'no problems found'}", "bold")
    return Group(table, Text(), verdict) if findings else verdict


def cache_table(entries: Sequence[Any], folder: Path, streamed: Any) -> RenderableType:
    """The cache of decoded photos and of streamed shards, and its size."""
    table = _table(Column("images of", style="bold"), *_numbers("images", "size", "last used"))
    rows = [(safe(one.name), f"{one.images:,}", one) for one in entries]
    rows += [(f"streamed shards: {streamed.blocks:,} parts", "", streamed)] if streamed.blocks else []
    for name, images, one in rows:
        used = datetime.fromtimestamp(one.used).strftime("%Y-%m-%d %H:%M")
        table.add_row(name, images, size(one.size), used)
    total = size(sum(one.size for one in entries) + streamed.size)
    return Group(table, Text(f"{total} in {shown(folder)}; vitft data cache clear removes it", "dim"))
