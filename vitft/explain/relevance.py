"""Where the image speaks for a class: the gradients of the attention weights, worked out from the chapters' stages."""

from typing import cast

import torch
from torch import Tensor

from vitft.attribution.gradient_attention import relevance
from vitft.scratch.tensors import Array
from vitft.scratch.torch_vit import Block, TorchViT


def class_relevance(network: TorchViT, images: Tensor, classes: list[int]) -> Array:
    """How much each patch of one image speaks for each class: (classes, rows, columns), at least 0.

    The heads' outputs are A V, so the gradient of a logit with respect to A is that with respect to A V, times Vᵀ.
    """
    spec = network.spec
    mixed: list[Tensor] = []
    stages: dict[str, Tensor] = {}
    network.watched_by(lambda name, array: stages.update({name: torch.from_numpy(array)}))
    outputs = [cast(Block, block).attention.sublayer.get_submodule("output") for block in network.blocks]
    handles = [output.register_forward_pre_hook(lambda _module, given: mixed.append(given[0])) for output in outputs]
    try:
        with torch.enable_grad():
            logits = network(images)
    finally:
        for handle in handles:
            handle.remove()
    layers = range(1, spec.layers + 1)
    weights = [stages[f"block.{layer}.attention.softmax"] for layer in layers]
    values = [stages[f"block.{layer}.attention.qkv"][:, 2] for layer in layers]
    read = torch.zeros(1, spec.tokens)
    if spec.pooling == "cls":
        read[:, 0] = 1
    else:
        read[:, spec.prefix_tokens :] = 1 / spec.patches
    maps = []
    for label in classes:
        slopes = torch.autograd.grad(logits[0, label], mixed, retain_graph=True)
        by_head = [slope.view(1, spec.tokens, spec.heads, spec.head_width).transpose(1, 2) for slope in slopes]
        gradients = [slope @ value.mT for slope, value in zip(by_head, values, strict=True)]
        found = relevance(weights, gradients, read)[0, spec.prefix_tokens :]
        maps.append(found.reshape(spec.grid))
    result: Array = torch.stack(maps).numpy()
    return result
