"""One image through one checkpoint, three times: with the NumPy chapters, the torch chapter, and Transformers.

Stages have the names of `vitft.spec.stages`. The three computations should differ only by rounding; the trace shows by
how much.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich import box
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from vitft.checkpoints.checkpoint import find_model
from vitft.data.augment import Preprocess, normalize, resize_and_crop
from vitft.data.decoder import BadImage, decode
from vitft.errors import DataError, ModelError
from vitft.evaluation.loading import load_model
from vitft.explain.relevance import class_relevance
from vitft.io import console
from vitft.io.console import safe
from vitft.io.paths import expanded
from vitft.scratch import augment
from vitft.scratch.interop import from_transformers
from vitft.scratch.tensors import Array, softmax
from vitft.scratch.torch_vit import TorchViT
from vitft.scratch.vit import ViT, vit
from vitft.scratch_runner.run import is_textbook_run, read_run
from vitft.spec import ViTSpec, spec_from_config

Stages = dict[str, Array]

CLASSES = 5
"""How many classes, the most probable ones, have a map of what speaks for them."""
_ROUNDING = 1e-3  # of a stage's largest value: far above what float32 loses in a trained ViT, far below an error


@dataclass(frozen=True)
class Trace:
    """The output of every stage for one image, float32, from each of the three computations.

    `pixels` is the model's input before normalization; `rescale`, `mean` and `std` normalize its first channel.
    For a textbook network, which Transformers cannot run, `by_transformers` is empty.
    """

    path: Path
    checkpoint: str
    pixels: NDArray[np.uint8]  # (H, W, 3)
    labels: tuple[str, ...]
    spec: ViTSpec
    weights: ViT
    rescale: float
    mean: float
    std: float
    by_numpy: Stages
    by_torch: Stages
    by_transformers: Stages
    relevance: (
        Array  # (5 or fewer, rows, columns): how much each patch speaks for each of the first classes of `scores`
    )

    @property
    def scores(self) -> list[tuple[str, float]]:
        """Class names and probabilities, the highest first."""
        probabilities = softmax(self.by_numpy["head"][0].astype(np.float64))
        return [(self.labels[i], float(probabilities[i])) for i in np.argsort(-probabilities)]


def trace_image(image: Path, checkpoint: str | Path) -> Trace:
    """Run an image through a checkpoint: a run of `train` or `scratch train`, a Transformers ViT folder or a hub id.

    Raises DataError if the image cannot be read, ModelError if the checkpoint is not a plain ViT.
    """
    folder = expanded(checkpoint)
    by_numpy, by_torch, by_transformers = Stages(), Stages(), Stages()
    if is_textbook_run(folder):
        network = read_run(folder)
        spec, weights, labels, mean, std = network.spec, network.weights, network.labels, network.mean, network.std
        rescale = 1 / 255
        pixels = _model_input(image, Preprocess(spec.image_height, spec.image_width))
        x = torch.from_numpy(augment.normalize(_channels_first(pixels, spec), mean, std))
    else:
        if not find_model(folder).exists() and "/" in str(checkpoint) and folder.parent.is_dir():
            raise ModelError(f"{checkpoint}: no such folder; give a run, a model folder or a hub id.")
        loaded = load_model(checkpoint, headless=True)
        if loaded.new_head:
            console.warn(f"{checkpoint} has no classification head: the stages after pool use an untrained one")
        if loaded.scoring != "softmax":
            raise ModelError(
                f"{checkpoint} scores each label on its own ({loaded.scoring}), but the chapters end with a softmax; "
                "use a single-label checkpoint."
            )
        model, labels = loaded.model.eval(), loaded.labels
        spec = spec_from_config(config := model.config.to_dict())
        if config["model_type"] != "vit":
            raise ModelError(
                f"{checkpoint} is a {config['model_type']}, but the chapters follow plain ViTs; use one (vit), or, for "
                "what speaks for a class, vitft predict --explain."
            )
        preprocess = loaded.preprocess
        rescale, mean, std = preprocess.rescale, preprocess.mean, preprocess.std
        pixels = _model_input(image, preprocess)
        x = normalize(torch.from_numpy(pixels)[None], preprocess).contiguous()
        weights = from_transformers({name: p.detach().numpy() for name, p in model.named_parameters()}, spec)
        with torch.no_grad():
            _run_transformers(model, spec, x, _save_to(by_transformers))
    with np.errstate(all="ignore"):  # non-finite numbers are reported below
        vit(x.numpy(), weights, spec, watch=_save_to(by_numpy))
    by_chapter = TorchViT(spec).load(weights).watched_by(_save_to(by_torch))
    with torch.no_grad():
        by_chapter(x)
    if broken := next((name for name, array in by_numpy.items() if not np.isfinite(array).all()), None):
        raise ModelError(f"{checkpoint}: non-finite numbers in {broken}: broken weights; use another checkpoint.")
    best = np.argsort(-by_numpy["head"][0])[:CLASSES].tolist()
    return Trace(
        image, str(checkpoint), pixels, labels, spec, weights, rescale, mean[0], std[0], by_numpy, by_torch,
        by_transformers, class_relevance(by_chapter, x, best),
    )  # fmt: skip


def _model_input(image: Path, preprocess: Preprocess) -> NDArray[np.uint8]:
    """The image at the size of the model's input, (H, W, 3)."""
    try:
        decoded = decode(expanded(image), value_range=preprocess.value_range)
    except (BadImage, OSError) as error:
        raise DataError(f"{image}: {getattr(error, 'strerror', None) or error}; give an image file.") from None
    pixels: NDArray[np.uint8] = resize_and_crop(torch.from_numpy(decoded)[None], preprocess)[0].numpy()
    return pixels


def _channels_first(image: NDArray[np.uint8], spec: ViTSpec) -> NDArray[np.uint8]:
    """The image (H, W, 3) as a batch (1, C, H, W), in gray for a network with one channel."""
    planes = np.asarray(Image.fromarray(image).convert("L"))[..., None] if spec.channels == 1 else image
    return planes.transpose(2, 0, 1)[None]


def _save_to(stages: Stages) -> Callable[[str, Array], None]:
    return lambda name, array: stages.update({name: np.array(array)})


def _run_transformers(model: Any, spec: ViTSpec, pixels: torch.Tensor, save: Callable[[str, Array], None]) -> None:
    """Run Transformers' model with hooks that save the stages, which are inputs or outputs of its modules."""
    model.set_attn_implementation("eager")  # fused attention never computes the attention weights
    base = model.base_model
    handles = []

    def after(module: Any, name: str, change: Callable[[Any], Any] = lambda output: output) -> None:
        handles.append(module.register_forward_hook(lambda _, __, output: save(name, change(output).numpy())))

    def before(module: Any, name: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda _, inputs: save(name, inputs[0].numpy())))

    before(base.embeddings.patch_embeddings, "image")
    after(base.embeddings.patch_embeddings.projection, "embed.projection")
    after(base.embeddings.patch_embeddings, "embed.patches")
    positions = base.embeddings.position_embeddings
    after(base.embeddings, "embed.class_token", lambda tokens: tokens - positions)
    after(base.embeddings, "embed.positions")
    for number, layer in enumerate(base.layers, 1):
        attention, mlp = f"block.{number}.attention", f"block.{number}.mlp"
        projections: list[Any] = []

        def stack(output: Any, projections: list[Any] = projections) -> Any:
            projections.append(output.unflatten(-1, (spec.heads, spec.head_width)).transpose(1, 2))
            return torch.stack(projections, dim=1)

        after(layer.layernorm_before, f"{attention}.norm")
        for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
            after(projection, f"{attention}.qkv", stack)  # saved three times; the last one has all of them
        after(layer.attention, f"{attention}.softmax", lambda outputs: outputs[1])
        before(layer.attention.o_proj, f"{attention}.mix")
        after(layer.attention.o_proj, f"{attention}.output")
        before(layer.layernorm_after, f"{attention}.residual")
        after(layer.layernorm_after, f"{mlp}.norm")
        after(layer.mlp.fc1, f"{mlp}.in")
        after(layer.mlp.activation_fn, f"{mlp}.activation")
        after(layer.mlp.fc2, f"{mlp}.out")
        after(layer, f"{mlp}.residual")
    after(base.layernorm, "norm")
    before(model.classifier, "pool")
    after(model.classifier, "head")
    try:
        model(pixel_values=pixels)
    finally:
        for handle in handles:
            handle.remove()


# -- the trace as a document and as a table --------------------------------------------------------


def document(trace: Trace, stages: Iterable[str] | None = None) -> dict[str, Any]:
    """The trace, JSON-ready: image, scores, and `statistics` of all stages or of the given ones."""
    return {
        "image": str(trace.path),
        "scores": [{"label": label, "score": score} for label, score in trace.scores],
        "stages": [statistics(trace, name) for name in (trace.by_numpy if stages is None else stages)],
    }


def statistics(trace: Trace, name: str) -> dict[str, Any]:
    """Statistics of a stage, and the largest differences between the computations, JSON-ready.

    max_abs_diff is the largest absolute difference; max_rel_diff is that relative to the largest value of the stage.
    Both are None for a stage that Transformers never has as a tensor.
    """
    array = trace.by_numpy[name].astype(np.float64)
    largest = float(np.abs(array).max()) or 1.0
    others = {"numpy_torch": trace.by_torch, "numpy_transformers": trace.by_transformers}
    differences = {
        pair: float(np.abs(array - other[name]).max()) if name in other else None for pair, other in others.items()
    }
    return {
        "name": name, "shape": list(array.shape), "mean": float(array.mean()), "std": float(array.std()),
        "min": float(array.min()), "max": float(array.max()), "norm": float(np.linalg.norm(array)),
        "max_abs_diff": differences,
        "max_rel_diff": {pair: None if value is None else value / largest for pair, value in differences.items()},
    }  # fmt: skip


def trace_table(trace: Trace) -> Group:
    """The stages of a trace as a table with a legend; it fits in 80 columns."""
    pairs = {"numpy_torch": "Δ torch"} | ({"numpy_transformers": "Δ HF"} if trace.by_transformers else {})
    numbers = (Column(name, justify="right", no_wrap=True) for name in ("mean", "std", "min", "max", *pairs.values()))
    columns = Column("stage", no_wrap=True), Column("shape", overflow="fold"), *numbers
    table = Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    largest = 0.0
    for name in trace.by_numpy:
        row = statistics(trace, name)
        differences = [row["max_rel_diff"][pair] for pair in pairs]
        largest = max(largest, *(value for value in differences if value is not None))
        short_name = name.replace("block.", "").replace("attention", "attn")
        table.add_row(
            short_name, "×".join(map(str, row["shape"])), *(f"{row[key]:.3g}" for key in ("mean", "std", "min", "max")),
            *("·" if value is None else f"{value:.0e}" for value in differences),
        )  # fmt: skip
    best = ", ".join(f"{label} {100 * score:.1f} %" for label, score in trace.scores[:3])
    rounding = "float32 rounding" if largest < _ROUNDING else "more than float32 rounding; please report it"
    others = "the torch chapter (Δ torch)" + (" and by Transformers (Δ HF)" if trace.by_transformers else "")
    dot = "A dot: Transformers has no such tensor. " if trace.by_transformers else ""
    legend = (
        f"\n{safe(str(trace.path))}: {safe(best)}\n"
        f"Every stage is computed by the NumPy chapters, and again by {others}. Δ is the largest difference, relative "
        f"to the stage's largest value. The largest of all is {largest:.1e}: {rounding}. "
        f"{dot}--stage explains a stage, --html writes a page to explore, --json prints all numbers."
    )
    return Group(table, Text(legend, "dim"))
