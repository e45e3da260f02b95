"""What reads mutated files, as the commands do; each gives whether the file was usable, or raises what vitft says."""
# ruff: noqa: E501  (lists of words)

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from tests.fuzz.mutations import mutated
from vitft.errors import DataError, ModelError, UsageError, VitftError

SEEDS = Path(__file__).parent / "seeds"
Try = Callable[[random.Random], None]
"""Mutates a file and reads it."""
Target = tuple[Try, type[VitftError]]
"""A try, and the kind of error that a file which is refused must give."""


def images(work: Path, counts: Counter[str]) -> Target:
    """The decoder, by bytes as from a parquet file; every fourth by file."""
    from vitft.data.images import BadImage, decode, header

    seeds = [file.read_bytes() for file in sorted((SEEDS / "images").iterdir())]

    def attempt(rng: random.Random) -> None:
        data = mutated(rng.choice(seeds), seeds, rng, header=64)
        source: bytes | Path = data
        if rng.random() < 0.25:
            source = work / "image"
            source.write_bytes(data)
        with suppress(BadImage):
            header(source)
            counts["past_header"] += 1
        pixels = decode(source)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] == (3,)

    return attempt, DataError


def recipes(work: Path, counts: Counter[str]) -> Target:
    """`load_config`, as `vitft train --recipe` calls it."""
    from vitft.recipe import load_config

    seeds = [file.read_bytes() for file in sorted((SEEDS / "recipes").iterdir())]

    def attempt(rng: random.Random) -> None:
        file = work / "recipe.yaml"
        file.write_bytes(mutated(rng.choice(seeds), seeds, rng, tokens=YAML))
        load_config(str(file), {})

    return attempt, UsageError


def tables(work: Path, counts: Counter[str]) -> Target:
    """`open_source` on a CSV, TSV, JSONL or parquet file, and the names of its images."""
    from vitft.data.sources import open_source, sample_id

    seeds = sorted((SEEDS / "tables").iterdir())
    contents = [file.read_bytes() for file in seeds]

    def attempt(rng: random.Random) -> None:
        number = rng.randrange(len(seeds))
        file = work / f"table{seeds[number].suffix}"
        binary = file.suffix == ".parquet"
        alike = [data for seed, data in zip(seeds, contents, strict=True) if (seed.suffix == ".parquet") == binary]
        file.write_bytes(mutated(contents[number], alike, rng, header=4 * binary, tokens=() if binary else CSV))
        source = open_source(str(file))
        for split in source.splits.values():
            sample_id(split, 0)

    return attempt, DataError


def checkpoints(work: Path, counts: Counter[str]) -> Target:
    """A stranger's model folder, and the documents of vitft's own: one file of it is mutated."""
    from vitft.card import read_card
    from vitft.checkpoint import fault_of, find_model, read_state
    from vitft.models import load_trained

    strangers, own = SEEDS / "checkpoints" / "model", SEEDS / "checkpoints" / "step-000002"
    contents = {file: file.read_bytes() for folder in (strangers, own) for file in sorted(folder.iterdir())}

    def attempt(rng: random.Random) -> None:
        seed = rng.choice(list(contents))
        alike = [data for file, data in contents.items() if file.suffix == seed.suffix]
        is_text = seed.suffix == ".json"
        folder = work / seed.parent.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file, data in contents.items():
            if file.parent == seed.parent:
                (folder / file.name).write_bytes(data)
        (folder / seed.name).write_bytes(
            mutated(contents[seed], alike, rng, header=0 if is_text else 8, tokens=JSON if is_text else ())
        )
        if seed.parent == own:
            changed = (folder / seed.name).read_bytes() != contents[seed]
            fault = fault_of(folder)
            assert (fault is None) <= (not changed or same_document(folder / seed.name, seed)), (
                "a changed file is whole"
            )
            read_card(folder)
            read_state(folder)
        find_model(folder)
        load_trained(folder)

    return attempt, ModelError


def same_document(one: Path, other: Path) -> bool:
    """Whether two files say the same, however they are spaced."""
    try:
        return bool(json.loads(one.read_bytes()) == json.loads(other.read_bytes()))
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
