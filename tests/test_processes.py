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
from vitft.checkpoint import is_run, newest_whole, read_state
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


# What happens in one of two processes, before `vitft` begins there.
SIGNALLED = """
import os, signal
from vitft import evaluation
from vitft.data.loader import EvalLoader
evaluation.BATCH, real = 4, EvalLoader.__iter__
def batches(self):
    for number, batch in enumerate(real(self)):
        open(f"batch-{os.environ['RANK']}-{number}", "w").close()
        yield batch
        if os.environ["RANK"] == "1" and number == 0:
            os.kill(os.getpid(), signal.SIGTERM)
EvalLoader.__iter__ = batches
"""
KILLED_IN_A_SAVE = """
import os, signal
real, done = os.fsync, []
def fsync(handle):
    done.append("step-000004" in os.readlink(f"/proc/self/fd/{handle}"))
    if os.environ["RANK"] == "0" and sum(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
"""


def two(before: str, port: int, folder: Path, **changes: object) -> "subprocess.CompletedProcess[str]":
    """`vitft train` in two processes, with what is done before in each, in this folder."""
    script = folder / "script.py"
    script.write_text(f"{before}\nfrom vitft.cli import main\nmain()\n")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port),
             str(script), "train", *flags(**changes), "--output", str(folder / "run")]  # fmt: skip
    paths = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        words, capture_output=True, text=True, timeout=240, check=False, cwd=folder, env=os.environ | paths
    )


def test_two_processes_break_a_validation_off_together(tmp_path: Path) -> None:
    """One is told to stop after its first batch; of 49 images the other has one batch more than it."""
    changes = {"max_eval_samples": 49, "max_train_samples": 64, "save_every": 100}
    done = two(SIGNALLED, 29435, tmp_path, **changes)
    assert done.returncode != 0
    said = " ".join(done.stderr.split())
    assert "stopped by SIGTERM at step 8 of 16; everything is saved" in said, said[-2000:]
    assert len(list(tmp_path.glob("batch-1-*"))) < 6  # of six
    assert len(list(tmp_path.glob("batch-0-*"))) < 6  # of seven
    folder, passed = newest_whole(tmp_path / "run")
    assert folder is not None
    assert passed == []
    assert read_state(folder).validation_due
    whole = train(config(**LONGER | changes), output=tmp_path / "whole").run
    resume(tmp_path / "run")
    for a, b in zip(lines(whole), lines(tmp_path / "run"), strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_a_process_that_is_killed_in_the_middle_of_a_save_costs_nothing_that_was_saved(tmp_path: Path) -> None:
    done = two(KILLED_IN_A_SAVE, 29436, tmp_path, max_steps=8, save_every=2)
    assert done.returncode != 0
    run = tmp_path / "run"
    assert list((run / "checkpoints").glob(".step-*.vitft-new")), done.stderr[-2000:]  # it was in the middle of it
    folder, passed = newest_whole(run)
    assert folder is not None
    assert passed == []
    assert resume(run).step > 0
    assert read_state(run / "last").step == 8
    assert not list(run.rglob(".*"))
