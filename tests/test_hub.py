"""The exact hub commands, against a stand-in hub on loopback: online, from the cache, and without either."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.hub import CIFAR10, DATASET, MODEL, StandInHub, make_dataset, make_model

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
Done: TypeAlias = "subprocess.CompletedProcess[str]"
IN_TURN = """
import json, sys, time
from vitft.cli import app
slept = []
time.sleep = slept.append
for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments)
    except SystemExit as end:
        print(end.code, sum(slept), file=sys.stderr)
"""
RUN = "runs/cifar10-vit-base-patch16-224-in21k-1"


def python(*arguments: str, cwd: Path, endpoint: str, cache: Path, **extra: str) -> Done:
    """Run a command as a user does: in another process and folder, with nothing but the endpoint set."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"} | extra
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=200)


def vitft(*arguments: str, **place: Any) -> Done:
    return python("-m", "vitft", *arguments, **place)


def errors(*commands: tuple[str, ...], **place: Any) -> list[tuple[int, str]]:
    """The exit code and the one line of each of several failing commands, run by one process."""
    done = python("-c", IN_TURN, json.dumps(commands), **place)
    said = re.sub(r"^(loading|reading) [^\n]+ \.\.\.\n", "", done.stderr, flags=re.MULTILINE)
    assert re.fullmatch(r"(error: [^\n]+\n\d [\d.]+\n)+", said), said
    assert not (place["cwd"] / "runs").exists()
    lines = said.splitlines()
    ends = [line.split() for line in lines[1::2]]
    assert float(ends[-1][1]) <= 5  # Seconds that the libraries would have slept between retries.
    return [(int(code), line) for (code, _), line in zip(ends, lines[::2], strict=True)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInHub]:
    root = tmp_path_factory.mktemp("hub")
    make_model(root / "models" / MODEL)
    make_dataset(root / "datasets" / DATASET)
    with StandInHub(root) as running:
        yield running


@pytest.fixture(scope="module")
def trained(hub: StandInHub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder where `vitft train --dataset cifar10` ran, and the cache that it filled."""
    folder = tmp_path_factory.mktemp("online")
    done = vitft("train", "--dataset", "cifar10", cwd=folder, endpoint=hub.url, cache=folder / "hf")
    assert done.returncode == 0, done.stderr
    return folder, folder / "hf"


@pytest.fixture(scope="module")
def nowhere() -> str:
    """The address of a hub that has gone: connections are refused."""
    with StandInHub(Path()) as gone:
        return gone.url


def revisions(run: Path) -> tuple[str, str]:
    environment = json.loads((run / "environment.json").read_text())
    return environment["model_revision"], environment["dataset_revision"]


def test_the_default_run_needs_the_data_sets_name_alone(trained: tuple[Path, Path], hub: StandInHub) -> None:
    folder, _ = trained
    assert revisions(folder / RUN) == (hub.sha("models", MODEL), hub.sha("datasets", DATASET))
    config = json.loads((folder / RUN / "last" / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(CIFAR10)}
    assert config["image_size"] == 32


def test_the_hub_was_really_asked(trained: tuple[Path, Path], hub: StandInHub) -> None:
    asked = "\n".join(hub.requests)
    assert f"/{MODEL}/resolve/{hub.sha('models', MODEL)}/model.safetensors" in asked
    assert f"/datasets/{DATASET}/resolve/{hub.sha('datasets', DATASET)}/plain_text/train-" in asked


def test_the_checkpoint_is_evaluated_with_no_other_argument(trained: tuple[Path, Path], hub: StandInHub) -> None:
    folder, cache = trained
    done = vitft("eval", f"{RUN}/last", "--json", cwd=folder, endpoint=hub.url, cache=cache)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert (scores["split"], scores["count"], scores["confusion"]["labels"]) == ("test", 20, list(CIFAR10))
    assert 0 <= scores["accuracy_interval"][0] <= scores["accuracy"] <= scores["accuracy_interval"][1] <= 1


@pytest.mark.parametrize("extra", [OFFLINE, {}], ids=["offline", "hub gone"])
def test_the_named_model_runs_from_the_cache(
    trained: tuple[Path, Path], hub: StandInHub, nowhere: str, tmp_path: Path, extra: dict[str, str]
) -> None:
    """With the offline variables set, and as well where the network is merely gone."""
    arguments = ("train", "--dataset", "cifar10", "--model", MODEL)
    done = vitft(*arguments, cwd=tmp_path, endpoint=nowhere, cache=trained[1], **extra)
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr
    assert revisions(tmp_path / RUN) == (hub.sha("models", MODEL), hub.sha("datasets", DATASET))


def test_the_named_model_runs_from_the_hub(trained: tuple[Path, Path], hub: StandInHub) -> None:
    """The same folder again: the next number, and every weight as in the run with the default model."""
    folder, cache = trained
    arguments = ("train", "--dataset", "cifar10", "--model", MODEL)
    done = vitft(*arguments, cwd=folder, endpoint=hub.url, cache=cache)
    assert done.returncode == 0, done.stderr
    second = folder / RUN.replace("k-1", "k-2")
    assert revisions(second) == revisions(folder / RUN)
    weights = [(run / "last" / "model.safetensors").read_bytes() for run in (folder / RUN, second)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("extra", [{}, OFFLINE], ids=["hub gone", "offline"])
def test_no_network_and_no_cache_is_one_line_with_a_way_out(
    nowhere: str, tmp_path: Path, extra: dict[str, str]
) -> None:
    data, model = errors(
        ("train", "--dataset", "cifar10"),
        ("train", "--dataset", "digits", "--model", MODEL),
        **{"cwd": tmp_path, "endpoint": nowhere, "cache": tmp_path / "hf"},
        **extra,
    )
    assert data[0] == 3
    assert model[0] == 4
    why = "offline mode is set" if extra else f"the hub at {nowhere} could not be reached"
    for (_, line), cache in ((data, "datasets"), (model, "hub")):
        assert f"{why} and the cache {tmp_path / 'hf' / cache} does not have it" in line
    assert DATASET in data[1]
    assert "--dataset digits" in data[1]
    assert MODEL in model[1]
    assert "--model vit-micro" in model[1]


def test_what_the_hub_does_not_have_is_named(hub: StandInHub, tmp_path: Path) -> None:
    got = errors(
        ("train", "--dataset", "uoft-cs/cifar11"),
        ("train", "--dataset", "cifar10", "--dataset-revision", "v9"),
        ("train", "--dataset", "digits", "--model", "google/vit-huge"),
        ("train", "--dataset", "digits", "--model", MODEL, "--model-revision", "v9"),
        **{"cwd": tmp_path, "endpoint": hub.url, "cache": tmp_path / "hf"},
    )
    assert [code for code, _ in got] == [3, 3, 4, 4]
    for (_, line), name in zip(got, ("uoft-cs/cifar11", "v9", "google/vit-huge", "v9"), strict=True):
        assert name in line
    none, unknown = f"the hub at {hub.url} has none that you may read", "the hub has it, but not at that revision"
    for (_, line), why in zip(got, (none, unknown, none, unknown), strict=True):
        assert why in line


def test_another_revision_than_the_cached_one_is_not_taken_for_it(
    trained: tuple[Path, Path], nowhere: str, tmp_path: Path
) -> None:
    """Offline, datasets.load_dataset hands out whatever commit it has cached, whichever was asked for."""
    got = errors(
        ("train", "--dataset", "cifar10", "--dataset-revision", "f" * 40),
        ("train", "--dataset", "digits", "--model", MODEL, "--model-revision", "f" * 40),
        **{"cwd": tmp_path, "endpoint": nowhere, "cache": trained[1]},
        **OFFLINE,
    )
    assert [code for code, _ in got] == [3, 4]
