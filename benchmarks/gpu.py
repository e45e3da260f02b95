"""The rows of docs/benchmarks.md that need a GPU, in one call, on a machine that needs no network.

    python benchmarks/gpu.py --dataset CIFAR10_FOLDER
    python benchmarks/gpu.py --device cpu --model vit-micro --image-size 28 --batch-size 8 --steps 2   # that it runs

Prints JSON: training steps of a ViT with random weights, by `vitft bench` with flips and with crops, plain, compiled
and with kernels that repeat themselves to the bit; where a step's time goes; the same steps by Transformers' Trainer at
its defaults and with bf16; then two epochs and an evaluation of the whole dataset by `vitft train`.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import contenders
import torch
from peers import machine, write_images

import vitft
from vitft.config.train import TrainConfig
from vitft.training.cost.bench import bench


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", help="as for `vitft train`")
    parser.add_argument("--images", type=int, default=10_000, help="of the training split, for the steps")
    parser.add_argument("--model", default="vit-base", help="a preset")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--max-train-samples", type=int, help="of the whole run; all by default")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    shape = {"model": given.model, "image_size": given.image_size, "batch_size": given.batch_size}
    found: dict[str, Any] = {"machine": machine(), "torch": torch.__version__}
    if given.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    common = shape | {"dataset": given.dataset, "device": given.device, "max_train_samples": given.images}
    rows = {
        "flips": {"compile": "off"}, "flips, compiled": {"compile": "on"},
        "flips, compiled, deterministic": {"compile": "on", "deterministic": True},
        "crops, compiled": {"compile": "on", "augment": "crop"},
    }  # fmt: skip
    for name, settings in rows.items():
        found[f"vitft, {name}"] = bench("train", common | settings, given.steps)
        print(json.dumps(found), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for batch_size in (given.batch_size // 8, given.batch_size):
            settings = common | {"augment": "crop", "compile": "off", "batch_size": batch_size}
            row = bench("train", settings, 1, profile=folder.with_suffix(".json"))
            found[f"a step of {batch_size} with crops"] = row["profile"]
            print(json.dumps(found), flush=True)
        write_images(given.dataset, "train", given.images, folder)
        for name in ("Transformers Trainer", "Transformers Trainer, bf16"):
            run, _ = contenders.STEPS[name]
            model = contenders.model_of(given.model, given.image_size, folder, seed=0)
            found[name] = given.batch_size / statistics.median(run(model, given, folder))
            print(json.dumps(found), flush=True)
        started = time.perf_counter()
        config = TrainConfig.parse(shape | {
            "dataset": given.dataset, "from_scratch": True, "val_fraction": 0.0, "epochs": 2, "device": given.device,
            "compile": "on", "max_train_samples": given.max_train_samples, "max_eval_samples": given.max_train_samples,
        }, "flags")  # fmt: skip
        result = vitft.train(config, output=folder / "run")
        found["two epochs and an evaluation, s"] = time.perf_counter() - started
        found["test accuracy"] = result.scores["test"].accuracy
    print(json.dumps(found))


if __name__ == "__main__":
    main()
