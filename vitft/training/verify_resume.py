"""`vitft verify-resume`: train, kill, resume, and compare with an uninterrupted run."""

import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from vitft.checkpoints.checkpoint import is_run, newest_intact, read_config, read_state
from vitft.config.train import TrainConfig
from vitft.errors import TrainingError
from vitft.io.console import counted
from vitft.training.callbacks import recorded

Say = Callable[[str], None]
_POLL_S = 0.005
_ATTEMPTS = 5


@dataclass
class Verdict:
    """The outcome: for each kill the step reached and the step resumed from; whether the results are equal."""

    steps: int
    kills: list[tuple[int, int]] = field(default_factory=list)
    equal: bool = False
    left: tuple[str, ...] = ()  # files that should not be there

    @property
    def repeated(self) -> int:
        """The most steps that had to be repeated after a kill."""
        return max((reached - resumed for reached, resumed in self.kills), default=0)


def verify_resume(config: TrainConfig, work: Path, *, kills: int, seed: int, say: Say = lambda text: None) -> Verdict:
    """Train in work/whole without interruption, and in work/killed with `kills` kill -9 at random steps.

    If a run ends before it was killed often enough, it is started over, a few times. Raises TrainingError if that
    does not help, or if a run fails.
    """
    recipe = work / "recipe.yaml"
    # Kills are timed by the log, so every step is logged.
    recipe.write_text(yaml.safe_dump(config.model_dump(exclude_none=True) | {"log_every": 1}), encoding="utf-8")
    whole, killed = work / "whole", work / "killed"
    started = time.perf_counter()
    _finish(_start(["--recipe", str(recipe), "--output", str(whole)]))
    chosen = whole / "config.yaml"  # with threads, precision and compilation, which would be chosen by trial again
    steps, took_s = _reached(whole), time.perf_counter() - started
    say(f"uninterrupted: {counted(steps, 'step')} in {took_s:.0f} s")
    step_s = _step_s(whole)
    moments = random.Random(seed)
    for _ in range(_ATTEMPTS if steps > kills else 0):
        shutil.rmtree(killed, ignore_errors=True)
        verdict = Verdict(steps)
        while len(verdict.kills) < kills:
            reached = _reached(killed)
            # Each kill comes later than the last, and leaves steps for the remaining ones.
            room = (steps - 1 - reached) // (kills - len(verdict.kills))
            if room < 1:
                break
            running = _start(_resume_or_start(chosen, killed))
            landed = _kill_at(reached + moments.randint(1, room), running, killed, moments.uniform(0, step_s))
            if not landed or _reached(killed) == steps:
                break
            folder, _ = newest_intact(killed)
            verdict.kills.append((_reached(killed), read_state(folder).step if folder else 0))
            say(f"kill {len(verdict.kills)}: at step {verdict.kills[-1][0]}; intact is step {verdict.kills[-1][1]}")
        else:
            _finish(_start(_resume_or_start(chosen, killed)))
            verdict.equal = _outcome(whole) == _outcome(killed)
            verdict.left = tuple(sorted(set(_files(killed)) ^ set(_files(whole))))
            return verdict
    raise TrainingError(
        f"a run of {counted(steps, 'step')} in {took_s:.0f} s ended before it was killed {counted(kills, 'time')}: "
        "nothing is verified; set more steps (--max-steps), or fewer --kills."
    )


def _resume_or_start(recipe: Path, run: Path) -> list[str]:
    return ["--resume", str(run)] if is_run(run) else ["--recipe", str(recipe), "--output", str(run)]


def _kill_at(step: int, running: "subprocess.Popen[str]", run: Path, delay_s: float) -> bool:
    """Kill a run a moment after it has taken this step; False if it ended before."""
    try:
        while running.poll() is None and _reached(run) < step:
            time.sleep(_POLL_S)
        time.sleep(delay_s)
    finally:  # an interrupt leaves no run behind
        running.kill()
    _, said = running.communicate()
    if running.returncode == -signal.SIGKILL:
        return True
    _check(running.returncode, said)
    return False


def _step_s(run: Path) -> float:
    """About the seconds of a step: a kill delayed by that may fall into a save."""
    speeds = [line["images_per_s"] for line in recorded(run) if line["split"] == "train"]
    return float(read_config(run).batch_size / statistics.median(speeds))


def _start(words: list[str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "vitft", "train", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(running: "subprocess.Popen[str]") -> None:
    try:
        _, said = running.communicate()
    finally:
        running.kill()
    _check(running.returncode, said)


def _check(code: int, said: str) -> None:
    if code:
        raise TrainingError(f"vitft train ended with {code}: {(said.strip() or 'nothing was said').splitlines()[-1]}")


def _reached(run: Path) -> int:
    """The last step that a run has logged."""
    return max((line["step"] for line in recorded(run)), default=0)


def _outcome(run: Path) -> tuple[bytes, list[tuple[int, str, float]]]:
    """The final weights, and the loss of every line of metrics."""
    lines = [(line["step"], line["split"], line["loss"]) for line in recorded(run)]
    return (run / "last" / "model.safetensors").read_bytes(), lines


def _files(run: Path) -> list[str]:
    return [file.relative_to(run).as_posix() for file in run.rglob("*")]
