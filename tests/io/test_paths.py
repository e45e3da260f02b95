"""Paths in settings and messages."""

from pathlib import Path

import pytest

from vitft.io.paths import absolute, expanded, shown


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
