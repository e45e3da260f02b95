"""Stochastic depth: which branches are skipped, how often, and what the others become."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import FAMILIES, tiny_classifier
from tests.models.test_heads import load, marked, saved
from vitft.errors import UsageError
from vitft.models.blocks import block_stacks
from vitft.models.load import checkpoint_activations

OURS = ("vit", "deit", "siglip", "clip", "metaclip_2", "vit_msn", "ijepa")
NONE = ("resnet", "regnet", "mobilevit", "mobilenet_v2", "efficientnet", "perceiver", "cvt", "levit", "mobilenet_v1",
        "mobilevitv2", "hgnet_v2", "textnet")  # fmt: skip
THEIRS = tuple(family for family in FAMILIES if family not in OURS + NONE)


def loaded(family: str, folder: Path, rate: float) -> Any:
    return load(saved(tiny_classifier(family), folder), drop_path=rate).model


def tokens(width: int = 16, images: int = 64) -> torch.Tensor:
    return torch.randn(images, 5, width, generator=torch.Generator().manual_seed(1))


def output_of(block: Any, given: torch.Tensor, family: str) -> torch.Tensor:
    out = block(given, attention_mask=None) if family in ("siglip", "clip", "metaclip_2") else block(given)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("family", marked(OURS))
def test_a_block_whose_branches_are_skipped_is_the_identity(family: str, tmp_path: Path) -> None:
    model, given = loaded(family, tmp_path, 1 - 1e-12).train(), tokens()
    first, last = block_stacks(model)[0]
    with torch.no_grad():
        assert torch.equal(output_of(last, given, family), given)
        assert not torch.allclose(output_of(first, given, family), given)  # its rate is 0
        assert not torch.allclose(output_of(last.eval(), given, family), given)


def test_every_sample_has_its_own_branches_and_their_mean_stays(tmp_path: Path) -> None:
    """Each is x + a + m: attention and MLP, each either left out or divided by 1 - p, by the paper's formula."""
    rate = 0.25
    model, given = loaded("vit", tmp_path, rate), tokens(images=4000)
    block = block_stacks(model)[0][-1].eval()
    attention = lambda x: block.attention(block.layernorm_before(x))[0]  # noqa: E731
    mlp = lambda x: block.mlp(block.layernorm_after(x))  # noqa: E731
    torch.manual_seed(0)
    with torch.no_grad():
        results = []
        for first in (0.0, 1 / (1 - rate)):
            middle = given + first * attention(given)
            results += [middle + second * mlp(middle) for second in (0.0, 1 / (1 - rate))]
        block.train()
        out = block(given)
        distance = torch.stack([(out - result).abs().amax(dim=(1, 2)) for result in results])
    assert distance.min(dim=0).values.max() < 1e-4
    shares = np.bincount(distance.argmin(dim=0).numpy(), minlength=4) / len(given)
    expected = [rate * rate, rate * (1 - rate), (1 - rate) * rate, (1 - rate) ** 2]
    np.testing.assert_allclose(shares, expected, atol=0.03)  # four standard deviations


def test_gradient_checkpointing_recomputes_the_same_branches(tmp_path: Path) -> None:
    model = loaded("vit", tmp_path, 0.5).train()
    images, gradients = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2)), []
    for checkpoint in (lambda model: None, checkpoint_activations):
        checkpoint(model)
        model.zero_grad()
        torch.manual_seed(3)
        model(pixel_values=images).logits.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("family", marked(THEIRS))
def test_an_architecture_with_stochastic_depth_gets_the_rate(family: str, tmp_path: Path) -> None:
    model = loaded(family, tmp_path, 0.3)
    rates = [getattr(part, "drop_prob", None) for part in model.modules() if type(part).__name__.endswith("DropPath")]
    assert model.config.drop_path_rate == 0.3
    assert max(rate or 0.0 for rate in rates) == pytest.approx(0.3)


@pytest.mark.parametrize("family", marked(NONE))
def test_other_architectures_refuse_it(family: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^drop_path: .*; remove it\.$"):
        loaded(family, tmp_path, 0.3)


def test_the_default_leaves_the_rate_of_a_swin(tmp_path: Path) -> None:
    assert load(saved(tiny_classifier("swin"), tmp_path)).model.config.drop_path_rate == 0.1
