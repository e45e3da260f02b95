"""A step launches as many operations for many images as for few, and moves and reads no number on its way."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.training.test_trainer import config
from vitft.data import augment, loader
from vitft.data.augmentation import boxes
from vitft.hardware.device import make_accelerator, resolve_auto
from vitft.training.setup import prepare
from vitft.training.step import Learner

EVERYTHING = {"erase": 0.5, "mixup": 0.4, "cutmix": 1.0, "ema": 0.9, "drop_path": 0.2, "clip_norm": 1.0}


def operators(batch_size: int, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Counter[str]:
    """How often a step, on a batch of this size, calls each operator of torch: on a GPU, what the host launches."""
    settings = resolve_auto(config(batch_size=batch_size, max_train_samples=None, **EVERYTHING | changes))
    learner = Learner(make_accelerator(settings), prepare(settings).decode())
    learner.step(0)  # makes constants and the optimizer's state
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", None)  # to move a number to a GPU is to wait for it
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            learner.step(1)
    called = [event for event in trace.events() if not event.name.startswith("Optimizer.")]
    assert not [event for event in called if event.name == "aten::item" and not _stays_on_host(event)]  # nor read one
    # Within an operator of a CPU, many zeros are filled and few are not.
    return Counter(event.name for event in called if event.name != "aten::fill_" or event.cpu_parent is None)


def _stays_on_host(event: Any) -> bool:
    """Whether it reads what is in host memory: how many steps an optimizer has taken; or checks as a GPU does not."""
    while event is not None and not event.name.startswith(("Optimizer.step", "aten::one_hot")):
        event = event.cpu_parent
    return event is not None


@pytest.mark.parametrize(
    ("few", "changes"),
    [(32, {"augment": "crop", "color_jitter": 0.4}), (256, {"augment": "trivial"}), (256, {"augment": "rand"})],
    ids=["crop", "trivial", "rand"],
)
def test_a_step_launches_as_much_whatever_its_batch(
    few: int, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which this is told to be. A policy's batches are large enough that each operation is drawn."""
    for module in (augment, boxes, loader):
        monkeypatch.setattr(module, "many_launches_cost", lambda device: True)
    small, large = (operators(size, monkeypatch, **changes) for size in (few, 2 * few))
    assert small == large
