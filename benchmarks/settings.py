"""What each setting costs: seconds of a training step and memory beyond the weights, in turns.

python benchmarks/settings.py --dataset CIFAR10_FOLDER --model VIT_S14_FOLDER --image-size 98 [--rounds 3]

Each measurement is a process of its own: batches of 32, two steps to warm up, then STEPS. Memory is the most that was
resident in those (VmHWM, reset before them) beyond what the process held before its first step. The least of all
rounds counts: other programs only add to it.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = (
    "", "--head-init random", "--freeze backbone --augment crop", "--layer-decay 0.75", "--drop-path 0.1", "--ema 0.99",
    "--augment none", "--augment crop", "--augment trivial", "--mixup 0.2", "--cutmix 1", "--erase 0.25",
    "--label-smoothing 0.1", "--focal-loss 2", "--lora-rank 8", "--lora-rank 16", "--grad-checkpointing",
)  # fmt: skip
WARM, STEPS = 2, 8


def main() -> None:
    """Print a table: each setting beside the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    given, flags = parser.parse_known_args()
    if "--measure" in flags:
        flags.remove("--measure")
        return print(json.dumps(measured(flags)))
    found: dict[str, list[tuple[float, float]]] = {setting: [] for setting in SETTINGS}
    for number in range(given.rounds):
        for setting in SETTINGS:
            command = [sys.executable, __file__, "--measure", *flags, *shlex.split(setting)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[setting].append(json.loads(done.stdout.splitlines()[-1]))
            print(number, setting or "the defaults", found[setting][-1], file=sys.stderr, flush=True)
    seconds = {setting: min(one for one, _ in runs) for setting, runs in found.items()}
    memory = {setting: min(one for _, one in runs) for setting, runs in found.items()}
    print("| setting | a step | beside the defaults | memory beyond the weights |\n|---|---|---|---|")
    for setting in SETTINGS:
        name = f"`{setting}`" if setting else "the defaults"
        ratio = seconds[setting] / seconds[""]
        print(f"| {name} | {1000 * seconds[setting]:.0f} ms | {ratio:.2f} | {memory[setting]:.0f} MB |")
    return None


def measured(flags: list[str]) -> tuple[float, float]:
    """Seconds of a step, and megabytes, with these flags of `vitft train`."""
    from vitft.config.train import TrainConfig
    from vitft.hardware.device import make_accelerator, resolve_auto, threads
    from vitft.training.setup import prepare
    from vitft.training.step import Learner

    words = [word.removeprefix("--").replace("-", "_") for word in flags]
    settings = {"max_train_samples": 32 * (WARM + STEPS), "epochs": 1, "val_fraction": 0.0, "skip_test": True}
    place = 0
    while place < len(words):
        alone = place + 1 == len(words) or flags[place + 1].startswith("--")
        settings[words[place]] = True if alone else flags[place + 1]
        place += 1 if alone else 2
    config = resolve_auto(TrainConfig.parse(settings, "flags"))
    learner = Learner(make_accelerator(config), prepare(config).decode())
    with threads(config.threads):
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        for step in range(WARM):
            learner.step(step)
        start = time.perf_counter()
        for step in range(WARM, WARM + STEPS):
            learner.step(step)
        return (time.perf_counter() - start) / STEPS, resident("VmHWM") - before


def resident(what: str) -> float:
    """A line of /proc/self/status, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))


if __name__ == "__main__":
    main()
