"""An exported file, read as a model: `.onnx` by ONNX Runtime, `.xml` by OpenVINO, `.pt2` by torch.

Such a file takes uint8 images (N, H, W, 3) and gives probabilities (N, K), so all that it needs is in it: the
normalization, the classes, and how images were resized, in a JSON document among its metadata.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vitft.data.augment import Preprocess
from vitft.errors import ModelError, first_line, require_extra
from vitft.hardware.device import cpus
from vitft.models.load import EXPORTED, Loaded

Format = Literal["onnx", "openvino", "torch"]
Resizing = Literal["inside", "outside"]
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
assert set(SUFFIX.values()) == set(EXPORTED)
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino", "nncf"), "torch": ()}
KEY = "vitft"
"""Of the document among a file's metadata."""
INPUT, OUTPUT = "images", "probabilities"
Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Images (N, H, W, 3) to probabilities (N, K)."""


@dataclass(frozen=True)
class Document:
    """What an exported file says of itself. `resize`: whether it resizes images, or they come at the model's size.

    `temperature` and `thresholds` are by what the file itself says of validation images. The latter has their number,
    `images`, and under `plain` and `calibrated` what deciding only from a confidence on leads to, for each confidence
    that some precision asks for: [confidence, fraction decided, fraction of these that is right].
    """

    vitft: str  # the version that wrote it
    format: Format
    dtype: str  # fp32, fp16 or int8
    resize: Resizing
    labels: tuple[str, ...]
    preprocess: Preprocess
    temperature: float | None = None
    splits: dict[str, dict[str, Any]] | None = None  # source, count and hash of each split of its run
    scores: dict[str, Any] | None = None  # of the checkpoint, by split
    thresholds: dict[str, Any] | None = None  # confidences to decide from, by the file's own validation images

    def to_json(self) -> str:
        """The document as text."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `to_json`. Raises ValueError, KeyError or TypeError."""
        found = json.loads(text)
        how: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in found["preprocess"].items()
        }
        return cls(**found | {"labels": tuple(found["labels"]), "preprocess": Preprocess(**how)})


def exported_file(path: Path) -> Path | None:
    """The exported file that a path is, or that its folder holds; None for any other model."""
    if path.suffix in EXPORTED and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    return next((file for suffix in EXPORTED if (file := path / f"model{suffix}").is_file()), None)


def require_runtime(format: Format, *, writing: bool = False) -> None:
    """Raise UsageError if what reads a format, or with `writing` writes it, is not installed."""
    needed = NEEDS[format] if writing else NEEDS[format][-1:] if format == "onnx" else NEEDS[format][:1]
    require_extra(format, f"the {format} format", *needed)


def read_exported(file: Path) -> Loaded:
    """Read an exported file as a model.

    The logits of the model are logarithms of probabilities, which softmax turns into these again. Its preprocessing
    resizes, and only takes the mean from pixels. Raises ModelError, or UsageError if the runtime is not installed.
    """
    document, run = open_exported(file)
    how = document.preprocess
    # In pixels, from the mean of the normalization, which occlusion hides places with.
    mean = tuple(value / how.rescale for value in (how.mean * 3)[:3])
    mean = mean[::-1] if how.flips_channels else mean
    as_pixels = replace(how, mean=mean, std=(1.0,) * 3, rescale=1.0, flips_channels=False)
    model = _Exported(document, run, _unchanged(document) or (how.height, how.width), mean)
    if document.resize == "inside" and _unchanged(document) is None:
        raise ModelError(
            f"{file}: resizes photos itself, to less than the model's input, and vitft would do so twice; use it "
            "without vitft, or export another one with --resize outside."
        )
    return Loaded(model, as_pixels, document.labels, None, False)


def document_of(model: Any) -> Document | None:
    """What the file of a model that `read_exported` read says of itself; None for any other model."""
    return model.document if isinstance(model, _Exported) else None


def _unchanged(document: Document) -> tuple[int, int] | None:
    """The size (height, width) of an image that a file does not resize, but only crops; None if there may be none."""
    how = document.preprocess
    size = how.height, how.width
    if document.resize == "inside" and how.resizes:
        if how.shortest_edge is not None:
            size = how.shortest_edge, how.shortest_edge
        elif how.before_crop is not None:
            size = how.before_crop
    return size if size[0] >= how.height and size[1] >= how.width else None


def open_exported(file: Path) -> tuple[Document, Run]:
    """What an exported file says of itself, and how to run it. Raises ModelError, or UsageError without its runtime."""
    format = next(name for name, suffix in SUFFIX.items() if suffix == file.suffix)
    require_runtime(format)
    opened = {"onnx": _open_onnx, "openvino": _open_openvino, "torch": _open_torch}[format]
    try:
        text, run = opened(file)
    except Exception as error:  # each runtime has its own errors for damaged files
        raise ModelError(f"{file}: cannot be read as {format}: {first_line(error)}.") from error
    if not text:
        raise ModelError(f"{file}: is not of vitft: its metadata does not say the classes and the preprocessing.")
    try:
        return Document.parse(text), run
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: its metadata is of another version of vitft ({error}); export it again.") from error


class _Exported(nn.Module):
    """Called like a model of Transformers: pixels (B, 3, H, W), less a mean, in; `logits` (B, K) out."""

    def __init__(self, document: Document, run: Run, size: tuple[int, int], mean: tuple[float, ...]) -> None:
        """`size`: of images that the file does not resize (height, width); those given are its center."""
        super().__init__()
        self.document, self.run, self.size, self.mean = document, run, size, torch.tensor(mean)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        """Pixels (B, 3, H, W) from 0 to 255, less the mean, to an object with `logits` (B, K)."""
        images = (pixel_values.detach().cpu().permute(0, 2, 3, 1) + self.mean).round().clamp(0, 255).to(torch.uint8)
        (height, width), (rows, columns) = images.shape[1:3], self.size
        top, left = (rows - height) // 2, (columns - width) // 2
        images = F.pad(images, (0, 0, left, columns - width - left, top, rows - height - top)).contiguous()
        probabilities = torch.from_numpy(self.run(images.numpy())).float()
        smallest = torch.finfo(torch.float32).tiny
        return SimpleNamespace(logits=probabilities.clamp_min(smallest).log().to(pixel_values.device))


def _threads() -> int:
    """As many as torch would use."""
    return min(torch.get_num_threads(), cpus())


def _open_onnx(file: Path) -> tuple[str, Run]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    return text, lambda images: session.run([OUTPUT], {INPUT: images})[0]


def _open_openvino(file: Path) -> tuple[str, Run]:
    import openvino

    core = openvino.Core()
    network = core.read_model(file)
    text = str(network.get_rt_info([KEY]).astype(str)) if network.has_rt_info([KEY]) else ""
    # By default, what is float32 in the file is computed in bfloat16 on processors with AMX.
    how = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": _threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(network, "CPU", how)
    request = compiled.create_infer_request()
    return text, lambda images: np.array(request.infer({INPUT: images})[0])


def _open_torch(file: Path) -> tuple[str, Run]:
    extra = {KEY: ""}
    module = torch.export.load(file, extra_files=extra).module()

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            found: NDArray[np.float32] = module(torch.from_numpy(images)).numpy()
        return found

    return extra[KEY], run
