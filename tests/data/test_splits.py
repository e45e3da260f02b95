"""Splits by each image's identity: disjoint, stratified and reproducible."""

import json
from dataclasses import replace
from hashlib import blake2b

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from vitft.data.sampling import HELD_OUT, OPEN, TEST, TRAIN, hold_out, quotas, stratified_sample
from vitft.data.sources.identity import content_hashes, ids, sample_names
from vitft.data.sources.schema import image_structs, make_split, standardize
from vitft.data.sources.source import Source
from vitft.data.split_record import read_record, restore_splits
from vitft.data.splits import make_splits, manifest
from vitft.errors import DataError

NAMES = ("a", "b", "c", "d", "e")
SETTINGS = {"val_fraction": 0.1, "max_train_samples": None, "max_eval_samples": None, "seed": 0}


def source_of(**splits: list[int]) -> Source:
    """A source of images without files, each with different bytes, with these labels."""
    raw = {}
    for name, labels in splits.items():
        data = pa.array([f"{name} {i}".encode() for i in range(len(labels))], pa.binary())
        raw[name] = make_split(image_structs(data), np.array(labels, np.int64), NAMES)
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
@given(sizes, takes)
def test_quotas_are_exact_and_proportional(counts, take):
    counts = np.array(counts)
    quota = quotas(counts, take)
    assert quota.sum() == min(take, counts.sum())
    assert (quota >= 0).all()
    assert (quota <= counts).all()
    proportional = counts * min(take, counts.sum()) / counts.sum()
    assert (np.abs(quota - proportional) < 1).all()


def drawn_keys(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 5]).integers(0, 2**64, count, np.uint64)


@settings(max_examples=200, deadline=None)
@given(sizes, takes, takes, st.integers(0, 2**32 - 1))
def test_smaller_samples_are_subsets_of_larger_ones(counts, first, second, seed):
    labels = shuffled(counts, seed)
    keys = drawn_keys(len(labels), seed)
    small, great = sorted((first, second))
    less, more = (stratified_sample(labels, keys, take, seed, "p") for take in (small, great))
    assert less.sum() == min(small, len(labels))
    for label in range(len(counts)):
        a, b = (set(keys[mask & (labels == label)]) for mask in (less, more))
        assert a <= b or b <= a  # nested within each class, up to the rounding of the quotas
    again = np.random.default_rng(1).permutation(len(labels))
    assert_array_equal(stratified_sample(labels[again], keys[again], small, seed, "p"), less[again])


class_sizes = st.lists(st.integers(1, 300), min_size=1, max_size=5)
fractions = st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9])


@settings(max_examples=400, deadline=None)
@given(class_sizes, fractions, st.floats(0.001, 0.5), st.integers(0, 2**32 - 1))
def test_adding_or_removing_images_moves_no_other(counts, fraction, part, seed):
    """Except an image that is the only one of its class in train or validation, before or after."""
    labels = shuffled(counts, seed)
    keys = drawn_keys(len(labels), seed)
    whole = hold_out(labels, keys, fraction, seed, "validation")
    left = np.random.default_rng(seed).random(len(labels)) >= part
    fewer = hold_out(labels[left], keys[left], fraction, seed, "validation")
    for row in np.flatnonzero(whole[left] != fewer):
        mine = labels[left][row]
        sides = [(fewer, labels[left]), (whole, labels)]
        alone = [int((mask[of == mine] == side).sum()) == 1 for mask, of in sides for side in (True, False)]
        assert any(alone), (counts, fraction, mine)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(200, 600), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_one_percent_more_or_fewer_images_move_none_of_large_classes(counts, seed):
    labels = shuffled(counts, seed)
    keys = drawn_keys(len(labels), seed)
    order = np.random.default_rng(seed).permutation(len(labels))
    left = np.sort(order[len(labels) // 100 :])
    whole = hold_out(labels, keys, 0.1, seed, "validation")
    assert_array_equal(whole[left], hold_out(labels[left], keys[left], 0.1, seed, "validation"))


@settings(max_examples=100, deadline=None)
@given(class_sizes, fractions, st.integers(0, 2**32 - 1))
def test_the_fraction_is_kept_and_no_class_is_emptied(counts, fraction, seed):
    labels = shuffled(counts, seed)
    out = hold_out(labels, drawn_keys(len(labels), seed), fraction, seed, "validation")
    expected = fraction * len(labels)
    # Six standard deviations of a binomial, and the one image that each class may give or keep.
    assert abs(out.sum() - expected) <= 6 * np.sqrt(expected * (1 - fraction)) + len(counts)
    for label, count in enumerate(counts):
        mine = out[labels == label]
        assert not mine.all()
        assert mine.any() or count == 1 or count * fraction < 1


def test_duplicates_are_on_the_same_side():
    labels = np.repeat([0, 1, 2], [300, 7, 2])
    keys = np.repeat(drawn_keys(155, 0), 2)[: len(labels)]
    keys[-2:] = 7  # a class of one image, twice
    out = hold_out(labels, keys, 0.5, 0, "validation")
    assert not out[-2:].any()
    for key in set(keys.tolist()):
        assert len(set(out[keys == key].tolist())) == 1


def test_fixed_sides_are_kept_and_the_rest_is_drawn_as_before():
    labels, keys = np.repeat([0, 1], 200), drawn_keys(400, 1)
    sides = np.full(400, OPEN, np.int8)
    sides[:50], sides[50:70] = TRAIN, HELD_OUT
    out = hold_out(labels, keys, 0.3, 0, "validation", sides)
    assert not out[:50].any()
    assert out[50:70].all()
    assert_array_equal(out[70:], hold_out(labels, keys, 0.3, 0, "validation")[70:])
    assert not hold_out(labels, keys, 0.3, 0, "validation", np.full(400, TRAIN, np.int8)).any()


@pytest.mark.parametrize(("own", "fraction", "held"), [(True, 0.1, 2), (True, 0, 0), (False, 0, 0)])
def test_held_out_images_are_not_trained_on_unless_val_fraction_is_zero(own, fraction, held):
    source = source_of(train=[0, 1] * 10, **({"validation": [0, 1]} if own else {}))
    sides = {"train": np.repeat([HELD_OUT, TRAIN], [2, 18]).astype(np.int8)}
    assert splits_of(source, val_fraction=fraction, sides=sides)["train"].rows.tolist() == [*range(held, 20)]


def test_a_test_split_is_drawn_from_train_before_validation():
    source = source_of(train=[0] * 1000 + [1] * 500 + [2] * 10)
    splits = splits_of(source, test_fraction=0.2)
    assert {role: split.name for role, split in splits.items()} == {name: name for name in splits}
    assert {split.source for split in splits.values()} == {"train"}
    assert sorted(row for split in splits.values() for row in split.rows) == list(range(1510))
    assert np.bincount(splits["test"].labels).tolist() == pytest.approx([200, 100, 2], rel=0.5)
    assert np.bincount(splits["validation"].labels)[:2].tolist() == pytest.approx([80, 40], rel=0.5)
    assert set(splits_of(source, test_fraction=0.2, val_fraction=0.0)) == {"train", "test"}
    others = splits_of(source, test_fraction=0.2, val_fraction=0.5)
    assert others["test"].hash == splits["test"].hash  # whatever is held out for validation
    assert splits_of(source, test_fraction=0.2, seed=1)["test"].hash != splits["test"].hash
    # Who is in validation does not follow from who is in test: with one draw for both, it would be empty.
    before = set(splits_of(source)["validation"].rows)
    assert 0 < len(before & set(splits["test"].rows)) < len(before) / 2


def test_a_test_split_of_its_own_is_used_completely():
    splits = splits_of(source_of(train=[0, 1] * 10, test=[0, 1]), test_fraction=0.5)
    assert (splits["test"].source, len(splits["test"].rows)) == ("test", 2)


@pytest.mark.parametrize("val_fraction", [0.0, 0.3])
@pytest.mark.parametrize("test_fraction", [0.0, 0.4])
@pytest.mark.parametrize("own", [True, False])
def test_what_an_earlier_run_was_tested_on_stays_that(own, test_fraction, val_fraction):
    source = source_of(train=[0, 1] * 50, **({"test": [0, 1]} if own else {}))
    sides = {"train": np.repeat([TRAIN, HELD_OUT, TEST, OPEN], [40, 20, 10, 30]).astype(np.int8)}
    splits = splits_of(source, test_fraction=test_fraction, val_fraction=val_fraction, sides=sides)
    trained, tested = ({*splits[role].rows.tolist()} for role in ("train", "test"))
    assert trained >= set(range(40))
    if not own:
        assert set(range(60, 70)) <= tested <= set(range(60, 100))  # neither trained on nor chosen by
        assert (len(tested) > 10) == (test_fraction > 0)
    if val_fraction:
        held_out = {*splits["validation"].rows.tolist()}
        assert set(range(40, 60)) <= held_out <= set(range(40, 100))
        assert not trained & set(range(40, 70))
        assert (set(range(60, 70)) <= held_out) == own


@settings(max_examples=60, deadline=None)
@given(sizes, st.floats(0, 0.99), st.integers(1, 99), st.integers(1, 99), st.integers(0, 2**32 - 1))
def test_splits_are_disjoint_and_reproducible(counts, fraction, most, most_eval, seed):
    labels = shuffled(counts, seed).tolist()
    source = source_of(train=labels, test=labels[::-1])
    whole = splits_of(source, val_fraction=fraction, seed=seed)
    train, validation = (whole["train"].rows, whole["validation"].rows if "validation" in whole else np.array([]))
    assert sorted([*train, *validation]) == list(range(len(labels)))
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
        assert_array_equal(np.array(labels if role != "test" else labels[::-1])[split.rows], split.labels)
    again = splits_of(source, val_fraction=fraction, seed=seed, max_train_samples=most, max_eval_samples=most_eval)
    assert {r: s.hash for r, s in part.items()} == {r: s.hash for r, s in again.items()}


def test_fraction_and_seed():
    source = source_of(train=[0] * 1000 + [1] * 500 + [2] * 10)
    splits = splits_of(source)
    assert np.bincount(splits["validation"].labels).tolist() == pytest.approx([100, 50, 1], rel=0.3)
    assert "test" not in splits
    other = splits_of(source, seed=1)
    assert set(other["validation"].rows) != set(splits["validation"].rows)
    assert other["validation"].hash != splits["validation"].hash
    assert "validation" not in splits_of(source, val_fraction=0.0)


def test_a_sample_of_a_grown_dataset_is_nearly_the_same():
    labels, keys = shuffled([500, 300, 200], 0), drawn_keys(1010, 0)
    few = stratified_sample(labels, keys[:1000], 200, 0, "train sample")
    more = stratified_sample(np.append(labels, [0, 1, 2] * 3 + [0]), keys, 200, 0, "train sample")
    assert (few & more[:1000]).sum() >= 194


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_an_existing_validation_split_is_used_completely(name):
    splits = splits_of(source_of(**{"train": [0, 1] * 10, name: [0, 1], "extra": [0] * 9}))
    assert [(s.name, s.source, len(s.rows)) for s in splits.values()] == [
        ("train", "train", 20),
        ("validation", name, 2),
    ]


def test_a_single_split_is_train_unless_named_otherwise():
    assert set(splits_of(source_of(everything=[0, 1] * 10))) == {"train", "validation"}
    assert set(splits_of(source_of(test=[0, 1] * 10))) == {"test"}
    assert set(splits_of(source_of(validation=[0, 1] * 10))) == {"validation"}
    with pytest.raises(DataError, match="it has one, two"):
        splits_of(source_of(one=[0], two=[1]))


def test_a_class_with_one_image_stays_in_train():
    splits = splits_of(source_of(train=[0] * 20 + [1]), val_fraction=0.9)
    assert 20 in splits["train"].rows
    assert len(splits["validation"].rows) >= 10
    assert "validation" not in splits_of(source_of(train=[0, 1, 2]), val_fraction=0.9)


def test_a_small_dataset_has_a_validation_image():
    for seed in range(40):
        assert len(splits_of(source_of(train=[0, 1] * 4), seed=seed)["validation"].rows) >= 1


def test_the_test_split_does_not_depend_on_train_settings():
    source = source_of(train=[0, 1] * 50, test=[0, 1] * 30)
    first = splits_of(source, max_eval_samples=10, seed=3)["test"]
    other = splits_of(source, max_eval_samples=10, seed=3, val_fraction=0.5, max_train_samples=7)["test"]
    assert_array_equal(first.rows, other.rows)
    assert first.hash == other.hash


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


def test_manifest_is_json_with_ids():
    source = source_of(train=[0, 1] * 10, test=[0, 1])
    splits = splits_of(source, max_train_samples=4)
    document = json.loads(json.dumps(manifest(source, splits)))
    assert document["labels"] == list(NAMES)
    assert document["revision"] is None
    assert manifest(replace(source, revision="0" * 40), splits)["revision"] == "0" * 40
    assert document["images"] == {"train": 20, "test": 2}
    assert document["splits"]["train"]["ids"] == splits["train"].ids
    assert document["splits"]["test"] == {
        "source": "test", "count": 2, "hash": splits["test"].hash, "ids": ids(source.splits["test"], np.arange(2)),
        "by": "content", "classes": [1, 1, 0, 0, 0],
    }  # fmt: skip
    assert document["splits"]["train"]["classes"] == [2, 2, 0, 0, 0]
    noted = manifest(replace(source, decisions=("read so",), warnings=("one left out",)), splits)
    assert (noted["decisions"], noted["warnings"]) == (["read so"], ["one left out"])
    assert all(len(name) == 16 for name in document["splits"]["test"]["ids"])


@pytest.mark.parametrize("moved", [False, True])
def test_recorded_images_are_restored_each_in_its_own_row(tmp_path, moved):
    def opened(**splits):
        made = {
            n: make_split(image_structs(pa.array(cells, pa.binary())), ["a"] * len(cells))
            for n, cells in splits.items()
        }
        return Source("made", *standardize(made), None)

    began = opened(train=[b"1", b"2", b"1", b"3"], test=[b"4"])
    (tmp_path / "splits.json").write_text(json.dumps(manifest(began, splits_of(began, val_fraction=0))))
    record = read_record(tmp_path)
    assert {role: split.rows.tolist() for role, split in restore_splits(record, began, moved=moved).items()} == {
        "train": [0, 1, 2, 3], "test": [0],
    }  # fmt: skip
    later = restore_splits(record, opened(train=[b"3", b"1", b"5", b"2"], test=[b"6"]), moved=moved)
    assert {role: split.rows.tolist() for role, split in later.items()} == {"train": [1, 3, 1, 0]}


def test_ids_of_files_are_relative_paths(tmp_path):
    paths = [str(tmp_path / "cat" / f"{i}.png") for i in range(6)]
    raw = {"train": make_split(image_structs(None, paths), ["cat"] * 6, root=tmp_path)}
    assert isinstance(raw["train"], datasets.Dataset)
    source = Source("toy", *standardize(raw), None)
    assert manifest(source, splits_of(source, val_fraction=0))["splits"]["train"]["ids"][2] == "cat/2.png"


def test_content_hashes_are_the_same_for_files_and_bytes(tmp_path):
    large = np.random.default_rng(0).bytes(300_000)
    other = large[:150_000] + b"?" + large[150_001:]  # one byte, in the middle
    cells = [b"small", b"", large, other, large + b"!", b"small", large[:65_536], large[:65_537]]
    paths = []
    for number, cell in enumerate(cells):
        (tmp_path / f"{number}.png").write_bytes(cell)
        paths.append(str(tmp_path / f"{number}.png"))
    files = make_split(image_structs(None, paths), ["a"] * 8, root=tmp_path)
    in_table = make_split(image_structs(pa.array(cells, pa.binary())), ["a"] * 8)
    rows = np.arange(8)
    hashes = content_hashes(in_table, rows)
    assert hashes == content_hashes(files, rows)
    assert len(set(hashes)) == 7
    assert hashes[0] == hashes[5]
    for number, cell in enumerate(cells):  # as recorded by earlier runs
        pieces = [cell] if len(cell) <= 65_536 else [cell[:16_384], cell[len(cell) // 2 :][:16_384], cell[-16_384:]]
        hashed = blake2b(len(cell).to_bytes(8, "little") + b"".join(pieces), digest_size=8)
        assert hashes[number] == hashed.digest()[::-1].hex()
    assert content_hashes(in_table, rows[::-1]) == hashes[::-1]
    assert content_hashes(in_table.select([4, 2]), np.array([1, 0])) == [hashes[2], hashes[4]]
    (tmp_path / "0.png").unlink()
    assert content_hashes(files, rows)[0] != hashes[0]  # its reader reports the error
    assert ids(files, rows)[:2] == ["0.png", "1.png"]


def test_ids_are_normalized_unicode(tmp_path):
    names = [str(tmp_path / name) for name in ("caf\u00e9.png", "cafe\u0301.png")]
    files = make_split(image_structs(None, names), ["a"] * 2, root=tmp_path)
    assert len(set(ids(files, np.arange(2)))) == 1
    assert len(set(sample_names(files, np.arange(2)))) == 2  # people need the name as it is


@pytest.mark.parametrize("kept", [[2, 3, 4], [0, 1], [5], [4, 1]])
def test_rows_keep_their_numbers_in_any_selection(kept):
    """For adjacent rows, datasets makes a slice, which does not record where it was taken from."""
    split = source_of(train=[0, 1] * 3).splits["train"]
    assert sample_names(split.select(kept), np.arange(len(kept))) == [f"row {row}" for row in kept]
