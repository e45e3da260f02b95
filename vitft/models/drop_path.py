"""Stochastic depth: while training, skip residual branches at random (Huang et al. 2016; `--drop-path`)."""

from functools import partial
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor, nn

from vitft.errors import UsageError
from vitft.models.blocks import block_stacks
from vitft.models.classifiers import TIMM

_ATTENTION = ("attention", "self_attn")


def set_drop_path_rate(hf_config: Any, rate: float | None) -> None:
    """Set the rate of an architecture that has stochastic depth of its own; None leaves it.

    Raises UsageError if it cannot be set: each stage of a CvT has its own, and LeViT's has to be an integer.
    """
    if rate is not None and hf_config.model_type == TIMM:
        hf_config.model_args = {**(hf_config.model_args or {}), "drop_path_rate": rate}
        return
    own = getattr(hf_config, "drop_path_rate", None)
    if rate is None or own is None:
        return
    try:
        hf_config.drop_path_rate = rate
    except StrictDataclassFieldValidationError as error:
        raise UsageError(f"drop_path: cannot be set in a {hf_config.model_type} model; remove it.") from error


def drop_paths(model: Any, rate: float | None) -> None:
    """Skip the attention and the MLP of each block, each with a probability from 0 in the first to `rate` in the last.

    For blocks that add both to the residual stream themselves: ViT, DeiT, CLIP, SigLIP. A sample's branch is replaced
    by zero with probability p, else divided by 1 - p, so that its mean stays (eq. 2 and 4 of Huang et al. 2016, with
    the division while training instead of the product while testing). Does nothing to an architecture that has
    stochastic depth of its own. Raises UsageError for other blocks.
    """
    if not rate or hasattr(model.config, "drop_path_rate") or model.config.model_type == TIMM:
        return
    stacks = block_stacks(model)
    branches = [_branches(block) for stack in stacks for block in stack]
    if len(stacks) != 1 or not all(branches):
        raise UsageError(f"drop_path: no known residual branches in a {model.config.model_type} model; remove it.")
    for number, modules in enumerate(branches):
        for module in modules:
            module.register_forward_hook(partial(_drop, rate * number / max(1, len(branches) - 1)))


def _branches(block: nn.Module) -> list[nn.Module]:
    """The attention and the MLP of a pre-norm block that has nothing else but norms and dropout."""
    children = dict(block.named_children())
    named = [name for name in children if name in (*_ATTENTION, "mlp")]
    norms = [name for name in children if isinstance(children[name], nn.LayerNorm)]
    others = [name for name in children if isinstance(children[name], nn.Dropout)]
    alone = len(named) == len(norms) == 2 and len(children) == 4 + len(others)
    return [children[name] for name in named] if alone else []


def _drop(rate: float, branch: nn.Module, _inputs: Any, output: Any) -> Any:
    """A forward hook: zero the branch of some samples, and scale that of the others."""
    if not branch.training or rate == 0:
        return output
    value: Tensor = output[0] if isinstance(output, tuple) else output
    kept = value.new_empty((len(value), *[1] * (value.ndim - 1))).bernoulli_(1 - rate).div_(1 - rate)
    return (value * kept, *output[1:]) if isinstance(output, tuple) else value * kept
