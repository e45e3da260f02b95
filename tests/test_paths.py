"""Paths as they are written down."""

from pathlib import Path

import pytest

from vitft.paths import absolute, shown


def test_the_home_folder_is_a_tilde_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert shown(Path("/home/ann/photos")) == "~/photos"
    assert shown(Path("/home/ann")) == "~"
    assert shown(Path("/home/anna/photos")) == "/home/anna/photos"


def test_what_exists_is_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "digits").mkdir()
    assert absolute("photos", ["digits"]) == str(tmp_path / "photos")
    assert absolute("digits", ["digits"]) == "digits"
    assert absolute("owner/name", ["digits"]) == "owner/name"
