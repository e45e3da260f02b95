"""A step of each textbook network, by the NumPy chapters and by the torch one, turn by turn on this machine.

python benchmarks/engines.py                              # images of noise, which take as long as any
python benchmarks/engines.py --rounds 9 --steps 40 mnist-patch7
"""

import argparse
import os
import statistics
import time

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as `vitft scratch train --engine numpy` sets it

import datasets
import numpy as np

from vitft.data.sources.source import Source
from vitft.scratch.train import Engine, Images, Plan, batch, steps_per_epoch
from vitft.scratch_runner.config import load_config
from vitft.scratch_runner.training import Data, make_engine, make_plan, make_spec
from vitft.spec import ViTSpec

NETWORKS = {"mnist-patch7": (1, 28, 28), "mnist-patch4": (1, 28, 28), "cifar10-patch4": (3, 32, 32)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="recipes; all three by default")
    parser.add_argument("--rounds", type=int, default=7, help="of each engine, in turns")
    parser.add_argument("--steps", type=int, default=40, help="of one round")
    given = parser.parse_args()
    print("ms a step, data included: median of the rounds (least to most)")
    for name in given.networks:
        times: dict[str, list[float]] = {"numpy": [], "torch": []}
        runs = {engine: prepared(name, engine) for engine in times}
        for number in range(given.rounds + 1):  # the first warms up
            for engine, (made, data, spec, plan) in runs.items():
                started = time.perf_counter()
                for step in range(given.steps):
                    images, labels, masks = batch(data.train, step % steps_per_epoch(data.train, plan), spec, plan)
                    made.step(images, labels, plan.lr, masks)
                if number:
                    times[engine].append(1e3 * (time.perf_counter() - started) / given.steps)
        numpy, torch = (statistics.median(times[engine]) for engine in ("numpy", "torch"))
        spread = (f"{engine} {statistics.median(t):.1f} ({min(t):.1f} to {max(t):.1f})" for engine, t in times.items())
        print(f"{name}: {', '.join(spread)}, numpy / torch {numpy / torch:.2f}", flush=True)


def prepared(name: str, engine: str) -> tuple[Engine, Data, ViTSpec, Plan]:
    """An engine with a recipe's network, and images of noise for it."""
    _, config = load_config(name, {"engine": engine})
    rng = np.random.default_rng(0)
    images = Images(rng.integers(0, 256, (4000, *NETWORKS[name]), dtype=np.uint8), rng.integers(0, 10, 4000))
    data = Data(Source("noise", datasets.DatasetDict(), tuple("0123456789"), None), images, images, {})
    spec, plan = make_spec(config, data), make_plan(config, data)
    return make_engine(config, spec, plan), data, spec, plan


if __name__ == "__main__":
    main()
