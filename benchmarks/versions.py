"""The speed of two checkouts of vitft in turns: that nothing became slower.

    git worktree add --detach OLD_CHECKOUT COMMIT
    python benchmarks/versions.py OLD_CHECKOUT --dataset CIFAR10_FOLDER --model VIT_S14_FOLDER --image-size 98
    python benchmarks/versions.py OLD_CHECKOUT --photos 600 --only data     # JPEGs of 500x375, made for this

Every figure is of `vitft bench` in a process of its own: images a second, the best median of `--rounds`, old and new in
turns. Prints a table, and ends with 1 if a figure is worse than `--least` times the old one.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers import hidden, machine, table
from photos import make_photos

MIX = ["--augment", "trivial", "--mixup", "0.2", "--erase", "0.25"]
ROWS = {
    "data, resize": ["data", "--augment", "none"],
    "data, crops": ["data", "--augment", "crop"],
    "data, TrivialAugment, mixup and erasing": ["data", *MIX],
    "train, flips": ["train"],
    "train, crops": ["train", "--augment", "crop"],
    "train, a linear probe": ["train", "--freeze", "backbone"],
    "eval": ["eval"],
}
CHECKOUT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Measure in turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the other checkout")
    parser.add_argument("--new", type=Path, default=CHECKOUT, help="by default the one that this file is in")
    parser.add_argument("--dataset", default="digits", help="as for `vitft train`")
    parser.add_argument("--photos", type=int, help="in place of a dataset: this many photos, made now")
    parser.add_argument("--model", default="vit-micro", help="as for `vitft bench`; a preset has no linear probe")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=2000, help="at most, of the training split")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name holds one of these")
    parser.add_argument("--least", type=float, default=0.95)
    given = parser.parse_args()
    if not any(word in name for name in ROWS for word in given.only):
        parser.error(f"--only {' '.join(given.only)}: no such row; there are {', '.join(ROWS)}")
    for name in ("dataset", "model"):  # Python runs in another folder
        if Path(getattr(given, name)).exists():
            setattr(given, name, str(Path(getattr(given, name)).resolve()))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if given.photos:
            make_photos(folder / "photos", given.photos, 500, 375)
            given.dataset = str(folder / "photos")
        best: dict[str, dict[str, float]] = {}
        for turn in range(given.rounds):
            for name, words in ROWS.items():
                if any(word in name for word in given.only):
                    sides = [("old", given.old), ("new", given.new)]
                    for side, checkout in sides[:: 1 if turn % 2 == 0 else -1]:
                        for row, rate in rates(name, bench(checkout, words, given, folder)).items():
                            known = best.setdefault(row, {})
                            known[side] = max(rate, known.get(side, 0.0))
                    print(f"round {turn + 1}: {name}", file=sys.stderr, flush=True)
    words = shlex.join(hidden(word) for word in sys.argv[1:])
    commits = ", ".join(f"{side} {commit(checkout)}" for side, checkout in (("old", given.old), ("new", given.new)))
    print(f"`python benchmarks/versions.py {words}`; {commits}; {machine()}.\n")
    ratios = {name: sides["new"] / sides["old"] for name, sides in best.items()}
    rows = [
        [name, *(f"{best[name][side]:,.1f}" for side in ("old", "new")), f"{ratio:.2f}"]
        for name, ratio in ratios.items()
    ]
    print(table(["images/s", "old", "new", "ratio"], rows))
    return int(min(ratios.values()) < given.least)


def rates(name: str, found: dict[str, Any]) -> dict[str, float]:
    """The figures of a row: images a second of its steps, and of decoding."""
    decoding = {"decoding": found["decode_images_per_s"]} if name == "data, resize" else {}
    return decoding | {name: found["images_per_s"]["median"]}


def bench(checkout: Path, words: list[str], given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What `vitft bench` of a checkout finds."""
    flags = {
        "dataset": given.dataset, "model": given.model, "batch-size": given.batch_size, "device": given.device,
        "max-train-samples": given.images, "steps": given.steps,
    }  # fmt: skip
    flags |= {"image-size": given.image_size} if given.image_size else {}
    given_words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return json.loads(run(checkout, ["-m", "vitft", "bench", *words, *given_words, "--json"], folder))


def run(checkout: Path, words: list[str], folder: Path) -> str:
    """What Python prints with a checkout's vitft, or the end of the program if it fails."""
    with tempfile.TemporaryDirectory() as cache:  # else one would read what the other has decoded
        environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "VITFT_CACHE": cache}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(words)}: {done.stderr.strip()[-500:]}")
    return done.stdout


def commit(checkout: Path) -> str:
    """Its commit, and that it is the one that runs."""
    used = Path(run(checkout, ["-c", "import vitft; print(vitft.__file__)"], Path(tempfile.gettempdir())).strip())
    assert used.is_relative_to(checkout.resolve()), f"Python runs {used}, not {checkout}"
    words = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
