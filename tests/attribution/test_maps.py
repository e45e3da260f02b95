"""Where a model finds what speaks for a class: against the papers' formulas, and on a task whose answer is known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.families import tiny_classifier
from vitft.attribution.gradient_attention import gradient_attention
from vitft.attribution.maps import class_maps, overlay
from vitft.attribution.occlusion import occlusion
from vitft.errors import ModelError

WHOLE = ("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip", "clip", "vit_msn", "ijepa")
"""Families with attention between all patches."""


def images(count: int, side: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).standard_normal((count, 3, side, side), np.float32))


def by_the_paper(model: Any, pixels: torch.Tensor, label: int) -> Any:
    """Eq. 5 and 6 of Chefer et al. 2021 for one image and a model that reads its class token, in float64."""
    model.set_attn_implementation("eager")
    outputs = model(pixel_values=pixels, output_attentions=True)
    gradients = torch.autograd.grad(outputs.logits[0, label], outputs.attentions)
    through = np.eye(outputs.attentions[0].shape[-1])
    for weight, gradient in zip(outputs.attentions, gradients, strict=True):
        product = weight[0].detach().numpy().astype(np.float64) * gradient[0].numpy()
        through += np.maximum(product, 0).mean(axis=0) @ through
    return through[0]


@pytest.mark.parametrize("family", ["vit", "vit_msn"])
def test_maps_are_those_of_the_paper(family: str) -> None:
    model, pixels = tiny_classifier(family, num_labels=3), images(2)
    found = gradient_attention(model, pixels, torch.tensor([2, 0]))
    assert found is not None
    assert model.config._attn_implementation != "vitft_recorded"
    for image, label, ours in zip(pixels, (2, 0), found, strict=True):
        expected = by_the_paper(model, image[None], label)[1:].reshape(4, 4)
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4 * expected.max())


@pytest.mark.parametrize("family", WHOLE)
def test_every_vit_has_maps_by_attention(family: str) -> None:
    model, pixels = tiny_classifier(family, num_labels=3), images(2)
    maps, method = class_maps(model, pixels, torch.tensor([1, 2]))
    assert method == "attention"
    assert [one.shape for one in maps] == [(4, 4)] * 2
    assert all(np.isfinite(one).all() and one.min() >= 0 for one in maps)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["swin", "convnext", "data2vec-vision"])
def test_other_models_have_maps_by_occlusion(family: str) -> None:
    maps, method = class_maps(tiny_classifier(family, num_labels=3), images(1), torch.tensor([1]))
    assert method == "occlusion"
    assert maps[0].shape == (7, 7)
    assert np.isfinite(maps[0]).all()
    with pytest.raises(ModelError, match="use occlusion"):
        class_maps(tiny_classifier(family, num_labels=3), images(1), torch.tensor([1]), "attention")


def test_what_does_not_depend_on_attention_speaks_for_no_class() -> None:
    model = tiny_classifier("ijepa", num_labels=3)  # its head reads the mean of the patches
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attention.o_proj." in name:
                parameter.zero_()
    maps, _ = class_maps(model, images(1), torch.tensor([1]))
    np.testing.assert_allclose(maps[0], 0, atol=1e-7)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_many_images_have_the_maps_of_each_alone(family: str) -> None:
    model, pixels, classes = tiny_classifier(family, num_labels=3), images(11), torch.arange(11) % 3
    together, method = class_maps(model, pixels, classes)
    assert len(together) == 11
    for one, image, label in zip(together, pixels, classes, strict=True):
        (alone,), same = class_maps(model, image[None], label[None])
        assert same == method
        np.testing.assert_allclose(one, alone, rtol=1e-3, atol=1e-3 * np.abs(alone).max())


class OnePlace(nn.Module):
    """Class 1 if the pixels in rows 8 to 11 and columns 20 to 23 are bright, by their mean."""

    def forward(self, pixel_values: torch.Tensor) -> Any:
        bright = pixel_values[:, :, 8:12, 20:24].mean(dim=(1, 2, 3))
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(bright), bright], dim=1))


def test_occlusion_takes_away_what_it_hides() -> None:
    pixels = torch.ones(2, 3, 28, 28)
    for_it, against_it = occlusion(OnePlace(), pixels, torch.tensor([1, 0]), grid=7)
    # Log-odds of class 1 are 1, and 0 without the pixels. Each square covers 8 pixels around a cell of 4.
    expected = torch.zeros(7, 7)
    for row in range(7):
        for column in range(7):
            rows = max(0, min(12, 4 * row + 6) - max(8, 4 * row - 2))
            columns = max(0, min(24, 4 * column + 6) - max(20, 4 * column - 2))
            expected[row, column] = rows * columns / 16
    torch.testing.assert_close(for_it, expected)
    torch.testing.assert_close(against_it, -expected)


@pytest.fixture(scope="module")
def finder() -> Any:
    """A small ViT that was trained to say what is in the one green patch: nothing (there is none), red or cyan."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=20, patch_size=4,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        pixels, labels, _ = planted(64, step)
        loss = nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def planted(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of 25 patches with much or little red, of which at most one is green, too: it alone decides the label.

    Labels are 0 without a green patch, and 1 or 2 by its red. Also the number of that patch.
    """
    draw = torch.Generator().manual_seed(seed)
    labels, places = torch.randint(3, (count,), generator=draw), torch.randint(25, (count,), generator=draw)
    red = 2.0 * torch.randint(2, (count, 25), generator=draw) - 1
    red.scatter_(1, places[:, None], torch.where(labels > 0, 3.0 - 2 * labels, red[:, 0])[:, None])
    green = 2.0 * nn.functional.one_hot(places, 25) * (labels > 0)[:, None]
    patches = torch.stack([red, green, torch.zeros_like(red)], dim=1).view(count, 3, 5, 5)
    pixels = patches.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    return pixels + 0.1 * torch.randn(pixels.shape, generator=draw), labels, places


@pytest.mark.parametrize("method", ["attention", "occlusion"])
def test_the_patch_that_decides_is_found(finder: Any, method: str) -> None:
    pixels, labels, places = planted(100, 1000)
    said = finder(pixel_values=pixels).logits.argmax(dim=1)
    assert (said == labels).float().mean() > 0.9  # it learned the task
    pixels, labels, places = pixels[labels > 0], labels[labels > 0], places[labels > 0]
    maps, used = class_maps(finder, pixels, labels)
    assert used == "attention"
    if method == "occlusion":  # with a grid of patches
        maps = list(occlusion(finder, pixels, labels, grid=5).numpy())
    hit = [int(one.argmax()) == place for one, place in zip(maps, places.tolist(), strict=True)]
    assert np.mean(hit) > 0.9  # by chance 0.04


def test_an_overlay_is_bright_where_the_map_is_high() -> None:
    pixels = np.full((40, 60, 3), 200, np.uint8)
    picture = np.asarray(overlay(pixels, np.array([[-1.0, 0.0], [0.0, 2.0]]), 120), int)
    assert picture.shape == (80, 120, 3)
    assert picture[60, 90].sum() > 2 * picture[20, 30].sum()
    np.testing.assert_array_equal(picture[20, 30], picture[60, 30])  # what speaks against it is as dark as nothing
    assert overlay(pixels, np.zeros((2, 2)), 120).getextrema() == (((70, 70),) * 3)
