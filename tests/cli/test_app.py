"""The command line as a person or a script meets it: help, errors, exit codes, dry runs, completion."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from vitft import __version__
from vitft.cli.app import app
from vitft.config import recipe
from vitft.config.recipe import load_config, recipes
from vitft.config.train import TrainConfig
from vitft.io import console
from vitft.spec import ViTSpec
from vitft.training.cost import dry_run
from vitft.training.cost.estimate import Cost

TINY = ["--dataset", "digits", "--model", "vit-micro", "--from-scratch", "--max-train-samples", "40",
        "--max-eval-samples", "20", "--batch-size", "8", "--max-steps", "2", "--device", "cpu"]  # fmt: skip


def commands(of: Any, before: str = "") -> list[str]:
    """A group of commands and all in it."""
    inner = [commands(one, f"{before} {name}".strip()) for name, one in getattr(of, "commands", {}).items()]
    return [before, *(name for names in inner for name in names)]


COMMANDS = commands(get_command(app))


def vitft(*words: str, columns: int = 80) -> Any:
    """What a command line gives: exit_code, stdout, stderr."""
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, [str(word) for word in words])


def flat(text: str) -> str:
    """Help without its boxes and line ends."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def error_of(*words: str, code: int) -> str:
    """The one line that a failing command says on standard error."""
    result = vitft(*words)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("error: ").rstrip()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "out", Console(highlight=False, width=80))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    result = vitft("train", *TINY, "--output", str(folder))
    assert result.exit_code == 0, result.output
    return folder


# -- start-up -------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["explain"], ["recipes", "ls"]])
def test_what_needs_no_model_imports_no_library_of_models(words: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["vitft", *{words!r}]
from vitft.cli.app import main
try:
    main()
except SystemExit as end:
    heavy = {{"torch", "transformers", "datasets", "numpy", "accelerate", "sklearn"}} & set(sys.modules)
    heavy |= {{"pydantic"}} & set(sys.modules) if {words!r} in (["--help"], ["--version"]) else set()
    print(sorted(heavy), end.code, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[] 0"


def test_version() -> None:
    assert vitft("--version").stdout == f"vitft {__version__}\n"


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_and_nothing_is_cut(command: str, columns: int) -> None:
    result = vitft(*command.split(), "--help", columns=columns)

    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert "…" not in result.stdout
    assert "<bool>" not in result.stdout  # a switch takes no value
    assert "[/" not in result.stdout  # and no markup shows


@pytest.mark.parametrize(
    ("command", "extras"),
    [("train", ["lora"]), ("sweep", ["lora"]), ("export", ["onnx", "openvino"]), ("serve", ["serve"])],
)
def test_help_names_extras_in_brackets(command: str, extras: list[str]) -> None:
    """Which Rich would take for markup."""
    text = flat(vitft(command, "--help", columns=200).stdout)

    for extra in extras:
        assert f"vitft[{extra}]" in text


def test_every_setting_is_a_flag_in_its_panel_with_its_default() -> None:
    text = vitft("train", "--help", columns=200).stdout
    panels = re.findall(r"╭─ (\w+) ─+╮\n(.*?)╰", text, re.DOTALL)

    assert [name for name, _ in panels] == [
        "Options", "Data", "Reading", "Augmentation", "Model", "Optimization", "Hardware", "Run"
    ]  # fmt: skip
    body = dict(panels)
    for name, field in TrainConfig.model_fields.items():
        row = re.search(rf"--{name.replace('_', '-')} (.*)", body[field.json_schema_extra["panel"]])  # type: ignore[index]
        assert row, name
        if field.default is not None and field.default is not False:
            assert f"[default: {field.default}]" in flat(text), name
    for flag in ("--recipe", "--output", "--overwrite", "--resume", "--dry-run"):
        assert flag in body["Run"]


def test_help_lists_the_choices_of_a_setting() -> None:
    text = vitft("train", "--help", columns=120).stdout

    for choices in ("none|flip|crop", "error|skip", "constant|linear|cosine|step", "auto|fp32|bf16|fp16"):
        assert choices in text
    assert "table|csv|jsonl" in vitft("predict", "--help").stdout


# -- wrong usage ----------------------------------------------------------------------------------


def test_train_without_a_dataset_says_what_is_missing() -> None:
    assert error_of("train", code=2).startswith("no dataset; add --dataset with a hub id")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train --batch_size 4", "--batch-size"),
        ("train --batchsize 4", "--batch-size"),
        ("train --max_train_samples 4", "--max-train-samples"),
        ("eval x --max-eval-sample 3", "--max-eval-samples"),
        ("train --learning-rate 3e-5", "did you mean --lr?"),
        ("train --per_device_train_batch_size 4", "did you mean --batch-size?"),
        ("train --num-epochs 4", "did you mean --epochs?"),
        ("train --scheduler cosine", "did you mean --schedule?"),
        ("train --output_dir x", "did you mean --output?"),
        ("train --model_name_or_path x", "did you mean --model?"),
        ("explain --num-classes 4", "did you mean --classes?"),
        ("explain --hidden-size 4", "did you mean --width?"),
        ("trian", "trian: `vitft` has no such command; did you mean train?"),
        ("recipes shwo", "did you mean show?"),
        ("data inf", "inf: `vitft data` has no such command; did you mean info?"),
        ("scratch train --learning-rate 1", "did you mean --lr?"),
        ("--versoin", "--versoin: `vitft` has no such flag; did you mean --version?"),
        ("export x --formt onnx", "--formt: `vitft export` has no such flag; did you mean --format?"),
    ],
)
def test_a_typo_names_the_nearest(typed: str, meant: str) -> None:
    assert meant in error_of(*typed.split(), code=2)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (
            "--augment flop",
            "--augment should be 'none', 'flip', 'crop', 'trivial' or 'rand', got 'flop'; did you mean flip?",
        ),
        ("--lr nan", "--lr should be a finite number or 'auto', got 'nan'"),
        ("--lr=-1", "--lr should be greater than 0 or 'auto', got '-1'"),
        ("--val-fraction 1", "--val-fraction should be less than 1, got 1.0"),
        ("--width 64", "--width applies only to a new model; add --from-scratch or remove --width"),
        ("--recipe smoke --no-from-scratch", "(to override a recipe: --width none)"),
        ("--recipe nope", "recipe nope: neither a file nor a known recipe"),
    ],
)
def test_a_bad_value_is_wrong_usage_in_one_line(typed: str, says: str) -> None:
    assert says in error_of("train", "--dataset", "digits", *typed.split(), code=2)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("train --lr fast", "--lr should be a valid number or 'auto', got 'fast'"),
        ("train --dataset", "--dataset needs a value"),
        ("predict", "no images: give files, folders or globs"),
        ("predict x.png", "no run"),
        (
            "predict x --format cvs",
            "--format should be 'table', 'csv', 'jsonl' or 'parquet', got 'cvs'; did you mean csv?",
        ),
        (
            "predict x --top-k 0",
            "--top-k should be greater than or equal to 1, got '0' | --top-k 0 is not in the range",
        ),
        ("predict x --top-k two", "--top-k should be a valid integer, got 'two' | --top-k 'two' is not a valid"),
        ("eval", "no run"),
        ("train photos", "photos: `vitft train` takes no such argument; did you mean --dataset photos?"),
        ("train my photos", "my photos: `vitft train` takes no such argument; did you mean --dataset?"),
        ("train smoke", "smoke: `vitft train` takes no such argument; did you mean --recipe smoke?"),
        ("train x.yaml", "did you mean --recipe x.yaml?"),
        ("eval x y", "y: `vitft eval` takes no such argument; did you mean --dataset y?"),
        ("models ls x", "x: `vitft models ls` takes no such argument; see `vitft models ls --help`"),
        ("probe", "DATASET is missing; see `vitft probe --help`"),
        ("eval x --device gpu", "--device should be 'auto', 'cpu', 'cuda' or 'mps', got 'gpu'"),
        ("bench", "say what to bench: data, train or eval; see `vitft bench --help`"),
        ("bench trian", "did you mean train?"),
        ("nonsense", "nonsense: `vitft` has no such command; `vitft --help` lists them"),
        ("data nonsense", "nonsense: `vitft data` has no such command; `vitft data --help` lists them"),
    ],
)
def test_wrong_usage_ends_with_2_in_one_line(typed: str, says: str) -> None:
    """Numbers are checked by Typer, whose older versions say it in other words."""
    said = error_of(*typed.split(), code=2)
    assert any(words in said for words in says.split(" | "))


def test_a_group_without_a_command_shows_its_help() -> None:
    result = vitft("data")
    assert "check" in result.stdout + result.stderr
    assert "error:" not in result.stderr


# -- data and model errors ------------------------------------------------------------------------


def test_a_limit_of_few_pixels_says_how_many_an_image_has() -> None:
    assert "has 64 pixels, over --max-pixels 1 (8 x 8)" in error_of("train", *TINY, "--max-pixels", "1", code=3)


def test_a_missing_folder_and_a_mistyped_alias_are_data_errors() -> None:
    assert "./nope" in error_of("train", "--dataset", "./nope", code=3)
    assert "did you mean digits?" in error_of("train", "--dataset", "digitz", code=3)
    assert "did you mean cifar10?" in error_of("data", "info", "cifar1O", code=3)


def test_a_missing_model_is_a_model_error() -> None:
    assert "./nope" in error_of("train", "--dataset", "digits", "--model", "./nope", code=4)
    assert "nowhere" in error_of("train", "--resume", "nowhere", code=4)


def test_an_existing_folder_is_left_alone(run: Path) -> None:
    before = (run / "config.yaml").read_text()
    assert str(run.name) in error_of("train", *TINY, "--output", str(run), code=2)
    assert (run / "config.yaml").read_text() == before


# -- what nobody foresaw --------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(recipe, "load_config", fail)


def test_an_unforeseen_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, RuntimeError("shapes\n  differ"))
    assert error_of("train", code=1) == ("RuntimeError: shapes differ (unexpected; `vitft --debug ...` shows where)")


@pytest.mark.parametrize("words", [["--debug", "train"], ["train", "--debug"], ["train", "--debug", "--lr", "1"]])
def test_debug_shows_the_traceback_wherever_it_stands(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    failing(monkeypatch, RuntimeError("shapes differ"))
    result = vitft(*words)

    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "in fail" in result.stderr
    assert result.stderr.rstrip().splitlines()[-1].startswith("error: RuntimeError")


def test_debug_works_below_a_group() -> None:
    result = vitft("recipes", "show", "nope", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.count("error: ") == 1


def test_after_two_dashes_debug_is_a_file() -> None:
    result = vitft("predict", "--checkpoint", "./nope", "--", "--debug")
    assert "Traceback" not in result.stderr


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert error_of("train", code=130) == "interrupted"


def test_what_is_queued_when_a_command_is_interrupted_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in decoding: the threads would work on until the queue is empty, and Python waits for them."""
    from vitft.hardware.pools import thread_pool

    begun, gate = [], threading.Event()

    def decode(number: int) -> int:
        begun.append(number)
        if number:
            gate.wait(60)
        return number

    def interrupted(*given: Any, **named: Any) -> None:
        for _ in thread_pool().map(decode, range(1000)):
            raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "load_config", interrupted)
    result = CliRunner().invoke(app, ["train"])
    gate.set()
    assert result.exit_code == 130
    assert thread_pool().submit(len, "it is done").result(60) == 10
    assert len(begun) < 100


# -- settings -------------------------------------------------------------------------------------


def resolved(monkeypatch: pytest.MonkeyPatch, *words: str) -> TrainConfig:
    """The settings that a dry run is made from."""
    seen: list[TrainConfig] = []
    monkeypatch.setattr(dry_run, "plan", lambda config, *_: seen.append(config))
    monkeypatch.setattr("vitft.cli.tables.plan_report", lambda plan: "")
    assert vitft("train", *words, "--dry-run").exit_code == 0
    return seen[0]


def test_flags_win_over_a_recipe_and_a_recipe_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.yaml").write_text("dataset: digits\nlr: 2e-5\nbatch_size: 16\nfrom_scratch: true\nmodel: vit-micro\n")
    config = resolved(monkeypatch, "--recipe", "mine.yaml", "--batch-size", "8", "--no-from-scratch")

    assert config == TrainConfig(dataset="digits", lr=2e-5, batch_size=8, model="vit-micro")


def test_a_flag_typed_at_its_default_still_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.yaml").write_text("dataset: digits\nlr: 1\nval_fraction: 0.5\n")
    default = TrainConfig()
    config = resolved(monkeypatch, "--recipe", "mine.yaml", "--lr", str(default.lr), "--val-fraction", "0")

    assert (config.lr, config.val_fraction) == (default.lr, 0)


def test_every_flag_reaches_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    other: dict[str, Any] = {"val_fraction": 0.2, "on_bad_image": "skip", "augment": "crop", "image_size": 32,
                             "from_scratch": True, "schedule": "step", "seed": 7}  # fmt: skip
    flags = [(f"--{name.replace('_', '-')}", value) for name, value in other.items()]
    words = [word for flag, value in flags for word in ([flag] if value is True else [flag, str(value)])]

    assert resolved(monkeypatch, "--dataset", "digits", *words) == TrainConfig(dataset="digits", **other)


def test_the_settings_a_run_wrote_are_a_recipe(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = load_config(str(run / "config.yaml"), {})

    assert (written.dataset, written.max_steps, written.from_scratch) == ("digits", 2, True)
    assert "auto" not in (written.device, written.precision)
    assert resolved(monkeypatch, "--recipe", str(run / "config.yaml")) == written


# -- resume ---------------------------------------------------------------------------------------


def test_resume_refuses_a_changed_setting_and_says_how_to_start_a_new_run(run: Path) -> None:
    message = error_of("train", "--resume", str(run), "--lr", "0.5", code=2)

    assert "lr 0.001, got 0.5" in message
    assert "--lr" in message
    data = "--max-train-samples 40 --max-eval-samples 20"
    assert f"vitft train --dataset digits --model {run / 'best'} {data} --lr 0.5" in message


@pytest.mark.parametrize("extra", [["--recipe", "x"], ["--output", "y"], ["--overwrite"], ["--dry-run"]])
def test_resume_continues_a_run_with_its_settings(run: Path, extra: list[str]) -> None:
    assert "leave out --recipe, --output, --overwrite, --dry-run" in error_of(
        "train", "--resume", str(run), *extra, code=2
    )


def test_a_finished_run_suggests_the_next_commands(run: Path) -> None:
    done = vitft("train", "--resume", str(run))

    assert (done.exit_code, done.stderr.count("\n")) == (0, 1), done.output
    assert done.stderr.startswith(f"{run} is finished, at step 2 of 2; to train longer: vitft train --resume {run} --")
    assert "resuming" not in done.stderr
    assert "test accuracy" in done.stdout


def test_resume_without_its_dataset_asks_for_the_new_path(tmp_path: Path) -> None:
    data = tmp_path / "a place"
    for label in ("cat", "dog"):
        (data / label).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (i, 9 * i, 200)).save(data / label / f"{i}.png")
    words = ["train", *TINY, "--dataset", str(data), "--output", "run"]
    assert vitft(*words).exit_code == 0
    data.rename(tmp_path / "elsewhere")
    said = error_of("train", "--resume", "run", code=3)
    assert said.endswith("if it has moved: vitft train --resume run --dataset NEW")
    assert str(data) in said
    assert vitft("train", "--resume", "run", "--dataset", "elsewhere").exit_code == 0
    assert f"dataset: {tmp_path / 'elsewhere'}\n" in Path("run/config.yaml").read_text()
    assert vitft("train", "--resume", "run").exit_code == 0


# -- plans ----------------------------------------------------------------------------------------


def test_a_dry_run_says_what_it_would_do_and_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitft.training.cost.dry_run.decode_image_s", lambda prepared: 0.5)
    result = vitft("train", *TINY, "--dry-run")
    rows = dict(re.findall(r"^  (\w[\w ]*?)  +(.*?) *$", result.stdout, re.MULTILINE))

    assert result.exit_code == 0, result.output
    assert re.findall(r"^(\w+) *$", result.stdout, re.MULTILINE) == ["Data", "Model", "Cost", "Run", "Settings"]
    assert rows["dataset"] == "digits"
    assert rows["classes"].startswith("10: 0, 1, 2")
    assert (rows["train"], rows["validation"], rows["test"]) == (
        "40 images of train", "20 images of train", "20 images of test")  # fmt: skip
    assert rows["steps"] == "2 of 8 images, 5 per epoch"
    assert rows["parameters"] == "207,114, of which 207,114 are trained"
    assert re.fullmatch(r"about [\d.]+ [MG]B", rows["memory"])
    assert re.fullmatch(r"about \d+ s: decoding 40 s, training \d+ s, evaluation \d+ s", rows["time"])
    assert re.fullmatch("cpu, (fp32|bf16)", rows["device"])
    assert rows["folder"] == "runs/digits-vit-micro-scratch-1"
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert not list(Path().iterdir())


def test_a_dry_run_refuses_an_image_that_the_run_would_refuse(tmp_path: Path) -> None:
    for number in range(24):
        place = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (10 * number, 0, 0)).save(place)
    (tmp_path / "photos" / "a" / "0.png").write_bytes(b"")
    words = ["train", "--dataset", str(tmp_path / "photos"), "--model", "vit-micro", "--val-fraction", "0"]
    told = error_of(*words, "--dry-run", code=3)
    assert told == error_of(*words, "--output", str(tmp_path / "run"), code=3)
    assert "a/0.png" in told
    skipping = vitft(*words, "--dry-run", "--on-bad-image", "skip")
    assert skipping.exit_code == 0
    assert "23 images of train" in flat(skipping.stdout)


def test_a_dry_run_lists_the_settings_that_are_not_the_defaults() -> None:
    usual = str(TrainConfig(from_scratch=True).lr)
    text = vitft("train", *TINY, "--lr", usual, "--dry-run").stdout.split("Settings")[1]
    given, chosen = text.split("chosen")

    assert re.findall(r"(\w+): (\S+)", given) == [
        ("dataset", "digits"), ("max_train_samples", "40"), ("max_eval_samples", "20"), ("model", "vit-micro"),
        ("from_scratch", "True"), ("max_steps", "2"), ("batch_size", "8"), ("device", "cpu")]  # fmt: skip
    named = dict(re.findall(r"(\w+): (\S+)", chosen))
    assert set(named) == {"attention", "compile", "image_size", "lr", "precision", "threads"}
    assert named["image_size"] == "28"
    assert "others" in chosen
    assert "vitft train --help" in flat(chosen)


def test_a_dry_run_names_the_folder_of_the_run_and_refuses_one_that_is_taken(run: Path) -> None:
    assert "  folder      mine/new" in vitft("train", *TINY, "--output", "mine/new", "--dry-run").stdout
    assert "continues it" in error_of("train", *TINY, "--output", str(run), "--dry-run", code=2)
    over = flat(vitft("train", *TINY, "--output", str(run), "--overwrite", "--dry-run").stdout)
    assert f"{run}, in place of the run there" in over
    assert (run / "config.yaml").is_file()
    Path("runs/digits-vit-micro-scratch-1").mkdir(parents=True)
    assert "  folder      runs/digits-vit-micro-scratch-2" in vitft("train", *TINY, "--dry-run").stdout


@pytest.fixture(scope="module")
def prepared() -> Any:
    from vitft.training.setup import prepare

    return prepare(TrainConfig(
        dataset="digits", model="vit-micro", from_scratch=True, image_size=28, device="cpu", precision="fp32"
    ))  # fmt: skip


def test_a_long_run_says_so_and_names_cheaper_ways(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_run, "first_image_s", lambda prepared: 30.0)
    monkeypatch.setattr(dry_run, "cost", lambda prepared, processes: Cost(10.0, 0.0, 1.0))
    dry_run.warn_if_long(prepared)
    train, validation, test = (len(prepared.splits[role].rows) for role in ("train", "validation", "test"))
    took = console.duration(3 * (10 * train + validation) + test)  # 3 epochs, each with its validation

    said = capsys.readouterr().err
    assert said.startswith(f"warning: this run will take about {took} on this cpu; cheaper: ")
    assert "--epochs 1" in said
    assert "--model vit-micro" not in said  # it is


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, ["--max-train-samples 2000", "--freeze backbone", "--image-size 112", "--model vit-micro"]),
        ({"parallel": "fsdp"}, ["--max-train-samples 2000", "--image-size 112", "--model vit-micro"]),
        ({"lora_rank": 4}, ["--max-train-samples 2000", "--image-size 112", "--model vit-micro"]),
    ],
)
def test_the_cheaper_ways_are_possible_ones(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: Any, named: list[str]
) -> None:
    large = ViTSpec.square(238, 14, 384, 12, 6, 1536, 10)  # half of it is no multiple of 14
    monkeypatch.setattr(dry_run, "shape_of", lambda model: large)
    monkeypatch.setattr(dry_run, "first_image_s", lambda prepared: 1e4)
    monkeypatch.setattr(dry_run, "cost", lambda prepared, processes: Cost(1e4, 0.0, 1.0))
    split = prepared.splits["train"]
    many = replace(split, rows=np.resize(split.rows, 3000), labels=np.resize(split.labels, 3000))
    run = replace(prepared, splits=prepared.splits | {"train": many})
    dry_run.warn_if_long(run.with_settings(model="vit-small", from_scratch=False, **settings))
    assert capsys.readouterr().err.strip().split("cheaper: ")[1] == ", or ".join(named) + "."


def test_a_model_that_processes_share_is_not_tried_on_one(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "first_image_s", lambda prepared: pytest.fail("tried"))
    dry_run.warn_if_long(prepared.with_settings(parallel="fsdp"), processes=2)


def test_many_processes_share_the_time(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_run, "first_image_s", lambda prepared: 30.0)
    monkeypatch.setattr(dry_run, "cost", lambda prepared, processes: Cost(10.0, 0.0, 1.0))
    dry_run.warn_if_long(prepared, processes=8)
    assert capsys.readouterr().err == ""


def test_a_short_run_is_probed_with_one_image_alone(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dry_run, "first_image_s", lambda prepared: 0.1)
    monkeypatch.setattr(dry_run, "cost", lambda prepared: pytest.fail("probed in full"))
    dry_run.warn_if_long(prepared)
    assert capsys.readouterr().err == ""


def test_a_probe_leaves_no_trace(prepared: Any) -> None:
    import torch

    def count(module: Any, args: object) -> None:
        module.seen.add_(1)  # as a batch norm counts

    model = prepared.loaded.model
    model.register_buffer("seen", torch.zeros(()))
    model.register_forward_pre_hook(count)
    state, weights = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    dry_run.cost(prepared)
    dry_run.memory_bytes(prepared, 4)

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# -- recipes, data, explain -----------------------------------------------------------------------


def test_recipes_are_listed_shown_and_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    known = recipes()[0]
    listed = vitft("recipes", "ls")
    assert all(recipe.name in listed.stdout for recipe in recipes())
    assert max(map(len, listed.stdout.splitlines())) <= 80
    assert vitft("recipes", "show", known.name).stdout == known.path.read_text()

    copied = vitft("recipes", "copy", known.name)
    assert copied.stdout == f"copied to {known.path.name}; run it with: vitft train --recipe {known.path.name}\n"
    assert Path(known.path.name).read_bytes() == known.path.read_bytes()
    assert "exists" in error_of("recipes", "copy", known.name, code=2)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert vitft("recipes", "copy", known.name, "~/mine.yaml").exit_code == 0
    assert Path("mine.yaml").read_bytes() == known.path.read_bytes()


def test_data_info_is_one_json_document(tmp_path: Path) -> None:
    result = vitft("data", "info", "digits", "--json", "--preview", "grid.png")
    described = json.loads(result.stdout)

    assert {split["name"]: split["count"] for split in described["splits"]} == {"train": 1438, "test": 359}
    assert described["labels"] == list("0123456789")
    assert Image.open("grid.png").size > (400, 400)
    assert "grid.png" in result.stderr


def test_data_info_as_a_table() -> None:
    text = vitft("data", "info", "digits").stdout
    assert text.startswith("digits, 10 classes\n")
    assert re.search(r"^train +1,438  8×8 +8×8 +8×8 +PNG", text, re.MULTILINE)
    assert re.search(r"^9 +144 +36$", text, re.MULTILINE)


def test_data_info_shows_augmentations_in_a_preview_alone() -> None:
    words = ("data", "info", "digits", "--augment", "trivial", "--mixup", "0.4")
    assert "--preview FILE.png" in error_of(*words, code=2)
    assert vitft(*words, "--preview", "seen.png").exit_code == 0
    assert vitft(*words[:3], "--preview", "plain.png").exit_code == 0
    seen, plain = (np.asarray(Image.open(name)) for name in ("seen.png", "plain.png"))
    assert seen.shape != plain.shape  # room for what is mixed in


@pytest.mark.parametrize("command", ["info", "check", "pack"])
def test_help_has_the_defaults_of_reading_that_training_has(command: str) -> None:
    shown = " ".join(re.sub(r"[^\x20-\x7e]", " ", vitft("data", command, "--help").stdout).split())
    assert "[default: 50000000]" in shown
    assert "checkpoint" not in shown


@pytest.mark.parametrize("picture", ["grid.jpg", "nowhere/grid.png", "folder.png"])
def test_a_preview_that_cannot_be_written_is_refused_before_the_work(picture: str) -> None:
    Path("folder.png").mkdir()
    assert picture in error_of("data", "info", "digits", "--preview", picture, code=2)


def test_a_preview_is_whole_or_absent_and_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    save = Image.Image.save

    def full(self: Image.Image, file: Any, *given: Any) -> None:
        if not isinstance(file, Path):  # the digits themselves
            return save(self, file, *given)
        file.write_bytes(b"half")
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(Image.Image, "save", full)
    done = vitft("data", "info", "digits", "--preview", "grid.png")
    assert (done.exit_code, done.stderr) == (1, "error: grid.png: File too large.\n")
    assert done.stdout.startswith("digits, 10 classes\n")
    assert not [*Path().glob("*grid*"), *Path().glob(".*grid*")]


def test_explain_is_one_json_document() -> None:
    document = json.loads(vitft("explain", "--model", "vit-micro", "--json").stdout)
    assert set(document) == {"spec", "stages", "total"}
    assert set(document["stages"][0]) == {
        "name",
        "input",
        "output",
        "parameters",
        "flops",
        "activation_bytes",
    }


# -- shell completion -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vitft train --augment ", {"none", "flip", "crop", "trivial", "rand"}),
        ("vitft train --augment f", {"flip"}),
        ("vitft train --max-tr", {"--max-train-samples"}),
        ("vitft train --recipe ", {recipe.name for recipe in recipes() if not recipe.textbook}),
        ("vitft scratch train ", {"scalar", "mnist-patch7", "mnist-patch4", "mnist-patch2", "cifar10-patch4"}),
        ("vitft recipes show ", {recipe.name for recipe in recipes()}),
        ("vitft predict x.png --format ", {"table", "csv", "jsonl", "parquet"}),
        ("vitft exp", {"explain", "export"}),
    ],
)
def test_the_shell_completes(line: str, offered: set[str]) -> None:
    words = line.split(" ")
    asked = {"_VITFT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    code = "import sys; sys.argv = ['vitft']; from vitft.cli.app import main; main()"
    done = subprocess.run([sys.executable, "-c", code],
                          env=os.environ | asked, capture_output=True, text=True)  # fmt: skip
    assert set(done.stdout.split()) == offered
