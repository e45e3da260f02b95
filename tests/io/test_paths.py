"""Paths in settings and messages."""

import os
from pathlib import Path

import pytest

from vitft.errors import UsageError
from vitft.io.paths import absolute, cache_folder, expanded, shown


def test_only_the_home_folder_is_abbreviated_to_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert shown(Path("/home/ann/photos")) == "~/photos"
    assert shown(Path("/home/ann")) == "~"
    assert shown(Path("/home/anna/photos")) == "/home/anna/photos"


def test_existing_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "digits").mkdir()
    assert absolute("photos", ["digits"]) == str(tmp_path / "photos")
    assert absolute("digits", ["digits"]) == "digits"
    assert absolute("owner/name", ["digits"]) == "owner/name"


def test_a_name_can_start_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    (tmp_path / "~data").mkdir()
    (tmp_path / "~root").mkdir()  # exists here, so it does not mean the user root
    assert expanded("~/photos") == Path("/home/ann/photos")
    assert expanded("~") == Path("/home/ann")
    for name in ("~data", "~data/1.png", "~root/x", "~nobody-of-this-name/x", "photos/~", "a~b", ""):
        assert expanded(name) == Path(name)


def test_the_cache_needs_a_home_folder_only_if_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without one
    monkeypatch.setenv("VITFT_CACHE", str(tmp_path / "own"))
    assert cache_folder("photos") == tmp_path / "own" / "photos"
    monkeypatch.delenv("VITFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("photos") == tmp_path / "vitft" / "photos"
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(UsageError, match="no home folder to cache in; set VITFT_CACHE"):
        cache_folder("photos")
