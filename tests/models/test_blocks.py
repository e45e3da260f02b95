"""Freezing the first blocks, in every architecture."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import tiny_model
from tests.families import FAMILIES, tiny_classifier
from tests.training.test_trainer import assert_same_weights, config, interrupted
from vitft import resume, train
from vitft.errors import UsageError
from vitft.models.blocks import block_stacks, freeze_first, parameter_depths
from vitft.models.heads import head_modules, in_head
from vitft.models.load import load_trained, set_training
from vitft.training.cost.estimate import memory_bytes
from vitft.training.setup import prepare

QUICK = ("vit", "beit", "dinov2", "swin", "clip", "levit", "resnet", "perceiver")


def marked(family: str) -> Any:
    return pytest.param(family, marks=() if family in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("family", map(marked, sorted(FAMILIES)))
def test_the_first_blocks_and_what_precedes_them_are_frozen(family: str) -> None:
    model = tiny_classifier(family)
    freeze_first(model, 1)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    first = next(name for name, part in model.named_modules() if part is block_stacks(model)[0][0])
    depths = parameter_depths(model)
    assert {name for name in depths if name.startswith(f"{first}.")} <= frozen
    assert frozen == {name for name in depths if depths[name] <= 1 and not in_head(model, name)}
    assert frozen < depths.keys()
    set_training(model, 1)
    for name, module in model.named_modules():
        own = {n for n in depths if n.startswith(f"{name}.") or not name}
        if own:
            assert module.training == (not own <= frozen), name
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    height, width = side if isinstance(side := FAMILIES[family].get("image_size", 32), list) else (side, side)
    model(pixel_values=torch.rand(2, 3, height, width)).logits.sum().backward()
    assert not {name for name, parameter in model.named_parameters() if parameter.grad is not None} & frozen
    assert all(parameter.grad is not None for head in head_modules(model) for parameter in head.parameters())
    still = {name.rpartition(".")[0] for name in frozen}
    for name, tensor in model.named_buffers():  # running means of norms
        assert torch.equal(tensor, before[name]) or name.rpartition(".")[0] not in still, name


def test_more_blocks_than_there_are_get_one_line() -> None:
    model = tiny_model("swin")
    with pytest.raises(UsageError, match=r"^freeze 3: this model has 2 blocks; give at most 2, or backbone\.$"):
        freeze_first(model, 3)
    assert all(parameter.requires_grad for parameter in model.parameters())
    freeze_first(model, 2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"swin.layernorm.weight", "swin.layernorm.bias", "classifier.weight", "classifier.bias"}


PRETRAINED = dict.fromkeys(("patch_size", "width", "layers", "heads", "mlp")) | {
    "from_scratch": False, "head_init": "random", "val_fraction": 0, "max_eval_samples": 10,
}  # fmt: skip


def test_frozen_blocks_save_no_activations_and_the_estimate_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr("vitft.training.cost.estimate.psutil.Process", lambda: process)
    saved, estimated, frozen = [], [], []
    for freeze in ("none", 1, 4):
        prepared = prepare(config(**PRETRAINED, freeze=freeze))
        model, kept = prepared.loaded.model, []
        set_training(model, freeze)
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
            model(pixel_values=torch.rand(8, 3, 28, 28))
        saved.append(sum(tensor.nbytes for tensor in kept if tensor is not None))
        estimated.append(memory_bytes(prepared, 8) or 0)
        frozen.append(sum(p.numel() for p in model.parameters() if not p.requires_grad))
    assert saved[0] > 1.2 * saved[1] > 2 * saved[2]
    assert estimated[0] - estimated[1] > 12 * (frozen[1] - frozen[0]) > 0  # a gradient and two moments each
    assert estimated[1] - estimated[2] > 12 * (frozen[2] - frozen[1]) > 0


def test_frozen_blocks_stay_as_they_are_and_a_run_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(**PRETRAINED, freeze=2, epochs=1, save_every=1, keep=9)
    whole = train(chosen, output=tmp_path / "whole")
    interrupted(chosen, tmp_path / "cut", 2, monkeypatch)
    assert_same_weights(whole.run / "last", resume(tmp_path / "cut").run / "last")
    start = prepare(chosen).loaded.model
    now, depths = dict(load_trained(whole.run / "last").model.named_parameters()), parameter_depths(start)
    for name, parameter in start.named_parameters():
        assert torch.equal(parameter, now[name]) == (depths[name] <= 2 or name.endswith("mask_token")), name
