"""`vitft bench`: figures that hang together, of the real loader, the real step and the real forward pass."""

import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from torch.autograd import DeviceType
from torch.profiler import record_function
from typer.testing import CliRunner

from vitft.cli.app import app
from vitft.cli.tables import _profile_table
from vitft.data.loader import TrainLoader
from vitft.data.stores.lazy_store import LazyStore
from vitft.hardware.device import peak_flops
from vitft.hardware.timers import DataWait, Stopwatch
from vitft.spec import PRESETS, total, training_flops
from vitft.training.cost.profiling import _summary

SMALL = ["--batch-size", "8", "--max-train-samples", "40", "--device", "cpu", "--precision", "fp32", "--steps", "3"]
MICRO = PRESETS["vit-micro"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "vitft.training.cost.bench.peak_flops", lambda device, precision: peak_flops(device, precision, 0.05)
    )


def measured(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", *words, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if code == 0 else result.output


def assert_spread(spread: dict[str, float]) -> None:
    assert 0 <= spread["min"] <= spread["median"] <= spread["max"]


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("data", ["wait", "transfer", "augment"]),
        ("train", ["wait", "transfer", "augment", "forward", "backward", "optimizer"]),
        ("eval", ["wait", "forward"]),
    ],
)
def test_rates_and_parts_of_a_step(what: str, parts: list[str]) -> None:
    found = measured(what, *SMALL)
    assert list(found["ms_per_step"]) == parts
    for spread in (found["images_per_s"], *found["ms_per_step"].values()):
        assert_spread(spread)
    assert found["images_per_s"]["min"] > 0
    assert found["peak_memory_bytes"]["process"] > 1e8
    assert found["peak_memory_bytes"]["device"] is None
    assert found["settings"]["batch_size"] == 8
    assert found["environment"]["versions"]["torch"] == importlib.metadata.version("torch")


@pytest.mark.parametrize(
    ("what", "flops"), [("train", training_flops(MICRO, 8)), ("eval", total(MICRO, 8).flops)]
)  # fmt: skip
def test_flops_are_the_specs_over_the_measured_time(what: str, flops: int) -> None:
    found = measured(what, *SMALL)
    step_s = 8 / found["images_per_s"]["median"]
    assert found["flops_per_s"] == pytest.approx(flops / step_s)
    share = found["flops_per_s"] / found["peak_flops_per_s"]
    assert found["mfu"] == (
        pytest.approx(share) if share <= 1 else None
    )  # above it, the peak was measured beside others
    assert 0 <= found["data_wait"] < 1


@pytest.mark.parametrize("what", ["data", "train"])
def test_a_large_split_is_read_as_in_training_once_it_is_decoded(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitft.data.stores.lazy_store.SMALL", 99)
    begin, kept = TrainLoader.__init__, []

    def began(loader: TrainLoader, store: LazyStore, *rest: Any, **more: Any) -> None:
        kept.append(store._kept.images)
        begin(loader, store, *rest, **more)

    monkeypatch.setattr(TrainLoader, "__init__", began)
    assert measured(what, *SMALL, "--max-train-samples", "100")["decode_images_per_s"] > 0
    assert kept == [100]


def test_a_preset_has_random_weights_and_a_probe_no_flops() -> None:
    found = measured("eval", *SMALL, "--model", "vit-tiny", "--image-size", "32")
    assert (found["settings"]["model"], found["settings"]["image_size"]) == ("vit-tiny", 32)
    probe = measured("train", *SMALL, "--freeze", "backbone")
    assert probe["mfu"] is None
    assert "augment" not in probe["ms_per_step"]
    assert measured("train", *SMALL, "--freeze", "backbone", "--augment", "crop")["mfu"] is None


def test_it_is_shown_to_people_too(tmp_path: Path) -> None:
    words = ["bench", "train", *SMALL, "--profile", str(tmp_path / "trace.json")]
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, words).stdout
    assert "images/s" in shown
    assert "of a large fp32 product here" in shown
    assert "backward" in shown
    assert re.search(r"aten::\w+ +[\d.]+ +\d+ +[\d.]+ %", shown)
    assert re.search(r"operators a step; idle [\d.]+ % of the time", shown)
    assert max(map(len, shown.splitlines())) <= 80
    one = {"name": "void at::native::elementwise_kernel<128, 4, " * 9, "ms": 12.5, "launches": 12345, "share": 1.0}
    console = Console(width=80, file=io.StringIO())
    console.print(_profile_table({"of": "kernels", "longest": [one], "launches": 1.0, "idle": 0.1, "waits": 2.0}))
    shown = console.file.getvalue()
    assert "12,345  100.0 %" in shown
    assert "the host waits for the GPU 2 times a step\n" in shown
    assert shown.count("\n") == 6


def test_a_profile_has_the_longest_operators_of_the_step_that_training_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def marked(module: Any) -> Any:
        def forward(**inputs: Any) -> Any:
            with record_function("the compiled model"):
                return module(**inputs)

        return forward

    monkeypatch.setattr("vitft.training.step.compiled", marked)
    trace = tmp_path / "trace.json"
    found = measured("train", *SMALL, "--compile", "on", "--profile", str(trace))["profile"]
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("the compiled model") == found["steps"]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    assert (found["of"], found["waits"], len(found["longest"])) == ("operators", None, 12)
    for one in found["longest"]:  # the trace has those that only pass a call on to their like twice, the table once
        assert names.count(one["name"]) >= one["launches"] * found["steps"]
    shares = [one["share"] for one in found["longest"]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1 + 1e-9
    assert found["launches"] > sum(one["launches"] for one in found["longest"])
    assert 0 <= found["idle"] < 1


def test_the_profiler_writes_no_lines_of_its_own(tmp_path: Path) -> None:
    """In a new process: Kineto reads its level of logging once, and another test may have used it by then."""
    code = (
        "import sys, torch; from pathlib import Path; from vitft.training.cost.profiling import profiled; "
        "profiled(lambda: torch.ones(2) + 1, 'cpu', Path(sys.argv[1]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "trace.json")], env=environment, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@dataclass
class Seen:
    """An event as the profiler reports it; times are in microseconds."""

    name: str
    start: float
    end: float
    device_type: DeviceType = DeviceType.CUDA

    @property
    def time_range(self) -> Any:
        return SimpleNamespace(start=self.start, end=self.end)

    @property
    def self_device_time_total(self) -> float:
        return self.end - self.start


def test_kernels_of_a_gpu_their_gaps_and_what_the_host_waits() -> None:
    host = DeviceType.CPU
    events = [
        Seen("gemm", 1000, 1400), Seen("Memcpy HtoD", 1300, 1500), Seen("gemm", 1700, 2000), Seen("norm", 2000, 2100),
        Seen("Optimizer.step#AdamW.step", 900, 5000),  # a mark
        Seen("aten::mm", 0, 50, host), Seen("cudaStreamSynchronize", 60, 70, host),
        Seen("cudaDeviceSynchronize", 80, 3000, host),
    ]  # fmt: skip
    found = _summary(events, 2, on_gpu=True)
    assert (found["of"], found["launches"], found["waits"]) == ("kernels", 2, 0.5)
    assert found["ms"] == pytest.approx(1.1 / 2)
    assert found["idle"] == pytest.approx(200 / 1100)  # from 1,500 to 1,700
    assert [(one["name"], one["launches"]) for one in found["longest"]] == [
        ("gemm", 1), ("Memcpy HtoD", 0.5), ("norm", 0.5)
    ]  # fmt: skip
    assert [one["share"] for one in found["longest"]] == pytest.approx([0.7, 0.2, 0.1])
    assert found["longest"][0]["ms"] == pytest.approx(0.35)
    assert _summary([], 2, on_gpu=True)["longest"] == []


def test_a_trace_that_cannot_be_written_loses_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a full disk, the profiler logs that, raises no error, and leaves this.
    export = lambda self, file: Path(f"{file}.tmp").write_text("half")  # noqa: E731
    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", export)
    trace = tmp_path / "trace.json"
    result = CliRunner().invoke(app, ["bench", "train", *SMALL, "--json", "--profile", str(trace)])
    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert found["images_per_s"]["median"] > 0
    assert found["profile"]["trace"] is None
    assert found["profile"]["longest"]
    assert f"no trace: {trace}: could not be written" in result.stderr
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_measured_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--profile works only with `vitft bench train`" in measured(
        "data", *SMALL, "--profile", "trace.json", code=2
    )
    Path("folder.json").mkdir()
    for name in ("trace.txt", "nowhere/trace.json", "folder.json"):
        refused = measured("train", *SMALL, "--profile", name, code=2)
        assert f"--profile {name}: give a .json file in a folder that exists." in refused
    assert "has 40 training images; take fewer" in measured("train", *SMALL, "--batch-size", "64", code=2)
    assert "did you mean" in measured("data", *SMALL, "--model", "vit-tinny", code=4)
    assert measured("nothing", code=2)
    frozen = measured("train", *SMALL, "--freeze", "backbone", "--model", "vit-tiny", code=2)
    assert "vit-tiny is a shape with random weights" in frozen


def test_a_stopwatch_gives_each_part_its_own_time() -> None:
    clock = Stopwatch("cpu")
    for name in ("forward", "backward", "forward"):
        with clock.part(name):  # type: ignore[arg-type]
            sum(range(20_000 if name == "forward" else 10))
    assert set(clock.seconds) == {"forward", "backward"}
    assert clock.seconds["forward"] > clock.seconds["backward"] > 0


def test_what_steps_wait_for_their_input_adds_up_and_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 1.5, 7.0, 7.25, 9.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    wait = DataWait("cpu")
    for _ in range(2):
        with wait:
            pass
    assert [wait.seconds, wait.seconds] == [0.75, 0.75]
    with suppress(KeyError), wait:  # an input that is broken off
        raise KeyError
    assert wait.seconds == 1.75
