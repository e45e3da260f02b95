"""Mutated files by the thousand, each to load or to end in one line; in a process of its own, which may not crash."""

import json
import random
import subprocess
import sys

import pytest

from tests.fuzz.mutations import mutated
from tests.fuzz.targets import SEEDS, TARGETS

COUNTS = {"images": (1500, 20_000), "recipes": (1000, 20_000), "tables": (1000, 20_000), "checkpoints": (160, 12_000)}


@pytest.mark.parametrize("target", TARGETS)
def test_a_mutated_file_loads_or_ends_in_one_line(target: str) -> None:
    fuzz(target, COUNTS[target][0], seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_mutated_files_load_or_end_in_one_line(target: str) -> None:
    fuzz(target, COUNTS[target][1], seed=1)


def fuzz(target: str, count: int, seed: int) -> None:
    words = [sys.executable, "-m", "tests.fuzz", target, "--count", str(count), "--seed", str(seed)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-3000:]  # it crashed, or hung and was ended
    found = json.loads(done.stdout)
    print({name: found[name] for name in found if name != "first_wrong"})  # noqa: T201
    assert found["first_wrong"] == []
    assert found["tried"] == count
    assert found["slowest_s"] < 2
    assert found["memory_over_baseline_mb"] < 500
    # Neither all are refused at once, nor does nothing reach them.
    assert found["loaded"] > 0.05 * count
    assert found["refused"] > 0.3 * count
    assert target != "images" or found["past_header"] >= 0.3 * count


def test_there_are_seeds_of_many_kinds() -> None:
    assert len({file.suffix for file in (SEEDS / "images").iterdir()}) >= 10
    assert {file.suffix for file in (SEEDS / "tables").iterdir()} == {
        ".csv",
        ".tsv",
        ".jsonl",
        ".json",
        ".txt",
        ".parquet",
    }


def test_a_mutation_is_the_same_again_and_often_spares_the_header() -> None:
    data = bytes(range(256)) * 4
    made = [mutated(data, [data], random.Random(number), header=64) for number in range(300)]
    assert made == [mutated(data, [data], random.Random(number), header=64) for number in range(300)]
    assert sum(one == data for one in made) < 30
    assert sum(one[:64] == data[:64] for one in made) > 150
