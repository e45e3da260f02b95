"""The same model as torch modules: what the chapters compute by hand, autograd does here.

Parameters have the shapes of the NumPy bundle's arrays and almost their names; `TorchViT.load` and
`TorchViT.weights` carry them over.
"""

from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitft.scratch.embedding import fixed_positions
from vitft.scratch.tensors import Watch, unwatched
from vitft.scratch.vit import ViT, filled, named, shapes
from vitft.spec import ViTSpec


class Watched(nn.Module):
    """A module that shows its stages to a hook, under the names of `vitft.spec.stages`."""

    watch: Watch = staticmethod(unwatched)
    stage = ""

    def show(self, name: str, x: Tensor) -> Tensor:
        """Hand a stage's tensor to the hook, and on."""
        if self.watch is not unwatched:
            self.watch(f"{self.stage}{name}", x.detach().numpy(force=True))
        return x


class Embedding(Watched):
    """Images (B, C, H, W) to tokens (B, N, D): a convolution, the class token, the positions."""

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
        """The sequence that the blocks read."""
        x = self.show("embed.projection", self.projection(self.show("image", images)))
        x = self.show("embed.patches", x.flatten(2).transpose(1, 2))
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
            self.show("embed.class_token", x)
        return self.show("embed.positions", x + self.positions.to(x.dtype))


class Attention(Watched):
    """Multi-head self-attention; the shares (B, A, N, N) are made, so that they can be looked at."""

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
        self.found = mixed.detach()  # (B, A, N, K): of each head by itself
        return self.show("output", self.output(self.show("mix", mixed.transpose(1, 2).reshape(b, n, d))))


class MLP(Watched):
    """Each token by itself, widened, bent and narrowed again."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(spec.width, spec.mlp), nn.Linear(spec.mlp, spec.width)
        self.activation: nn.Module = nn.ReLU()
        if spec.activation != "relu":
            self.activation = nn.GELU("tanh" if spec.activation == "gelu_tanh" else "none")

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        return self.show("out", self.outer(self.show("activation", self.activation(self.show("in", self.inner(x))))))


class Part(Watched):
    """Attention or MLP, with its norm and its sum: x + part(norm(x)), or norm(x + part(x))."""

    def __init__(self, part: Watched, spec: ViTSpec) -> None:
        super().__init__()
        self.part, self.pre = part, spec.norm == "pre"
        self.norm = nn.LayerNorm(spec.width, eps=spec.norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) to (B, N, D); `mask` is dropout's, of what the part adds."""
        added = self.part(self.show("norm", self.norm(x)) if self.pre else x)
        x = self.show("residual", x + (added if mask is None else added * mask))
        return x if self.pre else self.show("norm", self.norm(x))


class Block(nn.Module):
    """An encoder block: two parts."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.attention, self.mlp = Part(Attention(spec), spec), Part(MLP(spec), spec)

    def forward(self, x: Tensor, masks: list[Tensor] | None) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        drop_attention, drop_mlp = masks or (None, None)
        y: Tensor = self.mlp(self.attention(x, drop_attention), drop_mlp)
        return y


class TorchViT(Watched):
    """Images (B, C, H, W) to logits (B, classes), of any `ViTSpec`."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = Embedding(spec)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width, eps=spec.norm_eps) if spec.final_norm else None
        self.pre_logits = nn.Linear(spec.width, spec.pre_logits) if spec.pre_logits else None
        self.logits = nn.Linear(spec.pre_logits or spec.width, spec.classes)

    def forward(self, images: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        """`masks` are the NumPy chapters' dropout masks: one of the embedding, two of each block."""
        x = self.embedding(images)
        if masks:
            x = x * masks[0]
        for number, block in enumerate(self.blocks):
            x = block(x, masks[2 * number + 1 : 2 * number + 3] if masks else None)
        if self.norm is not None:
            x = self.show("norm", self.norm(x))
        x = x[:, 0] if self.spec.pooling == "cls" else x[:, self.spec.prefix_tokens :].mean(dim=1)
        self.show("pool", x)
        if self.pre_logits is not None:
            x = self.show("pre_logits", torch.tanh(self.pre_logits(x)))
        return self.show("head", self.logits(x))

    def watched_by(self, watch: Watch) -> "TorchViT":
        """Show every stage of every forward pass to `watch`."""
        for name, module in self.named_modules():
            if isinstance(module, Watched):
                module.watch = watch
                step = name.split(".")
                if step[0] == "blocks" and len(step) > 2:
                    module.stage = f"block.{int(step[1]) + 1}.{step[2]}."
        return self

    def attention_output(self, x: Tensor, layer: int, head: int) -> Tensor:
        """What one head of one layer (both from 1) found in images x: (B, N, K), before the heads are joined."""
        for what, number, most in (("layer", layer, self.spec.layers), ("head", head, self.spec.heads)):
            if not 1 <= number <= most:
                raise IndexError(f"{what} {number} is not in 1 to {most}")
        self(x)
        attention = self.get_submodule(f"blocks.{layer - 1}.attention.part")
        assert isinstance(attention, Attention)
        return attention.found[:, head - 1]

    def load(self, w: ViT) -> "TorchViT":
        """Take the weights of a NumPy bundle, in their dtype."""
        arrays = {_torch_name(name): torch.from_numpy(np.array(array)) for name, array in named(w)}
        self.to(next(iter(arrays.values())).dtype).load_state_dict(arrays)
        return self

    def paths(self) -> dict[str, nn.Parameter]:
        """Every parameter under its path in the NumPy bundle, as `vit.named` has it."""
        ours = dict(self.named_parameters())
        return {name: ours[_torch_name(name)] for name in shapes(self.spec)}

    def weights(self, *, gradients: bool = False) -> ViT:
        """The NumPy bundle of the weights, or of their gradients (of none: zeros)."""

        def array(parameter: nn.Parameter) -> Any:
            found = parameter.grad if gradients else parameter
            return np.zeros(parameter.shape) if found is None else found.numpy(force=True).copy()

        return filled({name: array(parameter) for name, parameter in self.paths().items()}, self.spec)


def _torch_name(name: str) -> str:
    for part in ("attention", "mlp"):
        name = name.replace(f".{part}.", f".{part}.part.").replace(f".{part}_norm.", f".{part}.norm.")
    return name.removeprefix("head.").replace(".scale", ".weight").replace(".shift", ".bias")
