"""A file that resizes photos itself does so as Pillow does, to the bit."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import tiny_classifier
from vitft.checkpoints import exported
from vitft.checkpoints.exported import Document, open_exported, read_exported
from vitft.data.augment import Preprocess, normalize, resize_and_crop
from vitft.errors import ModelError, UsageError
from vitft.exporting import proof
from vitft.exporting.export import export
from vitft.exporting.files import openvino_model, write_onnx, write_openvino, write_torch
from vitft.exporting.graph import Classifier, traced
from vitft.exporting.resize import Resize
from vitft.models.load import Loaded

SIZES = ((32, 32), (90, 130), (48, 40), (280, 300), (9, 4), (1, 1), (65, 300))
WAYS = {
    **{name: Preprocess(48, 40, resample=name) for name in ("box", "bilinear", "hamming", "bicubic", "lanczos")},
    "shorter side, crop": Preprocess(48, 48, resample="bicubic", shortest_edge=54),
    "shorter side, padded": Preprocess(48, 48, resample="bicubic", shortest_edge=37),
    "both sides, crop": Preprocess(48, 40, resample="bilinear", before_crop=(54, 54)),
    "crop only": Preprocess(48, 48, resizes=False),
}


def picture(height: int, width: int) -> torch.Tensor:
    draw = np.random.default_rng(height * 1000 + width)
    return torch.from_numpy(draw.integers(0, 256, (1, height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("way", WAYS)
def test_the_graph_resizes_as_pillow_does(way: str) -> None:
    how = WAYS[way]
    for height, width in SIZES:
        images = picture(height, width)
        found, expected = Resize(how)(images), resize_and_crop(images, how)
        np.testing.assert_array_equal(found.numpy(), expected.numpy(), err_msg=f"{height} x {width}")


@pytest.mark.parametrize("way", ["bilinear", "bicubic"])
def test_portraits_differ_by_rounding_at_most(way: str) -> None:
    """Pillow before version 13 takes the columns first, always; from then on, the rows of some of them."""
    images = picture(300, 100)
    difference = (Resize(WAYS[way])(images) - resize_and_crop(images, WAYS[way]).float()).abs()
    assert difference.mean() < 0.5
    assert difference.max() <= {"bilinear": 1, "bicubic": 16}[way]


def inside(how: Preprocess) -> tuple[Loaded, Document]:
    model = tiny_classifier("vit", image_size=[how.height, how.width], num_labels=3)
    loaded = Loaded(model, how, ("a", "b", "c"), None, False)
    return loaded, Document("0", "torch", "fp32", "inside", loaded.labels, how)


def probabilities(loaded: Loaded, images: torch.Tensor) -> Any:
    with torch.no_grad():
        pixels = normalize(resize_and_crop(images, loaded.preprocess), loaded.preprocess)
        return loaded.model(pixel_values=pixels).logits.softmax(1)


@pytest.mark.parametrize("way", ["bicubic", "shorter side, crop", "both sides, crop", "crop only"])
def test_vitft_reads_a_file_that_resizes(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """vitft resizes first, and what it gives to the file is resized no further."""
    loaded, document = inside(WAYS[way])
    module = Classifier(loaded, "inside")
    run = lambda images: module(torch.from_numpy(images)).detach().numpy()  # noqa: E731
    monkeypatch.setattr(exported, "open_exported", lambda file: (document, run))
    read = read_exported(tmp_path / "model.pt2")
    for height, width in SIZES:
        images = picture(height, width)
        expected = probabilities(loaded, images)
        pixels = normalize(resize_and_crop(images, read.preprocess), read.preprocess)
        torch.testing.assert_close(read.model(pixel_values=pixels).logits.softmax(1), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.from_numpy(run(images.numpy())), expected, atol=1e-5, rtol=0)


def test_a_file_is_not_blamed_for_how_pillow_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Pillow gives other pixels than the file's resize, its network is compared on the latter."""
    loaded, _ = inside(WAYS["bicubic"])
    images = [picture(300, 100), picture(90, 130)]
    exact = torch.cat([Resize(loaded.preprocess)(image) for image in images]).to(torch.uint8)
    rounded = exact + (exact < 255).to(torch.uint8) * 4  # as from another Pillow
    monkeypatch.setattr(proof, "resize_and_crop", lambda images, how: images)
    monkeypatch.setattr(proof, "_speeds", lambda model, run, images: proof.Speed(1, 1))
    split = SimpleNamespace(name="test", hash="abc")
    store = SimpleNamespace(gather=lambda places: rounded[places])
    given: Any = SimpleNamespace(
        truth=np.zeros(2, np.int64), split=split, store=store, original=lambda place, how: images[place][0].numpy()
    )
    module = Classifier(loaded, "inside")
    found = proof.prove(loaded, lambda images: module(torch.from_numpy(images)).detach().numpy(), given, whole=True)
    assert found.by_network < 1e-6 < found.largest


def test_what_cannot_be_resized_inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, saved: Any) -> None:
    loaded, document = inside(WAYS["shorter side, padded"])
    monkeypatch.setattr(exported, "open_exported", lambda file: (document, Classifier(loaded, "inside")))
    with pytest.raises(ModelError, match="to less than the model's input"):
        read_exported(tmp_path / "model.pt2")
    folder = saved()
    how = Preprocess(32, 32, resample="nearest").to_json()
    (folder / "preprocessor_config.json").write_text(exported.json.dumps(how), encoding="utf-8")
    with pytest.raises(UsageError, match=r"resize inside: .*nearest"):
        export(folder, format="torch", resize="inside", output=tmp_path / "new")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize("way", ["bicubic", "shorter side, crop"])
def test_every_format_resizes_photos_of_any_size(format: Any, way: str, tmp_path: Path) -> None:
    pytest.importorskip({"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino"}[format])
    loaded, document = inside(WAYS[way])
    program, file = traced(loaded, "inside"), tmp_path / f"model{exported.SUFFIX[format]}"
    if format == "openvino":
        write_openvino(openvino_model(program, document), file, document)
    else:
        (write_onnx if format == "onnx" else write_torch)(program, file, document)
    _, run = open_exported(file)
    for height, width in SIZES:
        images = picture(height, width).repeat(3, 1, 1, 1)
        # OpenVINO computes weights in float32, so that a few pixels differ by 1/255.
        near = 5e-3 if format == "openvino" else 1e-5
        np.testing.assert_allclose(run(images.numpy()), probabilities(loaded, images).numpy(), atol=near)
