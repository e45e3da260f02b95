"""Runs that are killed, interrupted and starved, in real processes: each ends like an uninterrupted one."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from tests.forked import HANGS_S, barrier, ended, finish, flags, start, steps_done, wait_for_step, wait_until
from tests.training.test_trainer import AUGMENTED
from vitft.checkpoints.checkpoint import find_damage, is_run, newest_intact, read_config, read_state, step_folders
from vitft.training.callbacks import recorded

KILLED = -signal.SIGKILL


def left_in(run: Path) -> set[str]:
    """All its files; of step checkpoints, which a signal may have had saved at another step, as many and whole."""
    steps = step_folders(run)
    assert [find_damage(folder) for folder in steps] == [None] * len(steps)
    names = {folder.name: f"step {place}" for place, folder in enumerate(steps)}
    files = (file.relative_to(run).parts for file in run.rglob("*"))
    return {"/".join(names.get(part, part) for part in parts) for parts in files}


def assert_like_uninterrupted(run: Path, whole: Path) -> None:
    """The same files, weights bit for bit, and losses."""
    assert left_in(run) ^ left_in(whole) == set()
    for model in ("best", "last"):
        file = Path(model) / "model.safetensors"
        assert (run / file).read_bytes() == (whole / file).read_bytes(), model
    assert [(line["step"], line["loss"]) for line in recorded(run)] == [
        (line["step"], line["loss"]) for line in recorded(whole)
    ]


def begin_or_resume(run: Path, words: list[str]) -> list[str]:
    return ["train", "--resume", str(run)] if is_run(run) else ["train", *words, "--output", str(run)]


WORDS = flags(**AUGMENTED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 80 steps."""
    folder = tmp_path_factory.mktemp("whole")
    code, said = finish("train", *WORDS, "--output", str(folder / "run"), log=folder / "log")
    assert code == 0, said
    return folder / "run"


def killed_at(step: int, run: Path) -> None:
    """Begin a run, and kill it at about that step."""
    process = start("train", *WORDS, "--output", str(run), log=run.with_suffix(".log"))
    wait_for_step(process.is_alive, run, step)
    process.kill()
    process.join()


# -- kill -9 ----------------------------------------------------------------------------------------


def dies_at(number: int, run: str) -> None:
    """From now on this process kills itself before the so-manieth change that it makes to a run's files."""
    done = 0

    def dying(real: Callable[..., Any], what: object, *more: Any, **named: Any) -> Any:
        nonlocal done
        if isinstance(what, int) or str(what).startswith(run) or named.get("dir_fd") is not None:
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(what, *more, **named)

    for name in ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink"):
        setattr(os, name, partial(dying, getattr(os, name)))


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_between_any_two_changes_of_its_files(tmp_path: Path, every: int) -> None:
    words = flags(max_steps=4, save_every=2, keep=1, eval_every=2)
    uninterrupted = train_in(tmp_path / "whole", words)
    number = 1
    while True:
        run = tmp_path / "run"
        dying = partial(dies_at, number, str(run))
        code, said = finish(*begin_or_resume(run, words), log=tmp_path / "log", before=dying)
        if code == 0:
            break
        assert code == KILLED, said
        code, said = finish(*begin_or_resume(run, words), log=tmp_path / "log")
        assert code == 0, said
        assert_like_uninterrupted(run, uninterrupted)
        shutil.rmtree(run)
        number += every
    print(f"a run of 4 steps and two saves changes its files {number} times or a little less")  # noqa: T201
    assert number > 60


def train_in(run: Path, words: list[str]) -> Path:
    code, said = finish("train", *words, "--output", str(run), log=run.with_suffix(".log"))
    assert code == 0, said
    return run


@pytest.mark.parametrize("runs", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path: Path, whole: Path, runs: int) -> None:
    """kill -9 three times a run at any moment, with `--save-every 10`; at most ten steps are done again."""
    started = time.monotonic()
    assert finish("train", *WORDS, "--output", str(tmp_path / "timed"), log=tmp_path / "log")[0] == 0
    took_s = time.monotonic() - started
    kills, most = 0, 0
    for number in range(runs):
        run, moments = tmp_path / f"run-{number}", random.Random(number)
        for _ in range(3):
            process = start(*begin_or_resume(run, WORDS), log=tmp_path / "log")
            process.join(moments.uniform(0, took_s))
            if process.exitcode is not None:
                assert process.exitcode == 0, (tmp_path / "log").read_text()
                break
            process.kill()
            process.join()
            kills += 1
            if is_run(run):
                folder, passed = newest_intact(run)
                assert passed == []  # none is damaged
                most = max(most, steps_done(run) - (read_state(folder).step if folder else 0))
        code, said = finish(*begin_or_resume(run, WORDS), log=tmp_path / "log")
        assert code == 0, said
        assert_like_uninterrupted(run, whole)
        shutil.rmtree(run)
    print(f"{runs} runs, {kills} kills, at most {most} steps done again")  # noqa: T201
    assert kills > 0
    assert most <= 10


EVERYTHING = AUGMENTED | {
    "layers": 2, "drop_path": 0.3, "ema": 0.9, "layer_decay": 0.7, "label_smoothing": 0.1, "max_steps": 24,
    "save_every": 4,
}  # fmt: skip
"""With two layers: the first of them never drops a path."""

PRETRAINED = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp")) | {"from_scratch": False}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"logit_adjustment": 1.0}, id="logit adjustment"),
        pytest.param(
            {"sampling": "balanced", "focal_loss": 2.0}, id="balanced sampling, focal loss", marks=pytest.mark.slow
        ),
        pytest.param(PRETRAINED | {"lora_rank": 4}, id="LoRA", marks=pytest.mark.slow),
    ],
)
def test_killed_with_everything_switched_on(changes: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 at any moment of a run with drop path, a moving average, layer decay and all that changes a batch."""
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    words = flags(**EVERYTHING | changes)
    uninterrupted = train_in(tmp_path / "whole", words)
    run, moments = tmp_path / "run", random.Random(3)
    for step in sorted(moments.sample(range(5, 23), 2)):  # after the first save
        process = start(*begin_or_resume(run, words), log=tmp_path / "log")
        wait_for_step(process.is_alive, run, step)
        process.kill()
        assert ended(process) == KILLED
        newest, _ = newest_intact(run)
        assert newest is not None
        assert 0 < read_state(newest).step <= steps_done(run)
    code, said = finish(*begin_or_resume(run, words), log=tmp_path / "log")
    assert code == 0, said
    assert_like_uninterrupted(run, uninterrupted)


def slow_to_sync(marker: str) -> None:
    """From now on a save takes many minutes, and leaves this file when it begins."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if "step-" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            Path(marker).touch()
            time.sleep(60)
        real(handle)

    os.fsync = fsync


def test_a_second_ctrl_c_ends_it_at_once_and_damages_nothing(tmp_path: Path, whole: Path) -> None:
    run, saving = tmp_path / "run", tmp_path / "saving"
    killed_at(5, run)
    process = start("train", "--resume", str(run), log=tmp_path / "log", before=partial(slow_to_sync, str(saving)))
    wait_for_step(process.is_alive, run, 7)
    os.kill(process.pid, signal.SIGINT)
    wait_until(saving.exists, process.is_alive)
    asked = 0
    while process.is_alive() and asked < 30:  # the first may not have been heard yet: two are then one
        os.kill(process.pid, signal.SIGINT)
        process.join(1)
        asked += 1
    assert process.exitcode == -signal.SIGINT  # and not when a dozen files were synced
    assert newest_intact(run)[1] == []
    code, said = finish("train", "--resume", str(run), log=tmp_path / "log")
    assert code == 0, said
    assert_like_uninterrupted(run, whole)


def test_an_unplanned_save_is_cleaned_up_too(tmp_path: Path, whole: Path) -> None:
    """The first Ctrl-C saves at whatever step it came; the second kills that save, and no later one has its place."""
    run = tmp_path / "run"
    killed_at(25, run)
    (run / "checkpoints" / ".step-000023.vitft-new").mkdir()
    (run / "checkpoints" / ".step-000023.vitft-new" / "config.json").write_text("{")
    (run / "checkpoints" / ".step-000001.vitft-gone").mkdir()
    (run / "best").rename(run / ".best.vitft-old") if (run / "best").exists() else None
    (run / ".splits.json.vitft-new").write_text("{")
    code, said = finish("train", "--resume", str(run), log=tmp_path / "log")
    assert code == 0, said
    assert_like_uninterrupted(run, whole)


# -- the disk ---------------------------------------------------------------------------------------


def test_a_disk_that_is_full_costs_nothing_that_was_saved(tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    killed_at(25, run)
    saved = read_state(newest_intact(run)[0] or Path()).step
    for largest in (20_000, 3000, 0):  # too little for the weights, for a document, for anything
        code, said = finish("train", "--resume", str(run), log=tmp_path / "log", largest_file=largest)
        said = " ".join(said.split())
        assert "Traceback" not in said
        assert code == 5 or not said, said  # the log is on that disk too
        if said:
            assert "cannot be written: " in said
            assert (
                f"earlier checkpoints are intact. Free some space, then resume with: vitft train --resume {run}" in said
            )
        assert [folder.name for folder in (run / "checkpoints").iterdir()].count(f"step-{saved:06d}") == 1
        assert newest_intact(run)[1] == []
    code, said = finish("train", "--resume", str(run), log=tmp_path / "log")
    assert code == 0, said
    assert_like_uninterrupted(run, whole)


def test_a_new_run_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    code, said = finish("train", *flags(), "--output", str(tmp_path / "run"), log=tmp_path / "log", largest_file=500)
    assert code == 2, said
    assert "Traceback" not in said
    assert train_in(tmp_path / "run", flags(max_steps=2)).is_dir()  # the name is free


@pytest.mark.parametrize("words", [["eval"], ["predict", "docs/digits", "--checkpoint"]])
def test_a_checkpoint_is_read_where_nothing_may_be_written(whole: Path, tmp_path: Path, words: list[str]) -> None:
    code, said = finish(*words, str(whole), log=tmp_path / "log", before=partial(read_only, str(whole)))
    assert code == 0, said


def read_only(folder: str) -> None:
    """What a read-only folder does, to the superuser too."""
    real = os.open

    def opened(path: Any, mode: int, *more: Any, **named: Any) -> Any:
        if str(path).startswith(folder) and mode & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, mode, *more, **named)

    def refusing(real: Callable[..., Any], path: Any, *more: Any, **named: Any) -> Any:
        if str(path).startswith(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more, **named)

    os.open = opened
    for name in ("mkdir", "rename", "replace"):
        setattr(os, name, partial(refusing, getattr(os, name)))


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    code, said = finish(
        "train", *flags(), "--output", str(locked / "run"), log=tmp_path / "log", before=partial(read_only, str(locked))
    )
    assert code == 2, said
    assert f"output {locked / 'run'}: cannot be created: Permission denied; choose another." in " ".join(said.split())
    assert not locked.exists()
    run = tmp_path / "run"
    killed_at(25, run)
    code, said = finish("train", "--resume", str(run), log=tmp_path / "log", before=partial(read_only, str(run)))
    assert code == 5, said
    assert "cannot be written: Permission denied" in " ".join(said.split())


# -- the clock --------------------------------------------------------------------------------------


def clock_is_back() -> None:
    """It is 1971 from now on."""
    for name in ("time", "time_ns"):
        real = getattr(time, name)
        setattr(time, name, lambda real=real: real() % (10**7 if real is time.time else 10**16))


def test_a_clock_that_was_set_back_changes_nothing(tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    killed_at(35, run)
    for age, folder in enumerate(sorted((run / "checkpoints").iterdir())):
        os.utime(folder, (2e9 - age, 2e9 - age))  # from the future, and the newest looks oldest
    code, said = finish("train", "--resume", str(run), log=tmp_path / "log", before=clock_is_back)
    assert code == 0, said
    assert_like_uninterrupted(run, whole)


# -- two at once ------------------------------------------------------------------------------------


def meets(gathered: Barrier, output: str) -> None:
    """Runs that begin at once are all prepared, and have all found their folder free, before any makes it."""
    from vitft.training import run_folder

    os.chdir(output)
    chosen = run_folder.folder_of

    def chosen_together(*given: Any) -> Path:
        folder = chosen(*given)
        run_folder.folder_of = chosen  # who has to choose again does so alone
        gathered.wait(HANGS_S)
        return folder

    run_folder.folder_of = chosen_together


def meets_and_stays(gathered: Barrier, output: str) -> None:
    """The same; and whoever got the folder has not written its settings, which would refuse the others, before told."""
    from vitft.training import run_folder

    meets(gathered, output)
    environment = run_folder.environment

    def told() -> dict[str, Any]:
        Path(f"has-it-{os.getpid()}").touch()
        wait_until(Path("go-on").exists)
        return environment()

    run_folder.environment = told


def test_of_two_runs_that_begin_in_one_folder_one_is_refused(tmp_path: Path) -> None:
    run, rates = tmp_path / "run", (1e-3, 2e-3)
    before = partial(meets_and_stays, barrier(2), str(tmp_path))
    processes = [
        start("train", *flags(max_steps=2, lr=lr), "--output", "run", log=tmp_path / f"{lr}", before=before)
        for lr in rates
    ]
    wait_until(lambda: sum(p.exitcode is not None for p in processes) + len(list(tmp_path.glob("has-it-*"))) == 2)
    (tmp_path / "go-on").touch()
    codes = [ended(process) for process in processes]
    said = [(tmp_path / f"{lr}").read_text() for lr in rates]
    assert sorted(codes) == [0, 2], said
    assert "another process is training there" in " ".join(said[codes.index(2)].split())
    assert read_config(run).lr == rates[codes.index(0)]


def test_runs_that_begin_at_once_get_a_number_each(tmp_path: Path) -> None:
    begin = partial(meets, barrier(3), str(tmp_path))
    processes = [start("train", *flags(max_steps=2), log=tmp_path / str(n), before=begin) for n in range(3)]
    assert [ended(process) for process in processes] == [0, 0, 0], (tmp_path / "0").read_text()
    names = {folder.name for folder in (tmp_path / "runs").iterdir()}
    assert names == {f"digits-vit-micro-scratch-{number}" for number in (1, 2, 3)}


def test_a_kill_in_an_overwrite_can_be_overwritten(tmp_path: Path) -> None:
    run = train_in(tmp_path / "run", flags(max_steps=2))
    for number in (2, 8, 14):
        dying = partial(dies_at, number, str(run))
        words = ["train", *flags(max_steps=2), "--output", str(run), "--overwrite"]
        code, said = finish(*words, log=tmp_path / "log", before=dying)
        assert code == KILLED, said
        code, said = finish(*words, log=tmp_path / "log")
        assert code == 0, said
