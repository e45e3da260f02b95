"""`vitft export`: a model as a file for another runtime, which is kept only if it predicts what the model does."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from vitft import __version__
from vitft.checkpoints.checkpoint import find_model, run_of
from vitft.checkpoints.exported import (
    SUFFIX,
    Document,
    Format,
    Resizing,
    Run,
    exported_file,
    open_exported,
    require_runtime,
)
from vitft.checkpoints.metadata import read_card, write_card
from vitft.data.augment import resize_and_crop
from vitft.data.sources.source import DatasetLike
from vitft.errors import DataError, ModelError, UsageError, VitftError, first_line
from vitft.evaluation.calibration import at_temperature, fit_temperature, thresholds
from vitft.evaluation.evaluation import Progress, SplitImages, no_dataset, read_images, reading
from vitft.evaluation.loading import load_model
from vitft.evaluation.split_predictions import of_split
from vitft.exporting.files import edit_onnx, openvino_model, write_onnx, write_openvino, write_torch
from vitft.exporting.graph import traced
from vitft.exporting.proof import TIE, Proof, predicted, prove
from vitft.exporting.quantize import quantize_onnx, quantize_openvino
from vitft.exporting.readme import readme
from vitft.io import console
from vitft.io.atomic import new_folder, write_json
from vitft.io.console import percent
from vitft.io.paths import expanded
from vitft.models.load import Loaded

DTYPES = ("fp32", "fp16", "int8")
IMAGES, TOLERANCE = 2000, 0.01
CALIBRATION = 128
"""Training images that int8 is calibrated on."""
REPORT = "export.json"


@dataclass(frozen=True)
class Exported:
    """An exported file, and how it compares with its model. `unproved`: why there is no accuracy; None if there is."""

    file: Path
    document: Document
    bytes: int
    torch_bytes: int  # of the model's weights
    proof: Proof
    unproved: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        document = self.document
        return {
            "file": str(self.file), "format": document.format, "dtype": document.dtype, "resize": document.resize,
            "bytes": self.bytes, "torch_bytes": self.torch_bytes, "unproved": self.unproved, **asdict(self.proof),
        }  # fmt: skip


def export(
    checkpoint: str | Path, *, format: Format = "onnx", dtype: str = "fp32", resize: Resizing = "outside",
    output: str | Path | None = None, dataset: DatasetLike | None = None, split: str | None = None,
    images: int = IMAGES, tolerance: float = TOLERANCE, progress: Progress = lambda done, count: None,
) -> Exported:  # fmt: skip
    """Write a trained model as one file, from uint8 images to probabilities, and compare it with the model.

    Args:
        checkpoint: a run (its best checkpoint is taken), one of its checkpoints, or a Transformers folder or hub id.
        format: onnx, openvino or torch (`torch.export`).
        dtype: fp32; fp16, weights in half precision; or int8, weights and activations in 8 bits.
        resize: outside: the file takes images at the model's input size; inside: of any size.
        output: the folder to write; by default `exports/FORMAT-DTYPE` in the run.
        dataset: to compare on, and to calibrate int8 with; by default the one the model was trained on.
        split: to compare on; by default test, else validation.
        images: compare on at most so many images, stratified.
        tolerance: how much worse the accuracy of the file may be, as a fraction.
        progress: called with the number of images done and the total.

    Raises:
        VitftError: with one line that says what is wrong; ModelError if the file is worse than that. Then none is left.
    """
    for name, value, choices in (
        ("format", format, get_args(Format)), ("dtype", dtype, DTYPES), ("resize", resize, get_args(Resizing)),
    ):  # fmt: skip
        if value not in choices:
            raise UsageError(f"{name} {value}: not one of {', '.join(choices)}.")
    if format == "torch" and dtype != "fp32":
        raise UsageError(f"dtype {dtype}: the torch format has only fp32; use onnx or openvino.")
    require_runtime(format, writing=True)
    folder = find_model(expanded(checkpoint))
    loaded = load_model(checkpoint)
    if exported_file(folder) is not None:
        raise UsageError(f"{checkpoint}: is exported already; give the run it came from.")
    if loaded.scoring != "softmax":
        raise ModelError(f"{checkpoint}: scores each label separately ({loaded.scoring}); only softmax is exported.")
    if resize == "inside" and loaded.preprocess.resizes and loaded.preprocess.resample == "nearest":
        raise UsageError("resize inside: this model's images are resized without a filter (nearest); use outside.")
    target = _target(checkpoint, folder, output, f"{format}-{dtype}" + ("-resize" if resize == "inside" else ""))
    card = read_card(folder) if folder.is_dir() else None
    document = Document(
        __version__, format, dtype, resize, loaded.labels, loaded.preprocess, card.temperature if card else None,
        card.splits if card else None, card.scores if card else None,
    )  # fmt: skip
    found, unproved = _held_out(checkpoint, loaded, dataset, split, images, progress, needed=dtype == "int8")
    batches = _calibration(checkpoint, loaded, dataset, resize, progress) if dtype == "int8" else iter(())
    parent_is_new = not target.parent.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with new_folder(target) as temporary:
            file = temporary / f"model{SUFFIX[format]}"
            try:
                rewrite = _write(loaded, file, document, batches)
            except VitftError:
                raise
            except Exception as error:  # each library has its own for an operator that it does not have
                family = loaded.model.config.model_type
                raise ModelError(f"a {family} model cannot be written as {format}: {first_line(error)}.") from error
            size = sum(one.stat().st_size for one in temporary.iterdir())
            run = open_exported(file)[1]
            proof = prove(loaded, run, found, whole=resize == "inside", progress=progress)
            _refuse(proof, document, tolerance)
            if found is not None and (known := _validation(checkpoint, loaded, dataset, found, images, progress)):
                document = _trusted(document, run, known, progress)
            del run  # closes the file
            rewrite(document)
            weights = sum(tensor.nbytes for tensor in loaded.model.state_dict().values())
            result = Exported(target / file.name, document, size, weights, proof, unproved)
            write_json(temporary / REPORT, result.to_dict())
            text = readme(document, file.name, proof)
            if card is None:
                (temporary / "README.md").write_text(text, encoding="utf-8")
            else:
                write_card(temporary, replace(card, temperature=document.temperature), text=text)
    except BaseException:
        if parent_is_new:
            with suppress(OSError):
                target.parent.rmdir()
        raise
    return result


def _target(checkpoint: str | Path, folder: Path, output: str | Path | None, name: str) -> Path:
    """The folder to write, of a link the one that it leads to. Raises UsageError if that cannot be replaced."""
    if output is None:
        run = run_of(folder)
        target = (run or Path()) / "exports" / (name if run else f"{Path(str(checkpoint)).name}-{name}")
    else:
        target = expanded(output)
    if target.suffix in SUFFIX.values():
        raise UsageError(f"output {target}: give a folder; the file in it is called model{target.suffix}.")
    real = Path(os.path.realpath(target))  # to be replaced, rather than a link to it
    if os.path.lexists(real) and not _is_replaceable(real):
        raise UsageError(f"output {target}: exists, and is no export that could be replaced; choose another folder.")
    if real.is_mount() or Path.cwd().is_relative_to(real):
        raise UsageError(f"output {target}: a new folder cannot take its place; choose one inside of it.")
    return real if target.is_symlink() else target


def _is_replaceable(folder: Path) -> bool:
    """Whether a folder is empty, or has an export and nothing else."""
    if not folder.is_dir():
        return False
    names = {file.name if file.is_file() else "" for file in folder.iterdir()}
    written = all(name in (REPORT, "vitft.json", "README.md") or name.startswith("model.") for name in names)
    return not names or (written and REPORT in names)


def _held_out(
    checkpoint: str | Path, loaded: Loaded, dataset: DatasetLike | None, split: str | None, limit: int,
    progress: Progress, *, needed: bool,
) -> tuple[SplitImages | None, str | None]:  # fmt: skip
    """The images to compare on; or None, and why there are none."""
    try:
        if dataset is None and not expanded(checkpoint).exists():  # of the hub, or a preset
            raise no_dataset(checkpoint)
        config, _ = reading(checkpoint, dataset)
        return read_images(
            checkpoint, loaded, config, dataset=dataset, split=split, limit=limit, progress=progress
        ), None  # fmt: skip
    except (UsageError, DataError) as error:
        if needed or dataset is not None or split is not None:
            raise
        console.warn(f"the file is compared on random noise only, which proves no accuracy: {error}")
        return None, str(error)


def _calibration(
    checkpoint: str | Path, loaded: Loaded, dataset: DatasetLike | None, resize: Resizing, progress: Progress
) -> Iterator[NDArray[np.uint8]]:
    """Training images, one at a time."""
    config, _ = reading(checkpoint, dataset)
    found = read_images(
        checkpoint, loaded, config, dataset=dataset, split="train", limit=CALIBRATION, progress=progress
    )
    for place in range(len(found.truth)):
        yield (
            found.original(place, loaded.preprocess)[None]
            if resize == "inside"
            else resize_and_crop(found.store.gather(np.array([place])), loaded.preprocess).numpy()
        )


def _validation(
    checkpoint: str | Path, loaded: Loaded, dataset: DatasetLike | None, found: SplitImages, limit: int,
    progress: Progress,
) -> SplitImages | None:  # fmt: skip
    """Validation images, of the dataset whose images were `found`; None if it has none."""
    if found.split.name == "validation":
        return found
    config, _ = reading(checkpoint, dataset)
    try:
        return read_images(
            checkpoint, loaded, config, dataset=dataset, split="validation", limit=limit, progress=progress
        )  # fmt: skip
    except (UsageError, DataError) as error:
        console.note(f"the file has no thresholds for --min-precision: {error}")
        return None


def _trusted(document: Document, run: Run, images: SplitImages, progress: Progress) -> Document:
    """The document with the temperature and the thresholds of the file, by what it says of validation images."""
    found = predicted(run, images, document.preprocess, whole=document.resize == "inside", progress=progress)
    said = of_split(images.split, images.truth, found, document.labels, images.others)
    temperature = fit_temperature(said) or document.temperature
    known = {"plain": said} | ({} if temperature is None else {"calibrated": at_temperature(said, temperature)})
    curves = {name: [list(astuple(one)) for one in thresholds(those)] for name, those in known.items()}
    return replace(document, temperature=temperature, thresholds={"images": len(said.truth), **curves})


def _write(
    loaded: Loaded, file: Path, document: Document, batches: Iterator[NDArray[np.uint8]]
) -> Callable[[Document], None]:
    """Write the file; returns what writes another document into it."""
    program = traced(loaded, document.resize)
    if document.format == "torch":
        write_torch(program, file, document)
        return partial(write_torch, program, file)
    if document.format == "openvino":
        network = openvino_model(program, document)
        network = quantize_openvino(network, batches, document) if document.dtype == "int8" else network
        write_openvino(network, file, document)
        return partial(write_openvino, network, file)
    if document.dtype == "int8":
        exact = file.with_name("exact.onnx")
        write_onnx(program, exact, document)
        quantize_onnx(exact, file, batches, document)
        for part in file.parent.glob("exact.onnx*"):
            part.unlink()
    else:
        write_onnx(program, file, document)
    return partial(edit_onnx, file)


def _refuse(proof: Proof, document: Document, tolerance: float) -> None:
    """Raise ModelError if the file does not predict what the model does."""
    what = f"{document.format} {document.dtype}"
    most = tolerance + 0.001 / proof.images  # the tolerance itself is allowed, whatever the rounding of the fractions
    if proof.accuracy is not None and proof.before is not None and proof.before - proof.accuracy > most:
        raise ModelError(
            f"{what}: right on {percent(proof.accuracy)} of {proof.images:,} {proof.split} images, the model on "
            f"{percent(proof.before)}: worse by more than {percent(tolerance)}, so no file was left; use another "
            "dtype, or a larger --tolerance."
        )
    # OpenVINO's own resize is off by 1/255 in a few pixels.
    allowed = 10 * TIE if document.format == "openvino" and document.resize == "inside" else TIE
    if document.dtype == "fp32" and not proof.by_network <= allowed:
        raise ModelError(
            f"{what}: a probability differs from the model's by {proof.by_network:.2g}, more than rounding explains, "
            "so no file was left; please report this with the model."
        )
