"""Plots as PNG files. matplotlib is imported only when one is drawn."""

from pathlib import Path

from vitft.evaluation.metrics import Metrics
from vitft.io.atomic import new_file
from vitft.io.console import percent, safe
from vitft.io.fonts import drawable

NUMBERED_CLASSES = 20  # up to so many classes, every cell shows its number
NAMED_CLASSES = 120  # up to so many, every row and column has a name
DRAWN_CLASSES = 2000  # up to so many, every class has its own row and column
NAME_LENGTH = 24  # characters shown of a name


def plot_confusion(metrics: Metrics, path: Path) -> None:
    """Draw the confusion matrix into a PNG: rows are true classes, columns predicted ones.

    A cell is colored by its fraction of the row, on a root scale that shows rare mistakes; the number is a count of
    images. A class name that no installed font can draw is written as `class 3`, counted from 0.
    """
    import numpy as np
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    labels = [row.label for row in metrics.per_class]
    classes = len(labels)
    step = -(-classes // DRAWN_CLASSES)  # for more classes, adjacent ones share a cell
    matrix = np.zeros((-(-classes // step),) * 2, np.int64)
    np.add.at(matrix, (metrics.cells[:, 0] // step, metrics.cells[:, 1] // step), metrics.cells[:, 2])
    fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(max(5.0, 0.55 * classes), 8.0) if classes <= NUMBERED_CLASSES else 16.0  # inches
    shown = range(0, len(matrix), -(-len(matrix) // NAMED_CLASSES))
    font = min(10.0, 40 * side / len(shown))  # points: 3/4 of a row's height

    figure = Figure(figsize=(side, side), dpi=120, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(fractions, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02, format=lambda fraction, _: percent(fraction, 0))
    axes.set_title(f"{percent(metrics.accuracy)} of {metrics.count} images of {metrics.split} are right")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    names, fonts = zip(*(_shown(labels[i * step], i * step) for i in shown), strict=True)
    turn = 45 if classes <= NUMBERED_CLASSES else 90
    axes.set_xticks(shown, names, rotation=turn, rotation_mode="anchor", ha="right", va="center")
    axes.set_yticks(shown, names)
    for axis in (axes.xaxis, axes.yaxis):
        for name, file in zip(axis.get_ticklabels(), fonts, strict=True):
            name.set(fontproperties=FontProperties(fname=file, size=font), parse_math=False)
    if classes <= NUMBERED_CLASSES:
        for (row, column), number in np.ndenumerate(matrix):
            if number:
                ink = "white" if fractions[row, column] > 0.35 else "black"
                axes.text(column, row, str(number), color=ink, fontsize=0.85 * font, ha="center", va="center")
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def _shown(label: str, number: int) -> tuple[str, str]:
    """A class's name as it is drawn, and the file of its font."""
    name, font = drawable(safe(label).replace("\n", " "), f"class {number}")
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…", font
