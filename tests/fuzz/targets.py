"""What reads mutated files, as the commands do: to end in nothing, or in the error that vitft says."""
# ruff: noqa: E501  (lists of words)

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitft.errors import DataError, ModelError, UsageError, VitftError

SEEDS = Path(__file__).parent / "seeds"


@dataclass(frozen=True)
class Target:
    """Valid files, what reads one of them by its path among the seeds, and the kind of error it may raise."""

    seeds: dict[Path, bytes]
    read: Callable[[Path, bytes], None]
    refusal: type[VitftError]
    header: int = 0  # bytes that most mutations spare
    tokens: Sequence[bytes] = ()  # words that mean something in a text file


def seeds_in(folder: str) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted((SEEDS / folder).rglob("*")) if file.is_file()}


def images(work: Path, counts: Counter[str]) -> Target:
    """The decoder, by bytes as from a parquet file, or by file."""
    from vitft.data.decoder import BadImage, decode, header

    def read(seed: Path, data: bytes) -> None:
        source: bytes | Path = data
        if len(data) % 4 == 0:
            source = work / "image"
            source.write_bytes(data)
        with suppress(BadImage):
            header(source)
            counts["past_header"] += 1
        pixels = decode(source)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] == (3,)

    return Target(seeds_in("images"), read, DataError, header=64)


def recipes(work: Path, counts: Counter[str]) -> Target:
    """`load_config`, as `vitft train --recipe` calls it."""
    from vitft.config.recipe import load_config

    def read(seed: Path, data: bytes) -> None:
        file = work / "recipe.yaml"
        file.write_bytes(data)
        load_config(str(file), {})

    return Target(seeds_in("recipes"), read, UsageError, tokens=YAML)


def tables(work: Path, counts: Counter[str]) -> Target:
    """`open_dataset` on a table or a parquet file, and the names of its images."""
    from vitft.data.sources.identity import sample_id
    from vitft.data.sources.source import open_dataset

    for number in range(6):  # what the seeds name
        for name in (f"img/{number}.png", f"{number}.png", f"a {number}.jpg", f"train/id{number}.jpg"):
            (work / name).parent.mkdir(exist_ok=True)
            (work / name).touch()

    def read(seed: Path, data: bytes) -> None:
        file = work / f"table{seed.suffix}"
        file.write_bytes(data)
        for split in open_dataset(str(file)).splits.values():
            sample_id(split, 0)

    return Target(seeds_in("tables"), read, DataError, header=4, tokens=CSV)


def checkpoints(work: Path, counts: Counter[str]) -> Target:
    """A stranger's model folder, and vitft's own with its documents: one file of it is mutated."""
    from vitft.checkpoints.checkpoint import find_damage, find_model, read_state
    from vitft.checkpoints.metadata import read_card
    from vitft.models.load import load_trained

    seeds = seeds_in("checkpoints")

    def read(seed: Path, data: bytes) -> None:
        folder = work / seed.parent.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file, content in seeds.items():
            if file.parent == seed.parent:
                (folder / file.name).write_bytes(data if file == seed else content)
        if (folder / "manifest.json").exists():
            assert find_damage(folder) is not None or same(data, seeds[seed]), "a changed file is taken for whole"
            read_card(folder)
            read_state(folder)
        find_model(folder)
        load_trained(folder)

    return Target(seeds, read, ModelError, header=8, tokens=JSON)


def same(one: bytes, other: bytes) -> bool:
    """Whether two files say the same, however they are spaced."""
    try:
        return one == other or bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


TARGETS = {"images": images, "recipes": recipes, "tables": tables, "checkpoints": checkpoints}

YAML = [
    b"null", b"~", b".nan", b"-.inf", b"1e999", b"0x" + b"F" * 40, b"9" * 5000, b"-1", b"0", b"1e-300", b"true", b"no",
    b"[1, 2]", b"{a: 1}", b"[" * 50, b"{" * 50, b"&a [*a]", b"*a", b"&x ", b"<<: *x", b"!!python/object/apply:os.system ['x']",
    b"!!int x", b"!!float x", b"!!timestamp x", b"2001-99-99", b"!!binary x", b"!!set {a}", b"!!omap [a: 1]", b"? a", b"- ",
    b"\n", b"\r\n", b"\n---\n", b"\n...\n", b"%YAML 9.9\n", b"\t", b"'", b'"', b"|\n  ", b"lr: 1\nlr: 2\n", b"dataset: ",
    b"\xff", b"\x00", b"\x1b[31m", "é".encode(), "\u2028".encode(), b"12:30:45", b"1_000", b"0o7", b"model: x\n",
]  # fmt: skip
CSV = [
    b",", b",,", b"\n", b"\r", b"\r\n", b'"', b'""', b"\t", b"../x.png", b"/etc/passwd", b"a\x00b", b"\xff\xfe", b"\x1b[2J",
    b"split", b"label", b"path", b"train", b"test", b"validation", b"-1", b"nan", b"1.5", b"9" * 5000, b"null", b"true",
    b'{"path": 1}', b"[" * 2000, b"{}", b"[]", "é".encode(), b"<script>", b"x" * 140_000,
]  # fmt: skip
JSON = [
    b"null", b"true", b"-1", b"0", b"1e400", b"NaN", b"Infinity", b"1e-300", b"2.5", b'""', b'"x"', b"[]", b"{}", b"[0]", b'"vit"',
    b"1000000000000", b"99999999", b"9" * 5000, b"[" * 3000, b'{"a": {}}', b'"bert"', b'"swin"', b'"beit"', b'"\\u0000"', b'"\\ud800"',
    b'"../../x"', b'"auto_map": {"AutoConfig": "x.Y"},', b'"id2label": {"0": "a"},', b'"num_labels": 999999999,',
    b'"hidden_size": 0,', b'"image_size": [1, 2, 3],', b'"num_hidden_layers": 1000000000,', b",", b"}", b"{", b'"', b"\xff",
]  # fmt: skip
