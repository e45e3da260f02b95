"""`vitft explain --image`: three computations of every stage agree, and what is worked out is what was computed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import vitft
from vitft.cli.app import app
from vitft.errors import DataError, ModelError, UsageError
from vitft.evaluation.prediction import predict
from vitft.explain.attention import draw, rollout, shares
from vitft.explain.stage import lesson_text, opened
from vitft.explain.trace import Trace, document, trace, trace_table
from vitft.spec import stages

MICRO = Path(vitft.__file__).parent / "assets" / "vit-micro"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def found(picture: Path) -> Trace:
    return trace(picture, MICRO)


def text(shown: Any, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(shown)
    return console.export_text()


def test_every_stage_is_there_in_all_three_and_they_agree(found: Trace) -> None:
    wanted = {stage.name: stage.output for stage in stages(found.spec)}
    for made in (found.by_numpy, found.by_torch):
        assert {name: array.shape for name, array in made.items()} == wanted
    # What no module of Transformers makes: the scores, which its attention turns into weights at once.
    without = {name for name in wanted if name.endswith(".scores")}
    assert {name: array.shape for name, array in found.by_transformers.items()} == {
        name: shape for name, shape in wanted.items() if name not in without
    }
    for stage in document(found)["stages"]:
        # float32 has 24 bits; a few hundred of them are rounded on the way to any number.
        assert stage["max_rel_diff"]["numpy_torch"] <= 1e-5, stage["name"]
        assert (
            stage["max_rel_diff"]["numpy_transformers"] is None or stage["max_rel_diff"]["numpy_transformers"] <= 1e-5
        )


def test_a_stage_that_differs_is_seen(found: Trace) -> None:
    name = "block.2.mlp.in"
    found.by_torch[name][0, 3, 5] += 1
    try:
        stage = next(stage for stage in document(found)["stages"] if stage["name"] == name)
        assert stage["max_abs_diff"]["numpy_torch"] == pytest.approx(1, rel=1e-4)
        assert f"The worst is {stage['max_rel_diff']['numpy_torch']:.1e}" in " ".join(text(trace_table(found)).split())
    finally:
        found.by_torch[name][0, 3, 5] -= 1


def test_the_numbers_are_those_of_the_tensors(found: Trace) -> None:
    stage = next(stage for stage in document(found)["stages"] if stage["name"] == "norm")
    array = found.by_numpy["norm"].astype(np.float64)
    assert stage["shape"] == [1, 50, 64]
    for name, value in {"mean": array.mean(), "std": array.std(), "min": array.min(), "max": array.max()}.items():
        assert stage[name] == pytest.approx(value)
    assert stage["norm"] == pytest.approx(np.sqrt((array**2).sum()))


def test_the_scores_are_those_of_predict(found: Trace, picture: Path) -> None:
    (row,) = predict(picture, MICRO, top_k=3)
    for (label, score), (same, ours) in zip(row.top, found.scores, strict=False):
        assert (label, score) == (same, pytest.approx(ours, abs=1e-5))


@pytest.mark.parametrize(
    "name", ["embed", "attention", "block.3.attention", "mlp", "block.4.mlp.activation", "norm", "head", "pool"]
)
def test_what_is_worked_out_is_what_the_chapter_has(found: Trace, name: str) -> None:
    shown = text(lesson_text(opened(found, name)), 400)
    gaps = [line.split(", ")[1].split()[0] for line in shown.splitlines() if "the chapter has" in line]
    assert gaps
    assert all(gap == "the" or float(gap) < 1e-5 for gap in gaps), shown
    for line in shown.splitlines():
        if "vitft/scratch/" in line:
            file, number = line.split()[0].split(":")
            source = (Path(vitft.__file__).parents[1] / file).read_text().splitlines()
            assert source[int(number) - 1].startswith(f"def {line.split()[1]}(")


def test_an_unknown_stage_names_the_nearest(found: Trace) -> None:
    with pytest.raises(UsageError, match="did you mean softmax"):
        opened(found, "sofmax")


def test_attention_pictures_show_where_it_is(found: Trace, tmp_path: Path) -> None:
    written = draw(found, tmp_path / "out")
    assert len(written) == found.spec.layers * found.spec.heads + 2
    assert all(path.is_file() for path in written)
    heat = shares(found)
    assert heat.shape == (4, 4, 7, 7)
    row, column = np.unravel_index(heat[1, 2].argmax(), (7, 7))
    drawn = np.asarray(Image.open(tmp_path / "out" / "layer-02-head-03.png"), np.float32)
    # Amber is what attention adds: more red than blue, most where the share is largest.
    tint = (drawn[..., 0] - drawn[..., 2]).reshape(7, 32, 7, 32).mean(axis=(1, 3))
    assert tint[row, column] > np.median(tint)
    assert rollout(found).sum() == pytest.approx(1)
    assert (heat.sum(axis=(2, 3)) <= 1 + 1e-6).all()


def test_rollout_of_a_model_that_only_looks_at_one_patch(found: Trace) -> None:
    names = [name for name in found.by_numpy if name.endswith(".softmax")]
    kept = {name: found.by_numpy[name] for name in names}
    try:
        for name in names:
            alone = np.zeros_like(kept[name])
            alone[..., 9] = 1
            found.by_numpy[name] = alone
        assert rollout(found).ravel().argmax() == 8
        assert rollout(found).ravel()[8] == pytest.approx(1)
    finally:
        found.by_numpy.update(kept)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["explain", *words])


def test_the_command_prints_a_table_a_document_and_pictures(picture: Path, tmp_path: Path) -> None:
    assert "block" not in run("--image", str(picture)).stdout.split("stage")[0]
    whole = json.loads(run("--image", str(picture), "--json").stdout)
    assert [stage["name"] for stage in whole["stages"]][:2] == ["image", "embed.projection"]
    assert "exp(s_i)" in run("--image", str(picture), "--stage", "softmax").stdout
    (stage,) = json.loads(run("--image", str(picture), "--stage", "softmax", "--json").stdout)["stages"]
    assert stage["name"] == stage["lesson"]["stage"] == "block.1.attention.softmax"
    assert stage["lesson"]["result"] == pytest.approx(stage["lesson"]["chapter"], rel=1e-5)
    assert run("--image", str(picture), "--attention", str(tmp_path / "out")).exit_code == 0
    assert (tmp_path / "out" / "attention.png").is_file()


def test_bad_input_is_one_line(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.png: .*give an image file"):
        trace(tmp_path / "nope.png", MICRO)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png"):
        trace(tmp_path / "text.png", MICRO)
    with pytest.raises(ModelError):
        trace(picture, tmp_path / "nothing")
    result = run("--stage", "softmax")
    assert result.exit_code == 2
    assert "add --image FILE" in result.output
    result = run("--image", str(picture), "--model", "vit-tiny")
    assert result.exit_code == 2
    assert "--model shapes a table" in result.output
    (tmp_path / "file").write_text("")
    result = run("--image", str(picture), "--attention", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "cannot be made" in result.output


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_the_lesson_of_an_activation_is_the_models_own(found: Trace, activation: str) -> None:
    from vitft.scratch.vit import vit

    spec, seen = replace(found.spec, activation=activation), {}
    vit(found.by_numpy["image"], found.weights, spec, watch=lambda name, array: seen.update({name: array.copy()}))
    shown = text(lesson_text(opened(replace(found, spec=spec, by_numpy=seen), "activation")), 400)
    assert shown.splitlines()[3].split()[-1] == activation
    gap = next(line for line in shown.splitlines() if "the chapter has" in line).split(", ")[1]
    assert gap.startswith("the same") or float(gap.split()[0]) < 1e-5


def test_a_vit_of_another_shape_than_a_square_is_followed_too(picture: Path, tmp_path: Path) -> None:
    """Without a preprocessor file its input is the size that its configuration states."""
    import transformers

    config = transformers.ViTConfig(
        image_size=(24, 32), patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=3,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    found = trace(picture, tmp_path)
    assert found.pixels.shape == (24, 32, 3)
    assert found.by_transformers["embed.positions"].shape == (1, 13, 16)
    assert max(stage["max_rel_diff"]["numpy_torch"] for stage in document(found)["stages"]) <= 1e-5


def test_the_stages_of_a_backbone_without_a_head_are_shown(
    saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved("vit")
    wanted = trace(Path("docs/boot.png"), folder).by_numpy
    transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)

    found = trace(Path("docs/boot.png"), folder)

    assert np.array_equal(found.by_numpy["pool"], wanted["pool"])
    assert [label for label, _ in found.scores] != ["ant", "bee", "cat"]
    assert "no classification head: the stages after pool are of an untrained one" in capsys.readouterr().err
