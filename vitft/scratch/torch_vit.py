"""The same model as torch modules: autograd computes what the other chapters work out by hand.

Parameters have the shapes of the NumPy arrays and almost their names. `TorchViT.load` and `TorchViT.weights` convert
between the two.
"""

from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitft.scratch.embedding import fixed_positions
from vitft.scratch.tensors import Watch, no_watch
from vitft.scratch.vit import ViT, array_shapes, from_named_arrays, named_arrays
from vitft.spec import ViTSpec


class Watched(nn.Module):
    """A module that passes its stages to a hook, under the names of `vitft.spec.stages`."""

    watch: Watch = staticmethod(no_watch)
    stage = ""

    def show(self, name: str, x: Tensor) -> Tensor:
        """Pass a stage's tensor to the hook, and return it."""
        if self.watch is not no_watch:
            self.watch(f"{self.stage}{name}", x.detach().numpy(force=True))
        return x


class Embedding(Watched):
    """A convolution, the class token, and the positions: images (B, C, H, W) to tokens (B, N, D)."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        patch = (spec.patch_height, spec.patch_width)
        stride = (spec.stride_height, spec.stride_width)
        self.projection = nn.Conv2d(spec.channels, spec.width, patch, stride, spec.padding)
        self.class_token = nn.Parameter(torch.zeros(spec.prefix_tokens, spec.width)) if spec.prefix_tokens else None
        if spec.positions == "learned":
            self.positions = nn.Parameter(torch.zeros(spec.tokens, spec.width))
        else:
            fixed = torch.from_numpy(fixed_positions(spec))
            self.register_buffer("positions", fixed, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, N, D)."""
        x = self.show("embed.projection", self.projection(self.show("image", images)))
        x = self.show("embed.patches", x.flatten(2).transpose(1, 2))
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
            self.show("embed.class_token", x)
        return self.show("embed.positions", x + self.positions.to(x.dtype))


class Attention(Watched):
    """Multi-head self-attention. It computes the attention weights (B, A, N, N) explicitly, so they can be shown."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.width, 3 * spec.width, bias=spec.qkv_bias)
        self.output = nn.Linear(spec.width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        b, n, d = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(0, 2, 3, 1, 4)
        q, k, v = self.show("qkv", qkv).unbind(dim=1)
        scores = self.show("scores", q @ k.mT / sqrt(d // self.heads))
        mixed = self.show("softmax", scores.softmax(dim=-1)) @ v
        return self.show("output", self.output(self.show("mix", mixed.transpose(1, 2).reshape(b, n, d))))


class MLP(Watched):
    """Two linear layers with an activation between them, applied to each token on its own."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(spec.width, spec.mlp), nn.Linear(spec.mlp, spec.width)
        self.activation: nn.Module = nn.ReLU()
        if spec.activation != "relu":
            self.activation = nn.GELU("tanh" if spec.activation == "gelu_tanh" else "none")

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.show("out", self.outer(self.show("activation", self.activation(self.show("in", self.inner(x))))))


class Residual(Watched):
    """Attention or MLP with its norm and its residual connection: x + f(norm(x)), or post-norm, norm(x + f(x))."""

    def __init__(self, sublayer: Watched, spec: ViTSpec) -> None:
        super().__init__()
        self.sublayer, self.pre = sublayer, spec.norm == "pre"
        self.norm = nn.LayerNorm(spec.width, eps=spec.norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D); `mask` is the dropout mask of the sublayer's output."""
        y = self.sublayer(self.show("norm", self.norm(x)) if self.pre else x)
        x = self.show("residual", x + (y if mask is None else y * mask))
        return x if self.pre else self.show("norm", self.norm(x))


class Block(nn.Module):
    """An encoder block: attention, then the MLP."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.attention, self.mlp = Residual(Attention(spec), spec), Residual(MLP(spec), spec)

    def forward(self, x: Tensor, masks: list[Tensor] | None) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        attention_mask, mlp_mask = masks or (None, None)
        y: Tensor = self.mlp(self.attention(x, attention_mask), mlp_mask)
        return y


class TorchViT(Watched):
    """The ViT of any `ViTSpec`: images (B, C, H, W) to logits (B, classes)."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = Embedding(spec)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width, eps=spec.norm_eps) if spec.final_norm else None
        self.pre_logits = nn.Linear(spec.width, spec.pre_logits) if spec.pre_logits else None
        self.logits = nn.Linear(spec.pre_logits or spec.width, spec.classes)

    def forward(self, images: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        """(B, C, H, W) to (B, classes). `masks` are those of `vit.dropout_masks`: one, and two for each block."""
        x = self.embedding(images)
        if masks:
            x = x * masks[0]
        for i, block in enumerate(self.blocks):
            x = block(x, masks[2 * i + 1 : 2 * i + 3] if masks else None)
        if self.norm is not None:
            x = self.show("norm", self.norm(x))
        x = x[:, 0] if self.spec.pooling == "cls" else x[:, self.spec.prefix_tokens :].mean(dim=1)
        self.show("pool", x)
        if self.pre_logits is not None:
            x = self.show("pre_logits", torch.tanh(self.pre_logits(x)))
        return self.show("head", self.logits(x))

    def watched_by(self, watch: Watch) -> "TorchViT":
        """Call `watch` with every stage of every forward pass from now on; returns self."""
        for name, module in self.named_modules():
            if isinstance(module, Watched):
                module.watch = watch
                path = name.split(".")
                if path[0] == "blocks" and len(path) > 2:
                    module.stage = f"block.{int(path[1]) + 1}.{path[2]}."
        return self

    def load(self, w: ViT) -> "TorchViT":
        """Copy the weights of the NumPy model, in their dtype; returns self."""
        arrays = {_torch_name(name): torch.from_numpy(np.array(array)) for name, array in named_arrays(w)}
        self.to(next(iter(arrays.values())).dtype).load_state_dict(arrays)
        return self

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Every parameter, under the name that `vit.named_arrays` gives it."""
        parameters = dict(self.named_parameters())
        return {name: parameters[_torch_name(name)] for name in array_shapes(self.spec)}

    def weights(self, *, gradients: bool = False) -> ViT:
        """The weights as NumPy arrays, or their gradients; a parameter without a gradient gives zeros."""

        def array(parameter: nn.Parameter) -> Any:
            tensor = parameter.grad if gradients else parameter
            return np.zeros(parameter.shape) if tensor is None else tensor.numpy(force=True).copy()

        arrays = {name: array(parameter) for name, parameter in self.parameters_by_name().items()}
        return from_named_arrays(arrays, self.spec)


def _torch_name(name: str) -> str:
    for part in ("attention", "mlp"):
        name = name.replace(f".{part}.", f".{part}.sublayer.").replace(f".{part}_norm.", f".{part}.norm.")
    return name.removeprefix("head.").replace(".scale", ".weight").replace(".shift", ".bias")
