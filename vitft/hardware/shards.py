"""Tensors of which each process has a shard: torch's DTensors. Each function takes whole tensors, too.

What is called collective, all processes have to call at the same point.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a shard, which knows the shape of the whole."""
    return hasattr(tensor, "full_tensor")  # a DTensor, which some builds of torch lack


def local(tensor: Any) -> Tensor:
    """This process's shard of a tensor, in the same memory; of a tensor that is not sharded, all of it."""
    shard: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return shard


def joined(tensor: Any) -> Tensor:
    """The whole of a sharded tensor. Collective."""
    together: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return together


def each_joined(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors, on the CPU, by name, in the order of the names. Collective: all processes go through all.

    One after another, so that only a process that keeps them needs the memory of more than one. Beside sharded ones
    there are whole ones: buffers, and the step that a fused optimizer counts on the device.
    """
    for name in sorted(tensors):
        yield name, joined(tensors[name]).cpu()


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Write a whole value, which every process has, into a tensor, which may be sharded."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = target
        value = value.to(sharded.device)
        local(sharded).copy_(
            local(distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None))
        )
    else:
        target.copy_(value)


def swap(one: Tensor, other: Tensor) -> None:
    """Exchange the values of two tensors that are sharded alike."""
    first, second = local(one), local(other)
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)
