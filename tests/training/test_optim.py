"""The learning rate as a function of the step, and who decays."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ViTConfig, ViTForImageClassification

from tests.families import tiny_classifier
from vitft.config.train import TrainConfig
from vitft.hardware.device import make_accelerator
from vitft.models.blocks import block_stacks, parameter_depths
from vitft.training.optim import lr_at, make_optimizer, parameter_groups, total_steps, unusual_lr
from vitft.training.setup import prepare
from vitft.training.step import Learner

SCHEDULES = ["constant", "linear", "cosine", "step"]


def rates(config: TrainConfig, total: int, per_epoch: int) -> list[float]:
    return [lr_at(step, config, total_steps=total, steps_per_epoch=per_epoch) for step in range(total)]


# -- the schedules --------------------------------------------------------------------------------


@given(
    schedule=st.sampled_from(SCHEDULES),
    lr=st.floats(1e-8, 10),
    warmup=st.floats(0, 0.99),
    total=st.integers(1, 300),
    per_epoch=st.integers(1, 50),
    decay_epochs=st.floats(0.01, 20),
)
def test_a_rate_is_above_0_and_at_most_the_peak(
    schedule: str, lr: float, warmup: float, total: int, per_epoch: int, decay_epochs: float
) -> None:
    config = TrainConfig.parse({"schedule": schedule, "lr": lr, "warmup": warmup, "decay_epochs": decay_epochs})
    found = rates(config, total, per_epoch)

    assert all(0 <= rate <= lr * (1 + 1e-12) for rate in found)
    rising = found[: round(warmup * total)]
    assert rising == sorted(rising)
    falling = found[len(rising) :]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@given(warmup=st.floats(0, 0.9), total=st.integers(2, 1000))
def test_linear_and_cosine_reach_0_just_after_the_last_step(schedule: str, warmup: float, total: int) -> None:
    config = TrainConfig.parse({"schedule": schedule, "warmup": warmup})
    last, after = (lr_at(step, config, total_steps=total, steps_per_epoch=10) for step in (total - 1, total))

    assert last > 0
    assert after == pytest.approx(0, abs=1e-18)


def test_warm_up_rises_evenly_and_meets_the_peak() -> None:
    config = TrainConfig.parse({"schedule": "linear", "warmup": 0.4, "lr": 1.0})

    assert rates(config, 10, 5)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1 - 1 / 6])


def test_a_warm_up_of_the_whole_run_meets_the_peak_at_its_last_step() -> None:
    assert rates(TrainConfig(lr=1.0, warmup=0.95), 5, 5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_is_half_way_down_in_the_middle() -> None:
    config = TrainConfig.parse({"schedule": "cosine", "lr": 1.0, "warmup": 0.0})

    assert lr_at(50, config, total_steps=100, steps_per_epoch=10) == pytest.approx(0.5)
    assert lr_at(25, config, total_steps=100, steps_per_epoch=10) == pytest.approx((1 + 2**-0.5) / 2)


@pytest.mark.parametrize("per_epoch", [1563, 1407, 7])
def test_step_is_a_tenth_after_each_epoch_on_its_first_step(per_epoch: int) -> None:
    """The classic CIFAR-10 run: 2e-5 in the first epoch, 2e-6 in the second."""
    config = TrainConfig.parse({"schedule": "step", "lr": 2e-5, "epochs": 3, "warmup": 0.0})
    found = rates(config, 3 * per_epoch, per_epoch)

    assert set(found[:per_epoch]) == {2e-5}
    assert found[per_epoch : 2 * per_epoch] == pytest.approx([2e-6] * per_epoch, rel=1e-12)
    assert found[2 * per_epoch :] == pytest.approx([2e-7] * per_epoch, rel=1e-12)


@pytest.mark.parametrize("warmup", [0.05, 0.3, 0.7])
def test_step_reaches_its_peak_after_any_warm_up_and_decays_from_there(warmup: float) -> None:
    config = TrainConfig.parse({"schedule": "step", "lr": 1.0, "warmup": warmup, "decay_epochs": 1})
    found, warm = rates(config, total=100, per_epoch=10), round(100 * warmup)
    assert found[warm : warm + 10] == [1.0] * 10
    assert found[warm + 10] == pytest.approx(0.1)
    assert max(found[:warm]) < 1.0


def test_the_step_schedule_decays_as_set() -> None:
    config = TrainConfig.parse({"schedule": "step", "lr": 1.0, "warmup": 0.0, "decay_epochs": 0.5, "decay_factor": 0.5})

    assert rates(config, 8, 4) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    for often in (0.25, 0.01):  # at every step, which is as often as can be
        config = config.model_copy(update={"decay_epochs": often})
        assert rates(config, 4, 4) == [1, 0.5, 0.25, 0.125]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"epochs": 3}, 30),
        ({"epochs": 0.25}, 3),  # a part of a step is a step
        ({"epochs": 0.3}, 3),  # and 0.3 * 10 is three, not 3.0000000000000004
        ({"epochs": 1e-6}, 1),
        ({"epochs": 3, "max_steps": 7}, 7),
        ({"epochs": 0.5, "max_steps": 7}, 5),
    ],
)
def test_the_steps_of_a_run(settings: dict[str, float], expected: int) -> None:
    assert total_steps(TrainConfig.parse(settings), steps_per_epoch=10) == expected


# -- the usual rate -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "usual"),
    [
        ({}, 2e-5),
        ({"freeze": 3}, 2e-5),
        ({"optimizer": "adam"}, 2e-5),
        ({"lora_rank": 4}, 1e-3),
        ({"freeze": "backbone"}, 1e-2),
        ({"from_scratch": True}, 1e-3),
        ({"from_scratch": True, "optimizer": "sgd"}, 1e-1),
        ({"optimizer": "sgd"}, 3e-3),
    ],
)
def test_a_rate_of_more_than_ten_times_the_usual_one_is_told(settings: dict[str, Any], usual: float) -> None:
    assert TrainConfig.parse(settings).lr == usual
    for times in (0.1, 1, 10):
        assert unusual_lr(TrainConfig.parse(settings | {"lr": usual * times}), 86_000_000) is None
    low, high = (unusual_lr(TrainConfig.parse(settings | {"lr": usual * times}), 86_000_000) for times in (0.05, 20))
    assert low is not None
    assert high is not None
    assert "unusually low: one 20th of the usual rate for" in low
    assert "unusually high: 20 times the usual rate for" in high
    assert float(low.rpartition(" ")[2]) == float(high.rpartition(" ")[2]) == usual


def test_a_small_model_has_a_higher_rate_unless_one_is_set() -> None:
    settings = {"dataset": "digits", "model": "vit-micro", "device": "cpu", "precision": "fp32"}
    rates = [
        prepare(TrainConfig.parse(settings | more)).config.lr
        for more in ({}, {"lr": 2e-5}, {"lr": None}, {"freeze": "backbone"}, {"optimizer": "sgd"})
    ]
    assert rates == [1e-3, 2e-5, 1e-3, 1e-2, 1e-1]
    assert unusual_lr(TrainConfig(lr=1e-3), 200_000) is None
    assert "unusually low: one 50th of the usual rate for a small model" in (unusual_lr(TrainConfig(), 200_000) or "")


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_the_moments_decay_as_asked(optimizer: str) -> None:
    """Two steps with the formula of Kingma & Ba 2015 (algorithm 1), in float64."""
    layer = torch.nn.Linear(1, 1, bias=False)
    start, gradients, rate = layer.weight.item(), (0.5, -2.0), 0.1
    config = TrainConfig.parse({"optimizer": optimizer, "betas": "0.5,0.8", "lr": rate, "weight_decay": 0})
    steps = make_optimizer(layer, config)
    m = v = 0.0
    for number, gradient in enumerate(gradients, 1):
        layer.weight.grad = torch.full((1, 1), gradient)
        steps.step()
        m, v = 0.5 * m + 0.5 * gradient, 0.8 * v + 0.2 * gradient**2
        start -= rate * (m / (1 - 0.5**number)) / ((v / (1 - 0.8**number)) ** 0.5 + 1e-8)
    assert layer.weight.item() == pytest.approx(start, rel=1e-5)


# -- parameter groups -----------------------------------------------------------------------------


@pytest.fixture
def vit() -> ViTForImageClassification:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))


def names(model: torch.nn.Module, group: dict[str, object]) -> set[str]:
    members = {id(p) for p in group["params"]}  # type: ignore[attr-defined]
    return {name for name, p in model.named_parameters() if id(p) in members}


def test_biases_norms_tokens_and_positions_do_not_decay(vit: ViTForImageClassification) -> None:
    decayed, spared = parameter_groups(vit, 0.05)

    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    matrices = {
        name
        for name in names(vit, decayed)
        if name.startswith("vit.embeddings") or "layer.0." in name or ".layers.0." in name
    }
    assert all(name.endswith(".weight") and "norm" not in name for name in matrices)
    assert "vit.embeddings.patch_embeddings.projection.weight" in matrices
    assert len(matrices) == 7  # projection; query, key, value, output; two of the MLP
    assert "classifier.weight" in names(vit, decayed)
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "classifier.bias"} <= names(vit, spared)
    assert all("norm" in name or name.endswith("bias") or "embeddings" in name for name in names(vit, spared))


# Of each family what has decay, with one number for all in a stack; every other parameter has none.
_ATTENTION = {f"layers.N.attention.{name}_proj.weight" for name in "qkvo"}
_MLP = {"layers.N.mlp.fc1.weight", "layers.N.mlp.fc2.weight"}
_PATCHES = {"embeddings.patch_embeddings.projection.weight"}
_SWIN = "encoder.layers.N.blocks.N."
_LEVIT = "encoder.stages.N.layers.N."
_TWO = {f"encoder.layers.N.self_attn.{name}_proj.weight" for name in ("q", "k", "v", "out")}
_TWO |= {"encoder.layers.N.mlp.fc1.weight", "encoder.layers.N.mlp.fc2.weight", "embeddings.patch_embedding.weight"}
DECAYED = {
    "vit": _PATCHES | _ATTENTION | _MLP,
    "deit": _PATCHES | _ATTENTION | _MLP,
    "beit": _PATCHES | _ATTENTION | _MLP,
    "data2vec-vision": _PATCHES | {
        f"encoder.layer.N.{name}.weight" for name in ("attention.attention.query", "attention.attention.key",
        "attention.attention.value", "attention.output.dense", "intermediate.dense", "output.dense")},
    "vit_msn": _PATCHES | _ATTENTION | _MLP,
    "clip": _TWO,
    "siglip": _TWO | {f"head.{name}" for name in ("attention.in_proj_weight", "attention.out_proj.weight",
                                                  "mlp.fc1.weight", "mlp.fc2.weight")},
}  # fmt: skip


@pytest.mark.parametrize("family", [*DECAYED, "dinov2_with_registers", "swinv2", "levit"])
def test_weight_matrices_decay_and_nothing_else_in_each_family(family: str) -> None:
    """Tokens, registers, tables of positions, scales and biases, by their names, have none."""
    model = tiny_classifier(family, head=1 if family in ("deit", "levit") else 0)
    groups = parameter_groups(model, 0.05)
    decayed, spared = (
        {re.sub(r"\.\d+", ".N", name) for name in names(model, group)} for group in groups
    )  # fmt: skip

    spares = r"(bias|biases|norm\S*\.weight|_token|_tokens|position_embeddings|position_embedding\.weight|table|scale|"
    spares += r"lambda_?\d?|lambda1|probe|class_embedding|attention_biases|\.N\.weight|"
    spares += r"batch_norm\S*weight|position_bias_mlp\S*)$"
    assert all(re.search(spares, name) for name in spared), sorted(n for n in spared if not re.search(spares, n))
    told = {"dinov2_with_registers": {"register_tokens", "cls_token", "position_embeddings", "lambda1"},
            "swinv2": {"logit_scale", "continuous_position_bias_mlp.N.weight"},
            "levit": {"attention_biases"}, "deit": {"distillation_token", "cls_token", "position_embeddings"},
            "beit": {"relative_position_bias_table", "lambda_1", "cls_token"},
            "clip": {"position_embedding.weight", "class_embedding"},
            "siglip": {"position_embedding.weight", "probe"}}.get(family, set())  # fmt: skip
    assert all(any(name.endswith(one) for name in spared) for one in told)
    heads = {name for name in decayed if "classifier" in name}
    assert heads
    bodies = {name.split(".", 1)[1] for name in decayed - heads}
    if family in DECAYED:
        assert bodies == DECAYED[family]
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        layer = modules[name.rpartition(".")[0]]
        product = isinstance(layer, torch.nn.Linear | torch.nn.Conv2d | torch.nn.MultiheadAttention)
        if re.sub(r"\.\d+", ".N", name) in decayed:
            assert product, name
            assert parameter.ndim > 1
        elif product and parameter.ndim > 1:
            assert "position_bias_mlp" in name


def test_every_trainable_parameter_is_in_exactly_one_group(vit: ViTForImageClassification) -> None:
    vit.vit.embeddings.requires_grad_(False)
    grouped = [id(p) for group in parameter_groups(vit, 0.05) for p in group["params"]]

    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in vit.parameters() if p.requires_grad}


def test_a_head_alone_has_its_two_parameters(vit: ViTForImageClassification) -> None:
    vit.vit.requires_grad_(False)
    groups = parameter_groups(vit, 0.05)

    assert [names(vit, group) for group in groups] == [{"classifier.weight"}, {"classifier.bias"}]


@pytest.mark.parametrize(
    ("optimizer", "kind", "decay"),
    [("adamw", torch.optim.AdamW, 0.3), ("adam", torch.optim.Adam, 0.0), ("sgd", torch.optim.SGD, 0.3)],
)
def test_the_optimizer_is_the_one_asked_for(
    vit: ViTForImageClassification, optimizer: str, kind: type, decay: float
) -> None:
    made = make_optimizer(vit, TrainConfig.parse({"optimizer": optimizer, "weight_decay": 0.3}))

    assert type(made) is kind
    assert max(group["weight_decay"] for group in made.param_groups) == decay
    assert optimizer != "sgd" or made.param_groups[0]["momentum"] == 0.9


# -- layer decay ------------------------------------------------------------------------------------


def factors(model: torch.nn.Module, layer_decay: float) -> dict[str, float]:
    return {
        name: group["lr_factor"]
        for group in parameter_groups(model, 0.05, layer_decay)
        for name in names(model, group)
    }  # fmt: skip


def test_layer_decay_is_beits(vit: ViTForImageClassification) -> None:
    """`get_num_layer_for_vit` of BEiT's code: 0 for embeddings, i + 1 in block i, n + 1 for the norm and the head."""

    def expected(name: str) -> float:
        block = re.search(r"layers?\.(\d+)\.", name)
        number = 0 if "embeddings" in name else int(block[1]) + 1 if block else 3
        return 0.5 ** (3 - number)

    found = factors(vit, 0.5)
    assert found == {name: expected(name) for name, _ in vit.named_parameters()}
    assert set(found.values()) == {1.0, 0.5, 0.25, 0.125}


def test_without_layer_decay_all_rates_are_the_same(vit: ViTForImageClassification) -> None:
    assert set(factors(vit, 1.0).values()) == {1.0}


@pytest.mark.parametrize("family", [*DECAYED, "dinov2_with_registers", "swinv2", "levit", "convnextv2", "mobilevit"])
def test_depth_rises_from_the_input_to_the_head_in_each_family(family: str) -> None:
    model = tiny_classifier(family)
    depths = parameter_depths(model)
    assert depths.keys() == {name for name, _ in model.named_parameters()}
    last = max(depths.values())
    heads = [name for name in depths if name.startswith("classifier")]
    assert all(depths[name] == last for name in heads)
    inputs = [name for name in depths if re.search(r"patch_embed|embeddings\.|conv_stem|pre_layrnorm", name)]
    assert inputs or family == "mobilevit"
    assert all(depths[name] == 0 for name in inputs)
    blocks = [block for stack in block_stacks(model) for block in stack]
    assert last == len(blocks) + 1
    for number, block in enumerate(blocks, 1):
        own = {id(p) for p in block.parameters()}
        assert {depths[name] for name, p in model.named_parameters() if id(p) in own} <= {number}
    between = [depth for name, depth in depths.items() if "downsample" in name and "stages.0" not in name]
    assert all(0 < depth < last for depth in between) or family == "levit"


def test_a_step_applies_the_factor() -> None:
    """With SGD and no momentum yet, the first step of a weight is its rate times its gradient."""
    start = prepare(TINY)
    moved = []
    for decay in (1.0, 0.5):
        prepared = prepare(TINY.model_copy(update={"layer_decay": decay}))
        learner = Learner(make_accelerator(prepared.config), prepared.decode())
        learner.step(0)
        moved.append(learner.unwrapped.state_dict())
    before, depths = start.loaded.model.state_dict(), parameter_depths(start.loaded.model)
    last = max(depths.values())
    for name, depth in depths.items():
        plain, decayed = (after[name] - before[name] for after in moved)
        torch.testing.assert_close(decayed, plain * 0.5 ** (last - depth), rtol=1e-3, atol=1e-7)


TINY = TrainConfig(
    dataset="digits", model="vit-micro", from_scratch=True, image_size=28, patch_size=14, width=16, heads=2, mlp=32,
    layers=2, max_train_samples=40, val_fraction=0, max_eval_samples=20, batch_size=16, device="cpu", precision="fp32",
    optimizer="sgd", lr=1.0, weight_decay=0, clip_norm=0,
)  # fmt: skip
