"""The Dockerfile, as far as it can be checked without Docker: its files, its commands and its extras exist."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import typer

from tests.serving.test_app import model
from vitft.cli.app import app
from vitft.serving.app import Service, create_app
from vitft.serving.uploads import Limits

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "Dockerfile"
STEPS = re.findall(r"^([A-Z]+) (.*)$", FILE.read_text().replace("\\\n", " "), re.MULTILINE)


def words(name: str) -> list[str]:
    """The words of an instruction in JSON; of the health check, those of its command."""
    (text,) = [text for step, text in STEPS if step == name]
    return json.loads(text[text.index("[") :])


def test_what_it_copies_is_there_and_sent_and_suffices_to_build() -> None:
    copied = [word for step, text in STEPS if step == "COPY" for word in text.split()[:-1]]
    sent = [line[1:] for line in Path(f"{FILE}.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(copied) == sorted(sent)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    forced = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    needed = {project["project"]["readme"], *project["project"]["license-files"], *forced, "vitft", "pyproject.toml"}
    assert needed <= set(copied)


def test_its_installation_names_extras_and_a_version_that_there_are() -> None:
    installs = [text for step, text in STEPS if step == "RUN" and "pip install" in text]
    (extras,) = [re.search(r"'\.\[(.*)\]'", text)[1].split(",") for text in installs if "'." in text]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= set(known)
    (pinned,) = [re.search(r"\$\((grep .*)\)", text)[1] for text in installs if "$(" in text]
    said = subprocess.run(shlex.split(pinned), cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"torch==[\d.]+\n", said)


def test_it_serves_to_others_as_a_user_without_rights() -> None:
    command = [*words("ENTRYPOINT"), *words("CMD")]
    context = None
    group = typer.main.get_command(app)
    root = group.make_context("vitft", command[1:], resilient_parsing=False)
    _, serve, rest = group.resolve_command(root, [*getattr(root, "_protected_args", []), *root.args])
    context = serve.make_context("serve", rest, parent=root)
    assert command[:2] == ["vitft", "serve"]
    assert (context.params["host"], context.params["run"]) == ("0.0.0.0", "/model")
    assert [text for step, text in STEPS if step == "EXPOSE"] == [str(context.params["port"])]
    order = [step for step, _ in STEPS]
    assert order.index("USER") > max(place for place, step in enumerate(order) if step == "RUN")
    (user,) = [text for step, text in STEPS if step == "USER"]
    assert f"--uid {user} " in next(text for step, text in STEPS if step == "RUN")


def test_its_health_check_asks_what_there_is() -> None:
    program, flag, code = words("HEALTHCHECK")
    assert (program, flag) == ("python", "-c")
    url = next(
        node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant) and ":" in str(node.value)
    )
    assert url.removeprefix("http://127.0.0.1:8000") in create_app(Service(model(), Limits()))._paths
    assert subprocess.run([sys.executable, "-c", code.replace(":8000", ":9")], capture_output=True).returncode == 1
