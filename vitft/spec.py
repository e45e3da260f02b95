"""The arithmetic of a Vision Transformer: shapes, parameters, FLOPs and activation memory of each stage.

Integer arithmetic only, without torch, so an answer takes milliseconds. The architecture is that of Dosovitskiy et
al. 2020 ("An Image is Worth 16x16 Words", eq. 1-4) as Transformers' ViTForImageClassification implements it. DeiT's
distillation token (Touvron et al. 2020, section 4) is a second prefix token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal, get_args, get_origin

from vitft.errors import ModelError, UsageError, nearest

FLOAT32_BYTES = 4

MOST_LAYERS, MOST_CLASSES = 1000, 1_000_000
"""Far above any real model: each layer is several stages, and each class a name, so more could use up all memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTSpec:
    """The sizes that define a ViT. Images, patches, strides and padding are in pixels.

    A stride smaller than the patch makes patches overlap. `prefix_tokens` precede the patch tokens: 1 class token, 2
    for DeiT, 0 only with mean pooling. `pooling` "cls" reads the first token, "mean" averages the patch tokens.
    `pre_logits` is the width of a tanh layer before the head. `norm` "pre" normalizes the inputs of attention and MLP,
    "post" their sums with the residual (Vaswani et al. 2017). "gelu" is the exact GELU, "gelu_tanh" its tanh
    approximation (Hendrycks & Gimpel 2016).

    Raises UsageError, with the numbers and a remedy, if the sizes are inconsistent, or far above any real model's.
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
        if not isinstance(self.norm_eps, int | float) or not self.norm_eps >= 0:
            raise UsageError(f"norm_eps must be at least 0, got {self.norm_eps!r}; try 1e-12.")
        if self.pooling == "cls" and self.prefix_tokens == 0:
            raise UsageError("pooling cls needs a class token, got prefix_tokens 0; try 1, or pooling mean.")
        for axis in ("height", "width"):
            self._check_axis(axis)
        if self.width % self.heads:
            below = self.width // self.heads * self.heads
            options = f"{below} or {below + self.heads}" if below else f"{self.heads}"
            raise UsageError(f"width {self.width} is not a multiple of heads {self.heads}; try {options}.")

    def _check_axis(self, axis: str) -> None:
        """Raise UsageError unless every pixel is in a patch and every patch has a pixel, along "height" or "width"."""
        image, patch, stride = (getattr(self, f"{name}_{axis}") for name in ("image", "patch", "stride"))
        square = self.image_height == self.image_width and self.patch_height == self.patch_width
        image_name, patch_name = (f"{name}_{'size' if square else axis}" for name in ("image", "patch"))
        if stride > patch:
            raise UsageError(
                f"stride_{axis} {stride} is larger than {patch_name} {patch}, which skips pixels; try {patch}."
            )
        if self.padding >= patch:
            raise UsageError(
                f"padding {self.padding} must be smaller than {patch_name} {patch}, or a patch has no pixel; "
                f"try {patch // 2}."
            )
        smallest = patch - 2 * self.padding
        # Patches may leave out padding at the far edge, but no pixels.
        if image >= smallest and (image - smallest) % stride <= self.padding:
            return
        steps = max((image - smallest) // stride, 0)
        sizes = sorted({smallest + steps * stride, smallest + (image > smallest) * (steps + 1) * stride})
        options = " or ".join(str(size) for size in sizes if size > 0)
        if stride == patch and not self.padding:
            raise UsageError(f"{image_name} {image} is not a multiple of {patch_name} {patch}; try {options}.")
        patches = f"{patch_name} {patch}, stride_{axis} {stride} and padding {self.padding}"
        raise UsageError(f"{image_name} {image} does not fit {patches}; try {options}.")

    @classmethod
    def square(
        cls, image_size: int, patch_size: int, width: int, layers: int, heads: int, mlp: int, classes: int,
        pre_logits: int | None = None, channels: int = 3,
    ) -> "ViTSpec":  # fmt: skip
        """A ViT of square images and square patches that do not overlap."""
        return cls(
            image_height=image_size, image_width=image_size, patch_height=patch_size, patch_width=patch_size,
            stride_height=patch_size, stride_width=patch_size, channels=channels, width=width, heads=heads,
            layers=layers, mlp=mlp, classes=classes, pre_logits=pre_logits,
        )  # fmt: skip

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows = (self.image_height + 2 * self.padding - self.patch_height) // self.stride_height + 1
        columns = (self.image_width + 2 * self.padding - self.patch_width) // self.stride_width + 1
        return rows, columns

    @property
    def patches(self) -> int:
        """Number of patches per image."""
        return prod(self.grid)

    @property
    def tokens(self) -> int:
        """Number of tokens per image: patches and prefix tokens."""
        return self.patches + self.prefix_tokens

    @property
    def head_width(self) -> int:
        """Width of one head's queries, keys and values."""
        return self.width // self.heads


def _check_count(name: str, value: Any) -> None:
    """Raise UsageError unless the value is an integer in the range of the field `name`."""
    minimum = 0 if name in ("padding", "prefix_tokens") else 1
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise UsageError(f"{name} must be an integer of at least {minimum}, got {value!r}; try {minimum}.")
    if value > (most := {"layers": MOST_LAYERS, "classes": MOST_CLASSES}.get(name, value)):
        raise UsageError(f"{name} {value:,} is more than {most:,}; try {most}.")


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the forward pass of a batch.

    `input` and `output` are shapes, `flops` floating-point operations. `activation_bytes` is the size of the output in
    float32 if it is saved for the backward pass, else 0.
    """

    name: str
    input: tuple[int, ...]
    output: tuple[int, ...]
    parameters: int
    flops: int
    activation_bytes: int


def stages(spec: ViTSpec, batch_size: int = 1) -> list[Stage]:
    """All stages from pixels to logits, in order; each stage's input is the output of the one before.

    Shapes start with the batch: `attention.qkv` gives (B, 3, A, N, K), the scores are (B, A, N, N).

    FLOPs count only matrix products, 2*m*n*k each, the patch convolution included, as torch.utils.flop_counter
    does for eager attention. Norms, softmax, GELU, biases and sums count as 0.

    Activation bytes count the outputs that autograd saves in eager float32: operands of a product, a norm or a GELU
    (one operation of torch, which Transformers' gelu_new is not), and results of a softmax, relu or tanh. Other outputs
    and views count as 0, as do the two statistics per token that a layer norm saves. Fused attention does not save the
    softmax.

    Raises UsageError for a batch_size below 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}; try 1.")
    b, n, d, m = batch_size, spec.tokens, spec.width, spec.mlp
    a, k = spec.heads, spec.head_width
    image = (b, spec.channels, spec.image_height, spec.image_width)
    patch_numbers = spec.channels * spec.patch_height * spec.patch_width
    tokens, scores = (b, n, d), (b, a, n, n)
    result: list[Stage] = []

    def add(name: str, output: tuple[int, ...], *, parameters: int = 0, flops: int = 0, saved: bool = False) -> None:
        previous = result[-1].output if result else output
        result.append(Stage(name, previous, output, parameters, flops, FLOAT32_BYTES * prod(output) if saved else 0))

    def add_linear(name: str, rows: int, fan_in: int, output: tuple[int, ...], *, saved: bool = False) -> None:
        fan_out = output[-1]
        add(name, output, parameters=(fan_in + 1) * fan_out, flops=2 * rows * fan_in * fan_out, saved=saved)

    def add_norm(name: str, *, saved: bool = True) -> None:
        add(name, tokens, parameters=2 * d, saved=saved)

    add("image", image, saved=True)
    projection_flops = 2 * b * spec.patches * patch_numbers * d
    add("embed.projection", (b, d, *spec.grid), parameters=(patch_numbers + 1) * d, flops=projection_flops)
    add("embed.patches", (b, spec.patches, d))  # a view: the grid as a sequence
    if spec.prefix_tokens:
        add("embed.class_token", tokens, parameters=spec.prefix_tokens * d)
    add("embed.positions", tokens, parameters=n * d if spec.positions == "learned" else 0, saved=True)
    for block in range(1, spec.layers + 1):
        attention, mlp = f"block.{block}.attention", f"block.{block}.mlp"
        if spec.norm == "pre":
            add_norm(f"{attention}.norm")
        qkv_parameters, qkv_flops = 3 * (d + spec.qkv_bias) * d, 3 * 2 * b * n * d * d
        add(f"{attention}.qkv", (b, 3, a, n, k), parameters=qkv_parameters, flops=qkv_flops, saved=True)
        add(f"{attention}.scores", scores, flops=2 * b * a * n * n * k)
        add(f"{attention}.softmax", scores, saved=True)
        add(f"{attention}.mix", tokens, flops=2 * b * a * n * n * k, saved=True)
        add_linear(f"{attention}.output", b * n, d, tokens)
        add(f"{attention}.residual", tokens, saved=True)
        add_norm(f"{attention if spec.norm == 'post' else mlp}.norm")
        add_linear(f"{mlp}.in", b * n, d, (b, n, m), saved=spec.activation != "relu")  # relu saves its result
        add(f"{mlp}.activation", (b, n, m), saved=True)
        add_linear(f"{mlp}.out", b * n, m, tokens)
        # What comes next saves its input, except the mean over tokens.
        read = block < spec.layers or spec.final_norm or spec.pooling == "cls"
        add(f"{mlp}.residual", tokens, saved=read or spec.norm == "post")
        if spec.norm == "post":
            add_norm(f"{mlp}.norm", saved=read)
    # The class token is a view, which keeps the whole normalized sequence in memory; a mean is a tensor of its own.
    if spec.final_norm:
        add_norm("norm", saved=spec.pooling == "cls")
    add("pool", (b, d), saved=spec.pooling == "mean")
    if spec.pre_logits is not None:
        add_linear("pre_logits", b, d, (b, spec.pre_logits), saved=True)
    add_linear("head", b, spec.pre_logits or d, (b, spec.classes))
    return result


def total(spec: ViTSpec, batch_size: int = 1) -> Stage:
    """The whole forward pass as one stage named "total": images in, logits out, and the sums of `stages`."""
    parts = stages(spec, batch_size)
    sums = (sum(getattr(stage, cost) for stage in parts) for cost in ("parameters", "flops", "activation_bytes"))
    return Stage("total", parts[0].input, parts[-1].output, *sums)


def peak_activation_bytes(spec: ViTSpec, batch_size: int = 1, *, checkpointed: bool = False) -> int:
    """Peak size in bytes of the activations saved for the backward pass.

    With `checkpointed`, each block saves only its input, and one block at a time is recomputed (Chen et al. 2016,
    "Training Deep Nets with Sublinear Memory Cost").
    """
    parts = stages(spec, batch_size)
    saved = sum(stage.activation_bytes for stage in parts)
    if not checkpointed:
        return saved
    in_blocks = sum(stage.activation_bytes for stage in parts if stage.name.startswith("block."))
    block_input = FLOAT32_BYTES * batch_size * spec.tokens * spec.width
    one_block = sum(stage.activation_bytes for stage in parts if stage.name.startswith("block.1."))
    return saved - in_blocks + spec.layers * block_input + one_block


def training_flops(spec: ViTSpec, batch_size: int = 1) -> int:
    """FLOPs of one training step: 3 x forward, because each product becomes two in the backward pass.

    This is the convention of model FLOPs utilization (Chowdhery et al. 2022, "PaLM", appendix B). It includes the
    gradient of the images, which training does not compute.
    """
    return 3 * total(spec, batch_size).flops


# (image size, patch size, width, layers, heads, mlp, classes). Sources: Table 1 of Dosovitskiy et al. 2020; tiny and
# small of Touvron et al. 2020. vit-micro is our own; it trains in minutes on a laptop.
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
    f"vit-{size}": PRESETS[f"vit-{size}-patch{patch}-224"]
    for size, patch in (("tiny", 16), ("small", 16), ("base", 16), ("large", 16), ("huge", 14))
}


def preset(name: str) -> ViTSpec:
    """The ViTSpec of this name in PRESETS. Raises UsageError, with the closest name, if there is none."""
    if name in PRESETS:
        return PRESETS[name]
    hint = nearest(name, PRESETS) or f"; try one of {', '.join(PRESETS)}."
    raise UsageError(f"unknown preset {name!r}{hint}")


_PREFIX_TOKENS = {"vit": 1, "deit": 2}
_ACTIVATIONS: dict[Any, Literal["gelu", "gelu_tanh", "relu"]] = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip


def spec_from_config(config: Mapping[str, Any]) -> ViTSpec:
    """The spec of a Transformers config.json of model_type vit or deit, as ...ForImageClassification.

    Missing keys have Transformers' defaults. DeiT is counted with one head: the second, distillation head of
    DeiTForImageClassificationWithTeacher is not fine-tuned.

    Raises ModelError for another architecture and for unusable sizes.
    """
    kind = config.get("model_type")
    if kind not in tuple(_PREFIX_TOKENS):  # a tuple, because a config's value may not be hashable
        raise ModelError(f"no stage table for this architecture: {kind}; plain ViTs (vit, deit) have one.")
    if (activation := config.get("hidden_act", "gelu")) not in tuple(_ACTIVATIONS):
        raise ModelError(f"no stage table for the activation {activation}; {', '.join(_ACTIVATIONS)} have one.")
    labels = config.get("id2label")
    if not isinstance(labels, dict | None):
        raise ModelError(f"unusable {kind} config: id2label must be a name for each class, got {labels!r}.")
    image_height, image_width = _height_and_width(config.get("image_size", 224))
    patch_height, patch_width = _height_and_width(config.get("patch_size", 16))
    try:
        return ViTSpec(
            image_height=image_height, image_width=image_width, patch_height=patch_height, patch_width=patch_width,
            stride_height=patch_height, stride_width=patch_width, channels=config.get("num_channels", 3),
            width=config.get("hidden_size", 768), heads=config.get("num_attention_heads", 12),
            layers=config.get("num_hidden_layers", 12), mlp=config.get("intermediate_size", 3072),
            classes=len(labels) if labels else config.get("num_labels", 2), prefix_tokens=_PREFIX_TOKENS[kind],
            qkv_bias=bool(config.get("qkv_bias", True)), norm_eps=config.get("layer_norm_eps", 1e-12),
            activation=_ACTIVATIONS[activation],
        )  # fmt: skip
    except UsageError as error:
        raise ModelError(f"unusable {kind} config: {error}") from None


def _height_and_width(size: Any) -> tuple[Any, Any]:
    """A config's size, one number or two, as (height, width). ViTSpec checks the numbers."""
    return (size[0], size[1]) if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
