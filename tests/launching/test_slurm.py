"""Jobs of a real SLURM on this machine: preempted, out of time, canceled, on two nodes."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.test_app import vitft
from tests.forked import ended, finish_two, flags, start, wait_for_step
from tests.launching.cluster import HANGS_S, cluster, idle, lacking
from tests.training.test_trainer import assert_same_weights

pytestmark = pytest.mark.skipif(lacking() is not None, reason=lacking() or "")

RUN = {"epochs": 6, "save_every": 1000}  # 240 steps, saved at the end or when a signal asks for it


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    assert ended(start("train", *flags(**RUN), "--output", str(folder / "run"), log=folder / "log")) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def _in_the_cluster(slurm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm[name])
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))


def submit(*words: str) -> str:
    done = vitft("launch", "--slurm", "--gpus-per-node", "0", *words)
    assert done.exit_code == 0, done.output
    return re.match(r"job (\d+)", done.stdout)[1]  # type: ignore[index]


def slurm_says(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def state(job: str) -> str:
    """The state of a job, and how often it was requeued: COMPLETED 1."""
    found = re.search(r"JobState=(\w+).*Restarts=(\d+)", slurm_says("scontrol", "--oneliner", "show", "job", job))
    assert found is not None
    return f"{found[1]} {found[2]}"


def wait_for(condition: Callable[[], bool], job: str) -> None:
    until = time.monotonic() + HANGS_S
    while not condition():
        assert time.monotonic() < until, state(job) + Path(f"slurm-{job}.out").read_text()
        time.sleep(0.2)


def train_and_disturb(disturb: Callable[[str], object], *words: str) -> tuple[str, Path]:
    """Submit a training and disturb it in the middle: the job and its run."""
    job = submit(*words, "--", "train", *flags(**RUN))
    run = Path(f"runs/slurm-{job}")
    wait_for_step(lambda: state(job) in ("PENDING 0", "RUNNING 0"), run, 40)
    disturb(job)
    wait_for(lambda: "stopped by SIGTERM" in Path(f"slurm-{job}.out").read_text(), job)
    return job, run


def finish(job: str) -> str:
    """Let a requeued job start, for which SLURM takes two minutes, and wait for its end: what it said.

    It cannot start in the second it was requeued: SLURM revokes all permissions up to then.
    """
    wait_for(lambda: state(job) == "PENDING 1" and idle(os.environ) == 2, job)
    slurm_says("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    wait_for(lambda: state(job).split()[0] not in ("PENDING", "RUNNING", "COMPLETING"), job)
    said = Path(f"slurm-{job}.out").read_text()
    assert state(job) == "COMPLETED 1", said
    return said


def signal_of_time(job: str) -> None:
    """What SLURM sends two minutes before the time is up."""
    slurm_says("scancel", "--signal=USR1", "--batch", job)


def requeue(job: str) -> None:
    """What a preemption without a grace time does: all processes of the job get SIGTERM."""
    slurm_says("scontrol", "requeue", job)


def preempt(job: str) -> None:
    """Another job needs the nodes: those of the step get SIGTERM, and have a grace time."""
    slurm_says("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")


@pytest.mark.parametrize("disturb", [signal_of_time, requeue, pytest.param(preempt, marks=pytest.mark.slow)])
def test_a_job_goes_on_and_ends_with_the_bits_of_an_undisturbed_one(
    disturb: Callable[[str], object], whole: Path
) -> None:
    job, run = train_and_disturb(disturb)
    saved = [folder.name for folder in (run / "checkpoints").iterdir()]
    said = finish(job)
    assert len(saved) == 1
    assert re.search(rf"resuming {run} at step \d+ of 240, from {saved[0]}", said)

    assert_same_weights(whole / "last", run / "last")
    assert_same_weights(whole / "best", run / "best")


@pytest.mark.slow
def test_two_nodes_train_as_two_processes_do() -> None:
    job, run = train_and_disturb(requeue, "--nodes", "2")
    said = finish(job)
    assert said.count("test accuracy") == 1
    assert '"processes": 2' in (run / "environment.json").read_text()

    assert [code for code, _ in finish_two("train", *flags(**RUN), "--output", "whole", log=Path("log"))] == [0, 0]
    assert_same_weights(Path("whole/last"), run / "last")


@pytest.mark.slow
def test_the_notice_comes_in_time_and_without_requeue_the_job_saves_and_ends() -> None:
    """SLURM looks at the time every half a minute, and may give notice a minute before it should."""
    job = submit(
        "--no-requeue",
        "--time",
        "3",
        "--notice",
        "90",
        "--",
        "train",
        *flags(**RUN | {"epochs": 5000, "save_every": 10**6}),
    )
    wait_for(lambda: state(job).split()[0] not in ("PENDING", "RUNNING", "COMPLETING"), job)
    said = Path(f"slurm-{job}.out").read_text()
    assert state(job) == "FAILED 0", said
    assert "ExitCode=143:0" in slurm_says("scontrol", "show", "job", job)
    assert "stopped by SIGTERM" in said
    (saved,) = Path(f"runs/slurm-{job}/checkpoints").iterdir()
    assert int(saved.name.partition("-")[2]) > 0


def test_a_canceled_job_saves_and_stays_canceled() -> None:
    job, run = train_and_disturb(lambda job: slurm_says("scancel", job))
    wait_for(lambda: slurm_says("squeue", "--noheader", "--jobs", job) == "", job)  # all its processes have ended
    assert state(job) == "CANCELLED 0"
    assert len(list((run / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_a_job_that_fails_is_not_requeued() -> None:
    job = submit("train", "--dataset", "gone", "--device", "cpu")
    wait_for(lambda: state(job).split()[0] not in ("PENDING", "RUNNING", "COMPLETING"), job)
    assert state(job) == "FAILED 0"
    assert "ExitCode=3:0" in slurm_says("scontrol", "show", "job", job)
    assert "error: " in Path(f"slurm-{job}.out").read_text()


def test_what_sbatch_refuses_is_one_line() -> None:
    done = vitft("launch", "--slurm", "--partition", "nowhere", "--gpus-per-node", "0", "train", "--dataset", "digits")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: sbatch refuses the job: invalid partition specified: nowhere; ")
    assert done.stderr.count("\n") == 1
