"""The arithmetic of a Vision Transformer: shapes, parameters, FLOPs and memory of each stage.

Pure integers, no torch: an answer takes milliseconds. The architecture is that of Dosovitskiy et al.
2020 ("An Image is Worth 16x16 Words", eq. 1-4) as Transformers' ViTForImageClassification builds it;
DeiT's distillation token (Touvron et al. 2020, section 4) is a second prefix token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal, get_args, get_origin

from vitft.errors import ModelError, UsageError, nearest

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTSpec:
    """The sizes that define a ViT. Images, patches, strides and padding are in pixels.

    A stride below the patch's side makes patches overlap. `prefix_tokens` stand before the patch
    tokens: 1 class token, 2 for DeiT, 0 only with mean pooling. `pooling` "cls" reads the first token,
    "mean" averages the patch tokens. `pre_logits` is the width of a tanh layer before the head.
    `norm` "pre" normalises what a block's parts read, "post" the sums they are added to (Vaswani et al.
    2017). "gelu" is the exact one, by erf; "gelu_tanh" its approximation (Hendrycks & Gimpel 2016).

    Raises UsageError, with the numbers and a remedy, where the sizes do not fit together.
    """

    image_height: int
    image_width: int
    patch_height: int
    patch_width: int
    stride_height: int
    stride_width: int
    padding: int = 0
    channels: int = 3
    width: int
    heads: int
    layers: int
    mlp: int
    classes: int
    pooling: Literal["cls", "mean"] = "cls"
    pre_logits: int | None = None
    prefix_tokens: int = 1
    qkv_bias: bool = True
    positions: Literal["learned", "sinusoidal", "sinusoidal_2d"] = "learned"
    norm: Literal["pre", "post"] = "pre"
    final_norm: bool = True
    norm_eps: float = 1e-12
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if get_origin(field.type) is Literal:
                choices = get_args(field.type)
                if value not in choices:
                    raise UsageError(f"{field.name} {value!r} is unknown; try {' or '.join(choices)}.")
            elif field.type is int or (field.name == "pre_logits" and value is not None):
                _check_count(field.name, value)
        if not self.norm_eps >= 0:
            raise UsageError(f"norm_eps must be at least 0, got {self.norm_eps}; try 1e-12.")
        if self.pooling == "cls" and self.prefix_tokens == 0:
            raise UsageError("pooling cls needs a class token, got prefix_tokens 0; try 1, or pooling mean.")
        for axis in ("height", "width"):
            self._check_axis(axis)
        if self.width % self.heads:
            below = self.width // self.heads * self.heads
            options = f"{below} or {below + self.heads}" if below else f"{self.heads}"
            raise UsageError(f"width {self.width} is not a multiple of heads {self.heads}; try {options}.")

    def _check_axis(self, axis: str) -> None:
        """Every pixel must fall into a patch, and every patch must hold a pixel."""
        image, patch, stride = (getattr(self, f"{part}_{axis}") for part in ("image", "patch", "stride"))
        square = self.image_height == self.image_width and self.patch_height == self.patch_width
        of_image, of_patch = (f"{part}_{'size' if square else axis}" for part in ("image", "patch"))
        if stride > patch:
            got = f"stride_{axis} {stride} is above {of_patch} {patch}"
            raise UsageError(f"{got}, so pixels between patches are lost; try {patch}.")
        if self.padding >= patch:
            got = f"padding {self.padding} is not below {of_patch} {patch}"
            raise UsageError(f"{got}, so a patch would hold no pixel; try {patch // 2}.")
        smallest = patch - 2 * self.padding
        # The far padding may stay outside of all patches; pixels may not.
        if image >= smallest and (image - smallest) % stride <= self.padding:
            return
        steps = max((image - smallest) // stride, 0)
        fitting = sorted({smallest + steps * stride, smallest + (image > smallest) * (steps + 1) * stride})
        options = " or ".join(str(size) for size in fitting if size > 0)
        if stride == patch and not self.padding:
            raise UsageError(f"{of_image} {image} is not a multiple of {of_patch} {patch}; try {options}.")
        cut = f"{of_patch} {patch}, stride_{axis} {stride} and padding {self.padding}"
        raise UsageError(f"{of_image} {image} does not fit {cut}; try {options}.")

    # fmt: off
    @classmethod
    def square(
        cls, image_size: int, patch_size: int, width: int, layers: int, heads: int, mlp: int, classes: int,
        pre_logits: int | None = None, channels: int = 3,
    ) -> "ViTSpec":
        """A ViT of square images cut into square patches that touch and do not overlap."""
        return cls(
            image_height=image_size, image_width=image_size, patch_height=patch_size, patch_width=patch_size,
            stride_height=patch_size, stride_width=patch_size, channels=channels, width=width, heads=heads,
            layers=layers, mlp=mlp, classes=classes, pre_logits=pre_logits,
        )
    # fmt: on

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows = (self.image_height + 2 * self.padding - self.patch_height) // self.stride_height + 1
        columns = (self.image_width + 2 * self.padding - self.patch_width) // self.stride_width + 1
        return rows, columns

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return prod(self.grid)

    @property
    def tokens(self) -> int:
        """Tokens of one image: its patches and the prefix tokens."""
        return self.patches + self.prefix_tokens

    @property
    def head_width(self) -> int:
        """Length of one head's query, key and value vectors."""
        return self.width // self.heads


def _check_count(name: str, value: Any) -> None:
    """Raise UsageError unless value is a count that the field of this name can have."""
    least = 0 if name in ("padding", "prefix_tokens") else 1
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}; try {least}.")


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the forward pass, of a whole batch.

    `input` and `output` are shapes; `flops` are floating-point operations, `activation_bytes` the
    float32 bytes of the output that stay in memory until the backward pass.
    """

    name: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    parameters: int
    flops: int
    activation_bytes: int


def stages(spec: ViTSpec, batch_size: int = 1) -> list[Stage]:
    """All stages from pixels to logits, in order; each stage's input is the output of the one before.

    Shapes start with the batch; `attention.qkv` gives (B, 3, A, N, K), the scores are (B, A, N, N).

    FLOPs count matrix products alone, 2*m*n*k each, with the patch convolution as one: as
    torch.utils.flop_counter counts eager attention. Norms, softmax, GELU, biases and sums count 0.

    Activation bytes count an output where autograd keeps it in eager float32: as the operand of a
    product or a norm, or as the result of a softmax or tanh. Other outputs and views count 0; so do
    the two statistics a layer norm keeps of each token. Fused attention does not keep the softmax.

    Raises UsageError for a batch below 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}; try 1.")
    b, n, d, m = batch_size, spec.tokens, spec.width, spec.mlp
    a, k = spec.heads, spec.head_width
    image = (b, spec.channels, spec.image_height, spec.image_width)
    patch_values = spec.channels * spec.patch_height * spec.patch_width
    tokens, scores = (b, n, d), (b, a, n, n)
    found: list[Stage] = []

    def add(name: str, output: tuple[int, ...], *, parameters: int = 0, flops: int = 0, kept: bool = False) -> None:
        shape_in = found[-1].output if found else output
        kept_bytes = FLOAT32_BYTES * prod(output) if kept else 0
        found.append(Stage(name, shape_in, output, parameters, flops, kept_bytes))

    def add_linear(name: str, rows: int, fan_in: int, output: tuple[int, ...], *, kept: bool = False) -> None:
        fan_out = output[-1]
        add(name, output, parameters=(fan_in + 1) * fan_out, flops=2 * rows * fan_in * fan_out, kept=kept)

    add("image", image, kept=True)
    add(
        "embed.projection",
        (b, d, *spec.grid),
        parameters=(patch_values + 1) * d,
        flops=2 * b * spec.patches * patch_values * d,
    )
    add("embed.patches", (b, spec.patches, d))  # a view: the grid laid out as a sequence
    if spec.prefix_tokens:
        add("embed.class_token", tokens, parameters=spec.prefix_tokens * d)
    add("embed.positions", tokens, parameters=n * d if spec.positions == "learned" else 0, kept=True)
    for block in range(1, spec.layers + 1):
        attention, mlp = f"block.{block}.attention", f"block.{block}.mlp"
        if spec.norm == "pre":
            add(f"{attention}.norm", tokens, parameters=2 * d, kept=True)
        add(
            f"{attention}.qkv",
            (b, 3, a, n, k),
            parameters=3 * (d + spec.qkv_bias) * d,
            flops=3 * 2 * b * n * d * d,
            kept=True,
        )
        add(f"{attention}.scores", scores, flops=2 * b * a * n * n * k)
        add(f"{attention}.softmax", scores, kept=True)
        add(f"{attention}.mix", tokens, flops=2 * b * a * n * n * k, kept=True)
        add_linear(f"{attention}.output", b * n, d, tokens)
        add(f"{attention}.residual", tokens, kept=True)
        between = attention if spec.norm == "post" else mlp
        add(f"{between}.norm", tokens, parameters=2 * d, kept=True)
        add_linear(f"{mlp}.in", b * n, d, (b, n, m), kept=True)
        add(f"{mlp}.activation", (b, n, m), kept=True)
        add_linear(f"{mlp}.out", b * n, m, tokens)
        add(f"{mlp}.residual", tokens, kept=True)
        if spec.norm == "post":
            add(f"{mlp}.norm", tokens, parameters=2 * d, kept=True)
    # The class token is a view that keeps the whole normed sequence alive; a mean is a tensor of its own.
    if spec.final_norm:
        add("norm", tokens, parameters=2 * d, kept=spec.pooling == "cls")
    add("pool", (b, d), kept=spec.pooling == "mean")
    if spec.pre_logits is not None:
        add_linear("pre_logits", b, d, (b, spec.pre_logits), kept=True)
    add_linear("head", b, spec.pre_logits or d, (b, spec.classes))
    return found


def total(spec: ViTSpec, batch_size: int = 1) -> Stage:
    """The whole forward pass as one stage named "total": image in, logits out, the sums of `stages`."""
    every = stages(spec, batch_size)
    return Stage(
        "total",
        every[0].input,
        every[-1].output,
        sum(stage.parameters for stage in every),
        sum(stage.flops for stage in every),
        sum(stage.activation_bytes for stage in every),
    )


def kept_bytes(spec: ViTSpec, batch_size: int = 1, *, checkpointed: bool = False) -> int:
    """Bytes that stay in memory for the backward pass, at most.

    `checkpointed`: each block keeps only what it reads, and one at a time is computed again, whole
    (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """
    every = stages(spec, batch_size)
    kept = sum(stage.activation_bytes for stage in every)
    if not checkpointed:
        return kept
    in_blocks = sum(stage.activation_bytes for stage in every if stage.name.startswith("block."))
    read = FLOAT32_BYTES * batch_size * spec.tokens * spec.width
    return kept - in_blocks + spec.layers * read + in_blocks // spec.layers


def training_flops(spec: ViTSpec, batch_size: int = 1) -> int:
    """FLOPs of one training step, 3 x forward: each product has two of its size in the backward pass.

    The convention of model FLOPs utilisation (Chowdhery et al. 2022, "PaLM", appendix B); the image's
    own gradient, which no one computes, is within it.
    """
    return 3 * total(spec, batch_size).flops


# Rows of (image side, patch side, width, layers, heads, mlp, classes): Table 1 of Dosovitskiy et al.
# 2020, tiny and small of Touvron et al. 2020, and our own micro, which learns in minutes on a laptop.
PRESETS: dict[str, ViTSpec] = {
    "vit-micro": ViTSpec.square(28, 4, 64, 4, 4, 256, 10),
    "vit-tiny-patch16-224": ViTSpec.square(224, 16, 192, 12, 3, 768, 1000),
    "vit-small-patch16-224": ViTSpec.square(224, 16, 384, 12, 6, 1536, 1000),
    "vit-small-patch14-224": ViTSpec.square(224, 14, 384, 12, 6, 1536, 1000),
    "vit-base-patch16-224": ViTSpec.square(224, 16, 768, 12, 12, 3072, 1000),
    "vit-base-patch32-224": ViTSpec.square(224, 32, 768, 12, 12, 3072, 1000),
    "vit-large-patch16-224": ViTSpec.square(224, 16, 1024, 24, 16, 4096, 1000),
    "vit-huge-patch14-224": ViTSpec.square(224, 14, 1280, 32, 16, 5120, 1000),
}
PRESETS |= {
    "vit-tiny": PRESETS["vit-tiny-patch16-224"],
    "vit-small": PRESETS["vit-small-patch16-224"],
    "vit-base": PRESETS["vit-base-patch16-224"],
    "vit-large": PRESETS["vit-large-patch16-224"],
    "vit-huge": PRESETS["vit-huge-patch14-224"],
}


def preset(name: str) -> ViTSpec:
    """The ViTSpec of this name in PRESETS; raises UsageError naming the nearest."""
    if name in PRESETS:
        return PRESETS[name]
    hint = nearest(name, PRESETS) or f"; try one of {', '.join(PRESETS)}."
    raise UsageError(f"unknown preset {name!r}{hint}")


_PREFIX_TOKENS = {"vit": 1, "deit": 2}
_ACTIVATIONS: dict[Any, Literal["gelu", "gelu_tanh", "relu"]] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip


def spec_from_config(config: Mapping[str, Any]) -> ViTSpec:
    """The sizes in a Transformers config.json of model_type vit or deit, as its ForImageClassification.

    Keys that are left out have Transformers' defaults. DeiT is counted with one head: the second,
    distilled head of DeiTForImageClassificationWithTeacher is not fine-tuned.

    Raises ModelError for an architecture that is no plain ViT and for sizes that do not fit together.
    """
    kind = config.get("model_type")
    if kind not in tuple(_PREFIX_TOKENS):  # a tuple, for what a config holds need not be hashable
        raise ModelError(f"no stage table for this architecture: {kind}; plain ViTs (vit, deit) have one.")
    if (activation := config.get("hidden_act", "gelu")) not in tuple(_ACTIVATIONS):
        raise ModelError(f"no stage table for the activation {activation}; {', '.join(_ACTIVATIONS)} have one.")
    labels = config.get("id2label")
    image_height, image_width = _pair(config.get("image_size", 224))
    patch_height, patch_width = _pair(config.get("patch_size", 16))
    try:
        return ViTSpec(
            image_height=image_height,
            image_width=image_width,
            patch_height=patch_height,
            patch_width=patch_width,
            stride_height=patch_height,
            stride_width=patch_width,
            channels=config.get("num_channels", 3),
            width=config.get("hidden_size", 768),
            heads=config.get("num_attention_heads", 12),
            layers=config.get("num_hidden_layers", 12),
            mlp=config.get("intermediate_size", 3072),
            classes=len(labels) if labels else config.get("num_labels", 2),
            prefix_tokens=_PREFIX_TOKENS[kind],
            qkv_bias=bool(config.get("qkv_bias", True)),
            norm_eps=config.get("layer_norm_eps", 1e-12),
            activation=_ACTIVATIONS[activation],
        )
    except UsageError as error:
        raise ModelError(f"unusable {kind} config: {error}") from None


def _pair(size: Any) -> tuple[Any, Any]:
    """(height, width) of a config's size: one number or two. What they are, ViTSpec checks."""
    return (size[0], size[1]) if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
