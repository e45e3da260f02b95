"""What `vitft probe`, and a linear probe of many epochs, take against one forward pass over their images.

python benchmarks/probe.py --dataset CIFAR10_FOLDER --model VIT_FOLDER --image-size 98
"""

import argparse
import time

import torch

from vitft.config.train import TrainConfig
from vitft.hardware.device import autocast, make_accelerator, resolve_auto, threads
from vitft.probing.probe import examples, probe
from vitft.training.setup import prepare
from vitft.training.step import Learner


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="as for `vitft train`")
    parser.add_argument("--model", default="vit-micro", help="as for `vitft train`")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--images", type=int, default=4000, help="training images")
    parser.add_argument("--held-out", type=int, default=1000, help="validation images of `vitft probe`")
    parser.add_argument("--rounds", type=int, default=3, help="of `vitft probe`, in turns with a pass")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()
    whole_command(given)
    for augment in ("none", "flip"):
        config = TrainConfig.parse({
            "dataset": given.dataset, "model": given.model, "image_size": given.image_size, "augment": augment,
            "max_train_samples": given.images, "val_fraction": 0.0, "max_eval_samples": 10, "freeze": "backbone",
            "precision": given.precision,
            "batch_size": given.batch_size, "epochs": given.epochs, "lr": 1e-3,
        }, "flags")  # fmt: skip
        config = resolve_auto(config)
        accelerator = make_accelerator(config)
        prepared = prepare(config)
        learner = Learner(accelerator, prepared.decode())
        pass_s = min(forward_s(learner) for _ in range(2))
        started = time.perf_counter()
        learner.get_ready()
        features_s = time.perf_counter() - started
        for step in range(learner.total_steps):
            learner.step(step)
        took_s = time.perf_counter() - started
        print(f"augment {augment}, {prepared.config.precision}: one forward pass {pass_s:.1f} s;", end=" ")
        print(
            f"features {features_s:.1f} s and {given.epochs} epochs of the head {took_s - features_s:.1f} s:", end=" "
        )
        print(f"{took_s / pass_s:.2f} of it", flush=True)


def whole_command(given: argparse.Namespace) -> None:
    """Time all that `vitft probe` does after its imports, in turns with a pass over the same images, decoded before."""
    config = resolve_auto(TrainConfig.parse({
        "dataset": given.dataset, "model": given.model, "image_size": given.image_size, "skip_test": True,
        "precision": given.precision,
        "max_train_samples": given.images, "max_eval_samples": given.held_out,
    }, "flags"))  # fmt: skip
    decoded = prepare(config).with_settings(augment="none").decode()
    passes, probes = [], []
    for _ in range(given.rounds):
        with threads(config.threads):
            parts = [examples(decoded, role) for role in ("train", "validation")]
        passes.append(sum(seconds for _, seconds in parts))
        started = time.perf_counter()
        probe(config)
        probes.append(time.perf_counter() - started)
    print(f"vitft probe, {' + '.join(f'{len(read):,}' for read, _ in parts)} images, {config.precision}:", end=" ")
    print(f"{min(probes):.1f} s, {min(probes) / min(passes):.2f} of one pass, {min(passes):.1f} s", flush=True)


def forward_s(learner: Learner) -> float:
    """Seconds of one forward pass over all training images, their resizing included."""
    loader, config = learner.loader, learner.config
    model = learner.unwrapped.eval()
    started = time.perf_counter()
    with torch.no_grad(), autocast(config.device, config.precision):
        for step in range(learner.steps_per_epoch):
            model(pixel_values=loader.unaugmented(loader.samples(step), mirror=False))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
