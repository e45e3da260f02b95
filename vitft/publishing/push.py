"""Put a checkpoint on the Hugging Face hub, in one commit that deletes nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)

from vitft.errors import UsageError, first_line
from vitft.io import console
from vitft.io.console import without_secrets
from vitft.io.hub_errors import unreachable
from vitft.publishing.contents import published


@dataclass(frozen=True)
class Pushed:
    """What was put on the hub, or would be: the files with their sizes in bytes, and the text of the model card.

    `commit` and `url` are None for a dry run. `replaced` are those of the files that the repository had before.
    """

    repo: str
    files: dict[str, int]
    card: str
    url: str | None = None
    commit: str | None = None
    replaced: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self)


def push(
    checkpoint: str | Path, repo: str, *, private: bool = False, dry_run: bool = False, revision: str | None = None,
    message: str | None = None, license: str | None = None,
) -> Pushed:  # fmt: skip
    """Upload a checkpoint as a Transformers model to the Hugging Face hub, with a model card that has its scores.

    Files of the same name are replaced by a commit, others stay. What was not changed is not uploaded again.

    Args:
        checkpoint: a run (its best checkpoint is taken), or one of its checkpoints.
        repo: the hub id, owner/name; it is created if it does not exist.
        private: create it for its owner alone.
        dry_run: only say what would be uploaded; needs no network.
        revision: the branch; it is created if it does not exist. By default main.
        message: of the commit.
        license: for the model card, as the hub spells it, such as apache-2.0.

    Raises:
        UsageError: there is no token, no right to write there, no network, or a file has a secret.
        ModelError: there is no such checkpoint, or it is damaged.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo}: no hub id, which is owner/name ({first_line(error)}).") from error
    if repo.count("/") != 1:
        raise UsageError(f"{repo}: no hub id; give owner/name, with your user name or an organization as the owner.")
    with published(checkpoint, repo, license) as files:
        sizes = {name: file.stat().st_size for name, file in files.items()}
        planned = Pushed(repo, sizes, files["README.md"].read_text(encoding="utf-8"))
        if dry_run:
            return planned
        if constants.HF_HUB_OFFLINE:
            raise UsageError("HF_HUB_OFFLINE is set; unset it to upload, or add --dry-run.")
        if get_token() is None:
            raise UsageError("you are not logged in at the hub; run `hf auth login`, or set HF_TOKEN.")
        try:
            return _upload(planned, files, private, revision, message or f"Upload {repo.split('/')[1]} with vitft")
        except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"{repo}: {_reason(error)}") from error
        except Exception as error:  # those of the HTTP client
            if not unreachable(error):
                raise
            raise UsageError(f"{repo}: {_reason(error)}") from error


def _upload(
    planned: Pushed, files: dict[str, Path], private: bool, revision: str | None, message: str
) -> Pushed:  # fmt: skip
    hub, repo = HfApi(), planned.repo
    try:
        info: Any = hub.model_info(repo)
    except RepositoryNotFoundError:
        info = None
        hub.create_repo(repo, private=private, exist_ok=True)
    if info is not None and private and not info.private:
        raise UsageError(f"{repo} exists, and is public; make it private first, or leave out --private.")
    if revision is not None:
        hub.create_branch(repo, branch=revision, exist_ok=True)
    there = set(hub.list_repo_files(repo, revision=revision)) & planned.files.keys() if info is not None else set()
    if there:
        console.note(f"{repo} exists: {', '.join(sorted(there))} get a new version, other files stay")
    operations = [CommitOperationAdd(name, file) for name, file in files.items()]
    with _without_bars():
        done = hub.create_commit(repo, operations, commit_message=message, revision=revision)
    url = f"{hub.endpoint}/{repo}{'' if revision is None else f'/tree/{revision}'}"
    return Pushed(repo, planned.files, planned.card, url, done.oid, tuple(sorted(there)))


@contextmanager
def _without_bars() -> Iterator[None]:
    """While entered, the hub's library shows no progress of its own."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _reason(error: Exception) -> str:
    """What the hub answered, or that it did not, with a remedy."""
    hub = without_secrets(constants.ENDPOINT)
    if unreachable(error):
        return f"the hub at {hub} could not be reached; try again, and what has arrived is not sent twice."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"the hub at {hub} does not know your token; run `hf auth login`, or set another HF_TOKEN."
    if status in (403, 404):
        return "you have no right to write there; is the owner you or your organization, and may the token write?"
    return f"the hub at {hub} refused it: {without_secrets(first_line(error))}."
