"""Classifiers made here, for backbones that Transformers has no classifier for, and those that are another's layers."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from tests.families import FAMILIES, tiny_classifier
from tests.models.test_heads import NEW, load, saved
from vitft import TrainConfig, evaluate, train
from vitft.errors import ModelError
from vitft.models.classifiers import classifier_class
from vitft.models.load import load_trained, read_config

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
MADE_HERE = ("dinov3_vit", "dinov3_convnext")


@pytest.mark.parametrize("family", MADE_HERE)
def test_transformers_loads_the_backbone_and_vitft_the_whole(family: str, tmp_path: Path) -> None:
    model = tiny_classifier(family, id2label=dict(enumerate(NEW)))
    folder = saved(model, tmp_path)
    loaded = load_trained(folder)
    with torch.no_grad():
        logits = model(pixel_values=IMAGES).logits
        assert torch.equal(loaded.model(pixel_values=IMAGES).logits, logits)
        tokens = tf.AutoModel.from_pretrained(folder).eval()(IMAGES).last_hidden_state
    assert loaded.labels == NEW
    # As DINOv3's own linear classifiers: the class token, and the mean of the patches, which come after two registers.
    read = {"dinov3_vit": torch.cat([tokens[:, 0], tokens[:, 3:].mean(dim=1)], dim=1), "dinov3_convnext": tokens[:, 0]}
    torch.testing.assert_close(read[family] @ model.classifier.weight.T + model.classifier.bias, logits)


def test_every_architecture_of_transformers_is_tested_or_refused() -> None:
    others = set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES) - FAMILIES.keys()
    assert others == REFUSED.keys() | {"timm_wrapper"}  # tests/models/test_timm.py
    with pytest.raises(ModelError, match="a bert model cannot classify images"):
        classifier_class(tf.BertConfig())


REFUSED = {
    "imagegpt": "an imagegpt model reads colors as words, not pixels; use a ViT.",
    "pp_lcnet": "a pp_lcnet model returns no logits in Transformers; use a MobileNet or a small ResNet.",
    "shieldgemma2": "a shieldgemma2 model answers yes or no to a question about an image; use a SigLIP.",
    "siglip2": "a siglip2 model of any aspect ratio (NaFlex) reads lists of patches, not images; "
    "use one of a fixed size, such as google/siglip2-base-patch16-224.",
    "dinat": "a dinat model needs NATTEN, which is not installed; use a Swin.",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_trained_is_refused_with_its_reason(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitft.models.classifiers.find_spec", lambda name: None)
    name = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[family]
    name = name if isinstance(name, str) else name[0]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "architectures": [name]}))
    for read in (load_trained, read_config, lambda folder: load(folder)):
        with pytest.raises(ModelError) as caught:
            read(tmp_path)
        assert str(caught.value) == f"{tmp_path}: {REFUSED[family]}"


def test_a_masked_autoencoder_is_fine_tuned_as_the_vit_it_contains(tmp_path: Path) -> None:
    sizes = FAMILIES["vit"]
    decoder = {"decoder_num_attention_heads": 2, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
    mae = tf.ViTMAEForPreTraining(tf.ViTMAEConfig(**sizes, **decoder, mask_ratio=0.0)).eval()
    model = load(saved(mae, tmp_path / "mae")).model.eval()
    with torch.no_grad():
        in_order = torch.arange(16.0).expand(len(IMAGES), -1)  # by which it would shuffle the patches
        assert torch.equal(model.vit(IMAGES).last_hidden_state, mae.vit(IMAGES, noise=in_order).last_hidden_state)
        folder = saved(model, tmp_path / "vit")
        again = tf.AutoModelForImageClassification.from_pretrained(folder).eval()
        assert torch.equal(again(pixel_values=IMAGES).logits, model(pixel_values=IMAGES).logits)


def test_a_dinov3_is_trained_resized_and_scored(tmp_path: Path) -> None:
    folder = saved(tiny_classifier("dinov3_vit"), tmp_path / "model")
    config = TrainConfig(
        dataset="digits", model=str(folder), image_size=16, max_train_samples=64, max_eval_samples=50, epochs=2,
        device="cpu", precision="fp32", layer_decay=0.7,
    )  # fmt: skip
    result = train(config, output=tmp_path / "run")
    score = evaluate(result.run, device="cpu")
    assert (score.accuracy, score.loss) == (result.scores["test"].accuracy, pytest.approx(result.scores["test"].loss))
    assert tf.AutoConfig.from_pretrained(result.checkpoint).image_size == 16
