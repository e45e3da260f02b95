"""`vitft explain --image`: three computations of every stage agree, and worked examples match the code."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import vitft
from vitft.attribution.gradient_attention import gradient_attention
from vitft.cli.app import app
from vitft.data.augment import normalize
from vitft.errors import DataError, ModelError, UsageError
from vitft.evaluation.loading import load_model
from vitft.explain.attention import draw_attention, patch_attention, rollout
from vitft.explain.lens import lens
from vitft.explain.stage import find_lessons, lesson_text
from vitft.explain.trace import Trace, document, trace_image, trace_table
from vitft.prediction.predictor import predict
from vitft.spec import stages

MICRO = Path(vitft.__file__).parent / "assets" / "vit-micro"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def trace(picture: Path) -> Trace:
    return trace_image(picture, MICRO)


def text(renderable: Any, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(renderable)
    return console.export_text()


def test_all_three_computations_have_every_stage_and_agree(trace: Trace) -> None:
    expected = {stage.name: stage.output for stage in stages(trace.spec)}
    for computed in (trace.by_numpy, trace.by_torch):
        assert {name: array.shape for name, array in computed.items()} == expected
    # Transformers' modules never return the scores, only the attention weights.
    assert {name: array.shape for name, array in trace.by_transformers.items()} == {
        name: shape for name, shape in expected.items() if not name.endswith(".scores")
    }
    for stage in document(trace)["stages"]:
        # float32 has 24 bits of precision, and every number is the result of hundreds of rounded operations.
        assert stage["max_rel_diff"]["numpy_torch"] <= 1e-5, stage["name"]
        assert (
            stage["max_rel_diff"]["numpy_transformers"] is None or stage["max_rel_diff"]["numpy_transformers"] <= 1e-5
        )


def test_a_difference_in_a_stage_is_reported(trace: Trace) -> None:
    assert re.search(r"The largest of all is \S+: float32 rounding\.", " ".join(text(trace_table(trace)).split()))
    name = "block.2.mlp.in"
    trace.by_torch[name][0, 3, 5] += 1
    try:
        stage = next(stage for stage in document(trace)["stages"] if stage["name"] == name)
        assert stage["max_abs_diff"]["numpy_torch"] == pytest.approx(1, rel=1e-4)
        told = " ".join(text(trace_table(trace)).split())
        largest = stage["max_rel_diff"]["numpy_torch"]
        assert f"The largest of all is {largest:.1e}: more than float32 rounding; please report it." in told
    finally:
        trace.by_torch[name][0, 3, 5] -= 1


def test_statistics_are_those_of_the_tensor(trace: Trace) -> None:
    stage = next(stage for stage in document(trace)["stages"] if stage["name"] == "norm")
    array = trace.by_numpy["norm"].astype(np.float64)
    assert stage["shape"] == [1, 50, 64]
    for name, value in {"mean": array.mean(), "std": array.std(), "min": array.min(), "max": array.max()}.items():
        assert stage[name] == pytest.approx(value)
    assert stage["norm"] == pytest.approx(np.sqrt((array**2).sum()))


def test_scores_equal_those_of_predict(trace: Trace, picture: Path) -> None:
    (row,) = predict(picture, MICRO, top_k=3)
    for (label, score), (trace_label, trace_score) in zip(row.top, trace.scores, strict=False):
        assert (label, score) == (trace_label, pytest.approx(trace_score, abs=1e-5))


@pytest.mark.parametrize(
    "name", ["embed", "attention", "block.3.attention", "mlp", "block.4.mlp.activation", "norm", "head", "pool"]
)
def test_worked_examples_match_the_code(trace: Trace, name: str) -> None:
    lessons = text(lesson_text(find_lessons(trace, name)), 400)
    differences = re.findall(r"difference: (\S+)", lessons)
    assert differences
    assert all(difference == "none" or float(difference) < 1e-5 for difference in differences), lessons
    for line in lessons.splitlines():
        if "vitft/scratch/" in line:
            file, number = line.split()[0].split(":")
            source = (Path(vitft.__file__).parents[1] / file).read_text().splitlines()
            assert source[int(number) - 1].startswith(f"def {line.split()[1]}(")


@pytest.mark.parametrize(
    ("setting", "divided"), [({"rescale_factor": 1 / 127.5}, "127.5"), ({"do_rescale": False}, "1")]
)
def test_the_first_pixel_is_that_of_the_picture(
    picture: Path, setting: dict[str, Any], divided: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MICRO, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    trace = trace_image(picture, folder)
    (lesson,) = find_lessons(trace, "image")
    assert lesson.worked.startswith(f"({trace.pixels[0, 0, 0]} / {divided} − ")
    assert lesson.result == pytest.approx(lesson.chapter, rel=1e-5)


def test_an_unknown_stage_suggests_the_nearest(trace: Trace) -> None:
    with pytest.raises(UsageError, match="did you mean softmax"):
        find_lessons(trace, "sofmax")


def test_attention_maps_are_brightest_at_the_largest_weight(trace: Trace, tmp_path: Path) -> None:
    written = draw_attention(trace, tmp_path / "out")
    assert len(written) == trace.spec.layers * trace.spec.heads + 2 + len(trace.relevance)
    assert all(path.is_file() for path in written)
    maps = patch_attention(trace)
    assert maps.shape == (4, 4, 7, 7)
    row, column = np.unravel_index(maps[1, 2].argmax(), (7, 7))
    picture = np.asarray(Image.open(tmp_path / "out" / "layer-02-head-03.png"), np.float32)
    # Attention is amber, which has more red than blue, most of it where the weight is largest.
    tint = (picture[..., 0] - picture[..., 2]).reshape(7, 32, 7, 32).mean(axis=(1, 3))
    assert tint[row, column] > np.median(tint)
    assert rollout(trace).sum() == pytest.approx(1)
    assert (maps.sum(axis=(2, 3)) <= 1 + 1e-6).all()


def test_what_speaks_for_a_class_is_computed_twice(trace: Trace) -> None:
    """By Chapter 3's gradient of A V, and by autograd through Transformers' own attention."""
    loaded = load_model(MICRO)
    pixels = normalize(torch.from_numpy(trace.pixels)[None], loaded.preprocess)
    for (label, _), found in zip(trace.scores, trace.relevance, strict=False):
        other = gradient_attention(loaded.model, pixels, torch.tensor([trace.labels.index(label)]))
        assert other is not None
        np.testing.assert_allclose(found, other[0], rtol=1e-3, atol=1e-4 * found.max())
    assert len(trace.relevance) == 5
    assert not np.allclose(trace.relevance[0], trace.relevance[1], rtol=0.1)


def test_the_lens_ends_with_the_prediction(trace: Trace) -> None:
    found = lens(trace)
    assert found.pooled.shape == (5, 10)
    assert found.best.shape == found.sure.shape == (5, 50)
    assert [trace.labels[place] for place in np.argsort(-found.pooled[-1])] == [label for label, _ in trace.scores]
    assert found.pooled[-1].max() == pytest.approx(trace.scores[0][1], rel=1e-5)
    np.testing.assert_allclose(found.pooled.sum(axis=1), 1)
    # With a class token, the head reads it: before the first block it is the same for every image.
    tokens = trace.weights.embedding.class_token[0] + trace.weights.embedding.positions[0]
    norm, head = trace.weights.norm, trace.weights.head.logits
    normed = (tokens - tokens.mean()) / np.sqrt(tokens.var() + trace.spec.norm_eps) * norm.scale + norm.shift
    logits = head.weight @ normed + head.bias
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    np.testing.assert_allclose(found.pooled[0], expected, rtol=1e-3)
    np.testing.assert_allclose(found.sure[:, 0], found.pooled.max(axis=1), rtol=1e-6)


def test_rollout_of_a_model_that_attends_to_one_patch_only(trace: Trace) -> None:
    names = [name for name in trace.by_numpy if name.endswith(".softmax")]
    originals = {name: trace.by_numpy[name] for name in names}
    try:
        for name in names:
            one_patch = np.zeros_like(originals[name])
            one_patch[..., 9] = 1
            trace.by_numpy[name] = one_patch
        assert rollout(trace).ravel().argmax() == 8
        assert rollout(trace).ravel()[8] == pytest.approx(1)
    finally:
        trace.by_numpy.update(originals)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["explain", *words])


def test_the_command_prints_a_table_or_json_and_writes_pictures(picture: Path, tmp_path: Path) -> None:
    assert "block" not in run("--image", str(picture)).stdout.split("stage")[0]
    result = json.loads(run("--image", str(picture), "--json").stdout)
    assert [stage["name"] for stage in result["stages"]][:2] == ["image", "embed.projection"]
    assert "exp(s_i)" in run("--image", str(picture), "--stage", "softmax").stdout
    (stage,) = json.loads(run("--image", str(picture), "--stage", "softmax", "--json").stdout)["stages"]
    assert stage["name"] == stage["lesson"]["stage"] == "block.1.attention.softmax"
    assert stage["lesson"]["result"] == pytest.approx(stage["lesson"]["chapter"], rel=1e-5)
    assert run("--image", str(picture), "--attention", str(tmp_path / "out")).exit_code == 0
    assert (tmp_path / "out" / "attention.png").is_file()


def test_errors_are_one_line(picture: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.png: .*give an image file"):
        trace_image(tmp_path / "nope.png", MICRO)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png"):
        trace_image(tmp_path / "text.png", MICRO)
    with pytest.raises(ModelError):
        trace_image(picture, tmp_path / "nothing")
    result = run("--stage", "softmax")
    assert result.exit_code == 2
    assert "add --image FILE" in result.output
    result = run("--image", str(picture), "--model", "vit-tiny")
    assert result.exit_code == 2
    assert "--model sets sizes of the table" in result.output
    (tmp_path / "file").write_text("")
    result = run("--image", str(picture), "--attention", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "cannot be created" in result.output


def test_pictures_of_an_earlier_model_are_removed_and_those_of_the_user_kept(trace: Trace, tmp_path: Path) -> None:
    draw_attention(trace, tmp_path)
    mine = tmp_path / "mine.png"
    Image.new("RGB", (8, 8)).save(mine)
    smaller = replace(trace, spec=replace(trace.spec, layers=2))
    written = draw_attention(smaller, tmp_path)
    assert set(tmp_path.iterdir()) == {mine, *written}
    mine.rename(tmp_path / "rollout.png")
    with pytest.raises(UsageError, match=r"--attention .*: rollout\.png is there already; choose another folder\."):
        draw_attention(trace, tmp_path)
    assert Image.open(tmp_path / "rollout.png").size == (8, 8)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_the_lesson_of_an_activation_is_that_of_the_model(trace: Trace, activation: str) -> None:
    from vitft.scratch.vit import vit

    spec, stages = replace(trace.spec, activation=activation), {}
    vit(trace.by_numpy["image"], trace.weights, spec, watch=lambda name, array: stages.update({name: array.copy()}))
    lessons = text(lesson_text(find_lessons(replace(trace, spec=spec, by_numpy=stages), "activation")), 400)
    assert lessons.splitlines()[3].split()[-1] == activation
    (difference,) = re.findall(r"difference: (\S+)", lessons)
    assert difference == "none" or float(difference) < 1e-5


def test_a_vit_for_non_square_images(picture: Path, tmp_path: Path) -> None:
    """Without a preprocessor file, the size of the input is that in the configuration."""
    import transformers

    config = transformers.ViTConfig(
        image_size=(24, 32), patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=3,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    trace = trace_image(picture, tmp_path)
    assert trace.pixels.shape == (24, 32, 3)
    assert trace.by_transformers["embed.positions"].shape == (1, 13, 16)
    assert max(stage["max_rel_diff"]["numpy_torch"] for stage in document(trace)["stages"]) <= 1e-5


def test_a_backbone_without_a_head(saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("vit")
    expected = trace_image(Path("docs/boot.png"), folder).by_numpy
    transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)

    trace = trace_image(Path("docs/boot.png"), folder)

    assert np.array_equal(trace.by_numpy["pool"], expected["pool"])
    assert [label for label, _ in trace.scores] != ["ant", "bee", "cat"]
    assert "no classification head: the stages after pool use an untrained one" in capsys.readouterr().err
