"""Datasets from the Hugging Face Hub, and the resolved commit."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.utils import logging as datasets_logging
from huggingface_hub import constants
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from vitft.data.sources.schema import Splits
from vitft.errors import DataError
from vitft.io.console import without_secrets
from vitft.io.hub_errors import answers, ask, reason
from vitft.io.paths import shown

_SHA = re.compile(r"[0-9a-f]{40}")


def read(repo: str, config: str | None, revision: str | None) -> tuple[Splits, str | None]:
    """Load a dataset from the hub: its raw splits and their commit (None if unknown).

    Without a network, the cache is used if it holds the requested revision. Raises DataError.
    """
    if Path(repo).exists():  # datasets would read this folder instead
        raise DataError(f"hub dataset {repo} is hidden by the local folder {repo}; work in another folder.")
    try:
        with _quiet(), _offline_unless(answers(repo, revision, "dataset")):
            # Like datasets.load_dataset, but keeping the builder, which knows the commit.
            builder = datasets.load_dataset_builder(repo, config, revision=revision)
            commit = _commit(builder)
            _check_revision(repo, revision, commit, builder)
            builder.download_and_prepare()
            splits = builder.as_dataset()
    except DataError:
        raise
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow each raise their own
        raise DataError(failure(repo, config, revision, error)) from error
    return dict(splits), commit


def _commit(builder: Any) -> str | None:
    """The commit of a builder: its hash or, in older caches, the commit in its file URLs."""
    if _SHA.fullmatch(str(builder.hash)):
        return str(builder.hash)
    urls = [builder.base_path or "", *(builder.info.download_checksums or {})]
    matches = (re.search(r"@([0-9a-f]{40})(/|$)", str(url)) for url in urls)
    return next((match[1] for match in matches if match), None)


def _check_revision(repo: str, revision: str | None, commit: str | None, builder: Any) -> None:
    """Refuse a cached copy of another revision: without a network, datasets uses the newest one it has."""
    from_cache = "packaged_modules.cache" in type(builder).__module__
    if revision is None or not from_cache:
        return
    name = constants.REPO_ID_SEPARATOR.join(["datasets", *repo.split("/")])
    ref = Path(constants.HF_HUB_CACHE, name, "refs", revision)
    wanted = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    if commit is None or not commit.startswith(wanted):
        cache, endpoint = shown(Path(datasets.config.HF_DATASETS_CACHE)), str(datasets.config.HF_ENDPOINT)
        raise DataError(
            f"hub dataset {repo} at revision {revision} is not in the cache ({cache} has {commit or 'another'}) and "
            f"{without_secrets(endpoint)} cannot be reached; go online once or leave the revision out."
        )


def failure(repo: str, config: str | None, revision: str | None, error: Exception) -> str:
    """Why a dataset of the hub cannot be read, and what to do."""
    name = repo + (f":{config}" if config else "") + (f" at revision {revision}" if revision else "")
    cause: BaseException = error
    if isinstance(error, datasets.exceptions.DatasetGenerationError):
        cause = error.__cause__ or error  # its own message has no details
    elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
        try:  # datasets drops the hub's answer
            ask(repo, "README.md", revision, "dataset")
        except Exception as answer:
            cause = answer
    why = reason(cause, Path(datasets.config.HF_DATASETS_CACHE))
    return f"hub dataset {name}: {why}; offline, use a local folder or --dataset digits."


def caches() -> tuple[Path, ...]:
    """The folders that hold everything from the hub."""
    return tuple(map(Path, (constants.HF_HOME, constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)))


@contextmanager
def _offline_unless(reachable: bool) -> Iterator[None]:
    """Set offline mode without a network; otherwise datasets retries for 20 s before it uses its cache."""
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not reachable:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and logs of datasets and huggingface_hub, and restore them."""
    with ExitStack() as before:
        before.callback(datasets_logging.set_verbosity, datasets_logging.get_verbosity())
        before.callback(hub_logging.set_verbosity, hub_logging.get_verbosity())
        if not datasets.utils.are_progress_bars_disabled():
            before.callback(datasets.enable_progress_bars)
        if not are_progress_bars_disabled():
            before.callback(enable_progress_bars)
        datasets_logging.set_verbosity(datasets_logging.CRITICAL)
        hub_logging.set_verbosity(datasets_logging.CRITICAL)
        datasets.disable_progress_bars()
        disable_progress_bars()
        yield
