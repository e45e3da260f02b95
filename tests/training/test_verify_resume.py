"""`vitft verify-resume`: a real run, a real kill -9, and a verdict that can fail."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.conftest import BUCKET, BUCKET_KEYS
from tests.forked import ended, start
from tests.training.test_trainer import config
from tests.web import FaultyStore
from vitft.cli.app import app
from vitft.config.recipe import load_config
from vitft.config.train import TrainConfig
from vitft.errors import TrainingError
from vitft.training import verify_resume


class Forked:
    """A run as `subprocess` has it, in a process that need not import everything first."""

    def __init__(self, words: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self._process, self._log = start("train", *words, log=log, environment=environment), log

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode  # type: ignore[no-any-return]

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self._process.kill()

    def communicate(self) -> tuple[None, str]:
        ended(self._process)
        return None, self._log.read_text()


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_resume, "_start", lambda words: Forked(words, tmp_path / "log"))
    settings = load_config("smoke", {"save_every": 1, "device": "cpu", "precision": "fp32", "epochs": 8.0})
    found = verify_resume.verify_resume(settings, tmp_path, kills=1, seed=1)
    assert (found.steps, len(found.kills)) == (32, 1)
    assert found.equal
    assert found.left == ()
    assert found.repeated <= 1


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_streamed_run_that_is_killed_ends_like_an_uninterrupted_one(
    bucket: FaultyStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    """A kill may come while a part of a shard is fetched, written or mapped; little is kept, so most comes again."""
    given = {name: os.environ[name] for name in (*BUCKET_KEYS, "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "VITFT_CACHE")}
    monkeypatch.setattr(verify_resume, "_start", lambda words: Forked(words, tmp_path / "log", given))
    small = {"width": 32, "layers": 2, "image_size": 16, "patch_size": 4}
    settings = load_config("verify-resume", small | {
        "dataset": BUCKET, "stream_gb": 1e-4, "device": "cpu", "precision": "fp32", "max_steps": 30 * (kills + 1),
        "save_every": 10,
    })  # fmt: skip
    found = verify_resume.verify_resume(settings, tmp_path, kills=kills, seed=kills)
    assert (found.steps, len(found.kills)) == (settings.max_steps, kills)
    assert (found.equal, found.left) == (True, ())
    assert len(bucket.fetched("train-00001-of-00003.parquet")) > 8 * (kills + 2)  # it has eight row groups


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["verify-resume", *words])


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (verify_resume.Verdict(40, [(17, 10), (31, 30)], equal=True), 0),
        (verify_resume.Verdict(40, [(17, 10)], equal=False), 5),
        (verify_resume.Verdict(40, [(17, 10)], equal=True, left=("checkpoints/.step-000020.new",)), 5),
    ],
)
def test_the_verdict(monkeypatch: pytest.MonkeyPatch, made: verify_resume.Verdict, code: int) -> None:
    monkeypatch.setattr(verify_resume, "verify_resume", lambda config, work, **options: made)
    result = run()
    assert result.exit_code == code
    assert f"at most {made.repeated}" in result.stdout
    assert ("the same bits" in result.stdout) == made.equal
    assert json.loads(run("--json").stdout)["repeated"] == 7


class Over:
    """A run that was over before anyone could kill it."""

    returncode = 0

    def __init__(self, words: list[str]) -> None:
        assert CliRunner().invoke(app, ["train", *words]).exit_code == 0

    def poll(self) -> int:
        return 0

    def kill(self) -> None: ...

    def communicate(self) -> tuple[None, str]:
        return None, ""


@pytest.mark.parametrize(("steps", "kills"), [(4, 1), (2, 2)])
def test_without_a_kill_in_time_nothing_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, kills: int
) -> None:
    begun: list[list[str]] = []

    def over(words: list[str]) -> Over:
        begun.append(words)
        return Over(words)

    monkeypatch.setattr(verify_resume, "_start", over)
    monkeypatch.setattr(verify_resume, "_ATTEMPTS", 2)
    small = config(max_steps=steps, val_fraction=0)
    with pytest.raises(TrainingError, match=rf"ended before it was killed {kills} times?: nothing is verified"):
        verify_resume.verify_resume(small, tmp_path, kills=kills, seed=0)
    assert len(begun) == (1 + 2 if steps > kills else 1)  # it was begun anew, as often as it may be


def test_a_run_that_fails_on_its_own_is_reported(tmp_path: Path) -> None:
    settings = TrainConfig(dataset=str(tmp_path / "nowhere"), model="vit-micro")
    with pytest.raises(TrainingError, match=r"vitft train ended with 3: error: no file or folder"):
        verify_resume.verify_resume(settings, tmp_path, kills=1, seed=0)
