"""Recipes: find, list, copy, load, and merge (defaults < recipe < flags).

A recipe is a YAML file of settings. Its comment header gives the command, hardware, time and measured score.
Recipes in `scratch/` belong to the textbook and have its settings.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vitft.config.train import TrainConfig
from vitft.errors import UsageError, nearest
from vitft.io.paths import expanded, shipped

Config = TypeVar("Config")
TEXTBOOK = "scratch/"
SCALAR = "scalar"
"""The textbook's first network. It has a built-in task, so it needs no settings file."""


@dataclass(frozen=True)
class Recipe:
    """A recipe that ships with vitft: name, file and the first line of its header."""

    name: str
    path: Path
    summary: str

    @property
    def textbook(self) -> bool:
        """Whether `vitft scratch train` runs it."""
        return self.name.startswith(TEXTBOOK)


def command_for(path: Path) -> str:
    """The command that takes a recipe, or a copy of it, as its argument."""
    textbook = any(recipe.path == path and recipe.textbook for recipe in recipes())
    return "vitft scratch train" if textbook else "vitft train --recipe"


def recipes() -> list[Recipe]:
    """The recipes that ship with vitft, sorted by name."""
    folder = shipped("recipes")
    named = [(path.relative_to(folder).with_suffix("").as_posix(), path) for path in folder.rglob("*.yaml")]
    return [Recipe(name, path, _summary(path)) for name, path in sorted(named)]


def names(textbook: bool | None = None) -> list[str]:
    """The names of all recipes, or of those for `vitft train --recipe` (False) or `vitft scratch train` (True)."""
    if textbook:
        return [*(recipe.name.removeprefix(TEXTBOOK) for recipe in recipes() if recipe.textbook), SCALAR]
    return [recipe.name for recipe in recipes() if textbook is None or not recipe.textbook]


def find_recipe(name_or_file: str, *, textbook: bool | None = None) -> Path:
    """The file of a recipe, given its path or its name (`scratch/` may be omitted).

    `textbook` requires a textbook recipe (True) or a fine-tuning recipe (False). Raises UsageError if there is no
    such recipe, or if it is of the other kind.
    """
    path = expanded(name_or_file)
    if path.is_file():
        return path
    known = {recipe.name: recipe for recipe in recipes()}
    recipe = known.get(name_or_file) or known.get(TEXTBOOK + name_or_file)
    if recipe is not None:
        if textbook is not None and textbook != recipe.textbook:
            kind = "a textbook" if recipe.textbook else "a fine-tuning"
            run = f"{command_for(recipe.path)} {recipe.name.removeprefix(TEXTBOOK)}"
            raise UsageError(f"recipe {name_or_file} is {kind} recipe; run it with: {run}")
        return recipe.path
    hint = nearest(name_or_file, names(textbook=True) if textbook else known) or "; `vitft recipes ls` lists them"
    hint = f"; a folder of images is a dataset: --dataset {shlex.quote(name_or_file)}" if path.is_dir() else hint
    raise UsageError(f"recipe {name_or_file}: neither a file nor a known recipe{hint}")


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the settings of a recipe file, without validating them. Raises UsageError."""
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise UsageError(f"recipe {path}: has {size:,} bytes, too large for a recipe; is it another file?")
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UsageError:
        raise
    except Exception as error:  # on invalid YAML, the reader raises almost anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"recipe {path}: cannot be read: {reason}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(f"recipe {path}: a recipe is `setting: value` lines, got {type(settings).__name__}.")
    return settings


_LARGEST = 10_000_000  # bytes: a run's config.yaml is read here too, and can have a weight for each of many classes
_MOST = 1000  # names and values: they take the time


class _Loader(yaml.SafeLoader):
    """Safe YAML where a duplicate key is an error and `batch-size` means `batch_size`."""

    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Read a node. Raises yaml.YAMLError for more than a recipe can have."""
        self.nodes += 1
        if self.nodes > _MOST:
            raise yaml.YAMLError(f"more than {_MOST // 2} settings, too many for a recipe; is it another file?")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Read a mapping. Raises yaml.YAMLError for a duplicate key."""
        settings: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):  # nested aliases would make an endless message
                raise yaml.YAMLError(f"line {line}: the name of a setting must be a word, not a list or mapping")
            key = self.construct_object(key_node, deep=True)
            key = key.replace("-", "_") if isinstance(key, str) else str(key)
            if key in settings:
                raise yaml.YAMLError(f"line {line}: {key} is already set; remove one of the two")
            settings[key] = self.construct_object(value_node, deep=True)
        return settings


def load_config(recipe: str | None, flags: dict[str, Any]) -> TrainConfig:
    """Merge defaults < recipe < flags into a TrainConfig. Raises UsageError."""
    path = None if recipe is None else find_recipe(recipe, textbook=False)
    return merge(TrainConfig.parse, path, flags)


def merge(parse: Callable[[dict[str, Any], str], Config], path: Path | None, flags: dict[str, Any]) -> Config:
    """Parse a recipe's settings, overridden by flags. Raises UsageError."""
    if path is None:
        return parse(flags, "flags")
    settings = read_recipe(path)
    if not flags:
        return parse(settings, f"recipe {path.name}")
    parse(settings, f"recipe {path.name}")  # blame the recipe for its own errors
    return parse(settings | flags, "flags")


def copy_recipe(name: str, target: Path) -> Path:
    """Copy a recipe to a file or into a folder, for editing. Raises UsageError if the file exists."""
    source = find_recipe(name)
    destination = target / source.name if target.is_dir() else target
    if destination.exists():
        raise UsageError(f"{destination} already exists; choose another name.")
    if not destination.parent.is_dir():
        raise UsageError(f"{destination}: the folder {destination.parent} does not exist; create it first.")
    destination.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return destination


def _summary(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()
