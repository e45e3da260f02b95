"""A hook of mkdocs: the page of all settings, from their single definition in vitft/config/train.py."""

from itertools import groupby
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from vitft.config.train import TrainConfig
from vitft.errors import as_flag

PAGE = "settings.md"
_KINDS = {int: "integer", float: "number", str: "text", bool: "on, off"}


def on_files(files: Any, *, config: Any) -> Any:
    """Add the page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """All settings of `vitft train`, in Markdown: a table for each panel of its help."""
    fields = TrainConfig.model_fields
    extra: dict[str, Any] = {name: field.json_schema_extra for name, field in fields.items()}
    parts = [
        "# Settings\n\nThe flags of `vitft train`. In a recipe, and in `TrainConfig` of Python, they have underscores: "
        "`--batch-size 32` is `batch_size: 32`. Those with ↻ may change when a run is resumed. What is on or off is "
        "switched on by its flag alone, such as `--skip-test`, and off by `--no-skip-test`."
    ]
    for panel, names in groupby(fields, key=lambda name: str(extra[name]["panel"])):
        rows = ["| setting | values | default | |", "|---|---|---|---|"]
        for name in names:
            field = fields[name]
            flag = f"`{as_flag(name)}`" + (" ↻" if extra[name]["changeable"] else "")
            default = f"`{field.default}`" if field.default not in (None, "") else ""
            default = "off" if field.default is False else default
            rows.append(f"| {flag} | {', '.join(_values(field.annotation))} | {default} | {_cell(field.description)} |")
        parts.append(f"## {panel}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _values(kind: Any) -> list[str]:
    """The kinds of values of a setting, or the words that it takes."""
    if kind is NoneType:
        return []
    if get_origin(kind) is Literal:
        return [f"`{word}`" for word in get_args(kind)]
    if get_origin(kind) is Annotated:
        return _values(get_args(kind)[0])
    if kind in _KINDS:
        return [_KINDS[kind]]
    return [word for one in get_args(kind) for word in _values(one)]


def _cell(text: str | None) -> str:
    """Text in a table of Markdown, in which nothing is HTML or emphasis."""
    for special in "\\|<*_[":
        text = (text or "").replace(special, f"\\{special}")
    return text or ""
