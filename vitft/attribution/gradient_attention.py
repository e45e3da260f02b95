"""Attention weights by how much a class depends on them, through all blocks (Chefer et al. 2021).

"Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers", ICCV 2021,
section 3.1: attention says where a token looks, its gradient whether that speaks for the class.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from vitft.io.library_logs import quiet_transformers
from vitft.models.blocks import block_stacks

_RECORDED = "vitft_recorded"


def relevance(weights: Sequence[Tensor], gradients: Sequence[Tensor], read: Tensor) -> Tensor:
    """How much each token speaks for the class: (B, N), at least 0.

    R starts as the identity; each block adds Ā R, where Ā is the mean over the heads of (∇A ⊙ A)⁺ (eq. 5 and 6). The
    identity itself, which is the same for every class, does not count in the end.

    Args:
        weights: attention weights A of each block, (B, heads, N, N).
        gradients: of the class's logit with respect to them.
        read: how much the head reads of each last token, (B, N): 1 for the class token and 0 elsewhere, or 1 / N.
    """
    tokens = weights[0].shape[-1]
    through = torch.eye(tokens, device=read.device).expand(len(read), tokens, tokens)
    for weight, gradient in zip(weights, gradients, strict=True):
        through = through + (weight * gradient).clamp(min=0).mean(dim=1) @ through
    return torch.einsum("bn,bnm->bm", read, through) - read


def gradient_attention(model: Any, pixels: Tensor, classes: Tensor) -> Tensor | None:
    """Maps (B, rows, columns) of how much each patch speaks for a class; None if patches do not keep their places.

    Works for every ViT of Transformers that computes attention between all patches, whatever its head reads: a class
    token, the mean of the patches, or both. A last token counts by the length of the logit's gradient with respect to
    it; with a class token that gives the paper's map.

    Args:
        model: a Transformers image classifier, in evaluation mode.
        pixels: its input, (B, C, H, W).
        classes: of each image, the class, (B,).
    """
    stacks = block_stacks(model) if isinstance(model, nn.Module) else []
    if len(stacks) != 1 or (patch := patch_size(model)) is None:
        return None
    last: list[Tensor] = []
    handle = stacks[0][-1].register_forward_hook(
        lambda _block, _given, out: last.append(out if isinstance(out, Tensor) else out[0])
    )
    try:
        with torch.enable_grad(), _recorded(model) as weights:
            logits = model(pixel_values=pixels.detach().requires_grad_()).logits.float()
    finally:
        handle.remove()
    rows, columns = pixels.shape[-2] // patch[0], pixels.shape[-1] // patch[1]
    if len(weights) != len(stacks[0]) or len(last) != 1 or last[0].ndim != 3:
        return None
    tokens = last[0].shape[1]
    if tokens < rows * columns or any(
        one.shape[:1] + one.shape[2:] != (len(pixels), tokens, tokens) for one in weights
    ):
        return None
    chosen = logits.gather(1, classes.to(logits.device)[:, None]).sum()
    *gradients, slope = torch.autograd.grad(chosen, [*weights, last[0]])
    read = slope.norm(dim=2)
    read = read / read.sum(dim=1, keepdim=True).clamp(min=torch.finfo(read.dtype).tiny)
    found = relevance([one.detach() for one in weights], gradients, read)
    return found[:, tokens - rows * columns :].reshape(-1, rows, columns)


def patch_size(model: Any) -> tuple[int, int] | None:
    """Height and width of a patch in pixels, as the model's configuration has them; None if it has none."""
    config = model.config
    found = getattr(getattr(config, "vision_config", None) or config, "patch_size", None)
    if isinstance(found, int):
        return found, found
    return (found[0], found[1]) if isinstance(found, list | tuple) and len(found) == 2 else None


@contextmanager
def _recorded(model: Any) -> Iterator[list[Tensor]]:
    """Within, the model computes attention weights explicitly, and they are listed: (B, heads, N, N) of each block."""
    weights: list[Tensor] = []

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None,
        **_options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        weights.append((scores if mask is None else scores + mask).softmax(dim=-1))
        return (weights[-1] @ value).transpose(1, 2).contiguous(), weights[-1]

    before = model.config._attn_implementation
    AttentionInterface.register(_RECORDED, attention)
    with quiet_transformers():
        model.set_attn_implementation(_RECORDED)
    try:
        yield weights
    finally:
        with quiet_transformers():
            model.set_attn_implementation(before)
