"""The few-shot curve as a PNG file. matplotlib is imported only when it is drawn."""

from pathlib import Path

from vitft.io.atomic import new_file
from vitft.probing.probe import ProbeResult


def plot_few_shot(result: ProbeResult, path: Path) -> None:
    """Draw the accuracy by images per class, with a dot for each draw, up to all training images."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    metrics, classes = result.metrics, len(result.metrics.per_class)
    counts = [point.images / classes for point in result.few_shot] + [result.images / classes]
    means = [100 * point.mean for point in result.few_shot] + [100 * metrics.accuracy]
    spreads = [100 * point.spread for point in result.few_shot] + [0.0]
    low, high = (100 * bound for bound in metrics.accuracy_interval)

    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    blue, ink = "#1f5fa8", "#444444"
    axes.axhspan(low, high, color=blue, alpha=0.10, linewidth=0)
    axes.text(
        0.01, high, f"all {result.images:,} images: {100 * metrics.accuracy:.1f} %, 95 % interval", color=blue,
        fontsize=8.5, ha="left", va="bottom", transform=axes.get_yaxis_transform(),
    )  # fmt: skip
    lower, upper = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
    axes.fill_between(counts, lower, upper, color=blue, alpha=0.2, linewidth=0)
    axes.plot(counts, means, color=blue, linewidth=1.8, marker="o", markersize=5)
    for count, point in zip(counts, result.few_shot, strict=False):
        axes.plot([count] * len(point.accuracies), [100 * one for one in point.accuracies], ".", color=ink, alpha=0.5,
                  markersize=4, zorder=3)  # fmt: skip
    for count, mean in zip(counts[:-1], means, strict=False):
        axes.annotate(f"{mean:.1f}", (count, mean), (5, -11), textcoords="offset points", fontsize=8.5, color=ink)
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,.0f}" if count >= 10 else f"{count:.3g}" for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    axes.set_xlabel("training images per class")
    axes.set_ylabel(f"accuracy on {metrics.count:,} {metrics.split} images")
    axes.set_title("Logistic regression on frozen features", fontsize=11, loc="left")
    draws = "mean, standard deviation and each draw" if result.few_shot else ""
    axes.set_title(draws, fontsize=8.5, color=ink, loc="right")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")
