"""A short trial of a run: how long an image takes, and how much memory training needs. It leaves no trace."""

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from vitft.data.augment import augment, augment_pixels, preprocess_images
from vitft.data.augmentation.settings import Augmentation
from vitft.data.decoder import BadImage, decode, encoded
from vitft.data.sources.identity import rows_to_look_at
from vitft.data.stores.store import IN_MEMORY, Skipped, Store, decode_all, fits_on_device, shrink
from vitft.hardware.device import autocast, is_out_of_memory, micro_batch
from vitft.hardware.timers import synchronize
from vitft.models.blocks import batch_norms, normalizing
from vitft.models.heads import classifier_of
from vitft.models.load import set_training, shape_of
from vitft.spec import peak_activation_bytes
from vitft.training.linear_probe import features_pay, passes
from vitft.training.optim import MOMENTS, make_optimizer, total_steps
from vitft.training.setup import Prepared
from vitft.training.sharding import part_bytes


@dataclass(frozen=True)
class Cost:
    """Seconds of an image in training and in evaluation, input included, and of an optimizer step."""

    image_s: float
    step_s: float
    evaluate_image_s: float
    start_s: float = 0.0  # the extra time of the first step: memory is allocated, kernels are made
    host_image_s: float = 0.0  # to augment an image on the host, while the device trains on others


@dataclass(frozen=True)
class Decoding:
    """Seconds of decoding: before the first step and the evaluations, and of each training image that is left then."""

    before_s: float
    image_s: float = 0.0


def cost(prepared: Prepared, processes: int = 1, *, enough_s: float = 0.5) -> Cost:
    """Measure, in seconds, what an image and a step take on each of so many processes, this one alone.

    Passes have more and more images, up to those of the run, until one takes `enough_s`: of fewer, each takes longer.
    """
    one, share = stored_image(prepared)[None], micro_batch(prepared.config, processes)
    with untouched(prepared):
        count, took_s = 1, pass_s(prepared, one)  # the first call pays for threads and kernels
        while count < share and took_s < enough_s:
            more = min(share, 4 * count)
            try:
                took_s = pass_s(prepared, one.expand(more, -1, -1, -1))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                break  # as the run will, which then halves its micro-batch
            count = more
        images = one.expand(count, -1, -1, -1)
        scored = stored_image(prepared, crops=False)[None].expand(count, -1, -1, -1)
        evaluated_s = min(evaluate_s(prepared, scored) for _ in range(2))
        optimizer = make_optimizer(prepared.loaded.model, prepared.config.model_copy(update={"lr": 0.0}))
        # In turns, as in a run: an optimizer step evicts the weights from the processor's caches.
        turns = [(pass_s(prepared, images), optimizer_s(prepared, optimizer)) for _ in range(4)]
        (_, first_step_s), *others = turns  # the first allocates the moments
        again_s, step_s = map(statistics.median, zip(*others, strict=True))
        start_s = max(took_s - again_s, 0.0) + first_step_s - step_s
        return Cost(again_s / count, step_s, evaluated_s / count, start_s, _host_image_s(prepared))


def decode_image_s(prepared: Prepared) -> float:
    """Measure the seconds to decode an image as a run does, on some training images."""
    started = time.perf_counter()
    store, skipped = _decode_some(prepared)
    return (time.perf_counter() - started) / max(1, len(store) + len(skipped))


def _decode_some(prepared: Prepared) -> tuple[Store, list[Skipped]]:
    split, config = prepared.splits["train"], prepared.config
    rows = prepared.source.splits[split.source].select(split.rows)
    return decode_all(
        rows.select(rows_to_look_at(rows, _DECODED)), prepared.loaded.preprocess, crops=config.augment == "crop",
        max_pixels=config.max_pixels, skip_bad=True, training=True,
    )  # fmt: skip


_DECODED = 64  # images: more large photos would take seconds


def _host_image_s(prepared: Prepared) -> float:
    """Measure the seconds to augment an image beside the device; 0 if that does it, or is the host."""
    config = prepared.config
    if config.device == "cpu" or _stays_on_gpu(prepared):
        return 0.0
    count = min(config.batch_size, _DECODED)
    images = stored_image(prepared)[None].expand(count, -1, -1, -1)
    started = time.perf_counter()
    augment_pixels(images, prepared.loaded.preprocess, Augmentation.of(config), 0, np.arange(count))
    return (time.perf_counter() - started) / count


def _stays_on_gpu(prepared: Prepared) -> bool:
    """Whether the training images will be in the GPU's memory, as far as some of them tell."""
    if prepared.config.device != "cuda" or prepared.decodes_later:
        return False
    store, _ = _decode_some(prepared)
    free, _ = torch.cuda.mem_get_info()
    return len(store) > 0 and fits_on_device(store, len(prepared.splits["train"].rows), free)


def first_image_s(prepared: Prepared) -> float:
    """Measure the seconds that the first image takes in training: a cheap upper bound."""
    with untouched(prepared):
        return pass_s(prepared, stored_image(prepared)[None])


def memory_bytes(prepared: Prepared, micro: int, devices: int = 1) -> int | None:
    """Estimate the peak memory of training with micro-batches of `micro` images: of a GPU, or else of a process.

    It covers weights, gradients, moments, saved activations, a batch of inputs, and the decoded images. With `fsdp`,
    each device has its part of the weights, gradients and moments, and a few whole blocks. None for checkpointed
    activations in an architecture without a stage table.
    """
    config, model = prepared.config, prepared.loaded.model
    splits = {role: len(split.rows) for role, split in prepared.splits.items()}
    steps = total_steps(config, -(-splits["train"] // config.batch_size))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    how = prepared.loaded.preprocess
    trained_on, scored = stored_image(prepared).numel(), stored_image(prepared, crops=False).numel()
    sizes = [count * (trained_on if role == "train" else scored) for role, count in splits.items()]
    decoded = sum(min(size, IN_MEMORY) for size in sizes)
    batch = 4 * how.channels * how.height * how.width * min(config.batch_size, splits["train"])
    if features_pay(config, model, steps, splits["train"]):  # the features of every image, instead of activations
        kept = 4 * getattr(classifier_of(model), "in_features", 0) * splits["train"] * passes(config)
    else:
        with untouched(prepared):
            kept = _saved_bytes(prepared, micro)
        if config.grad_checkpointing:
            if (spec := shape_of(model)) is None:
                return None
            checkpointed = peak_activation_bytes(spec, micro, checkpointed=True)
            kept = kept * checkpointed // peak_activation_bytes(spec, micro)
    state: int = 4 * trainable * (1 + MOMENTS[config.optimizer] + (config.ema > 0))
    weights: int = 4 * sum(p.numel() for p in model.parameters())
    taken: int = 0 if config.device == "cuda" else psutil.Process().memory_info().rss - weights + decoded
    if devices > 1 and config.parallel == "fsdp":
        largest, largest_trained = map(max, zip(*part_bytes(model, config.precision), strict=True))
        # The block that is used, the next one, and the gradient of one.
        held: int = (weights + state) // devices + 2 * largest + largest_trained
    else:
        held = weights + state
    return taken + held + kept + batch


@contextmanager
def untouched(prepared: Prepared) -> Iterator[Any]:
    """Lend the model for a trial. Afterwards, even if that failed, the model and torch's generators are as before."""
    model = prepared.loaded.model.to(prepared.config.device)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    gpus = [torch.cuda.current_device()] if prepared.config.device == "cuda" else []
    with torch.random.fork_rng(gpus):
        try:
            yield model
        finally:
            model.zero_grad(set_to_none=True)
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            for module, mode in modes.items():
                module.training = mode


def stored_image(prepared: Prepared, *, crops: bool | None = None) -> torch.Tensor:
    """A training image as the store holds it: uint8 (H, W, 3); a gray one if none is readable.

    `crops`: stored for random crops, at a larger size; by default if the run makes any.
    """
    how, config, split = prepared.loaded.preprocess, prepared.config, prepared.splits["train"]
    for row in prepared.source.splits[split.source].select(split.rows[:8]):
        cell = row["image"]
        try:
            image = decode(encoded(cell), config.max_pixels, value_range=how.value_range)
        except BadImage:
            continue
        return torch.from_numpy(shrink(image, how, config.augment == "crop" if crops is None else crops))
    return torch.full((how.height, how.width, 3), 128, dtype=torch.uint8)


def pass_s(prepared: Prepared, images: torch.Tensor, module: Any = None) -> float:
    """Measure the seconds to augment these images, (B, H, W, 3), and of a forward and a backward pass.

    `module` replaces the model, for example by its compiled form.
    """
    config, model = prepared.config, prepared.loaded.model
    set_training(model, config.freeze)
    synchronize(config.device)
    started = time.perf_counter()
    index = np.arange(len(images))
    how = Augmentation.of(config)
    # What the host augments for a GPU, it does meanwhile: `host_image_s`.
    on_host = config.device != "cuda" and (how.kind == "crop" or how.operates)
    images = images if on_host else images.to(config.device)
    pixels = augment(images, prepared.loaded.preprocess, how, 0, index).to(config.device)
    with normalizing(batch_norms(model), len(pixels)):
        torch.autograd.backward(_loss(prepared, model if module is None else module, pixels))
    synchronize(config.device)
    return time.perf_counter() - started


def optimizer_s(prepared: Prepared, optimizer: torch.optim.Optimizer) -> float:
    """Measure the seconds of an optimizer step with learning rate 0, which changes nothing. Clears gradients."""
    config, model = prepared.config, prepared.loaded.model
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()  # 0 times a non-finite gradient is not 0
    synchronize(config.device)
    started = time.perf_counter()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    synchronize(config.device)
    return time.perf_counter() - started


def evaluate_s(prepared: Prepared, images: torch.Tensor) -> float:
    """Measure the seconds to resize these images, (B, H, W, 3), and of a forward pass."""
    config, model = prepared.config, prepared.loaded.model.eval()
    synchronize(config.device)
    started = time.perf_counter()
    with torch.no_grad(), autocast(config.device, config.precision):
        model(pixel_values=preprocess_images(images.to(config.device), prepared.loaded.preprocess))
    synchronize(config.device)
    return time.perf_counter() - started


def _saved_bytes(prepared: Prepared, images: int) -> int:
    """Bytes of the activations saved by a forward pass of so many images, extrapolated from two and three images.

    Not from one: batch norms would use running statistics, and so save less than in a batch.
    """
    two, three = (_count_saved_bytes(prepared, count) for count in (2, 3))
    return two + (three - two) * (images - 2)


def _count_saved_bytes(prepared: Prepared, images: int) -> int:
    model = prepared.loaded.model
    set_training(model, prepared.config.freeze)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}  # keep storages alive, so that no address is reused

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor.detach()  # an operation that kept its own output would keep itself, and so all of its inputs

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _loss(prepared, model, _noise(prepared, images))
    return sum(storage.nbytes() for address, storage in held.items() if address not in weights)


def _loss(prepared: Prepared, module: Any, pixels: torch.Tensor) -> torch.Tensor:
    config = prepared.config
    labels = torch.zeros(len(pixels), dtype=torch.long, device=config.device)
    with autocast(config.device, config.precision):
        logits = module(pixel_values=pixels).logits
    return F.cross_entropy(logits.float(), labels)


def _noise(prepared: Prepared, images: int) -> torch.Tensor:
    how = prepared.loaded.preprocess
    return torch.randn(images, how.channels, how.height, how.width, device=prepared.config.device)
