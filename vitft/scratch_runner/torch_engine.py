"""The torch chapter as an engine: the same batches, weights and dropout masks, with torch's autograd and optimizers."""

import torch
import torch.nn.functional as F

from vitft.scratch.optim import decays
from vitft.scratch.tensors import Array
from vitft.scratch.torch_vit import TorchViT
from vitft.scratch.train import Labels, Plan
from vitft.scratch.vit import ViT
from vitft.spec import ViTSpec


class TorchEngine:
    """Like `NumpyEngine`, with torch's autograd, loss and optimizers instead of the chapters."""

    def __init__(self, w: ViT, spec: ViTSpec, plan: Plan) -> None:
        self.model, self.plan = TorchViT(spec).load(w), plan
        parameters = self.model.parameters_by_name().items()
        decaying = [parameter for name, parameter in parameters if decays(name)]
        others = [parameter for name, parameter in parameters if not decays(name)]
        if plan.optimizer == "adamw":
            groups = [{"params": decaying, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups)
        elif plan.optimizer == "adam":
            self.optimizer = torch.optim.Adam(decaying + others)
        else:
            self.optimizer = torch.optim.SGD(decaying + others, momentum=plan.momentum)

    def step(self, images: Array, labels: Labels, lr: float, masks: list[Array] | None) -> tuple[float, int]:
        """Forward, backward, update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        targets = torch.from_numpy(labels)
        logits = self.model(torch.from_numpy(images), masks and [torch.from_numpy(mask) for mask in masks])
        loss = F.cross_entropy(logits, targets, label_smoothing=self.plan.label_smoothing)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.item(), int((logits.argmax(dim=1) == targets).sum())

    def logits(self, images: Array) -> Array:
        """Logits (B, classes), without dropout."""
        with torch.inference_mode():
            logits: Array = self.model(torch.from_numpy(images)).numpy()
        return logits

    def weights(self) -> ViT:
        """The current weights."""
        return self.model.weights()
