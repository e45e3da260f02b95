"""The plan for a cluster: its arithmetic, with a cost that is given in place of a measured one."""

from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from vitft import TrainConfig
from vitft.cli.app import app
from vitft.training.cost import cluster as planning
from vitft.training.cost.cluster import Cluster, ClusterPlan, ClusterStep, all_reduce_s, plan_for_cluster
from vitft.training.cost.estimate import Cost
from vitft.training.setup import Prepared, prepare

EACH = Cost(image_s=0.01, step_s=0.002, evaluate_image_s=0.003, start_s=0.5)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(TrainConfig(dataset="digits", model="vit-micro", device="cpu", precision="fp32", batch_size=32))


@pytest.fixture
def planned(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> Any:
    def plan(devices: int, **more: Any) -> ClusterPlan:
        given = Cluster(devices, **{name: more.pop(name) for name in list(more) if name in Cluster.__annotations__})
        monkeypatch.setattr(planning, "cost", lambda prepared: EACH)
        config = prepared.config.model_copy(update=more)
        return plan_for_cluster(
            replace(prepared, config=config), given, EACH, steps=100, decode_s=7.0, evaluate_s=8.0
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
    sent = all_reduce_s(plan.gradient_bytes, Cluster(8))
    assert plan.step.images == 4
    assert plan.step.seconds == pytest.approx(4 * 0.01 + 0.002 + sent)
    assert plan.efficiency == pytest.approx(0.322 / 8 / (0.042 + sent))
    assert plan.total_s == pytest.approx(7 + 0.5 + 100 * (0.042 + sent) + 1)
    assert plan.price == pytest.approx(8 * 3 * plan.total_s / 3600)
    assert plan.step.bottleneck == "computation"
    slow = planned(8, link_gbps=0.01)
    assert slow.step.bottleneck.startswith("communication")
    assert slow.efficiency < plan.efficiency
    assert planned(64).step.bottleneck == "too few images: 32 devices have none; raise --batch-size"


def test_a_frozen_backbone_sends_the_gradients_of_its_head(
    planned: Any, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared.loaded.model
    assert planned(2).gradient_bytes == 4 * sum(weights.numel() for weights in model.parameters())
    for name, weights in model.named_parameters():
        monkeypatch.setattr(weights, "requires_grad", name.startswith("classifier"))
    assert planned(2).gradient_bytes == 4 * (64 * 10 + 10)


def test_a_gpu_sends_while_it_computes_but_for_the_last_bucket() -> None:
    step = ClusterStep(4, compute_s=0.3, communicate_s=0.1, hidden_s=0.08, optimizer_s=0.01, input_s=0.0)
    assert step.seconds == pytest.approx(0.33)
    slow = replace(step, input_s=0.5)
    assert slow.seconds == 0.5
    assert slow.bottleneck.startswith("images")


def test_the_command_shows_it_and_refuses_what_is_no_plan() -> None:
    words = ["train", "--dataset", "digits", "--model", "vit-micro", "--device", "cpu", "--max-train-samples", "40"]
    done = CliRunner(env={"COLUMNS": "120"}).invoke(app, [*words, "--dry-run", "--devices", "2", "--link-gbps", "10"])
    assert done.exit_code == 0, done.output
    assert "On 2 devices" in done.stdout
    assert "over links of 10 Gbit/s" in done.stdout
    for more, said in (
        (["--devices", "2"], "--devices plans a run; add --dry-run. To train on several: torchrun"),
        (["--dry-run", "--hourly-price", "2"], "--hourly-price is of a plan; add --dry-run --devices N."),
        (["--dry-run", "--link-gbps", "2"], "--link-gbps is of a plan; add --dry-run --devices N."),
    ):
        done = CliRunner().invoke(app, [*words, *more])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert said in done.stderr
