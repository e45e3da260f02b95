"""Pictures for people, as PNG files. matplotlib is imported where one is drawn."""

from pathlib import Path

from vitft.evaluation.metrics import Metrics
from vitft.io.console import percent, safe
from vitft.io.fonts import drawable

NUMBERED_CLASSES = 20  # Up to so many classes, each cell shows its number.
NAMED_CLASSES = 120  # Up to so many, each row and column has its name.
DRAWN_CLASSES = 2000  # Up to so many, each class has a row and a column of its own.
NAME_LENGTH = 24  # Characters of a name that are shown.


def plot_confusion(metrics: Metrics, path: Path) -> None:
    """Draw the confusion matrix into a PNG: rows are true classes, columns predicted ones.

    The colour of a cell is its share of its row (on a root scale, so that rare mistakes are seen), the
    number in it a count of images. A name that no font here can draw is `class 3`, counted from 0.
    """
    import numpy as np
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    labels = [row.label for row in metrics.per_class]
    classes = len(labels)
    step = -(-classes // DRAWN_CLASSES)  # of more classes, so many in a row share a cell
    matrix = np.zeros((-(-classes // step),) * 2, np.int64)
    np.add.at(matrix, (metrics.cells[:, 0] // step, metrics.cells[:, 1] // step), metrics.cells[:, 2])
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = min(max(5.0, 0.55 * classes), 8.0) if classes <= NUMBERED_CLASSES else 16.0  # inches
    shown = range(0, len(matrix), -(-len(matrix) // NAMED_CLASSES))
    font = min(10.0, 40 * side / len(shown))  # points: 3/4 of a row's height

    figure = Figure(figsize=(side, side), dpi=120, layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    figure.colorbar(picture, ax=axes, fraction=0.04, pad=0.02, format=lambda share, _: percent(share, 0))
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
                ink = "white" if shares[row, column] > 0.35 else "black"
                axes.text(column, row, str(number), color=ink, fontsize=0.85 * font, ha="center", va="center")
    figure.savefig(path, format="png", bbox_inches="tight")


def _shown(label: str, number: int) -> tuple[str, str]:
    """A class's name as it is drawn, and the file of its font."""
    name, font = drawable(safe(label).replace("\n", " "), f"class {number}")
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…", font
