"""Data, models and settings made to do harm: through the real command line, each is refused in a line or does none."""
# ruff: noqa: E501  (lists of hostile words)

import copy
import csv
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.counted import calls
from tests.forked import finish, flags, within
from vitft import TrainConfig
from vitft.checkpoints.metadata import verify
from vitft.cli.app import app
from vitft.config.recipe import load_config
from vitft.data.decoder import BadImage, decode, formats
from vitft.data.limits import check_bytes, check_scans
from vitft.data.sources.arrow_memory import _length
from vitft.data.sources.folders import Listing
from vitft.data.sources.source import open_dataset
from vitft.errors import ModelError
from vitft.models.load import load_for_training, load_trained
from vitft.prediction.predictor import predict

Saved = Callable[..., Path]


def vitft(tmp_path: Path, *words: str, **how: Any) -> tuple[int, str]:
    code, said = finish(*words, log=tmp_path / "log", **how)
    assert "Traceback" not in said
    return code, said


# -- names ------------------------------------------------------------------------------------------

NAMES = [
    "\x1b[31mred\x1b[0m\x07", "../../up", "/etc/passwd", "<script>alert(1)</script>", "a\r\nb: c", "[bold]x[/]", "# title",
    "![x](http://x.example/y.png)", "‮gnp", "NUL", "a" * 300, "{}", "%s%n", "'; drop", ".", "é", "e\u0301",
]  # fmt: skip


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A table whose classes have such names."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number in range(4 * len(NAMES)):
        pixels = np.random.default_rng(number).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        split = "test" if number >= 3 * len(NAMES) else "train"
        rows.append(json.dumps({"path": f"{number}.png", "label": NAMES[number % len(NAMES)], "split": split}))
    (folder / "t.jsonl").write_text("\n".join(rows))
    return folder / "t.jsonl"


def test_class_names_inject_nothing_into_terminal_page_or_path(named: Path, tmp_path: Path) -> None:
    run, before = tmp_path / "run", set(tmp_path.rglob("*"))
    small = flags(dataset=str(named), max_train_samples=None, max_steps=2, val_fraction=0)
    page = tmp_path / "page.html"
    for words in (
        ["data", "info", str(named), "--preview", str(tmp_path / "preview.png")],
        ["data", "check", str(named), "--html", str(page)],
        ["train", *small, "--output", str(run)],
        ["eval", str(run), "--plot", str(tmp_path / "confusion.png")],
        ["predict", str(named.parent / "0.png"), "--checkpoint", str(run)],
        ["eval", str(run), "--json"],
    ):
        code, said = vitft(tmp_path, *words)
        assert code == 0, said
        for control in "\x1b\x07\r‮":
            assert control not in said, (words, control)
    assert "<script>" not in page.read_text()
    card = (run / "last" / "README.md").read_text()
    assert "<script>" not in card
    assert "\n# title" not in card
    assert "[x](" not in card
    new = {path for path in tmp_path.rglob("*") if path not in before and run not in path.parents}
    assert {path.name for path in new} == {"run", "log", "preview.png", "page.html", "confusion.png"}
    # The names themselves are kept as they are; one in two Unicode forms is one.
    assert set(load_trained(run / "last").labels) == {unicodedata.normalize("NFC", name) for name in NAMES}


def test_a_split_may_have_any_name(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    names = ["\x1b[2J", "../x", "<b>", "train", "a b", "\u00e9"]
    rows = [f"a.png,{label},{split}" for split in names for label in "xy"]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,split", *rows]))
    assert set(open_dataset(str(tmp_path / "t.csv")).splits) == set(names)
    code, said = vitft(tmp_path, "data", "info", str(tmp_path / "t.csv"))
    assert code == 0
    assert "\x1b[2J" not in said


# -- sizes ------------------------------------------------------------------------------------------


def test_a_shape_of_terabytes_is_refused_before_it_is_made(tmp_path: Path) -> None:
    sizes = {"width": 16384, "layers": 256, "mlp": 65536, "heads": 1, "image_size": 4096, "patch_size": 1}
    code, said = vitft(tmp_path, "train", *flags(**sizes))
    assert code == 4
    assert "its weights alone take 4." in said
    assert "TB, but this machine has" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 10**9, "num_attention_heads": 1}, {"num_hidden_layers": 10**9}, {"intermediate_size": 10**12},
        {"image_size": 10**7}, {"num_channels": 10**10}, {"hidden_size": 0}, {"num_attention_heads": 0}, {"patch_size": 0},
        {"hidden_size": -16}, {"image_size": "x"}, {"hidden_size": 1e300}, {"layer_norm_eps": "1"}, {"hidden_act": "none"},
        {"id2label": {str(n): "x" for n in range(3)}, "hidden_size": 2**62}, {"num_labels": 10**9, "id2label": None},
        {"text_config": {"num_labels": 10**9}}, {"model_type": "dinov2", "num_hidden_layers": 10**9},
        {"model_type": "swin", "depths": [1, 10**9]},
    ],
)  # fmt: skip
def test_a_configuration_of_absurd_sizes_is_one_line(saved: Saved, changes: dict[str, Any]) -> None:
    folder = saved()
    document = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(document))
    for from_scratch in (False, True):
        with pytest.raises(ModelError) as caught:
            load_for_training(TrainConfig(model=str(folder), from_scratch=from_scratch), ("a", "b"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": {"height": 10**6, "width": 10**6}}, {"size": {"height": 0, "width": 8}}, {"size": -1},
        {"do_center_crop": True, "crop_size": 10**5, "size": {"shortest_edge": 10**5}},
        {"image_std": [0, 1, 1]}, {"image_mean": [1]}, {"image_mean": ["a", "b", "c"]}, {"rescale_factor": 1e999},
    ],
)  # fmt: skip
def test_a_preprocessor_of_absurd_values_is_one_line(saved: Saved, changes: dict[str, Any]) -> None:
    folder = saved("dinov2")
    (folder / "preprocessor_config.json").write_text(json.dumps(changes))
    with pytest.raises(ModelError, match=r"preprocessor_config\.json"):
        load_trained(folder)


def test_an_input_size_that_no_memory_holds_is_refused(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(patch_size=1, hidden_size=64, image_size=8)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=4_000_000_000))
    with pytest.raises(ModelError, match=r"image_size 4096: its weights alone take 4\.3 GB, but this machine has 4\.0"):
        load_for_training(TrainConfig(model=str(folder), image_size=4096), ("a", "b"))


# -- code -------------------------------------------------------------------------------------------


def test_code_in_a_model_folder_is_never_run(saved: Saved, tmp_path: Path) -> None:
    """There is no `--trust-remote-code`: what vitft trains, Transformers has."""
    folder = saved()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    document = json.loads((folder / "config.json").read_text())
    document |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}}
    said = {}
    for kind in ("vit", "evil"):
        (folder / "config.json").write_text(json.dumps(document | {"model_type": kind}))
        words = ["--dataset", "digits", "--model", str(folder), "--max-steps", "1", "--max-eval-samples", "50"]
        said[kind] = vitft(tmp_path, "train", *words, "--output", str(tmp_path / f"run-{kind}"))
    assert said["vit"][0] == 0
    assert said["evil"][0] == 4
    assert len(said["evil"][1].strip().splitlines()) == 1
    assert not (tmp_path / "ran").exists()


# -- folders ----------------------------------------------------------------------------------------


def test_pipes_archives_and_link_loops_in_a_folder_are_not_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (9, 9), (len(name + split) * 9, 3, 3)).save(folder / "1.png")
    (tmp_path / "pets" / "train" / "cat" / "again").symlink_to(tmp_path / "pets" / "train")
    (tmp_path / "pets" / "train" / "dog" / "self.png").symlink_to("self.png")
    (tmp_path / "pets" / "train" / "self").symlink_to("self")
    with zipfile.ZipFile(tmp_path / "pets" / "train" / "cat" / "more.zip", "w") as archive:
        archive.writestr("2.png", b"x")
    assert Listing(tmp_path / "pets").tree.count == 5  # the link to itself, too, is named as one
    code, said = vitft(tmp_path, "data", "check", str(tmp_path / "pets"))
    assert code == 3
    assert "dog/self.png" in said
    os.mkfifo(tmp_path / "pets" / "train" / "dog" / "pipe.png")
    code, said = vitft(tmp_path, "data", "check", str(tmp_path / "pets"))
    assert code == 3
    assert "pipe.png" in said


# -- pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_a_thousand_frames_the_first_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (64, 64), (n % 256, 200 if n == 0 else n // 10, 7)) for n in range(1000)]
    stream = io.BytesIO()
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
    two = io.BytesIO()
    frames[0].save(two, kind, save_all=True, append_images=frames[1:2])
    assert np.abs(decode(stream.getvalue())[0, 0].astype(int) - (0, 200, 7)).max() < 4  # WebP rounds
    assert calls(lambda: decode(stream.getvalue())) < 1.5 * calls(lambda: decode(two.getvalue()))


def test_a_texture_that_pillow_reads_in_c_counts_as_it_is() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (40, 12)).save(stream, "DDS", pixel_format="DXT1")
    assert decode(stream.getvalue(), 480).shape == (12, 40, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "BMP", "GIF", "TIFF", "QOI", "DDS", "JPEG2000", "AVIF"])
def test_a_pixel_counts_as_what_decoding_it_takes(kind: str) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (40, 10)).save(stream, kind)
    weight = {"AVIF": 1.5, "WEBP": 2, "JPEG2000": 2.5, "QOI": 50, "DDS": 50}.get(kind, 1)
    assert decode(stream.getvalue(), int(400 * weight)).shape == (10, 40, 3)
    with pytest.raises(
        BadImage, match=r"over --max-pixels .*40 x 10" + (f", .* {kind} counts as" if weight > 1 else "")
    ):
        decode(stream.getvalue(), int(400 * weight) - 1)


DECODED = """
import sys
from pathlib import Path
from tests.fuzz.__main__ import peak_bytes as used
from vitft.data.decoder import decode
decode(Path(sys.argv[2]))
before = used()
decode(Path(sys.argv[1]))
print(used() - before)
"""
LARGEST: dict[str, tuple[str, str, float, dict[str, Any]]] = {
    "jpeg": ("RGB", "JPEG", 1, {}), "progressive": ("RGB", "JPEG", 1.1, {"progressive": True, "subsampling": 0}),
    "png": ("RGBA", "PNG", 1, {"compress_level": 1}), "gray 16": ("I;16", "PNG", 1, {"compress_level": 1}),
    "float": ("F", "TIFF", 1, {}), "integers": ("I", "TIFF", 1, {}), "palette": ("P", "GIF", 1, {}),
    "cmyk": ("CMYK", "TIFF", 1, {"compression": "tiff_lzw"}), "lab": ("LAB", "TIFF", 1, {}),
    "webp": ("RGBA", "WEBP", 2, {"method": 0}), "jpeg 2000": ("RGBA", "JPEG2000", 2.5, {}),
    "avif": ("RGBA", "AVIF", 1.5, {"speed": 10}), "heic": ("RGB", "HEIF", 1, {}),
    "jpeg xl": ("RGBA", "JXL", 2.5, {"effort": 1}), "qoi": ("RGB", "QOI", 50, {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jpeg", *(pytest.param(kind, marks=pytest.mark.slow) for kind in LARGEST)])
def test_the_largest_image_that_is_read_takes_half_a_gigabyte(kind: str, tmp_path: Path) -> None:
    mode, written, weight, how = LARGEST[kind]
    largest = TrainConfig().max_pixels / weight
    side = int(largest**0.5)
    for name, size in (("large", (side, int(largest / side))), ("small", (64, 64))):
        Image.new(mode, size, 77 if mode in ("P", "I", "I;16", "F") else None).save(tmp_path / name, written, **how)
    words = [sys.executable, "-c", DECODED, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    print(f"{kind}: {int(done.stdout) / 1e6:.0f} MB for {side * int(largest / side) / 1e6:.1f} million pixels")  # noqa: T201
    assert int(done.stdout) <= 500_000_000


@pytest.mark.parametrize("shape", [(65_535, 1), (1, 65_535), (65_535, 762)])
def test_extreme_shapes_are_decoded_or_refused(shape: tuple[int, int]) -> None:
    stream = io.BytesIO()
    Image.new("L", shape).save(stream, "PNG")
    assert decode(stream.getvalue()).shape == (shape[1], shape[0], 3)
    with pytest.raises(BadImage, match="over --max-pixels"):
        decode(stream.getvalue(), shape[0] * shape[1] - 1)


def test_a_bomb_within_another_format_is_not_opened() -> None:
    """An icon's header says 16 x 16; the PNG within it may have any size."""
    bomb, icon = io.BytesIO(), io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    Image.new("RGB", (16, 16)).save(icon, "ICO", sizes=[(16, 16)])
    entry = icon.getvalue()[:14] + len(bomb.getvalue()).to_bytes(4, "little") + (22).to_bytes(4, "little")
    with pytest.raises(BadImage, match="is not an image in a supported format"):
        decode(entry + bomb.getvalue())


# -- what reading takes ------------------------------------------------------------------------------

MB = 1_000_000
assert {"HEIF", "JXL"} <= set(formats())  # of plugins, which it registers


def holed(file: Path, head: bytes, size: int) -> Path:
    """A file of so many bytes of which only the head takes room on the disk."""
    with file.open("wb") as stream:
        stream.write(head)
        stream.truncate(size)
    return file


def shape_of(file: Path) -> tuple[int, ...]:
    return decode(file).shape


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "JPEG", "GIF", "TIFF", "HEIF", "JXL", "BMP"])
def test_a_file_of_more_bytes_than_its_pixels_could_have_is_not_read(kind: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, kind)
    file = holed(tmp_path / "x", stream.getvalue(), 1_500 * MB)
    said = within(60 * MB, shape_of, file)
    assert said.startswith("BadImage: has 1,500,000,000 bytes, over the "), said
    assert "that max_pixels 50,000,000 allows for this format" in said


@pytest.mark.parametrize(
    ("kind", "a_pixel"),
    [("PNG", 8), ("TIFF", 8), ("BMP", 8), ("JPEG", 8), ("WEBP", 2), ("AVIF", 2), ("HEIF", 2), ("JXL", 2)],
)
def test_the_bytes_of_a_file_are_bounded_by_its_format(kind: str, a_pixel: int) -> None:
    """Of those that are read whole before a pixel is decoded there may be fewer."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, kind)
    allowed = a_pixel * 70_000 + 1_000_000
    assert check_bytes(io.BytesIO(stream.getvalue()), allowed, 70_000) is None
    said = f"has {allowed + 1:,} bytes, over the {allowed:,} that --max-pixels 70,000 allows for this format"
    assert check_bytes(io.BytesIO(stream.getvalue()), allowed + 1, 70_000) == said


def test_a_chunk_of_a_png_that_is_longer_than_any_profile_is_not_read(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "PNG")
    png = stream.getvalue()
    for at in (33, len(png) - 12):  # before its pixels, and behind them
        chunk = (300 * MB).to_bytes(4, "big") + b"zTXt"
        file = holed(tmp_path / "x", png[:at] + chunk, at + 312 * MB)
        with file.open("r+b") as end:
            end.seek(at + 12 + 300 * MB)
            end.write(png[at:])
        assert "has a chunk of 300,000,000 bytes besides its pixels" in within(60 * MB, shape_of, file)


def loaded_source(file: Path) -> object:
    return sorted(open_dataset(str(file)).splits)


def test_a_pickle_whose_memo_is_longer_than_itself_is_not_read(tmp_path: Path) -> None:
    """Seven bytes, of which four say where to remember an empty dictionary: Python makes a list of that length."""
    memo = b"\x80\x02}r" + (2**31 - 1).to_bytes(4, "little") + b"."
    array = b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b"."  # a bytearray of 8 GB
    dictionaries = b"\x80\x02(" + b"}" * 4_000_000 + b"l."
    text = b"\x80\x02c_codecs\nencode\nq\x00X" + (2**20).to_bytes(4, "little") + b"a" * 2**20 + b"q\x01"
    text += b"0" + (b"h\x00h\x01\x85R" * 500)  # one text of a megabyte, encoded again and again
    made = b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ftR."
    objects = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(J\xff\xff\xff\x7ftU\x01OtR."
    for content in (memo, memo[2:], array, dictionaries, text + b".", made, objects):
        (tmp_path / "data_batch_1").write_bytes(content)
        said = within(400 * MB, loaded_source, tmp_path)
        assert said.startswith("DataError: "), said
        assert "is not a CIFAR batch: " in said
        assert "MemoryError" not in said
    holed(tmp_path / "data_batch_1", memo, 1_500 * MB)
    assert "it has 1,500,000,000 bytes, over 500,000,000" in within(100 * MB, loaded_source, tmp_path)


@pytest.mark.parametrize("kind", ["one value", "nulls", "nested", "compressed", "labels"])
def test_a_parquet_file_of_few_bytes_and_gigabytes_of_values_is_not_read(kind: str, tmp_path: Path) -> None:
    rows, value = 400_000, b"x" * 20_000
    images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))
    labels: pa.Array = pa.array(np.zeros(rows, np.int8))
    if kind == "nulls":
        rows = 60_000_000
        images, labels = pa.nulls(rows, pa.binary()), pa.nulls(rows, pa.int8())
    elif kind == "nested":
        images = pa.StructArray.from_arrays([images, pa.nulls(rows, pa.string())], ["bytes", "path"])
    elif kind == "compressed":
        images, labels = pa.array([bytes(3 * 10**8)]), pa.array([1], pa.int8())
    elif kind == "labels":
        images, labels = (
            pa.array([b"x"] * rows),
            pa.DictionaryArray.from_arrays(images.indices, pa.array(["y" * 20_000])),
        )
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"image": images, "label": labels}), file, compression="zstd", row_group_size=len(images))
    assert file.stat().st_size < MB
    said = within(600 * MB, loaded_source, file)
    assert re.search(
        r"DataError: .* rows need .* or more, from a file of .*; no image dataset compresses like that", said
    )


def test_bytes_of_repeated_values_are_counted_in_columns_of_any_kind() -> None:
    words = pa.array([b"aaaa", b"bb", None, b"aaaa"]).dictionary_encode()
    lists = pa.ListArray.from_arrays([0, 1, 4], words)
    assert _length(words) == _length(lists) == _length(lists.cast(pa.large_list(words.type))) == 10
    assert _length(pa.StructArray.from_arrays([words[:2], words[2:]], ["bytes", "path"])) == 10
    assert _length(words[:0]) == 0
    assert _length(pa.array([1, 2, 3], pa.int64())) == 24


def test_a_parquet_file_of_equal_images_is_read(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    table = pa.table({"image": [stream.getvalue()] * 5000, "label": ["a", "b"] * 2500})
    pq.write_table(table, tmp_path / "train.parquet")
    assert len(open_dataset(str(tmp_path / "train.parquet")).splits["train"]) == 5000


def read_weights(folder: Path) -> object:
    return load_trained(folder).labels


@pytest.mark.parametrize("kind", ["deflated", "repeated", "overlapping"])
def test_pickled_weights_of_few_bytes_and_gigabytes_of_numbers_are_not_read(saved: Saved, kind: str) -> None:
    folder = saved()
    state: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if kind == "repeated":  # one number, shown two thousand million times
        state["classifier.weight"] = torch.zeros(1, dtype=torch.float16).expand(2 * 10**9)
    file = folder / "pytorch_model.bin"
    torch.save(state, file)
    assert within(4000 * MB, read_weights, folder) == "('ant', 'bee', 'cat')" or kind == "repeated"
    if kind == "deflated":
        with zipfile.ZipFile(file) as stored:
            parts = {name: stored.read(name) for name in stored.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
            with archive.open("archive/data/99", "w", force_zip64=True) as stream:
                for _ in range(10):
                    stream.write(bytes(10 * MB))
    elif kind == "overlapping":
        with zipfile.ZipFile(file, "a") as archive:
            for number in range(3000):
                one = copy.copy(max(archive.infolist(), key=lambda entry: entry.file_size))
                one.filename = f"archive/data/{number + 100}"
                archive.filelist.append(one)
            archive._didModify = True
    said = within(800 * MB, read_weights, folder)
    assert re.search(r"ModelError: .*pytorch_model.bin: its weights take .*B of memory, but the file has", said), said


def test_pickled_weights_of_the_older_form_are_read(saved: Saved) -> None:
    folder = saved()
    torch.save(
        load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    (folder / "model.safetensors").unlink()
    assert load_trained(folder).labels == ("ant", "bee", "cat")


def repeated_scan(side: int, times: int) -> bytes:
    """A progressive JPEG whose last scan, of a few bytes, comes so many times more."""
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (90, 90, 90)).save(stream, "JPEG", progressive=True, subsampling=0)
    whole = stream.getvalue()
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * times + whole[-2:]


def test_scans_of_a_jpeg_are_counted_before_it_is_decoded(tmp_path: Path) -> None:
    side = 200
    assert decode(repeated_scan(side, 0), side * side * 2).shape == (side, side, 3)  # it has ten
    assert decode(repeated_scan(side, 10), side * side * 2).shape == (side, side, 3)
    with pytest.raises(BadImage, match=r"^has 60 scans, over the 40 that --max-pixels 80,000 allows at this size"):
        decode(repeated_scan(side, 50), side * side * 2)
    (tmp_path / "x.jpg").write_bytes(repeated_scan(side, 50_000))
    with pytest.raises(BadImage, match=r"^has 50,010 scans, over the 25,000"):
        decode(tmp_path / "x.jpg")


def test_scans_of_components_that_come_one_by_one_are_counted_too() -> None:
    """Without being progressive: libjpeg then reads all scans that there are, before the first row."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 90, 90)).save(stream, "JPEG", subsampling=0)
    whole = bytearray(stream.getvalue())
    at = whole.index(b"\xff\xda")
    one = whole[:at] + bytes.fromhex("ffda0008010100003f00") + b"\x00" * 8 + bytes.fromhex("ffda0008010200003f00") * 99
    with pytest.raises(BadImage, match=r"^has 100 scans, over the 20 that --max-pixels 4,096"):
        decode(bytes(one) + b"\xff\xd9", 64 * 64)


class ReadInPieces(io.BytesIO):
    """A file that is never read to its end at once."""

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        assert size >= 0
        return super().read(size)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_usual_jpeg_is_not_searched(mode: str) -> None:
    stream = ReadInPieces()
    Image.new(mode, (16, 16)).save(stream, "JPEG")
    with Image.open(stream) as image:
        at = stream.tell()
        assert check_scans(image, 256) is None
        assert stream.tell() == at


@pytest.mark.parametrize("container", [False, True])
def test_a_jpeg_xl_of_too_many_pixels_is_refused_unopened(container: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plugin decodes when it opens."""
    from pillow_jxl import JpegXLImagePlugin

    stream = io.BytesIO()
    Image.new("RGB", (60, 50)).save(stream, "JXL", use_container=container)
    assert decode(stream.getvalue(), 7500).shape == (50, 60, 3)
    monkeypatch.setattr(JpegXLImagePlugin, "Decoder", None)
    with pytest.raises(BadImage, match=r"has 3,000 pixels, over --max-pixels 7,499 .*a pixel of JXL counts as 2.5"):
        decode(stream.getvalue(), 7499)


def test_fits_whose_values_pillow_reads_wrong_is_no_image() -> None:
    card = "".join(
        f"{line:<80}" for line in ("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 2", "NAXIS2  = 2", "END")
    )
    with pytest.raises(BadImage, match="is not an image in a supported format"):
        decode(card.encode().ljust(2880) + b"\0" * 2880)


def read_bomb(file: Path) -> object:
    return load_config(str(file), {})


@pytest.mark.parametrize("use", ["? *j\n: 1", "dataset: *j", "*j : 1", "epochs: *j", "model: {a: *j}", "{*j : *j}: 1"])
def test_a_recipe_of_lists_of_lists_by_name_is_a_line(use: str, tmp_path: Path) -> None:
    """A thousand million words, in 400 bytes: as the name of a setting, or as its value."""
    names = "abcdefghij"
    lines = [f"{c}: &{c} [{', '.join(['x' if n == 0 else f'*{names[n - 1]}'] * 10)}]" for n, c in enumerate(names)]
    (tmp_path / "bomb.yaml").write_text("\n".join([*lines, use]))
    said = within(200 * MB, read_bomb, tmp_path / "bomb.yaml")
    assert said.startswith("UsageError: "), said[:300]
    assert len(said) < 500
    (tmp_path / "setting.yaml").write_text("batch_size: &z 3\nlog_every: *z")
    assert load_config(str(tmp_path / "setting.yaml"), {}).log_every == 3  # a name for one setting is none


@pytest.mark.parametrize("form", [[], ["--json"], ["--format", "csv"]])
def test_non_finite_weights_predict_nothing(saved: Saved, form: list[str]) -> None:
    folder = saved()
    state = load_file(folder / "model.safetensors")
    state["classifier.bias"][:] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    result = CliRunner().invoke(app, ["predict", "docs/digits", "--checkpoint", str(folder), *form])
    assert result.exit_code == 4
    assert result.stdout == ""


def test_non_finite_scores_are_not_a_prediction(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    scores = torch.tensor([[0.2, 0.3, float("nan")]])  # as where each label is scored by itself
    monkeypatch.setattr("vitft.prediction.predictor._probabilities", lambda logits, scoring: scores)
    with pytest.raises(ModelError, match="its scores are not finite, so its weights are corrupt"):
        predict(tmp_path / "a.png", saved())


@pytest.mark.parametrize("form", ["csv", "jsonl", "table"])
def test_names_that_are_not_utf_8_and_formulas_lose_no_row(saved: Saved, tmp_path: Path, form: str) -> None:
    folder = saved(labels=("-5", "+b", "=c"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in (b"\xff\xfe.png", b"=1+1.png", b"@x.png", "é\u2028.png".encode()):
        Image.new("RGB", (8, 8)).save(photos / os.fsdecode(name), "PNG")
    words = ["predict", str(photos), "--checkpoint", str(folder), "--format", form]
    code, said = vitft(tmp_path, *words)
    assert code == 0, said
    said = re.sub(r"^warning: .*\n", "", said, flags=re.MULTILINE)  # the checkpoint has no preprocessor
    assert re.sub(r"\s", "", said).count(".png") == 4  # a table folds what is long
    if form == "csv":
        rows = list(csv.reader(io.StringIO(said)))[1:]
        assert {cell for row in rows for cell in row[1:-1:2]} == {"-5", "'+b", "'=c"}  # a number is no formula
        assert all(row[0].startswith(str(photos)) for row in rows)
        assert any(r"\udcff\udcfe.png" in row[0] for row in rows)
    if form == "jsonl":
        assert {json.loads(line)["path"] for line in said.splitlines()} == set(map(str, photos.iterdir()))


@pytest.mark.parametrize(
    "word", ["https://me:hunter2@data.example/x.zip", "https://data.example/x?access_token=hunter2&a=1"]
)
def test_addresses_are_said_without_their_passwords(word: str, tmp_path: Path) -> None:
    for words in (["data", "info", word], ["eval", word], ["train", "--dataset", "digits", "--model", word]):
        code, said = vitft(tmp_path, *words)
        assert code in (2, 3, 4), said
        assert "data.example" in said
        assert "hunter2" not in said


def strict() -> None:
    os.umask(0o027)


def test_files_of_a_run_have_the_bits_that_the_user_chose(tmp_path: Path) -> None:
    words = flags(max_steps=2, save_every=1)
    code, said = vitft(tmp_path, "train", *words, "--output", str(tmp_path / "run"), before=strict)
    assert code == 0, said
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


# -- secrets ----------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_TOKENtokenTOKENtoken",
    "WANDB_API_KEY": "0123456789abcdef0123",
    "MY_PASSWORD": "hunter2hunter2",
}


def secretive(home: str) -> None:
    os.environ.update(SECRETS | {"HOME": home})


def test_a_run_folder_contains_no_token_and_no_home_folder(named: Path, tmp_path: Path) -> None:
    run = tmp_path / "home" / "run"
    (tmp_path / "home").mkdir()
    data = tmp_path / "home" / "data"
    named.parent.rename(data)
    words = flags(dataset=str(data / "t.jsonl"), max_train_samples=None, max_steps=2)
    code, said = vitft(
        tmp_path, "train", *words, "--output", str(run), before=partial(secretive, str(tmp_path / "home"))
    )
    assert code == 0, said
    written = "".join(file.read_bytes().decode(errors="replace") for file in run.rglob("*") if file.is_file()) + said
    for secret in SECRETS.values():
        assert secret not in written
    assert "~/data/t.jsonl" in written
    assert f"{tmp_path}/home/data" not in written
    assert verify(run / "last").is_dir()
    assert load_file(run / "last" / "model.safetensors")
