"""A folder of as many images as you like, for `vitft train --dataset FOLDER`: hard links to a thousand files.

python benchmarks/growth.py FOLDER --images 1000000 --classes 1000 [--photos]

Images are JPEGs of 32 x 32, with --photos of 500 x 375 pixels. The disk needs room for as many names, not for as many
images.
"""

import argparse
import os
import tempfile
from pathlib import Path

from photos import make_photos

FILES = 1000


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--photos", action="store_true")
    given = parser.parse_args()
    for number in range(given.classes):
        (given.folder / f"class{number:05}").mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=given.folder.parent) as scratch:
        make_photos(Path(scratch), FILES, *((500, 375) if given.photos else (32, 32)))
        files = sorted(Path(scratch).rglob("*.jpg"))
        for number in range(given.images):
            os.link(files[number % FILES], given.folder / f"class{number % given.classes:05}" / f"{number:07}.jpg")


if __name__ == "__main__":
    main()
