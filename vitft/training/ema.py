"""An exponential moving average of the weights, which is evaluated and saved in their place (`--ema`).

Averages of the last steps often score higher than the last step (Polyak & Juditsky 1992, "Acceleration of stochastic
approximation by averaging"; Tan & Le 2019 trained EfficientNet so). They are kept in the optimizer's state, which step
checkpoints hold, so a resumed run continues them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim.swa_utils import get_ema_multi_avg_fn

from vitft.hardware.shards import is_sharded, local, swap

_AVERAGE = "average"  # key in the optimizer's state of a parameter


def update(optimizer: Any, decay: float, step: int) -> None:
    """Move the averages to the weights after optimizer step `step`, counted from 0.

    average <- d * average + (1 - d) * weight, where d = min(decay, (1 + step) / (10 + step)), so that the first steps
    do not hold on to weights that are hardly trained (as in TensorFlow's `ExponentialMovingAverage`).
    """
    averages, weights = [], []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:  # no gradient yet, so it has not changed; optimizers take a state to be complete
                continue
            weight = parameter.detach()
            if _AVERAGE not in state:
                state[_AVERAGE] = weight.clone()
            averages.append(local(state[_AVERAGE]))
            weights.append(local(weight))
    average = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))  # type: ignore[no-untyped-call]
    average(averages, weights, 0)


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Within this context, the averages are the weights. Does nothing if there are none."""
    _swap(optimizer)
    try:
        yield
    finally:
        _swap(optimizer)


def _swap(optimizer: Any) -> None:
    for parameter, state in optimizer.state.items():
        if _AVERAGE in state:
            if is_sharded(parameter):  # its memory is where its shard is gathered from
                swap(parameter.data, state[_AVERAGE])
            else:
                parameter.data, state[_AVERAGE] = state[_AVERAGE], parameter.data
