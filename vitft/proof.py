"""`vitft verify-resume`: train, kill, resume, and compare with a run that nobody disturbed."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from vitft.checkpoint import is_run, newest_whole, read_state
from vitft.config import TrainConfig
from vitft.errors import TrainingError
from vitft.history import recorded

Say = Callable[[str], None]
_POLL_S = 0.02


@dataclass
class Proof:
    """What came of it: at each kill the step that was reached and the one gone on from; whether all is equal."""

    steps: int
    kills: list[tuple[int, int]] = field(default_factory=list)
    equal: bool = False
    left: tuple[str, ...] = ()  # files that should not be there

    @property
    def repeated(self) -> int:
        """The most steps that a kill made the run take twice."""
        return max((reached - resumed for reached, resumed in self.kills), default=0)


def prove_resume(config: TrainConfig, work: Path, *, kills: int, seed: int, say: Say = lambda text: None) -> Proof:
    """Train as `config` says in work/whole, and in work/killed with `kills` kill -9 at random moments.

    Raises TrainingError where a run fails by itself.
    """
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config.model_dump(exclude_none=True)))
    whole, killed = work / "whole", work / "killed"
    started = time.perf_counter()
    running = _start(["--recipe", str(recipe), "--output", str(whole)])
    while running.poll() is None and not is_run(whole):
        time.sleep(_POLL_S)
    begun_s = time.perf_counter() - started
    _complain(running)
    took_s = time.perf_counter() - started
    proof = Proof(_reached(whole))
    say(f"undisturbed: {proof.steps} steps in {took_s:.0f} s")
    moments = random.Random(seed)
    while len(proof.kills) < kills:
        words = ["--resume", str(killed)] if is_run(killed) else ["--recipe", str(recipe), "--output", str(killed)]
        running = _start(words)
        _sleep(moments.uniform(0.7 * begun_s, took_s), running)
        if running.poll() is not None:
            _complain(running)
            if is_run(killed):  # it got to its end first: a kill of a finished run proves nothing
                break
            continue
        running.send_signal(signal.SIGKILL)
        running.wait()
        resumed = 0
        if is_run(killed):
            folder, _ = newest_whole(killed)
            resumed = read_state(folder).step if folder else 0
        proof.kills.append((_reached(killed), resumed))
        say(f"kill {len(proof.kills)}: at step {_reached(killed)}; whole is step {resumed}")
    _finish(["--resume", str(killed)] if is_run(killed) else ["--recipe", str(recipe), "--output", str(killed)])
    proof.equal = _outcome(whole) == _outcome(killed)
    proof.left = tuple(sorted(set(_files(killed)) ^ set(_files(whole))))
    return proof


def _start(words: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "vitft", "train", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(words: list[str]) -> None:
    running = _start(words)
    _complain(running)


def _complain(running: "subprocess.Popen[str]") -> None:
    _, said = running.communicate()
    if running.returncode:
        raise TrainingError(f"vitft train ended with {running.returncode}: {said.strip().splitlines()[-1]}")


def _sleep(seconds: float, running: "subprocess.Popen[str]") -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and running.poll() is None:
        time.sleep(_POLL_S)


def _reached(run: Path) -> int:
    """The last step of a run that was written down."""
    return max((line["step"] for line in recorded(run)), default=0)


def _outcome(run: Path) -> tuple[bytes, list[tuple[int, str, float]]]:
    """The weights, and the loss of every line of metrics."""
    lines = [(line["step"], line["split"], line["loss"]) for line in recorded(run)]
    return (run / "last" / "model.safetensors").read_bytes(), lines


def _files(run: Path) -> list[str]:
    return [file.relative_to(run).as_posix() for file in run.rglob("*")]
