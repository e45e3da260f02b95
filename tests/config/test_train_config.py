"""TrainConfig: each setting once, and what it answers to a wrong one."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vitft.config.train import TrainConfig
from vitft.errors import UsageError

PANELS = ["Data", "Reading", "Model", "Optimization", "Hardware", "Run"]


def refusal(**values: Any) -> str:
    with pytest.raises(UsageError) as caught:
        TrainConfig.parse(values, "recipe mine.yaml")
    return str(caught.value)


def test_every_setting_says_what_it_is_and_where_help_lists_it() -> None:
    for name, field in TrainConfig.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert isinstance(field.json_schema_extra, dict)
        assert field.json_schema_extra["panel"] in PANELS, name


def test_what_may_change_on_resume_is_what_changes_no_weight() -> None:
    steering = {n for n, f in TrainConfig.model_fields.items() if f.json_schema_extra["steers"]}  # type: ignore[index]

    assert steering == {
        "allow_outside", "cache_gb", "check", "device", "grad_checkpointing", "save_every", "keep", "keep_finished",
        "log_every", "on_nan", "threads", "tracker",
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
        ("output_dir", None),  # where a run goes is no setting
        ("epoch", "epochs"),
        ("max_train_sample", "max_train_samples"),
    ],
)
def test_an_unknown_setting_names_the_nearest(typo: str, meant: str | None) -> None:
    hint = f"; did you mean {meant}?" if meant else "; `vitft train --help` lists the settings"
    assert refusal(**{typo: 3}) == f"recipe mine.yaml: unknown setting '{typo}'{hint}"


def test_a_mistyped_choice_names_the_nearest() -> None:
    assert refusal(schedule="cosin") == (
        "recipe mine.yaml: schedule should be 'constant', 'linear', 'cosine' or 'step', got 'cosin'; "
        "did you mean cosine?"
    )


def test_a_flag_is_called_by_its_own_name() -> None:
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
def test_a_value_that_cannot_be_names_its_setting_in_one_line(name: str, value: Any) -> None:
    message = refusal(**{name: value})

    assert message.startswith(f"recipe mine.yaml: {name} should ")
    assert ", got " in message
    assert "\n" not in message


def test_a_huge_value_is_not_repeated_in_full() -> None:
    bomb: list[Any] = ["lol"]
    for _ in range(40):
        bomb = [bomb] * 9  # what a few YAML aliases make; its text would have 10^38 letters
    assert len(refusal(lr=bomb)) < 400
    assert len(refusal(lr="x" * 100_000)) < 400


@pytest.mark.parametrize(
    ("settings", "as_keys", "as_flags"),
    [
        (
            {"patch_size": 8},
            "patch_size shapes a new model; add from_scratch, or leave patch_size out (over a recipe: patch_size none)",
            "--patch-size shapes a new model; add --from-scratch, or leave --patch-size out "
            "(over a recipe: --patch-size none)",
        ),
        (
            {"from_scratch": True, "freeze": "backbone"},
            "freeze backbone with from_scratch would train a head on random features; drop one",
            "--freeze backbone with --from-scratch would train a head on random features; drop one",
        ),
    ],
)
def test_settings_that_do_not_agree_are_named_as_they_were_given(
    settings: dict[str, Any], as_keys: str, as_flags: str
) -> None:
    assert refusal(**settings) == f"recipe mine.yaml: {as_keys}"
    with pytest.raises(UsageError) as caught:
        TrainConfig.parse(settings, "flags")
    assert str(caught.value) == as_flags


@given(lr=st.floats(1e-12, 100), epochs=st.floats(1e-3, 1e5), seed=st.integers(0, 2**32 - 1))
def test_a_config_is_the_same_after_a_round_trip(lr: float, epochs: float, seed: int) -> None:
    config = TrainConfig.parse({"lr": lr, "epochs": epochs, "seed": seed})
    assert TrainConfig.parse(config.model_dump()) == config


@given(
    st.dictionaries(
        st.sampled_from(sorted(TrainConfig.model_fields)),
        st.none() | st.text("a1.e-\n") | st.integers() | st.floats(),
    )
)
def test_any_values_make_a_config_or_a_usage_error(values: dict[str, Any]) -> None:
    try:
        TrainConfig.parse(values)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017  (either outcome is right)


def test_every_word_from_elsewhere_means_something_here() -> None:
    from vitft.errors import _HERE

    flags = {"output", "resume", "classes"}  # of commands, not settings
    assert set(_HERE.values()) <= set(TrainConfig.model_fields) | flags
    assert not set(_HERE) & (set(TrainConfig.model_fields) | flags)


@pytest.mark.parametrize(
    ("said", "in_python"),
    [
        ("no data set; add --dataset: digits", "no data set; add dataset: digits"),
        ("Try a lower --lr or more --warmup.", "Try a lower lr or more warmup."),
        ("over --max-pixels 50 (7 x 5)", "over max_pixels 50 (7 x 5)"),
        ("stopped. Go on with: vitft train --resume runs/x", "stopped. Go on with: vitft train --resume runs/x"),
        ("set --val-fraction, or (vitft train --lr 1) --lr", "set val_fraction, or (vitft train --lr 1) lr"),
        ("data/a--lr/--x: a file -- or none", "data/a--lr/--x: a file -- or none"),
    ],
)
def test_an_error_names_a_setting_as_whoever_called_spells_it(
    monkeypatch: pytest.MonkeyPatch, said: str, in_python: str
) -> None:
    assert str(UsageError(said)) == said
    monkeypatch.setattr("vitft.errors._typed", False)
    assert str(UsageError(said)) == in_python


def test_a_library_call_gets_no_flags_and_a_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from vitft import train
    from vitft.cli.app import app

    monkeypatch.setattr("vitft.errors._typed", False)
    with pytest.raises(UsageError, match=r"no data set; add dataset: digits"):
        train(TrainConfig())
    assert "no data set; add --dataset: digits" in CliRunner().invoke(app, ["train"]).output
    with pytest.raises(UsageError, match=r"^batch_size should be greater"):
        TrainConfig.parse({"batch_size": 0}, "flags")
