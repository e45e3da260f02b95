"""What a sweep varies: read from text, and checked before anything is trained."""

import pytest

from vitft import TrainConfig, UsageError
from vitft.sweeping.space import Choices, Range, combinations, point_of, read_space

BASE = {"dataset": "digits", "model": "vit-micro"}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("lr", "1e-5..1e-3", Range(1e-5, 1e-3)),
        ("epochs", "0.5 .. 2", Range(0.5, 2.0)),
        ("batch_size", "16..64", Range(16, 64)),
        ("layer_decay", "0.6, 0.75,1", Choices((0.6, 0.75, 1.0))),
        ("lora_rank", "none,8", Choices((None, 8))),
        ("freeze", "none,backbone,2", Choices(("none", "backbone", 2))),
        ("model", "vit-micro,owner/name", Choices(("vit-micro", "owner/name"))),
        ("model", "../one,../other..2", Choices(("../one", "../other..2"))),
        ("betas", "0.9,0.999;0.9,0.95", Choices(("0.9,0.999", "0.9,0.95"))),
        ("weight_decay", ".01..1", Range(0.01, 1.0)),
        ("deterministic", "true,false", Choices((True, False))),
        ("max_train_samples", "100,200", Choices((100, 200))),
    ],
)
def test_values_get_the_type_of_the_setting(name: str, text: str, expected: Range | Choices) -> None:
    assert read_space({name: text}, BASE) == {name: expected}


def test_whole_and_logarithmic_ranges() -> None:
    space = read_space({"lr": "1e-4..1e-3", "weight_decay": "0..0.1", "batch_size": "16..64"}, BASE)
    assert [(one.whole, one.logarithmic) for one in space.values() if isinstance(one, Range)] == [
        (False, True), (False, False), (True, False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lrr", "1,2", "unknown setting; did you mean lr"),
        ("learning_rate", "1,2", "did you mean lr"),
        ("lr", "1e-3..1e-5", "the smaller one first"),
        ("augment", "none..flip", "only one value|should be"),
        ("augment", "1..2", "should be"),
        ("lr", "1e-3", "only one value"),
        ("lr", "1e-3,0.001", "the same value twice"),
        ("lr", "-1..1", "greater than 0"),
        ("augment", "flip,crob", "did you mean crop"),
        ("dora", "true,false", "--lora-rank"),
        ("dataset", "digits,cifar10", "which images are scored"),
        ("val_fraction", "0.1,0.2", "which images are scored"),
        ("seed", "0,1,2", "--seeds"),
        ("best_by", "loss,accuracy", "compared by"),
        ("threads", "1,2", "does not change the result"),
        ("skip_test", "true,false", "never reads the test images"),
    ],
)
def test_what_cannot_be_varied_is_one_line(name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        read_space({name: text}, BASE)
    assert str(error.value).count("\n") == 0


def test_values_are_checked_beside_the_other_settings() -> None:
    assert read_space({"dora": "true,false"}, BASE | {"lora_rank": 4})["dora"] == Choices((True, False))


def test_values_are_checked_beside_what_else_is_varied() -> None:
    """A value that no others make possible is still refused, and so is one that is none of the setting's."""
    space = read_space({"lora_alpha": "4,8", "lora_rank": "none,8", "lr": "1e-5..1e-3"}, BASE)
    assert space["lora_alpha"] == Choices((4.0, 8.0))
    read_space({"min_delta": "0.01,0", "early_stopping": "none,1"}, BASE)
    with pytest.raises(UsageError, match=r"lora_alpha=4: .*lora.rank"):
        read_space({"lora_alpha": "4,8", "lr": "1e-5..1e-3"}, BASE)
    with pytest.raises(UsageError, match=r"lora_alpha=-4: .*greater than 0"):
        read_space({"lora_rank": "4,8", "lora_alpha": "-4,8"}, BASE | {"lora_rank": 4})


def test_lists_have_combinations_and_ranges_have_none() -> None:
    lists = read_space({"layer_decay": "0.5,1", "augment": "none,flip"}, BASE)
    assert combinations(lists) == [
        {"layer_decay": decay, "augment": kind} for decay in (0.5, 1.0) for kind in ("none", "flip")
    ]
    assert combinations(read_space({"layer_decay": "0.5,1", "lr": "1e-5..1e-3"}, BASE)) is None
    assert combinations({}) == [{}]


def test_the_settings_as_given_are_a_point_if_they_are_within_the_space() -> None:
    config = TrainConfig.parse(BASE | {"lr": 1e-4})
    assert point_of(config, read_space({"lr": "1e-5..1e-3"}, BASE)) == {"lr": 1e-4}
    assert point_of(config, read_space({"lr": "1e-5,3e-5"}, BASE)) is None
    assert point_of(config, {}) == {}
