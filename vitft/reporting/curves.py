"""The curves of several runs on one plot, as a PNG file. matplotlib is imported only when it is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitft.io.atomic import new_file
from vitft.io.console import percent, safe
from vitft.io.fonts import drawable
from vitft.io.paths import expanded
from vitft.training.callbacks import recorded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = (("loss", "train"), ("loss", "validation"), ("accuracy", "validation"), ("lr", "train"))
_TITLES = {"loss": "{} loss", "accuracy": "{} accuracy", "lr": "learning rate"}


def plot_curves(runs: Sequence[str | Path], path: Path) -> None:
    """Draw losses, validation accuracy and learning rate by epoch, a line for each run."""
    with new_file(path) as temporary:
        draw_curves(runs).savefig(temporary, format="png")


def draw_curves(runs: Sequence[str | Path]) -> "Figure":
    """The plot as a figure of matplotlib. What no run has recorded has no panel."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    histories = [recorded(expanded(run)) for run in runs]
    panels = [panel for panel in _PANELS if any(_curve(lines, *panel)[0] for lines in histories)]
    colors = colormaps["tab10" if len(runs) <= 10 else "tab20"]
    figure = Figure(figsize=(4.2 * max(1, len(panels)), 3.8), dpi=130, layout="constrained")
    for axes, (name, split) in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
        for number, lines in enumerate(histories):
            epochs, values = _curve(lines, name, split)
            color = colors(number % colors.N)
            marker = "" if split == "train" else "o"
            axes.plot(epochs, values, color=color, linewidth=1.5, marker=marker, markersize=4)
        axes.set_title(_TITLES[name].format("training" if split == "train" else split), fontsize=11, loc="left")
        axes.set_xlabel("epoch")
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        if name == "accuracy":
            axes.yaxis.set_major_formatter(lambda value, _: percent(value, 0))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    names = [drawable(safe(Path(run).name), f"run {number}") for number, run in enumerate(runs, 1)]
    handles = [figure.axes[0].plot([], [], color=colors(number % colors.N))[0] for number in range(len(runs))]
    legend = figure.legend(handles, [name for name, _ in names], loc="outside lower center", ncols=min(4, len(runs)),
                           frameon=False)  # fmt: skip
    for text, (_, file) in zip(legend.get_texts(), names, strict=True):
        text.set(fontproperties=FontProperties(fname=file, size=9), parse_math=False)
    return figure


def _curve(lines: list[dict[str, Any]], name: str, split: str) -> tuple[list[float], list[float]]:
    found = [(line["epoch"], line[name]) for line in lines if line["split"] == split and line.get(name) is not None]
    return [float(epoch) for epoch, _ in found], [float(value) for _, value in found]
