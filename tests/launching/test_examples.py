"""The files for Kubernetes and SkyPilot in docs/cluster/: what their schemas, a shell and vitft say of them."""

import subprocess
from pathlib import Path
from typing import Any

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


def test_kubernetes_takes_the_job() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    job = read("kubernetes.yaml")
    validator.validate(job, "1.31", strict=True)
    job["spec"]["backofLimit"] = 3
    with pytest.raises(validator.ValidationError):
        validator.validate(job, "1.31", strict=True)


def test_skypilot_takes_the_task() -> None:
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    task = read("skypilot.yaml")
    jsonschema.validate(task, schemas.get_task_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(task | {"num_node": 2}, schemas.get_task_schema())


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
