"""`vitft scratch train` on small datasets with both engines: what it prints and what it writes."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file
from typer.testing import CliRunner

from tests.forked import finish
from vitft.cli.app import app
from vitft.config.recipe import recipes
from vitft.errors import DataError, UsageError
from vitft.io import console
from vitft.scratch.scalar_vit import PATTERNS, train
from vitft.scratch.train import Images, NumpyEngine, Plan, accuracy
from vitft.scratch.train import load as load_weights
from vitft.scratch_runner import training
from vitft.scratch_runner.config import TextbookConfig, load_config
from vitft.scratch_runner.report import scalar_document
from vitft.scratch_runner.training import load_data, make_plan, make_spec, mean_and_std
from vitft.spec import ViTSpec

NETWORK = ["--width", "8", "--heads", "2", "--layers", "1", "--mlp", "8", "--epochs", "2", "--batch-size", "8"]
DIGITS = ["--dataset", "digits", "--max-train-samples", "60", "--max-test-samples", "30", *NETWORK]


def scratch(*words: str | Path, columns: int = 80) -> Any:
    """Run `vitft scratch train ...`; the result has exit_code, stdout and stderr."""
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["scratch", "train", *map(str, words)])


def error_of(*words: str | Path, code: int) -> str:
    """The error message of a failing command."""
    result = scratch(*words)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    return str(result.stderr.splitlines()[-1].removeprefix("error: "))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "out", Console(highlight=False, width=80))


Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A function that makes a folder with images of two classes, dark and light, in `train` and another split."""

    def make(
        mode: str = "RGB", size: tuple[int, int] = (8, 8), test: str | None = "test", name: str = "shades"
    ) -> Path:
        rng = np.random.default_rng(0)
        for split, count in (("train", 12), (test, 6)):
            for label, low in (("dark", 0), ("light", 128)) if split else ():
                (tmp_path / name / str(split) / label).mkdir(parents=True)
                for i in range(count):
                    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
                    pixels = rng.integers(low, low + 128, shape, dtype=np.uint8)
                    Image.fromarray(pixels).save(tmp_path / name / str(split) / label / f"{i}.png")
        return tmp_path / name

    return make


def scored(run: Path) -> float:
    """The test accuracy of a run's weights, computed only from the files in its folder."""
    summary = json.loads((run / "summary.json").read_text())
    config = TextbookConfig.parse(yaml.safe_load((run / "config.yaml").read_text()))
    spec = ViTSpec(**summary["spec"])
    plan = Plan(epochs=1, batch_size=1, lr=1, mean=summary["mean"], std=summary["std"], dtype=config.dtype)
    engine = NumpyEngine(load_weights(run / "weights.safetensors", spec), spec, plan)
    test = load_data(config).test
    return accuracy(engine, Images(test.pixels, test.labels), plan)


# -- runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_the_output_and_the_files_of_a_run(engine: str) -> None:
    result = scratch(*DIGITS, "--engine", engine, "--dropout", "0.1", "--augment", "both", "--lr", "1e-2")
    assert result.exit_code == 0, result.output
    run = Path("runs/textbook-digits-1")
    assert {file.name for file in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "summary.json", "weights.safetensors",
    }  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    score, other = summary["score"], {"numpy": "torch", "torch": "numpy"}[engine]
    low, high = score["accuracy_interval"]

    assert result.stdout.splitlines() == [
        f"test accuracy {console.percent(score['accuracy'], 2)} "
        f"(95 % interval {100 * low:.2f}–{100 * high:.2f}, 30 images)",
        f"trained in {console.duration(summary['elapsed_s'])}; run: {run}",
        f"next: vitft scratch train {run}/config.yaml --engine {other}",
    ]  # fmt: skip
    messages = result.stderr.splitlines()
    assert (
        messages[0] == f"60 training images of 8x8 in 1 channel, {summary['parameters']:,} parameters, {engine} engine"
    )
    for number, line in enumerate(lines):
        assert (line["epoch"], line["step"]) == (number + 1, 8 * (number + 1))
        assert f"epoch {line['epoch']}/2  loss {line['loss']:.4f}  " in messages[1 + number]
        assert f"test {console.percent(line['test_accuracy'], 2)}" in messages[1 + number]
    assert lines[-1]["test_accuracy"] == score["accuracy"]
    assert (score["split"], score["count"], len(score["split_hash"])) == ("test", 30, 16)
    assert (summary["engine"], summary["splits"]["train"]["count"]) == (engine, 60)
    assert scored(run) == score["accuracy"]


def test_both_engines_have_the_same_losses() -> None:
    """With the same seed both get the same batches; in float64 only the last digits differ."""
    rows = []
    for engine in ("numpy", "torch"):
        assert scratch(*DIGITS, "--engine", engine, "--dtype", "float64", "--output", engine).exit_code == 0
        lines = (Path(engine) / "metrics.jsonl").read_text().splitlines()
        rows.append([[json.loads(line)[key] for key in ("loss", "accuracy", "test_accuracy")] for line in lines])
    assert np.allclose(rows[0], rows[1], rtol=0, atol=1e-9)
    weights = [load_file(f"{engine}/weights.safetensors") for engine in ("numpy", "torch")]
    assert weights[0].keys() == weights[1].keys()
    assert {array.dtype for arrays in weights for array in arrays.values()} == {np.dtype("float64")}


def test_the_config_of_a_run_is_a_recipe() -> None:
    assert scratch(*DIGITS, "--seed", "3").exit_code == 0
    assert scratch("runs/textbook-digits-1/config.yaml").exit_code == 0
    first, second = (Path(f"runs/textbook-digits-{n}") for n in (1, 2))
    assert (first / "config.yaml").read_bytes() == (second / "config.yaml").read_bytes()
    assert (first / "weights.safetensors").read_bytes() == (second / "weights.safetensors").read_bytes()


def test_json_output_is_the_summary_and_the_folder() -> None:
    result = scratch(*DIGITS, "--json", "--output", "mine")
    assert json.loads(result.stdout) == {"run": "mine"} | json.loads(Path("mine/summary.json").read_text())


def test_an_easy_dataset_is_learned(folder: Folder) -> None:
    result = scratch("--dataset", folder("L"), *NETWORK, "--epochs", "12", "--lr", "1e-2")
    assert "test accuracy 100.00 % (95 % interval 75.75–100.00, 12 images)" in result.stdout


def test_the_config_has_the_absolute_path_of_the_dataset(folder: Folder, tmp_path: Path) -> None:
    folder()
    assert scratch("--dataset", "shades", *NETWORK).exit_code == 0
    config = yaml.safe_load(Path("runs/textbook-shades-1/config.yaml").read_text())
    assert Path(config["dataset"]).expanduser() == tmp_path / "shades"


# -- data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
@pytest.mark.parametrize("size", [(8, 8), (12, 4)])
def test_gray_and_color_images_square_and_not(folder: Folder, mode: str, channels: int, size: tuple[int, int]) -> None:
    dataset = folder(mode, size)
    result = scratch("--dataset", dataset, *NETWORK, "--augment", "both", "--json")
    assert result.exit_code == 0, result.output
    spec = json.loads(result.stdout)["spec"]
    assert (spec["channels"], spec["image_width"], spec["image_height"]) == (channels, *size)
    data = load_data(TextbookConfig(dataset=str(dataset)))
    assert data.train.pixels.shape == (24, channels, size[1], size[0])
    stored = np.asarray(Image.open(dataset / "train" / "dark" / "0.png")).reshape(size[1], size[0], channels)
    assert any(np.array_equal(image, stored.transpose(2, 0, 1)) for image in data.train.pixels)


def test_without_a_test_split_a_tenth_of_train_is_held_out(folder: Folder) -> None:
    result = scratch("--dataset", folder(test=None), *NETWORK)
    assert "validation accuracy" in result.stdout
    data = load_data(TextbookConfig(dataset="shades"))
    assert len(data.train.labels) + len(data.test.labels) == 24
    assert 1 <= len(data.test.labels) < 12  # about a tenth: each image is drawn independently
    assert not set(data.splits["train"].rows) & set(data.splits["validation"].rows)


def test_the_validation_split_is_used_only_without_a_test_split(folder: Folder) -> None:
    data = load_data(TextbookConfig(dataset=str(folder())))
    assert {role: len(split.rows) for role, split in data.splits.items()} == {"train": 24, "test": 12}
    folder(test="validation", name="other")
    assert set(load_data(TextbookConfig(dataset="other")).splits) == {"train", "validation"}


def test_images_of_different_sizes_are_an_error(folder: Folder) -> None:
    Image.new("RGB", (9, 8)).save(folder() / "train" / "dark" / "99.png")
    message = error_of("--dataset", "shades", *NETWORK, code=3)
    assert message.startswith("train/dark/99.png is 8x9, but the first image is 8x8; the textbook needs images of one")
    assert not Path("runs").exists()


def test_a_corrupt_image_is_an_error(folder: Folder) -> None:
    (folder() / "test" / "dark" / "99.png").write_text("no image")
    assert error_of("--dataset", "shades", *NETWORK, code=3).startswith("test/dark/99.png: is not an image")


def test_a_single_class_is_an_error(folder: Folder) -> None:
    dataset = folder()
    for split in ("train", "test"):
        shutil.rmtree(dataset / split / "light")
    with pytest.raises(DataError, match=r"there is only one class \(dark\)"):
        load_data(TextbookConfig(dataset="shades"))


def test_mean_and_std_are_those_of_the_training_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2100, 3, 4, 4), dtype=np.uint8)
    pixels[:, 2] = 7
    mean, std = mean_and_std(pixels)
    scaled = pixels / 255
    assert np.allclose(mean, scaled.mean(axis=(0, 2, 3)), rtol=1e-12)
    assert np.allclose(std[:2], scaled.std(axis=(0, 2, 3))[:2], rtol=1e-12)
    assert std[2] == 1  # no division by 0 for a constant channel


# -- settings -----------------------------------------------------------------------------------------


def test_every_setting_reaches_the_network_or_the_plan(folder: Folder) -> None:
    data = load_data(TextbookConfig(dataset=str(folder())))
    changed: dict[str, Any] = {
        "patch_size": 2, "width": 12, "heads": 3, "layers": 2, "mlp": 5, "pre_logits": 4, "pooling": "mean",
        "positions": "sinusoidal", "norm": "post", "final_norm": False, "activation": "relu", "epochs": 3,
        "batch_size": 4, "lr": 0.5, "optimizer": "sgd", "weight_decay": 0.2, "momentum": 0.3, "schedule": "step",
        "warmup_steps": 6, "decay_epoch": 7, "decay_factor": 0.5, "label_smoothing": 0.2, "dropout": 0.3,
        "dtype": "float64", "seed": 9,
    }  # fmt: skip
    config = TextbookConfig(**changed)
    used = asdict(make_spec(config, data)) | asdict(make_plan(config, data))
    for name, value in changed.items():
        assert used["patch_height" if name == "patch_size" else name] == value, name
        assert getattr(TextbookConfig(), name) != value, name
    others = set(TextbookConfig.model_fields) - set(changed)
    assert others == {"dataset", "max_train_samples", "max_test_samples", "augment", "engine"}


@pytest.mark.parametrize(
    ("augment", "expected"), [("none", (0, 0)), ("crop", (1, 0)), ("flip", (0, 1)), ("both", (1, 1))]
)
def test_augmentations(folder: Folder, augment: Any, expected: tuple[int, int]) -> None:
    plan = make_plan(TextbookConfig(augment=augment), load_data(TextbookConfig(dataset=str(folder()))))
    assert (plan.crop_border, plan.flip) == expected  # an eighth of 8 pixels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no dataset; name a recipe"),
        ("mnist-patch8", "recipe mnist-patch8: neither a file nor a known recipe; did you mean mnist-patch"),
        ("scaler", "did you mean scalar?"),
        ("zzz", "`vitft recipes ls` lists them"),
        ("smoke", "recipe smoke is a fine-tuning recipe; run it with: vitft train --recipe smoke"),
        ("--dataset digits --engine jax", "--engine should be 'numpy' or 'torch', got 'jax'"),
        ("--dataset digits --patch-size 3", "patch_size 3 does not divide the 8x8 images of digits; try 1, 2, 4 or 8."),
        ("--dataset digits --width 10", "width 10 is not a multiple of heads 4; try 8 or 12."),
        ("--dataset digits --dropout 1", "--dropout should be less than 1, got 1.0"),
        ("scalar --epochs 3", "leave out --epochs"),
        ("scalar --output x", "leave out --output"),
    ],
)  # fmt: skip
def test_usage_errors(arguments: str, message: str) -> None:
    assert message in error_of(*arguments.split(), code=2)
    assert not list(Path().iterdir())


def test_an_error_in_a_recipe_names_the_recipe() -> None:
    Path("mine.yaml").write_text("dataset: digits\nheds: 3\n")
    assert error_of("mine.yaml", code=2) == "recipe mine.yaml: unknown setting 'heds'; did you mean heads?"


def test_an_existing_folder_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert error_of(*DIGITS, "--output", "mine", code=2) == "output mine: exists and is not empty; choose another."
    assert error_of(*DIGITS, "--output", "mine/file", code=2).startswith("output mine/file: exists")
    assert error_of(*DIGITS, "--output", "mine/file/x", code=2).startswith("output mine/file/x: cannot be created")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["file"]


def test_a_run_that_begins_in_the_meantime_keeps_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path("runs/textbook-digits-1")
    real = training.make_engine

    def make_engine(*arguments: Any) -> Any:
        other.mkdir(parents=True)
        return real(*arguments)

    monkeypatch.setattr(training, "make_engine", make_engine)
    assert scratch(*DIGITS).exit_code == 0
    assert list(other.iterdir()) == []
    assert (other.with_name("textbook-digits-2") / "summary.json").is_file()


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    words = ["scratch", "train", *DIGITS, "--output", str(tmp_path / "new")]
    code, said = finish(*words, log=tmp_path / "log", largest_file=2000)  # the weights have 4 kB, the settings 1
    assert (code, said.splitlines()[-1]) == (1, f"error: {tmp_path}/new/weights.safetensors: File too large.")
    assert not (tmp_path / "new").exists()


def test_the_files_of_a_run_have_the_permissions_that_the_user_asked_for() -> None:
    before = os.umask(0o077)
    try:
        assert scratch(*DIGITS).exit_code == 0
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in Path("runs/textbook-digits-1").iterdir()} == {0o600}


def test_a_non_finite_loss_ends_the_run() -> None:
    arguments = [*DIGITS, "--lr", "100", "--optimizer", "sgd", "--epochs", "40"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = error_of(*arguments, code=5)
    assert re.fullmatch(r"loss is (nan|inf) at step \d+, lr 1e\+02; lower --lr or add --warmup-steps\.", message)
    assert not list(Path("runs").iterdir())  # nothing was learned, so nothing is kept


# -- recipes ------------------------------------------------------------------------------------------

TEXTBOOK = [recipe for recipe in recipes() if recipe.textbook]


def test_the_recipes_of_the_textbook() -> None:
    parameters = {}
    for recipe in TEXTBOOK:
        name, config = load_config(recipe.path.stem, {})
        assert recipe.name == f"scratch/{name}"
        assert (name, config) == load_config(recipe.name, {})
        assert recipe.path.read_text().splitlines()[2] == f"#   vitft scratch train {name}"
        side, channels = (28, 1) if config.dataset == "mnist" else (32, 3)
        assert side % config.patch_size == 0
        parameters[name] = channels
    assert set(parameters) == {"mnist-patch7", "mnist-patch4", "mnist-patch2", "cifar10-patch4"}


def test_list_show_and_copy_recipes_of_the_textbook() -> None:
    def vitft(*words: str) -> Any:
        return CliRunner(env={"COLUMNS": "80"}).invoke(app, words)

    listed = " ".join(vitft("recipes", "ls").stdout.split())
    for recipe in TEXTBOOK:
        assert f"{recipe.name} Textbook (vitft scratch train): {recipe.summary[:9]}" in listed
        assert vitft("recipes", "show", recipe.name).stdout == recipe.path.read_text()
        file = recipe.path.name
        copied = vitft("recipes", "copy", recipe.name)
        assert copied.stdout == f"copied to {file}; run it with: vitft scratch train {file}\n"
        assert load_config(file, {})[1] == load_config(recipe.name, {})[1]
        refused = vitft("train", "--recipe", recipe.name)
        assert refused.exit_code == 2
        assert refused.stderr == (
            f"error: recipe {recipe.name} is a textbook recipe; run it with: vitft scratch train {recipe.path.stem}\n"
        )
    assert listed.count("Textbook") == len(TEXTBOOK)


def test_a_recipe_gives_the_run_its_name_and_flags_override_it() -> None:
    result = scratch("mnist-patch7", *DIGITS, "--patch-size", "4", "--no-final-norm", "--heads", "4")
    assert result.exit_code == 0, result.output
    config = yaml.safe_load(Path("runs/textbook-mnist-patch7-1/config.yaml").read_text())
    assert (config["dataset"], config["heads"], config["schedule"], config["final_norm"]) == (
        "digits",
        4,
        "step",
        False,
    )


# -- help, completion, start-up -------------------------------------------------------------------------


def test_every_setting_is_a_flag_with_its_default() -> None:
    text = re.sub(r"[│╭╮╰╯─]", " ", scratch("--help", columns=200).stdout)
    for name, field in TextbookConfig.model_fields.items():
        row = re.search(rf"--{name.replace('_', '-')} (.*)", text)
        assert row, name
        if field.default is not None:
            assert f"[default: {field.default}]" in row[1], name


def test_help_does_not_import_numpy() -> None:
    code = """
import sys
sys.argv = ["vitft", "scratch", "train", "--help"]
from vitft.cli.app import main
try:
    main()
except SystemExit as end:
    print(sorted({"torch", "datasets", "numpy", "scipy"} & set(sys.modules)), end.code, file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == "[] 0"


@pytest.mark.parametrize(
    ("variables", "threads"), [({}, 1), ({"OPENBLAS_NUM_THREADS": "2"}, min(2, os.cpu_count() or 1))]
)
def test_blas_uses_one_thread_unless_told_otherwise(variables: dict[str, str], threads: int) -> None:
    """The NumPy engine has two threads of its own."""
    code = f"""
import sys
sys.argv = ["vitft", "scratch", "train", *{DIGITS!r}]
from vitft.cli.app import main
try:
    main()
finally:
    from threadpoolctl import threadpool_info
    print({{pool["num_threads"] for pool in threadpool_info() if "numpy" in pool["filepath"]}}, file=sys.stderr)
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")} | variables
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    pools = result.stderr.splitlines()[-1]
    if pools == "set()":
        pytest.skip("this NumPy has no OpenBLAS of its own")
    assert pools == f"{{{threads}}}"


# -- the scalar ViT ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scalar() -> Any:
    return scratch("scalar")


def test_the_tables_of_the_scalar_vit(scalar: Any) -> None:
    report = train()
    text, count = scalar.stdout, len(report.predictions)
    assert (scalar.exit_code, scalar.stderr) == (0, "")
    assert max(map(len, text.splitlines())) <= 80
    assert f"loss {report.losses[0]:.4f} at the first step, {report.losses[-1]:.4f} at the last" in text
    assert f"test accuracy {console.percent(report.accuracy)} ({report.correct} of {count} images)" in text
    for name, row in zip(PATTERNS, report.confusion, strict=True):
        cells = r"\s+".join(str(number) if number else "·" for number in row)
        assert re.search(rf"^{name}\s+{cells}\s+{console.percent(report.class_accuracy[name])}", text, re.MULTILINE)
        for number, weights in enumerate(report.attention(name), 1):
            head = "mean" if number == 3 else str(number)
            row_head = rf"{name}\s+1" if number == 1 else rf"\s+{head}"
            cells = r"\s+".join(re.escape(console.percent(weight)) for weight in weights)
            assert re.search(rf"^{row_head}\s+{cells}$", text, re.MULTILINE), (name, head)
        first = next(sample for sample in report.predictions if (sample.label, sample.predicted) == (name, name))
        assert f"{name} → {name}" in text
        assert console.percent(first.confidence) in text


def test_the_scalar_vit_as_json() -> None:
    document = json.loads(scratch("scalar", "--json", "--seed", "42").stdout)
    expected = json.loads(json.dumps(scalar_document(train(42))))
    document.pop("elapsed_s")
    expected.pop("elapsed_s")
    assert document == expected
    assert document["correct"] == sum(sample["label"] == sample["predicted"] for sample in document["predictions"])
    assert set(document["attention"]) == set(PATTERNS)
    assert [len(head) for head in document["attention"]["top"]["heads"]] == [5, 5]


def test_mistakes_of_the_scalar_vit_are_shown() -> None:
    """After a single step most predictions are wrong."""
    from rich.console import Console as Screen

    from vitft.scratch_runner.report import scalar_tables

    screen = Screen(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    screen.print(scalar_tables(train(steps=1)))
    text = screen.export_text()
    assert "The first mistakes (true → predicted):" in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80


def test_invalid_settings_are_errors() -> None:
    with pytest.raises(UsageError, match=r"^settings: epochs should be greater than or equal to 1, got 0$"):
        TextbookConfig.parse({"epochs": 0})
    with pytest.raises(UsageError, match="`vitft scratch train --help` lists the settings"):
        TextbookConfig.parse({"zzzzzz": 0})
