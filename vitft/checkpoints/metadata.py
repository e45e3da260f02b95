"""The metadata of a checkpoint: `vitft.json`, with the checksums of its files."""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from vitft import __version__
from vitft.config.train import PATHS, TrainConfig, of_any_version
from vitft.errors import ModelError, UsageError
from vitft.io.atomic import json_text, write_json, write_text
from vitft.io.paths import is_url

# What reading a JSON document with unexpected contents can raise.
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Card:
    """The metadata of a checkpoint; stored as `vitft.json`."""

    config: TrainConfig
    labels: tuple[str, ...]
    step: int
    epoch: float
    splits: dict[str, dict[str, Any]]  # source, count and hash of each split
    scores: dict[str, Any]  # scores at this step, by split
    parts: tuple[dict[str, Any], ...] = ()  # of a soup: the runs whose weights were averaged
    temperature: float | None = None  # by which logits are divided for calibrated probabilities

    def to_json(self) -> dict[str, Any]:
        """The document to store. It omits unset settings and reduces the paths listed in `local` to their names."""
        settings = self.config.model_dump(exclude_none=True)
        # Names in place of paths, because a checkpoint can be shared.
        local = [name for name in PATHS if _is_path(settings.get(name))]
        settings |= {name: name_of(settings[name]) for name in local}
        document = {"vitft": __version__} | asdict(self) | {"config": settings, "local": local}
        return {name: value for name, value in document.items() if value or name not in ("parts", "temperature")}


def write_card(
    folder: Path, card: Card, repo: str | None = None, license: str | None = None, *, text: str | None = None
) -> None:  # fmt: skip
    """Write `vitft.json` and `README.md` into a folder that already has all other files.

    The latter is `text`, or a model card, with `repo`, the hub id that it gets, and the `license`.
    """
    from vitft.checkpoints.model_card import readme

    document = card.to_json()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    checksums = {file.relative_to(folder).as_posix(): sha256(file) for file in files}
    write_json(folder / "vitft.json", document | {"sha256": checksums | {"vitft.json": sha256_of(json_text(document))}})
    write_text(folder / "README.md", readme(card, repo, license) if text is None else text)


def read_card(folder: Path) -> Card | None:
    """Read the metadata of a checkpoint; None if vitft did not write it. Raises ModelError.

    Local paths are looked up in the run that contains the checkpoint. Outside of a run, a local `config.dataset` is
    None, and so is `config.image_folder`.
    """
    file = folder / "vitft.json"
    if not file.is_file():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        document.pop("vitft")
        document.pop("sha256", None)  # see `verify`
        settings = document.pop("config")
        settings |= _full_paths(folder, {name: settings[name] for name in document.pop("local", ())})
        config = TrainConfig.parse(of_any_version(settings), str(file))
        document |= {"labels": tuple(document["labels"]), "parts": tuple(document.get("parts", ()))}
        return Card(config=config, **document)
    except (*READ_ERRORS, UsageError) as error:
        raise ModelError(f"{file}: cannot be read ({error}); was it edited?") from error


def _is_path(value: str | None) -> bool:
    """Whether a setting is a local path (as `paths.absolute` writes it) or a URL, not a name on the hub or here."""
    if value is None or value.startswith("hf://"):
        return False
    return value.startswith("~") or Path(value).is_absolute() or is_url(value)


def name_of(value: str) -> str:
    """The last component of a local path or a URL; anything else unchanged."""
    if not _is_path(value):
        return value
    return Path(value.split("?")[0].rpartition("@")[2] if is_url(value) else value).name


def _full_paths(folder: Path, basenames: dict[str, str]) -> dict[str, str | None]:
    """The full paths of settings whose basenames are stored, from the config.yaml of the containing run.

    Where there is none, a basename could be taken for a hub id, or for a folder here: what the images are read from is
    None then.
    """
    unknown = dict.fromkeys(("dataset", "image_folder"))
    found: dict[str, str | None] = {name: unknown.get(name, basename) for name, basename in basenames.items()}
    for run in folder.absolute().parents[:2] if basenames else ():
        with suppress(*READ_ERRORS, yaml.YAMLError):
            settings = dict(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
            kept = {name: str(settings[name]) for name in basenames if name in settings}
            return found | {name: path for name, path in kept.items() if name_of(path) == basenames[name]}
    return found


def verify(folder: Path) -> Path:
    """Check every file against its SHA-256 in `vitft.json` and return the folder. Raises ModelError on a mismatch.

    Folders that vitft did not write have no checksums and pass.
    """
    card = folder / "vitft.json"
    if not card.is_file():
        return folder
    try:
        text = card.read_text(encoding="utf-8")
        document = json.loads(text)
        intact = text == json_text(document)  # catches changes that parse to the same values, such as extra digits
        checksums = dict(document.pop("sha256"))
        intact = checksums.pop(card.name) == sha256_of(json_text(document)) and intact
    except READ_ERRORS as error:
        raise ModelError(f"{card}: cannot be read ({error}); use another checkpoint.") from error
    if not intact:
        raise ModelError(f"{card}: does not match its SHA-256 checksum; use another checkpoint.")
    for name, checksum in checksums.items():
        file = folder.joinpath(*(part for part in PurePosixPath(name).parts if part not in ("..", "/")))
        if not file.is_file():
            raise ModelError(f"{file}: is missing; use another checkpoint.")
        if sha256(file) != checksum:
            raise ModelError(
                f"{file}: does not match its SHA-256 checksum; use another checkpoint or, if you changed the file "
                "yourself, remove its line from vitft.json."
            )
    return folder


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(text: str) -> str:
    """The SHA-256 of a string, in hexadecimal."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
