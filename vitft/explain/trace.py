"""One image through one checkpoint, three times: by the NumPy chapters, the torch one, and Transformers.

Every stage has the name that `vitft.spec.stages` gives it. What the three make of it should differ by
rounding alone; here one sees by how much.
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
from rich.table import Table
from rich.text import Text

from vitft.checkpoints.checkpoint import find_model
from vitft.data.augment import Preprocess, normalize, resize_and_crop
from vitft.data.decoder import BadImage, decode
from vitft.errors import DataError, ModelError
from vitft.evaluation.loading import load_model
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


@dataclass(frozen=True)
class Trace:
    """What every stage made of one image, float32, by whom; pixels are the model's input before normalising.

    A textbook network is none that Transformers could be: `by_transformers` is empty then.
    """

    path: Path
    checkpoint: str
    pixels: NDArray[np.uint8]  # (H, W, 3)
    labels: tuple[str, ...]
    spec: ViTSpec
    weights: ViT
    normal: tuple[float, float]  # mean and standard deviation that the first channel is normalised by
    by_numpy: Stages
    by_torch: Stages
    by_transformers: Stages

    @property
    def scores(self) -> list[tuple[str, float]]:
        """The classes' probabilities, best first."""
        shares = softmax(self.by_numpy["head"][0].astype(np.float64))
        return [(self.labels[i], float(shares[i])) for i in np.argsort(-shares)]


def trace(image: Path, checkpoint: str | Path) -> Trace:
    """Follow an image through a checkpoint: a run, one of its folders, a Transformers ViT folder or hub id.

    A run of `vitft scratch train` will do too. Raises DataError for an image that cannot be read,
    ModelError for what is no plain ViT.
    """
    folder = expanded(checkpoint)
    by_numpy, by_torch, by_transformers = Stages(), Stages(), Stages()
    if is_textbook_run(folder):
        network = read_run(folder)
        spec, weights, labels = network.spec, network.weights, network.labels
        normal = network.mean[0], network.std[0]
        shown = _fitted(image, Preprocess(spec.image_height, spec.image_width))
        pixels = torch.from_numpy(augment.normalize(_channels(shown, spec), network.mean, network.std))
    else:
        where = find_model(folder)
        if not where.exists() and "/" in str(checkpoint) and folder.parent.is_dir():
            raise ModelError(f"{checkpoint}: no such folder; give a run, a model folder or a hub id.")
        loaded = load_model(checkpoint, headless=True)
        if loaded.new_head:
            console.warn(f"{checkpoint} has no classification head: the stages after pool are of an untrained one")
        if loaded.scoring != "softmax":
            raise ModelError(
                f"{checkpoint}: scores each label by itself ({loaded.scoring}), and the chapters end in a softmax; "
                "use a checkpoint that tells one class."
            )
        model, labels = loaded.model.eval(), loaded.labels
        config = model.config.to_dict()
        spec = spec_from_config(config)
        if config["model_type"] != "vit":
            raise ModelError(
                f"{checkpoint} is a {config['model_type']}: the chapters follow plain ViTs (vit); choose one."
            )
        how = loaded.preprocess
        shown, normal = _fitted(image, how), (how.mean[0], how.std[0])
        pixels = normalize(torch.from_numpy(shown)[None], how).contiguous()
        weights = from_transformers({name: p.detach().numpy() for name, p in model.named_parameters()}, spec)
        with torch.no_grad():
            _watch_transformers(model, spec, _keep(by_transformers))(pixels)
    with np.errstate(all="ignore"):  # broken weights are told in words, below
        vit(pixels.numpy(), weights, spec, watch=_keep(by_numpy))
    with torch.no_grad():
        TorchViT(spec).load(weights).watched_by(_keep(by_torch))(pixels)
    if bad := next((name for name, array in by_numpy.items() if not np.isfinite(array).all()), None):
        raise ModelError(f"{checkpoint}: {bad} is not finite: its weights are broken; use another checkpoint.")
    return Trace(image, str(checkpoint), shown, labels, spec, weights, normal, by_numpy, by_torch, by_transformers)


def _fitted(image: Path, how: Preprocess) -> NDArray[np.uint8]:
    """The image at the model's size, (H, W, 3)."""
    try:
        decoded = decode(expanded(image), value_range=how.value_range)
    except (BadImage, OSError) as error:
        raise DataError(f"{image}: {getattr(error, 'strerror', None) or error}; give an image file.") from None
    fitted: NDArray[np.uint8] = resize_and_crop(torch.from_numpy(decoded)[None], how)[0].numpy()
    return fitted


def _channels(image: NDArray[np.uint8], spec: ViTSpec) -> NDArray[np.uint8]:
    """The image (H, W, 3) as a batch of one, (1, C, H, W), grey where the network has one channel."""
    planes = np.asarray(Image.fromarray(image).convert("L"))[..., None] if spec.channels == 1 else image
    return planes.transpose(2, 0, 1)[None]


def _keep(stages: Stages) -> Callable[[str, Array], None]:
    return lambda name, array: stages.update({name: np.array(array)})


def _watch_transformers(model: Any, spec: ViTSpec, keep: Callable[[str, Array], None]) -> Callable[[Any], Any]:
    """The model with hooks that keep what its modules make; what no module makes follows from those by one step."""
    model.set_attn_implementation("eager")  # the fused one never has the attention weights
    body = model.base_model
    handles = []

    def after(module: Any, name: str, change: Callable[[Any], Any] = lambda made: made) -> None:
        handles.append(module.register_forward_hook(lambda _m, _i, made: keep(name, change(made).numpy())))

    def before(module: Any, name: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda _m, given: keep(name, given[0].numpy())))

    before(body.embeddings.patch_embeddings, "image")
    after(body.embeddings.patch_embeddings.projection, "embed.projection")
    after(body.embeddings.patch_embeddings, "embed.patches")
    positions = body.embeddings.position_embeddings
    after(body.embeddings, "embed.class_token", lambda tokens: tokens - positions)
    after(body.embeddings, "embed.positions")
    for number, layer in enumerate(body.layers, 1):
        attention, mlp = f"block.{number}.attention", f"block.{number}.mlp"
        heads: list[Any] = []

        def qkv(made: Any, heads: list[Any] = heads) -> Any:
            heads.append(made.unflatten(-1, (spec.heads, spec.head_width)).transpose(1, 2))
            return torch.stack(heads, dim=1)

        after(layer.layernorm_before, f"{attention}.norm")
        for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
            after(projection, f"{attention}.qkv", qkv)
        after(layer.attention, f"{attention}.softmax", lambda made: made[1])
        before(layer.attention.o_proj, f"{attention}.mix")
        after(layer.attention.o_proj, f"{attention}.output")
        before(layer.layernorm_after, f"{attention}.residual")
        after(layer.layernorm_after, f"{mlp}.norm")
        after(layer.mlp.fc1, f"{mlp}.in")
        after(layer.mlp.activation_fn, f"{mlp}.activation")
        after(layer.mlp.fc2, f"{mlp}.out")
        after(layer, f"{mlp}.residual")
    after(body.layernorm, "norm")
    before(model.classifier, "pool")
    after(model.classifier, "head")

    def run(pixels: Any) -> None:
        try:
            model(pixel_values=pixels)
        finally:
            for handle in handles:
                handle.remove()

    return run


# -- what a person and a program see of it --------------------------------------------------------


def document(found: Trace, stages: Iterable[str] | None = None) -> dict[str, Any]:
    """The trace, JSON-ready: image, scores, and of each stage (or of these) its numbers and differences.

    max_abs_diff is the largest difference of two numbers, max_rel_diff that relative to the stage's
    largest value. A stage that Transformers never has as a tensor of its own has null there.
    """
    return {
        "image": str(found.path),
        "scores": [{"label": label, "score": score} for label, score in found.scores],
        "stages": [numbers(found, name) for name in (found.by_numpy if stages is None else stages)],
    }


def numbers(found: Trace, name: str) -> dict[str, Any]:
    """What `document` says of a stage."""
    ours = found.by_numpy[name].astype(np.float64)
    largest = float(np.abs(ours).max()) or 1.0
    others = {"numpy_torch": found.by_torch.get(name), "numpy_transformers": found.by_transformers.get(name)}
    gaps = {pair: None if their is None else float(np.abs(ours - their).max()) for pair, their in others.items()}
    return {
        "name": name, "shape": list(ours.shape), "mean": float(ours.mean()), "std": float(ours.std()),
        "min": float(ours.min()), "max": float(ours.max()), "norm": float(np.linalg.norm(ours)),
        "max_abs_diff": gaps,
        "max_rel_diff": {pair: None if gap is None else gap / largest for pair, gap in gaps.items()},
    }  # fmt: skip


def trace_table(found: Trace) -> Group:
    """The stages of a trace as a table, and what the differences mean; 80 columns are enough."""
    pairs = {"numpy_torch": "≠ torch"} | ({"numpy_transformers": "≠ HF"} if found.by_transformers else {})
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    table.add_column("shape", overflow="fold")
    for name in ("mean", "std", "min", "max", *pairs.values()):
        table.add_column(name, justify="right", no_wrap=True)
    worst = 0.0
    for name in found.by_numpy:
        of_stage = numbers(found, name)
        gaps = [of_stage["max_rel_diff"][pair] for pair in pairs]
        worst = max(worst, *(gap for gap in gaps if gap is not None))
        short = name.replace("block.", "").replace("attention", "attn")
        table.add_row(
            short, "×".join(map(str, of_stage["shape"])),
            *(f"{of_stage[key]:.3g}" for key in ("mean", "std", "min", "max")),
            *("·" if gap is None else f"{gap:.0e}" for gap in gaps),
        )  # fmt: skip
    best = ", ".join(f"{label} {100 * score:.1f} %" for label, score in found.scores[:3])
    by = "the torch chapter (≠ torch)" + (" and Transformers (≠ HF)" if found.by_transformers else "")
    dot = "A dot: Transformers has no such tensor. " if found.by_transformers else ""
    legend = (
        f"\n{safe(str(found.path))}: {safe(best)}\n"
        f"Every stage was computed by the NumPy chapters and again by {by}; shown is the largest difference, relative "
        f"to the stage's largest value. The worst is {worst:.1e}: rounding of float32. "
        f"{dot}--stage opens a stage, --html makes a page of all this, --json has all numbers."
    )
    return Group(table, Text(legend, "dim"))
