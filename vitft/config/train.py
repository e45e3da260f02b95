"""TrainConfig: every setting of a training run, once: name, type, default, bounds, help and panel.

`options.py` makes the command line's flags from these fields, `recipe.py` reads the same names from
YAML, and the trainer reads `config.<name>`. No default is written anywhere else.
"""
# ruff: noqa: E501  (an option is a line, however long)

import math
from typing import Any, Literal, Self

from pydantic import PositiveInt, field_validator, model_validator

from vitft.config.base import Settings, setting
from vitft.errors import UsageError

SIZES = ("patch_size", "width", "layers", "heads", "mlp")
LARGEST_SIDE = 4096  # pixels of a side of the model's input


class TrainConfig(Settings):
    """The settings of one training run; immutable, and saved as `config.yaml` in the run folder."""

    command = "vitft train"

    # fmt: off
    dataset: str | None = setting(None, "Data", "Alias (cifar10, digits, ...), hub id[:config], folder, CSV, JSONL or parquet.")
    dataset_revision: str | None = setting(None, "Data", "Commit, tag or branch of a hub data set.")
    val_fraction: float = setting(0.1, "Data", "Share of train set aside when the data has no validation split, about so much of each class; 0 for none.", ge=0, lt=1)
    max_train_samples: int | None = setting(None, "Data", "Train on this many images, stratified, taken after validation is set aside.", ge=1)
    max_eval_samples: int | None = setting(None, "Data", "Evaluate on at most this many images of each split, stratified.", ge=1)
    labels: str | None = setting(None, "Data", "Text file of class names, one a line: the head has these, in this order; by default those with a training image.")
    exclude: str | None = setting(None, "Data", "File of images to leave out, as vitft data check --quarantine writes it.")
    check: Literal["fast", "full", "off"] = setting("fast", "Data", "Look for faults before training. fast: in the labels; full: in every image, as vitft data check.", steers=True)
    on_bad_image: Literal["error", "skip"] = setting("error", "Data", "What a file that is no readable image does: stop before training, or be listed and left out.")
    max_pixels: int = setting(50_000_000, "Data", "Refuse images with more pixels than this: half a gigabyte is what decoding them takes.", ge=1)
    value_range: str | None = setting(None, "Data", "Black and white of images of more than 8 bits, as BLACK:WHITE, such as 0:4095; the format's own by default.")
    cache_gb: float = setting(20.0, "Data", "Decoded photos that are kept on disk for the next run, in GB; see vitft data cache. 0: none.", steers=True, ge=0, le=1e6)
    augment: Literal["none", "flip", "crop"] = setting("flip", "Data", "flip: left to right, half of the time. crop: random resized crop, and flip.")

    image_column: str | None = setting(None, "Reading", "Column of the images; of a table, its name or number. Found by default.")
    label_column: str | None = setting(None, "Reading", "Column of the labels, likewise.")
    split_column: str | None = setting(None, "Reading", "Column of a table that says train, validation or test; found by default.")
    fold_column: str | None = setting(None, "Reading", "Column of a table that numbers the folds, with --fold; found by default.")
    fold: int | None = setting(None, "Reading", "The fold of a table that is for validation; the others are train.")
    image_folder: str | None = setting(None, "Reading", "Folder that a table's names start from; the table's own by default.")
    encoding: str | None = setting(None, "Reading", "Encoding of a table's text: utf-8, utf-16, cp1252, gbk, ...; found by default.")
    allow_outside: bool = setting(False, "Reading", "Read images outside of a table's own folder too.", steers=True)

    model: str = setting("google/vit-base-patch16-224-in21k", "Model", "Hub id, local folder, vit-micro (bundled), or with --from-scratch a preset.")
    model_revision: str | None = setting(None, "Model", "Commit, tag or branch of a hub model.")
    image_size: int | None = setting(None, "Model", "Side of the model's input in pixels; the model's own by default.", ge=8, le=LARGEST_SIDE)
    from_scratch: bool = setting(False, "Model", "Start from random weights of the model's shape; sizes given without a model are put into vit-micro's.")
    patch_size: int | None = setting(None, "Model", "With --from-scratch: side of a patch in pixels.", ge=1, le=1024)
    width: int | None = setting(None, "Model", "With --from-scratch: length of a token vector.", ge=1, le=16_384)
    layers: int | None = setting(None, "Model", "With --from-scratch: number of encoder blocks.", ge=1, le=256)
    heads: int | None = setting(None, "Model", "With --from-scratch: attention heads in a block.", ge=1, le=256)
    mlp: int | None = setting(None, "Model", "With --from-scratch: hidden width of a block's MLP.", ge=1, le=65_536)
    freeze: Literal["none", "backbone"] = setting("none", "Model", "backbone: train the head alone.")

    epochs: float = setting(3.0, "Optimization", "Passes over the training images; may be a fraction.", gt=0, le=100_000)
    max_steps: int | None = setting(None, "Optimization", "Stop after this many optimizer steps, whatever the epochs.", ge=1)
    batch_size: int = setting(32, "Optimization", "Images of one optimizer step, over all processes and accumulation.", ge=1, le=1_048_576)
    micro_batch_size: PositiveInt | Literal["auto"] | None = setting(None, "Optimization", "Images of one forward pass on one process; all of its share by default. auto: as many as fit.")
    lr: float = setting(5e-5, "Optimization", "Peak learning rate.", gt=0, le=100)
    schedule: Literal["constant", "linear", "cosine", "step"] = setting("linear", "Optimization", "How the rate falls after warm-up; linear and cosine end at 0.")
    warmup: float = setting(0.0, "Optimization", "Share of all optimizer steps spent in linear warm-up.", ge=0, lt=1)
    decay_epochs: float = setting(1.0, "Optimization", "With --schedule step: epochs between two decays, counted from the end of the warm-up.", gt=0)
    decay_factor: float = setting(0.1, "Optimization", "With --schedule step: what the rate is multiplied by.", gt=0, le=1)
    optimizer: Literal["adamw", "adam", "sgd"] = setting("adamw", "Optimization", "sgd has momentum 0.9.")
    weight_decay: float = setting(0.01, "Optimization", "Decay of the weight matrices; biases, norms, tokens and positions have none. adam has none at all.", ge=0, le=10)
    clip_norm: float = setting(1.0, "Optimization", "Largest norm of the whole gradient; 0 for no clipping.", ge=0)
    on_nan: Literal["stop", "rollback"] = setting("stop", "Optimization", "When the loss or its gradient is no number: stop; or go back to the newest checkpoint whose weights are numbers, farther each time that does not help, and on from there at half the rate.", steers=True)
    label_smoothing: float = setting(0.0, "Optimization", "Share of each target spread over all classes.", ge=0, lt=1)
    seed: int = setting(0, "Optimization", "Seed of splits, order, augmentation, dropout and new weights.", ge=0, lt=2**32)

    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "Hardware", "auto: a GPU if there is one.", steers=True)
    threads: int | None = setting(None, "Hardware", "CPU threads of one process. By default as many as the CPUs it may use, or fewer where a trial shows a small model to be faster with them.", steers=True, ge=1, le=1024)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "Hardware", "Of the matrix products; weights stay float32. auto: what the hardware is fast at.")
    attention: Literal["auto", "eager", "sdpa"] = setting("auto", "Hardware", "eager: plain products; sdpa: torch's fused ones. auto: what was measured to be faster for so many tokens.")
    deterministic: bool = setting(False, "Hardware", "Use only GPU kernels that give the same bits on every run. A few percent slower, for the fastest attention is not one of them.")
    compile: Literal["auto", "on", "off"] = setting("auto", "Hardware", "torch.compile. auto: on where a trial of it is faster, in runs long enough to earn it back.")
    grad_checkpointing: bool = setting(False, "Hardware", "Keep only what each block reads, and compute it a second time for the backward pass: slower, in a fraction of the memory.", steers=True)

    eval_every: int | None = setting(None, "Run", "Evaluate the validation split every so many steps; each epoch by default.", ge=1)
    best_by: Literal["accuracy", "loss", "macro-f1"] = setting("accuracy", "Run", "The validation score that chooses the best checkpoint, and that early stopping waits for; of equal ones the earlier is kept.")
    early_stopping: int | None = setting(None, "Run", "Stop after this many evaluations without a better score, by --best-by.", ge=1)
    min_delta: float = setting(0.0, "Run", "With --early-stopping: by how much a score must be better to count. Accuracy and F1 are fractions: 0.001 is 0.1 %.", ge=0)
    save_every: int | None = setting(None, "Run", "Save all that resume needs every so many steps; each epoch by default, of a head on stored features at the end.", ge=1, steers=True)
    keep: int = setting(2, "Run", "How many of the newest step checkpoints stay.", ge=1, steers=True)
    keep_finished: int = setting(0, "Run", "How many step checkpoints stay once the run is finished; best/ and last/ stay in any case.", ge=0, steers=True)
    log_every: int = setting(10, "Run", "Steps between two lines of metrics.jsonl.", ge=1, steers=True)
    tracker: Literal["none", "tensorboard", "wandb"] = setting("none", "Run", "Where metrics go besides metrics.jsonl.", steers=True)
    # fmt: on

    @field_validator("value_range")
    @classmethod
    def _range_is_one(cls, text: str | None) -> str | None:
        try:
            range_of(text)
        except UsageError:
            raise ValueError("should be two numbers, BLACK:WHITE, such as 0:4095") from None
        return text

    @model_validator(mode="before")
    @classmethod
    def _sizes_alone_shape_the_smallest_preset(cls, values: Any) -> Any:
        """So that a run says what it was: a vit-micro of other sizes, not the default checkpoint."""
        if not isinstance(values, dict) or values.get("from_scratch") is not True or values.get("model") is not None:
            return values
        if any(values.get(name) is not None for name in SIZES):
            return values | {"model": "vit-micro"}
        return values

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        sizes = [name for name in SIZES if getattr(self, name)]
        if sizes and not self.from_scratch:
            # In back quotes: `parse` spells a name as it was given, a key or a flag.
            raise ValueError(
                f"`{sizes[0]}` shapes a new model; add `from_scratch`, or leave `{sizes[0]}` out (over a recipe: `{sizes[0]}` none)"
            )
        if self.from_scratch and self.freeze == "backbone":
            raise ValueError("`freeze` backbone with `from_scratch` would train a head on random features; drop one")
        if self.min_delta and self.early_stopping is None:
            raise ValueError("`min_delta` is for early stopping; add `early_stopping`, or leave `min_delta` out")
        return self


def range_of(text: str | None) -> tuple[float, float] | None:
    """Black and white of a setting `BLACK:WHITE`. Raises UsageError."""
    if text is None:
        return None
    try:
        black, white = map(float, text.split(":"))
    except ValueError:
        black = white = math.nan
    if not (math.isfinite(black) and math.isfinite(white) and black < white):
        raise UsageError(f"--value-range {text}: should be two numbers, BLACK:WHITE, such as 0:4095.")
    return black, white


def named_dataset(config: TrainConfig) -> str:
    """The data set of a run. Raises UsageError if none was named."""
    if config.dataset is None:
        raise UsageError("no data set; add --dataset: digits needs no network, or cifar10, a hub id, a folder.")
    return config.dataset
