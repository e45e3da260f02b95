"""The figures of docs/textbook.md, one per chapter, drawn from numbers that the chapter's own code computes.

Most of them follow one picture, a boot drawn here, through the bundled vit-micro, which was trained on clothes.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitft.scratch import augment, embedding, heads, interop, optim, scalar_vit, tensors
from vitft.scratch.patchify import patchify
from vitft.scratch.scalar import Scalar
from vitft.scratch.tensors import Array
from vitft.scratch.torch_vit import TorchViT
from vitft.scratch.train import fit
from vitft.scratch.vit import ViT, map_arrays, named_arrays, vit, vit_backward
from vitft.scratch_runner.config import TextbookConfig
from vitft.scratch_runner.training import load_data, make_engine, make_plan, make_spec
from vitft.spec import ViTSpec

_INK, _FAINT, _PALE = "#1c1c1f", "#74747c", "#e4e4e8"
_BLUE, _ORANGE, _GREEN, _VIOLET = _COLORS = "#2b6cb0", "#dd7a26", "#2f9468", "#8a5fb5"
_STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "axes.edgecolor": _FAINT, "xtick.color": _FAINT, "ytick.color": _FAINT, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.7, "legend.frameon": False, "lines.linewidth": 1.4,
}  # fmt: skip


def draw_figures(folder: Path) -> list[Path]:
    """Write every figure as a PNG of 1200 x 450 pixels, named after its chapter; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for draw in FIGURES:
        with rc_context(_STYLE):
            figure = Figure(figsize=(8, 3), dpi=150, layout="constrained")
            draw(figure)
            written.append(folder / f"{draw.__name__.removeprefix('draw_')}.png")
            figure.savefig(written[-1], pil_kwargs={"optimize": True}, metadata={"Software": None})
    return written


def boot() -> NDArray[np.uint8]:
    """A gray ankle boot (28, 28), drawn at ten times the size and averaged."""
    large = Image.new("L", (280, 280))
    pen = ImageDraw.Draw(large)
    pen.polygon([(150, 15), (255, 15), (262, 225), (12, 225), (14, 185), (60, 150), (120, 135), (150, 95)], fill=170)
    pen.polygon([(150, 15), (175, 15), (165, 110), (120, 135), (150, 95)], fill=120)
    pen.rectangle((150, 15, 255, 35), fill=215)
    pen.rectangle((10, 225, 264, 245), fill=235)
    pen.rectangle((205, 225, 264, 262), fill=235)
    return np.asarray(large.resize((28, 28), Image.Resampling.BOX))


@cache
def trace_boot() -> tuple[ViT, ViTSpec, list[str], dict[str, Array]]:
    """vit-micro's weights, spec and class names, and the arrays of all stages when it sees the boot, by stage name."""
    folder = Path(str(files("vitft") / "assets" / "vit-micro"))
    w, spec = interop.load_folder(folder)
    labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
    stages = dict[str, Array]()
    images = augment.normalize(np.repeat(boot()[None, None], 3, axis=1), (0.5,) * 3, (0.5,) * 3)
    vit(images, w, spec, watch=stages.__setitem__)
    return w, spec, list(labels.values()), stages


def _picture(axes: Axes, pixels: NDArray[Any], title: str = "", *, bar: bool = False, **options: Any) -> None:
    """An array as an image without ticks, optionally with a color bar; `options` are those of imshow."""
    axes.set(xticks=[], yticks=[], title=title, frame_on=False)
    image = axes.imshow(pixels, **{"cmap": "gray", "interpolation": "nearest"} | options)
    if bar:
        axes.figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02)


def _bars(axes: Axes, names: Sequence[str], lengths: Sequence[float] | Array, title: str, color: str = _BLUE) -> None:
    """A horizontal bar chart, the first name on top."""
    axes.barh(names, lengths, color=color, height=0.65)
    axes.axvline(0, color=_FAINT, lw=0.7)
    axes.set(title=title, ylim=(len(names) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def draw_scalar(figure: Figure) -> None:
    """The graph of one neuron's squared error, with values, partial derivatives and gradients."""
    w, x, b, t = Scalar(0.5), Scalar(2.0), Scalar(-0.4), Scalar(0.9)
    error = (w * x + b).tanh() - t
    loss = error * error
    loss.backward()
    axes = figure.subplots()
    axes.set(xlim=(-0.5, 10.6), ylim=(-0.45, 3.45))
    axes.axis("off")
    inputs = ("w", 0, 2.9), ("x", 0, 1.5), ("b", 2.1, 0.1), ("t", 6.1, 0.1)
    computed = ("w · x", 2.1, 2.2), ("w · x + b", 4.15, 1.5), ("y = tanh", 6.1, 1.5), ("e = y − t", 8.0, 1.5)
    labels = (*inputs, *computed, ("L = e · e", 10.05, 1.5))
    places = dict(zip((w, x, b, t, *loss.topological_order()), labels, strict=True))
    plain = {"fc": "white", "ec": "none", "pad": 0.8}
    arrow: Any = {"arrowstyle": "-|>", "color": _FAINT, "shrinkA": 26, "shrinkB": 28}
    for node, (name, across, up) in places.items():
        box = {"boxstyle": "round,pad=0.45", "fc": "white", "ec": _BLUE if node.parents else _FAINT}
        text = f"{name}\n{node.value:.4g}\ngrad {node.grad:.3g}"
        axes.text(across, up, text, ha="center", va="center", bbox=box, linespacing=1.35, zorder=4)
        curves = (-0.45, 0.45) if node is loss else (0.0, 0.0)  # e is used twice
        for parent, slope, curve in zip(node.parents, node.partials, curves, strict=False):
            _, left, below = places[parent]
            axes.annotate("", (across, up), (left, below), arrowprops=arrow | {"connectionstyle": f"arc3,rad={curve}"})
            middle = 0.5 * (left + across), 0.5 * (below + up) - 1.3 * curve
            axes.text(*middle, f"{slope:.3g}", color=_ORANGE, ha="center", va="center", zorder=5, bbox=plain)


def draw_scalar_vit(figure: Figure) -> None:
    """One image of each pattern, and the loss of each step."""
    panels = figure.subplot_mosaic("abll;cdll", width_ratios=(1, 1, 2, 2))
    report = scalar_vit.train()
    for panel, sample in zip("abcd", report.predictions, strict=False):
        _picture(panels[panel], np.array(sample.image[0]), sample.label, vmin=-1, vmax=1)
    panels["l"].plot(range(1, 1 + len(report.losses)), report.losses, color=_BLUE, lw=1)
    panels["l"].axhline(np.log(4), color=_FAINT, lw=0.8, ls="--")
    panels["l"].text(200, np.log(4) + 0.03, "log 4: guessing among four", color=_FAINT, ha="right", va="bottom")
    panels["l"].set(title="mean loss of each batch, in nats", xlabel="step", ylim=(0, None), xlim=(0, 200))


def draw_tensors(figure: Figure) -> None:
    """The three activations and their slopes."""
    x = np.linspace(-3, 3, 601)
    activations = (tensors.relu, _FAINT, "-"), (tensors.gelu, _BLUE, "-"), (tensors.gelu_tanh, _ORANGE, (0, (2, 2)))
    for i, (axes, title) in enumerate(zip(figure.subplots(1, 2), ("y", "slope dy / dx"), strict=True)):
        for activation, color, dash in activations:
            axes.plot(x, activation(x)[i], color=color, ls=dash, label=activation.__name__)
        axes.set(title=title, xlabel="x", xlim=(-3, 3))
        axes.legend(loc="upper left")


def draw_patchify(figure: Figure) -> None:
    """The boot with a grid, its patches in a row, and each patch as a column of its numbers."""
    pixels, side = boot(), 7
    panels = figure.subplot_mosaic("ab;ac", width_ratios=(1, 2.3), height_ratios=(1, 3.4))
    _picture(panels["a"], pixels, "image (1, 28, 28), patches of 7 × 7")
    panels["a"].hlines(np.arange(0, 29, side) - 0.5, -0.5, 27.5, color=_ORANGE, lw=1, clip_on=False)
    panels["a"].vlines(np.arange(0, 29, side) - 0.5, -0.5, 27.5, color=_ORANGE, lw=1, clip_on=False)
    patches = patchify(pixels[None, None].astype(float), side, side)[0]  # (N, P·P)
    for i in range(len(patches)):
        panels["a"].text(i % 4 * side + 0.3, i // 4 * side + 1, str(i + 1), color=_ORANGE, va="center")
    spaced = [np.pad(patch.reshape(side, side), ((0, 0), (0, 1)), constant_values=np.nan) for patch in patches]
    _picture(panels["b"], np.hstack(spaced), "the 16 patches as a sequence")
    _picture(panels["c"], patches.T, aspect="auto")
    panels["c"].set(ylabel="49 pixels", xlabel="patch (each column is one flat patch)")
    panels["c"].set_xticks(range(16), map(str, range(1, 17)))


def draw_embedding(figure: Figure) -> None:
    """Sinusoidal positions, and the cosine similarity of vit-micro's learned ones."""
    w, spec, *_ = trace_boot()
    positions = w.embedding.positions
    assert positions is not None, "vit-micro has learned positions"
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    fixed = embedding.sinusoidal_positions(spec.tokens, spec.width)
    _picture(left, fixed, "by formula (N, D): sines and cosines", bar=True, cmap="RdBu_r", aspect="auto")
    left.set(xlabel="column", ylabel="token", xticks=range(0, 64, 10), yticks=range(0, 50, 10))
    units = positions[spec.prefix_tokens :] / np.linalg.norm(positions[spec.prefix_tokens :], axis=1, keepdims=True)
    similarity = (units @ units.T).reshape(*spec.grid, *spec.grid)
    spaced = np.pad(similarity, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    sheet = spaced.transpose(0, 2, 1, 3).reshape(8 * spec.grid[0], -1)
    _picture(right, sheet, "learned: cosine similarity", bar=True, cmap="viridis")
    right.set(ylabel="row of the patch", xlabel="column of the patch")


def draw_attention(figure: Figure) -> None:
    """The class token's attention weights, head by head, in the first and the last block."""
    _, spec, _, stages = trace_boot()
    panels = figure.subplot_mosaic("aa0123;aa4567")
    _picture(panels["a"], boot(), "the image")
    for number, (layer, head) in enumerate((layer, head) for layer in (1, spec.layers) for head in range(spec.heads)):
        weights = stages[f"block.{layer}.attention.softmax"][0, head, 0, spec.prefix_tokens :]
        axes = panels[str(number)]
        _picture(axes, boot(), alpha=0.35, extent=(0, 7, 7, 0))
        _picture(axes, weights.reshape(spec.grid), cmap="inferno", alpha=0.75, vmin=0, extent=(0, 7, 7, 0))
        axes.set(title=f"head {head + 1}: up to {100 * weights.max():.0f} %", ylabel="" if head else f"block {layer}")


def draw_mlp(figure: Figure) -> None:
    """The hidden values of vit-micro on the curve of gelu, and how many units respond."""
    *_, stages = trace_boot()
    left, right = figure.subplots(1, 2)
    x = np.linspace(-4, 4, 400)
    left.hist(stages["block.4.mlp.in"].ravel(), bins=60, density=True, color=_PALE)
    left.plot(x, tensors.gelu(x)[0], color=_BLUE)
    left.set(title="block 4: hidden values before gelu (gray), and gelu", xlabel="x", xlim=(-4, 4), ylim=(-0.3, 3))
    activated = stages["block.4.mlp.activation"][0]  # (N, M)
    tokens = (0, "class token", _ORANGE), (1, "upper left patch", _FAINT), (25, "middle patch", _BLUE)
    for token, name, color in tokens:
        right.plot(np.sort(activated[token])[::-1], color=color, label=name)
    right.set(title="after gelu: the 256 units of three tokens, sorted", xlabel="hidden units, strongest first")
    right.legend()


def draw_encoder(figure: Figure) -> None:
    """The norm of the residual stream, and of each sublayer's output."""
    *_, stages = trace_boot()
    stream = [array[0] for name, array in stages.items() if name.endswith(("positions", "residual"))]
    added = [array[0] for name, array in stages.items() if name.endswith(("attention.output", "mlp.out"))]
    groups = ("class token", slice(0, 1)), ("mean of the 49 patch tokens", slice(1, None))
    for axes, (title, tokens) in zip(figure.subplots(1, 2, sharey=True), groups, strict=True):
        stream_norms, added_norms = (
            [np.linalg.norm(x[tokens], axis=-1).mean() for x in arrays] for arrays in (stream, added)
        )
        axes.plot(range(9), stream_norms, color=_BLUE, marker="o", ms=3.5, label="norm of the residual stream")
        axes.bar(range(1, 9, 2), added_norms[0::2], color=_ORANGE, width=0.6, label="norm of attention's output")
        axes.bar(range(2, 9, 2), added_norms[1::2], color=_GREEN, width=0.6, label="norm of the MLP's output")
        axes.set(title=title, xlabel="after attention (a) and MLP (m) of block 1 to 4")
        axes.set_xticks(range(9), ["in", *(f"{sublayer}{block}" for block in range(1, 5) for sublayer in "am")])
        axes.legend(loc="upper left")


def draw_heads(figure: Figure) -> None:
    """Logits, probabilities, target, and the gradient of the logits."""
    _, _, labels, stages = trace_boot()
    _, saved = heads.cross_entropy(stages["head"], np.array([labels.index("Ankle boot")]), smoothing=0.1)
    panels = (
        ("logits", stages["head"], _BLUE), ("softmax: probabilities", saved.probabilities, _GREEN),
        ("target, smoothed by 0.1", saved.target, _ORANGE),
        ("gradient of the logits", heads.cross_entropy_backward(saved), _VIOLET),
    )  # fmt: skip
    for axes, (title, values, color) in zip(figure.subplots(1, 4, sharey=True), panels, strict=True):
        _bars(axes, labels, values[0], title, color)


def draw_vit(figure: Figure) -> None:
    """The gradient of the pixels, and the norm of the gradient of each part of the model."""
    w, spec, labels, stages = trace_boot()
    logits, saved = vit(stages["image"], w, spec)
    loss, saved_loss = heads.cross_entropy(logits, np.array([labels.index("Ankle boot")]))
    d_images, d_w = vit_backward(heads.cross_entropy_backward(saved_loss), saved, w, spec)
    first, second, third = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.5))
    _picture(first, boot(), f"image: loss {loss:.3f}")
    heat = d_images[0].sum(axis=0)
    largest = float(abs(heat).max())
    _picture(second, heat, "gradient of the pixels", bar=True, cmap="RdBu_r", vmin=-largest, vmax=largest)
    groups = ["embedding", *(f"blocks.{i}" for i in range(spec.layers)), "norm", "head"]
    norms = [np.sqrt(sum((d * d).sum() for name, d in named_arrays(d_w) if name.startswith(f"{g}."))) for g in groups]
    _bars(third, groups, norms, "norm of the weights' gradients")


def draw_augment(figure: Figure) -> None:
    """The boot as eight epochs see it."""
    rng = np.random.default_rng(0)
    augmented = augment.flip(augment.crop(np.repeat(boot()[None, None], 8, axis=0), 3, rng), rng)
    for number, axes in enumerate(figure.subplots(2, 4).flat):
        _picture(axes, augmented[number, 0], f"epoch {number + 1}")


def draw_optim(figure: Figure) -> None:
    """The paths of four optimizers in a narrow bowl, and three schedules."""
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    curvature = np.array([0.02, 1.0])  # loss = (0.02 a² + b²) / 2
    a, b = np.meshgrid(np.linspace(-10.5, 2.5, 200), np.linspace(-1.7, 1.7, 100))
    left.contour(a, b, (curvature[0] * a * a + curvature[1] * b * b) / 2, levels=9, colors=_PALE, linewidths=0.8)
    optimizers: tuple[tuple[optim.SGD | optim.Adam, float, str], ...] = (
        (optim.SGD(), 1.9, "SGD, lr 1.9"), (optim.SGD(0.9), 0.1, "momentum 0.9, lr 0.1"),
        (optim.Adam(), 0.3, "Adam, lr 0.3"), (optim.Adam(0.3), 0.3, "AdamW, lr 0.3, decay 0.3"),
    )  # fmt: skip
    for (optimizer, lr, name), color in zip(optimizers, _COLORS, strict=True):
        path: Array = np.array([[-10.0, 1.5]])
        for _ in range(40):
            now = path[-1].copy()
            optimizer.update({"x.weight": now}, {"x.weight": curvature * now}, lr)
            path = np.vstack([path, now])
        left.plot(*path.T, color=color, marker="o", ms=1.8, lw=0.9, label=name)
    left.set(title="40 steps of each, from the left", xlim=(-10.5, 2.5), ylim=(-1.7, 2.6))
    left.legend(loc="upper center", ncols=2)
    schedules: tuple[Literal["constant", "step", "cosine"], ...] = ("constant", "step", "cosine")
    for schedule, color, dash in zip(schedules, _COLORS, ("-", "--", "-"), strict=False):
        rates = [optim.lr_at(step, 1.0, 100, 10, schedule, 60) for step in range(100)]
        right.plot(rates, color=color, label=schedule, ls=dash)
    right.set(title="lr_at: 10 steps of warmup, then", xlabel="step", ylabel="fraction of lr", ylim=(0, 1.25))
    right.legend(loc="upper right", ncols=3)


def draw_train(figure: Figure) -> None:
    """Training on the bundled digits: loss of each step, accuracy of each epoch, and the worst predictions."""
    config = TextbookConfig(dataset="digits", epochs=16, batch_size=50, lr=4e-3, schedule="cosine", warmup_steps=20)
    data = load_data(config)
    spec, plan = make_spec(config, data), make_plan(config, data)
    engine, losses = make_engine(config, spec, plan), list[float]()
    history = fit(engine, data.train, data.test, spec, plan, lambda step, loss, lr: losses.append(loss))
    panels = figure.subplot_mosaic("llss012;llss345")
    panels["l"].plot(losses, color=_BLUE, lw=0.8)
    panels["l"].set(title="loss of each step's batch", xlabel="step", ylim=(0, None))
    for name, field, color in (("train", "accuracy", _FAINT), ("test", "test_accuracy", _ORANGE)):
        scores = [100 * getattr(epoch, field) for epoch in history]
        panels["s"].plot(range(1, 17), scores, color=color, marker="o", ms=2.5, label=name)
    panels["s"].set(title="accuracy in %", xlabel="epoch", xticks=range(0, 17, 4))
    panels["s"].legend(loc="lower right")
    pixels, labels = data.test.pixels, data.test.labels
    probabilities = tensors.softmax(engine.logits(augment.normalize(pixels, plan.mean, plan.std, plan.dtype)))
    for panel, i in enumerate(np.argsort(probabilities[np.arange(len(labels)), labels])[:6]):
        _picture(panels[str(panel)], pixels[i, 0], f"{labels[i]} → {probabilities[i].argmax()}")


def draw_torch_vit(figure: Figure) -> None:
    """The largest difference between the two engines in each stage, in single and in double precision."""
    weights, spec, _, stages = trace_boot()
    axes, names = figure.subplots(), list(stages)[1:]  # the first stage is the image itself
    for dtype, color in ((np.float32, _ORANGE), (np.float64, _BLUE)):
        w = map_arrays(weights, partial(np.asarray, dtype=dtype))
        images: Array = stages["image"].astype(dtype)
        ours, theirs = dict[str, Array](), dict[str, Array]()
        vit(images, w, spec, watch=ours.__setitem__)
        with torch.inference_mode():
            TorchViT(spec).load(w).watched_by(theirs.__setitem__)(torch.from_numpy(images))
        differences = [np.abs(ours[name] - theirs[name]).max() / np.abs(ours[name]).max() for name in names]
        axes.plot(differences, "o", color=color, ms=3.5)
        axes.axhline(eps := float(np.finfo(dtype).eps), color=color, lw=0.8, ls="--")
        axes.text(len(differences), eps, f" {np.dtype(dtype)}", color=color, va="center")
    axes.set(yscale="log", ylabel="largest difference / largest value", xlim=(-1, len(names)))
    starts = [i for i, name in enumerate(names) if name.endswith(("attention.norm", "projection")) or name == "norm"]
    axes.set_xticks(starts, [names[i].removesuffix(".attention.norm").split(".p")[0] for i in starts])
    axes.vlines(np.array(starts) - 0.5, 0, 1, color=_PALE, lw=0.8, transform=axes.get_xaxis_transform())


def draw_interop(figure: Figure) -> None:
    """Query, key and value matrices as Transformers stores them, and the textbook's one matrix."""
    (w, spec, *_), names = trace_boot(), ("query", "key", "value")
    state = interop.to_transformers(w, spec)
    options: Any = {"cmap": colormaps["RdBu_r"].resampled(13), "vmin": -0.3, "vmax": 0.3}
    *three, axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 0.75))
    for square, name in zip(three, names, strict=True):
        stored = state[f"vit.encoder.layer.0.attention.attention.{name}.weight"]
        _picture(square, stored, f"Transformers: {name} (64, 64)", **options)
    _picture(axes, w.blocks[0].attention.qkv.weight, "textbook: qkv (192, 64)", bar=True, **options)
    axes.set_yticks(np.arange(spec.width // 2, 3 * spec.width, spec.width), names)
    for row in range(0, 3 * spec.width, spec.head_width):
        axes.axhline(row - 0.5, color=_INK, lw=0.3 if row % spec.width else 1)


FIGURES: tuple[Callable[[Figure], None], ...] = (
    draw_scalar, draw_scalar_vit, draw_tensors, draw_patchify, draw_embedding, draw_attention, draw_mlp,
    draw_encoder, draw_heads, draw_vit, draw_augment, draw_optim, draw_train, draw_torch_vit, draw_interop,
)  # fmt: skip
"""The function that draws each chapter's figure, in the order of the book."""
