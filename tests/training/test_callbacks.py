"""A run's lines: what stands in them, which are kept on resume, and that no number that is none passes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vitft.training import callbacks
from vitft.training.callbacks import record, recorded, remove_after
from vitft.training.cost import throughput
from vitft.training.cost.throughput import Window

NAN, INF = float("nan"), float("inf")


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)


def accelerator(*, scaler: object = None, processes: int = 1) -> SimpleNamespace:
    """All processes alike: a sum over them is so many times one's own."""
    return SimpleNamespace(scaler=scaler, num_processes=processes, reduce=lambda table, how: processes * table)


def add(window: Window, loss: float, correct: float, norm: float, count: int) -> None:
    window.add(torch.tensor(loss), torch.tensor(correct), torch.tensor(norm, requires_grad=True), count=count)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_line_has_the_means_of_its_window(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    clock = Clock(monkeypatch)
    window = Window(accelerator(processes=processes))
    window.restart(3.0)
    add(window, 1.0 / processes, 6.0 / processes, 2.0, 8)
    add(window, 2.0 / processes, 1.0 / processes, 4.0, 4)
    assert len(window) == 2
    clock.now += 4.0
    assert window.close(4.0) == {
        "loss": 1.5, "accuracy": 7 / 12, "grad_norm": 3.0, "images_per_s": 3.0, "data_wait": 0.25,
    }  # fmt: skip
    assert len(window) == 0
    clock.now += 100.0
    window.restart(4.5)  # an evaluation: it is nobody's time
    add(window, 5.0 / processes, 0.0, 1.0, 2)
    clock.now += 1.0
    assert window.close(5.0) == {
        "loss": 5.0, "accuracy": 0.0, "grad_norm": 1.0, "images_per_s": 2.0, "data_wait": 0.5,
    }  # fmt: skip
    pace = window.pace
    assert (pace.images, pace.elapsed_s, pace.waited_s) == (14, 5.0, 1.5)
    assert (pace.images_per_s, pace.data_wait) == (2.8, 0.3)


@pytest.mark.parametrize(
    ("steps", "place", "value"),
    [([(1.0, 1.0), (INF, 1.0), (NAN, 1.0)], 1, INF), ([(1.0, 1.0), (2.0, -INF), (NAN, 1.0)], 1, -INF)],
)
def test_the_first_non_finite_value_is_named(steps: list[tuple[float, float]], place: int, value: float) -> None:
    window = Window(accelerator())
    for loss, norm in steps:
        add(window, loss, 0.0, norm, 1)
    with pytest.raises(FloatingPointError) as caught:
        window.close(0.0)
    assert caught.value.args == (place, value)


def test_under_fp16_a_gradient_may_overflow_and_a_loss_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    window = Window(accelerator(scaler=object()))
    for norm in (INF, 3.0, NAN, 5.0):
        add(window, 1.0, 0.0, norm, 1)
    clock.now += 1.0
    assert window.close(0.0)["grad_norm"] == 4.0  # of the steps that were taken
    add(window, 1.0, 0.0, INF, 1)
    clock.now += 1.0
    assert window.close(0.0)["grad_norm"] == 0.0
    add(window, INF, 0.0, 1.0, 1)
    with pytest.raises(FloatingPointError):
        window.close(0.0)


def test_on_resume_the_lines_up_to_the_checkpoint_stay(tmp_path: Path) -> None:
    assert recorded(tmp_path) == []
    remove_after(tmp_path, 3)  # there is nothing to forget, and nothing is made
    assert list(tmp_path.iterdir()) == []
    kept = [{"step": 1, "split": "train"}, {"step": 3, "split": "train"}, {"step": 3, "split": "validation"}]
    gone = [{"step": 3, "split": "test"}, {"step": 4, "split": "train"}]
    for line in (*kept, *gone):
        record(tmp_path, line)
    with (tmp_path / callbacks.FILE).open("a") as file:
        file.write('{"step": 5}\n[1]\n{"step": 5, "spl')  # no line of ours, nor that; and a truncated one
    assert recorded(tmp_path) == kept + gone
    remove_after(tmp_path, 3)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == kept


def test_a_line_holds_only_what_json_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        record(tmp_path, {"step": 1, "split": "train", "loss": NAN})
