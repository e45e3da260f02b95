"""`--parallel fsdp`: two processes share the weights, and train as one that has them all."""

import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.families import tiny_classifier
from tests.forked import finish_two, flags
from tests.training.test_processes import ADAPTED, FITTED, MIXED, killed_in_a_save
from tests.training.test_trainer import config, lines
from vitft import evaluate, train
from vitft.checkpoints.checkpoint import OPTIMIZER, newest_intact
from vitft.config.train import TrainConfig
from vitft.errors import UsageError
from vitft.evaluation import evaluation
from vitft.hardware.device import make_accelerator, resolve_auto
from vitft.hardware.shards import each_joined, local
from vitft.models.blocks import block_stacks
from vitft.training.sharding import Sharded, part_bytes
from vitft.training.step import Learner
from vitft.training.trainer import resume

TWO = {"parallel": "fsdp", "batch_size": 9, "max_train_samples": 70, "save_every": None, "max_eval_samples": 49}


def small_batches() -> None:
    """Of 49 images, one process has seven batches, the other six."""
    evaluation.BATCH = 4


@pytest.mark.parametrize(
    ("other", "close"),
    [
        (MIXED | {"ema": 0.9, "micro_batch_size": 2, "drop_path": 0.1}, 1e-5),
        (ADAPTED | {"ema": 0.9, "grad_checkpointing": True}, 1e-5),
        (FITTED | {"optimizer": "sgd", "lr": 0.01}, 1e-3),
        (FITTED | {"precision": "bf16", "freeze": 1, "head_init": "random"}, 0.03),
    ],
    ids=["mixed", "adapter", "fitted head", "bf16"],
)
def test_two_processes_that_share_the_weights_train_as_one_does(
    tmp_path: Path, other: dict[str, object], close: float
) -> None:
    changes = TWO | other
    one = train(config(**changes), output=tmp_path / "one").run
    two = tmp_path / "two"
    words = ["train", *flags(**changes), "--output", str(two)]
    (first, said), (second, silent) = finish_two(*words, log=tmp_path / "log", before=small_batches)
    assert (first, second) == (0, 0), (said, silent)
    for a, b in zip(lines(one), lines(two), strict=True):
        assert (a["step"], a.get("count")) == (b["step"], b.get("count"))
        assert a["loss"] == pytest.approx(b["loss"], abs=close)
        if "grad_norm" in a:
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * close)
    for name in ("best", "last"):
        mine, theirs = (load_file(run / name / "model.safetensors") for run in (one, two))
        assert {key: tensor.dtype for key, tensor in mine.items()} == {k: t.dtype for k, t in theirs.items()}
        assert max(float((mine[key] - theirs[key]).abs().max()) for key in mine) < 10 * close
    assert evaluate(two).count == 49


def test_a_plan_counts_what_is_gathered() -> None:
    model = tiny_classifier("vit")
    frozen, trained = block_stacks(model)[0]
    frozen.requires_grad_(False)
    one, other, whole = (4 * sum(weights.numel() for weights in part.parameters()) for part in (frozen, trained, model))
    rest = whole - one - other
    assert part_bytes(model, "fp32") == [(one, 0), (other, other), (rest, rest)]
    assert part_bytes(model, "bf16") == [(one // 2, 0), (other // 2, other), (rest, rest)]


def types_told(folder: str) -> None:
    """Write down which types the weights of a block have in its forward passes, and all that it is given and keeps.

    And whether its gradients, unclipped, have more digits than bf16: sums over the processes in bf16 would not.
    """
    real, rank = Learner.step, os.environ["RANK"]

    def step(self: Learner, number: int) -> Any:
        block, update = block_stacks(self.unwrapped)[0][0], self.optimizer.optimizer.step
        gathered, others, finer = set[str](), set[str](), list[bool]()

        def look(_: Any, given: tuple[torch.Tensor]) -> None:
            gathered.update(str(weights.dtype) for weights in block.parameters())
            others.add(str(given[0].dtype))

        def look_and_update(*given: Any, **named: Any) -> Any:
            sums = [local(weights.grad) for weights in block.parameters()]
            others.update(str(one.dtype) for one in (*sums, *block.parameters()))
            finer.append(any(not torch.equal(one, one.bfloat16().float()) for one in sums))
            return update(*given, **named)

        hook, self.optimizer.optimizer.step = block.register_forward_pre_hook(look), look_and_update
        done = real(self, number)
        hook.remove()
        self.optimizer.optimizer.step = update
        others.update(str(v.dtype) for state in self.optimizer.optimizer.state.values() for v in state.values())
        Path(folder, rank).write_text(json.dumps([[*gathered], [*others], *finer]))
        return done

    Learner.step = step  # type: ignore[method-assign]


def test_in_bf16_blocks_are_gathered_in_bf16_and_kept_in_float32(tmp_path: Path) -> None:
    """And the losses are those of ddp in bf16, as far as such numbers tell them apart."""
    changes = TWO | MIXED | {"precision": "bf16", "ema": 0.9, "clip_norm": 0.0}
    for kind, gathered in (("ddp", "torch.float32"), ("fsdp", "torch.bfloat16")):
        words = ["train", *flags(**changes | {"parallel": kind}), "--output", str(tmp_path / kind)]
        both = finish_two(*words, log=tmp_path / "log", before=partial(types_told, str(tmp_path)))
        assert [code for code, _ in both] == [0, 0], both
        for rank in range(2):
            assert json.loads((tmp_path / str(rank)).read_text()) == [[gathered], ["torch.float32"], True]
    for a, b in zip(lines(tmp_path / "ddp"), lines(tmp_path / "fsdp"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=0.03)


@pytest.fixture
def alone() -> Iterator[None]:
    """As one process of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_is_written_is_on_the_cpu() -> None:
    """Beside shards, a fused AdamW has a whole tensor on a GPU: its step. Here is none, but torch can pretend."""
    with FakeTensorMode():
        written = dict(each_joined({"weight|step": torch.zeros((), device="cuda")}))
    assert written["weight|step"].device.type == "cpu"


@pytest.mark.parametrize(
    "family", ["vit", "beit", "dinov2", "swinv2", "convnext", "convnextv2", "poolformer", "bit", "pvt", "segformer"]
)
def test_blocks_of_all_kinds_compute_with_weights_in_bf16(family: str, alone: None) -> None:
    """As they do whole, up to the rounding of weights that autocast does not round: of norms, of scales of branches."""
    model, whole = tiny_classifier(family), tiny_classifier(family)
    Sharded(model, "cpu", "bf16")
    pixels = torch.randn((4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    said = []
    for one in (model, whole):
        with torch.autocast("cpu", torch.bfloat16):
            logits = one(pixel_values=pixels).logits.float()
        logits.square().mean().backward()
        said.append((logits.detach(), [local(weight.grad) for weight in one.parameters() if weight.grad is not None]))
    (logits, gradients), (expected, right) = said
    assert {one.dtype for one in gradients} == {torch.float32}
    mine, theirs = (torch.cat([one.flatten() for one in every]) for every in (gradients, right))
    assert (mine - theirs).norm() < 0.3 * theirs.norm()
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_run_whose_weights_are_shared_resumes_with_the_same_bits(tmp_path: Path) -> None:
    """Two processes, one of which is killed in a save; then again two, or one with the whole model."""
    changes = {"parallel": "fsdp", "max_steps": 8, "save_every": 2, "keep_finished": 1, "ema": 0.9}
    whole, cut, alone = (tmp_path / name for name in ("whole", "cut", "alone"))
    words = ["train", *flags(**changes), "--output"]
    assert [code for code, _ in finish_two(*words, str(whole), log=tmp_path / "log")] == [0, 0]
    assert finish_two(*words, str(cut), log=tmp_path / "log", before=killed_in_a_save)[0][0] < 0
    folder, passed = newest_intact(cut)
    assert (folder is not None, passed) == (True, [])
    shutil.copytree(cut, alone)
    both = finish_two("train", "--resume", str(cut), log=tmp_path / "log")
    assert [code for code, _ in both] == [0, 0], both
    resume(alone)
    for name in ("model.safetensors", OPTIMIZER):
        straight, resumed, by_one = (
            load_file(run / "checkpoints" / "step-000008" / name) for run in (whole, cut, alone)
        )
        assert straight.keys() == resumed.keys() == by_one.keys()
        for key, tensor in straight.items():
            assert torch.equal(tensor, resumed[key]), key
            assert torch.allclose(tensor, by_one[key], atol=1e-4), key
    # And back: two read what one wrote, and stay as close to what is trained on.
    for run in (whole, alone):
        both = finish_two("train", "--resume", str(run), "--max-steps", "10", log=tmp_path / "log")
        assert [code for code, _ in both] == [0, 0], both
    longer, from_one = (load_file(run / "last" / "model.safetensors") for run in (whole, alone))
    assert all(torch.allclose(tensor, from_one[key], atol=1e-4) for key, tensor in longer.items())


def measured(folder: str) -> None:
    """Write how many bytes this process holds of weights, gradients and moments, and the most that it ever had in all.

    Both at the end of a step: loading the model and saving it take more for a moment.
    """
    real = Learner.step

    def step(self: Learner, number: int) -> Any:
        update, held = self.optimizer.optimizer.step, list[int]()
        if number == 0:
            Path("/proc/self/clear_refs").write_text("5")  # forgets how much there was

        def and_measure(*given: Any, **named: Any) -> Any:
            done = update(*given, **named)
            weights = list(self.unwrapped.parameters())
            moments = [value for state in self.optimizer.optimizer.state.values() for value in state.values()]
            tensors = [*weights, *(weight.grad for weight in weights if weight.grad is not None), *moments]
            held.append(sum(local(tensor).nbytes for tensor in tensors))
            return done

        self.optimizer.optimizer.step = and_measure
        try:
            return real(self, number)
        finally:
            self.optimizer.optimizer.step = update
            status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
            held.append(1024 * int(status["VmHWM"].split()[0]))
            Path(folder, os.environ["RANK"]).write_text(json.dumps(held))

    Learner.step = step  # type: ignore[method-assign]


def most_held(folder: Path, **changes: object) -> dict[str, list[int]]:
    """With ddp and with fsdp, what `measured` wrote, of the process that has more of it."""
    held = {}
    for kind in ("ddp", "fsdp"):
        (folder / kind).mkdir()
        words = ["train", *flags(parallel=kind, max_steps=2, **changes), "--output", str(folder / f"run-{kind}")]
        both = finish_two(*words, log=folder / "log", before=partial(measured, str(folder / kind)))
        assert [code for code, _ in both] == [0, 0], both
        found = [json.loads((folder / kind / str(rank)).read_text()) for rank in range(2)]
        held[kind] = [max(column) for column in zip(*found, strict=True)]
    return held


def test_each_process_holds_half_of_the_weights_gradients_and_moments(tmp_path: Path) -> None:
    held = most_held(tmp_path)
    assert held["fsdp"][0] <= 0.6 * held["ddp"][0]


@pytest.mark.slow
def test_a_process_takes_less_memory_by_what_the_others_hold(tmp_path: Path) -> None:
    """Beside its shards there are only the gathered weights of a block: no holes in the heap, no second copies."""
    held = most_held(tmp_path, width=512, layers=6, mlp=2048)
    saved = held["ddp"][1] - held["fsdp"][1]
    assert saved > 0.9 * (held["ddp"][0] - held["fsdp"][0])


def test_what_cannot_be_sharded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes, said in [
        ({"freeze": "backbone"}, "of a head alone that is little"),
        ({"micro_batch_size": "auto"}, "give a number"),
        ({"compile": "on"}, "compiles whole blocks"),
    ]:
        with pytest.raises(UsageError, match=said):
            TrainConfig(parallel="fsdp", **changes)
    with pytest.raises(UsageError, match="batch norms, which it cannot share; use ddp"):
        Sharded(tiny_classifier("levit"), "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(UsageError, match="parallel fsdp: trains in bf16 or fp32, not in fp16"):
            resolve_auto(TrainConfig(parallel="fsdp", device="cuda", precision="fp16"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="use --parallel fsdp"):
        make_accelerator(resolve_auto(config()))
