"""Recipes: find, list, show, copy, load; merge defaults < recipe < flags.

A recipe is a YAML file of settings with a comment header: command, hardware, time, measured score. Those
in `scratch/` are the textbook's, and have its settings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vitft.config.train import TrainConfig
from vitft.errors import UsageError, nearest
from vitft.io.paths import expanded

Config = TypeVar("Config")
TEXTBOOK = "scratch/"
SCALAR = "scalar"
"""The textbook's first network: it has a task of its own, and needs no file of settings."""


@dataclass(frozen=True)
class Recipe:
    """A recipe that comes with vitft: its name, file and the first line of its header."""

    name: str
    path: Path
    summary: str

    @property
    def textbook(self) -> bool:
        """Whether it is for `vitft scratch train`."""
        return self.name.startswith(TEXTBOOK)

    @property
    def command(self) -> str:
        """What runs it."""
        return f"{runner(self.textbook)} {self.name.removeprefix(TEXTBOOK)}"


def runner(textbook: bool) -> str:
    """The command that a recipe's name or file is given to."""
    return "vitft scratch train" if textbook else "vitft train --recipe"


def recipes() -> list[Recipe]:
    """The recipes that come with vitft, by name."""
    installed = Path(str(files("vitft"))) / "recipes"
    folder = installed if installed.is_dir() else installed.parent.parent / "recipes"  # an editable install
    found = [(path.relative_to(folder).with_suffix("").as_posix(), path) for path in folder.rglob("*.yaml")]
    return [Recipe(name, path, _summary(path)) for name, path in sorted(found)]


def find_recipe(name_or_file: str, *, textbook: bool | None = None) -> Path:
    """The file of a recipe, given its path or its name, which may leave `scratch/` out.

    Raises UsageError: for no recipe, naming the nearest; and for one that is not of the wanted kind, where
    `textbook` says which.
    """
    path = expanded(name_or_file)
    if path.is_file():
        return path
    known = {recipe.name: recipe for recipe in recipes()}
    found = known.get(name_or_file) or known.get(TEXTBOOK + name_or_file)
    if found is not None:
        if textbook is not None and textbook != found.textbook:
            kind = "is the textbook's" if found.textbook else "fine-tunes"
            raise UsageError(f"recipe {name_or_file} {kind}; run it with: {found.command}")
        return found.path
    names = [name.removeprefix(TEXTBOOK) for name, one in known.items() if one.textbook] if textbook else list(known)
    hint = nearest(name_or_file, [*names, SCALAR] if textbook else names) or "; `vitft recipes ls` lists them"
    raise UsageError(f"recipe {name_or_file}: neither a file nor a known recipe{hint}")


def is_textbook(path: Path) -> bool:
    """Whether a recipe's file is one of the textbook's that come with vitft."""
    return any(recipe.path == path and recipe.textbook for recipe in recipes())


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a recipe's file, unchecked. Raises UsageError."""
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise UsageError(f"recipe {path}: has {size:,} bytes; a recipe is a page of settings, is it another file?")
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UsageError:
        raise
    except Exception as error:  # what is no YAML makes the reader raise almost anything
        first = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"recipe {path}: cannot be read: {first}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(f"recipe {path}: a recipe is `setting: value` lines, got {type(settings).__name__}.")
    return settings


_LARGEST = 100_000  # bytes


class _Loader(yaml.SafeLoader):
    """YAML as ever, but a setting that is given twice is an error; `batch-size` is `batch_size`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Read a mapping. Raises yaml.YAMLError for a key that comes twice."""
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):  # of lists of lists by name, the text has no end
                raise yaml.YAMLError(
                    f"a setting's name is a word, not a list or mapping, in line {key_node.start_mark.line + 1}"
                )
            key = self.construct_object(key_node, deep=True)
            key = key.replace("-", "_") if isinstance(key, str) else str(key)
            if key in found:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(f"{key} is given twice, the second time in line {line}; leave one")
            found[key] = self.construct_object(value_node, deep=True)
        return found


def load_config(recipe: str | None, flags: dict[str, Any]) -> TrainConfig:
    """Defaults < recipe < flags. Raises UsageError."""
    path = None if recipe is None else find_recipe(recipe, textbook=False)
    return merged(TrainConfig.parse, path, flags)


def merged(parse: Callable[[dict[str, Any], str], Config], path: Path | None, flags: dict[str, Any]) -> Config:
    """What `parse` makes of a recipe's settings and the flags that win over them. Raises UsageError."""
    if path is None:
        return parse(flags, "flags")
    settings = read_recipe(path)
    if not flags:
        return parse(settings, f"recipe {path.name}")
    parse(settings, f"recipe {path.name}")  # its own mistakes are named as its own
    return parse(settings | flags, "flags")


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
