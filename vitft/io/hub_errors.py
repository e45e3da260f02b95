"""Why something could not be had from the hub, in words for a person."""

import re
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

from vitft.io.paths import shown


def ask(repo: str, file: str, revision: str | None = None, kind: str = "model") -> None:
    """Ask the hub for a file's metadata once; where there is no network, downloads first retry for 20 s.

    Raises what huggingface_hub raises; OfflineModeIsEnabled in offline mode.
    """
    hub.get_hf_file_metadata(hub.hf_hub_url(repo, file, revision=revision, repo_type=kind))


def answers(repo: str, revision: str | None = None, kind: str = "model") -> bool:
    """Whether the hub can be asked about a model or `dataset` now; otherwise the cache is all there is."""
    try:
        ask(repo, "config.json" if kind == "model" else "README.md", revision, kind)
    except HFValidationError:
        return True  # a name that no hub has; whoever loads it says so
    except HfHubHTTPError as error:
        return error.response.status_code < 500  # no such model, no access: that is an answer
    except Exception:  # refused, timed out, no such host, offline mode: each client has its own errors
        return False
    return True


def reason(error: BaseException, cache: Path | None = None) -> str:
    """A clause for an error message: what the hub said, or that it could not be reached.

    `cache` is where a copy was looked for: huggingface_hub's own by default.
    """
    held = shown(cache or Path(constants.HF_HUB_CACHE))
    causes = _chain(error)
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return "the hub wants you to ask for access first (then `hf auth login`)"
        if isinstance(cause, RepositoryNotFoundError):
            return f"the hub at {without_secrets(constants.ENDPOINT)} has none that you may read"
        if isinstance(cause, RevisionNotFoundError):
            return "the hub has it, but not at that revision"
    if constants.HF_HUB_OFFLINE:
        return f"offline mode is set and the cache {held} does not have it"
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    if kinds & _UNREACHABLE or "couldn't connect" in str(error):
        hub_at = without_secrets(constants.ENDPOINT)
        return f"the hub at {hub_at} could not be reached and the cache {held} does not have it"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # What ValueErrors explain (an unknown configuration, say) takes a second line.
    said = " ".join(lines[:2] if isinstance(error, ValueError) else lines[:1]).rstrip(".")[:300]
    return without_secrets(f"the hub's copy cannot be used: {type(error).__name__}{': ' if said else ''}{said}")


def without_secrets(text: str) -> str:
    """A text without the tokens, passwords and signatures that addresses and messages may hold."""
    text = re.sub(r"//[^/@\s]+@", "//***@", text)
    text = re.sub(r"(https?://[^\s?]+)\?[^\s'\")]+", r"\1?***", text)
    return re.sub(r"\b(hf|api_org)_[A-Za-z0-9]{8,}", r"\1_***", text)


# By name: each client of the hub has errors of its own.
_UNREACHABLE = {
    "ConnectionError", "TransportError", "TimeoutError", "Timeout", "LocalEntryNotFoundError", "OfflineModeIsEnabled",
}  # fmt: skip


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return found
