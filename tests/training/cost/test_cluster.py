"""The plan for a cluster: its arithmetic, with a cost that is given in place of a measured one."""

from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from vitft import TrainConfig
from vitft.cli.app import app
from vitft.models.blocks import block_stacks
from vitft.training.cost import cluster as planning
from vitft.training.cost import dry_run, estimate
from vitft.training.cost.cluster import (
    Cluster,
    ClusterPlan,
    ClusterStep,
    all_reduce_s,
    memory_each,
    plan_for_cluster,
    sharded_s,
    steps_s,
)
from vitft.training.cost.estimate import Cost, Decoding
from vitft.training.setup import Prepared, prepare

EACH = Cost(image_s=0.01, step_s=0.002, evaluate_image_s=0.003, start_s=0.5)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(TrainConfig(dataset="digits", model="vit-micro", device="cpu", precision="fp32", batch_size=32))


@pytest.fixture
def planned(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> Any:
    def plan(devices: int, **more: Any) -> ClusterPlan:
        decoding = more.pop("decoding", Decoding(7.0))
        given = Cluster(devices, **{name: more.pop(name) for name in list(more) if name in Cluster.__annotations__})
        monkeypatch.setattr(planning, "cost", lambda prepared: EACH)
        config = prepared.config.model_copy(update=more)
        run = replace(prepared, config=config)
        return plan_for_cluster(
            run, given, EACH, steps=100, decoding=decoding, evaluate_s=8.0, memory=memory_each(run, given)
        )  # fmt: skip

    return plan


def test_a_ring_sends_almost_everything_twice() -> None:
    gigabyte = 10**9
    assert all_reduce_s(gigabyte, Cluster(1)) == 0
    assert all_reduce_s(gigabyte, Cluster(2, link_gbps=8)) == pytest.approx(1, rel=1e-3)
    assert all_reduce_s(gigabyte, Cluster(64, link_gbps=8)) == pytest.approx(2 * 63 / 64, rel=2e-3)
    assert all_reduce_s(8, Cluster(64)) == pytest.approx(2 * 63 * 20e-6, rel=1e-3)  # a message takes time, too


def test_one_device_is_the_run_as_it_is(planned: Any) -> None:
    plan = planned(1)
    assert plan.step.seconds == pytest.approx(32 * 0.01 + 0.002)
    assert plan.efficiency == pytest.approx(1)
    assert plan.total_s == pytest.approx(7 + 0.5 + 100 * 0.322 + 8)
    assert plan.price is None


def test_devices_share_the_batch_and_wait_for_the_link(planned: Any) -> None:
    plan = planned(8, hourly_price=3.0)
    sent = all_reduce_s(plan.exchanged_bytes, Cluster(8))
    assert plan.step.images == 4
    assert plan.step.seconds == pytest.approx(4 * 0.01 + 0.002 + sent)
    assert plan.efficiency == pytest.approx(0.322 / 8 / (0.042 + sent))
    assert plan.total_s == pytest.approx(7 + 0.5 + 100 * (0.042 + sent) + 1)
    assert plan.price == pytest.approx(8 * 3 * plan.total_s / 3600)
    assert plan.step.bottleneck == "computation"
    slow = planned(8, link_gbps=0.01)
    assert slow.step.bottleneck.startswith("communication")
    assert slow.efficiency < plan.efficiency
    assert planned(64).step.bottleneck == "too few images: none for 32 devices; raise --batch-size"
    assert planned(33).step.bottleneck == "too few images: none for 1 device; raise --batch-size"


def test_a_frozen_backbone_sends_the_gradients_of_its_head(
    planned: Any, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared.loaded.model
    assert planned(2).exchanged_bytes == 4 * sum(weights.numel() for weights in model.parameters())
    for name, weights in model.named_parameters():
        monkeypatch.setattr(weights, "requires_grad", name.startswith("classifier"))
    assert planned(2).exchanged_bytes == 4 * (64 * 10 + 10)


def test_a_gpu_sends_while_it_computes_but_for_the_last_bucket() -> None:
    step = ClusterStep(4, compute_s=0.3, communicate_s=0.1, hidden_s=0.08, optimizer_s=0.01, input_s=0.0)
    assert step.seconds == pytest.approx(0.33)
    slow = replace(step, input_s=0.5)
    assert slow.seconds == 0.5
    assert slow.bottleneck.startswith("images")


def test_images_that_are_decoded_when_needed_are_decoded_by_each_process_that_meets_them_first(
    planned: Any, prepared: Prepared
) -> None:
    step = ClusterStep(4, 0.08, 0.01, 0.0, 0.01, decode_s=0.04, beside=False)
    assert steps_s(step, 25, 10, machines=1) == pytest.approx(10 * 0.14 + 15 * 0.10)
    assert steps_s(step, 25, 10, machines=2) == pytest.approx(10 * 0.14 + 10 * 0.12 + 5 * 0.11)
    assert steps_s(step, 5, 10, machines=2) == pytest.approx(5 * 0.14)
    on_gpu = replace(step, beside=True, input_s=0.05, decode_s=0.1)  # the host has to do 0.15 s, the GPU 0.1
    assert steps_s(on_gpu, 25, 10, machines=1) == pytest.approx(10 * 0.15 + 15 * 0.10)
    assert steps_s(replace(on_gpu, decode_s=0.01), 25, 10, machines=1) == pytest.approx(25 * 0.1)

    plan = planned(2, decoding=Decoding(3.0, 0.02))
    assert plan.step.decode_s == pytest.approx(16 * 0.02)
    assert steps_s(plan.step, 100, 10, 1) > 100 * plan.step.seconds
    per_epoch = -(-len(prepared.splits["train"].rows) // 32)
    for devices, machines in ((2, 1), (8, 1), (9, 2), (16, 2), (17, 3)):  # eight on a machine
        plan = planned(devices, decoding=Decoding(3.0, 0.02))
        steps = steps_s(plan.step, 100, per_epoch, machines)
        assert plan.total_s == pytest.approx(3 + 0.5 + steps + 8 / devices), devices


def test_one_device_decodes_in_the_first_epoch_too_a_gpu_beside_its_work(prepared: Prepared) -> None:
    prepared = prepared.with_settings(epochs=4.0)
    images, steps = len(prepared.splits["train"].rows), -(-len(prepared.splits["train"].rows) // 32)
    each = Cost(0.01, 0.002, 0.0, 0.5, host_image_s=0.004)
    head_s = dry_run.size_of(prepared, Cost(0.0, 0.0, 0.0)).train_s
    assert head_s == 0
    device_s = 4 * (0.01 * images + 0.002 * steps)
    assert dry_run.size_of(prepared, each, 0.003).train_s == pytest.approx(0.5 + device_s + 0.003 * images)
    on_gpu = prepared.with_settings(device="cuda")
    assert dry_run.size_of(on_gpu, each, 0.003).train_s == pytest.approx(0.5 + device_s)  # 0.007 are hidden
    slow = 0.5 + 0.75 * device_s + (0.03 + 0.004) * images
    assert dry_run.size_of(on_gpu, each, 0.03).train_s == pytest.approx(slow)


def test_fsdp_sends_half_as_much_again_in_every_pass() -> None:
    gigabyte, link = 10**9, Cluster(2, link_gbps=8)  # a gigabyte a second, of which each sends all in an all-reduce
    assert sharded_s([(gigabyte, gigabyte)], 1, link) == pytest.approx(1.5, rel=1e-3)
    assert sharded_s([(gigabyte, 0), (gigabyte, gigabyte)], 3, link) == pytest.approx(3 * 2.5, rel=1e-3)


def test_fsdp_shares_memory_and_the_optimizers_work(
    planned: Any, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = type("Process", (), {"memory_info": lambda self: type("Info", (), {"rss": 10**9})})
    monkeypatch.setattr(estimate.psutil, "Process", process)
    model = prepared.loaded.model
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    block = 4 * sum(parameter.numel() for parameter in block_stacks(model)[0][0].parameters())
    alone, ddp, fsdp = planned(1, batch_size=4), planned(8), planned(8, parallel="fsdp")  # 4 images each
    others = alone.memory_bytes - 4 * weights
    assert ddp.memory_bytes == others + 4 * weights
    assert fsdp.memory_bytes == others + 4 * weights // 8 + 3 * block
    assert (fsdp.step.optimizer_s, ddp.step.optimizer_s) == (0.002 / 8, 0.002)
    assert fsdp.exchanged_bytes == weights
    assert fsdp.step.communicate_s > ddp.step.communicate_s
    assert planned(1, batch_size=4, parallel="fsdp") == alone


def test_what_the_host_augments_is_what_does_not_stay_on_the_gpu(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10**12
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free, free))
    crops = prepared.with_settings(device="cuda", augment="crop")
    assert estimate._host_image_s(prepared.with_settings(augment="crop")) == 0  # a CPU is the host
    assert estimate._host_image_s(crops) == 0
    free = 10 * (len(prepared.splits["train"].rows) * 3 * 8 * 8 - 1)
    assert estimate._host_image_s(crops) > 0
    free = 10**12
    monkeypatch.setattr("vitft.data.stores.lazy_store.SMALL", 10)
    assert estimate._host_image_s(crops) > 0


def test_the_command_shows_it_and_refuses_what_is_no_plan() -> None:
    words = ["train", "--dataset", "digits", "--model", "vit-micro", "--device", "cpu", "--max-train-samples", "40"]
    done = CliRunner(env={"COLUMNS": "120"}).invoke(app, [*words, "--dry-run", "--devices", "2", "--link-gbps", "10"])
    assert done.exit_code == 0, done.output
    assert "On 2 devices" in done.stdout
    assert "over links of 10 Gbit/s" in done.stdout
    assert ", scaling efficiency " in done.stdout
    alone = CliRunner(env={"COLUMNS": "120"}).invoke(app, [*words, "--dry-run", "--devices", "1"])
    assert "On 1 device\n" in "".join(f"{line.rstrip()}\n" for line in alone.stdout.splitlines())
    assert not any(word in alone.stdout for word in ("communication", "Gbit/s", "efficiency", "each"))
    for more, said in (
        (["--devices", "2"], "--devices plans a run; add --dry-run. To train on several: torchrun --nproc-per-node 2 "),
        (["--dry-run", "--hourly-price", "2"], "--hourly-price applies only to a plan; add --dry-run --devices N."),
        (
            ["--dry-run", "--devices", "2", "--freeze", "backbone", "--epochs", "90"],
            "--devices plans steps, and a linear",
        ),
        (["--dry-run", "--link-gbps", "2"], "--link-gbps applies only to a plan; add --dry-run --devices N."),
    ):
        done = CliRunner().invoke(app, [*words, *more])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert said in done.stderr
