"""`vitft data info`: the description and the contact sheet."""

import io
import json

import numpy as np
from PIL import Image
from rich.console import Console

from vitft.cli.tables import data_report
from vitft.data.info import describe
from vitft.data.preview import CLASSES, _fit_text, preview
from vitft.data.sources.source import open_dataset


def photos(root, classes, sizes=((40, 30), (200, 100), (90, 300)), color="red"):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i, size in enumerate(sizes):
            Image.new("RGB", size, color).save(root / name / f"{i}.jpg")
    return root


def test_describe(tmp_path):
    photos(tmp_path / "train", ["cat", "dog"])
    photos(tmp_path / "val", ["dog"], sizes=[(5, 6)])
    Image.new("L", (1, 1)).save(tmp_path / "train" / "cat" / "tiny.png")
    (tmp_path / "train" / "cat" / "bad.png").write_bytes(b"bad")
    document = describe(open_dataset(str(tmp_path)))
    assert json.loads(json.dumps(document)) == document
    assert document["labels"] == ["cat", "dog"]
    train, val = document["splits"]
    assert train == {
        "name": "train",
        "count": 8,
        "classes": {"cat": 5, "dog": 3},
        "looked_at": 8,
        "unreadable": 1,
        "sizes": {"smallest": [1, 1], "largest": [90, 300], "median": [90, 100]},
        "formats": {"JPEG": 6, "PNG": 1},
    }
    assert (val["name"], val["classes"], val["sizes"]["median"]) == ("val", {"cat": 0, "dog": 1}, [5, 6])


def test_describe_reads_headers_up_to_its_limit(monkeypatch):
    monkeypatch.setattr("vitft.data.info.LOOK_AT", 50)
    train, _ = describe(open_dataset("digits"))["splits"]
    assert (train["count"], train["looked_at"], train["formats"]) == (1438, 50, {"PNG": 50})


def test_describe_without_a_readable_image(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "bad.png").write_bytes(b"")
    (split,) = describe(open_dataset(str(tmp_path)))["splits"]
    assert (split["unreadable"], split["sizes"], split["formats"]) == (1, None, {})


def test_decisions_and_warnings_are_reported(tmp_path):
    for name in ("1.png", "2.png"):
        Image.new("L", (1, 1)).save(tmp_path / name)
    (tmp_path / "t.jsonl").write_text(
        '{"path": "1.png", "label": "cat"}\n{"path": "2.png", "label": null, "split": "test"}\n'
    )
    document = describe(open_dataset(str(tmp_path / "t.jsonl")))
    assert "split test is left out: none of its 1 images has a label" in document["decisions"]
    assert document["warnings"] == []
    console = Console(width=80, file=io.StringIO())
    console.print(data_report(document | {"warnings": ["a \x1b[31mred\x1b[0m name"]}))
    shown = console.file.getvalue()
    assert "split test is left out" in shown
    assert "warning: a \\x1b[31mred" in shown


def test_preview_shows_every_class_in_a_row(tmp_path):
    root = photos(tmp_path / "pets", ["cat"], color="red")
    photos(root, ["dog with a name that is far too long to stand beside a row of pictures"], color="blue")
    (root / "cat" / "bad.jpg").write_bytes(b"bad")
    preview(open_dataset(str(root)), tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    red = (sheet[..., 0] > 200) & (sheet[..., 1:].max(-1) < 60)
    blue = (sheet[..., 2] > 200) & (sheet[..., :2].max(-1) < 60)
    assert red.sum() > 3000
    assert blue.sum() > 3000
    assert np.nonzero(red.any(1))[0].max() < np.nonzero(blue.any(1))[0].min()  # rows in class order
    assert sheet.shape[1] < 1000


def test_a_shortened_name_keeps_as_many_letters_as_fit():
    text, font = _fit_text("abcdefghij" * 20, "", 15, 240)
    cut = text.removesuffix("…")
    assert cut + ("abcdefghij" * 20)[len(cut) :] == "abcdefghij" * 20
    assert text != cut
    assert font.getlength(text) <= 240 < font.getlength(f"{('abcdefghij' * 20)[: len(cut) + 1]}…")
    assert _fit_text("cat", "", 15, 240)[0] == "cat"


def test_the_cell_of_an_unreadable_image_is_crossed_out(tmp_path):
    root = photos(tmp_path / "pets", ["cat"], color="red", sizes=[(96, 96)])
    preview(open_dataset(str(root)), tmp_path / "red.png")
    red = np.asarray(Image.open(tmp_path / "red.png").convert("RGB")).astype(int)
    top, left = (places.min() for places in np.nonzero(red[..., 0] - red[..., 1] > 200))
    for file in (root / "cat").iterdir():
        file.write_bytes(b"bad")
    preview(open_dataset(str(root)), tmp_path / "bad.png")
    bad = np.asarray(Image.open(tmp_path / "bad.png").convert("L")).astype(int)
    cell = bad[top : top + 96, left : left + 96]
    assert (bad[top : top + 96, left + 96 :] == 255).all()
    for corner in (cell, cell[:, ::-1], cell[::-1], cell[::-1, ::-1]):
        assert (corner[36:44, 36:44].diagonal() < cell[0, 0]).all()


def test_preview_depends_on_the_seed(tmp_path):
    source = open_dataset("digits")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        preview(source, tmp_path / f"{name}.png", seed)
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_preview_of_many_classes_stops_at_its_limit(tmp_path):
    few = photos(tmp_path / "few", [f"{i:02}" for i in range(CLASSES)], sizes=[(1, 1)])
    many = photos(tmp_path / "many", [f"{i:02}" for i in range(CLASSES + 15)], sizes=[(1, 1)])
    heights = []
    for root in (few, many):
        preview(open_dataset(str(root)), tmp_path / "sheet.png")
        heights.append(Image.open(tmp_path / "sheet.png").height)
    assert heights[0] == heights[1]


def test_preview_without_a_train_split(tmp_path):
    photos(tmp_path / "test", ["cat"])
    preview(open_dataset(str(tmp_path)), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").is_file()


def test_preview_numbers_a_class_whose_name_no_font_can_draw(tmp_path, fonts_here):
    pictures = []
    for folder, names in (("a", ["ant", "猫"]), ("b", ["ant", "class 1"])):
        root = photos(tmp_path / folder / "pets", names, sizes=[(30, 20)])
        preview(open_dataset(str(root)), tmp_path / f"{folder}.png")
        pictures.append((tmp_path / f"{folder}.png").read_bytes())
    assert pictures[0] == pictures[1]
    fonts_here("猫…")
    preview(open_dataset(str(tmp_path / "a" / "pets")), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() != pictures[0]
