"""`vitft bench`: figures that hang together, of the real loader, the real step and the real forward pass."""

import importlib.metadata
import json
import time
from contextlib import suppress
from typing import Any

import pytest
from typer.testing import CliRunner

from vitft.cli.app import app
from vitft.hardware.device import peak_flops
from vitft.hardware.timers import DataWait, Stopwatch
from vitft.spec import PRESETS, total, training_flops

SMALL = ["--batch-size", "8", "--max-train-samples", "40", "--device", "cpu", "--precision", "fp32", "--steps", "3"]
MICRO = PRESETS["vit-micro"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vitft.training.cost.bench.peak_flops", lambda device, precision: peak_flops(device, precision, 0.05)
    )


def measured(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", *words, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code == 0 else result.output


def assert_spread(spread: dict[str, float]) -> None:
    assert 0 <= spread["min"] <= spread["median"] <= spread["max"]


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("data", ["wait", "transfer", "augment"]),
        ("train", ["wait", "transfer", "augment", "forward", "backward", "optimizer"]),
        ("eval", ["wait", "forward"]),
    ],
)
def test_rates_and_parts_of_a_step(what: str, parts: list[str]) -> None:
    found = measured(what, *SMALL)
    assert list(found["ms_per_step"]) == parts
    for spread in (found["images_per_s"], *found["ms_per_step"].values()):
        assert_spread(spread)
    assert found["images_per_s"]["min"] > 0
    assert found["peak_memory_bytes"]["process"] > 1e8
    assert found["peak_memory_bytes"]["device"] is None
    assert found["settings"]["batch_size"] == 8
    assert found["environment"]["versions"]["torch"] == importlib.metadata.version("torch")


@pytest.mark.parametrize(
    ("what", "flops"), [("train", training_flops(MICRO, 8)), ("eval", total(MICRO, 8).flops)]
)  # fmt: skip
def test_flops_are_the_specs_over_the_measured_time(what: str, flops: int) -> None:
    found = measured(what, *SMALL)
    step_s = 8 / found["images_per_s"]["median"]
    assert found["flops_per_s"] == pytest.approx(flops / step_s)
    share = found["flops_per_s"] / found["peak_flops_per_s"]
    assert found["mfu"] == (
        pytest.approx(share) if share <= 1 else None
    )  # above it, the peak was measured beside others
    assert 0 <= found["data_wait"] < 1


def test_a_preset_has_random_weights_and_a_probe_no_flops() -> None:
    found = measured("eval", *SMALL, "--model", "vit-tiny", "--image-size", "32")
    assert (found["settings"]["model"], found["settings"]["image_size"]) == ("vit-tiny", 32)
    probe = measured("train", *SMALL, "--freeze", "backbone")
    assert probe["mfu"] is None
    assert "augment" not in probe["ms_per_step"]
    assert measured("train", *SMALL, "--freeze", "backbone", "--augment", "crop")["mfu"] is None


def test_it_is_shown_to_people_too() -> None:
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["bench", "train", *SMALL]).stdout
    assert "images/s" in shown
    assert "of a large fp32 product here" in shown
    assert "backward" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_what_cannot_be_measured_is_one_line() -> None:
    assert "has 40 training images; take fewer" in measured("train", *SMALL, "--batch-size", "64", code=2)
    assert "did you mean" in measured("data", *SMALL, "--model", "vit-tinny", code=4)
    assert measured("nothing", code=2)
    frozen = measured("train", *SMALL, "--freeze", "backbone", "--model", "vit-tiny", code=2)
    assert "vit-tiny is a shape with random weights" in frozen


def test_a_stopwatch_gives_each_part_its_own_time() -> None:
    clock = Stopwatch("cpu")
    for name in ("forward", "backward", "forward"):
        with clock.part(name):  # type: ignore[arg-type]
            sum(range(20_000 if name == "forward" else 10))
    assert set(clock.seconds) == {"forward", "backward"}
    assert clock.seconds["forward"] > clock.seconds["backward"] > 0


def test_what_steps_wait_for_their_input_adds_up_and_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 1.5, 7.0, 7.25, 9.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    wait = DataWait("cpu")
    for _ in range(2):
        with wait:
            pass
    assert [wait.seconds, wait.seconds] == [0.75, 0.75]
    with suppress(KeyError), wait:  # an input that is broken off
        raise KeyError
    assert wait.seconds == 1.75
