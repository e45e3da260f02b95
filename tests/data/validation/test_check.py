"""Data validation finds the planted problems and nothing else."""

import errno
import io
import json
import re
import shlex
import unicodedata
from base64 import b64decode
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from typer.testing import CliRunner

from vitft import TrainConfig, evaluate, train
from vitft.cli.app import app
from vitft.data import decoder
from vitft.data.sources.identity import sample_names
from vitft.data.sources.schema import image_structs, make_split
from vitft.data.sources.source import Source, excluding, open_dataset
from vitft.data.validation import check as check_room
from vitft.data.validation.check import KINDS, _Image, check, quarantine_lines
from vitft.data.validation.page import write_report
from vitft.errors import DataError, UsageError
from vitft.io.pages import shared_style

Rng = np.random.Generator


def photo(rng: Rng, width: int = 120, height: int = 90) -> Image.Image:
    """Noise of several scales: no two alike."""
    pixels = np.zeros((height, width, 3))
    for scale in (2, 5, 12, 40):
        coarse = rng.normal(size=(scale, scale, 3)).astype(np.float32)
        layers = [np.asarray(Image.fromarray(coarse[..., c]).resize((width, height), 3)) for c in range(3)]
        pixels += np.stack(layers, axis=2) / scale**0.5
    grain = rng.normal(0, 3, pixels.shape)
    return Image.fromarray((128 + 60 * pixels + grain).clip(0, 255).astype(np.uint8))


def tiny(rng: Rng) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))


def write(folder: Path, name: str, image: Image.Image, **how: Any) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **how)
    return file


def clean(folder: Path, rng: Rng, count: int = 12) -> Path:
    for split in ("train", "test"):
        for i in range(count):
            write(folder, f"{split}/{('cat', 'dog')[i % 2]}/{i:03}.png", tiny(rng))
    return folder


def found(folder: Path, **options: Any) -> list[tuple[str, str]]:
    findings = check(open_dataset(str(folder)), folder, **options)
    return [(one.kind, f"{one.split}: {one.path}" if one.split else one.path) for one in findings]


@pytest.fixture
def rng() -> Rng:
    return np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path: Path, rng: Rng) -> Path:
    return clean(tmp_path / "pets", rng)


def test_a_clean_dataset_has_no_findings(folder: Path) -> None:
    assert found(folder) == []


def test_digits_are_clean_of_faults() -> None:
    kinds = {one.severity for one in check(open_dataset("digits"))}
    assert "error" not in kinds


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("empty", b""),
        ("not-an-image", b"<html>not found</html>"),
        ("truncated", None),
        ("unreadable", b"flipped"),
    ],
)
def test_a_broken_file_is_named_with_its_kind(folder: Path, rng: Rng, kind: str, content: bytes | None) -> None:
    if content is None:
        written = io.BytesIO()
        photo(rng).save(written, "JPEG")
        content = written.getvalue()[: len(written.getvalue()) // 2]
    if content == b"flipped":
        written = io.BytesIO()
        photo(rng).save(written, "PNG")
        content = written.getvalue()[:200] + b"\xff" * 40 + written.getvalue()[240:]
    (folder / "train" / "cat" / "bad.jpg").write_bytes(content)
    ((named, where),) = found(folder)
    assert where == "train: train/cat/bad.jpg"
    assert KINDS[named][0] == "error"
    assert named == kind


def test_a_link_to_nowhere_and_a_bomb(folder: Path, rng: Rng) -> None:
    (folder / "train" / "dog" / "gone.png").symlink_to(folder / "nowhere.png")
    write(folder, "train/dog/large.png", Image.new("RGB", (40, 41)))
    kinds = dict(found(folder, max_pixels=40 * 40))
    assert kinds == {"unreadable": "train: train/dog/gone.png", "too-large": "train: train/dog/large.png"}


def test_an_image_that_needs_a_value_range_is_not_left_out(folder: Path) -> None:
    Image.fromarray(np.arange(6400, dtype=np.int32).reshape(80, 80)).save(folder / "train/dog/deep.tif")
    source = open_dataset(str(folder))
    findings = check(source)
    assert [(one.kind, one.severity, one.path) for one in findings] == [("value-range", "error", "train/dog/deep.tif")]
    assert quarantine_lines(findings) == []
    assert {one.kind for one in check(source, value_range=(0, 10))} == {"value-range"}
    assert {one.kind for one in check(source, value_range=(0, 6400))} == {"unusual-mode"}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_an_image_that_may_be_intact_stops_the_check(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    opens = decoder._open

    def broken(source: Any, max_pixels: int) -> Any:
        if str(source).endswith("train/cat/000.png"):
            raise error
        return opens(source, max_pixels)

    monkeypatch.setattr(decoder, "_open", broken)
    with pytest.raises(DataError, match=r"train/cat/000\.png: .*; it may be intact: try again once it can be read"):
        check(open_dataset(str(folder)))


def test_the_same_pixels_are_found_in_any_format(folder: Path, rng: Rng) -> None:
    image = Image.open(folder / "train" / "cat" / "000.png")
    write(folder, "train/cat/again.bmp", image)
    write(folder, "train/dog/other.png", image)
    write(folder, "test/cat/leak.png", image)
    kinds = Counter(kind for kind, _ in found(folder))
    assert kinds == {"duplicate": 2, "other-label": 1, "leak": 1}
    assert ("leak", "train: train/cat/000.png") in found(folder)
    assert ("duplicate", "train: train/cat/again.bmp") in found(folder)


def near(rng: Rng, image: Image.Image, how: int) -> Image.Image:
    """A near duplicate: recompressed, resized, brightened, cropped or with noise."""
    width, height = image.size
    if how == 0:
        written = io.BytesIO()
        image.save(written, "JPEG", quality=int(rng.integers(30, 90)))
        return Image.open(io.BytesIO(written.getvalue())).convert("RGB")
    if how == 1:
        scale = float(rng.uniform(0.75, 1.5))
        return image.resize((max(70, round(width * scale)), max(70, round(height * scale))))
    if how == 2:
        return ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.85, 1.15)))
    if how == 3:
        return image.crop((1, 1, width - 1, height - 1)).resize((width, height))
    noise = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray((np.asarray(image, np.float32) + noise).clip(0, 255).astype(np.uint8))


def test_near_duplicates_of_photos_are_found_and_few_others(tmp_path: Path, rng: Rng) -> None:
    planted = set()
    for i in range(200):
        image = photo(rng)
        write(tmp_path, f"train/{'ab'[i % 2]}/{i:03}.png", image)
        if i % 2 == 0:
            write(tmp_path, f"train/{'ab'[i % 2]}/{i:03}-again.png", near(rng, image, i // 2 % 5))
            planted.add(i)
    hits = {where.split("/")[-1] for kind, where in found(tmp_path) if kind == "near-duplicate"}
    right = {i for i in planted if hits & {f"{i:03}.png", f"{i:03}-again.png"}}
    false = {name for name in hits if int(name[:3]) not in planted}
    assert len(right) >= 0.95 * len(planted), f"{len(right)} of {len(planted)}"
    assert len(false) <= 0.05 * len(hits), false


def test_small_pictures_and_blank_ones_are_not_compared_by_looks(tmp_path: Path, rng: Rng) -> None:
    for i in range(6):
        blank = Image.new("RGB", (80, 80), (200 + i, 200, 200))
        write(tmp_path, f"train/{'ab'[i % 2]}/{i}.png", blank)
        pixels = np.full((10, 10, 3), 255, np.uint8)
        pixels[3:7, 4 : 5 + i % 3] = i
        write(tmp_path, f"train/{'ab'[i % 2]}/small{i}.png", Image.fromarray(pixels))
    assert found(tmp_path) == []


def test_a_near_leak_names_both(tmp_path: Path, rng: Rng) -> None:
    clean(tmp_path, rng)
    image = photo(rng)
    write(tmp_path, "train/cat/a.png", image)
    write(tmp_path, "test/cat/b.jpg", image, quality=60)
    (finding,) = check(open_dataset(str(tmp_path)), tmp_path)
    assert (finding.kind, finding.split, finding.path) == ("near-leak", "train", "train/cat/a.png")
    assert finding.detail.endswith("% alike: test/cat/b.jpg of test")


def frames(count: int, rng: Rng, near: float = 0.05) -> list[Any]:
    """Video frames as data validation sees them: hashes that differ by a few bits, nearly equal thumbnails."""
    base, first = int(rng.integers(2**63)), rng.normal(size=256)
    seen = []
    for i in range(count):
        path, split = f"{i}.jpg", ("train", "validation", "test")[3 * i // count]
        if i % 7 == 3:
            seen.append(replace(seen[-1], path=path, split=split))  # the same pixels again
            continue
        thumb = first + near * rng.normal(size=256)
        sign = base ^ (1 << int(rng.integers(64))) ^ (1 << int(rng.integers(64)))
        thumb = ((thumb - thumb.mean()) / np.linalg.norm(thumb - thumb.mean())).astype(np.float32)
        seen.append(_Image(split, path, 0, (), i.to_bytes(16, "big"), sign, thumb))
    return seen


def all_pairs(seen: list[Any]) -> set[tuple[str, str, str]]:
    """The expected findings for these frames, by comparing all pairs."""
    told = {}
    for row, one in enumerate(seen):
        for other in seen[:row]:
            near = (one.phash ^ other.phash).bit_count() <= check_room._MAX_HASH_DISTANCE and one.digest != other.digest
            if near and float(one.thumb @ other.thumb) >= check_room._MIN_CORRELATION:
                told.setdefault((one.path, other.split), other.path)
    return {(path, split, other) for (path, split), other in told.items()}


@pytest.mark.parametrize("near", [0.05, 0.175, 0.185])  # all alike, most, few
def test_of_photos_that_look_alike_each_has_the_first_of_each_split(
    rng: Rng, monkeypatch: pytest.MonkeyPatch, near: float
) -> None:
    monkeypatch.setattr(check_room, "_ROWS", 7)
    monkeypatch.setattr(check_room, "_COLUMNS", 5)
    monkeypatch.setattr(check_room, "_MAX_HASH_DISTANCE", 2)  # the frames' hashes differ by none, two or four
    seen = frames(90, rng, near)
    told = set()
    for one in check_room._near_duplicates(seen):
        other = one.detail.split(": ", 1)[1]
        if one.kind == "near-duplicate":
            told.add((one.path, one.split, other))
        else:
            told.add((other.split(" of ")[0], one.split, one.path))
    assert told == all_pairs(seen)
    assert len(told) > 10


def test_of_the_frames_of_a_film_not_every_pair_is_visited(rng: Rng) -> None:
    seen, visits = frames(2000, rng), Counter[str]()

    class Counted:
        def __init__(self, one: Any) -> None:
            self.one = one

        def __getattr__(self, name: str) -> Any:
            visits[name] += 1
            return getattr(self.one, name)

    found_here = list(check_room._near_duplicates([Counted(one) for one in seen]))
    assert len(found_here) > 2000
    assert max(visits.values()) < 10 * len(seen)  # of pairs there are two million


def test_the_report_says_when_not_all_photos_were_compared(rng: Rng, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_room, "MAX_PHOTOS", 20)
    kinds = Counter(one.kind for one in check_room._near_duplicates(frames(30, rng)))
    assert kinds["not-compared"] == 1
    assert kinds["near-duplicate"] > 0


def test_shapes_modes_and_turns_are_notes(folder: Path, rng: Rng) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write(folder, "train/cat/turned.jpg", tiny(rng), exif=exif)
    write(folder, "train/cat/palette.png", tiny(rng).convert("P"))
    write(folder, "train/cat/long.png", Image.fromarray(rng.integers(0, 256, (10, 50, 3), dtype=np.uint8)))
    written = io.BytesIO()
    tiny(rng).save(written, "PNG")
    (folder / "train" / "cat" / "named.jpg").write_bytes(written.getvalue())
    assert dict(found(folder)) == {
        "wrong-extension": "train: train/cat/named.jpg", "rotated": "train: train/cat/turned.jpg",
        "unusual-mode": "train: train/cat/palette.png", "extreme-shape": "train: train/cat/long.png",
    }  # fmt: skip
    assert {KINDS[kind][0] for kind, _ in found(folder)} == {"note"}


def test_files_beside_the_images_are_reported(folder: Path, rng: Rng) -> None:
    (folder / "train" / "cat" / "Thumbs.db").write_bytes(b"x")  # of the system, not of the dataset
    (folder / "train" / "cat" / "notes.txt").write_text("cats")
    write(folder, "train/cat/photo", tiny(rng), format="PNG")
    assert found(folder) == [
        ("wrong-extension", "train: train/cat/photo"),
        ("passed-over", "train/cat/notes.txt"),
    ]


def test_labels_are_looked_at(tmp_path: Path, rng: Rng) -> None:
    for i in range(33):
        write(tmp_path, f"train/{'Cat' if i else 'cat'}/{i:03}.png", tiny(rng))
    for i in range(2):
        write(tmp_path, f"train/dog/{i}.png", tiny(rng))
        write(tmp_path, f"test/{('Cat', 'dog')[i]}/{i}.png", tiny(rng))
    assert found(tmp_path) == [
        ("missing-class", "test: cat"),
        ("similar-labels", "cat"),
        ("imbalance", "train: train"),
    ]


@pytest.mark.parametrize(("largest", "found"), [(20, []), (21, ["imbalance"])])
def test_a_class_with_over_ten_times_as_many_images_is_reported(largest: int, found: list[str]) -> None:
    labels = [0] * largest + [1] * 2
    rows = make_split(image_structs(None, [f"{i}.png" for i in range(len(labels))]), labels, ["cat", "dog"])
    source = Source("pets", datasets.DatasetDict({"train": rows}), ("cat", "dog"), None)
    assert [one.kind for one in check_room.check_labels(source)] == found


def plant(folder: Path, rng: Rng, each: int) -> Counter[str]:
    """Plant `each` problems of every kind; return their counts."""
    for i in range(each):
        (folder / "train" / "cat" / f"empty{i}.png").write_bytes(b"")
        (folder / "train" / "cat" / f"text{i}.jpg").write_text(f"no image {i}")
        written = io.BytesIO()
        tiny(rng).resize((40, 40)).save(written, "PNG")
        raw = written.getvalue()
        (folder / "train" / "dog" / f"cut{i}.png").write_bytes(raw[: int(rng.integers(60, len(raw) - 40))])
        write(folder, f"train/dog/bomb{i}.png", Image.new("RGB", (101, 100 + i)))
        image = tiny(rng)
        for name in ("first", "second"):
            write(folder, f"train/cat/{name}{i}.png", image)
        image = tiny(rng)
        write(folder, f"train/dog/here{i}.png", image)
        write(folder, f"test/dog/there{i}.png", image)
    (folder / "train" / "rare").mkdir()
    write(folder, "train/rare/one.png", tiny(rng))
    return Counter({"empty": each, "not-an-image": each, "cut": each, "too-large": each, "duplicate": each,
                    "leak": each, "missing-class": 1})  # fmt: skip


@pytest.mark.parametrize("each", [8, pytest.param(83, marks=pytest.mark.slow)])  # 83 of six kinds: 499
def test_all_planted_faults_are_found_and_no_others(tmp_path: Path, rng: Rng, each: int) -> None:
    planted = plant(clean(tmp_path, rng, 10 * each), rng, each)
    kinds = Counter(kind for kind, _ in found(tmp_path, max_pixels=10_000))
    cut = kinds.pop("truncated", 0) + kinds.pop("unreadable", 0)
    assert cut == planted.pop("cut")
    kinds.pop("imbalance", None)  # the one image of the missing class
    assert kinds == planted


# -- the command, and what is left out ------------------------------------------------------------


@pytest.fixture
def faulty(folder: Path) -> Path:
    (folder / "train" / "cat" / "bad.png").write_bytes(b"no image")
    image = Image.open(folder / "train" / "cat" / "000.png")
    write(folder, "train/cat/again.png", image)
    write(folder, "test/cat/leak.png", Image.open(folder / "train" / "dog" / "001.png"))
    return folder


def vitft(*words: str) -> Any:
    return CliRunner().invoke(app, ["data", "check", *words])


def test_the_command_lists_findings_and_exits_with_3(faulty: Path) -> None:
    result = vitft(str(faulty))
    assert result.exit_code == 3
    for word in ("not-an-image", "train/cat/bad.png", "duplicate", "leak", "1 error, 3 warnings"):
        assert word in result.stdout, word
    assert "error: 1 of 27 images would stop training" in result.stderr


def test_json_is_a_document(faulty: Path) -> None:
    document = json.loads(vitft(str(faulty), "--json").stdout)
    assert document["counts"] == {"not-an-image": 1, "leak": 1, "other-label": 1, "duplicate": 1}
    assert set(document["findings"][0]) == {"split", "path", "kind", "severity", "detail"}


def test_a_clean_dataset_exits_with_0(folder: Path) -> None:
    result = vitft(str(folder), "--quarantine", str(folder.parent / "out.txt"))
    assert result.exit_code == 0
    assert "24 images: no problems found" in result.stdout
    assert "out.txt: empty, there is no image to leave out" in result.stderr


def test_the_files_of_a_parquet_folder_are_not_beside_it(tmp_path: Path, rng: Rng) -> None:
    rows = [{"bytes": write(tmp_path, f"{i}.png", tiny(rng)).read_bytes(), "path": None} for i in range(8)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    made = datasets.Dataset.from_dict({"image": rows, "label": [0, 1] * 4}, features=features)
    (tmp_path / "data").mkdir()
    made.to_parquet(str(tmp_path / "data" / "train.parquet"))
    assert json.loads(vitft(str(tmp_path / "data"), "--json").stdout)["findings"] == []


def test_training_leaves_out_what_is_quarantine_lines(faulty: Path, tmp_path: Path) -> None:
    listed = tmp_path / "out.txt"
    said = vitft(str(faulty), "--quarantine", str(listed)).stderr
    assert f"3 images to leave out: vitft train --dataset {faulty} --exclude {listed}" in said
    assert listed.read_text().splitlines() == [
        "train\ttrain/cat/bad.png", "train\ttrain/dog/001.png", "train\ttrain/cat/again.png",
    ]  # fmt: skip
    settings: dict[str, Any] = {
        "dataset": str(faulty), "model": "vit-micro", "from_scratch": True, "image_size": 16, "patch_size": 8,
        "width": 16, "heads": 2, "layers": 1, "max_steps": 1, "val_fraction": 0, "device": "cpu",
    }  # fmt: skip
    with pytest.raises(DataError, match=r"bad\.png"):
        train(TrainConfig(**settings), output=tmp_path / "without")
    result = train(TrainConfig(**settings, exclude=str(listed)), output=tmp_path / "run")
    split = json.loads((result.run / "splits.json").read_text())["splits"]["train"]
    assert split["count"] == 11
    assert not {"train/cat/bad.png", "train/dog/001.png", "train/cat/again.png"} & set(split["ids"])
    assert evaluate(result.run, split="train").split_hash == split["hash"]


def test_a_list_keeps_what_was_written_by_hand(faulty: Path, tmp_path: Path) -> None:
    listed = tmp_path / "out.txt"
    listed.write_text("train\ttrain/dog/003.png\ntrain\ttrain/cat/bad.png\n")
    said = vitft(str(faulty), "--quarantine", str(listed)).stderr
    assert "4 images to leave out (2 listed before)" in said
    assert listed.read_text().splitlines() == [
        "train\ttrain/dog/003.png", "train\ttrain/cat/bad.png",
        "train\ttrain/dog/001.png", "train\ttrain/cat/again.png",
    ]  # fmt: skip
    listed.write_bytes(b"\xff\xfe\x00")
    said = vitft(str(faulty), "--quarantine", str(listed)).stderr
    assert f"quarantine {listed}: not text" in said
    assert listed.read_bytes() == b"\xff\xfe\x00"


def test_the_suggested_command_reads_the_dataset_as_the_check_did(folder: Path, tmp_path: Path) -> None:
    table, listed = tmp_path / "my table.csv", tmp_path / "out.txt"
    names = sorted(path.relative_to(folder).as_posix() for path in (folder / "train").rglob("*.png"))
    rows = [f"{name},{number % 2},{number // 6}" for number, name in enumerate([*names, names[0]])]
    table.write_text("\n".join(["path,first,second", *rows]))
    given = ["--label-column", "second", "--image-folder", str(folder), "--max-pixels", "1000", "--allow-outside"]
    result = vitft(str(table), *given, "--quarantine", str(listed))
    command = shlex.split(result.stderr.split("to leave out: ")[1])
    assert command[:4] == ["vitft", "train", "--dataset", str(table)]
    assert command[-2:] == ["--exclude", str(listed)]
    assert sorted(command[4:-2]) == sorted(given)


def test_findings_are_shown_before_a_file_that_fails(faulty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out")

    monkeypatch.setattr("vitft.data.validation.page.write_text", full)
    monkeypatch.setattr("vitft.io.atomic.write_text", full)
    for flag in ("--html", "--quarantine"):
        result = vitft(str(faulty), flag, str(faulty.parent / "out"))
        assert result.exit_code == 1
        assert "train/cat/bad.png" in result.stdout
        assert result.stderr.endswith("error: out: No space left on device.\n")
        refused = vitft(str(faulty), flag, str(faulty))
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert f"{faulty}: give a file in a folder that exists" in refused.stderr


def test_a_file_may_be_in_the_home_folder(faulty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    vitft(str(faulty), "--html=~/page.html", "--quarantine=~/out.txt")
    assert "train/cat/bad.png" in (tmp_path / "page.html").read_text()
    assert "train/cat/bad.png" in (tmp_path / "out.txt").read_text()


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (None, DataError, "No such file or directory; give a list"),
        (
            "train\tnowhere.png\n",
            UsageError,
            r"'train\\tnowhere.png' names no image of pets; write a line as SPLIT, a tab",
        ),
        ("train/cat/000.png", UsageError, "names no image"),
    ],
)
def test_an_invalid_list_is_refused(
    folder: Path, tmp_path: Path, content: str | None, error: type[Exception], said: str
) -> None:
    listed = tmp_path / "list.txt"
    if content is not None:
        listed.write_text(content)
    with pytest.raises(error, match=said):
        excluding(open_dataset(str(folder)), listed)


@pytest.mark.parametrize("odd", ["a\u2028b", "a\x85b", "a\nb", "a\r\nb", "a\tb", '"a"', " a", "a\x0cb"])
def test_names_with_line_ends_in_them_are_read_back(folder: Path, tmp_path: Path, odd: str) -> None:
    (folder / "train" / "cat" / f"{odd}.png").write_bytes(b"no image")
    listed = tmp_path / "out.txt"
    assert vitft(str(folder), "--quarantine", str(listed)).exit_code == 3
    source = open_dataset(str(folder))
    left = excluding(source, listed)
    assert len(left.splits["train"]) == len(source.splits["train"]) - 1
    assert f"train/cat/{odd}.png" not in sample_names(left.splits["train"], np.arange(len(left.splits["train"])))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_may_be_listed_in_either_unicode_form(folder: Path, tmp_path: Path, form: Any) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    file = folder / "train" / "cat" / "000.png"
    file.rename(file.with_name(unicodedata.normalize(form, "é.png")))
    listed = tmp_path / "out.txt"
    listed.write_text(f"train\ttrain/cat/{unicodedata.normalize(other, 'é')}.png\n", encoding="utf-8")
    assert len(excluding(open_dataset(str(folder)), listed).splits["train"]) == 11


def test_a_list_that_was_saved_on_windows_is_read(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "out.txt"
    listed.write_bytes("\ufefftrain\ttrain/cat/000.png\r\n".encode())
    assert len(excluding(open_dataset(str(folder)), listed).splits["train"]) == 11


def test_rows_without_names_are_listed_by_number(tmp_path: Path) -> None:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    cells = [Image.new("L", (8, 8), shade) for shade in (10, 20, 30, 20)]
    rows = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 0, 1]}, datasets.Features(features))
    rows.to_parquet(tmp_path / "train.parquet")
    source = open_dataset(str(tmp_path / "train.parquet"))
    lines = quarantine_lines(check(source))
    assert lines == ["train\trow 3"]
    (tmp_path / "out.txt").write_text("\n".join(lines))
    assert len(excluding(source, tmp_path / "out.txt").splits["train"]) == 3


def test_a_run_can_be_checked_in_full(faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {
        "dataset": str(faulty), "model": "vit-micro", "from_scratch": True, "image_size": 16, "patch_size": 8,
        "width": 16, "heads": 2, "layers": 1, "max_steps": 1, "val_fraction": 0, "device": "cpu",
        "on_bad_image": "skip",
    }  # fmt: skip
    train(TrainConfig(**settings, check="full"), output=tmp_path / "run")
    assert "warning: 1 not-an-image, 1 leak, 1 other-label, 1 duplicate; `vitft data check`" in capsys.readouterr().err


# -- the page -------------------------------------------------------------------------------------


def sheet(folder: Path, file: Path) -> str:
    source = open_dataset(str(folder))
    write_report(check(source, folder), source, file)
    return file.read_text()


def test_the_report_shows_the_images(faulty: Path, tmp_path: Path) -> None:
    page = sheet(faulty, tmp_path / "page.html")
    assert page.count("<img ") == 3
    assert page.count('<div class="none">no image</div>') == 1
    assert "</div>train/cat/bad.png<span>" in page
    assert '<meta name="viewport" content="width=device-width' in page, "on a phone"
    assert shared_style() in page


def test_the_page_lists_what_it_has_no_pictures_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"train/{label}/{number}.png" for label in "ab" for number in range(4)]
    for name in names:
        write(tmp_path / "d", name, Image.new("L", (8, 8), 90))
    monkeypatch.setattr("vitft.data.validation.page.MAX_SHOWN", 3)
    page = sheet(tmp_path / "d", tmp_path / "page.html")
    duplicates = next(part for part in page.split("<h2>") if ">duplicate<" in part)
    assert duplicates.count("<img ") == 3
    assert "4 more, without pictures" in duplicates
    assert re.findall(r"(train/./\d\.png) ?<span>", duplicates) == names[1:]


def test_the_page_shows_images_as_they_were_read(tmp_path: Path) -> None:
    """White of 12 bits, which 16 bits make nearly black."""
    for number, label in enumerate("aab"):
        file = tmp_path / "scans" / label / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20), 4095, np.uint16)).save(file)
    page = tmp_path / "page.html"
    for words, bright in ((["--value-range", "0:4095"], True), ([], False)):
        vitft(str(tmp_path / "scans"), "--html", str(page), *words)
        shown = re.findall(r"data:image/jpeg;base64,([^\"]+)", page.read_text())
        means = [np.asarray(Image.open(io.BytesIO(b64decode(one)))).mean() for one in shown]
        assert means
        assert all((mean > 250) == bright for mean in means)


def test_names_cannot_write_html(tmp_path: Path, rng: Rng) -> None:
    clean(tmp_path / "d", rng)
    (tmp_path / "d" / "train" / "cat" / "<img src=x onerror=alert(1)>\x1b[31m.png").write_bytes(b"")
    page = sheet(tmp_path / "d", tmp_path / "page.html")
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;\\x1b[31m.png" in page


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_has_a_severity_and_a_meaning(kind: str) -> None:
    severity, meaning = KINDS[kind]
    assert severity in ("error", "warning", "note")
    assert meaning
