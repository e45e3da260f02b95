"""The last lines of a run: how fast it went, against which limit, and what would help."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.test_trainer import config
from vitft import train
from vitft.cli.tables import training_report
from vitft.models.load import load_for_training
from vitft.spec import ViTSpec, training_flops
from vitft.training.cost.throughput import Pace, measure_speed
from vitft.training.trainer import resume

PACE = Pace(images=600, elapsed_s=3.0, waited_s=0.06)
PROBE = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp")) | {"freeze": "backbone"}


@pytest.fixture(autouse=True)
def a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """That reaches a GFLOP/s, and is best at fp32."""
    monkeypatch.setattr("vitft.training.cost.throughput.peak_flops", lambda device, precision, seconds: 1e9)
    monkeypatch.setattr("vitft.training.cost.throughput.find_precision", lambda wanted, device: "fp32")


def test_the_fraction_of_peak_follows_from_flops_and_throughput() -> None:
    settings = config()
    model = load_for_training(settings, [str(i) for i in range(10)]).model
    speed = measure_speed(PACE, model, settings)
    assert speed is not None
    assert (speed.images_per_s, speed.data_wait) == (200, pytest.approx(0.02))
    flops = training_flops(ViTSpec.square(28, 14, 16, 1, 2, 32, 10))
    assert speed.mfu == pytest.approx(flops * 200 / 1e9)
    assert speed.remedy is None
    assert measure_speed(PACE, model, settings, processes=2).mfu is None  # type: ignore[union-attr]
    assert measure_speed(PACE, model, config(from_scratch=False, **PROBE)).mfu is None  # type: ignore[union-attr]
    assert measure_speed(Pace(), model, settings) is None


def test_the_bottleneck_is_named_with_a_setting_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_for_training(config(), [str(i) for i in range(10)]).model

    def remedy(pace: Pace = PACE, **changes: object) -> str | None:
        return measure_speed(pace, model, config(**changes)).remedy  # type: ignore[union-attr]

    waiting = replace(PACE, waited_s=1.0)
    assert remedy(waiting, augment="crop") == "--augment crop takes much of the time: flip is cheaper"
    assert remedy(waiting, augment="flip") is None
    monkeypatch.setattr("vitft.training.cost.throughput.find_precision", lambda wanted, device: "bf16")
    assert remedy() == "this hardware is faster at bf16: --precision auto"
    assert remedy(precision="bf16") is None
    parts = config(precision="bf16", batch_size=512, micro_batch_size=16).model_copy(update={"device": "cuda"})
    assert "larger --micro-batch-size" in str(measure_speed(PACE, model, parts).remedy)  # type: ignore[union-attr]
    assert measure_speed(PACE, model, config(), probe=True) is None
    small = measure_speed(PACE, model, config(precision="bf16").model_copy(update={"device": "cuda"}))
    assert small is not None
    assert small.remedy == "micro-batches of 24 images leave the GPU idle: a larger --batch-size fills it"


def test_a_run_reports_it_and_a_finished_run_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # More than any machine reaches: beyond its peak, none is reported.
    monkeypatch.setattr("vitft.training.cost.throughput.peak_flops", lambda device, precision, seconds: 1e12)
    result = train(config(), output=tmp_path / "run")
    said = training_report(result).splitlines()[-2]
    form = r"[\d,]+ images/s, \d+ % of the time waiting for data, \d+ % of this machine's fp32 peak"
    assert re.fullmatch(form, said)
    assert result.speed is not None
    assert result.speed.images_per_s > 1
    assert 0 <= result.speed.data_wait < 1
    again = resume(tmp_path / "run")
    assert again.speed is None
    assert "images/s" not in training_report(again)
