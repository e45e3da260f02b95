"""`vitft data info`: the description and the contact sheet."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vitft.cli.tables import data_report
from vitft.data.augmentation.settings import Augmentation
from vitft.data.info import describe
from vitft.data.preview import CLASSES, _fit_text, preview
from vitft.data.sources.source import open_dataset
from vitft.data.validation.check import samples
from vitft.errors import DataError


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


def test_the_table_says_if_it_is_of_a_sample(tmp_path, monkeypatch):
    for number in range(40):
        content = io.BytesIO()
        Image.new("L", (8, 8), number).save(content, "PNG")
        file = tmp_path / "photos" / "ab"[number // 20] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.getvalue() if number % 20 < 10 else b"")
    source = open_dataset(str(tmp_path / "photos"))
    for limit, counts, of_a_sample in ((20, "(10 of 20 unreadable)", True), (40, "(20 of 40 unreadable)", False)):
        monkeypatch.setattr("vitft.data.info.LOOK_AT", limit)
        shown = io.StringIO()
        Console(file=shown, width=80).print(data_report(describe(source)))
        assert counts in shown.getvalue()
        assert ("train: sizes and formats are those of 20 of its images" in shown.getvalue()) == of_a_sample


def test_describe_images_over_the_usual_limit(tmp_path, monkeypatch):
    source = open_dataset(str(photos(tmp_path, ["cat", "dog"])))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # Pillow refuses twice as many
    assert describe(source, max_pixels=20_000)["splits"][0]["unreadable"] == 2
    described = describe(source, max_pixels=30_000)["splits"][0]
    assert (described["unreadable"], described["sizes"]["largest"]) == (0, [90, 300])


def test_describe_stops_at_a_part_that_cannot_be_fetched(tmp_path, digit_shards, monkeypatch):
    source = open_dataset(f"file://{digit_shards}")
    asked = []

    def silent(self, block, column):
        asked.append(block)
        raise OSError(110, "Connection timed out")

    monkeypatch.setattr("vitft.data.streaming.parquet.ParquetShard.fetch", silent)
    with pytest.raises(DataError, match=r"^train-0000.*: cannot be fetched: Connection timed out; it may be intact"):
        describe(source)
    assert len(asked) == 1
    with pytest.raises(DataError, match=r"^train-0000.*: cannot be fetched: Connection timed out; it may be intact"):
        list(samples(source.splits["train"]))


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


def sheet_of(source, file, **how):
    preview(source, file, augmentation=Augmentation(**how))
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def cells(sheet, rows, left, top=96, tall=102):
    """The pictures: by row, the image and 7 epochs."""
    return [
        [sheet[top + tall * r : top + tall * r + 96, left + 102 * c :][:, :96] for c in range(8)] for r in range(rows)
    ]


def test_preview_shows_what_the_model_sees(tmp_path):
    """A picture with a bright left half: mirrored in some epochs, and the other class blended in where it is mixed."""
    half = np.zeros((64, 96, 3), np.uint8)
    half[:, :48] = (250, 40, 40)
    for name, picture in (("cat", half), ("dog", np.full((64, 96, 3), (40, 40, 250), np.uint8))):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.fromarray(picture).save(tmp_path / "pets" / name / "0.png")
    source = open_dataset(str(tmp_path / "pets"))
    flipped = sheet_of(source, tmp_path / "flip.png", kind="flip")
    left = int(np.nonzero(((flipped[..., 0] > 200) & (flipped[..., 1] < 90)).any(0))[0].min())
    (original, *epochs), (_, *blue) = cells(flipped, 2, left)
    assert original[2, 48].tolist() == [0xF1, 0xF1, 0xF3]  # the image keeps its aspect ratio, the model's input fills
    red = [(cell[2:94, 4:44, 0].mean() > 200, cell[2:94, 52:92, 0].mean() > 200) for cell in epochs]
    assert set(red) == {(True, False), (False, True)}
    assert all(abs(cell - [40, 40, 250]).max() < 3 for cell in blue)
    mixed = sheet_of(source, tmp_path / "mixup.png", kind="none", mixup=1.0)
    (_, *epochs), (_, *blue) = cells(mixed, 2, left, tall=117)
    assert all(cell[48, 80, 2] > 3 for cell in epochs)  # the dark half is bluish
    assert len({int(cell[48, 80, 2]) for cell in epochs}) > 4
    ink = (mixed[96 + 96 : 96 + 111, left:] < 200).any(axis=(0, 2)).nonzero()[0]  # captions: what is mixed in
    assert len(ink) > 100
    assert ink.min() > 100  # but of the image as it is


def test_preview_with_augmentation_crosses_out_what_cannot_be_read(tmp_path):
    root = photos(tmp_path / "pets", ["cat", "dog"], sizes=[(60, 40)])
    (root / "dog" / "0.jpg").write_bytes(b"bad")
    sheet = sheet_of(open_dataset(str(root)), tmp_path / "sheet.png", kind="trivial")
    rows = (sheet[..., 0] - sheet[..., 1] > 100).any(1).nonzero()[0]
    assert rows.max() < 96 + 96  # the first class's row alone
    (root / "cat" / "0.jpg").write_bytes(b"bad")
    preview(open_dataset(str(root)), tmp_path / "none.png", augmentation=Augmentation("rand"))
