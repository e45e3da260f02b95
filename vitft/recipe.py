"""Recipes: find, list, show, copy, load; merge defaults < recipe < flags.

A recipe is a YAML file of settings with a comment header: command, hardware, time, measured score.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from vitft.config import TrainConfig
from vitft.errors import UsageError, nearest


@dataclass(frozen=True)
class Recipe:
    """A recipe that comes with vitft: its name, file and the first line of its header."""

    name: str
    path: Path
    summary: str


def recipes() -> list[Recipe]:
    """The recipes that come with vitft, by name."""
    installed = Path(str(files("vitft"))) / "recipes"
    folder = installed if installed.is_dir() else installed.parent.parent / "recipes"  # an editable install
    found = [(path.relative_to(folder).with_suffix("").as_posix(), path) for path in folder.rglob("*.yaml")]
    return [Recipe(name, path, _summary(path)) for name, path in sorted(found)]


def find_recipe(name_or_file: str) -> Path:
    """The file of a recipe, given its path or its name. Raises UsageError naming the nearest."""
    path = Path(name_or_file).expanduser()
    if path.is_file():
        return path
    known = {recipe.name: recipe.path for recipe in recipes()}
    if name_or_file in known:
        return known[name_or_file]
    hint = nearest(name_or_file, known) or "; `vitft recipes ls` lists them"
    raise UsageError(f"recipe {name_or_file}: neither a file nor a known recipe{hint}")


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a recipe's file, unchecked. Raises UsageError."""
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        first = " ".join(str(error).split())
        raise UsageError(f"recipe {path}: cannot be read: {first}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(f"recipe {path}: a recipe is `setting: value` lines, got {type(settings).__name__}.")
    return settings


class _Loader(yaml.SafeLoader):
    """YAML as ever, but a setting that is given twice is an error; `batch-size` is `batch_size`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Read a mapping. Raises yaml.YAMLError for a key that comes twice."""
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            key = key.replace("-", "_") if isinstance(key, str) else str(key)
            if key in found:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"{key} is given twice, the second time in line {line}; leave one")
            found[key] = self.construct_object(value_node, deep=True)
        return found


def load_config(recipe: str | None, flags: dict[str, Any]) -> TrainConfig:
    """Defaults < recipe < flags. Raises UsageError."""
    if recipe is None:
        return TrainConfig.parse(flags, "flags")
    path = find_recipe(recipe)
    settings = read_recipe(path)
    if not flags:
        return TrainConfig.parse(settings, f"recipe {path.name}")
    TrainConfig.parse(settings, f"recipe {path.name}")  # its own mistakes are named as its own
    return TrainConfig.parse(settings | flags, "flags")


def copy_recipe(name: str, target: Path) -> Path:
    """Copy a recipe for editing, to a file or into a folder. Raises UsageError rather than overwrite."""
    source = find_recipe(name)
    destination = target / source.name if target.is_dir() else target
    if destination.exists():
        raise UsageError(f"{destination} exists; name another file.")
    if not destination.parent.is_dir():
        raise UsageError(f"{destination}: no folder {destination.parent}; make it first.")
    destination.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return destination


def _summary(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()
