"""Who is compared: each peer by its own package, set up as its own training script sets it up.

torchvision and timm are imported where they are used, so that the others run without them.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from torch import nn

import vitft
from vitft.config.train import TrainConfig
from vitft.data.augment import Preprocess
from vitft.data.augmentation.settings import Augmentation
from vitft.data.loader import TrainLoader
from vitft.data.sources.source import class_indices, open_dataset
from vitft.data.stores.store import decode_all
from vitft.hardware.timers import synchronize
from vitft.models.load import load_for_training, shape_of
from vitft.spec import PRESETS
from vitft.training.cost.bench import WARM_UP, bench

MEAN = STD = (0.5, 0.5, 0.5)
ERASE, MIXUP = 0.25, 0.8
Pass = Callable[[], Iterable[torch.Tensor]]
"""Reads every image once: the model's input, batch by batch, (B, 3, H, W)."""


def model_of(name: str, size: int, folder: Path, seed: int) -> Any:
    """The Transformers model that vitft would train: the same shape and the same first weights for everyone."""
    settings = {"model": name, "image_size": size, "from_scratch": name in PRESETS, "seed": seed}
    return load_for_training(TrainConfig.parse(settings, "flags"), sorted(one.name for one in folder.iterdir())).model


def vision_transforms(size: int, kind: str) -> Any:
    """As the Transformers example's: random resized crops and flips, or the resize alone; `mix`: see `mixed`."""
    from torchvision import transforms

    if kind == "mix":
        first = [transforms.RandomHorizontalFlip(), transforms.TrivialAugmentWide(), transforms.Resize((size, size))]
        last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        return transforms.Compose([*first, *last, transforms.RandomErasing(ERASE)])
    crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    first = crop if kind == "crop" else [transforms.Resize((size, size))]
    return transforms.Compose([*first, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


# -- the input path -------------------------------------------------------------------------------


def example_rows(folder: Path, size: int, kind: str) -> Any:
    """The Transformers example's dataset: decoded and transformed when it is read."""
    change = vision_transforms(size, kind)

    def rows(batch: dict[str, Any]) -> dict[str, Any]:
        return {
            "pixel_values": [change(image.convert("RGB")) for image in batch["image"]],
            "labels": batch["label"],
        }

    found = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=tempfile.mkdtemp())
    return found.with_transform(rows)


def collated(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The Transformers example's batch."""
    return {
        "pixel_values": torch.stack([one["pixel_values"] for one in examples]),
        "labels": torch.tensor([one["labels"] for one in examples]),
    }


def example_input(folder: Path, size: int, kind: str, batch: int, workers: int) -> Pass:
    """As `Trainer` reads the example's dataset."""
    rows = example_rows(folder, size, kind)
    loader = torch.utils.data.DataLoader(rows, batch, shuffle=True, collate_fn=collated, num_workers=workers)
    return lambda: (one["pixel_values"] for one in loader)


def folder_loader(folder: Path, size: int, kind: str, batch: int, workers: int = 2) -> Any:
    """A plain torch script's: torchvision's ImageFolder."""
    import torchvision

    rows = torchvision.datasets.ImageFolder(str(folder), vision_transforms(size, kind))
    return torch.utils.data.DataLoader(rows, batch, shuffle=True, num_workers=workers)


def timm_loader(folder: Path, size: int, kind: str, batch: int, workers: int = 2) -> Any:
    """As timm's train.py makes it, with the same transforms as everyone."""
    import timm.data

    flips = {"hflip": 0.5, "color_jitter": None}
    # "mstd101" is timm's way to draw the strength uniformly: with n1, TrivialAugment. "inc1" and m9 keep its posterize
    # from leaving 0 bits, which Pillow refuses. Scale and ratio keep the image.
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "auto_augment": "rand-m9-n1-mstd101-inc1"}
    extra = {
        "crop": flips, "mix": flips | whole | {"re_prob": ERASE, "re_mode": "const"}, "none": {"no_aug": True},
    }[kind]  # fmt: skip
    return timm.data.create_loader(
        timm.data.create_dataset("", root=str(folder)), (3, size, size), batch, is_training=True, use_prefetcher=False,
        mean=MEAN, std=STD, interpolation="bilinear", num_workers=workers, **extra,
    )  # fmt: skip


def inputs(make: Callable[..., Any], folder: Path, size: int, kind: str, batch: int) -> Pass:
    """A pass over a loader of (images, labels)."""
    loader = make(folder, size, kind, batch)
    return lambda: (images for images, _ in loader)


def mixed(make: Callable[..., Any], mix: Callable[[int], Any], folder: Path, size: int, kind: str, batch: int) -> Pass:
    """A pass over a loader of (images, labels) that are then mixed by mixup."""
    loader = make(folder, size, kind, batch)
    mixup = mix(len(list(folder.iterdir())))
    return lambda: (mixup(images, labels)[0] for images, labels in loader)


def timm_mixup(classes: int) -> Any:
    """As timm's train.py mixes."""
    import timm.data

    return timm.data.Mixup(mixup_alpha=MIXUP, num_classes=classes, label_smoothing=0.0)


def torchvision_mixup(classes: int) -> Any:
    """torchvision's."""
    from torchvision.transforms import v2

    return v2.MixUp(alpha=MIXUP, num_classes=classes)


def vitft_input(folder: Path, size: int, kind: str, batch: int) -> Pass:
    """As `vitft train` reads a folder."""
    mix = Augmentation("trivial", erase=ERASE, mixup=MIXUP)
    rows = open_dataset(str(folder)).splits["train"]
    how = Preprocess(size, size, mean=MEAN, std=STD)
    store, _ = decode_all(rows, how, crops=kind == "crop", max_pixels=10**8, skip_bad=False, training=True)
    loader = TrainLoader(store, class_indices(rows), how, augmentation=mix if kind == "mix" else Augmentation(kind),
                         classes=len(list(folder.iterdir())), batch_size=batch, device=torch.device("cpu"))  # fmt: skip
    epoch = -1

    def read() -> Iterable[torch.Tensor]:
        nonlocal epoch
        epoch += 1
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        return (loader.batch(step).pixels for step in steps)

    return read


INPUTS: dict[str, Callable[..., Pass]] = {
    "Transformers example": partial(example_input, workers=0),
    "Transformers example, 2 workers": partial(example_input, workers=2),
    "timm loader, 2 workers": partial(inputs, timm_loader),
    "torchvision ImageFolder, 2 workers": partial(inputs, folder_loader),
    "vitft": vitft_input,
}

MIXED: dict[str, Callable[..., Pass]] = {
    "timm loader, 2 workers": partial(mixed, timm_loader, timm_mixup),
    "torchvision ImageFolder, 2 workers": partial(mixed, folder_loader, torchvision_mixup),
    "vitft": vitft_input,
}
"""TrivialAugment, mixup and random erasing. The Transformers example has none of them."""


# -- training steps -------------------------------------------------------------------------------


class StepTimes(transformers.TrainerCallback):
    """The moments at which Trainer's steps ended, and an end after so many."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by Trainer."""
        self.ends.append(time.perf_counter())


def trainer_of(model: Any, rows: Any, batch: int, **settings: Any) -> Any:
    """Trainer as the example sets it up; what is not named is its default."""
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, per_device_eval_batch_size=batch,
        remove_unused_columns=False, save_strategy="no", report_to="none", disable_tqdm=True, **settings,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collated)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def trainer_steps(model: Any, given: argparse.Namespace, folder: Path, **settings: Any) -> list[float]:
    """Seconds of Trainer's steps."""
    rows = example_rows(folder, given.image_size, "none")
    length = {"max_steps": WARM_UP + given.steps, "use_cpu": given.device == "cpu"}
    trainer = trainer_of(model, rows, given.batch_size, **length, **settings)
    times = StepTimes()
    trainer.add_callback(times)
    trainer.train()
    return np.diff(times.ends)[WARM_UP - 1 :].tolist()


def loop_steps(
    model: nn.Module, optimizer: Any, loader: Iterable[Any], given: argparse.Namespace, *, bf16: bool
) -> list[float]:
    """The loop of a plain torch script, and the heart of timm's train.py: seconds of its steps."""
    times = []
    device = given.device
    model.train()
    started = time.perf_counter()
    for number, (pixels, labels) in enumerate(chain.from_iterable(repeat(loader))):
        pixels, labels = pixels.to(device), labels.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(model(pixels), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        now = time.perf_counter()
        times.append(now - started)
        started = now
        if number + 1 == WARM_UP + given.steps:
            return times[WARM_UP:]
    raise AssertionError("an endless loader ended")


def timm_steps(model: Any, given: argparse.Namespace, folder: Path, *, bf16: bool) -> list[float]:
    """timm's own ViT of the shape, its loader and its optimizer."""
    import timm.optim
    from timm.models.vision_transformer import VisionTransformer

    spec = shape_of(model)
    own = VisionTransformer(
        img_size=given.image_size, patch_size=spec.patch_height, embed_dim=spec.width, depth=spec.layers,
        num_heads=spec.heads, mlp_ratio=spec.mlp / spec.width, num_classes=spec.classes,
    ).to(given.device)  # fmt: skip
    optimizer = timm.optim.create_optimizer_v2(own, opt="adamw", lr=5e-5, weight_decay=0.01)
    loader = timm_loader(folder, given.image_size, "none", given.batch_size)
    return loop_steps(own, optimizer, loader, given, bf16=bf16)


def torchvision_steps(model: Any, given: argparse.Namespace, folder: Path) -> list[float]:
    """torchvision's own ViT of the shape, read and trained as in a plain script."""
    import torchvision

    spec = shape_of(model)
    own = torchvision.models.VisionTransformer(
        image_size=given.image_size, patch_size=spec.patch_height, num_layers=spec.layers, num_heads=spec.heads,
        hidden_dim=spec.width, mlp_dim=spec.mlp, num_classes=spec.classes,
    ).to(given.device)  # fmt: skip
    optimizer = torch.optim.AdamW(own.parameters(), lr=5e-5)
    loader = folder_loader(folder, given.image_size, "none", given.batch_size)
    return loop_steps(own, optimizer, loader, given, bf16=False)


def vitft_steps(model: Any, given: argparse.Namespace, folder: Path, **settings: Any) -> list[float]:
    """`vitft bench train`."""
    found = bench("train", {
        "dataset": str(folder), "model": given.model, "image_size": given.image_size,
        "batch_size": given.batch_size, "augment": "none", "device": given.device, **settings,
    }, given.steps)  # fmt: skip
    return [given.batch_size / found["images_per_s"]["median"]]


STEPS: dict[str, tuple[Callable[..., list[float]], str]] = {
    "Transformers Trainer": (trainer_steps, "fp32"),
    "Transformers Trainer, bf16": (partial(trainer_steps, bf16=True), "bf16"),
    "timm, float32": (partial(timm_steps, bf16=False), "fp32"),
    "timm, --amp --amp-dtype bfloat16": (partial(timm_steps, bf16=True), "bf16"),
    "torchvision and a plain loop": (torchvision_steps, "fp32"),
    "vitft --precision fp32": (partial(vitft_steps, precision="fp32"), "fp32"),
    "vitft --precision bf16": (partial(vitft_steps, precision="bf16"), "bf16"),
}


# -- whole epochs ---------------------------------------------------------------------------------


def trainer_epoch(given: argparse.Namespace, folder: Path, seed: int, **settings: Any) -> tuple[int, int]:
    """Right answers on the test images after an epoch of Trainer, and how many there were."""
    model = model_of(given.model, given.image_size, folder / "train", seed)
    rows, test = (example_rows(folder / split, given.image_size, "none") for split in ("train", "test"))
    trainer = trainer_of(model, rows, given.batch_size, num_train_epochs=1, seed=seed,
                         use_cpu=given.device == "cpu", **settings)  # fmt: skip
    trainer.train()
    found = trainer.predict(test)
    return int((found.predictions.argmax(1) == found.label_ids).sum()), len(found.label_ids)


def vitft_epoch(given: argparse.Namespace, folder: Path, seed: int) -> tuple[int, int]:
    """The same of `vitft train`, without its flips."""
    config = TrainConfig.parse({
        "dataset": str(folder), "model": given.model, "image_size": given.image_size, "val_fraction": 0.0,
        "batch_size": given.batch_size, "augment": "none", "epochs": 1, "device": given.device, "seed": seed,
        "lr": 5e-5, "warmup": 0.0, "weight_decay": 0.0, "head_init": "random",  # as Trainer's defaults
    }, "flags")  # fmt: skip
    with tempfile.TemporaryDirectory() as run:
        score = vitft.train(config, output=Path(run) / "run").scores["test"]
    return round(score.accuracy * score.count), score.count


EPOCHS: dict[str, Callable[..., tuple[int, int]]] = {
    "Transformers Trainer": trainer_epoch,
    "Transformers Trainer, bf16": partial(trainer_epoch, bf16=True),
    "vitft": vitft_epoch,
}

# -- the defaults of each, at the same number of images seen ---------------------------------------


def example_defaults(given: argparse.Namespace, folder: Path, seed: int) -> tuple[int, int]:
    """`run_image_classification.py`: random resized crops and flips, batches of 8, AdamW at 5e-5, falling linearly."""
    model = model_of(given.model, given.image_size, folder / "train", seed)
    rows = example_rows(folder / "train", given.image_size, "crop")
    test = example_rows(folder / "test", given.image_size, "none")
    trainer = trainer_of(model, rows, 8, num_train_epochs=given.epochs, seed=seed, use_cpu=given.device == "cpu")
    trainer.train()
    found = trainer.predict(test)
    return int((found.predictions.argmax(1) == found.label_ids).sum()), len(found.label_ids)


def timm_defaults(given: argparse.Namespace, folder: Path, seed: int) -> tuple[int, int]:
    """`train.py`: SGD at 0.1 per 256 images, cosine, 5 epochs of warm-up, batches of 128, crops, jitter, smoothing."""
    import timm.data
    import timm.loss
    import timm.optim
    import timm.scheduler

    torch.manual_seed(seed)
    model = model_of(given.model, given.image_size, folder / "train", seed).to(given.device)
    batch, sizes = 128, (3, given.image_size, given.image_size)
    read = {"use_prefetcher": False, "num_workers": 2, "mean": MEAN, "std": STD, "interpolation": "bicubic"}
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(folder / "train")), sizes, batch, is_training=True, color_jitter=0.4,
        **read | {"interpolation": "random"},
    )  # fmt: skip
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.1 * batch / 256, weight_decay=2e-5, momentum=0.9)
    schedule, _ = timm.scheduler.create_scheduler_v2(
        optimizer, "cosine", given.epochs, warmup_lr=1e-5, warmup_epochs=5, min_lr=0.0, updates_per_epoch=len(loader)
    )
    smoothed = timm.loss.LabelSmoothingCrossEntropy(0.1)
    for epoch in range(given.epochs):
        model.train()
        for pixels, labels in loader:
            smoothed(model(pixels.to(given.device)).logits, labels.to(given.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step(epoch + 1)
    test = timm.data.create_dataset("", root=str(folder / "test"))
    right = 0
    with torch.inference_mode():
        for pixels, labels in timm.data.create_loader(test, sizes, batch, crop_pct=0.875, **read):
            right += int((model.eval()(pixels.to(given.device)).logits.argmax(1).cpu() == labels).sum())
    return right, len(test)


def vitft_defaults(given: argparse.Namespace, folder: Path, seed: int) -> tuple[int, int]:
    """`vitft train` with nothing but the data, the model and the size."""
    config = TrainConfig.parse({
        "dataset": str(folder), "model": given.model, "image_size": given.image_size, "val_fraction": 0.0,
        "epochs": given.epochs, "device": given.device, "seed": seed,
    }, "flags")  # fmt: skip
    with tempfile.TemporaryDirectory() as run:
        score = vitft.train(config, output=Path(run) / "run").scores["test"]
    return round(score.accuracy * score.count), score.count


DEFAULTS: dict[str, Callable[..., tuple[int, int]]] = {
    "Transformers' example": example_defaults,
    "timm's train.py": timm_defaults,
    "vitft": vitft_defaults,
}
