"""Real processes: signalled, and several at once. What counts is what they leave behind."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from tests.forked import HANGS_S, LONGER, ended, finish_together, finish_two, flags, start, steps_done, wait_for_step
from tests.training.test_trainer import AUGMENTED, assert_same_weights, config, lines
from vitft import Callback, evaluate, train
from vitft.checkpoints.checkpoint import is_run, newest_intact, read_config, read_state
from vitft.data.loader import EvalLoader
from vitft.errors import UsageError
from vitft.evaluation import evaluation
from vitft.evaluation.metrics import Metrics
from vitft.evaluation.results import read_results
from vitft.training import loop, run_folder
from vitft.training.callbacks import MetricsFile
from vitft.training.step import Learner
from vitft.training.trainer import resume


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_resume(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run = tmp_path / "run"
    process = start("train", *flags(save_every=1000), "--output", str(run), log=tmp_path / "log")
    wait_for_step(process.is_alive, run, 12)
    os.kill(process.pid, number)
    assert ended(process) == code
    said = (tmp_path / "log").read_text()
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


FITTED = FROZEN | {"freeze": "none"}  # all is trained, from a head that is fitted to features


ADAPTED = FITTED | {"head_init": "random", "lora_rank": 2}
MIXED = AUGMENTED | {"sampling": "balanced", "focal_loss": 1.0}
IN_BF16 = MIXED | {"precision": "bf16"}


@pytest.mark.parametrize(
    "other",
    [MIXED, FROZEN, FITTED, IN_BF16, pytest.param(ADAPTED, marks=pytest.mark.slow)],
    ids=["mixed", "probe", "fitted head", "bf16", "adapter"],
)
def test_two_processes_train_as_one_does(tmp_path: Path, other: dict[str, object]) -> None:
    """The same samples and augmentations in every step; losses equal up to the order of sums.

    L-BFGS ends where its steps become small, which makes more of such a difference; other samples make 100 times more.
    """
    close = 1e-3 if other is FITTED else 0.03 if other is IN_BF16 else 1e-5
    # A batch of 9 is shared unevenly, 70 images leave a tail of 7, and 50 evaluated ones two shards.
    changes = {"batch_size": 9, "max_train_samples": 70, "save_every": None, "max_eval_samples": 49} | other
    one = train(config(**changes), output=tmp_path / "one").run
    two = tmp_path / "two"
    (first, said), (second, silent) = finish_two("train", *flags(**changes), "--output", str(two), log=tmp_path / "log")
    assert (first, second) == (0, 0), (said, silent)
    assert is_run(two)
    assert said.count("test accuracy") == 1
    assert silent == ""  # one process speaks
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], abs=close)
        assert a.get("count") == b.get("count")
    mine, theirs = (load_file(run / "last" / "model.safetensors") for run in (one, two))
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 10 * close
    assert evaluate(two).count == 49
    said_by_one, said_by_two = (read_results(run).predictions("test") for run in (one, two))
    assert said_by_one.ids == said_by_two.ids
    np.testing.assert_allclose(said_by_one.probabilities, said_by_two.probabilities, atol=10 * close)


def test_a_run_of_two_processes_resumes_on_one(tmp_path: Path) -> None:
    """Batches depend on the step alone, so the number of processes may change. Here torchrun itself starts them."""
    run = tmp_path / "run"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             "-m", "vitft", "train", *flags(), "--output", str(run)]  # fmt: skip
    own = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=own)
    wait_for_step(lambda: process.poll() is None, run, 12)
    workers = psutil.Process(process.pid).children()
    next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
    assert process.wait(HANGS_S) != 0  # the other one does not go on alone
    assert not psutil.wait_procs(workers, HANGS_S)[1]
    assert steps_done(run) < 80
    whole = train(config(**LONGER), output=tmp_path / "whole").run
    resume(run)
    for a, b in zip(lines(whole), lines(run), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)


def test_an_error_of_all_processes_is_told_once(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "vitft"]
    done = subprocess.run(
        [*words, "train", "--datset", "digits"], capture_output=True, text=True, timeout=HANGS_S,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert told == ["error: --datset: `vitft train` has no such flag; did you mean --dataset?"]


def killed_in_a_step() -> None:
    """The second of two processes dies in step 4; the first one has the time to say so."""
    real = Learner.step
    if os.environ["RANK"] == "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def step(self: Learner, number: int) -> Any:
        if number == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, number)

    Learner.step = step  # type: ignore[method-assign]


def test_a_process_that_loses_another_says_so(tmp_path: Path) -> None:
    words = ["train", *flags(max_steps=8, save_every=2), "--output", str(tmp_path / "run")]
    (first, said), (second, _) = finish_two(*words, log=tmp_path / "log", before=killed_in_a_step)
    assert (first, second) == (1, -signal.SIGKILL)
    assert "error: another process of this command has ended; it says why, unless it was killed.\n" in said


def test_three_processes_end_with_the_same_bits_after_one_is_killed(tmp_path: Path) -> None:
    """Sums of two numbers have no order. Those of three do, and it must not depend on where a run was interrupted."""
    words = ["train", *flags(batch_size=12, max_steps=8, save_every=2), "--output"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert [code for code, _ in finish_together(3, *words, str(whole), log=tmp_path / "log")] == [0, 0, 0]
    assert finish_together(3, *words, str(cut), log=tmp_path / "log", before=killed_in_a_save)[0][0] < 0
    assert newest_intact(cut)[0] == cut / "checkpoints" / "step-000002"
    all_ = finish_together(3, "train", "--resume", str(cut), log=tmp_path / "log")
    assert [code for code, _ in all_] == [0, 0, 0], all_
    assert_same_weights(whole / "last", cut / "last")


def test_torchrun_restarts_a_run_that_goes_on_by_itself(tmp_path: Path) -> None:
    """As on two machines, each of which counts its own restarts: the second one's process is killed."""
    with socket.socket() as any_free:
        any_free.bind(("127.0.0.1", 0))
        port = any_free.getsockname()[1]
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend",
             "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "one", "--max-restarts", "1",
             "-m", "vitft", "train", *flags(), "--report", "off"]  # fmt: skip
    own = os.environ | {"TMPDIR": str(tmp_path)}
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    machines = [
        subprocess.Popen(words, stdout=log.open("w"), stderr=subprocess.STDOUT, env=own, cwd=tmp_path) for log in logs
    ]
    run = tmp_path / "runs" / "digits-vit-micro-scratch-1"
    wait_for_step(lambda: all(machine.poll() is None for machine in machines), run, 12)
    workers = [worker for machine in machines for worker in psutil.Process(machine.pid).children()]
    next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
    assert [machine.wait(HANGS_S) for machine in machines] == [0, 0]
    said = "".join(log.read_text() for log in logs)
    assert f"resuming {run.relative_to(tmp_path)} at step" in said, said[-2000:]
    assert [file.name for file in run.parent.iterdir()] == [run.name]
    assert read_state(run / "last").step == 80
    whole = train(config(**LONGER), output=tmp_path / "whole").run
    for a, b in zip(lines(whole), lines(run), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make this the process of a new torchrun."""
    stores = []

    def launch() -> None:
        stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stores[-1].port), "RANK": "0", "WORLD_SIZE": "1",
                    "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(run_folder, "_trainings", count())

    return launch


def test_a_restart_goes_on_with_its_own_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: Callable[[], None]
) -> None:
    """Not with one that was there before, even with --overwrite; and it starts again if nothing was saved."""

    def restarted() -> None:
        monkeypatch.setattr(run_folder, "_trainings", count())

    short, run = {"max_steps": 4, "save_every": 2}, tmp_path / "run"
    launched()
    train(config(**short), output=run)
    launched()
    with pytest.raises(UsageError, match="the folder exists"):
        train(config(**short), output=run)
    launched()
    again = train(config(**short, seed=1), output=run, overwrite=True)
    assert again.speed is not None
    assert read_config(run).seed == 1
    restarted()
    assert train(config(**short, seed=1), output=run, overwrite=True).speed is None  # it is finished
    for folder in ("last", "best", "checkpoints"):
        shutil.rmtree(run / folder)
    (run / "checkpoints").mkdir()
    restarted()
    assert train(config(**short, seed=1), output=run).speed is not None
    with pytest.raises(UsageError, match="the folder exists"):  # a second training of the same process
        train(config(**short, seed=2), output=run)
    restarted()
    assert train(config(**short, seed=1), output=run).run == run
    restarted()
    other = train(config(**short, seed=2), output=tmp_path / "other")  # as of a sweep that has left out what is done
    assert (other.run, read_config(other.run).seed) == (tmp_path / "other", 2)


def slow_to_repair() -> None:
    """The first process takes its time to clear away what a kill left."""
    real = run_folder.clean_up

    def clean_up(folder: Path) -> None:
        time.sleep(1)
        real(folder)

    run_folder.clean_up = clean_up


def test_processes_resume_a_run_once_the_first_one_has_repaired_its_folder(tmp_path: Path) -> None:
    """A kill had left it set aside, to be replaced by another."""
    run = train(config(max_steps=4, save_every=2, keep_finished=1), output=tmp_path / "run").run
    aside = run / ".vitft-replaced"
    aside.mkdir()
    for file in set(run.iterdir()) - {aside}:
        file.rename(aside / file.name)
    words = ["train", "--resume", str(run), "--max-steps", "6"]
    both = finish_two(*words, log=tmp_path / "log", before=slow_to_repair)
    assert [code for code, _ in both] == [0, 0], both
    assert read_state(run / "last").step == 6


class Counted(Callback):
    """Counts evaluations in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_evaluation(self, step: int, epoch: float, metrics: Metrics) -> None:
        with self.file.open("a") as counted:
            counted.write(f"{step}\n")


def followed_by_the_first(file: str) -> None:
    """Only the first process is given a callback."""
    real = loop.Run.__init__

    def begin(self: loop.Run, *given: Any, **named: Any) -> None:
        real(self, *given, **named)
        self.callbacks = [Counted(Path(file))] if os.environ["RANK"] == "0" else []

    loop.Run.__init__ = begin  # type: ignore[method-assign]


def test_a_callback_may_be_given_to_the_main_process_alone(tmp_path: Path) -> None:
    words = ["train", *flags(max_steps=4, eval_every=2), "--output", str(tmp_path / "run")]
    told = partial(followed_by_the_first, str(tmp_path / "steps"))
    assert [code for code, _ in finish_two(*words, log=tmp_path / "log", before=told)] == [0, 0]
    assert (tmp_path / "steps").read_text().split()[:2] == ["2", "4"]


def test_a_run_of_one_process_resumes_on_two(tmp_path: Path) -> None:
    """The reverse; every step has the same samples, so the losses agree up to the order of sums."""
    run = tmp_path / "run"
    process = start("train", *flags(), "--output", str(run), log=tmp_path / "log")
    wait_for_step(process.is_alive, run, 12)
    process.kill()
    process.join()
    both = finish_two("train", "--resume", str(run), log=tmp_path / "log")
    assert [code for code, _ in both] == [0, 0], both
    whole = train(config(**LONGER), output=tmp_path / "whole").run
    for a, b in zip(lines(whole), lines(run), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def signalled(folder: str, last: int) -> None:
    """The second of two processes is told to stop after this batch of a validation; each leaves a file a batch."""
    evaluation.BATCH, real, rank = 4, EvalLoader.__iter__, os.environ["RANK"]

    def batches(self: EvalLoader) -> Iterator[Any]:
        for number, batch in enumerate(real(self)):
            Path(folder, f"batch-{rank}-{number}").touch()
            yield batch
            if rank == "1" and number == last:
                os.kill(os.getpid(), signal.SIGTERM)

    EvalLoader.__iter__ = batches  # type: ignore[method-assign]


def recorded_calls(folder: str) -> None:
    """Write down, in order, what this process asks of all others, its log lines, and its batches of evaluation."""
    evaluation.BATCH, file = 4, Path(folder, os.environ["RANK"])

    def say(what: str) -> None:
        with file.open("a") as written:
            written.write(f"{what}\n")

    def recording(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            later = named.get("async_op", False)
            say("ask" if later else what)
            work = real(*given, **named)

            def wait() -> None:
                say("answer")
                work.wait()

            return SimpleNamespace(wait=wait) if later else work

        setattr(owner, name, call)

    for name in ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "broadcast",
                 "broadcast_object_list", "gather_object", "reduce", "scatter"):  # fmt: skip
        recording(torch.distributed, name, name)
    recording(MetricsFile, "on_log", "line")
    real = EvalLoader.__iter__

    def batches(self: EvalLoader) -> Iterator[Any]:
        for batch in real(self):
            say("batch")
            yield batch

    EvalLoader.__iter__ = batches  # type: ignore[method-assign]


def test_nobody_waits_for_another_between_two_lines_or_two_batches(tmp_path: Path) -> None:
    """Whether all go on is asked once a step, and answered a step later."""
    words = ["train", *flags(max_steps=12, log_every=4, max_eval_samples=49), "--output", str(tmp_path / "run")]
    both = finish_two(*words, log=tmp_path / "log", before=partial(recorded_calls, str(tmp_path)))
    assert [code for code, _ in both] == [0, 0], both
    said = (tmp_path / "0").read_text().splitlines()
    first, second = [number for number, what in enumerate(said) if what == "line"][:2]
    assert said[first + 1 : second] == [*["answer", "ask"] * 4, "all_reduce"]  # the last one: the line's means
    batches = [number for number, what in enumerate(said) if what == "batch"]
    assert said[batches[1] : batches[6] + 1] == [*["batch", "answer", "ask"] * 5, "batch"]


def killed_in_a_save() -> None:
    """The first of two processes dies in the middle of saving step 4."""
    real, done = os.fsync, list[bool]()

    def fsync(handle: int) -> None:
        done.append("step-000004" in str(Path(f"/proc/self/fd/{handle}").readlink()))
        if os.environ["RANK"] == "0" and sum(done) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)

    os.fsync = fsync


@pytest.mark.parametrize(("parallel", "last"), [("ddp", 0), ("fsdp", 0), ("fsdp", 4)])
def test_two_processes_interrupt_a_validation_together(tmp_path: Path, parallel: str, last: int) -> None:
    """One is told to stop after its first batch, or its last but one; of 49 images the other has one batch more."""
    changes = {"max_eval_samples": 49, "max_train_samples": 64, "save_every": 100}
    words = ["train", *flags(**changes, parallel=parallel), "--output", str(tmp_path / "run")]
    both = finish_two(*words, log=tmp_path / "log", before=partial(signalled, str(tmp_path), last))
    assert [code for code, _ in both] == [143, 143], both
    assert both[1][1] == ""  # the first one says it
    said = " ".join(both[0][1].split())
    assert "stopped by SIGTERM at step 8 of 16; everything is saved" in said, said[-2000:]
    # The others are told after the next batch, and stop after the one that they are at by then.
    assert len(list(tmp_path.glob("batch-1-*"))) == min(last + 3, 6)
    assert len(list(tmp_path.glob("batch-0-*"))) == min(last + 3, 7)
    folder, passed = newest_intact(tmp_path / "run")
    assert folder is not None
    assert passed == []
    assert read_state(folder).validation_due
    whole = train(config(**LONGER | changes), output=tmp_path / "whole").run
    resume(tmp_path / "run")
    for a, b in zip(lines(whole), lines(tmp_path / "run"), strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_a_process_that_is_killed_in_the_middle_of_a_save_costs_nothing_that_was_saved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", *flags(max_steps=8, save_every=2), "--output", str(run)]
    first, second = finish_two(*words, log=tmp_path / "log", before=killed_in_a_save)
    assert first[0] == -signal.SIGKILL
    assert second[0] != 0
    assert list((run / "checkpoints").glob(".step-*.vitft-new")), (first, second)  # it was in the middle of it
    folder, passed = newest_intact(run)
    assert folder is not None
    assert passed == []
    assert resume(run).step > 0
    assert read_state(run / "last").step == 8
    assert not list(run.rglob(".*"))
