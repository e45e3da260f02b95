"""The whole suite under other kernels, numbers of threads, orders and loads: it is green in each, or this exits with 1.

    python -m tests.kernels                          all settings, about an hour on two idle CPUs
    python -m tests.kernels busy tests/cli/test_app.py   one setting, and what else pytest is to be given
    python -m tests.kernels list                     the settings

Libraries choose their kernels by the processor, and round differently in each; these make them take others.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from typing import NamedTuple


class Setting(NamedTuple):
    """How a run of the suite differs from `make test`."""

    environment: dict[str, str]
    threads: int = 1
    shuffled: bool = False
    busy: int = 0  # loops beside it that do nothing but work


_LOWEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OPENBLAS_CORETYPE": "Nehalem",
           "MKL_CBWR": "COMPATIBLE"}  # fmt: skip
SETTINGS = {
    "aten-avx2": Setting({"ATEN_CPU_CAPABILITY": "avx2"}),
    "aten-default": Setting({"ATEN_CPU_CAPABILITY": "default"}, threads=2),
    "onednn-avx2": Setting({"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "openblas-haswell": Setting({"OPENBLAS_CORETYPE": "Haswell"}, threads=2),
    "lowest": Setting(_LOWEST),
    "shuffled": Setting({}, shuffled=True),
    "busy": Setting({}, threads=2, shuffled=True, busy=2),
}


def main() -> int:
    """Run the settings that are named, or all; a line for each at the end."""
    named = [word for word in sys.argv[1:] if word in SETTINGS]
    if sys.argv[1:] == ["list"]:
        print(*(f"{name}: {setting}" for name, setting in SETTINGS.items()), sep="\n")
        return 0
    words = [word for word in sys.argv[1:] if word not in SETTINGS]
    lines = {name: tried(SETTINGS[name], words) for name in named or SETTINGS}
    for name, (code, line) in lines.items():
        print(f"{name:16} {'green' if code == 0 else 'RED  '} {line}")
    return int(any(code for code, _ in lines.values()))


def tried(setting: Setting, words: list[str]) -> tuple[int, str]:
    """pytest's exit code, and its last line."""
    environment = os.environ | setting.environment | {"VITFT_TEST_THREADS": str(setting.threads)}
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "--timeout", "1800"]
    command += ["-n", "auto", "--dist", "worksteal", *words]  # as many workers as CPUs have such a number of threads
    if setting.shuffled:
        command += ["-p", "randomly", f"--randomly-seed={int(time.time())}"]
    print(*(f"{name}={value}" for name, value in setting.environment.items()), *command, flush=True)
    loops = [multiprocessing.Process(target=_work, daemon=True) for _ in range(setting.busy)]
    for loop in loops:
        loop.start()
    try:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as suite:
            assert suite.stdout is not None
            line = ""
            for line in suite.stdout:
                print(line, end="", flush=True)
    finally:
        for loop in loops:
            loop.kill()
    return suite.returncode, line.strip()


def _work() -> None:
    while True:
        sum(range(10**6))


if __name__ == "__main__":
    sys.exit(main())
