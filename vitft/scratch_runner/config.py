"""TextbookConfig: every setting of a textbook run, once; flags and recipe keys are made from it."""
# ruff: noqa: E501  (an option is a line, however long)

from typing import Any, Literal

from vitft.config.base import Settings, setting
from vitft.config.recipe import find_recipe, merge, recipes


class TextbookConfig(Settings):
    """The settings of one textbook run; immutable, and saved as `config.yaml` in the run folder."""

    command = "vitft scratch train"

    # fmt: off
    dataset: str | None = setting(None, "Data", "Alias (mnist, digits, ...), hub id[:config], folder, CSV, JSONL or parquet; images of one size.")
    max_train_samples: int | None = setting(None, "Data", "Train on this many images, stratified.", ge=1)
    max_test_samples: int | None = setting(None, "Data", "Test on at most this many images, stratified.", ge=1)
    augment: Literal["none", "crop", "flip", "both"] = setting("none", "Data", "crop: moved by up to an eighth of the side. flip: left to right, half of the time.")

    patch_size: int = setting(4, "Model", "Side of a patch in pixels; it divides the image's sides.", ge=1, le=1024)
    width: int = setting(32, "Model", "Length of a token vector.", ge=1, le=16_384)
    heads: int = setting(4, "Model", "Attention heads in a block.", ge=1, le=256)
    layers: int = setting(3, "Model", "Number of encoder blocks.", ge=1, le=256)
    mlp: int = setting(64, "Model", "Hidden width of a block's MLP.", ge=1, le=65_536)
    pre_logits: int | None = setting(None, "Model", "Width of a tanh layer before the head.", ge=1, le=65_536)
    pooling: Literal["cls", "mean"] = setting("cls", "Model", "What the head reads: the class token, or the mean of the patches.")
    positions: Literal["learned", "sinusoidal", "sinusoidal_2d"] = setting("learned", "Model", "How a token knows its place: by numbers it learned, by its number in the sequence, or by its row and column.")
    norm: Literal["pre", "post"] = setting("pre", "Model", "Layer norm of what a block's parts read, or of what they are added to.")
    final_norm: bool = setting(True, "Model", "Layer norm after the last block.")
    activation: Literal["gelu_tanh", "gelu", "relu"] = setting("gelu_tanh", "Model", "What bends the MLP's hidden numbers; gelu is the exact one, and slower.")

    epochs: int = setting(10, "Optimization", "Passes over the training images.", ge=1, le=100_000)
    batch_size: int = setting(100, "Optimization", "Images of one step.", ge=1, le=1_048_576)
    lr: float = setting(1e-3, "Optimization", "Peak learning rate.", gt=0, le=100)
    optimizer: Literal["adamw", "adam", "sgd"] = setting("adamw", "Optimization", "How the weights follow their gradients.")
    weight_decay: float = setting(0.01, "Optimization", "With adamw: decay of the weight matrices; biases, norms, tokens and positions have none.", ge=0, le=10)
    momentum: float = setting(0.9, "Optimization", "With sgd: share of the last step in the next one.", ge=0, lt=1)
    schedule: Literal["constant", "step", "cosine"] = setting("constant", "Optimization", "How the rate falls after warm-up; cosine ends at 0.")
    warmup_steps: int = setting(0, "Optimization", "Steps of linear warm-up.", ge=0)
    decay_epoch: int = setting(10, "Optimization", "With --schedule step: epochs before the rate falls.", ge=0)
    decay_factor: float = setting(0.1, "Optimization", "With --schedule step: what the rate is then multiplied by.", gt=0, le=1)
    label_smoothing: float = setting(0.0, "Optimization", "Share of each target spread over all classes.", ge=0, lt=1)
    dropout: float = setting(0.0, "Optimization", "Share of the numbers that are dropped, of the tokens and of what each part adds.", ge=0, lt=1)
    dtype: Literal["float32", "float64"] = setting("float32", "Optimization", "Of all numbers.")
    seed: int = setting(0, "Optimization", "Seed of new weights, order, augmentation, dropout and samples.", ge=0, lt=2**32)

    engine: Literal["numpy", "torch"] = setting("numpy", "Run", "What computes: the NumPy chapters, or the torch one.")
    # fmt: on


def load_config(recipe: str | None, flags: dict[str, Any]) -> tuple[str | None, TextbookConfig]:
    """Defaults < recipe < flags, and the name of the recipe if it came with vitft. Raises UsageError."""
    path = None if recipe is None else find_recipe(recipe, textbook=True)
    name = next((one.path.stem for one in recipes() if one.path == path), None)
    return name, merge(TextbookConfig.parse, path, flags)
