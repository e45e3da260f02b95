"""Several processes share one model: each keeps a shard of every weight, of its gradient and of its moments.

FSDP2 of torch (Zhao et al. 2023, "PyTorch FSDP"; ZeRO stage 3 of Rajbhandari et al. 2020): a block's weights are
gathered just before they are needed and dropped after it, and each process updates its own shard.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from vitft.errors import UsageError
from vitft.hardware.shards import each_joined
from vitft.models.blocks import block_stacks


class Sharded:
    """A model that is sharded over all processes, in place, and how to put it together again."""

    def __init__(self, model: Any, device: str) -> None:
        """Shard a model, which is the same on each process. Raises UsageError for one that cannot be."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        kind = model.config.model_type
        # DDP gives all processes the running means of the first; here, each would have its own.
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            raise UsageError(f"parallel fsdp: a {kind} model has batch norms, which it cannot share; use ddp.")
        if any(parameter.ndim == 0 for parameter in model.parameters()):
            raise UsageError(f"parallel fsdp: a {kind} model has a weight that is one number; use ddp.")
        self.model, self._empty = model, _without_memory(model)
        mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
        for part in _parts(model):
            # Also of the whole model, around its blocks: else what an evaluation gathered would stay, and become old.
            fully_shard(part, mesh=mesh, reshard_after_forward=True)

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


def part_bytes(model: nn.Module) -> list[tuple[int, int]]:
    """Of each part of a model that `Sharded` gathers at once: bytes of its weights, and of those that are trained."""
    counted: set[int] = set()
    sizes = []
    for part in _parts(model):
        own = [weights for weights in part.parameters() if id(weights) not in counted]
        counted |= {*map(id, own)}
        sizes.append((sum(4 * w.numel() for w in own), sum(4 * w.numel() for w in own if w.requires_grad)))
    return sizes


def _without_memory(model: nn.Module) -> Any:
    """A copy whose tensors have shapes alone."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): _shape_of(tensor) for tensor in tensors})


def _shape_of(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
