"""The same targets by atheris, which looks for inputs that reach new code; `pip install atheris` first.

python -m tests.fuzz.guided recipes --seconds 600
"""

import argparse
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import atheris

from tests.fuzz.targets import TARGETS

READERS = [
    "yaml",
    "PIL",
    "json",
    "csv",
    "vitft.config.recipe",
    "vitft.config.base",
    "vitft.config.train",
    "vitft.data",
    "vitft.checkpoints.metadata",
]


def main() -> None:
    """Ends with atheris' own exit code: not 0 where anything but the right error came out."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guided", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, corpus = Path(folder) / "work", Path(folder) / "corpus"
        work.mkdir()
        corpus.mkdir()
        with atheris.instrument_imports(include=READERS):
            target = TARGETS[given.target](work, Counter())
        names = list(target.seeds)
        for number, data in enumerate(target.seeds.values()):  # the first byte says which seed's name it has
            (corpus / str(number)).write_bytes(bytes([number]) + data)
            with suppress(target.refusal):  # imports are no hang
                target.read(names[number], data)

        def one(data: bytes) -> None:
            if data:
                with suppress(target.refusal):
                    target.read(names[data[0] % len(names)], data[1:])

        limits = [f"-max_total_time={given.seconds}", "-timeout=10", "-rss_limit_mb=2000", "-max_len=200000"]
        atheris.Setup([sys.argv[0], *limits, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
