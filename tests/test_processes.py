"""Real processes: signalled, and several at once. What counts is what they leave behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from tests.forked import LONGER, flags, start, steps_done, wait_for_step
from tests.test_trainer import assert_same_weights, config, lines
from vitft import evaluate, train
from vitft.checkpoint import is_run
from vitft.trainer import resume


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run = tmp_path / "run"
    process = start("train", *flags(save_every=1000), "--output", str(run), log=tmp_path / "log")
    wait_for_step(process.is_alive, run, 12)
    os.kill(process.pid, number)
    process.join(60)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == code
    assert f"vitft train --resume {run}" in said.replace("\n", " ")
    assert "Traceback" not in said
    saved = [folder.name for folder in (run / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert steps_done(run) == int(saved[0].removeprefix("step-"))  # no step is lost
    whole = train(config(**LONGER | {"save_every": 1000}), output=tmp_path / "whole").run
    assert_same_weights(whole / "last", resume(run).run / "last")


FROZEN = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp")) | {
    "from_scratch": False, "freeze": "backbone", "augment": "flip", "epochs": 4,
}  # fmt: skip


@pytest.mark.parametrize(("port", "other"), [(29431, {"augment": "crop"}), (29433, FROZEN)], ids=["crops", "probe"])
def test_two_processes_train_as_one_does(tmp_path: Path, port: int, other: dict[str, object]) -> None:
    """The same samples and augmentations in every step; losses equal up to the order of sums."""
    # A batch of 9 is shared unevenly, 70 images leave a tail of 7, and 50 evaluated ones two shards.
    changes = {"batch_size": 9, "max_train_samples": 70, "save_every": None, "max_eval_samples": 49} | other
    one = train(config(**changes), output=tmp_path / "one").run
    two = tmp_path / "two"
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port),
             "-m", "vitft", "train", *flags(**changes), "--output", str(two)]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert is_run(two)
    assert done.stdout.count("test accuracy") == 1  # one process speaks
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a.get("count") == b.get("count")
    first, second = (load_file(run / "last" / "model.safetensors") for run in (one, two))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4
    assert evaluate(two).count == 49


def test_a_run_of_two_processes_that_loses_one_goes_on_as_one(tmp_path: Path) -> None:
    """Batches depend on the step alone, so the number of processes may change."""
    run = tmp_path / "run"
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29432",
             "-m", "vitft", "train", *flags(), "--output", str(run)]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(lambda: process.poll() is None, run, 12)
    workers = psutil.Process(process.pid).children()
    next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
    assert process.wait(timeout=120) != 0  # the other one does not go on alone
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert steps_done(run) < 80
    whole = train(config(**LONGER), output=tmp_path / "whole").run
    resume(run)
    for a, b in zip(lines(whole), lines(run), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)


def test_a_run_of_one_process_goes_on_as_two(tmp_path: Path) -> None:
    """The reverse; every step has the same samples, so the losses agree up to the order of sums."""
    run = tmp_path / "run"
    process = start("train", *flags(), "--output", str(run), log=tmp_path / "log")
    wait_for_step(process.is_alive, run, 12)
    process.kill()
    process.join()
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29434",
             "-m", "vitft", "train", "--resume", str(run)]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = train(config(**LONGER), output=tmp_path / "whole").run
    for a, b in zip(lines(whole), lines(run), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
