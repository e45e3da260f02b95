"""Several processes share one model: each keeps a shard of every weight, of its gradient and of its moments.

FSDP2 of torch (Zhao et al. 2023, "PyTorch FSDP"; ZeRO stage 3 of Rajbhandari et al. 2020): a block's weights are
gathered just before they are needed and dropped after it, and each process updates its own shard.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitft.errors import UsageError
from vitft.hardware.shards import each_joined
from vitft.models.blocks import batch_norms, block_stacks


class Sharded:
    """A model that is sharded over all processes, in place, and how to put it together again."""

    def __init__(self, model: Any, device: str, precision: str = "fp32") -> None:
        """Shard a model, which is the same on each process. Raises UsageError for one that cannot be.

        In bf16, blocks are gathered in bf16, which is half the bytes: autocast rounds what matrix products read anyway.
        Shards, the sums of gradients, the residual stream and the arithmetic of norms stay float32.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        kind = model.config.model_type
        # DDP gives all processes the running means of the first; here, each would have its own.
        if batch_norms(model):
            raise UsageError(f"parallel fsdp: a {kind} model has batch norms, which it cannot share; use ddp.")
        if any(parameter.ndim == 0 for parameter in model.parameters()):
            raise UsageError(f"parallel fsdp: a {kind} model has a weight that is one number; use ddp.")
        self.model, self._empty = model, _without_memory(model)
        mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
        rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        *blocks, _ = parts = _parts(model)
        for part in parts:
            policy = rounded if precision == "bf16" and part is not model else MixedPrecisionPolicy()
            # Also of the whole model, around its blocks: else what an evaluation gathered would stay, and become old.
            fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        for module in chain.from_iterable(block.modules() for block in blocks):
            if type(module).forward in (nn.LayerNorm.forward, nn.GroupNorm.forward):
                module.forward = partial(_normalized, module)

    @contextmanager
    def whole(self, *, keep: bool) -> Iterator[Any]:
        """The model with whole weights, on the CPU, for those that keep it, else None. All have to call it."""
        tensors = {name: tensor for name, tensor in each_joined(self.model.state_dict()) if keep}
        if not keep:
            yield None
            return
        self._empty.load_state_dict(tensors, assign=True)
        del tensors
        try:
            yield self._empty
        finally:
            self._empty.to("meta")


def _parts(model: nn.Module) -> tuple[nn.Module, ...]:
    """What is gathered at once: each block, and the rest of the model."""
    return (*chain.from_iterable(block_stacks(model)), model)


def part_bytes(model: nn.Module, precision: str) -> list[tuple[int, int]]:
    """Of each part of a model that `Sharded` gathers at once: bytes of its weights then, and of its gradients."""
    counted: set[int] = set()
    sizes = []
    for part in _parts(model):
        own = [weights for weights in part.parameters() if id(weights) not in counted]
        counted |= {*map(id, own)}
        each = 2 if precision == "bf16" and part is not model else 4
        sizes.append((sum(each * w.numel() for w in own), sum(4 * w.numel() for w in own if w.requires_grad)))
    return sizes


def _normalized(norm: Any, given: Tensor) -> Tensor:
    """Its output by float32 weights, whatever they were gathered as: on a CPU, autocast does not see to that."""
    weight, bias = (None if tensor is None else tensor.float() for tensor in (norm.weight, norm.bias))
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(given, norm.num_groups, weight, bias, norm.eps)
    return F.layer_norm(given, norm.normalized_shape, weight, bias, norm.eps)


def _without_memory(model: nn.Module) -> Any:
    """A copy whose tensors have shapes alone."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): _shape_of(tensor) for tensor in tensors})


def _shape_of(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
