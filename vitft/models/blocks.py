"""The repeated blocks of a model, in any architecture, found by structure instead of names."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any

from torch import nn

from vitft.errors import UsageError
from vitft.io.console import counted
from vitft.models.heads import in_head


def block_stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of blocks of one type, in order; where all of them have such lists (the stages of a Swin), those.

    timm has its blocks in an `nn.Sequential`, as it has other things. Layers of torch itself are parts of a block.
    """
    lists: dict[nn.Module, Any] = {
        part: part
        for part in model.modules()
        if isinstance(part, nn.ModuleList | nn.Sequential) and len({*map(type, part)}) == 1
        if not (origin := _origin(part[0])).startswith("torch.")
        if isinstance(part, nn.ModuleList) or origin.startswith("timm.")
    }
    found, inside = [], set[nn.Module]()
    for part, stack in lists.items():  # the outer ones first
        stages = all(any(inner in lists for inner in block.modules()) for block in stack)
        if part not in inside and not stages:
            found.append(stack)
            inside.update(part.modules())
    return found


def _origin(module: nn.Module) -> str:
    """Where the type of a module is from; FSDP has made its own of it."""
    names = (kind.__module__ for kind in type(module).__mro__)
    return next(name for name in names if not name.startswith("torch.distributed."))


def parameter_depths(model: nn.Module) -> dict[str, int]:
    """The depth of every parameter: 0 before the first block, d in block d, n + 1 after the last of n blocks.

    What lies between two blocks, such as the patch merging of a Swin, has the depth of the block before it.
    """
    numbers = {block: number for number, block in enumerate(chain.from_iterable(block_stacks(model)), 1)}
    prefixes = {f"{name}.": numbers[part] for name, part in model.named_modules() if part in numbers}
    names = [name for name, _ in model.named_parameters()]
    inside = [next((d for prefix, d in prefixes.items() if name.startswith(prefix)), 0) for name in names]
    reached = accumulate(inside, max)
    return {
        name: len(numbers) + 1 if not own and so_far == len(numbers) else own or so_far
        for name, own, so_far in zip(names, inside, reached, strict=True)
    }


def freeze_first(model: nn.Module, count: int) -> None:
    """Freeze the first `count` blocks and what comes before them: the embedding of patches and positions.

    Raises UsageError if there are not so many.
    """
    blocks = sum(len(stack) for stack in block_stacks(model))
    if count > blocks:
        raise UsageError(
            f"freeze {count}: this model has {counted(blocks, 'block')}; give at most {blocks}, or backbone."
        )
    depths = parameter_depths(model)
    for name, parameter in model.named_parameters():
        if depths[name] <= count and not in_head(model, name):
            parameter.requires_grad_(False)


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Its batch norms, of any number of dimensions."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def normalizing(norms: Sequence[nn.Module], images: int) -> Iterator[None]:
    """Within this context, batch norms use their running statistics if a pass has one image, which is no batch.

    Where that has one value per channel, it has no variance, and torch refuses it.
    """
    trained = [norm for norm in norms if norm.training] if images == 1 else []
    for norm in trained:
        norm.eval()
    try:
        yield
    finally:
        for norm in trained:
            norm.train()


def frozen_parts(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parameters, none of which is trained."""
    trained = [parameter.requires_grad for parameter in model.parameters()]
    if trained and not any(trained):
        yield model
    elif trained:
        for child in model.children():
            yield from frozen_parts(child)
