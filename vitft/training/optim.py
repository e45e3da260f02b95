"""Parameter groups, the optimizer, and the learning rate as a function of the step."""

from math import ceil, cos, log10, pi
from typing import TYPE_CHECKING, Any

from vitft.config.train import TrainConfig, betas_of, usual_lr, what_is_trained
from vitft.hardware.shards import is_sharded
from vitft.models.blocks import parameter_depths

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer

_POSITIONS = ("position_embedding", "relative_position", "position_bias")


_FAR = 1.001  # decimal logarithm of more than ten times

MOMENTS = {"adamw": 2, "adam": 2, "sgd": 1}  # values per weight that an optimizer keeps


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: those of its epochs, at least one, at most `max_steps`."""
    wanted = max(1, ceil(config.epochs * steps_per_epoch - 1e-9))
    return min(wanted, config.max_steps or wanted)


def lr_at(step: int, config: TrainConfig, *, total_steps: int, steps_per_epoch: int) -> float:
    """The learning rate of optimizer step `step`, from 0 to `total_steps` - 1: warm-up, then the schedule.

    `linear` and `cosine` (Loshchilov & Hutter 2017, eq. 5) reach 0 just after the last step. `step` multiplies by
    `decay_factor` every `decay_epochs` after the warm-up.
    """
    warm = min(round(config.warmup * total_steps), total_steps - 1)  # every run reaches the peak
    if step < warm:
        return config.lr * (step + 1) / (warm + 1)
    done = (step - warm) / max(1, total_steps - warm)
    match config.schedule:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * (1 - done)
        case "cosine":
            return config.lr * (1 + cos(pi * done)) / 2
        case "step":
            # Rounded to steps, so that a decay after each epoch falls exactly on the next epoch's first step.
            every = max(1, round(config.decay_epochs * steps_per_epoch))
            return config.lr * config.decay_factor ** ((step - warm) // every)


def unusual_lr(config: TrainConfig, weights: int) -> str | None:
    """A sentence about a learning rate that is far from the usual one of a model with so many weights; else None."""
    usual = usual_lr(config, weights)
    times = config.lr / usual
    if abs(log10(times)) < _FAR:
        return None
    far = f"high: {times:,.0f} times" if times > 1 else f"low: one {1 / times:,.0f}th of"
    advised = f"{usual:.0e}".replace("e-0", "e-")
    return (
        f"--lr {config.lr:g} is unusually {far} the usual rate for {what_is_trained(config, weights)} "
        f"with {config.optimizer}; try --lr {advised}"
    )


def parameter_groups(model: "Module", weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Trainable parameters in groups by weight decay, which only weight matrices have, and by learning rate factor.

    Biases, norms, tokens, registers, scales and position embeddings have no weight decay, nor has Swin V2's position
    bias network. The factor, `lr_factor`, is `layer_decay` to the power of the layers that follow (Bao et al. 2022,
    "BEiT", appendix): 1 for the head and the last norm.
    """
    depths = parameter_depths(model) if layer_decay != 1 else {}
    last = max(depths.values(), default=0)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = name.endswith("weight") and parameter.ndim > 1 and not any(word in name for word in _POSITIONS)
            decay, factor = weight_decay if matrix else 0.0, layer_decay ** (last - depths.get(name, last))
            group = groups.setdefault((-factor, -decay), {"params": [], "weight_decay": decay, "lr_factor": factor})
            group["params"].append(parameter)
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0])]


def make_optimizer(model: "Module", config: TrainConfig) -> "Optimizer":
    """AdamW (Loshchilov & Hutter 2019), Adam (Kingma & Ba 2015) or SGD with momentum, fused."""
    import torch

    decay = 0.0 if config.optimizer == "adam" else config.weight_decay
    groups = parameter_groups(model, decay, config.layer_decay)
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, lr=config.lr, betas=betas_of(config.betas), fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=config.lr, betas=betas_of(config.betas), fused=True)
        case "sgd":
            # torch has no fused SGD of sharded weights.
            fused = not any(is_sharded(parameter) for parameter in model.parameters())
            return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=fused)
