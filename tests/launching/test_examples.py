"""The files for Kubernetes and SkyPilot in docs/cluster/: what their schemas, a shell and vitft say of them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.cli.test_app import vitft

FOLDER = Path(__file__).parents[2] / "docs" / "cluster"


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def shell_of(name: str) -> str:
    document = read(name)
    if name == "skypilot.yaml":
        return str(document["run"])
    return str(document["spec"]["template"]["spec"]["containers"][0]["args"][0])


def schema(name: str) -> Any:
    """What the file's first line says it is."""
    return json.loads((Path(__file__).parent / "schemas" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "place",
    [["spec"], ["spec", "podFailurePolicy", "rules", 1], ["spec", "template", "spec"],
     ["spec", "template", "spec", "containers", 0, "resources"], ["spec", "template", "spec", "volumes", 2]],
)  # fmt: skip
def test_kubernetes_takes_the_job(place: list[str | int]) -> None:
    job = read("kubernetes.yaml")
    jsonschema.validate(job, schema("kubernetes-job.json"))
    part = job
    for step in place:
        part = part[step]
    part["backofLimit"] = 3
    with pytest.raises(jsonschema.ValidationError, match="'backofLimit' was unexpected"):
        jsonschema.validate(job, schema("kubernetes-job.json"))


def test_skypilot_takes_the_task() -> None:
    """SkyPilot checks its parts by schemas of their own, too."""
    task, of = read("skypilot.yaml"), schema("skypilot.json")
    parts = {"task": [task], "resources": [task["resources"]], "storage": list(task["file_mounts"].values())}
    for kind, some in parts.items():
        for part in some:
            jsonschema.validate(part, of[kind])
            with pytest.raises(jsonschema.ValidationError, match="'num_node' was unexpected"):
                jsonschema.validate(part | {"num_node": 2}, of[kind])


@pytest.mark.parametrize("name", ["kubernetes.yaml", "skypilot.yaml"])
def test_its_commands_exist_and_resume_what_was_begun(name: str, tmp_path: Path) -> None:
    """Run the shell with a `vitft` and a `torchrun` that only say how they were called."""
    text = shell_of(name).replace("/runs", str(tmp_path))
    says = 'vitft() { echo vitft "$@"; }; torchrun() { shift 3; echo "$@"; }; exec() { "$@"; exit; }\n'
    calls = []
    for begun in (False, True):
        if begun:
            (tmp_path / "photos").mkdir()
            (tmp_path / "photos" / "config.yaml").touch()
        command = ["bash", "-uc", f"SKYPILOT_NUM_GPUS_PER_NODE=8\n{says}{text}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        calls.append(done.stdout.split()[1:])
    assert [call[:2] for call in calls] == [["train", "--dataset"], ["train", "--resume"]]
    assert calls[0][-1] == calls[1][-1] == f"{tmp_path}/photos"
    assert vitft("launch", "--slurm", "--dry-run", *calls[0][:-1], "new").exit_code == 0  # it has such flags
