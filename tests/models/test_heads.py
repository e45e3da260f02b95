"""A new head changes no other tensor of the checkpoint, in every architecture."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from tests.families import FAMILIES, tiny_classifier
from vitft import TrainConfig
from vitft.errors import ModelError
from vitft.models.heads import head_of, in_head, label_tensors
from vitft.models.load import Loaded, load_for_training, load_trained, set_training

NEW = ("car", "bus", "tram", "van")
# Tensors between backbone and classifier, which a backbone checkpoint does not have.
BESIDE = {
    "cvt": {"layernorm.weight", "layernorm.bias"},
    "poolformer": {"norm.weight", "norm.bias"},
    "swiftformer": {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"},
}
# Importing each takes a second or two, and their heads have the same shapes as others.
RARE = (
    "bit", "cvt", "donut-swin", "focalnet", "hgnet_v2", "hiera", "metaclip_2", "mobilenet_v1", "mobilenet_v2",
    "mobilevitv2", "perceiver", "pvt_v2", "regnet", "segformer", "textnet",
)  # fmt: skip


def marked(names: Any) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in RARE else name for name in names]


def saved(model: Any, folder: Path) -> Path:
    """Save a model with an image processor that works for every family."""
    model.save_pretrained(folder)
    tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def load(folder: Path, **settings: Any) -> Loaded:
    return load_for_training(TrainConfig(model=str(folder), **settings), NEW)


def backbone_of(model: Any) -> Any:
    """The model without its classifier, like a pretraining checkpoint."""
    made_here = type(model).__module__.startswith("vitft.")  # which contain no backbone, but are one
    if not made_here and (base := getattr(model, model.base_model_prefix, None)) is not None:
        return base
    whole = tf.AutoModel.from_config(model.config)
    missing = whole.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not any(name.startswith("vision_model.") for name in missing)
    return whole


def assert_kept(model: Any, wanted: dict[str, torch.Tensor], new: Any) -> None:
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    changed = {name for name in state if state[name].shape != wanted[name].shape or (state[name] != wanted[name]).any()}
    assert changed == set(new)


@pytest.mark.parametrize("family", marked(FAMILIES))
def test_a_new_head_changes_only_the_classifier(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_classifier(family, num_labels=3)
    wanted = model.state_dict()

    other = load(saved(model, tmp_path / "classifier"), freeze="backbone").model

    assert_kept(other, wanted, label_tensors(model))
    assert 2 <= len(label_tensors(model)) <= 4
    trained = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in other.named_parameters() if in_head(other, name)}
    set_training(other, "backbone")
    assert {name.rpartition(".")[0] for name in trained} <= {n for n, m in other.named_modules() if m.training}
    assert not any(m.training for n, m in other.named_modules() if not f"{n}.".startswith(head_of(other)))
    assert "initial values" not in capsys.readouterr().err


@pytest.mark.parametrize("family", marked(name for name in FAMILIES if name != "perceiver"))
def test_a_backbone_gets_a_head_and_keeps_its_tensors(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Perceiver is skipped because its base model has no decoder."""
    model = tiny_classifier(family, num_labels=4)
    folder = saved(backbone_of(model), tmp_path / "backbone")

    loaded = load(folder)

    beside = BESIDE.get(family, set())
    new = {name for name in model.state_dict() if in_head(model, name) and not name.endswith("num_batches_tracked")}
    assert_kept(loaded.model, model.state_dict(), new | beside)
    assert loaded.new_head
    stderr = capsys.readouterr().err
    assert all(name in stderr for name in beside)
    assert ("initial values" in stderr) == bool(beside)
    with pytest.raises(ModelError, match="no classification head"):
        load_trained(folder)


@pytest.mark.parametrize("family", ["vit", "deit", "beit", "data2vec-vision", "swin", "swinv2", "siglip"])
def test_the_weights_of_image_pretraining_are_kept(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masked image modeling does not pool, so the norm of BEiT's pooler is new, with a warning."""
    classifier = tiny_classifier(family, num_labels=4)
    name = type(classifier).__name__.replace("ForImageClassification", "")
    kind = getattr(tf, f"{name}ForMaskedImageModeling", None) or getattr(tf, f"{name}Model")
    pretrained = kind(classifier.config)
    base = getattr(pretrained, pretrained.base_model_prefix, pretrained)
    base.load_state_dict(getattr(classifier, classifier.base_model_prefix, classifier).state_dict(), strict=False)

    loaded = load(saved(pretrained, tmp_path / "pretrained"))

    pools = family in ("beit", "data2vec-vision")
    new = {name for name in classifier.state_dict() if in_head(classifier, name) or (pools and ".pooler." in name)}
    assert_kept(loaded.model, classifier.state_dict(), new)
    stderr = capsys.readouterr().err
    assert ("initial values" in stderr) == (".pooler.layernorm.weight" in stderr) == pools


@pytest.mark.parametrize("family", ["deit", "levit"])
def test_a_distilled_model_gets_two_new_heads(family: str, tmp_path: Path) -> None:
    model = tiny_classifier(family, head=1, num_labels=3)

    loaded = load(saved(model, tmp_path / "model"))

    assert type(loaded.model) is type(model)
    assert len(head_of(loaded.model)) == 2
    assert_kept(loaded.model, model.state_dict(), label_tensors(model))


@pytest.mark.parametrize("damage", ["missing", "reshaped"])
@pytest.mark.parametrize("family", ["vit", "clip"])
def test_the_error_names_a_missing_tensor_of_a_block(family: str, damage: str, tmp_path: Path) -> None:
    model = tiny_classifier(family, num_labels=3)
    name = next(name for name in model.state_dict() if ".0." in name and name.endswith("bias"))
    tensors = {key: tensor for key, tensor in model.state_dict().items() if damage == "reshaped" or key != name}
    if damage == "reshaped":
        tensors[name] = torch.zeros(5)
    folder = saved(model, tmp_path / "model")
    model.save_pretrained(folder, state_dict=tensors)

    with pytest.raises(ModelError, match="missing or of another shape") as caught:
        load(folder)

    assert f"{folder}: {name} of a {family}'s" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(value: float, tmp_path: Path) -> None:
    model = tiny_classifier("vit", id2label=dict(enumerate(NEW)))
    with torch.no_grad():
        model.vit.layernorm.bias[3] = value
    folder = saved(model, tmp_path / "model")

    for read in (load, load_trained):
        with pytest.raises(ModelError, match=r"layernorm\.bias has non-finite values"):
            read(folder)


def test_weights_saved_from_several_gpus_are_read(tmp_path: Path) -> None:
    """DataParallel prefixes every name with `module.`."""
    model = tiny_classifier("vit", num_labels=3)
    folder = saved(model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "pytorch_model.bin")

    assert_kept(load(folder).model, model.state_dict(), label_tensors(model))


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    model = tiny_classifier("clip", num_labels=3)
    folder = saved(model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10kB")

    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert_kept(load(folder).model, model.state_dict(), label_tensors(model))
