"""Folders and parquet files, as people have them, and what has to come of each."""

from tests.data import Case, photos

CASES = [
    Case(
        "class-folders",
        photos("cat/0.png", "cat/1.png", "dog/0.png"),
        ".",
        {"train": {"cat": "cat/0.png cat/1.png", "dog": "dog/0.png"}},
    ),
]
