"""TrainConfig: the single definition of every training setting: name, type, default, bounds, help and panel.

`cli/options.py` turns the fields into flags, `recipe.py` reads the same names from YAML, and the trainer reads
`config.<name>`. Defaults are written nowhere else.
"""
# ruff: noqa: E501  (one line per setting)

import math
import shlex
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from vitft.config.base import Settings, setting
from vitft.errors import UsageError, as_flag

SIZES = ("patch_size", "width", "layers", "heads", "mlp")
LARGEST_SIDE = 4096  # pixels, of the model input


class TrainConfig(Settings):
    """The settings of one training run. Immutable; saved as `config.yaml` in the run folder."""

    command = "vitft train"

    # fmt: off
    dataset: str | None = setting(None, "Data", "Alias (cifar10, digits, ...), hub id[:config], folder, CSV, JSONL or Parquet file, or URL of parquet or WebDataset shards.", path=True)
    dataset_revision: str | None = setting(None, "Data", "Commit, tag or branch of a hub dataset.")
    val_fraction: float = setting(0.1, "Data", "Fraction of the training images, about the same of each class, to hold out if the dataset has no validation split. 0: none.", ge=0, lt=1)
    test_fraction: float = setting(0.0, "Data", "Fraction of the training images to hold out for an independent score, if the dataset has no test split; before the validation images.", ge=0, lt=1)
    skip_test: bool = setting(False, "Data", "Leave the test images alone: neither decode nor score them. For trying out settings, which test images must not choose.")
    split_seed: int = setting(0, "Data", "Random seed of the images that are held out or sampled; apart from --seed, so that runs with different seeds have the same images.", ge=0, lt=2**32)
    max_train_samples: int | None = setting(None, "Data", "Train on this many images (stratified, chosen after the validation images).", ge=1)
    max_eval_samples: int | None = setting(None, "Data", "Evaluate on at most this many images of each split (stratified).", ge=1)
    labels: str | None = setting(None, "Data", "Text file of class names, one per line, that sets the classes of the head and their order. Default: all classes with training images.", path=True)
    exclude: str | None = setting(None, "Data", "File that lists images to leave out, as written by vitft data check --quarantine.", path=True)
    check: Literal["fast", "full", "off"] = setting("fast", "Data", "Validate the data before training. fast: labels, and of large datasets the headers of images; full: every image, like vitft data check.", changeable=True)
    on_bad_image: Literal["error", "skip"] = setting("error", "Data", "If an image cannot be read: stop, or list it and leave it out. Of more than 1,000 photos, some are found to be damaged only while training, where another of the class takes their place.", changeable=True)
    max_pixels: int = setting(50_000_000, "Data", "Refuse images with more pixels than this. Decoding the default takes about 0.5 GB.", ge=1)
    value_range: str | None = setting(None, "Data", "Pixel values of black and white in images of more than 8 bits, as BLACK:WHITE, such as 0:4095. Default: the full range of the format.")
    cache_gb: float = setting(20.0, "Data", "Disk space for decoded images, which the next run reuses, in GB (see vitft data cache). 0: no cache.", changeable=True, ge=0, le=1e6)
    sampling: Literal["uniform", "balanced"] = setting("uniform", "Data", "balanced: repeat images of rare classes, and leave out some of frequent ones, so that an epoch has each class equally often.")

    image_column: str | None = setting(None, "Reading", "Name or number of the image column. Default: detected.")
    label_column: str | None = setting(None, "Reading", "Name or number of the label column. Default: detected.")
    split_column: str | None = setting(None, "Reading", "Column of a table that says train, validation or test. Default: detected.")
    fold_column: str | None = setting(None, "Reading", "Column of a table with the fold numbers, for --fold. Default: detected.")
    fold: int | None = setting(None, "Reading", "Validate on this fold of a table and train on the others.")
    image_folder: str | None = setting(None, "Reading", "Folder that the image paths in a table are relative to. Default: the folder of the table.", path=True)
    encoding: str | None = setting(None, "Reading", "Text encoding of a table, or of the names in an archive: utf-8, utf-16, cp1252, gbk, ... Default: detected.")
    allow_outside: bool = setting(False, "Reading", "Also read images outside of the table's folder.", changeable=True)
    streaming: bool = setting(False, "Reading", "Fetch the shards of a hub dataset when they are needed, as those of a URL, instead of downloading it first.")
    stream_gb: float = setting(20.0, "Reading", "Disk space for what is fetched from a URL, which later epochs and runs reuse, in GB.", changeable=True, ge=0, le=1e6)

    augment: Literal["none", "flip", "crop", "trivial", "rand"] = setting("flip", "Augmentation", "flip: random horizontal flip. crop: random resized crop and flip. trivial: flip, and one random operation (TrivialAugment). rand: flip, and two (RandAugment).")
    color_jitter: float = setting(0.0, "Augmentation", "Multiply brightness, contrast and color by random factors between 1 - this and 1 + this. Often 0.4.", ge=0, le=1)
    erase: float = setting(0.0, "Augmentation", "Random erasing: probability that a box of the image becomes the mean color. Often 0.25.", ge=0, le=1)
    mixup: float = setting(0.0, "Augmentation", "Mixup: blend each image and its label with another, in shares from Beta(this, this). Often 0.2 to 0.8.", ge=0, le=100)
    cutmix: float = setting(0.0, "Augmentation", "CutMix: replace a box of each image by another, labels in proportion, shares from Beta(this, this). Often 1. With --mixup: one of them, at random.", ge=0, le=100)

    model: str = setting("google/vit-base-patch16-224-in21k", "Model", "Hub id, local folder, vit-micro (bundled) or, with --from-scratch, a preset.", path=True)
    model_revision: str | None = setting(None, "Model", "Commit, tag or branch of a hub model.")
    image_size: int | None = setting(None, "Model", "Height and width of the model input in pixels. Default: the model's own.", ge=8, le=LARGEST_SIDE)
    from_scratch: bool = setting(False, "Model", "Start from random weights. If you set sizes but no model, they apply to vit-micro.")
    patch_size: int | None = setting(None, "Model", "With --from-scratch: height and width of a patch in pixels.", ge=1, le=1024)
    width: int | None = setting(None, "Model", "With --from-scratch: hidden size, the length of a token vector.", ge=1, le=16_384)
    layers: int | None = setting(None, "Model", "With --from-scratch: number of encoder blocks.", ge=1, le=256)
    heads: int | None = setting(None, "Model", "With --from-scratch: attention heads per block.", ge=1, le=256)
    mlp: int | None = setting(None, "Model", "With --from-scratch: hidden size of the MLP in each block.", ge=1, le=65_536)
    freeze: PositiveInt | Literal["none", "backbone"] = setting("none", "Model", "backbone: train only the head (linear probe). A number: freeze the embeddings and this many of the first blocks, which saves time and memory.")
    lora_rank: int | None = setting(None, "Model", "Train a low-rank adapter (LoRA) of this rank, such as 16, and the head; all other weights stay. Needs vitft[lora].", ge=1, le=1024)
    lora_alpha: float | None = setting(None, "Model", "Scale of the adapter, divided by its rank. Default: the rank.", gt=0, le=100_000)
    lora_targets: Literal["attention", "all"] = setting("attention", "Model", "Linear layers that the adapter changes: those of attention, or all in the blocks.")
    dora: bool = setting(False, "Model", "With --lora-rank: train the length of each row of the weights apart from its direction (DoRA). Takes more time and memory.")

    epochs: float = setting(3.0, "Optimization", "Passes over the training images; may be fractional.", gt=0, le=100_000)
    max_steps: int | None = setting(None, "Optimization", "Stop after this many optimizer steps, regardless of --epochs.", ge=1)
    batch_size: int = setting(32, "Optimization", "Images per optimizer step, over all processes and gradient accumulation.", ge=1, le=1_048_576)
    micro_batch_size: PositiveInt | Literal["auto"] | None = setting(None, "Optimization", "Images per forward pass of one process. Default: the entire batch of that process. auto: as many as fit in memory.", changeable=True)
    if TYPE_CHECKING:
        lr: float = setting("auto", "", "")  # once validated, it is a number
    else:
        lr: Annotated[float, Field(gt=0, le=100)] | Literal["auto"] | None = setting("auto", "Optimization", "Peak learning rate. auto or none: depends on what is trained; with adamw 2e-5 for all weights (1e-3 for models under 3 M parameters), 1e-3 for an adapter, 1e-2 for a head alone, 1e-3 for new weights.")
    schedule: Literal["constant", "linear", "cosine", "step"] = setting("linear", "Optimization", "Learning rate decay after warmup; linear and cosine end at 0.")
    head_init: Literal["auto", "features", "random"] = setting("auto", "Optimization", "Start of a new head. features: logistic regression on the features of the pretrained backbone, fitted before the first step. auto: that, if possible.")
    layer_decay: float = setting(1.0, "Optimization", "Multiply the learning rate by this for each layer below the head, so that early layers change less. Often 0.65 to 0.9.", gt=0, le=1)
    warmup: float = setting(0.1, "Optimization", "Fraction of all optimizer steps used for linear warmup.", ge=0, lt=1)
    decay_epochs: float = setting(1.0, "Optimization", "With --schedule step: epochs between decays, counted from the end of warmup.", gt=0)
    decay_factor: float = setting(0.1, "Optimization", "With --schedule step: factor applied to the learning rate at each decay.", gt=0, le=1)
    optimizer: Literal["adamw", "adam", "sgd"] = setting("adamw", "Optimization", "sgd uses momentum 0.9.")
    betas: str = setting("0.9,0.999", "Optimization", "Decay of the two moments of adamw and adam, as B1,B2.")
    weight_decay: float = setting(0.01, "Optimization", "Weight decay of weight matrices. Biases, norms, tokens and position embeddings have none; adam ignores it.", ge=0, le=10)
    clip_norm: float = setting(1.0, "Optimization", "Maximum gradient norm. 0: no clipping.", ge=0)
    on_nan: Literal["stop", "rollback"] = setting("stop", "Optimization", "If the loss or gradient is non-finite: stop, or roll back to the newest checkpoint with finite weights and continue at half the learning rate. Each further rollback goes to an older checkpoint.", changeable=True)
    drop_path: float | None = setting(None, "Optimization", "Stochastic depth: probability of skipping a residual branch of the last block; smaller in earlier blocks. Default: the model's own (0.1 for Swin, 0 for ViT).", ge=0, lt=1)
    ema: float = setting(0.0, "Optimization", "Decay of an exponential moving average of the weights, such as 0.99, which is evaluated and saved as the model. 0: none.", ge=0, lt=1)
    label_smoothing: float = setting(0.0, "Optimization", "Fraction of each target spread evenly over all classes.", ge=0, lt=1)
    class_weights: str | None = setting(None, "Optimization", "Weights of the classes in the loss, scaled to a mean of 1 over the training images. balanced: inverse to their numbers of images. Else a JSON file such as {\"cat\": 1, \"dog\": 2.5}.", path=True)
    logit_adjustment: float = setting(0.0, "Optimization", "For unequal classes: in training, add this times the log of each class's fraction of the images to the logits, so that predictions favor no class. Usually 1.", ge=0, le=10)
    focal_loss: float = setting(0.0, "Optimization", "Exponent of the focal loss, which gives images that are already right less weight. 0: cross-entropy. Usually 2.", ge=0, le=10)
    seed: int = setting(0, "Optimization", "Random seed of data order, augmentation, dropout and new weights.", ge=0, lt=2**32)

    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "Hardware", "auto: a GPU if available.", changeable=True)
    threads: int | None = setting(None, "Hardware", "CPU threads per process. Default: all available CPUs, or fewer if a trial run finds a small model faster with fewer.", changeable=True, ge=1, le=1024)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "Hardware", "Precision of matrix products; weights stay float32. auto: the fastest that the hardware supports well.")
    attention: Literal["auto", "eager", "sdpa"] = setting("auto", "Hardware", "eager: plain matrix products. sdpa: PyTorch's fused kernels. auto: whichever was measured faster for the number of tokens.")
    deterministic: bool = setting(False, "Hardware", "Use only deterministic GPU kernels, for bit-identical runs. A few percent slower, because the fastest attention kernel is not deterministic.")
    compile: Literal["auto", "on", "off"] = setting("auto", "Hardware", "Use torch.compile. auto: on if a trial run is faster and the run is long enough to repay the compile time.", changeable=True)
    parallel: Literal["auto", "ddp", "fsdp"] = setting("auto", "Hardware", "What several processes share. ddp: the images of a step, with the whole model on each. fsdp: also weights, gradients and moments, which takes less memory and more exchange. auto: ddp.", changeable=True)
    grad_checkpointing: bool = setting(False, "Hardware", "Gradient checkpointing: save only the input of each block and recompute the rest in the backward pass. Much less memory, but slower.", changeable=True)

    eval_every: int | None = setting(None, "Run", "Steps between validations. Default: once per epoch.", ge=1)
    best_by: Literal["accuracy", "balanced-accuracy", "macro-f1", "loss"] = setting("accuracy", "Run", "Validation metric for the best checkpoint and for early stopping; balanced accuracy and macro F1 count all classes alike. On a tie, the earlier checkpoint wins.")
    early_stopping: int | None = setting(None, "Run", "Stop after this many validations without improvement of --best-by.", ge=1)
    min_delta: float = setting(0.0, "Run", "With --early-stopping: smallest improvement that counts. Accuracy and F1 are fractions: 0.001 is 0.1 %.", ge=0)
    save_every: int | None = setting(None, "Run", "Steps between checkpoints. Default: once per epoch, or only at the end for a linear probe on cached features.", ge=1, changeable=True)
    keep: int = setting(2, "Run", "Number of step checkpoints to keep; the oldest are deleted.", ge=1, changeable=True)
    keep_finished: int = setting(0, "Run", "Number of step checkpoints to keep when the run ends; best/ and last/ always stay.", ge=0, changeable=True)
    log_every: int = setting(10, "Run", "Steps between lines of metrics.jsonl.", ge=1, changeable=True)
    reference_images: int = setting(2000, "Run", "Training images that vitft predict --none-of-these compares an image with, by the features of the best checkpoint. 0: do without.", ge=0, changeable=True)
    tracker: Literal["none", "tensorboard", "wandb"] = setting("none", "Run", "Log metrics here too, besides metrics.jsonl.", changeable=True)
    # fmt: on

    @field_validator("device", mode="before")
    @classmethod
    def _name_device(cls, name: Any) -> Any:
        return device_name(name)

    @field_validator("value_range")
    @classmethod
    def _check_value_range(cls, text: str | None) -> str | None:
        try:
            range_of(text)
        except UsageError:
            raise ValueError("should be two numbers, BLACK:WHITE, such as 0:4095") from None
        return text

    @field_validator("class_weights")
    @classmethod
    def _name_no_file_none(cls, text: str | None) -> str | None:
        return None if text == "none" else text

    @field_validator("betas")
    @classmethod
    def _check_betas(cls, text: str) -> str:
        try:
            betas_of(text)
        except ValueError:
            raise ValueError("should be two numbers from 0 to below 1, B1,B2, such as 0.9,0.999") from None
        return text

    @model_validator(mode="before")
    @classmethod
    def _default_to_vit_micro(cls, values: Any) -> Any:
        """Sizes without a model modify vit-micro, and `config.yaml` should say so."""
        if not isinstance(values, dict) or values.get("from_scratch") is not True or values.get("model") is not None:
            return values
        if any(values.get(name) is not None for name in SIZES):
            return values | {"model": "vit-micro"}
        return values

    @model_validator(mode="after")
    def _set_lr(self) -> Self:
        """Fill in the default, which depends on other settings, so that `config.yaml` says it.

        It is not marked as set, because a small model will have another.
        """
        if vars(self)["lr"] in (None, "auto"):
            self.__dict__["lr"] = usual_lr(self)  # the settings are frozen
            self.__pydantic_fields_set__.discard("lr")
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        sizes = [name for name in SIZES if getattr(self, name)]
        if sizes and not self.from_scratch:
            # `parse` replaces the backquoted names by keys or flags.
            raise ValueError(
                f"`{sizes[0]}` applies only to a new model; add `from_scratch` or remove `{sizes[0]}` (to override a recipe: `{sizes[0]}` none)"
            )
        if self.from_scratch and self.freeze != "none":
            what = "a head on random features" if self.freeze == "backbone" else "blocks on random features"
            raise ValueError(f"`freeze` {self.freeze} with `from_scratch` would train {what}; remove one of them")
        if self.from_scratch and self.head_init == "features":
            raise ValueError("`head_init` features needs a pretrained backbone; remove it or `from_scratch`")
        if self.drop_path and self.freeze == "backbone":
            raise ValueError("`drop_path` does nothing in a frozen backbone; remove it or `freeze`")
        if self.lora_rank is None and (self.lora_alpha is not None or self.dora or self.lora_targets != "attention"):
            name = "dora" if self.dora else "lora_alpha" if self.lora_alpha is not None else "lora_targets"
            raise ValueError(f"`{name}` applies only to an adapter; add `lora_rank` or remove `{name}`")
        if self.lora_rank is not None and self.from_scratch:
            raise ValueError("`lora_rank` needs pretrained weights to adapt; remove it or `from_scratch`")
        if self.lora_rank is not None and self.freeze != "none":
            raise ValueError("`lora_rank` trains an adapter of all blocks, and `freeze` holds some; remove one of them")
        if self.parallel == "fsdp" and self.freeze == "backbone":
            raise ValueError(
                "`parallel` fsdp shards what is trained, and of a head alone that is little; remove it or `freeze`"
            )
        if self.parallel == "fsdp" and self.micro_batch_size == "auto":
            raise ValueError(
                "`micro_batch_size` auto tries a pass of the whole model, which `parallel` fsdp shards; give a number, or remove one of them"
            )
        if self.parallel == "fsdp" and self.compile == "on":
            raise ValueError("`compile` compiles whole blocks, which `parallel` fsdp shards; remove one of them")
        remedies = ["`class_weights` balanced"] if self.class_weights == "balanced" else []
        remedies += ["`sampling` balanced"] if self.sampling == "balanced" else []
        remedies += ["`logit_adjustment`"] if self.logit_adjustment else []
        if len(remedies) > 1:
            raise ValueError(
                f"{remedies[0]} and {remedies[1]} would each make up for unequal classes, together too much; remove one"
            )
        if self.optimizer == "sgd" and self.betas != type(self).model_fields["betas"].default:
            raise ValueError("`betas` applies only to adamw and adam; remove it or `optimizer` sgd")
        if self.min_delta and self.early_stopping is None:
            raise ValueError("`min_delta` applies only to early stopping; add `early_stopping` or remove `min_delta`")
        return self


PATHS = tuple(
    name
    for name, field in TrainConfig.model_fields.items()
    if isinstance(field.json_schema_extra, dict) and field.json_schema_extra["path"]
)
"""The settings that can be local paths: a run keeps them absolute, and a checkpoint only their last component."""

OF_DATA = tuple(
    name
    for name, field in TrainConfig.model_fields.items()
    if isinstance(field.json_schema_extra, dict) and field.json_schema_extra["panel"] in ("Data", "Reading")
)
"""The settings that say what is trained on: which images, with which labels, and how they are read."""


def not_default(config: TrainConfig, names: Iterable[str] = OF_DATA) -> dict[str, Any]:
    """The settings among `names` that differ from their default."""
    values = {name: getattr(config, name) for name in names}
    return {name: value for name, value in values.items() if value != TrainConfig.model_fields[name].default}


def train_command(settings: Mapping[str, Any]) -> str:
    """The `vitft train` command with these settings, to paste into a shell."""
    words = ["vitft", "train"]
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(as_flag(name if value else f"no_{name}"))
        elif value is not None:
            words += [as_flag(name), str(value)]
    return shlex.join(words)


_USUAL = {
    "adamw": {
        "all weights": 2e-5,
        "a small model": 1e-3,
        "an adapter": 1e-3,
        "a head alone": 1e-2,
        "new weights": 1e-3,
    },
    "sgd": {"all weights": 3e-3, "a small model": 1e-1, "an adapter": 5e-2, "a head alone": 1e-1, "new weights": 1e-1},
}
"""Learning rates that usually do well, by optimizer and by what is trained; adam's are adamw's."""


SMALL = 3_000_000  # weights, below which a pretrained model takes the rate of a new one


def what_is_trained(config: TrainConfig, weights: int | None = None) -> str:
    """What a run trains, in words, for `usual_lr`; `weights` is the size of the model, if it is known."""
    if config.from_scratch:
        return "new weights"
    if config.lora_rank is not None:
        return "an adapter"
    if config.freeze == "backbone":
        return "a head alone"
    return "a small model" if weights is not None and weights < SMALL else "all weights"


def usual_lr(config: TrainConfig, weights: int | None = None) -> float:
    """The learning rate that usually does well for this optimizer and for what is trained."""
    return _USUAL["sgd" if config.optimizer == "sgd" else "adamw"][what_is_trained(config, weights)]


def device_name(name: Any) -> Any:
    """The device's name among the choices: `cuda:0`, as torch calls the first GPU, is cuda."""
    return "cuda" if name == "cuda:0" else name


def of_any_version(recorded: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run recorded. Before there was `split_seed`, `seed` was that too."""
    return {"split_seed": recorded.get("seed", 0)} | recorded


def range_of(text: str | None) -> tuple[float, float] | None:
    """Parse `BLACK:WHITE`, such as `0:4095`, as (0.0, 4095.0). Raises UsageError."""
    if text is None:
        return None
    try:
        black, white = map(float, text.split(":"))
    except ValueError:
        black = white = math.nan
    if not (math.isfinite(black) and math.isfinite(white) and black < white):
        raise UsageError(f"--value-range {text}: should be two numbers, BLACK:WHITE, such as 0:4095.")
    return black, white


def betas_of(text: str) -> tuple[float, float]:
    """Parse `B1,B2`, such as `0.9,0.999`. Raises ValueError."""
    first, second = map(float, text.split(","))
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError(text)
    return first, second


def require_dataset(config: TrainConfig) -> str:
    """The dataset of a run. Raises UsageError if none is set."""
    if config.dataset is None:
        raise UsageError(
            "no dataset; add --dataset with a hub id, a folder, cifar10, or digits (which needs no network)."
        )
    return config.dataset
