"""What tests of stores share: a cache of their own, and a record of what is decoded."""

from pathlib import Path
from typing import Any

import pytest

from vitft.data.decoder import decode


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache's entries."""
    monkeypatch.setenv("VITFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The decoded images, in order."""
    sources: list[Any] = []

    def spy(source: Any, *args: Any) -> Any:
        sources.append(source)
        return decode(source, *args)

    monkeypatch.setattr("vitft.data.stores.store.decode", spy)
    return sources
