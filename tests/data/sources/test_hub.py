"""The exact hub commands, against a stand-in hub on loopback: online, from the cache, and without either."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.hub import CIFAR10, DATASET, MODEL, StandInHub, make_dataset, make_model

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
IN_TURN = """
import io, json, sys, time
from contextlib import redirect_stderr, redirect_stdout
from vitft.cli.app import app
slept, sleep = [], time.sleep
def short(seconds):
    slept.append(seconds)
    sleep(min(seconds, 0.01))
time.sleep = short
ended = []
for words in json.loads(sys.argv[1]):
    slept.clear()
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            app(words)
        except SystemExit as end:
            code = end.code
    ended.append([code, out.getvalue(), err.getvalue(), sum(slept)])
print(json.dumps(ended))
"""
DEFAULT = ("train", "--dataset", "cifar10")
NAMED = (*DEFAULT, "--model", MODEL)
RUN = "runs/cifar10-vit-base-patch16-224-in21k-1"


class Ended(NamedTuple):
    """The result of a command, and the seconds that libraries would have slept between retries."""

    code: int
    out: str
    err: str
    slept_s: float


class Session(NamedTuple):
    """A process that ran commands one after another in a folder."""

    folder: Path
    cache: Path
    ended: dict[tuple[str, ...], Ended]


def session(*commands: tuple[str, ...], folder: Path, endpoint: str, cache: Path, **extra: str) -> Session:
    """Run commands like a user, in another process and folder, with only the endpoint set.

    Several share a process because imports take seconds; libraries read the hub's settings at import.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"} | extra
    words = [sys.executable, "-c", IN_TURN, json.dumps(commands)]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ended = (Ended(*one) for one in json.loads(done.stdout.splitlines()[-1]))
    return Session(folder, cache, dict(zip(commands, ended, strict=True)))


def error(ended: Ended) -> str:
    """The error line of a command that failed without long waits."""
    said = re.sub(r"^(loading|reading) [^\n]+ \.\.\.\n", "", ended.err, flags=re.MULTILINE)
    assert re.fullmatch(r"error: [^\n]+\n", said), said
    assert ended.out == ""
    assert ended.slept_s <= 5
    return said


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInHub]:
    root = tmp_path_factory.mktemp("hub")
    make_model(root / "models" / MODEL)
    make_dataset(root / "datasets" / DATASET)
    with StandInHub(root) as running:
        yield running


@pytest.fixture(scope="module")
def nowhere() -> str:
    """The URL of a hub that is down: connections are refused."""
    with StandInHub(Path()) as gone:
        return gone.url


SCORED = ("eval", f"{RUN}/last", "--json")
ABSENT = {  # what to ask for, the exit code, and what the line has to name
    ("train", "--dataset", "uoft-cs/cifar11"): (3, "uoft-cs/cifar11"),
    ("train", "--dataset", "cifar10", "--dataset-revision", "v9"): (3, "v9"),
    ("train", "--dataset", "digits", "--model", "google/vit-huge"): (4, "google/vit-huge"),
    ("train", "--dataset", "digits", "--model", MODEL, "--model-revision", "v9"): (4, "v9"),
}
ANOTHER = {  # revisions than those in the cache
    ("train", "--dataset", "cifar10", "--dataset-revision", "f" * 40): 3,
    ("train", "--dataset", "digits", "--model", MODEL, "--model-revision", "f" * 40): 4,
}
FIRST = {"data": DEFAULT, "model": ("train", "--dataset", "digits", "--model", MODEL)}
UNCACHED = {
    "data": ("train", "--dataset", "uoft-cs/cifar11"),
    "model": ("train", "--dataset", "digits", "--model", "google/vit-huge"),
}


@pytest.fixture(scope="module")
def online(hub: StandInHub, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A session in which `vitft train --dataset cifar10` filled the cache."""
    folder = tmp_path_factory.mktemp("online")
    return session(DEFAULT, SCORED, NAMED, *ABSENT, folder=folder, endpoint=hub.url, cache=folder / "hf")


@pytest.fixture(scope="module")
def offline(online: Session, nowhere: str, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """With that cache, in offline mode."""
    folder = tmp_path_factory.mktemp("offline")
    commands = (NAMED, *ANOTHER, *UNCACHED.values())
    return session(*commands, folder=folder, endpoint=nowhere, cache=online.cache, **OFFLINE)


@pytest.fixture(scope="module")
def gone(online: Session, nowhere: str, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """With that cache, and an unreachable hub."""
    folder = tmp_path_factory.mktemp("gone")
    return session(NAMED, folder=folder, endpoint=nowhere, cache=online.cache)


@pytest.fixture(scope="module")
def first(nowhere: str, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Without network or cache."""
    folder = tmp_path_factory.mktemp("first")
    return session(*FIRST.values(), folder=folder, endpoint=nowhere, cache=folder / "hf")


def runs(session: Session) -> list[str]:
    return sorted(run.name for run in (session.folder / "runs").glob("*"))


def revisions(run: Path) -> tuple[str, str]:
    environment = json.loads((run / "environment.json").read_text())
    return environment["model_revision"], environment["dataset_revision"]


def test_the_default_run_needs_only_the_dataset_name(online: Session, hub: StandInHub) -> None:
    assert online.ended[DEFAULT].code == 0, online.ended[DEFAULT].err
    assert revisions(online.folder / RUN) == (hub.sha("models", MODEL), hub.sha("datasets", DATASET))
    config = json.loads((online.folder / RUN / "last" / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(CIFAR10)}
    assert config["image_size"] == 32


@pytest.mark.usefixtures("online")
def test_the_hub_was_really_asked(hub: StandInHub) -> None:
    asked = "\n".join(hub.requests)
    assert f"/{MODEL}/resolve/{hub.sha('models', MODEL)}/model.safetensors" in asked
    assert f"/datasets/{DATASET}/resolve/{hub.sha('datasets', DATASET)}/plain_text/train-" in asked


def test_the_checkpoint_is_evaluated_with_no_other_argument(online: Session) -> None:
    done = online.ended[SCORED]
    assert done.code == 0, done.err
    scores = json.loads(done.out)
    assert (scores["split"], scores["count"], scores["confusion"]["labels"]) == ("test", 20, list(CIFAR10))
    assert 0 <= scores["accuracy_interval"][0] <= scores["accuracy"] <= scores["accuracy_interval"][1] <= 1


@pytest.mark.parametrize("how", ["offline", "gone"])
def test_the_named_model_runs_from_the_cache(hub: StandInHub, how: str, request: pytest.FixtureRequest) -> None:
    """Both in offline mode and with an unreachable hub."""
    there: Session = request.getfixturevalue(how)
    done = there.ended[NAMED]
    assert done.code == 0, done.err
    assert "Retrying" not in done.err
    assert done.slept_s <= 5
    assert revisions(there.folder / RUN) == (hub.sha("models", MODEL), hub.sha("datasets", DATASET))


def test_the_named_model_runs_from_the_hub(online: Session) -> None:
    """The same folder again: the next number, and every weight as in the run with the default model."""
    assert online.ended[NAMED].code == 0, online.ended[NAMED].err
    first = online.folder / RUN
    second = online.folder / RUN.replace("k-1", "k-2")
    assert revisions(second) == revisions(first)
    weights = [(run / "last" / "model.safetensors").read_bytes() for run in (first, second)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("how", "asked"), [("first", FIRST), ("offline", UNCACHED)], ids=["hub gone", "offline"])
def test_no_network_and_no_cache_is_one_line_with_a_way_out(
    nowhere: str, how: str, asked: dict[str, tuple[str, ...]], request: pytest.FixtureRequest
) -> None:
    there: Session = request.getfixturevalue(how)
    data, model = (there.ended[asked[kind]] for kind in ("data", "model"))
    assert (data.code, model.code) == (3, 4)
    why = "offline mode is set" if how == "offline" else f"the hub at {nowhere} could not be reached"
    for ended, cache in ((data, "datasets"), (model, "hub")):
        assert f"{why} and the cache {there.cache / cache} does not have it" in error(ended)
    assert (DATASET if how == "first" else "uoft-cs/cifar11") in data.err
    assert "--dataset digits" in data.err
    assert asked["model"][-1] in model.err
    assert "--model vit-micro" in model.err
    assert runs(there) == ([] if how == "first" else [Path(RUN).name])


def test_what_the_hub_does_not_have_is_named(hub: StandInHub, online: Session) -> None:
    none, unknown = f"the hub at {hub.url} has none that you may read", "the hub has it, but not at that revision"
    for (words, (code, name)), why in zip(ABSENT.items(), (none, unknown, none, unknown), strict=True):
        ended = online.ended[words]
        assert ended.code == code
        assert name in error(ended)
        assert why in error(ended)
    assert len(runs(online)) == 2


def test_a_cached_dataset_of_another_revision_is_refused(offline: Session) -> None:
    """Offline, datasets.load_dataset returns any cached commit, whichever was requested."""
    for words, code in ANOTHER.items():
        assert offline.ended[words].code == code
        assert error(offline.ended[words])
