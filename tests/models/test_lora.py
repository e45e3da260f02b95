"""Low-rank adapters: what they change, in every architecture, and what their files hold."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.families import FAMILIES, tiny_classifier
from tests.models.test_heads import marked
from vitft import TrainConfig
from vitft.errors import ModelError, UsageError
from vitft.models.heads import in_head
from vitft.models.load import set_training
from vitft.models.lora import add_adapter, read_adapter, require_peft, write_base, write_weights

peft: Any = pytest.importorskip("peft")

CONVOLUTIONS = {
    "resnet", "regnet", "bit", "mobilenet_v1", "mobilenet_v2", "mobilevitv2", "hgnet_v2", "textnet", "poolformer",
    "efficientnet",
}  # fmt: skip
TESTED = sorted(FAMILIES.keys() - {"mobilevit"})  # which is slow
WITHOUT_ATTENTION = {"convnext", "convnextv2", "focalnet"}


def adapted(family: str = "vit", *, seed: int = 0, spread: float = 0.1, **settings: Any) -> Any:
    """A tiny model with an adapter that is no longer 0."""
    model = tiny_classifier(family)
    add_adapter(model, TrainConfig(**{"lora_rank": 2, "lora_targets": "all", "seed": seed} | settings))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * spread)
    return model


def pixels(model: Any) -> torch.Tensor:
    size = getattr(getattr(model.config, "vision_config", model.config), "image_size", None) or 32
    side = size if isinstance(size, int) else size[0]
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(pixel_values=pixels(model)).logits
    return logits


@pytest.mark.parametrize("family", [*marked(TESTED), pytest.param("mobilevit", marks=pytest.mark.slow)])
def test_every_architecture_trains_an_adapter_that_is_merged_or_says_why_not(family: str, tmp_path: Path) -> None:
    if family in CONVOLUTIONS:
        with pytest.raises(UsageError, match=f"^lora_rank: no linear layers of all in a {family} model; remove it"):
            adapted(family)
        return
    model = adapted(family)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or in_head(model, name) for name in names)
    assert sum(".lora_A." in name for name in names) == sum(".lora_B." in name for name in names) > 0
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in names}
    set_training(model, "none")
    model(pixel_values=pixels(model)).logits.square().sum().backward()
    # Several processes would wait for ever for one without a gradient.
    assert [
        name for name, parameter in model.named_parameters() if parameter.requires_grad == (parameter.grad is None)
    ] == []
    for name, tensor in model.state_dict().items():  # running statistics, too
        assert name in names or in_head(model, name) or torch.equal(tensor, kept[name]), name
    unmerged = logits_of(model)
    write_weights(model, tmp_path / "model", "origin")
    plain = type(model).from_pretrained(tmp_path / "model")
    assert plain.state_dict().keys() == tiny_classifier(family).state_dict().keys()
    assert (logits_of(plain) - unmerged).abs().max() < 1e-4 * max(1.0, float(unmerged.abs().max()))
    assert torch.equal(logits_of(model), unmerged)


@pytest.mark.parametrize("settings", [{}, {"dora": True, "lora_alpha": 5.0}], ids=["lora", "dora"])
def test_peft_loads_the_adapter_onto_the_base(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = adapted("vit", **settings)
    write_weights(model, tmp_path / "model", "org/backbone")
    write_base(model, tmp_path / "base")
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    before = tiny_classifier("vit").state_dict()
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items() if not in_head(base, name))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of missing names
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "model" / "adapter")
    assert theirs.peft_config["default"].base_model_name_or_path == "org/backbone"
    assert torch.allclose(logits_of(theirs), logits_of(model), atol=1e-5)
    other = adapted("vit", seed=1, **settings)
    assert not torch.allclose(logits_of(other), logits_of(model), atol=1e-2)
    read_adapter(other, tmp_path / "model")
    assert torch.equal(logits_of(other), logits_of(model))


@pytest.mark.parametrize("dora", [False, True])
def test_the_layer_is_that_of_the_papers(dora: bool) -> None:
    """LoRA: Hu et al. 2022, eq. 3. DoRA: Liu et al. 2024, eq. 5, with a length for each output."""
    model = adapted("vit", lora_alpha=6.0, dora=dora)
    layer = model.vit.layers[1].mlp.fc1
    tensors = {name: tensor.detach().numpy().astype(np.float64) for name, tensor in layer.state_dict().items()}
    weight = (
        tensors["base_layer.weight"] + 6.0 / 2 * tensors["lora_B.default.weight"] @ tensors["lora_A.default.weight"]
    )
    if dora:
        length = tensors["lora_magnitude_vector.default.weight"]
        weight *= (length / np.linalg.norm(weight, axis=1))[:, None]
    inputs = np.random.default_rng(0).normal(size=(5, 16))
    with torch.no_grad():
        outputs = layer(torch.from_numpy(inputs).float()).numpy()
    assert np.abs(outputs - (inputs @ weight.T + tensors["base_layer.bias"])).max() < 1e-4


def test_a_new_adapter_changes_nothing_and_depends_on_the_seed_alone() -> None:
    models = [tiny_classifier("vit") for _ in range(3)]
    before = logits_of(models[0])
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(1)
        add_adapter(model, TrainConfig(lora_rank=2, seed=seed))
        assert torch.equal(logits_of(model), before)
    drawn = [model.vit.layers[0].attention.q_proj.lora_A["default"].weight for model in models]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_default_layers_are_those_of_attention() -> None:
    model = adapted("swinv2", lora_targets="attention")
    found = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert {name.rpartition("attention.")[2] for name in found} == {
        "self.query",
        "self.key",
        "self.value",
        "output.dense",
    }
    assert len(found) == 2 * 4
    everything = [name for name, _ in adapted("swinv2").named_parameters() if ".lora_A" in name]
    assert (
        len(everything) == 2 * (4 + 2) + 1
    )  # the MLPs, too, and the patch merging; not the network of position biases


@pytest.mark.parametrize("family", sorted(WITHOUT_ATTENTION))
def test_an_architecture_without_attention_says_what_to_set(family: str) -> None:
    with pytest.raises(UsageError, match=f"no linear layers of attention in a {family} model; set lora_targets to all"):
        adapted(family, lora_targets="attention")


def test_a_rank_that_is_not_low_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^lora_rank 17: a linear layer of this vit model has only rank 16; lower it"):
        adapted("vit", lora_rank=17)


def test_without_peft_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitft.errors.find_spec", lambda name: None)
    require_peft(TrainConfig())
    with pytest.raises(UsageError, match=r"^lora_rank needs peft, not installed here; pip install 'vitft\[lora\]'"):
        require_peft(TrainConfig(lora_rank=2))


def test_an_adapter_of_other_layers_is_refused(tmp_path: Path) -> None:
    write_weights(adapted("vit"), tmp_path, "origin")
    for other in (adapted("vit", lora_targets="attention"), adapted("vit", lora_rank=3)):
        with pytest.raises(ModelError, match="is of an adapter with other layers"):
            read_adapter(other, tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "classifier" not in name}, file)
    with pytest.raises(ModelError, match="is of an adapter with other layers"):
        read_adapter(adapted("vit"), tmp_path)
    file.write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be read"):
        read_adapter(adapted("vit"), tmp_path)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_product_is_added_as_peft_adds_it(precision: torch.dtype) -> None:
    """In place, whatever the precision of the products; the gradients, too."""
    layer = adapted("vit", lora_alpha=6.0).vit.layers[0].attention.q_proj
    inputs = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = []
    for forward in (layer.forward, super(type(layer), layer).forward):
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            output = forward(inputs)
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        found.append([output, *torch.autograd.grad(output.float().square().sum(), [inputs, *weights])])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= (1e-5 if precision == torch.float32 else 0.05) * theirs.abs().max()
