"""TextbookConfig: the settings of a textbook run, from which its flags and recipe keys are made."""
# ruff: noqa: E501  (one line per option)

from typing import Any, Literal

from vitft.config.base import Settings, setting
from vitft.config.recipe import find_recipe, merge, recipes


class TextbookConfig(Settings):
    """The settings of a textbook run; immutable, and saved as `config.yaml` in the run folder."""

    command = "vitft scratch train"

    # fmt: off
    dataset: str | None = setting(None, "Data", "Alias (mnist, digits, ...), hub id[:config], folder, CSV, JSONL or parquet file. All images must have the same size.")
    max_train_samples: int | None = setting(None, "Data", "Train on at most this many images, stratified by class.", ge=1)
    max_test_samples: int | None = setting(None, "Data", "Test on at most this many images, stratified by class.", ge=1)
    augment: Literal["none", "crop", "flip", "both"] = setting("none", "Data", "crop: shift images by up to an eighth of their side. flip: mirror half of them left to right.")

    patch_size: int = setting(4, "Model", "Side of a patch in pixels. It must divide the height and width of the images.", ge=1, le=1024)
    width: int = setting(32, "Model", "Numbers per token.", ge=1, le=16_384)
    heads: int = setting(4, "Model", "Attention heads per block.", ge=1, le=256)
    layers: int = setting(3, "Model", "Number of encoder blocks.", ge=1, le=256)
    mlp: int = setting(64, "Model", "Hidden width of the MLPs.", ge=1, le=65_536)
    pre_logits: int | None = setting(None, "Model", "Width of a tanh layer before the head.", ge=1, le=65_536)
    pooling: Literal["cls", "mean"] = setting("cls", "Model", "What the head reads: the class token, or the mean of the patches.")
    positions: Literal["learned", "sinusoidal", "sinusoidal_2d"] = setting("learned", "Model", "Position embeddings: learned, sinusoids of the index in the sequence, or sinusoids of row and column.")
    norm: Literal["pre", "post"] = setting("pre", "Model", "Layer norm before attention and MLP, or after their residual connection.")
    final_norm: bool = setting(True, "Model", "Layer norm after the last block.")
    activation: Literal["gelu_tanh", "gelu", "relu"] = setting("gelu_tanh", "Model", "Activation of the MLPs. gelu is exact, and slower.")

    epochs: int = setting(10, "Optimization", "Passes over the training images.", ge=1, le=100_000)
    batch_size: int = setting(100, "Optimization", "Images per step.", ge=1, le=1_048_576)
    lr: float = setting(1e-3, "Optimization", "Peak learning rate.", gt=0, le=100)
    optimizer: Literal["adamw", "adam", "sgd"] = setting("adamw", "Optimization", "Optimizer.")
    weight_decay: float = setting(0.01, "Optimization", "With adamw: weight decay of matrices; none for biases, norms, class token and positions.", ge=0, le=10)
    momentum: float = setting(0.9, "Optimization", "With sgd: momentum.", ge=0, lt=1)
    schedule: Literal["constant", "step", "cosine"] = setting("constant", "Optimization", "Learning rate after warmup; cosine falls to 0.")
    warmup_steps: int = setting(0, "Optimization", "Steps of linear warmup.", ge=0)
    decay_epoch: int = setting(10, "Optimization", "With --schedule step: epochs before the learning rate decays.", ge=0)
    decay_factor: float = setting(0.1, "Optimization", "With --schedule step: factor by which it decays.", gt=0, le=1)
    label_smoothing: float = setting(0.0, "Optimization", "Fraction of each target that is spread over all classes.", ge=0, lt=1)
    dropout: float = setting(0.0, "Optimization", "Dropout rate of the embedded tokens and of the outputs of attention and MLP.", ge=0, lt=1)
    dtype: Literal["float32", "float64"] = setting("float32", "Optimization", "Floating-point type of all numbers.")
    seed: int = setting(0, "Optimization", "Seed of initial weights, order, augmentation, dropout and subsets.", ge=0, lt=2**32)

    engine: Literal["numpy", "torch"] = setting("numpy", "Run", "Train with the NumPy chapters or with torch.")
    # fmt: on


def load_config(recipe: str | None, flags: dict[str, Any]) -> tuple[str | None, TextbookConfig]:
    """Merge defaults, recipe and flags, in rising priority; also the recipe's name, if it is a bundled one.

    Raises UsageError for an unknown recipe and for invalid settings.
    """
    path = None if recipe is None else find_recipe(recipe, textbook=True)
    name = next((bundled.path.stem for bundled in recipes() if bundled.path == path), None)
    return name, merge(TextbookConfig.parse, path, flags)
