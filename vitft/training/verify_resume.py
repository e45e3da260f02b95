"""`vitft verify-resume`: train, kill, resume, and compare with a run that nobody disturbed."""

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
from vitft.training.callbacks import recorded

Say = Callable[[str], None]
_POLL_S = 0.005
_ATTEMPTS = 5


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
    """Train as `config` says in work/whole, and in work/killed with `kills` kill -9 at random steps.

    A run that is over before it was killed often enough proves nothing: it begins anew, a few times. Raises
    TrainingError where that does not help, or a run fails by itself.
    """
    recipe = work / "recipe.yaml"
    # Each step is written down: that is what a kill is timed by.
    recipe.write_text(yaml.safe_dump(config.model_dump(exclude_none=True) | {"log_every": 1}), encoding="utf-8")
    whole, killed = work / "whole", work / "killed"
    started = time.perf_counter()
    _finish(_start(["--recipe", str(recipe), "--output", str(whole)]))
    chosen = whole / "config.yaml"  # threads, precision and compilation too: what they are is measured anew otherwise
    steps, took_s = _reached(whole), time.perf_counter() - started
    say(f"undisturbed: {steps} steps in {took_s:.0f} s")
    step_s = _step_s(whole)
    moments = random.Random(seed)
    for _ in range(_ATTEMPTS if steps > kills else 0):
        shutil.rmtree(killed, ignore_errors=True)
        proof = Proof(steps)
        while len(proof.kills) < kills:
            reached = _reached(killed)
            # Each kill comes later than the last, and leaves room for those to come.
            room = (steps - 1 - reached) // (kills - len(proof.kills))
            if room < 1:
                break
            running = _start(_go_on(chosen, killed))
            landed = _kill_at(reached + moments.randint(1, room), running, killed, moments.uniform(0, step_s))
            if not landed or _reached(killed) == steps:
                break
            folder, _ = newest_intact(killed)
            proof.kills.append((_reached(killed), read_state(folder).step if folder else 0))
            say(f"kill {len(proof.kills)}: at step {proof.kills[-1][0]}; whole is step {proof.kills[-1][1]}")
        else:
            _finish(_start(_go_on(chosen, killed)))
            proof.equal = _outcome(whole) == _outcome(killed)
            proof.left = tuple(sorted(set(_files(killed)) ^ set(_files(whole))))
            return proof
    raise TrainingError(
        f"a run of {steps} steps in {took_s:.0f} s was over before it was killed {kills} times: nothing is proved; "
        "give it more steps (--max-steps), or fewer --kills."
    )


def _go_on(recipe: Path, run: Path) -> list[str]:
    return ["--resume", str(run)] if is_run(run) else ["--recipe", str(recipe), "--output", str(run)]


def _kill_at(step: int, running: "subprocess.Popen[str]", run: Path, delay_s: float) -> bool:
    """Kill a run once it has taken this step, and a moment later; False where it was over before that."""
    try:
        while running.poll() is None and _reached(run) < step:
            time.sleep(_POLL_S)
        time.sleep(delay_s)
    finally:  # whoever interrupts the proof leaves no run behind
        running.kill()
    _, said = running.communicate()
    if running.returncode == -signal.SIGKILL:
        return True
    _complain(running.returncode, said)
    return False


def _step_s(run: Path) -> float:
    """Seconds of a step, about: a kill so much later falls into a save too."""
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
    _complain(running.returncode, said)


def _complain(code: int, said: str) -> None:
    if code:
        raise TrainingError(f"vitft train ended with {code}: {(said.strip() or 'nothing was said').splitlines()[-1]}")


def _reached(run: Path) -> int:
    """The last step of a run that was written down."""
    return max((line["step"] for line in recorded(run)), default=0)


def _outcome(run: Path) -> tuple[bytes, list[tuple[int, str, float]]]:
    """The weights, and the loss of every line of metrics."""
    lines = [(line["step"], line["split"], line["loss"]) for line in recorded(run)]
    return (run / "last" / "model.safetensors").read_bytes(), lines


def _files(run: Path) -> list[str]:
    return [file.relative_to(run).as_posix() for file in run.rglob("*")]
