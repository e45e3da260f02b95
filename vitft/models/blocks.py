"""The repeated blocks of a model, in any architecture, found by structure instead of names."""

from itertools import accumulate, chain

from torch import nn


def block_stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of blocks of one type, in order; of nested ones (the stages of a Swin) the innermost."""
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len({*map(type, part)}) == 1]
    return [stack for stack in stacks if not any(part in stacks for part in stack.modules() if part is not stack)]


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
