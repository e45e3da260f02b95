"""The arrows of the house: who may import whom, who may print, who may end the program.

ROOMS is the house from the street down. A module may import modules of lines below its own, and of its
own line where it says so by standing there alone with a folder's name; never one above. Imports inside
functions count like any other. A new module gets its place here, as low as what it imports allows.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitft

PACKAGE = Path(vitft.__file__).parent
ROOMS = [
    ["__main__"],
    ["cli"],
    ["shell", "commands"],
    ["trainer", "textbook.figures", "proof"],
    ["textbook.training", "textbook.report"],
    ["plan", "bench"],
    ["tuning"],
    ["trial", "learner", "speed"],
    ["runs"],
    ["preparation"],
    ["probing"],
    ["evaluation", "prediction", "figures"],
    ["explain.page", "explain.tour"],
    ["explain.attention", "explain.stage"],
    ["explain.trace"],
    ["explain.table", "textbook.config", "textbook.run", "textbook.torch_engine"],
    ["faults", "diagnosis", "held_out"],
    ["checkpoint", "history", "metrics", "models", "optim", "signals"],
    ["recipe", "card"],
    ["processors", "classification"],
    ["positions"],
    ["data.suspects"],
    ["data.info", "data.preview", "data.loader", "data.check"],
    ["data.record"],
    ["data.splits", "data.store"],
    ["data.cache"],
    ["data.sources"],
    ["data.local", "data.hub", "data.identity"],
    ["data.archives"],
    ["data.layouts", "data.pixels"],
    ["data.tables", "data.choice", "data.features"],
    ["data.columns"],
    ["data.rows", "data.named", "data.folders"],
    ["data.schema", "data.augment", "data.images"],
    ["data.color", "data.filters", "data.limits", "data.room"],
    ["hardware", "sizes", "demand", "heads"],
    ["config", "spec", "options"],
    ["hub", "settings", "clock", "reports"],
    ["console", "errors", "files", "fonts", "paths", "randomness"],
    ["__init__"],  # the version; its public API is lazy, and may name any room
]
HEAVY = {"torch", "transformers", "datasets", "numpy", "accelerate", "evaluate", "sklearn", "matplotlib"}
LIGHT = ["cli", "shell", "config", "settings", "options", "errors", "spec", "recipe", "console", "textbook.config"]
SCRATCH = {"numpy", "scipy", "safetensors", "vitft"}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
BODIES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}
FOLDERS = {name.removesuffix(".__init__") for name in MODULES if name.endswith(".__init__")}


def imports(name: str) -> Iterator[str]:
    """Everything that a module imports, at its top or in a function, as full dotted names."""
    for node in ast.walk(BODIES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively; say where from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_entered(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    entered = set()
    for full in imports(name):
        if full.split(".")[0] == "vitft":
            path = full.removeprefix("vitft").strip(".")
            while path and path not in MODULES:
                path = path.rpartition(".")[0]
            entered.add(path or "__init__")
    return entered


def calls(name: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(BODIES[name]):
        if isinstance(node, (ast.Call, ast.Attribute, ast.Raise)):
            yield node.lineno, ast.unparse(node)


def floor(name: str) -> int:
    return next((number for number, line in enumerate(ROOMS) if name in line), -1)


PLACED = [name for name in MODULES if not (name.split(".")[0] in FOLDERS and name.endswith("__init__"))]


@pytest.mark.parametrize("name", [n for n in PLACED if not n.startswith(("scratch.", "explain."))])
def test_every_module_has_its_place(name: str) -> None:
    assert floor(name) >= 0, f"give {name} a line in ROOMS"


@pytest.mark.parametrize("name", [n for n in PLACED if n not in ("__init__", "__main__")])
def test_arrows_point_down(name: str) -> None:
    above = [other for other in rooms_entered(name) if 0 <= floor(other) <= floor(name) and other != name]
    assert not above, f"{name} imports {above}, which do not lie below it"


@pytest.mark.parametrize("name", PLACED)
def test_text_is_read_and_written_as_utf_8(name: str) -> None:
    """Whatever the locale's encoding is."""
    for node in ast.walk(BODIES[name]):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        first = node.args[0] if node.args else ast.Constant("r")  # a mode, unless it opens a file of an archive
        opens = node.func.attr == "open" and isinstance(first, ast.Constant) and "b" not in str(first.value)
        if node.func.attr in ("read_text", "write_text") or opens:
            assert "encoding" in [word.arg for word in node.keywords], f"{name}:{node.lineno}"


@pytest.mark.parametrize("name", PLACED)
def test_a_command_that_is_suggested_can_be_pasted(name: str) -> None:
    """What is put into it, such as a path with a space, is quoted."""
    for node in ast.walk(BODIES[name]):
        if not isinstance(node, ast.JoinedStr):
            continue
        before = ""
        for part in node.values:
            if isinstance(part, ast.Constant):
                before += str(part.value)
            elif isinstance(part, ast.FormattedValue):
                if re.search(r"--(resume|dataset|model|recipe|checkpoint|exclude|output) $", before):
                    assert re.search(r"shlex\.quote|^{[A-Z_]+}$", ast.unparse(part)), f"{name}:{node.lineno}: {before}"
                before += "{}"


@pytest.mark.parametrize("name", LIGHT)
def test_what_starts_the_command_line_is_light(name: str) -> None:
    heavy = {full.split(".")[0] for full in imports(name)} & HEAVY
    assert not heavy, f"{name} imports {heavy}"


@pytest.mark.parametrize("name", ["config", "errors", "spec", "recipe", "options"])
def test_the_lowest_rooms_enter_no_heavy_one(name: str) -> None:
    assert rooms_entered(name) <= {"config", "errors", "paths", "settings", "spec"}


@pytest.mark.parametrize("name", MODULES)
def test_only_console_prints(name: str) -> None:
    writing = ("print(", "sys.stdout", "sys.stderr", "rich.print(", "typer.echo(", "input(")
    found = [(line, code) for line, code in calls(name) if code.startswith(writing)]
    assert name == "console" or not found, found


@pytest.mark.parametrize("name", MODULES)
def test_only_the_command_line_ends_the_program(name: str) -> None:
    ending = ("sys.exit", "os._exit", "exit(", "quit(", "raise SystemExit", "typer.Exit", "raise typer.Exit")
    found = [(line, code) for line, code in calls(name) if code.startswith(ending)]
    assert name in ("cli", "shell") or not found, found


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("scratch.")])
def test_scratch_stands_on_numpy_and_the_spec_alone(name: str) -> None:
    from sys import stdlib_module_names

    allowed = SCRATCH | ({"torch"} if name == "scratch.torch_vit" else set()) | stdlib_module_names
    assert {full.split(".")[0] for full in imports(name)} <= allowed
    assert {full for full in imports(name) if full.startswith("scipy")} <= {"scipy.special.erf"}
    assert all(other == "spec" or other.startswith("scratch") for other in rooms_entered(name))


def test_nothing_but_textbook_and_explain_imports_scratch() -> None:
    users = {name for name in MODULES for other in rooms_entered(name) if other.startswith("scratch")}
    assert {user for user in users if not user.startswith(("scratch.", "explain.", "textbook"))} == set()


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_and_leaves_nothing_open(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    assert not any(mark in text for mark in ("TO" + "DO", "FIX" + "ME", "XXX"))
    assert ast.get_docstring(BODIES[name]), "a module says in its first line what it is"


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert not {"utils", "util", "helpers", "misc", "common"} & {name.split(".")[-1] for name in MODULES}
    assert not [name for name, body in BODIES.items() if "__main__'" in ast.unparse(body)]


@pytest.mark.parametrize("name", MODULES)
def test_a_home_folder_is_found_in_one_place(name: str) -> None:
    """`Path.expanduser` ends in an error for a name that merely begins with ~; `paths.expanded` does not."""
    assert name == "paths" or not [line for line, code in calls(name) if code.endswith("expanduser")]


def test_every_import_is_declared() -> None:
    """A package that is only there because another one needs it may leave with that one."""
    from sys import stdlib_module_names

    project = PACKAGE.parent / "pyproject.toml"
    if not project.is_file():
        pytest.skip("not a clone: no pyproject.toml beside the package")
    said = tomllib.loads(project.read_text())["project"]
    packages = [re.split("[<>=]", line)[0] for line in (*said["dependencies"], *said["optional-dependencies"]["heic"])]
    modules = {"pillow": "PIL", "pillow_jxl_plugin": "pillow_jxl", "pyyaml": "yaml", "scikit_learn": "sklearn"}
    declared = {modules.get(name, name) for name in (package.replace("-", "_") for package in packages)}
    imported = {full.split(".")[0] for name in MODULES for full in imports(name)} - stdlib_module_names - {"vitft"}
    assert imported - declared == set()
    assert declared - imported == set()  # what is no longer imported need not be installed
