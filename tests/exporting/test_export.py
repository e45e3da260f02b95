"""An exported file predicts what its model does, in every format, and one that does not is refused."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.families import tiny_classifier
from vitft import Predictor, TrainConfig, evaluate, load_model
from vitft.checkpoints import exported
from vitft.checkpoints.exported import Document, open_exported, read_exported
from vitft.checkpoints.metadata import read_card
from vitft.cli.app import app
from vitft.data.augment import Preprocess, normalize, resize_and_crop
from vitft.errors import ModelError, UsageError
from vitft.evaluation.calibration import at_temperature, fit_temperature, threshold_for
from vitft.evaluation.evaluation import read_images, reading
from vitft.evaluation.split_predictions import Predictions, of_split
from vitft.exporting import export as exporting
from vitft.exporting import files
from vitft.exporting import proof as proving
from vitft.exporting.export import Exported, export
from vitft.exporting.files import quiet, write_onnx
from vitft.exporting.graph import Classifier, traced
from vitft.exporting.proof import Speed, compare
from vitft.exporting.readme import snippet
from vitft.models.load import Loaded
from vitft.training import trainer

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "export.md"
HERE = [
    pytest.param("torch"),
    pytest.param("onnx", marks=pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs onnxruntime")),
    pytest.param("openvino", marks=[
        pytest.mark.slow, pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino"),
    ]),
]  # fmt: skip
needs_onnx = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs onnxruntime")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds are measured, and not for long."""
    monkeypatch.setattr(proving, "_TURN_S", 0.0)
    monkeypatch.setattr(proving, "_PAUSE_S", 0.0)


@pytest.fixture(scope="module")
def run(digits_run: Any) -> Path:
    folder: Path = digits_run.run
    return folder


@pytest.fixture(scope="module")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The run's export in a format, made once: tracing takes seconds, and does not depend on the format."""
    done: dict[str, Exported] = {}
    loaded = load_model(run)
    loaded.model.set_attn_implementation("sdpa")
    program = traced(loaded)
    assert loaded.model.config._attn_implementation == "sdpa"  # speeds are compared with the model's own
    assert "scaled_dot_product" not in str(program.graph)

    def make(format: Any) -> Exported:
        if format not in done:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(exporting, "traced", lambda loaded, resize: program)
                patch.setattr(proving, "_TURN_S", 0.0)
                patch.setattr(proving, "_PAUSE_S", 0.0)
                done[format] = export(run, format=format, images=60)
        return done[format]

    return make


def photo(height: int = 37, width: int = 61) -> Image.Image:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("format", HERE)
def test_a_file_predicts_what_the_run_predicts(format: Any, run: Path, made: Any, tmp_path: Path) -> None:
    result = made(format)
    alone = tmp_path / result.file.name  # its folder is not needed
    for part in result.file.parent.glob("model.*"):
        shutil.copy(part, tmp_path)
    images = [photo(), photo(12, 90), photo(16, 16)]
    expected = Predictor(run)(images, top_k=10)
    for checkpoint in (result.file.parent, result.file, alone):
        found = Predictor(checkpoint)(images, top_k=10)
        assert [row.top[0][0] for row in found] == [row.top[0][0] for row in expected]
        for row, wanted in zip(found, expected, strict=True):
            assert dict(row.top) == pytest.approx(dict(wanted.top), abs=1e-5)
    by_run, by_file = evaluate(run, max_eval_samples=60), evaluate(result.file, max_eval_samples=60)
    assert (by_file.accuracy, by_file.split_hash) == (by_run.accuracy, by_run.split_hash)
    assert by_file.loss == pytest.approx(by_run.loss, abs=1e-4)
    proof = result.proof
    assert (proof.accuracy, proof.before, proof.hash) == (by_run.accuracy, by_run.accuracy, by_run.split_hash)
    assert proof.agreement == 1
    assert proof.largest < 1e-5


@pytest.mark.parametrize("format", HERE)
def test_a_file_is_run_without_vitft(format: Any, run: Path, made: Any, tmp_path: Path, capsys: Any) -> None:
    """By the code in its README."""
    result = made(format)
    photo(41, 29).save(tmp_path / "photo.png")
    code = (result.file.parent / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert "vitft." not in code
    assert "import vitft" not in code
    names: dict[str, Any] = {}
    code = code.replace('"model.', f'"{result.file.parent}/model.').replace("photo.jpg", str(tmp_path / "photo.png"))
    exec(code, names)
    (row,) = Predictor(run)(tmp_path / "photo.png", top_k=10)
    assert capsys.readouterr().out.split()[0] == row.top[0][0]
    assert names["probabilities"].shape == (1, 10)
    by_name = dict(zip(names["about"]["labels"], names["probabilities"][0].tolist(), strict=True))
    assert by_name == pytest.approx(dict(row.top), abs=1e-5)


@needs_onnx
def test_the_guide_has_the_code_of_the_readme(made: Any) -> None:
    result = made("onnx")
    document = replace(result.document, preprocess=Preprocess(224, 224, resample="bicubic"))
    assert snippet(document, "runs/photos/exports/onnx-fp32/model.onnx") in GUIDE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "how",
    [
        Preprocess(20, 24, resample="bicubic"),
        Preprocess(20, 24, resample="bilinear", shortest_edge=26),
        Preprocess(24, 24, resample="bicubic", before_crop=(28, 30)),
        Preprocess(40, 24, resample="lanczos", shortest_edge=30),
        Preprocess(24, 24, resizes=False),
    ],
)
@pytest.mark.parametrize("size", [(50, 71), (31, 22), (90, 9)])
def test_the_code_resizes_as_vitft_does(how: Preprocess, size: tuple[int, int]) -> None:
    document = Document("0", "onnx", "fp32", "outside", ("a",), how)
    lines = [
        line for line in snippet(document, "f").splitlines() if line.startswith(("size", "left", "image = image."))
    ]
    names: dict[str, Any] = {"image": photo(*size), "Image": Image}
    exec("\n".join(lines), names)
    expected = resize_and_crop(torch.from_numpy(np.array(photo(*size)))[None], how)[0]
    np.testing.assert_array_equal(np.array(names["image"]), expected.numpy())


@pytest.mark.parametrize("how", [
    Preprocess(32, 32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)),
    Preprocess(32, 32, (0.5, 0.4, 0.3), (1.0, 1.0, 1.0), rescale=1 / 127, flips_channels=True),
    Preprocess(32, 32, (0.4,), (0.3,)),
])  # fmt: skip
def test_the_graph_normalizes_as_vitft_does(how: Preprocess) -> None:
    model = tiny_classifier("vit", num_channels=how.channels, num_labels=3)
    colors = np.random.default_rng(3).integers(0, 256, (4, 1, 1, 3))
    images = torch.from_numpy(np.broadcast_to(colors, (4, 32, 32, 3)).astype(np.uint8))
    with torch.no_grad():
        expected = model(pixel_values=normalize(images, how)).logits.softmax(1)
        found = Classifier(Loaded(model, how, ("a", "b", "c"), None, False))(images)
    assert expected.std(0).min() > 1e-3  # images differ
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.fixture
def quick(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any]], None]:
    """Exports to torch without tracing, of a model that is always right.

    To be called with what is wrong with the file's probabilities.
    """
    loaded = load_model(run)
    module = Classifier(loaded, "inside")

    def classify(images: torch.Tensor) -> Any:
        with torch.no_grad():
            return module(images).numpy()

    def always_right(*arguments: Any, **options: Any) -> Any:
        found = read_images(*arguments, **options)
        images = resize_and_crop(found.store.gather(np.arange(len(found.truth))), loaded.preprocess)
        return replace(found, truth=classify(images).argmax(axis=1))

    def wrong(change: Callable[[Any], Any]) -> None:
        def opened(file: Path) -> Any:
            return Document.parse(file.read_text()), lambda images: change(classify(torch.from_numpy(images)))

        monkeypatch.setattr(exporting, "open_exported", opened)

    monkeypatch.setattr(exporting, "read_images", always_right)
    monkeypatch.setattr(exporting, "traced", lambda loaded, resize: module)
    monkeypatch.setattr(exporting, "write_torch", lambda model, file, document: file.write_text(document.to_json()))
    wrong(lambda found: found)
    return wrong


def worst(found: Any) -> Any:
    """The least likely class becomes the most likely one."""
    return (1 - found) / (found.shape[1] - 1)


def test_a_file_that_predicts_something_else_is_refused(run: Path, quick: Any, tmp_path: Path) -> None:
    target = tmp_path / "new" / "export"
    arguments = ["export", str(run), "--format", "torch", "--output", str(target), "--images", "60"]
    quick(worst)
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 4
    assert "worse by more than 1.0 %, so no file was left" in " ".join(said.stderr.split())
    assert not target.parent.exists()
    quick(lambda found: found * np.float32(0.99))  # the right classes
    for resize in ("outside", "inside"):
        with pytest.raises(ModelError, match="a probability differs from the model's by 0"):
            export(run, format="torch", output=target, images=60, resize=resize)
        assert not target.parent.exists()
    quick(lambda found: found + np.float32(1e-6))
    assert export(run, format="torch", output=target, images=60).file.is_file()


def test_an_export_is_replaced_by_a_better_one_only(run: Path, quick: Any, tmp_path: Path) -> None:
    target = tmp_path / "export"
    export(run, format="torch", output=target, images=30)
    before = (target / "export.json").read_bytes()
    quick(worst)
    with pytest.raises(ModelError, match=r"right on 0\.0 % of 30 test images, the model on 100\.0 %"):
        export(run, format="torch", output=target, images=30)
    assert (target / "export.json").read_bytes() == before
    for names in (["thesis.txt"], ["model.onnx"], ["model.pt2", "thesis.txt"], ["model.pt2", "export.json", "notes"]):
        folder = tmp_path / f"{len(names)}-{names[0]}s"
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        with pytest.raises(UsageError, match="no export that could be replaced"):
            export(run, format="torch", output=folder, images=30)
        assert sorted(file.name for file in folder.iterdir()) == sorted(names)


def test_a_link_to_a_folder_stays_one(run: Path, quick: Any, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk", target_is_directory=True)
    (tmp_path / "loop").symlink_to("loop")
    for _ in range(2):
        export(run, format="torch", output=tmp_path / "out", images=30)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["disk", "loop", "out"]
        assert (tmp_path / "out").readlink() == Path("disk")
        assert (tmp_path / "disk" / "model.pt2").is_file()
    with pytest.raises(UsageError, match="no export that could be replaced"):
        export(run, format="torch", output=tmp_path / "loop", images=30)


def test_what_cannot_be_replaced_is_refused_before_the_work(
    run: Path, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "read_images", lambda *_, **__: pytest.fail("is work"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for output in (".", tmp_path / "here"):
        with pytest.raises(UsageError, match="a new folder cannot take its place; choose one inside of it"):
            export(run, format="torch", output=output)
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == (tmp_path / "disk").resolve())
    with pytest.raises(UsageError, match="a new folder cannot take its place"):
        export(run, format="torch", output=tmp_path / "disk")


def test_what_a_format_cannot_say_is_an_error_in_one_line(
    run: Path, quick: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no operator for aten::roll\nand much more")

    monkeypatch.setattr(exporting, "write_torch", fails)
    with pytest.raises(ModelError, match="a vit model cannot be written as torch: no operator for aten::roll"):
        export(run, format="torch", output=tmp_path / "new" / "export")
    assert not (tmp_path / "new").exists()


def test_the_comparison_counts_what_it_says() -> None:
    before = np.array([[0.6, 0.4, 0], [0.5001, 0.4999, 0], [0.2, 0.7, 0.1], [0.9, 0.1, 0]], np.float32)
    after = np.array([[0.58, 0.42, 0], [0.4998, 0.5002, 0], [0.45, 0.3, 0.25], [0.9, 0.1, 0]], np.float32)

    class Images:
        truth = np.array([0, 1, 1, 2])
        split = type("Split", (), {"name": "test", "hash": "abc"})

    found = compare(before, after, after + 0.125, Images, Speed(1, 2), Speed(3, 4))  # type: ignore[arg-type]
    assert found.by_network == 0.125
    assert (found.agreement, found.untied, found.images) == (0.5, 1, 4)  # the second is a tie
    assert found.largest == pytest.approx(0.4)
    assert (found.before, found.accuracy) == (0.5, 0.5)  # one lost, one gained
    assert found.difference is not None
    assert found.difference.value == 0
    assert found.difference.low < 0 < found.difference.high
    assert found.p == 1.0


@pytest.mark.parametrize(
    ("format", "resize", "dtype", "largest", "refused"),
    [
        ("onnx", "inside", "fp32", 0.002, True), ("onnx", "inside", "fp32", 0.0009, False),
        ("openvino", "inside", "fp32", 0.002, False), ("openvino", "inside", "fp32", 0.02, True),
        ("openvino", "outside", "fp32", 0.002, True), ("onnx", "inside", "int8", 0.3, False),
        ("onnx", "outside", "fp32", float("nan"), True),
    ],
)  # fmt: skip
def test_how_far_a_probability_may_be_off(
    format: Any, resize: Any, dtype: str, largest: float, refused: bool
) -> None:  # fmt: skip
    found = compare(*[np.full((4, 2), 0.5, np.float32)] * 3, None, Speed(1, 1), Speed(1, 1))
    document = Document("0", format, dtype, resize, ("a", "b"), Preprocess(8, 8))
    with pytest.raises(ModelError, match="a probability differs") if refused else nullcontext():
        exporting._refuse(replace(found, by_network=largest), document, 0.01)


@pytest.mark.parametrize(("count", "right", "were"), [(2000, 1713, 1733), (100, 71, 100), (100, 93, 100), (7, 6, 7)])
def test_as_much_as_the_tolerance_may_be_lost(count: int, right: int, were: int) -> None:
    """Fractions are rounded: 0.8665 - 0.8565 > 0.01."""
    found = compare(*[np.full((4, 2), 0.5, np.float32)] * 3, None, Speed(1, 1), Speed(1, 1))
    found = replace(found, images=count, before=were / count, accuracy=right / count)
    document = Document("0", "onnx", "int8", "outside", ("a", "b"), Preprocess(8, 8))
    exporting._refuse(found, document, (were - right) / count)
    with pytest.raises(ModelError, match="worse by more than"):
        exporting._refuse(replace(found, accuracy=(right - 1) / count), document, (were - right) / count)


def test_without_images_nothing_is_said_to_be_proved(run: Path, quick: Any, tmp_path: Path) -> None:
    shutil.copytree(run / "best", tmp_path / "plain")
    (tmp_path / "plain" / "vitft.json").unlink()
    said = CliRunner().invoke(
        app, ["export", str(tmp_path / "plain"), "--format", "torch", "--output", str(tmp_path / "e")]
    )
    assert said.exit_code == 0, said.stderr
    assert "nothing was proved about its accuracy" in said.stdout
    assert "random noise only" in said.stderr
    found = json.loads((tmp_path / "e" / "export.json").read_text(encoding="utf-8"))
    assert found["accuracy"] is None
    assert "--dataset" in found["unproved"]
    pytest.importorskip("onnxruntime")
    with pytest.raises(UsageError, match="does not say what dataset"):  # int8 needs images
        export(tmp_path / "plain", dtype="int8", output=tmp_path / "f")


@needs_onnx
@pytest.mark.parametrize("checkpoint", ["vit-micro", "owner/name"])
def test_a_preset_or_a_hub_model_has_no_dataset_to_compare_on(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    micro = exporting.load_model("vit-micro")
    monkeypatch.setattr(exporting, "load_model", lambda named: micro)
    unknown = f"{checkpoint}: it does not say what dataset it was trained on; add --dataset."
    with pytest.raises(UsageError, match=unknown):  # int8 needs images
        export(checkpoint, format="onnx", dtype="int8", output=tmp_path / "e")
    monkeypatch.setattr(exporting, "_write", lambda *args: pytest.fail("only up to here"))
    with pytest.raises(pytest.fail.Exception, match="only up to here"):
        export(checkpoint, format="torch", output=tmp_path / "e")
    assert f"random noise only, which proves no accuracy: {unknown}" in capsys.readouterr().err


@needs_onnx
def test_half_precision_halves_the_file(made: Any, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import onnx

    exact = made("onnx").file

    def halved(program: Any, file: Path, document: Document) -> None:
        shutil.copy(exact, file)
        exporting_files.edit_onnx(file, document)

    from vitft.exporting import files as exporting_files

    monkeypatch.setattr(exporting, "traced", lambda loaded, resize: None)
    monkeypatch.setattr(exporting, "write_onnx", halved)
    result = export(run, dtype="fp16", output=tmp_path / "half", images=60)
    kinds = {tensor.data_type for tensor in onnx.load(result.file).graph.initializer if len(tensor.dims) > 1}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert onnx.TensorProto.FLOAT not in kinds
    assert 0 < result.proof.largest < 0.01
    assert read_exported(result.file).labels == load_model(run).labels


@needs_onnx
def test_half_precision_leaves_no_file_of_whole_weights(
    made: Any, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whole weights may need a second file where half of them do not."""
    file, program = tmp_path / "model.onnx", traced(load_model(run))
    document = replace(open_exported(made("onnx").file)[0], dtype="fp16")
    whole, how = sum(tensor.nbytes for tensor in program.state_dict.values()), document.preprocess
    images = np.random.default_rng(0).integers(0, 256, (2, how.height, how.width, 3), dtype=np.uint8)
    expected = open_exported(made("onnx").file)[1](images)
    for largest, names in ((3 * whole // 4, ["model.onnx"]), (whole // 4, ["model.onnx", "model.onnx.data"])):
        monkeypatch.setattr(files, "_LARGEST", largest)
        write_onnx(program, file, document)
        for _ in range(2):  # another document is written in the end
            assert sorted(one.name for one in tmp_path.iterdir()) == names
            np.testing.assert_allclose(open_exported(file)[1](images), expected, atol=0.01)
            files.edit_onnx(file, document)


@needs_onnx
def test_int8_is_calibrated_on_training_images(
    made: Any, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import onnx

    seen = []
    read = exporting.read_images

    def spy(*arguments: Any, **options: Any) -> Any:
        found = read(*arguments, **options)
        seen.append(found.split)
        return found

    monkeypatch.setattr(exporting, "read_images", spy)
    monkeypatch.setattr(exporting, "CALIBRATION", 8)
    monkeypatch.setattr(exporting, "traced", lambda loaded, resize: None)
    monkeypatch.setattr(exporting, "write_onnx", lambda program, file, document: shutil.copy(made("onnx").file, file))
    result = export(run, dtype="int8", output=tmp_path / "int8", images=60, tolerance=1)
    assert [split.name for split in seen] == ["test", "train", "validation"]
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in onnx.load(result.file).graph.node}
    assert 0 < result.proof.largest < 0.2
    assert [file.name for file in result.file.parent.glob("*.onnx*")] == ["model.onnx"]
    decides_by_its_own(result.file, run)
    assert read_exported(result.file).labels == load_model(run).labels


@pytest.mark.slow
def test_int8_for_openvino(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made: Any) -> None:
    pytest.importorskip("nncf")
    import openvino

    monkeypatch.setattr(exporting, "CALIBRATION", 8)
    monkeypatch.setattr(exporting, "traced", lambda loaded, resize: None)
    exact = openvino.Core().read_model(made("openvino").file)
    monkeypatch.setattr(exporting, "openvino_model", lambda program, document: exact)
    result = export(run, format="openvino", dtype="int8", output=tmp_path / "int8", images=60, tolerance=1)
    assert 0 < result.proof.largest < 0.3
    assert any(op.get_type_name() == "FakeQuantize" for op in openvino.Core().read_model(result.file).get_ops())


def test_what_an_export_is_not_for(run: Path, made: Any, saved: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder = made("torch").file.parent
    for model in (folder, folder / "model.pt2"):
        with pytest.raises(ModelError, match=r"is exported, so its weights cannot be trained"):
            trainer.train(TrainConfig(dataset="digits", model=str(model)), output=tmp_path / "run")
        with pytest.raises(UsageError, match="is exported already"):
            export(model, format="torch")
        with pytest.raises(ModelError, match="no features to look at"):
            load_model(model, headless=True)
    with pytest.raises(UsageError, match="dtype int8: the torch format has only fp32"):
        export(run, format="torch", dtype="int8")
    with pytest.raises(UsageError, match="format tflite: not one of onnx, openvino, torch"):
        export(run, format="tflite")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"scores each label separately \(sigmoid\)"):
        export(saved(problem_type="multi_label_classification"), format="torch")
    monkeypatch.setattr("vitft.errors.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs onnx, onnxscript and onnxruntime.*pip install 'vitft\[onnx\]'"):
        export(run)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UsageError, match=r"needs onnxruntime, not installed here; pip install 'vitft\[onnx\]'"):
        load_model(tmp_path / "model.onnx")


@pytest.mark.parametrize("format", HERE)
def test_a_damaged_or_foreign_file_is_an_error_in_one_line(format: Any, made: Any, tmp_path: Path) -> None:
    result = made(format)
    copy = shutil.copytree(result.file.parent, tmp_path / "copy")
    file = copy / result.file.name
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ModelError, match="does not match its SHA-256"):
        load_model(copy)
    alone = tmp_path / "alone" / file.name
    alone.parent.mkdir()
    alone.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ModelError, match=f"cannot be read as {format}"):
        load_model(alone)


def test_libraries_are_silent_and_send_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """OpenVINO and NNCF send statistics of use, unless these variables say that no person uses them."""
    monkeypatch.setenv("CI", "before")
    monkeypatch.delenv("NNCF_CI", raising=False)
    with quiet():
        print("a progress bar")  # noqa: T201
        assert os.environ["CI"] == os.environ["NNCF_CI"] == "true"
    assert (os.environ["CI"], "NNCF_CI" in os.environ) == ("before", False)
    assert capsys.readouterr().out == ""
    with quiet():
        checker = pytest.importorskip("openvino_telemetry.utils.opt_in_checker")
        assert checker.OptInChecker().check(False, True) == checker.ConsentCheckResult.DECLINED


def test_an_export_knows_its_run(made: Any, run: Path) -> None:
    """Its splits, its dataset, and its temperature, also beside the file."""
    folder = made("torch").file.parent
    assert folder == run / "exports" / "torch-fp32"
    card, own = read_card(folder), read_card(run / "best")
    assert card is not None
    assert own is not None
    document, _ = open_exported(folder / "model.pt2")
    assert (card.splits, card.config, card.temperature) == (own.splits, own.config, document.temperature)
    assert (document.splits, document.labels) == (own.splits, own.labels)


@pytest.mark.parametrize("format", HERE)
def test_a_lone_file_knows_how_sure_to_be(format: Any, made: Any, run: Path, tmp_path: Path) -> None:
    """Its temperature, and the confidence for a precision, are by its own probabilities of validation images."""
    result = made(format)
    for part in result.file.parent.glob("model.*"):
        shutil.copy(part, tmp_path)
    alone = tmp_path / result.file.name
    plain, calibrated = (Predictor(alone, calibrated=on) for on in (False, True))
    temperature = plain.document.temperature
    assert temperature not in (None, 1.0, read_card(run / "best").temperature)  # of 60 images, not of all
    assert temperature == pytest.approx(fit_temperature(said_of(result.file, run)), rel=1e-3)
    (before,), (after,) = plain([photo()], top_k=10), calibrated([photo()], top_k=10)
    powers = {label: score ** (1 / temperature) for label, score in before.top}
    assert dict(after.top) == pytest.approx(
        {label: one / sum(powers.values()) for label, one in powers.items()}, abs=1e-5
    )
    decides_by_its_own(alone, run)


@needs_onnx
def test_an_exported_file_is_served(made: Any, run: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from vitft.serving.app import Service, create_app
    from vitft.serving.model import open_model
    from vitft.serving.uploads import Limits

    alone = shutil.copy(made("onnx").file, tmp_path)
    encoded = BytesIO()
    photo().save(encoded, "PNG")
    (expected,) = Predictor(run)([photo()], top_k=10)
    for checkpoint in (made("onnx").file.parent, alone):
        served = open_model(checkpoint, min_precision=0.2)
        with TestClient(create_app(Service(served, Limits())), base_url="http://127.0.0.1") as client:
            (found,) = client.post("/predict?top_k=10", files={"file": encoded.getvalue()}).json()["predictions"]
            assert {one["label"]: one["score"] for one in found["top"]} == pytest.approx(dict(expected.top), abs=1e-5)
            about = client.get("/model").json()
            assert about["threshold"] == Predictor(alone, min_precision=0.2).threshold
            assert about["scores"]["test"]["accuracy"] == read_card(run / "best").scores["test"]["accuracy"]
            picture = client.post("/explain", files={"file": encoded.getvalue()})
            assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")


@pytest.mark.parametrize("how", [
    Preprocess(8, 8, (0.4, 0.5, 0.6)), Preprocess(8, 8, (0.2,)), Preprocess(8, 8, (0.6, 0.5, 0.4), flips_channels=True),
])  # fmt: skip
def test_a_file_hides_places_in_gray_too(how: Preprocess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Occlusion's zeros are the mean of the normalization, as for the model: black would be something to see."""
    seen = []

    def run(images: Any) -> Any:
        seen.append(images[0, 0, 0].tolist())
        return np.full((len(images), 2), 0.5, np.float32)

    document = Document("0", "torch", "fp32", "outside", ("a", "b"), how)
    monkeypatch.setattr(exported, "open_exported", lambda file: (document, run))
    read = read_exported(tmp_path / "model.pt2")
    read.model(pixel_values=torch.zeros(1, 3, 8, 8))
    pixels = torch.tensor([[[[200, 100, 3]]]], dtype=torch.uint8).expand(1, 8, 8, 3)
    read.model(pixel_values=normalize(pixels, read.preprocess))
    red_first = how.mean[::-1] if how.flips_channels else (how.mean * 3)[:3]
    assert seen == [[round(255 * value) for value in red_first], [200, 100, 3]]


def test_what_a_file_cannot_say_is_refused_with_a_remedy(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made("torch").file
    with pytest.raises(UsageError, match=r"is exported, so it does not give the features.*use the run it came from"):
        Predictor(file, none_of_these=0.99)
    document = replace(read_exported(file).model.document, thresholds=None, temperature=None)
    monkeypatch.setattr(exported, "open_exported", lambda file: (document, None))
    with pytest.raises(UsageError, match=r"was exported without validation images.*export it again"):
        Predictor(file, min_precision=0.5)
    with pytest.raises(UsageError, match="has no temperature"):
        Predictor(file, calibrated=True)


def said_of(file: Path, run: Path) -> Predictions:
    """What a file says of 60 validation images of a run."""
    config, _ = reading(run, None)
    images = read_images(run, load_model(run), config, split="validation", limit=60)
    predictor = Predictor(file)
    pixels = resize_and_crop(images.store.gather(np.arange(60)), predictor.preprocess)
    return of_split(images.split, images.truth, predictor.score(pixels).probabilities, predictor.labels, ())


def decides_by_its_own(file: Path, run: Path) -> None:
    said, temperature = said_of(file, run), Predictor(file).document.temperature
    for precision in (0.1, 0.2, 0.3):
        for known, calibrated in ((said, False), (at_temperature(said, temperature), True)):
            found = threshold_for(known, precision)
            if found is None:
                with pytest.raises(UsageError, match="not even the surest"):
                    Predictor(file, min_precision=precision, calibrated=calibrated)
            else:
                threshold = Predictor(file, min_precision=precision, calibrated=calibrated).threshold
                assert threshold == pytest.approx(found.confidence, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "deit", "beit", "dinov2", "dinov3_vit", "swin", "swinv2", "siglip", "clip",
                                    "convnext", "convnextv2", "resnet", "mobilevit", "hiera", "levit"])  # fmt: skip
def test_families(family: str, tmp_path: Path) -> None:
    """Every architecture comes out of ONNX Runtime as it went in, in batches of any size."""
    pytest.importorskip("onnxruntime")
    from vitft.models.resize import input_size

    model = tiny_classifier(family, num_labels=4)
    height, width = input_size(model.config) or (64, 64)
    loaded = Loaded(model, Preprocess(height, width, (0.4, 0.5, 0.6)), tuple("abcd"), None, False)
    document = Document("0", "onnx", "fp32", "outside", loaded.labels, loaded.preprocess)
    images = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (5, height, width, 3), dtype=np.uint8))
    with torch.no_grad():
        expected = model(pixel_values=normalize(images, loaded.preprocess)).logits.softmax(1).numpy()
    write_onnx(traced(loaded), tmp_path / "model.onnx", document)
    _, run = open_exported(tmp_path / "model.onnx")
    np.testing.assert_allclose(run(images.numpy()), expected, atol=1e-4)
    np.testing.assert_allclose(run(images[:1].numpy()), expected[:1], atol=1e-4)
