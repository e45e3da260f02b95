"""timm checkpoints: what needs no timm, and with it, real ones of a few thousand weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from vitft import TrainConfig, evaluate, train
from vitft.data.augment import Preprocess, preprocess_images
from vitft.errors import ModelError, UsageError
from vitft.models.blocks import block_stacks, parameter_depths
from vitft.models.heads import head_of
from vitft.models.image_processor import read_processor
from vitft.models.load import load_for_training, load_trained, read_config

NEW = ("car", "bus", "tram")
GIVEN: dict[str, Any] = {
    "input_size": [3, 24, 24], "crop_pct": 0.8, "interpolation": "bilinear",
    "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
}  # fmt: skip


def preprocessing(folder: Path, **given: Any) -> Preprocess:
    """What is read of a `pretrained_cfg`; with label names, Transformers reads the configuration without timm."""
    config = {"architecture": "resnet18", "num_classes": 2, "label_names": ["a", "b"], "pretrained_cfg": given}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return read_processor(str(folder), tf.TimmWrapperConfig.from_dict(config), local_files_only=True)


def test_pretrained_cfg_says_how_images_are_prepared(tmp_path: Path) -> None:
    """By timm's `transforms_imagenet_eval`: the shorter side becomes floor(24 / 0.8), the center is cropped."""
    read = preprocessing(tmp_path, **GIVEN)
    assert read == Preprocess(24, 24, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", shortest_edge=30)
    squashed = preprocessing(tmp_path, **GIVEN | {"crop_mode": "squash", "input_size": [3, 24, 32]})
    assert (squashed.height, squashed.width, squashed.before_crop, squashed.shortest_edge) == (24, 32, (30, 40), None)
    defaults = preprocessing(tmp_path, input_size=[3, 224, 224])  # DEFAULT_CROP_PCT 0.875, bicubic, ImageNet
    assert (defaults.shortest_edge, defaults.resample, defaults.mean) == (256, "bicubic", (0.485, 0.456, 0.406))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"crop_mode": "border"}, "crop_mode border with input_size 24 x 24 is not supported"),
        ({"input_size": [3, 24, 32]}, "crop_mode center with input_size 24 x 32 is not supported; use squash"),
        ({"interpolation": "random"}, "interpolation random is not supported; use one of nearest,"),
        ({"std": [0, 1, 1]}, r"image_std \(0, 1, 1\) is invalid"),
        ({"mean": [0.5]}, r"image_mean \(0.5,\) is invalid; use 3 finite numbers"),
        ({"crop_pct": "all"}, "is invalid: "),
    ],
)
def test_what_timm_does_in_another_way_is_refused(given: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"pretrained_cfg in its config\.json,.*{told}"):
        preprocessing(tmp_path, **GIVEN | given)


def test_without_timm_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 1000, "pretrained_cfg": GIVEN}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("vitft.errors.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"^{tmp_path}: a timm checkpoint needs timm, .*'vitft\[timm\]'\.$"):
        read_config(tmp_path)


# -- with timm --------------------------------------------------------------------------------------

TINY: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 32, "patch_size": 8},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2)},
    "convnext_atto": {"dims": (16, 16, 16, 16), "depths": (1, 2, 1, 1)},
    "deit_tiny_distilled_patch16_224": {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8},
}  # fmt: skip
HEADS = {"convnext_atto": ("head.fc",), "swin_tiny_patch4_window7_224": ("head.fc",),
         "deit_tiny_distilled_patch16_224": ("head", "head_dist")}  # fmt: skip


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", minversion="1.0.23", exc_type=ImportError)


def checkpoint(timm: Any, architecture: str, folder: Path, **given: Any) -> Any:
    """A random timm model, saved as timm itself does for the hub."""
    from timm.models._hub import save_for_hf  # type: ignore[import-not-found, unused-ignore]

    torch.manual_seed(5)
    model = timm.create_model(architecture, num_classes=5, **TINY[architecture])
    size = {"input_size": [3, 32, 32]}
    config = {"label_names": list("vwxyz"), "pretrained_cfg": size | given}
    save_for_hf(model, folder, model_config=config, model_args=dict(TINY[architecture]))
    return model.eval()


@pytest.mark.parametrize("architecture", TINY)
def test_a_timm_model_is_loaded_trained_saved_and_read_by_transformers(
    architecture: str, timm: Any, tmp_path: Path
) -> None:
    theirs = checkpoint(timm, architecture, tmp_path / "timm").state_dict()
    loaded = load_for_training(TrainConfig(model=str(tmp_path / "timm")), NEW)
    ours = {name.removeprefix("timm_model."): tensor for name, tensor in loaded.model.state_dict().items()}
    heads = HEADS.get(architecture, ("head",))
    assert head_of(loaded.model) == tuple(f"timm_model.{name}" for name in heads)
    changed = {name for name in theirs if not torch.equal(theirs[name], ours[name])}
    assert changed == {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    assert len(block_stacks(loaded.model)) == (4 if "convnext" in architecture else 2 if "swin" in architecture else 1)

    config = TrainConfig(
        dataset="digits", model=str(tmp_path / "timm"), max_train_samples=16, max_eval_samples=10, max_steps=1,
        batch_size=8, device="cpu", precision="fp32", layer_decay=0.5, head_init="random", drop_path=0.1,
    )  # fmt: skip
    result = train(config, output=tmp_path / "run")
    assert evaluate(result.run, device="cpu").loss == pytest.approx(result.scores["test"].loss)
    mine = load_trained(result.checkpoint)
    assert mine.labels == tuple("0123456789")
    plain = tf.AutoModelForImageClassification.from_pretrained(result.checkpoint).eval()
    assert list(plain.config.id2label.values()) == list(mine.labels)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(pixel_values=pixels).logits, mine.model(pixel_values=pixels).logits)


def test_frozen_parts_of_a_timm_model_stay(timm: Any, tmp_path: Path) -> None:
    checkpoint(timm, "convnext_atto", tmp_path)
    for freeze, trained in (("backbone", r"head\.fc\."), (4, r"stages\.3\.|norm|head\.")):
        model = load_for_training(TrainConfig(model=str(tmp_path), freeze=freeze), NEW).model
        named = {name.removeprefix("timm_model.") for name, one in model.named_parameters() if one.requires_grad}
        assert named, freeze
        assert all(re.match(trained, name) for name in named), (freeze, named)


def test_layer_decay_counts_the_blocks_of_a_timm_model(timm: Any, tmp_path: Path) -> None:
    checkpoint(timm, "vit_tiny_patch16_224", tmp_path)
    depths = parameter_depths(load_for_training(TrainConfig(model=str(tmp_path)), NEW).model)
    for name, depth in depths.items():
        block = re.search(r"blocks\.(\d+)\.", name)
        assert depth == (int(block[1]) + 1 if block else 4 if re.search(r"\.(norm|head)\.", name) else 0), name


def test_another_input_size_is_that_of_timm_itself(timm: Any, tmp_path: Path) -> None:
    theirs = checkpoint(timm, "vit_tiny_patch16_224", tmp_path)
    loaded = load_for_training(TrainConfig(model=str(tmp_path), image_size=48), tuple("vwxyz"))
    theirs.set_input_size(img_size=(48, 48))
    pixels = torch.rand(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(pixel_values=pixels).logits, theirs(pixels))
    assert (loaded.preprocess.height, loaded.model.config.model_args["img_size"]) == (48, 48)
    loaded.model.save_pretrained(tmp_path / "saved")
    assert load_trained(tmp_path / "saved").preprocess.height == 48
    with pytest.raises(ModelError, match=r"image_size 44: vit_tiny_patch16_224 does not accept it; use 32\."):
        load_for_training(TrainConfig(model=str(tmp_path), image_size=44), NEW)


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_images_are_prepared_as_by_timm(mode: str, timm: Any, tmp_path: Path) -> None:
    """Within rounding, for sizes whose margins are even: torchvision rounds a half of a pixel to either side."""
    from PIL import Image

    checkpoint(timm, "vit_tiny_patch16_224", tmp_path, crop_pct=0.8, crop_mode=mode)
    loaded = load_trained(tmp_path)
    given = timm.data.resolve_data_config(loaded.model.config.pretrained_cfg)
    pixels = torch.randint(0, 256, (40, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    wanted = timm.data.create_transform(**given, is_training=False)(Image.fromarray(pixels.numpy()))
    found = preprocess_images([pixels], loaded.preprocess)[0]
    torch.testing.assert_close(found, wanted, atol=0.01, rtol=0)
