"""The figures of docs/textbook.md: one a chapter, drawn from the numbers that the chapter's own code computes.

Most follow one picture, a boot drawn here, through the bundled vit-micro, which knows clothes.
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
from vitft.scratch.vit import ViT, mapped, named, vit, vit_backward
from vitft.scratch_runner.config import TextbookConfig
from vitft.scratch_runner.training import engine_of, load, plan_of, spec_of
from vitft.spec import ViTSpec

_INK, _FAINT, _PALE = "#1c1c1f", "#74747c", "#e4e4e8"
_BLUE, _ORANGE, _GREEN, _VIOLET = _COLOURS = "#2b6cb0", "#dd7a26", "#2f9468", "#8a5fb5"
_STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 7.5, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "axes.edgecolor": _FAINT, "xtick.color": _FAINT, "ytick.color": _FAINT, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.7, "legend.frameon": False, "lines.linewidth": 1.4,
}  # fmt: skip


def draw_figures(folder: Path) -> list[Path]:
    """Write every figure as a PNG of 1200 x 450 pixels, named for its chapter, and say where they are."""
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
    """A grey ankle boot (28, 28), drawn ten times as large and averaged."""
    large = Image.new("L", (280, 280))
    pen = ImageDraw.Draw(large)
    pen.polygon([(150, 15), (255, 15), (262, 225), (12, 225), (14, 185), (60, 150), (120, 135), (150, 95)], fill=170)
    pen.polygon([(150, 15), (175, 15), (165, 110), (120, 135), (150, 95)], fill=120)
    pen.rectangle((150, 15, 255, 35), fill=215)
    pen.rectangle((10, 225, 264, 245), fill=235)
    pen.rectangle((205, 225, 264, 262), fill=235)
    return np.asarray(large.resize((28, 28), Image.Resampling.BOX))


@cache
def seen() -> tuple[ViT, ViTSpec, list[str], dict[str, Array]]:
    """vit-micro's weights, spec and classes, and all stages of the boot in it, by name."""
    folder = Path(str(files("vitft") / "assets" / "vit-micro"))
    w, spec = interop.load_folder(folder)
    labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
    stages = dict[str, Array]()
    images = augment.normalise(np.repeat(boot()[None, None], 3, axis=1), (0.5,) * 3, (0.5,) * 3)
    vit(images, w, spec, watch=stages.__setitem__)
    return w, spec, list(labels.values()), stages


def _picture(axes: Axes, pixels: NDArray[Any], title: str = "", *, bar: bool = False, **how: Any) -> None:
    """An array as squares, without ticks; with a bar of its colours beside it."""
    axes.set(xticks=[], yticks=[], title=title, frame_on=False)
    shown = axes.imshow(pixels, **{"cmap": "gray", "interpolation": "nearest"} | how)
    if bar:
        axes.figure.colorbar(shown, ax=axes, fraction=0.045, pad=0.02)


def _bars(axes: Axes, names: Sequence[str], lengths: Sequence[float] | Array, title: str, colour: str = _BLUE) -> None:
    """A bar for each name, the first on top."""
    axes.barh(names, lengths, color=colour, height=0.65)
    axes.axvline(0, color=_FAINT, lw=0.7)
    axes.set(title=title, ylim=(len(names) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def draw_scalar(figure: Figure) -> None:
    """The graph of one neuron's squared error: values, partial derivatives, gradients."""
    w, x, b, t = Scalar(0.5), Scalar(2.0), Scalar(-0.4), Scalar(0.9)
    error = (w * x + b).tanh() - t
    loss = error * error
    loss.backward()
    axes = figure.subplots()
    axes.set(xlim=(-0.5, 10.6), ylim=(-0.45, 3.45))
    axes.axis("off")
    leaves = ("w", 0, 2.9), ("x", 0, 1.5), ("b", 2.1, 0.1), ("t", 6.1, 0.1)
    computed = ("w · x", 2.1, 2.2), ("w · x + b", 4.15, 1.5), ("y = tanh", 6.1, 1.5), ("e = y − t", 8.0, 1.5)
    spots = (*leaves, *computed, ("L = e · e", 10.05, 1.5))
    places = dict(zip((w, x, b, t, *loss.computed()), spots, strict=True))
    plain = {"fc": "white", "ec": "none", "pad": 0.8}
    arrow: Any = {"arrowstyle": "-|>", "color": _FAINT, "shrinkA": 26, "shrinkB": 28}
    for node, (name, across, up) in places.items():
        box = {"boxstyle": "round,pad=0.45", "fc": "white", "ec": _BLUE if node.parents else _FAINT}
        said = f"{name}\n{node.value:.4g}\ngrad {node.grad:.3g}"
        axes.text(across, up, said, ha="center", va="center", bbox=box, linespacing=1.35, zorder=4)
        bends = (-0.45, 0.45) if node is loss else (0.0, 0.0)  # e is used twice
        for parent, slope, bend in zip(node.parents, node.partials, bends, strict=False):
            _, left, below = places[parent]
            axes.annotate("", (across, up), (left, below), arrowprops=arrow | {"connectionstyle": f"arc3,rad={bend}"})
            at = 0.5 * (left + across), 0.5 * (below + up) - 1.3 * bend
            axes.text(*at, f"{slope:.3g}", color=_ORANGE, ha="center", va="center", zorder=5, bbox=plain)


def draw_scalar_vit(figure: Figure) -> None:
    """One image of each pattern, and the loss of each step."""
    parts = figure.subplot_mosaic("abll;cdll", width_ratios=(1, 1, 2, 2))
    report = scalar_vit.train()
    for place, one in zip("abcd", report.predictions, strict=False):
        _picture(parts[place], np.array(one.image[0]), one.label, vmin=-1, vmax=1)
    parts["l"].plot(range(1, 1 + len(report.losses)), report.losses, color=_BLUE, lw=1)
    parts["l"].axhline(np.log(4), color=_FAINT, lw=0.8, ls="--")
    parts["l"].text(200, np.log(4) + 0.03, "log 4: a guess among four", color=_FAINT, ha="right", va="bottom")
    parts["l"].set(title="the batch's mean loss, in nats", xlabel="step", ylim=(0, None), xlim=(0, 200))


def draw_tensors(figure: Figure) -> None:
    """The three activations, and their slopes."""
    x = np.linspace(-3, 3, 601)
    bends = (tensors.relu, _FAINT, "-"), (tensors.gelu, _BLUE, "-"), (tensors.gelu_tanh, _ORANGE, (0, (2, 2)))
    for which, (axes, title) in enumerate(zip(figure.subplots(1, 2), ("y", "slope dy / dx"), strict=True)):
        for bend, colour, dash in bends:
            axes.plot(x, bend(x)[which], color=colour, ls=dash, label=bend.__name__)
        axes.set(title=title, xlabel="x", xlim=(-3, 3))
        axes.legend(loc="upper left")


def draw_patchify(figure: Figure) -> None:
    """The boot with its grid, its patches in a row, and each as the column of its numbers."""
    pixels, side = boot(), 7
    parts = figure.subplot_mosaic("ab;ac", width_ratios=(1, 2.3), height_ratios=(1, 3.4))
    _picture(parts["a"], pixels, "image (1, 28, 28), patches of 7 × 7")
    parts["a"].hlines(np.arange(0, 29, side) - 0.5, -0.5, 27.5, color=_ORANGE, lw=1, clip_on=False)
    parts["a"].vlines(np.arange(0, 29, side) - 0.5, -0.5, 27.5, color=_ORANGE, lw=1, clip_on=False)
    patches = patchify(pixels[None, None].astype(float), side, side)[0]  # (N, P·P)
    for i in range(len(patches)):
        parts["a"].text(i % 4 * side + 0.3, i // 4 * side + 1, str(i + 1), color=_ORANGE, va="center")
    apart = [np.pad(patch.reshape(side, side), ((0, 0), (0, 1)), constant_values=np.nan) for patch in patches]
    _picture(parts["b"], np.hstack(apart), "the same, one after another: a sequence of N = 16")
    _picture(parts["c"], patches.T, aspect="auto")
    parts["c"].set(ylabel="49 pixels", xlabel="patch: each column is one flat patch")
    parts["c"].set_xticks(range(16), map(str, range(1, 17)))


def draw_embedding(figure: Figure) -> None:
    """Positions by formula, and how alike vit-micro's learned ones are."""
    w, spec, *_ = seen()
    positions = w.embedding.positions
    assert positions is not None, "vit-micro learned its positions"
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    by_formula = embedding.sinusoidal_positions(spec.tokens, spec.width)
    _picture(left, by_formula, "by formula (N, D): sines and cosines", bar=True, cmap="RdBu_r", aspect="auto")
    left.set(xlabel="column", ylabel="token", xticks=range(0, 64, 10), yticks=range(0, 50, 10))
    units = positions[spec.prefix_tokens :] / np.linalg.norm(positions[spec.prefix_tokens :], axis=1, keepdims=True)
    alike = (units @ units.T).reshape(*spec.grid, *spec.grid)
    apart = np.pad(alike, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    sheet = apart.transpose(0, 2, 1, 3).reshape(8 * spec.grid[0], -1)
    _picture(right, sheet, "learned: cosine similarity", bar=True, cmap="viridis")
    right.set(ylabel="row of the patch", xlabel="column of the patch")


def draw_attention(figure: Figure) -> None:
    """Where the class token looks, head by head, in the first and the last block."""
    _, spec, _, stages = seen()
    parts = figure.subplot_mosaic("aa0123;aa4567")
    _picture(parts["a"], boot(), "what it looks at")
    for number, (layer, head) in enumerate((layer, head) for layer in (1, spec.layers) for head in range(spec.heads)):
        shares = stages[f"block.{layer}.attention.softmax"][0, head, 0, spec.prefix_tokens :]
        axes = parts[str(number)]
        _picture(axes, boot(), alpha=0.35, extent=(0, 7, 7, 0))
        _picture(axes, shares.reshape(spec.grid), cmap="inferno", alpha=0.75, vmin=0, extent=(0, 7, 7, 0))
        axes.set(title=f"head {head + 1}: up to {100 * shares.max():.0f} %", ylabel="" if head else f"block {layer}")


def draw_mlp(figure: Figure) -> None:
    """Where the hidden numbers of vit-micro fall on the bend, and how many answer."""
    *_, stages = seen()
    left, right = figure.subplots(1, 2)
    x = np.linspace(-4, 4, 400)
    left.hist(stages["block.4.mlp.in"].ravel(), bins=60, density=True, color=_PALE)
    left.plot(x, tensors.gelu(x)[0], color=_BLUE)
    left.set(title="block 4: hidden numbers before the bend (grey), and gelu", xlabel="x", xlim=(-4, 4), ylim=(-0.3, 3))
    bent = stages["block.4.mlp.activation"][0]  # (N, M)
    tokens = (0, "class token", _ORANGE), (1, "upper left patch", _FAINT), (25, "middle patch", _BLUE)
    for token, name, colour in tokens:
        right.plot(np.sort(bent[token])[::-1], color=colour, label=name)
    right.set(title="after it: the 256 of three tokens, sorted", xlabel="hidden units, strongest first")
    right.legend()


def draw_encoder(figure: Figure) -> None:
    """How long the residual stream's vectors are, and what each part adds."""
    *_, stages = seen()
    stream = [array[0] for name, array in stages.items() if name.endswith(("positions", "residual"))]
    added = [array[0] for name, array in stages.items() if name.endswith(("attention.output", "mlp.out"))]
    which = ("class token", slice(0, 1)), ("mean of the 49 patch tokens", slice(1, None))
    for axes, (title, tokens) in zip(figure.subplots(1, 2, sharey=True), which, strict=True):
        length, step = ([np.linalg.norm(x[tokens], axis=-1).mean() for x in arrays] for arrays in (stream, added))
        axes.plot(range(9), length, color=_BLUE, marker="o", ms=3.5, label="length of the stream")
        axes.bar(range(1, 9, 2), step[0::2], color=_ORANGE, width=0.6, label="of what attention adds")
        axes.bar(range(2, 9, 2), step[1::2], color=_GREEN, width=0.6, label="of what the MLP adds")
        axes.set(title=title, xlabel="after attention (a) and MLP (m) of block 1 to 4")
        axes.set_xticks(range(9), ["in", *(f"{part}{block}" for block in range(1, 5) for part in "am")])
        axes.legend(loc="upper left")


def draw_heads(figure: Figure) -> None:
    """Logits to shares, the shares that are wanted, and the gradient between them."""
    _, _, labels, stages = seen()
    _, saved = heads.cross_entropy(stages["head"], np.array([labels.index("Ankle boot")]), smoothing=0.1)
    panels = (
        ("logits", stages["head"], _BLUE), ("softmax: shares", saved.shares, _GREEN),
        ("target, smoothed by 0.1", saved.target, _ORANGE),
        ("gradient of the logits", heads.cross_entropy_backward(saved), _VIOLET),
    )  # fmt: skip
    for axes, (title, values, colour) in zip(figure.subplots(1, 4, sharey=True), panels, strict=True):
        _bars(axes, labels, values[0], title, colour)


def draw_vit(figure: Figure) -> None:
    """The loss's gradient of the image, and the length of every part's gradient."""
    w, spec, labels, stages = seen()
    logits, saved = vit(stages["image"], w, spec)
    loss, saved_loss = heads.cross_entropy(logits, np.array([labels.index("Ankle boot")]))
    d_images, d_w = vit_backward(heads.cross_entropy_backward(saved_loss), saved, w, spec)
    first, second, third = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.5))
    _picture(first, boot(), f"image: loss {loss:.3f}")
    heat = d_images[0].sum(axis=0)
    most = float(abs(heat).max())
    _picture(second, heat, "gradient of its pixels", bar=True, cmap="RdBu_r", vmin=-most, vmax=most)
    groups = ["embedding", *(f"blocks.{i}" for i in range(spec.layers)), "norm", "head"]
    lengths = [np.sqrt(sum((d * d).sum() for name, d in named(d_w) if name.startswith(f"{g}."))) for g in groups]
    _bars(third, groups, lengths, "length of the weights' gradients")


def draw_augment(figure: Figure) -> None:
    """The boot as eight epochs see it."""
    rng = np.random.default_rng(0)
    changed = augment.flip(augment.crop(np.repeat(boot()[None, None], 8, axis=0), 3, rng), rng)
    for number, axes in enumerate(figure.subplots(2, 4).flat):
        _picture(axes, changed[number, 0], f"epoch {number + 1}")


def draw_optim(figure: Figure) -> None:
    """Four ways down a narrow bowl, and three schedules."""
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    steep = np.array([0.02, 1.0])  # loss = (0.02 a² + b²) / 2
    a, b = np.meshgrid(np.linspace(-10.5, 2.5, 200), np.linspace(-1.7, 1.7, 100))
    left.contour(a, b, (steep[0] * a * a + steep[1] * b * b) / 2, levels=9, colors=_PALE, linewidths=0.8)
    ways: tuple[tuple[optim.SGD | optim.Adam, float, str], ...] = (
        (optim.SGD(), 1.9, "SGD, lr 1.9"), (optim.SGD(0.9), 0.1, "momentum 0.9, lr 0.1"),
        (optim.Adam(), 0.3, "Adam, lr 0.3"), (optim.Adam(0.3), 0.3, "AdamW, lr 0.3, decay 0.3"),
    )  # fmt: skip
    for (optimizer, lr, name), colour in zip(ways, _COLOURS, strict=True):
        path: Array = np.array([[-10.0, 1.5]])
        for _ in range(40):
            now = path[-1].copy()
            optimizer.update({"x.weight": now}, {"x.weight": steep * now}, lr)
            path = np.vstack([path, now])
        left.plot(*path.T, color=colour, marker="o", ms=1.8, lw=0.9, label=name)
    left.set(title="40 steps of each, from the left", xlim=(-10.5, 2.5), ylim=(-1.7, 2.6))
    left.legend(loc="upper center", ncols=2)
    schedules: tuple[Literal["constant", "step", "cosine"], ...] = ("constant", "step", "cosine")
    for schedule, colour, dash in zip(schedules, _COLOURS, ("-", "--", "-"), strict=False):
        rates = [optim.lr_at(step, 1.0, 100, 10, schedule, 60) for step in range(100)]
        right.plot(rates, color=colour, label=schedule, ls=dash)
    right.set(title="lr_at: 10 steps of warm-up, then", xlabel="step", ylabel="share of lr", ylim=(0, 1.25))
    right.legend(loc="upper right", ncols=3)


def draw_train(figure: Figure) -> None:
    """A network learns the bundled digits: each step's loss, each epoch's scores, and what it is least sure of."""
    config = TextbookConfig(dataset="digits", epochs=16, batch_size=50, lr=4e-3, schedule="cosine", warmup_steps=20)
    data = load(config)
    spec, plan = spec_of(config, data), plan_of(config, data)
    engine, losses = engine_of(config, spec, plan), list[float]()
    history = fit(engine, data.train, data.test, spec, plan, lambda step, loss, lr: losses.append(loss))
    parts = figure.subplot_mosaic("llss012;llss345")
    parts["l"].plot(losses, color=_BLUE, lw=0.8)
    parts["l"].set(title="loss of each step's batch", xlabel="step", ylim=(0, None))
    for name, field, colour in (("train", "accuracy", _FAINT), ("test", "test_accuracy", _ORANGE)):
        scores = [100 * getattr(epoch, field) for epoch in history]
        parts["s"].plot(range(1, 17), scores, color=colour, marker="o", ms=2.5, label=name)
    parts["s"].set(title="accuracy in %", xlabel="epoch", xticks=range(0, 17, 4))
    parts["s"].legend(loc="lower right")
    pixels, labels = data.test.pixels, data.test.labels
    shares = tensors.softmax(engine.logits(augment.normalise(pixels, plan.mean, plan.std, plan.dtype)))
    for place, i in enumerate(np.argsort(shares[np.arange(len(shares)), labels])[:6]):
        _picture(parts[str(place)], pixels[i, 0], f"{labels[i]}, not {shares[i].argmax()}")


def draw_torch_vit(figure: Figure) -> None:
    """How far the two engines are apart, stage by stage, in single and in double precision."""
    bundle, spec, _, stages = seen()
    axes, names = figure.subplots(), list(stages)[1:]  # the first stage is the image itself
    for dtype, colour in ((np.float32, _ORANGE), (np.float64, _BLUE)):
        w = mapped(bundle, partial(np.asarray, dtype=dtype))
        images: Array = stages["image"].astype(dtype)
        ours, theirs = dict[str, Array](), dict[str, Array]()
        vit(images, w, spec, watch=ours.__setitem__)
        with torch.inference_mode():
            TorchViT(spec).load(w).watched_by(theirs.__setitem__)(torch.from_numpy(images))
        gaps = [np.abs(ours[name] - theirs[name]).max() / np.abs(ours[name]).max() for name in names]
        axes.plot(gaps, "o", color=colour, ms=3.5)
        axes.axhline(eps := float(np.finfo(dtype).eps), color=colour, lw=0.8, ls="--")
        axes.text(len(gaps), eps, f" {np.dtype(dtype)}", color=colour, va="center")
    axes.set(yscale="log", ylabel="largest difference / largest value", xlim=(-1, len(names)))
    starts = [i for i, name in enumerate(names) if name.endswith(("attention.norm", "projection")) or name == "norm"]
    axes.set_xticks(starts, [names[i].removesuffix(".attention.norm").split(".p")[0] for i in starts])
    axes.vlines(np.array(starts) - 0.5, 0, 1, color=_PALE, lw=0.8, transform=axes.get_xaxis_transform())


def draw_interop(figure: Figure) -> None:
    """Three matrices as Transformers stores them, and the one of the chapters."""
    (w, spec, *_), names = seen(), ("query", "key", "value")
    state = interop.to_transformers(w, spec)
    how: Any = {"cmap": colormaps["RdBu_r"].resampled(13), "vmin": -0.3, "vmax": 0.3}
    *three, axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 0.75))
    for square, name in zip(three, names, strict=True):
        stored = state[f"vit.encoder.layer.0.attention.attention.{name}.weight"]
        _picture(square, stored, f"Transformers: {name} (64, 64)", **how)
    _picture(axes, w.blocks[0].attention.qkv.weight, "the chapters: qkv (192, 64)", bar=True, **how)
    axes.set_yticks(np.arange(spec.width // 2, 3 * spec.width, spec.width), names)
    for row in range(0, 3 * spec.width, spec.head_width):
        axes.axhline(row - 0.5, color=_INK, lw=0.3 if row % spec.width else 1)


FIGURES: tuple[Callable[[Figure], None], ...] = (
    draw_scalar, draw_scalar_vit, draw_tensors, draw_patchify, draw_embedding, draw_attention, draw_mlp,
    draw_encoder, draw_heads, draw_vit, draw_augment, draw_optim, draw_train, draw_torch_vit, draw_interop,
)  # fmt: skip
"""What draws the figure of each chapter, in the order of the book."""
