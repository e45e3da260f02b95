"""What a checkpoint knows of itself: `vitft.json` for programs, with sums of its files, and `README.md` for people."""

import hashlib
import html
import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from vitft import __version__
from vitft.config.train import TrainConfig
from vitft.errors import ModelError, UsageError
from vitft.io.atomic import json_text, write_json, write_text
from vitft.io.console import safe

# What reading a JSON document of other contents than one's own can raise.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


_PLACES = ("dataset", "model", "exclude", "labels")
"""The settings that may be paths of this machine: a checkpoint, which may be shared, has their names alone."""


@dataclass(frozen=True)
class Card:
    """What a checkpoint knows of itself; stored as `vitft.json`."""

    config: TrainConfig
    labels: tuple[str, ...]
    step: int
    epoch: float
    splits: dict[str, dict[str, Any]]  # of each split its source, count and hash
    scores: dict[str, Any]  # the scores of this step, by split

    def to_json(self) -> dict[str, Any]:
        """As stored: without settings that were not given, and of paths only the names, `local` saying which."""
        settings = self.config.model_dump(exclude_none=True)
        local = [name for name in _PLACES if _is_path(settings.get(name))]
        settings |= {name: _name(settings[name]) for name in local}
        return {"vitft": __version__} | asdict(self) | {"config": settings, "local": local}


def write_card(folder: Path, card: Card) -> None:
    """Write both into a folder whose other files are there."""
    document = card.to_json()
    sums = {file.name: sha256(file) for file in sorted(folder.iterdir())}
    write_json(folder / "vitft.json", document | {"sha256": sums | {"vitft.json": sha256_of(json_text(document))}})
    write_text(folder / "README.md", _readme(card))


def read_card(folder: Path) -> Card | None:
    """What a checkpoint knows of itself; None if vitft did not write it. Raises ModelError.

    Where its data lies, the run that it stands in knows; elsewhere `config.dataset` is None if that was a path.
    """
    file = folder / "vitft.json"
    if not file.is_file():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        document.pop("vitft")
        document.pop("sha256", None)  # see `prove`
        settings = document.pop("config")
        for name in document.pop("local", ()):
            settings[name] = _place(folder, name, settings[name])
        config = TrainConfig.parse(settings, str(file))
        return Card(config=config, **document | {"labels": tuple(document["labels"])})
    except (*UNREADABLE, UsageError) as error:
        raise ModelError(f"{file}: not readable ({error}); was it edited?") from error


def _is_path(value: str | None) -> bool:
    """Whether a setting is a local path, as `paths.absolute` writes them, and no name of the hub or of vitft."""
    return value is not None and (value.startswith("~") or Path(value).is_absolute())


def _name(value: str) -> str:
    return Path(value).name if _is_path(value) else value


def _place(folder: Path, name: str, known: str) -> str | None:
    """The path of which a checkpoint has the name, by the settings of the run that it stands in."""
    for run in folder.absolute().parents[:2]:
        with suppress(*UNREADABLE, yaml.YAMLError):
            found = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))[name]
            if Path(found).name == known:
                return str(found)
    return None if name == "dataset" else known


def prove(folder: Path) -> Path:
    """The folder, if every file is what vitft wrote, by its SHA-256. Raises ModelError; other folders have no sums."""
    card = folder / "vitft.json"
    if not card.is_file():
        return folder  # not vitft's; what is wrong with it, its reader says
    try:
        text = card.read_text(encoding="utf-8")
        document = json.loads(text)
        whole = text == json_text(document)  # more digits than a number has would read as the same
        sums = dict(document.pop("sha256"))
        whole = sums.pop(card.name) == sha256_of(json_text(document)) and whole
    except UNREADABLE as error:
        raise ModelError(f"{card}: not readable ({error}); take another checkpoint.") from error
    if not whole:
        raise ModelError(f"{card}: is not what was written, its SHA-256 differs; take another checkpoint.")
    for name, wanted in sums.items():
        file = folder / Path(name).name
        if not file.is_file():
            raise ModelError(f"{file}: is missing; take another checkpoint.")
        if sha256(file) != wanted:
            raise ModelError(
                f"{file}: is not what was written, its SHA-256 differs; take another checkpoint, or, if you "
                "changed it yourself, remove its line from vitft.json."
            )
    return folder


def sha256(file: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(text: str) -> str:
    """A text's SHA-256, in hexadecimal."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _plain(name: str) -> str:
    """A name in Markdown: it can neither begin a line nor be HTML, a link or emphasis."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(safe(name).replace("\n", " "), quote=False))


def _readme(card: Card) -> str:
    scores = "\n".join(
        f"- {split}: accuracy {100 * score['accuracy']:.2f} % on {score['count']} images (split {score['split_hash']})"
        for split, score in card.scores.items()
    )
    config = card.config
    start = f"{_name(config.model)}, new weights" if config.from_scratch else _name(config.model)
    header = yaml.safe_dump({"library_name": "transformers", "pipeline_tag": "image-classification"})
    return f"""---
{header}---

# An image classifier

Classes: {", ".join(map(_plain, card.labels[:50]))}{", ..." if len(card.labels) > 50 else ""}

Started from {_plain(start)}; trained on {_plain(_name(str(config.dataset)))} for {card.step} steps
({card.epoch:.2f} epochs) with vitft {__version__}.

{scores or "Not scored at this step."}

```python
from transformers import pipeline

classify = pipeline("image-classification", model="path/to/this/folder")
```
"""
