"""Explain in one clause why something could not be loaded from the hub."""

from pathlib import Path

import huggingface_hub as hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vitft.io.console import without_secrets
from vitft.io.paths import shown


def ask(repo: str, file: str, revision: str | None = None, kind: str = "model") -> None:
    """Request a file's metadata from the hub once, because downloads without network retry for 20 s first.

    Raises huggingface_hub's errors; OfflineModeIsEnabled in offline mode.
    """
    hub.get_hf_file_metadata(hub.hf_hub_url(repo, file, revision=revision, repo_type=kind))


def answers(repo: str, revision: str | None = None, kind: str = "model") -> bool:
    """Whether the hub is reachable for a repository of `kind` model or dataset; otherwise only the cache is used."""
    try:
        ask(repo, "config.json" if kind == "model" else "README.md", revision, kind)
    except HFValidationError:
        return True  # an invalid name; loading it reports that
    except HfHubHTTPError as error:
        return error.response.status_code < 500  # not found and no access are answers
    except Exception:  # connection refused, timeout, DNS, offline mode: each client has its own errors
        return False
    return True


def reason(error: BaseException, cache: Path | None = None) -> str:
    """A clause for an error message: the hub's answer, or that it could not be reached.

    `cache` is the cache folder that was searched; default: huggingface_hub's.
    """
    cache_path = shown(cache or Path(constants.HF_HUB_CACHE))
    causes = _chain(error)
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return "the hub wants you to ask for access first (then `hf auth login`)"
        if isinstance(cause, RepositoryNotFoundError):
            return f"the hub at {without_secrets(constants.ENDPOINT)} has none that you may read"
        if isinstance(cause, RevisionNotFoundError):
            return "the hub has it, but not at that revision"
    if constants.HF_HUB_OFFLINE:
        return f"offline mode is set and the cache {cache_path} does not have it"
    if unreachable(error):
        hub_at = without_secrets(constants.ENDPOINT)
        return f"the hub at {hub_at} could not be reached and the cache {cache_path} does not have it"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # ValueErrors, such as for an unknown configuration, need two lines.
    message = " ".join(lines[:2] if isinstance(error, ValueError) else lines[:1]).rstrip(".")[:300]
    return without_secrets(f"the hub's copy cannot be used: {type(error).__name__}{': ' if message else ''}{message}")


def unreachable(error: BaseException) -> bool:
    """Whether an error means that the hub did not answer."""
    kinds = {kind.__name__ for cause in _chain(error) for kind in type(cause).__mro__}
    return bool(kinds & _UNREACHABLE) or "couldn't connect" in str(error)


# By name, because each HTTP client has its own errors.
_UNREACHABLE = {
    "ConnectionError", "TransportError", "TimeoutError", "Timeout", "LocalEntryNotFoundError", "OfflineModeIsEnabled",
}  # fmt: skip


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its causes."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return chain
