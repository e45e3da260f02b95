"""The course: its lessons run as they stand, and their copies are notebooks."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.learning.record import COURSE, run
from vitft import TrainConfig
from vitft.cli.app import app
from vitft.learning.lessons import Lesson, copy, find, lessons, notebook, notebooks

LESSONS = lessons()
QUICK = ("labels",)  # it trains nothing


def named(lesson: Lesson) -> str:
    return lesson.name


def words(text: str) -> str:
    """A printed text without its numbers, which differ between machines, and the width they take."""
    return " ".join(re.sub(r"[-+]?\d[\d,.]*(e[-+]\d+)?", "#", text).split())


@pytest.mark.parametrize("lesson", [
    pytest.param(one, id=one.name, marks=[] if one.name in QUICK else [pytest.mark.slow]) for one in LESSONS
])  # fmt: skip
def test_it_runs_and_prints_what_it_says(lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run(lesson, tmp_path / "plots")
    assert [words(text) for text in printed] == [words(text) for text in lesson.outputs]
    drawn = {file.name for file in (tmp_path / "plots").glob("*")}
    assert drawn == {file.name for file in (COURSE / "images").glob(f"{lesson.name}-*.png")}
    assert drawn == set(re.findall(r"!\[[^\]]+\]\(images/([^)]+)\)", lesson.text))


@pytest.mark.parametrize("lesson", LESSONS, ids=named)
def test_its_settings_exist(lesson: Lesson) -> None:
    """Without running it: what it passes to TrainConfig are settings."""
    calls = [
        node
        for node in ast.walk(ast.parse("".join(lesson.code)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "TrainConfig"
    ]
    assert calls
    given = {keyword.arg for call in calls for keyword in call.keywords} - {None}
    assert given <= TrainConfig.model_fields.keys()


@pytest.mark.parametrize("lesson", LESSONS, ids=named)
def test_it_has_a_summary_an_exercise_with_an_answer_and_links_that_work(lesson: Lesson) -> None:
    assert lesson.title
    assert 20 < len(lesson.summary) < 200
    assert lesson.text.count("**Exercise.**") == lesson.text.count("<summary>Answer</summary>") == 1
    for target in re.findall(r"\]\(([^)#]+\.(?:md|png))\)", lesson.text):
        assert (COURSE / target).is_file(), target


def test_lessons_are_numbered_in_order_and_found_by_name_and_number() -> None:
    assert [lesson.number for lesson in LESSONS] == list(range(1, len(LESSONS) + 1))
    assert find("3") == find("rate")


def test_a_notebook_has_all_code_and_prose_and_no_output(tmp_path: Path) -> None:
    lesson = find("probe")
    (file,) = copy(notebooks([lesson]), tmp_path / "new" / "folder")
    page = json.loads(file.read_text(encoding="utf-8"))
    assert page == notebook(lesson)
    code = ["".join(cell["source"]) for cell in page["cells"] if cell["cell_type"] == "code"]
    assert [text.strip() for text in code] == [text.strip() for text in lesson.code]
    assert all(cell["outputs"] == [] for cell in page["cells"] if cell["cell_type"] == "code")
    prose = "\n".join("".join(cell["source"]) for cell in page["cells"] if cell["cell_type"] == "markdown")
    assert prose.startswith(f"# {lesson.title}")
    assert "Exercise" in prose
    linked = set(re.findall(r"\]\(([^)]*)\)", prose))
    assert linked
    assert linked <= notebooks(LESSONS).keys()
    assert "```" not in prose
    assert "images/" not in prose
    assert len({cell["id"] for cell in page["cells"]}) == len(page["cells"])


def test_notebooks_are_valid(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    for lesson in LESSONS:
        nbformat.validate(nbformat.from_dict(notebook(lesson)))


def test_the_command_lists_and_copies_and_overwrites_nothing(tmp_path: Path) -> None:
    done = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["learn"])
    assert done.exit_code == 0, done.output
    for lesson in LESSONS:
        assert lesson.name in done.stdout
    listed = json.loads(CliRunner().invoke(app, ["learn", "--json"]).stdout)["lessons"]
    assert [one["name"] for one in listed] == [lesson.name for lesson in LESSONS]
    assert re.search(r"textbook +The textbook: from a pixel", done.stdout)
    words = ["learn", "rate", "6", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.stdout.split() == [str(tmp_path / "03-rate.ipynb"), str(tmp_path / "06-validation.ipynb")]
    (tmp_path / "03-rate.ipynb").write_text("mine")
    (tmp_path / "06-validation.ipynb").unlink()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2
    assert "exists" in again.stderr
    assert (tmp_path / "03-rate.ipynb").read_text() == "mine"
    assert not (tmp_path / "06-validation.ipynb").exists()


def test_the_textbook_is_copied_with_figures_and_answers_that_run(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["learn", "textbook", "--output", str(tmp_path)])
    book = tmp_path / "textbook.md"
    assert done.stdout.split() == [str(book), str(tmp_path / "test_exercises.py"), str(tmp_path / "gradients.py")]
    links = re.findall(r"\]\(([^)#]+)\)", book.read_text(encoding="utf-8"))
    assert len(links) > 50
    for link in links:
        assert link.startswith("https:") or (tmp_path / link).is_file(), link
    for file in tmp_path.glob("*.py"):
        assert "tests.scratch" not in file.read_text(encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "doublings or saturates", "test_exercises.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "2 passed" in ran.stdout, ran.stdout
    assert " ".join(command[1:3]) in book.read_text(encoding="utf-8").replace("python ", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ratte"], "unknown; did you mean rate?"),
        (["textbok"], "unknown; did you mean textbook?"),
        (["rate"], "add --output FOLDER"),
        (["99"], "unknown"),
    ],
)
def test_mistakes_are_answered_in_a_line(words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["learn", *words])
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
