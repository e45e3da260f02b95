"""vitft beside its peers: the same images, shape, batch and steps, turn by turn in one process.

    python benchmarks/peers.py data --dataset CIFAR10_FOLDER       # images a second into the model's input
    python benchmarks/peers.py data --dataset CIFAR10_FOLDER --kinds mix  # TrivialAugment, mixup and random erasing
    python benchmarks/peers.py data --photos 600                   # JPEGs of 500x375, made for this
    python benchmarks/peers.py data --photos 60 --photo-size 2000 1500
    python benchmarks/peers.py train --dataset CIFAR10_FOLDER --model VIT_FOLDER --image-size 98
    python benchmarks/peers.py accuracy --dataset CIFAR10_FOLDER --model VIT_FOLDER --image-size 98 --seeds 3
    python benchmarks/peers.py defaults --dataset CIFAR10_FOLDER --model VIT_FOLDER --image-size 98 --epochs 2

Every contender reads the same files from one folder of images per class. torchvision and timm have to be there:
`make bench` makes an environment for it. `--into docs/benchmarks.md` also puts the table there, at its mark.
"""

import argparse
import logging
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import contenders
import datasets
import torch
from photos import make_photos

from vitft.data.sources.source import class_indices, open_dataset
from vitft.hardware.device import peak_flops
from vitft.models.load import shape_of
from vitft.spec import training_flops

PACKAGES = ("vitft", "torch", "torchvision", "transformers", "accelerate", "datasets", "timm", "pillow")


KINDS = {"none": "resize", "crop": "random crop and flip", "mix": "TrivialAugment, mixup and random erasing"}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "train", "accuracy", "defaults"))
    parser.add_argument("--dataset", default="digits", help="as for `vitft train`")
    parser.add_argument("--photos", type=int, help="in place of a dataset: this many photos, made now")
    parser.add_argument("--photo-size", type=int, nargs=2, default=(500, 375), help="their width and height")
    parser.add_argument("--images", type=int, default=4000, help="of the training split, from its beginning")
    parser.add_argument("--test-images", type=int, default=2000, help="accuracy: of the test split")
    parser.add_argument("--model", default="vit-small-patch14-224", help="a preset (new weights) or a model folder")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=["none", "crop"], help="data: which transforms")
    parser.add_argument("--steps", type=int, default=10, help="train: of one round, after three that warm up")
    parser.add_argument("--rounds", type=int, default=5, help="of each contender, in turns")
    parser.add_argument("--seeds", type=int, default=3, help="accuracy: 0, 1, ...")
    parser.add_argument("--epochs", type=int, default=2, help="defaults: passes over the training images")
    parser.add_argument("--only", nargs="*", help="contenders whose name holds one of these words")
    parser.add_argument("--into", type=Path, help="a file with a mark `<!-- peers NAME -->`, and its end")
    parser.add_argument("--name", help="of the mark")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if given.photos:
            make_photos(folder / "train", given.photos, *given.photo_size)
        else:
            write_images(given.dataset, "train", given.images, folder / "train")
        if given.what in ("accuracy", "defaults"):
            write_images(given.dataset, "test", given.test_images, folder / "test")
        tables = {"data": data, "train": train, "accuracy": accuracy, "defaults": accuracy}
        table = tables[given.what](given, folder)
    hide = {"--into", "--name", str(given.into), given.name}
    words = " ".join(hidden(word) for word in sys.argv[1:] if word not in hide)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES if find_spec(name) or name == "pillow")
    text = (
        f"`python benchmarks/peers.py {words}`; {machine()}; Python {platform.python_version()}, {versions}.\n\n{table}"
    )
    print(text)
    if given.into:
        mark, end = f"<!-- peers {given.name} -->", "<!-- end -->"
        page = given.into.read_text()
        assert mark in page, f"{given.into} has no {mark}"
        found = re.sub(f"{mark}.*?{end}", lambda _: f"{mark}\n{text}\n{end}", page, count=1, flags=re.DOTALL)
        given.into.write_text(found)


def data(given: argparse.Namespace, folder: Path) -> str:
    """A table of images a second, of the first pass with its decoding and of later ones, and of what they show.

    The detail is the gradient energy of the inputs, relative to the first row's: who reads smaller copies has less of
    it, and does less work. Crops are drawn anew in each pass, so theirs agree to a few percent.
    """
    rows = []
    for kind in given.kinds:
        passes = {}
        first = {}
        inputs = contenders.MIXED if kind == "mix" else contenders.INPUTS
        for name, make in chosen(inputs, given.only).items():
            started = time.perf_counter()
            run = make(folder / "train", given.image_size, kind, given.batch_size)
            count = sum(map(len, run()))
            first[name], passes[name] = count / (time.perf_counter() - started), run
        rates: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(given.rounds):
            for name, run in passes.items():
                started = time.perf_counter()
                count = sum(map(len, run()))
                rates[name].append(count / (time.perf_counter() - started))
        details = dict.fromkeys(passes, "")  # of mixed images, whose operations differ too much
        if kind != "mix":
            energies = {name: detail(run()) for name, run in passes.items()}
            base = next(iter(energies.values()))
            details = {name: f"{energy / base:.2f}" for name, energy in energies.items()}
        rows += [[KINDS[kind], name, f"{first[name]:,.0f}", *rated(rates, name), details[name]] for name in rates]
    head = ["transforms", "input path", "first pass, images/s", "later passes, images/s", "ratio", "detail"]
    return table(head, rows)


def detail(batches: Iterable[torch.Tensor]) -> float:
    """The mean squared difference of neighboring pixels of all images (B, 3, H, W): their gradient energy."""
    energies = [(pixels.diff(dim=2) ** 2).mean((1, 2, 3)) + (pixels.diff(dim=3) ** 2).mean((1, 2, 3))
                for pixels in batches]  # fmt: skip
    return float(torch.cat(energies).mean())


def train(given: argparse.Namespace, folder: Path) -> str:
    """A table of training images a second, data included, with shares of the machine's matrix peak."""
    rates: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    spec = None
    for _ in range(given.rounds):
        for name, (run, precision) in chosen(contenders.STEPS, given.only).items():
            model = contenders.model_of(given.model, given.image_size, folder / "train", seed=0)
            spec = shape_of(model)
            peak = peak_flops(given.device, precision)  # beside each measurement: the machine's pace changes
            rate = given.batch_size / statistics.median(run(model, given, folder / "train"))
            rates.setdefault(name, []).append(rate)
            shares.setdefault(name, []).append(rate * training_flops(spec) / peak)
    rows = [[name, *rated(rates, name), f"{100 * statistics.median(shares[name]):.0f} %"] for name in rates]
    return table(["training", "images/s", "ratio", "share of the peak in its precision"], rows)


def accuracy(given: argparse.Namespace, folder: Path) -> str:
    """A table of test accuracy, by seed, from the same weights: of one epoch with the same settings, or by defaults."""
    rows = []
    same = given.what == "accuracy"
    for name, run in chosen(contenders.EPOCHS if same else contenders.DEFAULTS, given.only).items():
        for seed in range(given.seeds):
            started = time.perf_counter()
            right, total = run(given, folder, seed)
            rows.append(
                [name, str(seed), f"{right / total:.2%} of {total:,}", f"{time.perf_counter() - started:.0f} s"]
            )
    length = "one epoch" if same else f"epochs: {given.epochs}"
    return table([length, "seed", "test accuracy", "whole"], rows)


def chosen(all_of_them: dict, only: list[str] | None) -> dict:
    """Those that were asked for."""
    return {name: one for name, one in all_of_them.items() if not only or any(word in name for word in only)}


def rated(rates: dict[str, list[float]], name: str) -> list[str]:
    """Median and spread, and the ratio of medians to the first row's."""
    mine = statistics.median(rates[name])
    base = statistics.median(next(iter(rates.values())))
    digits = 0 if mine >= 100 else 2
    spread = f"{min(rates[name]):,.{digits}f} to {max(rates[name]):,.{digits}f}"
    return [f"{mine:,.{digits}f} ({spread})", f"{mine / base:.2f}"]


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def write_images(dataset: str, split: str, count: int, folder: Path) -> None:
    """The first images of a split as files, in a folder per class, as they are stored."""
    source = open_dataset(dataset)
    rows = source.splits[split]
    rows = rows.select(range(min(count, len(rows))))
    for number, (row, label) in enumerate(zip(rows, class_indices(rows), strict=True)):
        content = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
        kind = "jpg" if content[:2] == b"\xff\xd8" else "png" if content[:4] == b"\x89PNG" else "ppm"
        place = folder / str(source.labels[int(label)])
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06}.{kind}").write_bytes(content)


def machine() -> str:
    """The processor and its cores."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", file.read_text()) if file.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def hidden(word: str) -> str:
    """A path's last part: where things lie on this machine is nobody's business."""
    return Path(word).name.upper() + "_FOLDER" if os.sep in word and Path(word).is_dir() else word


if __name__ == "__main__":
    main()
