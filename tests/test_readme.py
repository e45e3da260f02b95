"""The words of README and docs: commands parse, Python runs, links and tests exist."""

import logging
import re
import runpy
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer

from vitft.cli.app import app
from vitft.config.train import TrainConfig
from vitft.errors import as_flag

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", *PAGES)}


def blocks(language: str) -> list[str]:
    return [found for text in TEXTS.values() for found in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for text in [*blocks("bash"), *(p.read_text(encoding="utf-8") for p in (ROOT / "recipes").rglob("*.yaml"))]
        for line in re.findall(r"^#?\s*((?:\S+ )*?vitft .*)$", text, re.MULTILINE)
        if re.match(r"#?\s*(accelerate launch -m |torchrun .*-m )?vitft [a-z-]", line)
    }
)


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_docs_parses(line: str) -> None:
    words = shlex.split(line[line.index("vitft ") :])[1:]
    if words == ["--install-completion"]:
        return
    context = None
    command = typer.main.get_command(app)
    while words:
        context = command.make_context("vitft", words, parent=context, resilient_parsing=False)
        rest = [*getattr(context, "_protected_args", []), *context.args]
        if not hasattr(command, "resolve_command"):
            return
        _, command, words = command.resolve_command(context, rest)


@pytest.mark.parametrize("name", ["README.md", "docs/reliability.md"])
def test_a_promise_names_a_test_that_there_is(name: str) -> None:
    named = re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)::(test_\w+)`", TEXTS[name])
    assert len(named) >= 5
    for file in re.findall(r"[\w/]*test_\w+\.py", TEXTS[name]):  # also where no test of it is named
        assert (ROOT / "tests" / file.removeprefix("tests/")).is_file(), file
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"


def test_make_targets_of_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {word for block in blocks("bash") for word in re.findall(r"\bmake ([a-z]+)", block)}
    assert named
    assert named <= targets


def test_the_python_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block, those of a page one after the other: the README first, which trains the run that others use."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    ran = 0
    elsewhere = ("docs/course/", "docs/guides/export.md")  # in tests/learning and tests/exporting
    for name, text in TEXTS.items():
        if name.startswith(elsewhere):
            continue
        names: dict[str, object] = {}
        for code in sorted(python_of(text), key=lambda code: "TrainConfig" not in code):
            quick = code.replace("epochs=2", "max_steps=2, max_eval_samples=50").replace("max_steps=20", "max_steps=2")
            with restored(logging.getLogger("vitft")):
                exec(compile(quick, name, "exec"), names)
            ran += 1
        if name == "README.md":
            assert 0 <= names["result"].scores["test"].accuracy <= 1  # type: ignore[attr-defined]
    assert ran >= 6


def python_of(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@contextmanager
def restored(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    yield
    logger.setLevel(level)


def test_the_page_of_settings_has_them_all() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "settings_page.py"))["page"]()
    for name in TrainConfig.model_fields:
        assert len(re.findall(rf"^\| `{as_flag(name)}`(?: ↻)? \|.*\| \S.* \|$", page, re.MULTILINE)) == 1, name
    assert "| `--lr` | number, `auto` | `auto` | Peak learning rate." in page
    assert "| `--skip-test` | on, off | off |" in page
    assert "| `--erase` | number | `0.0` |" in page


def test_links_between_pages_lead_somewhere() -> None:
    for name, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"
