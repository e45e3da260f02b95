"""The textbook against Transformers: the same folder and the same images give the same numbers.

Transformers' eager attention rounds its softmax to float32 whatever the dtype of the model. In float64 it therefore
differs by 4e-8 from its own SDPA attention and from the chapters; the fixture `softmax_in_full` removes that rounding.
"""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DeiTConfig, DeiTForImageClassification, ViTConfig, ViTForImageClassification, ViTModel

from tests.scratch.gradients import random_weights, relative
from vitft.errors import ModelError
from vitft.scratch.interop import from_transformers, load_folder, to_transformers
from vitft.scratch.tensors import Array
from vitft.scratch.torch_vit import TorchViT
from vitft.scratch.vit import map_arrays, named_arrays, vit
from vitft.spec import ViTSpec

SIZES = {
    "image_size": 8, "patch_size": 4, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 10, "num_labels": 4, "attn_implementation": "sdpa",
}  # fmt: skip


def saved(folder: Path, kind: Any = ViTForImageClassification, config: Any = ViTConfig, **changes: Any) -> Any:
    """A model saved by Transformers, with no weight equal to 0 or 1."""
    torch.manual_seed(0)
    model = kind(config(**SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def softmax_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' eager attention with its softmax in the dtype of the model."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))


def images(side: int = 8, count: int = 2) -> Array:
    return np.random.default_rng(0).standard_normal((count, 3, side, side))


def max_difference(actual: Array, expected: Array) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("change", [{}, {"qkv_bias": False}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu"}])
def test_logits_equal_transformers(tmp_path: Path, change: dict[str, Any]) -> None:
    model = saved(tmp_path, **change).double()
    w, spec = load_folder(tmp_path, np.float64)
    x = images()
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).logits.numpy()
        by_torch = TorchViT(spec).load(w)(torch.from_numpy(x)).numpy()
    assert max_difference(vit(x, w, spec)[0], expected) <= 1e-12
    assert max_difference(by_torch, expected) <= 1e-12


def test_deit_with_its_distillation_token(tmp_path: Path) -> None:
    model = saved(tmp_path, DeiTForImageClassification, DeiTConfig).double()
    w, spec = load_folder(tmp_path, np.float64)
    assert spec.prefix_tokens == 2
    with torch.no_grad():
        expected = model(torch.from_numpy(images())).logits.numpy()
    assert max_difference(vit(images(), w, spec)[0], expected) <= 1e-12


@pytest.mark.parametrize("prefix", ["vit.", ""])
@pytest.mark.parametrize("in_memory", [True, False])
def test_both_namings_round_trip(tmp_path: Path, in_memory: bool, prefix: str) -> None:
    model = saved(tmp_path)
    w, spec = load_folder(tmp_path)
    state = to_transformers(w, spec, in_memory=in_memory, prefix=prefix)
    round_trip = from_transformers(state, spec)
    body = [(name, array) for name, array in named_arrays(w) if prefix or not name.startswith("head")]
    assert all(np.array_equal(dict(named_arrays(round_trip))[name], array) for name, array in body)
    if in_memory and prefix:
        theirs = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
        assert state.keys() == theirs.keys()
        assert all(np.array_equal(state[name], theirs[name]) for name in theirs)


def test_changed_weights_can_be_loaded_into_transformers(tmp_path: Path) -> None:
    model = saved(tmp_path)
    w, spec = load_folder(tmp_path)
    changed = map_arrays(w, lambda array: array * 0.5 + 0.1)
    state = to_transformers(changed, spec, in_memory=True)
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in state.items()}, strict=True)
    with torch.no_grad():
        expected = model(torch.from_numpy(images()).float()).logits.numpy()
    assert max_difference(vit(images(), changed, spec)[0], expected) <= 1e-5


def test_a_backbone_without_a_head_gets_one_of_zeros(tmp_path: Path) -> None:
    saved(tmp_path, ViTModel)
    w, spec = load_folder(tmp_path)
    assert not w.head.logits.weight.any()
    assert not vit(images().astype(np.float32), w, spec)[0].any()


def test_options_that_transformers_lacks_are_refused_by_name() -> None:
    spec = ViTSpec.square(8, 4, 12, 2, 3, 10, 4)
    for name, value in {"pooling": "mean", "norm": "post", "pre_logits": 3, "final_norm": False}.items():
        other = replace(spec, **{name: value})
        with pytest.raises(ValueError, match=f"Transformers' ViT has no {name} {value}"):
            to_transformers(random_weights(other), other)


def test_a_folder_of_another_model_or_with_a_corrupt_file_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"hidden_size": 12', '"hidden_size": 15'))
    with pytest.raises(ValueError, match=r"expected shape \(.*15.*\), got \(.*12"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"corrupt")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        load_folder(tmp_path)
    (tmp_path / "config.json").write_text(config.replace('"model_type": "vit"', '"model_type": "swin"'))
    with pytest.raises(ModelError, match="swin"):
        load_folder(tmp_path)


SHARED = Path(__file__).parents[3] / "shared"
SMALL14 = SHARED / "models" / "vit-small-patch14-224"


@pytest.mark.usefixtures("softmax_in_full")
@pytest.mark.skipif(not SMALL14.is_dir(), reason="needs the shared pretrained ViT")
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 3e-5)])
def test_a_pretrained_vit_on_real_images_equals_transformers(dtype: Any, tolerance: float) -> None:
    import pyarrow.parquet as parquet
    from PIL import Image

    file = parquet.ParquetFile(SHARED / "data" / "cifar10" / "test.parquet")
    stored = next(file.iter_batches(3)).column(0).to_pylist()
    photos = [Image.open(BytesIO(image["bytes"])) for image in stored]
    pictures = [np.asarray(photo.convert("RGB").resize((224, 224))) for photo in photos]
    x = (np.stack(pictures).transpose(0, 3, 1, 2) / 127.5 - 1).astype(dtype)
    w, spec = load_folder(SMALL14, dtype)
    model = ViTModel.from_pretrained(SMALL14, dtype=torch.float32, attn_implementation="eager", add_pooling_layer=False)
    with torch.no_grad():
        expected = model.eval().to(torch.from_numpy(x).dtype)(torch.from_numpy(x)).last_hidden_state.numpy()
    stages: dict[str, Array] = {}
    vit(x, w, spec, watch=stages.__setitem__)
    assert max_difference(stages["norm"], expected) <= tolerance
    assert relative(stages["norm"], expected) <= tolerance


@pytest.mark.usefixtures("softmax_in_full")
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 3e-5)])
def test_logits_of_a_model_of_the_size_of_vit_base_equal_transformers(dtype: Any, tolerance: float) -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_labels=10, attn_implementation="eager")).eval()
    model = model.to(torch.from_numpy(np.zeros(1, dtype)).dtype)
    spec = ViTSpec.square(224, 16, 768, 12, 12, 3072, 10)
    w = from_transformers({name: p.detach().numpy() for name, p in model.named_parameters()}, spec, dtype)
    x = images(224, 1).astype(dtype)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).logits.numpy()
    assert max_difference(vit(x, w, spec)[0], expected) <= tolerance


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_difference_in_float64_is_transformers_own_rounding(tmp_path: Path, attention: str) -> None:
    model = saved(tmp_path, attn_implementation=attention).double()
    w, spec = load_folder(tmp_path, np.float64)
    with torch.no_grad():
        difference = max_difference(vit(images(), w, spec)[0], model(torch.from_numpy(images())).logits.numpy())
    assert (1e-12 < difference < 1e-6) if attention == "eager" else difference <= 1e-12
