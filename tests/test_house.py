"""The structure of the package: its import contracts in `pyproject.toml`, and what only one module may do."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from sys import stdlib_module_names

import pytest

import vitft

PACKAGE = Path(vitft.__file__).parent
PROJECT = PACKAGE.parent / "pyproject.toml"
MODULES = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in sorted(PACKAGE.rglob("*.py"))}
BODIES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}
IN_A_ROOM_AT_MOST = 16  # files: more is more than one idea
from_a_clone = pytest.mark.skipif(not PROJECT.is_file(), reason="not a clone: no pyproject.toml beside the package")


def imports(name: str) -> Iterator[str]:
    """Everything that a module imports, at its top or in a function, as full dotted names."""
    for node in ast.walk(BODIES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def nodes() -> Iterator[tuple[str, ast.AST]]:
    yield from ((name, node) for name, body in BODIES.items() for node in ast.walk(body))


def calls(*beginnings: str) -> set[str]:
    """The modules whose code calls, reads or raises what begins so."""
    kinds = (ast.Call, ast.Attribute, ast.Raise)
    return {name for name, node in nodes() if isinstance(node, kinds) and ast.unparse(node).startswith(beginnings)}


@from_a_clone
def test_imports_keep_to_the_contracts() -> None:
    """The layers of `[tool.importlinter]`: `make check` shows which import breaks one."""
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command, "--no-logo", "--no-cache"], cwd=PROJECT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_tree_stays_small() -> None:
    rooms = {file.parent for file in MODULES.values()}
    assert {file.stem for file in PACKAGE.glob("*.py")} == {"__init__", "__main__", "errors", "randomness", "spec"}
    assert {room: count for room in rooms if (count := len(list(room.glob("*.py")))) > IN_A_ROOM_AT_MOST} == {}
    assert not {"utils", "util", "helpers", "misc", "common"} & {name.split(".")[-1] for name in MODULES}


def test_modules_have_docstrings_and_no_open_tasks() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "XXX")
    assert [name for name, body in BODIES.items() if not ast.get_docstring(body)] == []
    assert [name for name, file in MODULES.items() if any(mark in file.read_text("utf-8") for mark in marks)] == []
    assert [name for name, body in BODIES.items() if "__main__'" in ast.unparse(body)] == []


def test_text_is_read_and_written_as_utf_8() -> None:
    """Whatever the locale's encoding is."""
    for name, node in nodes():
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        first = node.args[0] if node.args else ast.Constant("r")  # a mode, unless it opens a file of an archive
        opens = node.func.attr == "open" and isinstance(first, ast.Constant) and "b" not in str(first.value)
        if node.func.attr in ("read_text", "write_text") or opens:
            assert "encoding" in [word.arg for word in node.keywords], f"{name}:{node.lineno}"


def test_a_command_that_is_suggested_can_be_pasted() -> None:
    """What is put into it, such as a path with a space, is quoted."""
    for name, node in nodes():
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


def test_only_the_console_prints() -> None:
    assert calls("print(", "sys.stdout", "sys.stderr", "rich.print(", "typer.echo(", "input(") == {"io.console"}


def test_only_the_command_line_ends_the_program() -> None:
    ending = ("sys.exit", "os._exit", "exit(", "quit(", "raise SystemExit", "typer.Exit", "raise typer.Exit")
    assert calls(*ending) <= {"cli.app", "cli.group"}


def test_a_home_folder_is_found_in_one_place() -> None:
    """`Path.expanduser` ends in an error for a name that merely begins with ~; `paths.expanded` does not."""
    found = {name for name, node in nodes() if isinstance(node, ast.Attribute) and node.attr == "expanduser"}
    assert found == {"io.paths"}


def test_scratch_imports_only_numpy_and_the_spec() -> None:
    for name in (name for name in MODULES if name.startswith("scratch.")):
        allowed = {"numpy", "scipy", "safetensors", "vitft"} | ({"torch"} if name == "scratch.torch_vit" else set())
        assert {full.split(".")[0] for full in imports(name)} <= allowed | stdlib_module_names, name
        assert {full for full in imports(name) if full.startswith("scipy")} <= {"scipy.special.erf"}, name


@from_a_clone
def test_every_import_is_declared() -> None:
    """A package that is only there because another one needs it may leave with that one."""
    said = tomllib.loads(PROJECT.read_text())["project"]
    extras = ("heic", "lora", "onnx", "openvino", "serve", "sweep")
    lines = [*said["dependencies"], *(line for extra in extras for line in said["optional-dependencies"][extra])]
    packages = [re.split("[<>=]", line)[0] for line in lines]
    modules = {"pillow": "PIL", "pillow_jxl_plugin": "pillow_jxl", "pyyaml": "yaml", "scikit_learn": "sklearn"}
    declared = {modules.get(name, name) for name in (package.replace("-", "_") for package in packages)}
    imported = {full.split(".")[0] for name in MODULES for full in imports(name)} - stdlib_module_names - {"vitft"}
    assert imported - declared == set()
    # What is no longer imported need not be installed, but for what torch.onnx imports.
    assert declared - imported == {"onnxscript"}
