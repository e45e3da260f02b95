"""Every dataset in `tests/corpus` is opened or refused as specified there."""

from collections import Counter

import numpy as np
import pytest

from tests.corpus import Case, folders, listed, tables
from vitft.data.decoder import encoded, header
from vitft.data.sources.identity import sample_names
from vitft.data.sources.source import class_indices, open_dataset
from vitft.errors import VitftError

CASES = [*tables.CASES, *folders.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_dataset_is_read_as_intended_or_refused_in_one_line(case: Case, tmp_path) -> None:
    dataset = case.write(tmp_path)
    if case.error:
        with pytest.raises(VitftError) as caught:
            open_dataset(dataset, **case.options)
        message = str(caught.value)
        assert "\n" not in message
        assert [text for text in listed(case.error) if text not in message] == [], message
        return
    source = open_dataset(dataset, **case.options)
    found: dict[str, dict[str, list[str]]] = {}
    for name, split in source.splits.items():
        classes = found.setdefault(str(name), {})
        rows = np.arange(len(split))
        for label, image in zip(class_indices(split), sample_names(split, rows), strict=True):
            classes.setdefault(source.labels[label], []).append(image)
        for row in [] if "do not exist" in str(case.warned) else rows:
            header(encoded(split[int(row)]["image"]))  # the file is there, and is an image
    told = "; ".join([f"decided: {one}" for one in source.decisions] + [f"warned: {one}" for one in source.warnings])
    assert {name: {label: _as_said(images, case.splits.get(name, {}).get(label)) for label, images in classes.items()}
            for name, classes in found.items()} == case.splits, told  # fmt: skip
    for text in listed(case.decided):
        assert any(text in sentence for sentence in source.decisions), told
    for text in listed(case.warned):
        assert any(text in sentence for sentence in source.warnings), told
    assert case.warned or not source.warnings, told


def _as_said(images: list[str], said: object) -> object:
    """The images in the form that the case uses."""
    if isinstance(said, tuple):
        return tuple(images)
    return " ".join(images) if isinstance(said, str) else len(images)


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []
    assert all(case.splits or case.error for case in CASES)
