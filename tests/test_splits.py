"""Who is train, validation and test: exact, disjoint, stratified, nested, the same every time."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitft.data.choice import quotas, stratified
from vitft.data.schema import image_structs, make_split, standardize
from vitft.data.sources import Source
from vitft.data.splits import make_splits, manifest
from vitft.errors import DataError

NAMES = ("a", "b", "c", "d", "e")
SETTINGS = {"val_fraction": 0.1, "max_train_samples": None, "max_eval_samples": None, "seed": 0}


def source_of(**splits: list[int]) -> Source:
    raw = {
        name: make_split(image_structs(pa.array([b"x"] * len(labels), pa.binary())), np.array(labels, np.int64), NAMES)
        for name, labels in splits.items()
    }
    rows, labels = standardize(raw)
    return Source("toy", rows, labels, None)


def splits_of(source: Source, **changes):
    return make_splits(source, **{**SETTINGS, **changes})


sizes = st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(sum)
takes = st.integers(0, 200)


def shuffled(counts: list[int], seed: int) -> np.ndarray:
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(seed).permutation(labels)


@settings(max_examples=300, deadline=None)
@given(sizes, takes, st.booleans())
def test_quotas_are_exact_and_in_proportion(counts, take, leave_one):
    counts = np.array(counts)
    quota = quotas(counts, take, leave_one=leave_one)
    room = np.maximum(counts - 1, 0) if leave_one else counts
    assert quota.sum() == min(take, room.sum())
    assert (quota >= 0).all()
    assert (quota <= room).all()
    share = counts * min(take, counts.sum()) / counts.sum()
    if (np.ceil(share) <= room).all():
        assert (np.abs(quota - share) < 1).all()


@settings(max_examples=200, deadline=None)
@given(sizes, takes, takes, st.integers(0, 2**32 - 1))
def test_smaller_choices_lie_within_greater_ones(counts, first, second, seed):
    labels = shuffled(counts, seed)
    rows = np.arange(len(labels)) * 3 + 1
    small, great = sorted((first, second))
    less, more = (stratified(labels, rows, take, seed, "p") for take in (small, great))
    assert less.sum() == min(small, len(labels))
    for label in range(len(counts)):
        a, b = (set(rows[mask & (labels == label)]) for mask in (less, more))
        assert a <= b or b <= a  # nested, class by class, up to the rounding of the quotas
    again = np.random.default_rng(1).permutation(len(labels))
    np.testing.assert_array_equal(stratified(labels[again], rows[again], small, seed, "p"), less[again])


@settings(max_examples=60, deadline=None)
@given(sizes, st.floats(0, 0.99), st.integers(1, 99), st.integers(1, 99), st.integers(0, 2**32 - 1))
def test_splits_are_disjoint_exact_and_the_same_every_time(counts, fraction, most, most_eval, seed):
    labels = shuffled(counts, seed).tolist()
    source = source_of(train=labels, test=labels[::-1])
    whole = splits_of(source, val_fraction=fraction, seed=seed)
    train, validation = (
        whole["train"].rows,
        whole["validation"].rows if "validation" in whole else np.array([]),
    )
    assert sorted([*train, *validation]) == list(range(len(labels)))
    room = sum(max(count - 1, 0) for count in counts)
    assert len(validation) == min(int(fraction * len(labels) + 0.5), room)
    assert set(np.array(labels)[train]) == set(labels)  # no class is emptied
    part = splits_of(source, val_fraction=fraction, seed=seed, max_train_samples=most, max_eval_samples=most_eval)
    assert len(part["train"].rows) == min(most, len(train))
    assert set(part["train"].rows) <= set(train)
    if "validation" in whole:
        assert len(part["validation"].rows) == min(most_eval, len(validation))
        assert set(part["validation"].rows) <= set(validation)
    assert len(part["test"].rows) == min(most_eval, len(labels))
    for role, split in part.items():
        assert (np.diff(split.rows) > 0).all()
        np.testing.assert_array_equal(np.array(labels if role != "test" else labels[::-1])[split.rows], split.labels)
    again = splits_of(source, val_fraction=fraction, seed=seed, max_train_samples=most, max_eval_samples=most_eval)
    assert {r: s.hash for r, s in part.items()} == {r: s.hash for r, s in again.items()}


def test_stratified_share_and_seed():
    source = source_of(train=[0] * 100 + [1] * 50 + [2] * 10)
    splits = splits_of(source)
    assert np.bincount(splits["validation"].labels).tolist() == [10, 5, 1]
    assert "test" not in splits
    other = splits_of(source, seed=1)
    assert set(other["validation"].rows) != set(splits["validation"].rows)
    assert other["validation"].hash != splits["validation"].hash
    assert "validation" not in splits_of(source, val_fraction=0.0)


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_the_own_validation_split_is_used_whole(name):
    splits = splits_of(source_of(**{"train": [0, 1] * 10, name: [0, 1], "extra": [0] * 9}))
    assert [(s.name, s.source, len(s.rows)) for s in splits.values()] == [
        ("train", "train", 20),
        ("validation", name, 2),
    ]


def test_an_only_split_is_train_unless_its_name_says_otherwise():
    assert set(splits_of(source_of(everything=[0, 1] * 10))) == {"train", "validation"}
    assert set(splits_of(source_of(test=[0, 1] * 10))) == {"test"}
    assert set(splits_of(source_of(validation=[0, 1] * 10))) == {"validation"}
    with pytest.raises(DataError, match="it has one, two"):
        splits_of(source_of(one=[0], two=[1]))


def test_a_class_with_one_image_stays_in_train():
    splits = splits_of(source_of(train=[0] * 20 + [1]), val_fraction=0.9)
    assert 20 in splits["train"].rows
    assert len(splits["validation"].rows) == 19
    assert "validation" not in splits_of(source_of(train=[0, 1, 2]), val_fraction=0.5)


def test_the_test_split_does_not_depend_on_train_settings():
    source = source_of(train=[0, 1] * 50, test=[0, 1] * 30)
    one = splits_of(source, max_eval_samples=10, seed=3)["test"]
    other = splits_of(source, max_eval_samples=10, seed=3, val_fraction=0.5, max_train_samples=7)["test"]
    np.testing.assert_array_equal(one.rows, other.rows)
    assert one.hash == other.hash


def test_the_hash_covers_split_rows_and_class_names():
    base = splits_of(source_of(test=[0, 1]))["test"].hash
    assert len(base) == 16
    assert splits_of(source_of(test=[0, 1]))["test"].hash == base
    assert splits_of(source_of(test=[1, 0]))["test"].hash != base
    assert splits_of(source_of(testing=[0, 1]))["test"].hash != base
    assert splits_of(source_of(test=[0, 1, 0]))["test"].hash != base
    source = source_of(test=[0, 1])
    renamed = Source(source.name, source.splits, ("a", "x", *source.labels[2:]), None)
    assert splits_of(renamed)["test"].hash != base


def test_manifest_is_json_with_the_ids():
    source = source_of(train=[0, 1] * 10, test=[0, 1])
    splits = splits_of(source, max_train_samples=4)
    document = json.loads(json.dumps(manifest(source, splits)))
    assert document["labels"] == list(NAMES)
    assert document["splits"]["train"]["ids"] == splits["train"].rows.tolist()
    assert document["splits"]["test"] == {
        "source": "test",
        "count": 2,
        "hash": splits["test"].hash,
        "ids": [0, 1],
    }


def test_ids_of_files_are_relative_paths(tmp_path):
    paths = [str(tmp_path / "cat" / f"{i}.png") for i in range(6)]
    raw = {"train": make_split(image_structs(None, paths), ["cat"] * 6, root=tmp_path)}
    assert isinstance(raw["train"], datasets.Dataset)
    source = Source("toy", *standardize(raw), None)
    assert manifest(source, splits_of(source, val_fraction=0))["splits"]["train"]["ids"][2] == "cat/2.png"
