"""Tables of path and label, as people have them, and what has to come of each."""

from tests.data import Case, photos

FOUR = photos("0.png", "1.png", "2.png", "3.png")

CASES = [
    Case(
        "plain",
        FOUR | {"t.csv": "path,label\n0.png,cat\n1.png,dog\n2.png,cat\n3.png,dog\n"},
        "t.csv",
        {"train": {"cat": "0.png 2.png", "dog": "1.png 3.png"}},
    ),
    Case(
        "path-outside",
        FOUR | {"lists/t.csv": "path,label\n../0.png,cat\n../1.png,dog\n"},
        "lists/t.csv",
        error=("0.png leads out of", "--allow-outside"),
    ),
]
