"""Paths as they are written down."""

from pathlib import Path

import pytest

from vitft.io.paths import absolute, expanded, shown


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


def test_a_name_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    (tmp_path / "~data").mkdir()
    (tmp_path / "~root").mkdir()  # a user of that name is not meant where this is here
    assert expanded("~/photos") == Path("/home/ann/photos")
    assert expanded("~") == Path("/home/ann")
    for name in ("~data", "~data/1.png", "~root/x", "~nobody-of-this-name/x", "photos/~", "a~b", ""):
        assert expanded(name) == Path(name)
