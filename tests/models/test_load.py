"""Loading models from folders and names: kept and new weights, preprocessing, and one-line errors."""

import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

import vitft.models.load
from tests.conftest import ARCHITECTURES, tiny_model
from tests.families import tiny_classifier
from vitft import TrainConfig, evaluate, predict, train
from vitft.checkpoints.checkpoint import save_model
from vitft.checkpoints.metadata import Card
from vitft.config.recipe import read_recipe
from vitft.data.augment import Preprocess
from vitft.errors import ModelError, UsageError, VitftError
from vitft.models.heads import label_tensors
from vitft.models.load import Loaded, compiled, load_for_training, load_trained, set_training, spec_of

Saved = Callable[..., Path]
OWN, OTHERS = ("ant", "bee", "cat"), ("car", "bus", "tram")


def load(folder: Path | str, labels: tuple[str, ...] = OWN, **settings: Any) -> Loaded:
    return load_for_training(TrainConfig(model=str(folder), **settings), labels)


def refusal(folder: Path | str, **settings: Any) -> str:
    """The one-line error for a model."""
    with pytest.raises(ModelError) as caught:
        load(folder, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text or settings
    return text


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def logits(model: Any, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=pixels, **options).logits


def same(a: Loaded, b: Loaded) -> bool:
    return torch.equal(head(a.model), head(b.model))


def head(model: Any) -> torch.Tensor:
    return model.classifier.weight.detach()


# -- weights and heads ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_float32_for_any_stored_dtype(saved: Saved, architecture: str, dtype: torch.dtype) -> None:
    folder = saved(architecture, dtype=dtype)

    model = load(folder).model

    stored = tiny_model(architecture).to(dtype).float().state_dict()
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_head_depends_only_on_the_seed(saved: Saved, architecture: str) -> None:
    folder, four = saved(architecture), (*OTHERS, "van")

    first = load(folder, four)
    torch.rand(3)  # the generator's state does not matter
    again, other = load(folder, four), load(folder, four, seed=1)

    assert first.new_head
    assert first.labels == four
    assert head(first.model).shape[0] == 4
    assert same(first, again)
    assert not same(first, other)
    kept = tiny_model(architecture).state_dict()
    new = first.model.state_dict()
    assert all(torch.equal(new[name], kept[name]) for name in kept if not name.startswith("classifier"))


def test_a_new_head_does_not_depend_on_the_backbone(saved: Saved) -> None:
    """Nor on whether the checkpoint has a head of another size."""
    with_head = saved("vit", labels=("a", "b"))
    transformers.ViTModel.from_pretrained(with_head).save_pretrained(with_head.parent / "backbone")

    assert torch.equal(head(load(with_head).model), head(load(with_head.parent / "backbone").model))


@pytest.mark.parametrize("labels", [OWN, ("cat", "ant", "bee")], ids=["same order", "another order"])
def test_a_head_for_these_classes_is_kept_in_its_own_order(saved: Saved, labels: tuple[str, ...]) -> None:
    loaded = load(saved("vit"), labels)

    assert not loaded.new_head
    assert loaded.labels == OWN
    assert loaded.model.config.id2label == dict(enumerate(OWN))
    assert torch.equal(head(loaded.model), head(tiny_model("vit")))


def test_a_head_for_other_classes_of_the_same_number_is_not_kept(saved: Saved) -> None:
    loaded = load(saved("vit"), OTHERS)

    assert loaded.new_head
    assert loaded.model.config.id2label == dict(enumerate(OTHERS))
    assert not torch.equal(head(loaded.model), head(tiny_model("vit")))


def test_a_distilled_deit_keeps_both_of_its_heads(saved: Saved) -> None:
    folder = saved("deit")
    base = transformers.AutoConfig.from_pretrained(folder)
    transformers.DeiTForImageClassificationWithTeacher(base).save_pretrained(folder)

    assert not load(folder).new_head
    reference = transformers.AutoModelForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(load_trained(folder).model, images(32)), logits(reference, images(32)))


def test_a_frozen_backbone_leaves_the_head_to_train(saved: Saved) -> None:
    model = load(saved("vit", hidden_dropout_prob=0.5), freeze="backbone").model
    set_training(model, "backbone")

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {"classifier.weight", "classifier.bias"}
    assert not any(module.training for module in model.base_model.modules())


# -- other input sizes ------------------------------------------------------------------------------


ALWAYS_INTERPOLATE = ("dinov2", "dinov2_with_registers")


@pytest.mark.parametrize(
    "family",
    [
        "vit",
        "deit",
        "beit",
        "data2vec-vision",
        "clip",
        "siglip",
        "vit_msn",
        "ijepa",
        "swin",
        "swinv2",
        *ALWAYS_INTERPOLATE,
    ],
)
@pytest.mark.parametrize("size", [16, 48, 80])
def test_resizing_gives_the_logits_of_the_models_own_interpolation(family: str, size: int, tmp_path: Path) -> None:
    """Within 1e-5, because of float32 rounding."""
    model = tiny_classifier(family, id2label=dict(enumerate(OWN)))
    model.save_pretrained(tmp_path)
    if size == 16 and family.startswith("swin"):  # smaller than its windows
        assert family == "swinv2" or "image_size 16: swin does not accept it" in refusal(tmp_path, image_size=16)
        return
    loaded = load(tmp_path, image_size=size)

    option = {} if family in (*ALWAYS_INTERPOLATE, "swin", "swinv2") else {"interpolate_pos_encoding": True}
    wanted = logits(model, images(size), **option)
    assert wanted.std() > 0.05
    torch.testing.assert_close(logits(loaded.model, images(size)), wanted, atol=1e-5, rtol=1e-5)
    assert (loaded.preprocess.height, loaded.preprocess.width) == (size, size)


@pytest.mark.parametrize(
    ("sizes", "to"),
    [({"image_size": [64, 32]}, 32), ({"image_size": [64, 32]}, 64), ({"patch_size": [8, 16]}, 64),
     ({"image_size": [24, 48], "patch_size": [4, 8]}, 16)],
)  # fmt: skip
def test_rectangles_are_resized_along_each_side(saved: Saved, sizes: dict[str, Any], to: int) -> None:
    folder = saved("vit", **sizes)
    model = load(folder).model
    rows, columns = (side // patch for side, patch in zip(pair(model.config.image_size), pair(model.config.patch_size),
                                                          strict=True))  # fmt: skip
    with torch.no_grad():  # positions that increase linearly along both sides do so at any size
        down, across = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
        table = model.vit.embeddings.position_embeddings
        table[0, 1:] = torch.stack([down / rows, across / columns] * 8, dim=-1).reshape(rows * columns, 16)
    model.save_pretrained(folder)

    loaded = load(folder, image_size=to)

    new = loaded.model.vit.embeddings.position_embeddings.detach()
    down, across = (to // patch for patch in pair(model.config.patch_size))
    grid = new[0, 1:].reshape(down, across, 16)
    assert torch.equal(new[:, 0], table[:, 0])
    middle = grid[down // 2, across // 2]
    torch.testing.assert_close(middle[:2], torch.tensor([(down // 2 + 0.5) / down, (across // 2 + 0.5) / across]),
                               atol=0.05, rtol=0)  # fmt: skip
    assert logits(loaded.model, images(to)).shape == (2, 3)
    assert (loaded.preprocess.height, loaded.preprocess.width) == (to, to)


def pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


@pytest.mark.parametrize("family", ["levit", "hiera", "pvt"])
def test_the_error_names_positions_that_cannot_be_resized(family: str, tmp_path: Path) -> None:
    model = tiny_classifier(family)
    model.save_pretrained(tmp_path)
    side, _ = pair(model.config.image_size)
    assert refusal(tmp_path, image_size=96).endswith(f"cannot be resized; use {side}.")


def test_the_error_for_an_unsupported_size_names_the_models_own(saved: Saved) -> None:
    folder = saved("swin", image_size=[32, 64])
    assert refusal(folder, image_size=16) == "image_size 16: swin does not accept it; use 32 x 64."


@pytest.mark.parametrize(
    ("settings", "size"),
    [({"num_channels": 1}, (32, 32)), ({"image_size": [64, 32]}, (64, 32)), ({"patch_size": [8, 16]}, (32, 32))],
)
def test_grayscale_and_rectangular_models_are_trained_scored_and_trained_again(
    saved: Saved, tmp_path: Path, settings: dict[str, Any], size: tuple[int, int]
) -> None:
    config = TrainConfig(
        dataset="digits", model=str(saved("vit", **settings)), max_steps=2, batch_size=8, max_train_samples=40,
        max_eval_samples=20, device="cpu", precision="fp32", augment="crop",
    )  # fmt: skip
    result = train(config, output=tmp_path / "run")

    last = load_trained(tmp_path / "run" / "last")
    assert (last.preprocess.height, last.preprocess.width, last.preprocess.channels) == (
        *size, settings.get("num_channels", 3),
    )  # fmt: skip
    assert evaluate(result.run).count == 20
    assert all(len(row.top) == 2 for row in predict("docs/digits", result.run, top_k=2))
    again = train(config.model_copy(update={"model": str(result.run)}), output=tmp_path / "again")
    assert again.scores.keys() == result.scores.keys()
    scratch = TrainConfig.parse(read_recipe(tmp_path / "run" / "config.yaml") | {"from_scratch": True})
    assert load_for_training(scratch, OWN).preprocess == load(config.model).preprocess


def test_a_model_with_other_channels_is_refused(saved: Saved) -> None:
    assert "a model with 4 channels" in refusal(saved("vit", num_channels=4))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [48, 64])
def test_a_model_of_another_size_loads_in_plain_transformers(
    saved: Saved, tmp_path: Path, architecture: str, size: int
) -> None:
    loaded = load(saved(architecture, dtype=torch.float16), image_size=size)
    card = Card(TrainConfig(), loaded.labels, 0, 0.0, {}, {})
    save_model(tmp_path / "new", loaded.model, loaded.preprocess, card)

    plain, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "new", output_loading_info=True
    )

    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.config.image_size == size
    assert plain.config.id2label == dict(enumerate(OWN))
    assert torch.equal(logits(plain, images(size)), logits(loaded.model, images(size)))


def test_beits_relative_positions_keep_their_axes(saved: Saved) -> None:
    """One head's bias increases with the row offset, the other's with the column offset; resizing keeps that."""
    folder = saved("beit")
    file = folder / "model.safetensors"
    weights = load_file(file)
    tables = [name for name in weights if name.endswith("relative_position_bias_table")]
    rows, columns = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    for name in tables:
        weights[name][:-3] = torch.stack([rows, columns], dim=-1).view(49, 2)
    save_file(weights, file, {"format": "pt"})

    state = load(folder, image_size=48).model.state_dict()

    resized = [tensor for name, tensor in state.items() if name.endswith("relative_position_bias_table")]
    assert len(resized) == len(tables) == 2
    for table in resized:
        by_row, by_column = table[:-3].view(11, 11, 2).unbind(-1)
        for bias in (by_row, by_column.T):
            torch.testing.assert_close(bias, bias[:, :1].expand(11, 11))
            assert (bias[:, 0].diff() > 0.3).all()  # seven values over eleven positions: 7 / 11 each, less at the ends


def test_beits_relative_positions_are_resized_too(saved: Saved) -> None:
    """The class token rows are unchanged, and so is the center."""
    loaded = load(saved("beit"), image_size=48)
    name = "relative_position_bias_table"
    tables = {key: value for key, value in loaded.model.state_dict().items() if key.endswith(name)}
    old = {key: value for key, value in tiny_model("beit").state_dict().items() if key.endswith(name)}

    assert len(tables) == 2
    for key, table in tables.items():
        assert table.shape[0] == 11**2 + 3  # offsets -5..5 on both axes, and three for the class token
        assert torch.equal(table[-3:], old[key][-3:])
        middle = table[:-3].view(11, 11, -1)[5, 5]
        torch.testing.assert_close(middle, old[key][:-3].view(7, 7, -1)[3, 3])


def test_the_error_for_a_size_that_is_not_a_multiple_of_the_patch_suggests_two(saved: Saved) -> None:
    text = refusal(saved("vit"), image_size=36)

    assert text == "image_size 36 is not a multiple of patch_size 8; try 32 or 40."


# -- new weights ------------------------------------------------------------------------------------


def test_a_preset_from_scratch_is_seeded() -> None:
    models = [load("vit-micro", from_scratch=True, seed=seed).model.state_dict() for seed in (0, 0, 1)]

    weight = "classifier.weight"
    assert torch.equal(models[0][weight], models[1][weight])
    assert not torch.equal(models[0][weight], models[2][weight])


def test_sizes_from_scratch_override_the_preset() -> None:
    sizes = {"image_size": 24, "patch_size": 6, "width": 24, "layers": 1, "heads": 3}
    config = load("vit-micro", from_scratch=True, **sizes).model.config

    assert (config.image_size, config.patch_size, config.hidden_size) == (24, 6, 24)
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (1, 3, 96)
    assert config.num_labels == 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_from_scratch_has_none_of_its_weights(saved: Saved, architecture: str) -> None:
    loaded = load(saved(architecture), from_scratch=True, image_size=48)

    assert loaded.new_head
    assert logits(loaded.model, images(48)).shape == (2, 3)
    assert not torch.equal(head(loaded.model), head(tiny_model(architecture)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "vit-small"}, "add --from-scratch"),
        ({"model": "vit-smal"}, "did you mean vit-small?"),
        ({"model": "vit-micro", "from_scratch": True, "image_size": 30}, "not a multiple of patch_size"),
        ({"model": "vit-micro", "from_scratch": True, "width": 30, "heads": 4}, "heads"),
    ],
)
def test_invalid_sizes_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(VitftError, match=words) as caught:
        load_for_training(TrainConfig(**settings), OWN)
    assert "\n" not in str(caught.value)


# -- unusable models --------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "absent")


def test_a_file_instead_of_a_folder_is_refused(saved: Saved) -> None:
    assert "use the folder" in refusal(saved() / "model.safetensors")


def test_the_error_for_a_folder_without_configuration_lists_its_files(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").touch()
    assert "no config.json (it contains cat.jpg)" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{not json", "[]", "{}", '{"model_type": "nonesuch"}', '{"model_type": "vit", "image_size": "big"}'],
)
def test_an_invalid_configuration_gets_a_one_line_error(saved: Saved, text: str) -> None:
    folder = saved()
    (folder / "config.json").write_text(text)
    refusal(folder)


@pytest.mark.parametrize("text", ["{not json", "[1]", '{"size": {"longest_edge": 9}}', '{"resample": 6}'])
def test_an_invalid_preprocessor_gets_a_one_line_error(saved: Saved, text: str) -> None:
    folder = saved()
    (folder / "preprocessor_config.json").write_text(text)
    assert "preprocessor_config.json" in refusal(folder)


def test_a_text_model_cannot_classify_images(tmp_path: Path) -> None:
    transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a bert model cannot classify images"):
        load(tmp_path)
    with pytest.raises(ModelError, match="a bert model cannot classify images"):
        load_trained(tmp_path)


def test_a_backbone_without_a_head_cannot_be_evaluated(saved: Saved) -> None:
    folder = saved()
    transformers.ViTModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(ModelError, match="no classification head; fine-tune it first"):
        load_trained(folder)


@pytest.mark.parametrize("damage", ["truncated", "header"])
def test_corrupt_weights_get_a_one_line_error(saved: Saved, damage: str) -> None:
    folder = saved()
    file = folder / "model.safetensors"
    content = file.read_bytes()
    flipped = content[:20] + bytes(byte ^ 0xFF for byte in content[20:60]) + content[60:]
    file.write_bytes(content[: len(content) // 2] if damage == "truncated" else flipped)
    refusal(folder)


def test_a_folder_without_weights_gets_a_one_line_error(saved: Saved) -> None:
    folder = saved()
    (folder / "model.safetensors").unlink()
    refusal(folder)


class _Malice:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("form", ["zip", "plain pickle"])
def test_a_pickle_is_not_executed(saved: Saved, tmp_path: Path, form: str) -> None:
    folder, victim = saved(), tmp_path / "owned"
    (folder / "model.safetensors").unlink()
    content = {"classifier.weight": _Malice(victim)}
    if form == "zip":
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content))

    refusal(folder)

    assert not victim.exists()


def test_valid_pickled_weights_load(saved: Saved) -> None:
    folder = saved()
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("vit").state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(head(load(folder).model), head(tiny_model("vit")))


@pytest.mark.parametrize("other", ["deit", "swin"])
def test_weights_of_another_architecture_are_refused(saved: Saved, other: str) -> None:
    folder = saved("vit")
    (saved(other) / "model.safetensors").replace(folder / "model.safetensors")
    assert "is this the right folder?" in refusal(folder)


def test_weights_of_another_shape_are_refused(saved: Saved) -> None:
    folder = saved("vit")
    (saved("vit", hidden_size=32) / "model.safetensors").replace(folder / "model.safetensors")
    assert "of another shape" in refusal(folder)


NO_HUB = """
import time
time.sleep = lambda seconds: print("retried")
from vitft.config.train import TrainConfig
from vitft.errors import ModelError
from vitft.models.load import load_for_training, load_trained
for load in (load_trained, lambda name: load_for_training(TrainConfig(model=name), "ab")):
    try:
        load("owner/name")
    except ModelError as error:
        print(error)
"""


def test_without_a_network_a_hub_model_fails_at_once_with_one_line(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", NO_HUB], capture_output=True, text=True, env=env, check=False)

    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("model owner/name: ")
        for word in (
            "http://127.0.0.1:9 could not be reached",
            str(tmp_path),
            "local folder",
            "from_scratch",
        ):
            assert word in line


# -- preprocessing ----------------------------------------------------------------------------------


def test_the_preprocessor_of_googles_checkpoints_is_read(saved: Saved) -> None:
    """Like that of google/vit-base-patch16-224-in21k: its size is an int, and it names no class."""
    folder, half = saved(), [0.5, 0.5, 0.5]
    document = {"do_normalize": True, "do_resize": True, "image_mean": half, "image_std": half}
    (folder / "preprocessor_config.json").write_text(json.dumps(document | {"resample": 2, "size": 32}))

    assert load(folder).preprocess == Preprocess(32, 32)


@pytest.mark.parametrize("prepared", [(48, 48), (48, 64)])
@pytest.mark.parametrize(
    ("architecture", "fixed"), [("vit", True), ("deit", True), ("beit", True), ("dinov2", False), ("swin", False)]
)
def test_images_get_a_size_that_the_model_accepts_whatever_the_preprocessor_says(
    saved: Saved, architecture: str, fixed: bool, prepared: tuple[int, int]
) -> None:
    folder = saved(architecture)
    (folder / "preprocessor_config.json").write_text(json.dumps(Preprocess(*prepared).to_json()))
    square = prepared[0] == prepared[1]
    loaded = load(folder)
    size = loaded.preprocess.height, loaded.preprocess.width
    assert size == ((32, 32) if fixed or (architecture == "swin" and not square) else prepared)
    assert logits(loaded.model, torch.zeros(1, 3, *size)).shape == (1, 3)


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIPS = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("vit", Preprocess(32, 32)),
        ("deit", Preprocess(32, 32, **IMAGENET, resample="bicubic", before_crop=(37, 37))),
        ("siglip", Preprocess(32, 32, resample="bicubic")),
        ("clip", Preprocess(32, 32, **CLIPS, resample="bicubic", shortest_edge=32)),
        ("dinov2_with_registers", Preprocess(32, 32, **IMAGENET, resample="bicubic", shortest_edge=32)),
        ("resnet", Preprocess(384, 384, **IMAGENET, resample="bicubic")),
        ("pvt", Preprocess(32, 32, **IMAGENET, resample="bicubic")),
    ],
)
def test_without_a_preprocessor_the_default_of_the_architecture_is_used(
    family: str, wanted: Preprocess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_classifier(family).save_pretrained(tmp_path)

    assert load(tmp_path).preprocess == wanted
    assert "has no preprocessor_config.json: using the default of" in capsys.readouterr().err


@pytest.mark.parametrize("nested", [True, False])
def test_a_processor_config_of_transformers_5_takes_precedence(nested: bool, tmp_path: Path) -> None:
    tiny_classifier("siglip").save_pretrained(tmp_path)
    own = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    transformers.ViTImageProcessorPil(size=32).save_pretrained(tmp_path)
    stored = {"image_processor": own.to_dict()} if nested else {}
    text = json.dumps(stored | {"processor_class": "SiglipProcessor"}, default=str)
    (tmp_path / "processor_config.json").write_text(text)

    mean = load(tmp_path).preprocess.mean

    assert mean == ((0.1, 0.2, 0.3) if nested else (0.5, 0.5, 0.5))


SAVED = {
    "vit": {"size": {"height": 32, "width": 32}, "resample": 1},
    "clip": {"size": 40, "crop_size": 32},
    "deit": {"size": 36, "crop_size": 32, "image_mean": [0.485, 0.456, 0.406]},
    "resnet": {"size": {"shortest_edge": 48}, "crop_pct": 0.6},
    "mobilevit": {"size": {"shortest_edge": 70}, "crop_size": 64},
    "poolformer": {"size": {"shortest_edge": 48}, "crop_size": 48},
    "levit": {"size": {"shortest_edge": 32}, "crop_size": 32},
    "efficientnet": {"size": 32, "image_std": [0.478, 0.473, 0.474]},
    "dinov2": {"do_resize": False, "crop_size": 32},
}


@pytest.mark.parametrize("family", SAVED)
def test_a_pipeline_gives_the_same_scores_for_a_saved_model(family: str, tmp_path: Path) -> None:
    """With the checkpoint's own processor, and with the one that vitft saves."""
    model = tiny_classifier(family, id2label=dict(enumerate(OWN)))
    processor = IMAGE_PROCESSOR_MAPPING[type(model.config)]["pil"](**SAVED[family])
    rows, columns = np.mgrid[0:91, 0:140]
    photo = np.stack([columns * 255 / 140, rows * 255 / 91, (rows * columns) % 256], -1).astype("u1")
    Image.fromarray(photo).save(tmp_path / "photo.png")
    spread = logits(model, processor(photo, return_tensors="pt")["pixel_values"]).std()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name in label_tensors(model):
                tensor.div_(spread)
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    loaded = load(tmp_path / "own")
    save_model(tmp_path / "saved", loaded.model, loaded.preprocess, Card(TrainConfig(), OWN, 0, 0.0, {}, {}))

    scores = []
    for folder in ("own", "saved"):
        classify = transformers.pipeline("image-classification", model=str(tmp_path / folder))
        scores.append({one["label"]: one["score"] for one in classify(str(tmp_path / "photo.png"))})
        (row,) = predict(tmp_path / "photo.png", tmp_path / folder, top_k=3)
        scores.append(dict(row.top))

    assert 0.4 < max(scores[0].values()) < 0.99
    for other in scores[1:]:
        assert max(abs(other[label] - score) for label, score in scores[0].items()) < 1e-4


@pytest.mark.parametrize("document", ["{}", "[1]", '{"image_processor": 3}', "{"])
def test_an_invalid_processor_config_gets_a_one_line_error_or_is_ignored(saved: Saved, document: str) -> None:
    folder = saved()
    (folder / "processor_config.json").write_text(document)
    if document in ("{}", "[1]"):  # like Transformers
        assert load(folder).preprocess == Preprocess(32, 32)
    else:
        assert "preprocessor_config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("settings", "labels"),
    [({"problem_type": "multi_label_classification"}, OWN), ({}, ("yes",)), ({"problem_type": "regression"}, OWN)],
)
def test_independent_labels_are_scored_like_the_pipeline(
    saved: Saved, tmp_path: Path, settings: dict[str, Any], labels: tuple[str, ...]
) -> None:
    folder = saved("vit", labels, **settings)
    transformers.ViTImageProcessorPil(size=32).save_pretrained(folder)
    Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save(tmp_path / "photo.png")
    classify = transformers.pipeline("image-classification", model=str(folder))

    (row,) = predict(tmp_path / "photo.png", folder)

    wanted = {one["label"]: one["score"] for one in classify(str(tmp_path / "photo.png"))}
    assert dict(row.top) == pytest.approx(wanted, abs=1e-5)
    assert sum(wanted.values()) != pytest.approx(1, abs=1e-3)
    with pytest.raises(ModelError, match="scores each label separately"):
        evaluate(folder, dataset="digits")


def test_a_multi_label_head_is_replaced_for_training(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load(saved("vit", problem_type="multi_label_classification"))

    assert loaded.new_head
    assert loaded.model.config.problem_type is None
    assert "its head is replaced by a new softmax head" in capsys.readouterr().err


def test_return_dict_false_in_a_configuration_is_overridden(tmp_path: Path) -> None:
    for family in ("vit", "clip"):
        model = tiny_classifier(family, id2label=dict(enumerate(OWN)))
        model.config.return_dict = False
        getattr(model.config, "vision_config", model.config).return_dict = False
        model.save_pretrained(tmp_path / family)
        assert logits(load_trained(tmp_path / family).model, images(32)).shape == (2, 3)


@pytest.mark.parametrize("names", [["ant", "bee", "cat"], {"0": "ant", "2": "cat"}, None])
def test_missing_class_names_are_replaced_and_lists_refused(saved: Saved, names: Any) -> None:
    folder = saved()
    document = json.loads((folder / "config.json").read_text())
    document |= {"id2label": names, "num_labels": 3}
    (folder / "config.json").write_text(json.dumps(document))

    if isinstance(names, list):
        assert "not a readable Transformers model" in refusal(folder)
    else:
        assert load_trained(folder).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_the_error_for_sizes_that_do_not_fit_suggests_valid_values() -> None:
    for changes, says in (
        ({"heads": 7}, "width 64 is not a multiple of heads 7; try heads 4 or 8."),
        ({"image_size": 30}, "image_size 30 is not a multiple of patch_size 4; try image_size 28 or 32."),
    ):
        with pytest.raises(UsageError) as caught:
            spec_of(TrainConfig(from_scratch=True, model="vit-micro", **changes))
        assert str(caught.value) == says
    wide = spec_of(TrainConfig(from_scratch=True, model="vit-micro", width=96))
    assert (wide.width, wide.mlp) == (96, 384)


# -- compiled blocks --------------------------------------------------------------------------------


class _Compiled(torch.nn.Module):
    """A fast stand-in for a compiled module that counts its calls."""

    calls = 0

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any, **named: Any) -> Any:
        type(self).calls += 1
        return self.module(*given, **named)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_repeated_blocks_are_compiled(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: _Compiled(module))
    monkeypatch.setattr(_Compiled, "calls", 0)
    model, images = tiny_model(architecture), torch.randn(2, 3, 32, 32)
    before, names = [*model.modules()], [*model.state_dict()]
    wanted = model(pixel_values=images).logits
    fast = compiled(model)
    assert torch.equal(fast(pixel_values=images).logits, wanted)
    assert _Compiled.calls == 2  # blocks
    with pytest.raises((ValueError, RuntimeError), match="channel"):
        fast(pixel_values=images[:, :2])
    assert torch.equal(model(pixel_values=images).logits, wanted)
    assert _Compiled.calls == 2  # the model itself is unchanged, even after an error
    assert [*model.modules()] == before
    assert [*model.state_dict()] == names


def test_loading_is_quiet_and_leaves_the_logs_of_transformers_as_they_were(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = transformers.utils.logging
    before = logs.get_verbosity(), logs.is_progress_bar_enabled()
    seen: list[int] = []
    real = vitft.models.load.check_memory

    def watched(*given: Any) -> None:
        seen.append(logs.get_verbosity())
        real(*given)

    logs.set_verbosity_info()
    logs.enable_progress_bar()
    try:
        monkeypatch.setattr("vitft.models.load.check_memory", watched)
        load_trained(saved())
        assert set(seen) == {logging.ERROR}
        assert (logs.get_verbosity(), logs.is_progress_bar_enabled()) == (logging.INFO, True)
    finally:
        logs.set_verbosity(before[0])
