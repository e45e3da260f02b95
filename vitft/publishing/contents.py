"""What of a checkpoint is published: the files that others need, and nothing that is private."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import get_token

from vitft.checkpoints.checkpoint import find_model
from vitft.checkpoints.exported import exported_file
from vitft.checkpoints.metadata import read_card, write_card
from vitft.errors import ModelError, UsageError
from vitft.io.paths import expanded

_FILES = ("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json",
          "novelty.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors")  # fmt: skip
_TOKEN = re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
_SECRETIVE = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_LONGEST_TOKEN = 200
_SHORTEST_SECRET, _SHORTEST_PATH = 8, 6  # characters: "true" and "1" are no secrets, and weights have any few bytes
_BLOCK = 2**24


@contextmanager
def published(checkpoint: str | Path, repo: str, license: str | None = None) -> Iterator[dict[str, Path]]:
    """Yield the files to publish, by their names there; they are gone afterwards.

    The weights, configurations, an adapter if there is one, and `vitft.json` and the model card, written anew for
    the hub id `repo`. Raises ModelError if there is no checkpoint that vitft wrote, or if it is damaged, and
    UsageError if it is an exported file, or if a file has a secret.
    """
    folder = find_model(expanded(checkpoint))
    if exported_file(folder) is not None:
        raise UsageError(
            f"{checkpoint}: is exported, and a hub id is of a Transformers model; push the run it came from."
        )
    card = read_card(folder) if folder.is_dir() else None
    if card is None:
        raise ModelError(f"{checkpoint}: no run and no checkpoint of one; give what vitft train wrote.")
    with TemporaryDirectory(prefix="vitft-") as made:
        stage = Path(made)
        for file in sorted(file for pattern in _FILES for file in folder.glob(pattern)):
            target = stage / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(
                file, target
            )  # what was verified is what is uploaded, whatever happens to the run meanwhile
        write_card(stage, card, repo, license)
        files = {file.relative_to(stage).as_posix(): file for file in sorted(stage.rglob("*")) if file.is_file()}
        _check_private(files, folder)
        yield files


def _check_private(files: dict[str, Path], folder: Path) -> None:
    """Raise UsageError if a file has a token, a secret of the environment, or a path of this machine."""
    secrets = {f"the value of {name}": value for name, value in os.environ.items() if _SECRETIVE.search(name)}
    secrets["your hub token"] = get_token() or ""
    places = {"your home folder": expanded("~"), "the folder of the run": folder.absolute().parent}
    paths = {what: f"{place}{os.sep}" for what, place in places.items()}
    wanted = {what: text for what, text in secrets.items() if len(text) >= _SHORTEST_SECRET}
    wanted |= {what: text for what, text in paths.items() if len(text) >= _SHORTEST_PATH}
    texts = {what: os.fsencode(text) for what, text in wanted.items()}
    for name, file in files.items():
        for content in _blocks(file, max(_LONGEST_TOKEN, *map(len, texts.values()))):
            found = next((what for what, text in texts.items() if text in content), None)
            if found is None and _TOKEN.search(content):
                found = "a hub token"
            if found is not None:
                raise UsageError(f"{name} contains {found}, so nothing was uploaded; remove it from the checkpoint.")


def _blocks(file: Path, overlap: int) -> Iterator[bytes]:
    """The content of a file, in blocks that overlap by so many bytes."""
    with file.open("rb") as stream:
        rest = b""
        while block := stream.read(_BLOCK):
            yield rest + block
            rest = block[-overlap:]
