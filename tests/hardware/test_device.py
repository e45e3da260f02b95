"""The choice of device, precision, attention and threads, and the recorded environment."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
import torch

from vitft import TrainConfig, __version__, evaluate, predict
from vitft.errors import UsageError
from vitft.hardware import device as devices
from vitft.hardware.device import find_attention, find_precision, on_host


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_cpus_respects_the_affinity_of_the_process() -> None:
    code = """if True:
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from vitft.hardware.device import cpus
        print(cpus())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_eager_attention_is_chosen_for_few_tokens_on_a_cpu() -> None:
    assert find_attention("auto", "cpu", 50) == "eager"
    assert find_attention("auto", "cpu", 1025) == "sdpa"
    assert find_attention("auto", "cuda", 50) == "sdpa"
    assert find_attention("auto", "cpu", None) is None  # a model without a stage table keeps its own
    assert find_attention("sdpa", "cpu", 50) == "sdpa"


@pytest.mark.parametrize(
    ("device", "asked", "allowed"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_deterministic_kernels_are_required_only_on_a_gpu_and_during_the_run(
    monkeypatch: pytest.MonkeyPatch, device: str, asked: bool, allowed: bool
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    config = TrainConfig(device=device, deterministic=asked)  # type: ignore[arg-type]
    with suppress(ZeroDivisionError), devices.deterministic(config):
        assert torch.are_deterministic_algorithms_enabled() is allowed
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


def test_cublas_is_told_before_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch looks at the variable once, when trials before the first step already multiply."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    devices.make_accelerator(TrainConfig(device="cpu", precision="fp32"))
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    devices.make_accelerator(TrainConfig(device="cpu", precision="fp32", deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    real = devices.version
    monkeypatch.setattr(devices, "version", lambda name: real(name) if name != "vitft" else pytest.fail("called"))
    assert devices.environment()["versions"]["vitft"] == __version__


@pytest.mark.parametrize(
    ("supported", "faster", "processes", "chosen"),
    [(True, True, 1, "bf16"), (True, False, 1, "fp32"), (False, True, 1, "fp32"), (True, True, 2, "fp32")],
)
def test_a_cpu_uses_bf16_if_it_is_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, supported: bool, faster: bool, processes: int, chosen: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(devices, "_cpu_has_bf16", lambda: supported)
    rates = {"bf16": 3e11 if faster else 1e11, "fp32": 2e11}
    monkeypatch.setattr(devices, "peak_flops", lambda device, precision, seconds: rates[precision])
    devices._bf16_is_faster.cache_clear()
    try:
        assert find_precision("auto", "cpu") == chosen
        assert find_precision("bf16", "cpu") == "bf16"  # an explicit choice is not questioned
    finally:
        devices._bf16_is_faster.cache_clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:1"}, "device cuda:1: use cuda, and choose the GPU with CUDA_VISIBLE_DEVICES"),
        ({"device": "gpu"}, "device gpu: not one of auto, cpu, cuda, mps"),
        ({"precision": "float16"}, "precision float16: not one of auto, fp32, bf16, fp16; choose one of these"),
    ],
)
def test_an_unknown_device_or_precision_is_refused_in_a_library_call(
    digits_run: Any, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        evaluate(digits_run.run, **options)  # type: ignore[arg-type]
    if "device" in options:
        with pytest.raises(UsageError, match=re.escape(message)):
            predict("docs/digits", digits_run.run, **options)


def test_a_gpu_is_waited_for_once_in_sixteen_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: waits.append(1) or tensor)
    batches = [torch.full((2, 3), number) for number in range(35)]
    blocks = list(on_host(iter(batches)))
    assert len(waits) == 3
    assert torch.equal(torch.cat(blocks), torch.cat(batches))
