"""Each contract broken once, on a copy of the project: some test must notice.

A patch's first line names its contract, the second the tests that must fail: `# tests: tests/test_x.py -k word`.
Exits 1 if a mutant survives, or if a patch no longer applies.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "runs", "*_cache", "__pycache__")
HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent


def main() -> int:
    wanted = sys.argv[1:]
    patches = [patch for patch in sorted(HERE.glob("*.patch")) if not wanted or patch.stem in wanted]
    survived = [patch.stem for patch in patches if not caught(patch)]
    print(f"{len(patches) - len(survived)} of {len(patches)} mutants caught", *survived)
    return 1 if survived or not patches else 0


def caught(patch: Path) -> bool:
    contract, tests = (line.removeprefix("# ") for line in patch.read_text().splitlines()[:2])
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(PROJECT, copy, ignore=LEFT_OUT)
        command = [sys.executable, "-m", "pytest", "-x", "-q", *shlex.split(tests.removeprefix("tests: "))]
        # The copy comes before the installed package.
        how = {"cwd": copy, "capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": str(copy)}}
        if subprocess.run(command, **how).returncode:
            print(f"{patch.stem}: its tests fail without it")
            return False
        applied = subprocess.run(
            ["patch", "-p1", "--fuzz=2", "-i", str(patch)], cwd=copy, capture_output=True, text=True
        )
        if applied.returncode:
            print(f"{patch.stem}: does not apply: {applied.stdout.strip()}")
            return False
        done = subprocess.run(command, **how)
    verdict = done.returncode == 1
    print(f"{'caught  ' if verdict else 'SURVIVED'} {patch.stem}: {contract}", flush=True)
    if done.returncode > 1:
        print(done.stdout[-500:], done.stderr[-500:])
    return verdict


if __name__ == "__main__":
    sys.exit(main())
