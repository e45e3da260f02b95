"""docs/textbook.md: its figures match the code, its links work, its exercises have answers."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from tests import test_readme
from vitft.cli.app import app
from vitft.scratch_runner.config import TextbookConfig, load_config
from vitft.scratch_runner.figures import boot, draw_torch_vit, trace_boot
from vitft.spec import ViTSpec, total

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "docs" / "textbook.md"
TEXT = BOOK.read_text(encoding="utf-8")
FIGURES = re.findall(r"!\[[^\]]+\]\(textbook/([^)]+)\)", TEXT)
LINKS = re.findall(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", TEXT)
CHAPTERS = sorted(file for file in (ROOT / "vitft" / "scratch").glob("*.py"))
EXERCISES = ROOT / "tests" / "scratch" / "test_exercises.py"
COMMANDS = re.findall(r"^vitft .*$", "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)), re.MULTILINE)


def defined(file: Path) -> set[str]:
    """Names of the functions, classes and methods (Class.method) of a file."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def check_picture(file: Path) -> None:
    """Assert that the file is a PNG of the right size, not blank and not too large."""
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1200, 450)
        pixels = np.asarray(picture.convert("L"))
    assert pixels.std() > 10, f"{file.name} is blank"
    # White corners: nothing is cut off there.
    assert pixels[[0, 0, -1, -1], [0, -1, 0, -1]].min() == 255
    assert 8_000 < file.stat().st_size < 200_000


def test_the_figures_are_up_to_date(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["scratch", "figures", str(tmp_path / "figures")])
    assert result.stderr == f"{len(FIGURES)} figures in {tmp_path / 'figures'}\n"
    for name in FIGURES:
        check_picture(tmp_path / "figures" / name)
        if name == "torch_vit.png":  # it plots rounding errors, which differ between processors
            continue
        drawn, stored = (
            np.asarray(Image.open(folder / name).convert("L"), np.float64)
            for folder in (tmp_path / "figures", BOOK.parent / "textbook")
        )
        # Means of 10 x 10 pixels: a missing or new panel, line or label changes many of them.
        difference = np.abs(drawn - stored).reshape(45, 10, 120, 10).mean(axis=(1, 3))
        assert (difference > 8).mean() < 0.01, f"{name} has changed; draw it again"
    (tmp_path / "file").touch()
    assert CliRunner().invoke(app, ["scratch", "figures", str(tmp_path / "file")]).exit_code == 2


def test_the_engines_differ_only_by_rounding_in_every_stage() -> None:
    figure = Figure(figsize=(8, 3))
    draw_torch_vit(figure)
    (axes,) = figure.axes
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [text.get_text().strip() for text in axes.texts] == ["float32", "float64"]
    stages = len(trace_boot()[3]) - 1
    for line, eps in zip(points, (2.0**-23, 2.0**-52), strict=True):
        differences = np.asarray(line.get_ydata())
        assert differences.shape == (stages,)
        assert 0 < differences.max() < 200 * eps  # measured: 1 to 20 eps


def test_the_boot_in_the_readme_is_that_of_the_textbook() -> None:
    assert np.array_equal(np.asarray(Image.open(ROOT / "docs" / "boot.png")), boot())


def test_every_figure_file_is_used() -> None:
    stored = sorted((ROOT / "docs" / "textbook").iterdir())
    assert sorted(FIGURES) == [file.name for file in stored]
    for file in stored:
        check_picture(file)


def test_every_chapter_has_a_figure_and_is_linked() -> None:
    assert {f"{file.stem}.png" for file in CHAPTERS if file.stem != "__init__"} == set(FIGURES)
    linked = {(BOOK.parent / target).resolve() for _, target in LINKS if not target.startswith("#")}
    assert set(CHAPTERS) <= linked


def test_chapters_are_in_the_order_of_the_package() -> None:
    order = re.findall(r"`(\w+)`", (ROOT / "vitft" / "scratch" / "__init__.py").read_text().split("Shapes are")[0])
    headings = re.findall(r"^## (\d+)\. .*`(\w+)`$", TEXT, re.MULTILINE)
    assert [name for _, name in headings] == order == [Path(name).stem for name in FIGURES]
    assert [int(number) for number, _ in headings] == list(range(1, len(order) + 1))


@pytest.mark.parametrize("target", sorted({target for _, target in LINKS}))
def test_every_link_has_a_target(target: str) -> None:
    assert "://" not in target
    file, _, anchor = target.partition("#")
    place = BOOK.parent / file if file else BOOK
    assert place.is_file()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("text", "target"), sorted({link for link in LINKS if link[1].endswith(".py")}))
def test_every_linked_function_is_in_its_file(text: str, target: str) -> None:
    name = text.strip("`")
    if "/" not in name:  # otherwise the link is to the file itself
        assert name in defined(BOOK.parent / target)


def test_exercises_and_answers_match() -> None:
    numbers = [int(number) for number in re.findall(r"^\*\*Exercise (\d+)\.\*\*", TEXT, re.MULTILINE)]
    answers = re.findall(r"^Answer: \[`(test_\w+)`\]\(\.\./tests/scratch/test_exercises\.py\)$", TEXT, re.MULTILINE)
    assert numbers == list(range(1, len(CHAPTERS)))  # one per chapter
    assert len(answers) == len(numbers)
    tests = [node.name for node in ast.parse(EXERCISES.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert answers == [name for name in tests if name.startswith("test_")]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line: str) -> None:
    test_readme.test_a_command_of_the_docs_parses(line)


def test_there_are_commands_and_no_long_lines() -> None:
    assert len(COMMANDS) > 10
    assert [line for line in TEXT.splitlines() if len(line) > 120] == []


def test_the_table_of_networks_matches_the_recipes() -> None:
    lines = TEXT.split("### Networks 1, 2 and 3")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = {name: values for name, *values in cells}
    for column, name in enumerate(("mnist-patch7", "mnist-patch4", "cifar10-patch4")):
        _, config = load_config(name, {})
        channels, side = (3, 32) if config.dataset == "cifar10" else (1, 28)
        spec = replace(
            ViTSpec.square(side, config.patch_size, config.width, config.layers, config.heads, config.mlp, 10,
                           channels=channels),
            positions=config.positions, final_norm=config.final_norm, activation=config.activation,
        )  # fmt: skip
        expected = {
            "recipe": f"`{name}`",
            "positions": config.positions,
            "parameters": f"{total(spec).parameters:,}",
            "forward FLOPs per image": f"{total(spec).flops / 1e6:.2g} M"
            if column < 2
            else f"{total(spec).flops / 1e6:.1f} M",
            "blocks, M": f"{config.layers}, {config.mlp}",
            "D, A, K": f"{config.width}, {config.heads}, {config.width // config.heads}",
            "epochs, batch size": f"{config.epochs}, {config.batch_size}",
        }
        assert {key: rows[key][column] for key in expected} == expected
        assert rows["AdamW's learning rate"][column].startswith(f"{config.lr}, ")
        for name, value in (("weight decay", config.weight_decay), ("dropout", config.dropout)):
            if value > TextbookConfig.model_fields[name.replace(" ", "_")].default:
                assert f"{name} {value}" in rows["regularization"][column]
