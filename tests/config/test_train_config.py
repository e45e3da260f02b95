"""TrainConfig: every setting is defined once, and invalid values get a one-line error."""

import math
import shlex
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vitft.config.recipe import load_config
from vitft.config.train import PATHS, TrainConfig, not_default, train_command
from vitft.errors import UsageError

PANELS = ["Data", "Reading", "Augmentation", "Model", "Optimization", "Hardware", "Run"]


def refusal(**values: Any) -> str:
    with pytest.raises(UsageError) as caught:
        TrainConfig.parse(values, "recipe mine.yaml")
    return str(caught.value)


def test_every_setting_has_help_and_a_panel() -> None:
    for name, field in TrainConfig.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert isinstance(field.json_schema_extra, dict)
        assert field.json_schema_extra["panel"] in PANELS, name


def test_only_settings_that_do_not_affect_weights_can_change_on_resume() -> None:
    changeable = {n for n, f in TrainConfig.model_fields.items() if f.json_schema_extra["changeable"]}  # type: ignore[index]

    assert changeable == {
        "allow_outside", "cache_gb", "check", "compile", "device", "grad_checkpointing", "keep", "keep_finished",
        "log_every", "micro_batch_size", "on_bad_image", "on_nan", "parallel", "reference_images", "save_every",
        "stream_gb", "threads", "tracker",
    }  # fmt: skip


def test_every_text_says_whether_it_can_be_a_path() -> None:
    """Paths become absolute, and a checkpoint does not tell them. What cannot be one is listed here."""
    texts = {n for n, f in TrainConfig.model_fields.items() if f.annotation is str or str in get_args(f.annotation)}
    assert texts - set(PATHS) == {
        "betas", "dataset_revision", "encoding", "fold_column", "image_column", "label_column", "model_revision",
        "split_column", "value_range",
    }  # fmt: skip


def test_settings_are_immutable() -> None:
    with pytest.raises(ValidationError):
        TrainConfig().lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("batchsize", "batch_size"),
        ("learning_rate", "lr"),
        ("Learning-Rate", "lr"),
        ("batch", "batch_size"),
        ("per_device_train_batch_size", "batch_size"),
        ("num_epochs", "epochs"),
        ("lr_scheduler", "schedule"),
        ("wd", "weight_decay"),
        ("model_name_or_path", "model"),
        ("output_dir", None),  # the output folder is an argument, not a setting
        ("epoch", "epochs"),
        ("max_train_sample", "max_train_samples"),
    ],
)
def test_an_unknown_setting_suggests_the_closest(typo: str, meant: str | None) -> None:
    hint = f"; did you mean {meant}?" if meant else "; `vitft train --help` lists the settings"
    assert refusal(**{typo: 3}) == f"recipe mine.yaml: unknown setting '{typo}'{hint}"


def test_a_mistyped_choice_suggests_the_closest() -> None:
    assert refusal(schedule="cosin") == (
        "recipe mine.yaml: schedule should be 'constant', 'linear', 'cosine' or 'step', got 'cosin'; "
        "did you mean cosine?"
    )


def test_an_error_spells_a_flag_as_a_flag() -> None:
    with pytest.raises(UsageError, match=r"^--batch-size should be greater than or equal to 1, got 0$"):
        TrainConfig.parse({"batch_size": 0}, "flags")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", 0),
        ("lr", "fast"),
        ("epochs", -math.inf),
        ("epochs", 0),
        ("warmup", 1),
        ("betas", "0.9"),
        ("betas", "0.9,1"),
        ("betas", "nan,0.9"),
        ("freeze", 0),
        ("freeze", "all"),
        ("test_fraction", 1.0),
        ("val_fraction", 1.0),
        ("batch_size", 2.5),
        ("batch_size", math.inf),
        ("batch_size", 10**30),
        ("seed", -1),
        ("seed", 2**32),
        ("model", None),
        ("model", {"name": "x"}),
        ("dataset", 123),
        ("from_scratch", "perhaps"),
    ],
)
def test_an_invalid_value_gets_one_line_with_its_setting(name: str, value: Any) -> None:
    message = refusal(**{name: value})

    assert message.startswith(f"recipe mine.yaml: {name} should ")
    assert ", got " in message
    assert "\n" not in message


def test_a_huge_value_is_abbreviated() -> None:
    bomb: list[Any] = ["lol"]
    for _ in range(40):
        bomb = [bomb] * 9  # a few YAML aliases make this; its text would have 10^38 characters
    assert len(refusal(lr=bomb)) < 400
    assert len(refusal(lr="x" * 100_000)) < 400


@pytest.mark.parametrize(
    ("settings", "as_keys", "as_flags"),
    [
        (
            {"patch_size": 8},
            "patch_size applies only to a new model; add from_scratch or remove patch_size "
            "(to override a recipe: patch_size none)",
            "--patch-size applies only to a new model; add --from-scratch or remove --patch-size "
            "(to override a recipe: --patch-size none)",
        ),
        (
            {"from_scratch": True, "freeze": "backbone"},
            "freeze backbone with from_scratch would train a head on random features; remove one of them",
            "--freeze backbone with --from-scratch would train a head on random features; remove one of them",
        ),
        (
            {"from_scratch": True, "freeze": 2},
            "freeze 2 with from_scratch would train blocks on random features; remove one of them",
            "--freeze 2 with --from-scratch would train blocks on random features; remove one of them",
        ),
        (
            {"lora_rank": 2, "freeze": 2},
            "lora_rank trains an adapter of all blocks, and freeze holds some; remove one of them",
            "--lora-rank trains an adapter of all blocks, and --freeze holds some; remove one of them",
        ),
        (
            {"optimizer": "sgd", "betas": "0.9,0.99"},
            "betas applies only to adamw and adam; remove it or optimizer sgd",
            "--betas applies only to adamw and adam; remove it or --optimizer sgd",
        ),
    ],
)
def test_contradicting_settings_are_spelled_as_keys_or_flags(
    settings: dict[str, Any], as_keys: str, as_flags: str
) -> None:
    assert refusal(**settings) == f"recipe mine.yaml: {as_keys}"
    with pytest.raises(UsageError) as caught:
        TrainConfig.parse(settings, "flags")
    assert str(caught.value) == as_flags


@given(lr=st.floats(1e-12, 100), epochs=st.floats(1e-3, 1e5), seed=st.integers(0, 2**32 - 1))
def test_a_config_survives_a_round_trip(lr: float, epochs: float, seed: int) -> None:
    config = TrainConfig.parse({"lr": lr, "epochs": epochs, "seed": seed})
    assert TrainConfig.parse(config.model_dump()) == config


@given(
    st.dictionaries(
        st.sampled_from(sorted(TrainConfig.model_fields)),
        st.none() | st.text("a1.e-\n") | st.integers() | st.floats(),
    )
)
def test_any_values_give_a_config_or_a_usage_error(values: dict[str, Any]) -> None:
    try:
        TrainConfig.parse(values)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017  (either outcome is right)


def test_every_synonym_maps_to_a_setting_or_flag() -> None:
    from vitft.errors import _SETTING_OF

    flags = {"output", "resume", "classes"}  # of commands, not settings
    assert set(_SETTING_OF.values()) <= set(TrainConfig.model_fields) | flags
    assert not set(_SETTING_OF) & (set(TrainConfig.model_fields) | flags)


@pytest.mark.parametrize(
    ("message", "in_python"),
    [
        ("no dataset; add --dataset with digits", "no dataset; add dataset with digits"),
        ("Try a lower --lr or more --warmup.", "Try a lower lr or more warmup."),
        ("over --max-pixels 50 (7 x 5)", "over max_pixels 50 (7 x 5)"),
        ("stopped. Resume with: vitft train --resume runs/x", "stopped. Resume with: vitft train --resume runs/x"),
        ("set --val-fraction, or (vitft train --lr 1) --lr", "set val_fraction, or (vitft train --lr 1) lr"),
        ("data/a--lr/--x: a file -- or none", "data/a--lr/--x: a file -- or none"),
    ],
)
def test_errors_spell_settings_for_the_command_line_or_for_python(
    monkeypatch: pytest.MonkeyPatch, message: str, in_python: str
) -> None:
    assert str(UsageError(message)) == message
    monkeypatch.setattr("vitft.errors._flag_style", False)
    assert str(UsageError(message)) == in_python


def test_library_errors_name_arguments_and_command_errors_name_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from vitft import train
    from vitft.cli.app import app

    monkeypatch.setattr("vitft.errors._flag_style", False)
    with pytest.raises(UsageError, match=r"no dataset; add dataset with a hub id"):
        train(TrainConfig())
    assert "no dataset; add --dataset with a hub id" in CliRunner().invoke(app, ["train"]).output
    with pytest.raises(UsageError, match=r"^batch_size should be greater"):
        TrainConfig.parse({"batch_size": 0}, "flags")


def test_the_default_rate_is_that_of_what_is_trained() -> None:
    assert TrainConfig().lr < TrainConfig(lora_rank=8).lr <= TrainConfig(from_scratch=True).lr
    assert (
        TrainConfig(freeze="backbone").lr == TrainConfig.parse({"freeze": "backbone", "optimizer": "adam"}).lr == 1e-2
    )
    assert TrainConfig(lora_rank=8, lr=1e-4).lr == 1e-4
    for chosen in (None, "auto"):
        assert load_config("digits", {"lr": chosen}).lr == TrainConfig().lr < load_config("digits", {}).lr
        assert "lr" not in TrainConfig.parse({"lr": chosen}).model_fields_set
    assert TrainConfig(**TrainConfig(lora_rank=8).model_dump()) == TrainConfig(lora_rank=8)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dora": True}, "dora applies only to an adapter; add lora_rank or remove dora"),
        ({"lora_alpha": 4}, "lora_alpha applies only to an adapter"),
        ({"lora_targets": "all"}, "lora_targets applies only to an adapter"),
        ({"lora_rank": 8, "from_scratch": True}, "lora_rank needs pretrained weights to adapt"),
        ({"lora_rank": 8, "freeze": "backbone"}, "adapter of all blocks, and freeze holds some; remove one of them"),
    ],
)
def test_adapter_settings_that_make_no_sense_are_refused(values: dict[str, Any], said: str) -> None:
    assert said in refusal(**values)


def test_a_command_has_the_settings_of_the_data() -> None:
    given: dict[str, Any] = {
        "dataset": "my photos", "exclude": "q.txt", "image_column": "a", "label_column": "b", "split_column": "c",
        "fold_column": "d", "fold": 0, "image_folder": "e", "encoding": "cp1252", "allow_outside": True,
        "streaming": True, "dataset_revision": "main",
    }  # fmt: skip
    settings = not_default(TrainConfig(**given, lr=0.5, val_fraction=0.1))
    assert settings == given
    words = ["vitft", "train"]
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    assert shlex.split(train_command(settings)) == words
    assert train_command({"allow_outside": False, "max_steps": None}) == "vitft train --no-allow-outside"
