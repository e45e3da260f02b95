"""One optimizer step. Its batch, learning rate and dropout are functions of (seed, step)."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object

from vitft.data.augmentation.settings import Augmentation
from vitft.data.loader import TrainLoader
from vitft.hardware.device import memory_guard, micro_batch
from vitft.hardware.shards import joined, local
from vitft.hardware.timers import Clock, DataWait
from vitft.io import console
from vitft.io.signals import Gather, Progress
from vitft.models.blocks import batch_norms, normalizing
from vitft.models.features import backbone
from vitft.models.head_init import fit_head, images_for_head, starts_from_features, write_head
from vitft.models.load import checkpoint_activations, compiled, set_training
from vitft.randomness import derive_seed
from vitft.training import ema
from vitft.training.linear_probe import FeatureLoader, Probe, features_pay, read_features
from vitft.training.loss import class_balance, head_loss, summed_loss
from vitft.training.optim import lr_at, make_optimizer, total_steps
from vitft.training.setup import Decoded
from vitft.training.sharding import Sharded

Watched = Callable[[Progress, Gather], tuple[Progress, Gather]]


class Learner:
    """The model, its training batches and its optimizer, on one process.

    `unwrapped` is the model without DDP; `module` is what reads a batch: the model, or a linear probe's head.
    `images_loader` reads images even where `loader`, of a linear probe, has their features. `config` changes when the
    micro-batch is halved.
    """

    def __init__(self, accelerator: Any, decoded: Decoded, clock: Clock | None = None) -> None:
        self.accelerator, self.config, self.clock = accelerator, decoded.config, clock or Clock()
        config = self.config
        self.loader: TrainLoader | FeatureLoader
        self.loader = self.images_loader = TrainLoader(
            *decoded.stores["train"], decoded.loaded.preprocess, augmentation=Augmentation.of(config),
            classes=len(decoded.loaded.labels), sampling=config.sampling, batch_size=config.batch_size,
            device=accelerator.device, rank=accelerator.process_index, world=accelerator.num_processes,
            clock=self.clock,
        )  # fmt: skip
        self.steps_per_epoch = self.loader.steps_per_epoch
        self.total_steps = self.images_loader.end = total_steps(config, self.steps_per_epoch)
        self._new_head = decoded.loaded.new_head
        self.unwrapped, self._names = decoded.loaded.model.to(accelerator.device), decoded.loaded.labels
        self._balance = class_balance(config, self.loader.labels.to(accelerator.device), self._names)
        if config.grad_checkpointing:
            checkpoint_activations(self.unwrapped)
        shards = config.parallel == "fsdp" and accelerator.num_processes > 1
        self._sharded = Sharded(self.unwrapped, accelerator.device.type, config.precision) if shards else None
        self._preprocess = decoded.loaded.preprocess
        self.keep_up = self._keep_up if shards else None
        """For StopSignals: a sharded model is run by all processes, equally often."""
        reads = features_pay(config, self.unwrapped, self.total_steps, len(self.images_loader.store))
        self.probe = Probe(self.unwrapped, config) if reads else None
        self.module: Any = self.unwrapped if self.probe is None else self.probe.head
        self._norms = batch_norms(self.module)
        optimizer = make_optimizer(self.unwrapped, config)
        # What is sharded already exchanges its gradients: it is not wrapped.
        self.model = accelerator.prepare_model(self.module, evaluation_mode=shards)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self._arranged = self.model is self.module  # without DDP there is nothing to arrange
        self._fast = compiled(self.model) if config.compile == "on" else self.model  # for full micro-batches alone
        self._wait = DataWait(config.device)
        self.breakable: Callable[[], AbstractContextManager[None]] = nullcontext  # for work that a signal may interrupt
        if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
            for parameter in self.unwrapped.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_let_signals_in)
        self.updating = False
        """Whether a step has its gradients: one that then fails cannot be repeated, since weights may have changed."""
        self.module.eval()  # the first step switches to training mode

    def get_ready(
        self, watched: Watched = lambda progress, gather: (progress, gather), *, start_head: bool = False
    ) -> None:
        """Before the first step, compute the features that a linear probe reads; with `start_head`, fit the new head.

        `watched`: see StopSignals.
        """
        with self.breakable(), memory_guard(self.config, self.accelerator.num_processes):
            if self.probe is not None and isinstance(self.loader, TrainLoader):
                with console.working("reading features") as shown:
                    progress, gather = watched(shown, gather_object)
                    self.loader = self.probe.training(self.loader, gather, progress)
            if start_head and starts_from_features(self.config, self.unwrapped, new_head=self._new_head):
                self._start_head(watched)

    def _start_head(self, watched: Watched) -> None:
        """Fit the head to features of training images, and write it into the model."""
        config, loader = self.config, self.loader
        classes, seen = self.unwrapped.config.num_labels, self.total_steps * config.batch_size
        chosen = self.images_loader.sample("head", images_for_head(len(loader.labels), classes, seen))
        if isinstance(loader, FeatureLoader):
            features = loader.unmirrored[torch.from_numpy(chosen)]
        else:
            self.unwrapped.eval()
            read = backbone(self.unwrapped, config.device, config.precision)
            with console.working("reading features for the new head") as shown:
                progress, gather = watched(shown, gather_object)
                features = read_features(
                    loader, read, config, chosen, mirror=False, gather=gather, progress=progress
                )  # fmt: skip
        device = self.accelerator.device
        labels = loader.labels[torch.from_numpy(chosen)].to(device)
        fit = fit_head(features.to(device), labels, classes, head_loss(config, labels, self._names))
        write_head(self.unwrapped, fit, broadcast)
        score = "" if fit.accuracy is None else f", {100 * fit.accuracy:.1f} % right of {fit.held_out:,} held out"
        console.note(f"new head fitted to the features of {console.counted(len(chosen), 'training image')}{score}")

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The whole model, to be written: on the main process, else None. All processes have to call it."""
        main: bool = self.accelerator.is_main_process
        if self._sharded is None:
            yield self.unwrapped if main else None
        else:
            with self._sharded.whole(keep=main) as model:
                yield model

    def is_finite(self) -> bool:
        """Whether all weights are. All processes have to call it, and get the same answer."""
        finite = all(local(parameter).isfinite().all() for parameter in self.unwrapped.parameters())
        return finite if self._sharded is None else all(gather_object([finite]))

    def _keep_up(self) -> None:
        """Run the model once, for nothing: another process runs it, and needs this one's shards."""
        how = self._preprocess
        with torch.no_grad():
            self.unwrapped(
                pixel_values=torch.zeros((1, how.channels, how.height, how.width), device=self.accelerator.device)
            )

    def _running(self) -> list[torch.Tensor]:
        """What a forward pass changes: running means, variances, counts. (DDP replaces these tensors.)"""
        return [buffer for norm in self._norms for buffer in norm.buffers()]

    def share_running_means(self) -> None:
        """Give all processes the first one's running means, which are saved. All processes have to call it.

        Else each would score with those of its own images of the last step.
        """
        if self.accelerator.num_processes > 1:
            for buffer in self._running():
                torch.distributed.broadcast(buffer, src=0)

    def averaged(self) -> AbstractContextManager[None]:
        """With the moving average as the weights, if there is one: what is evaluated and saved."""
        return ema.averaged(self.optimizer)

    def close(self) -> None:
        """End the processes that prepare batches."""
        self.images_loader.close()

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return lr_at(step, self.config, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch)

    def images(self, step: int) -> int:
        """The number of images in a step's batch, over all processes."""
        return len(self.loader.samples(step))

    def halve(self) -> None:
        """Halve the micro-batch from now on."""
        self.config = self.config.model_copy(update={"micro_batch_size": -(-self.micro_batch // 2)})

    @property
    def data_wait_s(self) -> float:
        """Seconds that all steps so far spent waiting for their input."""
        return self._wait.seconds

    @property
    def micro_batch(self) -> int:
        """Images per forward pass, unless the batch is smaller."""
        return micro_batch(self.config, self.accelerator.num_processes)

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Take a step; return this process's part of the mean loss and the correct answers, and the gradient norm."""
        self.updating = False
        with restored_after_an_error(self._running()), self.breakable():
            loss, correct = self._gradients(step)
        self.updating = True
        with self.clock.part("optimizer"):
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or math.inf)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(step) * group["lr_factor"]
            self.optimizer.step()
            if self.config.ema:
                ema.update(self.optimizer, self.config.ema, step)
            self.optimizer.zero_grad()
        return loss, correct, joined(norm)

    def _gradients(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the gradients of a batch; return this process's part of the mean loss and the correct answers."""
        config, accelerator, clock = self.config, self.accelerator, self.clock
        with self._wait:
            batch = self.loader.batch(step)
        if not self.module.training:  # after an evaluation; setting every module takes a while
            self.module.train()
            set_training(self.unwrapped, config.freeze)
        if not self._arranged:
            self._arrange(batch.pixels)
        self.optimizer.zero_grad()  # an interrupted step leaves some
        whole = self.images(step)
        world = accelerator.num_processes
        # Every process takes the same number of micro-steps, even if its shard of the last batch is empty.
        shard = -(-whole // world)
        micro = min(self.micro_batch, shard)
        starts = range(0, shard, micro)
        loss_sum = torch.zeros((), device=accelerator.device)
        correct = torch.zeros((), device=accelerator.device)
        for number, start in enumerate(starts):
            part = slice(start, start + micro)
            pixels, labels, targets = batch.pixels[part], batch.labels[part], batch.targets[part]
            weight = 1.0
            if len(labels) == 0:  # all processes join the all-reduce, so an idle one adds zeros
                pixels = torch.zeros((1, *batch.pixels.shape[1:]), device=accelerator.device)
                labels, weight = torch.zeros(1, dtype=torch.long, device=accelerator.device), 0.0
                targets = labels
            torch.manual_seed(derive_seed(config.seed, "dropout", step, number, accelerator.process_index))
            exchange = number == len(starts) - 1
            # Around the backward pass, too, which may recompute activations.
            with nullcontext() if exchange else accelerator.no_sync(self.model), normalizing(self._norms, len(pixels)):
                with clock.part("forward"):
                    model = self._fast if len(labels) == self.micro_batch else self.model
                    logits = model(pixel_values=pixels).logits.float()
                    # Divided by the size of the whole batch, so that micro-batches and shards of any size weigh right.
                    loss = weight * summed_loss(logits, targets, config, self._balance) / whole
                with clock.part("backward"):
                    accelerator.backward(loss * world)  # DDP averages gradients over processes
            loss_sum += loss.detach()
            correct += weight * (logits.detach().argmax(dim=1) == labels).sum()
        return loss_sum, correct

    def _arrange(self, pixels: torch.Tensor) -> None:
        """Have DDP arrange gradients for sending now, by a pass that changes nothing, and not between the first steps.

        The place of a gradient decides the order in which more than two processes add it up. So the first step of a
        resumed run would be rounded otherwise than the same step of an uninterrupted one.
        """
        with normalizing(self._norms, 1):
            logits = self.model(pixel_values=pixels.new_zeros((1, *pixels.shape[1:]))).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a class token's strides, which do not matter: its gradient is one row
            logits.float().sum().backward()
        self._arranged = True  # as the next pass begins


@contextmanager
def restored_after_an_error(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """If this context ends with an error, a signal too, these tensors have the values of its beginning."""
    kept = [tensor.clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
        raise


def _let_signals_in(parameter: torch.Tensor) -> None:
    """Do nothing, but in Python, which handles signals between its own instructions: a backward pass has no other."""
