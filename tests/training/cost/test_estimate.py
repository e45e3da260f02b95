"""A dry run's estimates against what then happens, on three configurations: within 20 %.

Slow, and only true on a machine that does nothing else: `make soak` runs it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGURATIONS = {
    "small model, small images": {
        "model": "vit-micro", "image_size": 56, "batch_size": 32, "epochs": 4,
    },
    "larger model, few steps": {
        "model": "vit-tiny", "image_size": 96, "batch_size": 32, "epochs": 1,
        "max_train_samples": 640, "max_eval_samples": 100,
    },
    "crops, accumulation": {
        "model": "vit-small", "image_size": 64, "batch_size": 48, "micro_batch_size": 16, "epochs": 1,
        "augment": "crop", "max_train_samples": 480, "max_eval_samples": 100,
    },
}  # fmt: skip

ESTIMATE = """
import dataclasses, json, sys
from vitft.training.cost import dry_run
from vitft.config.train import TrainConfig
from vitft.hardware.device import micro_batch
plan = dry_run.plan(TrainConfig.parse(json.loads(sys.argv[1]), "flags"))
print(json.dumps([plan.size.train_s, plan.size.evaluate_s, plan.memory_bytes]))
"""
MEASURE = """
import json, resource, sys
from pathlib import Path
from vitft import TrainConfig, train
config = TrainConfig.parse(json.loads(sys.argv[1]), "flags")
run = train(config, output=sys.argv[2]).run
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
train_s, before, evaluate_s = 0.0, 0, 0.0
for line in lines:
    if line["split"] == "train":
        train_s += (line["step"] - before) * config.batch_size / line["images_per_s"]
        before = line["step"]
    else:
        evaluate_s += line["count"] / line["images_per_s"]
print(json.dumps([train_s, evaluate_s, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def answer(code: str, *words: str) -> list[float]:
    cores = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=cores)
    assert done.returncode == 0, done.stderr
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_dry_run_is_within_a_fifth_of_the_run(name: str, tmp_path: Path) -> None:
    settings = json.dumps(
        {"dataset": "digits", "from_scratch": True, "device": "cpu", "val_fraction": 0, "compile": "off"}
        | CONFIGURATIONS[name]
    )
    train_s, evaluate_s, memory = answer(ESTIMATE, settings)
    took_s, evaluated_s, peak = answer(MEASURE, settings, str(tmp_path / "run"))
    ratios = (train_s + evaluate_s) / (took_s + evaluated_s), memory / peak
    said = (
        f"{name}: {train_s:.1f} + {evaluate_s:.1f} s, {took_s:.1f} + {evaluated_s:.1f} taken; "
        f"{memory / 1e9:.2f} GB, {peak / 1e9:.2f} taken; ratios {ratios[0]:.2f}, {ratios[1]:.2f}"
    )
    print(said)  # noqa: T201  (with -s, for docs/benchmarks.md)
    assert 0.8 <= ratios[0] <= 1.2, said
    assert 0.8 <= ratios[1] <= 1.2, said
