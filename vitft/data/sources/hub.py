"""Data sets from the Hugging Face hub, and the commit that was really used."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.utils import logging as datasets_logging
from huggingface_hub import constants
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from vitft.errors import DataError
from vitft.io.hub_errors import answers, ask, reason, without_secrets
from vitft.io.paths import shown

_SHA = re.compile(r"[0-9a-f]{40}")


def read(repo: str, config: str | None, revision: str | None) -> tuple[dict[str, datasets.Dataset], str | None]:
    """Load a hub data set: its raw splits and the commit they came from (None if it cannot be known).

    Without a network, what an earlier run left in the cache is used, if it is the revision asked for.
    Raises DataError for all that can go wrong on the way.
    """
    if Path(repo).exists():  # datasets would read this folder, whatever it holds
        raise DataError(f"hub data set {repo} is hidden by the folder {repo} here; work in another folder.")
    try:
        with _quiet(), _cache_alone_unless(answers(repo, revision, "dataset")):
            # What datasets.load_dataset does, keeping the builder, which knows the commit.
            builder = datasets.load_dataset_builder(repo, config, revision=revision)
            used = _commit(builder)
            _check_revision(repo, revision, used, builder)
            builder.download_and_prepare()
            splits = builder.as_dataset()
    except DataError:
        raise
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow each have their own tree
        raise DataError(_failure(repo, config, revision, error)) from error
    return dict(splits), used


def _commit(builder: Any) -> str | None:
    """The commit of a builder: its hash, or in older caches what the file addresses say."""
    if _SHA.fullmatch(str(builder.hash)):
        return str(builder.hash)
    addresses = [builder.base_path or "", *(builder.info.download_checksums or {})]
    found = (re.search(r"@([0-9a-f]{40})(/|$)", str(address)) for address in addresses)
    return next((match[1] for match in found if match), None)


def _check_revision(repo: str, revision: str | None, used: str | None, builder: Any) -> None:
    """Refuse a cached copy of another revision: without a network, datasets takes the newest it finds."""
    from_cache = "packaged_modules.cache" in type(builder).__module__
    if revision is None or not from_cache:
        return
    name = constants.REPO_ID_SEPARATOR.join(["datasets", *repo.split("/")])
    ref = Path(constants.HF_HUB_CACHE, name, "refs", revision)
    wanted = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    if used is None or not used.startswith(wanted):
        raise DataError(
            f"hub data set {repo} at revision {revision} is not in the cache "
            f"({_cache()} has {used or 'another'}) and {_endpoint()} cannot be reached; "
            "go online once or leave the revision out."
        )


def _failure(repo: str, config: str | None, revision: str | None, error: Exception) -> str:
    what = repo + (f":{config}" if config else "") + (f" at revision {revision}" if revision else "")
    said: BaseException = error
    if isinstance(error, datasets.exceptions.DatasetGenerationError):
        said = error.__cause__ or error  # it says only that something went wrong
    elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
        try:  # datasets drops what the hub answered
            ask(repo, "README.md", revision, "dataset")
        except Exception as answer:
            said = answer
    why = reason(said, Path(datasets.config.HF_DATASETS_CACHE))
    return f"hub data set {what}: {why}; offline, use a local folder or --dataset digits."


def _endpoint() -> str:
    return without_secrets(str(datasets.config.HF_ENDPOINT))


def caches() -> tuple[Path, ...]:
    """The folders in which all lies that came from the hub."""
    return tuple(map(Path, (constants.HF_HOME, constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE)))


def _cache() -> str:
    return shown(Path(datasets.config.HF_DATASETS_CACHE))


@contextmanager
def _cache_alone_unless(reachable: bool) -> Iterator[None]:
    """Without a network, as if offline mode were set: else datasets retries for 20 s before its cache."""
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not reachable:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and log lines of datasets and huggingface_hub, and put them back."""
    verbosity = datasets_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = datasets.utils.are_progress_bars_disabled(), are_progress_bars_disabled()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    hub_logging.set_verbosity(datasets_logging.CRITICAL)
    datasets.disable_progress_bars()
    disable_progress_bars()
    try:
        yield
    finally:
        datasets_logging.set_verbosity(verbosity[0])
        hub_logging.set_verbosity(verbosity[1])
        if not bars[0]:
            datasets.enable_progress_bars()
        if not bars[1]:
            enable_progress_bars()
