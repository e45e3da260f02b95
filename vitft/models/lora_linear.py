"""PEFT's linear layer of LoRA, with fewer copies of its output."""

from typing import Any

from peft.tuners import lora
from torch import Tensor


class LoraLinear(lora.Linear):  # type: ignore[misc]
    """W x + alpha / rank * B A x (Hu et al. 2022, eq. 3), where the second term is added in place.

    PEFT makes three more tensors of the output's size. They are soon freed, but leave holes among the activations that
    stay, into which glibc's allocator fits no other: on a CPU, training a ViT-S/14 took twice the memory.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens (..., in) to (..., out)."""
        if self.lora_variant or self.merged or self.disable_adapters:  # a variant: DoRA
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        flat = x.flatten(0, -2)  # a product of two matrices, no view of one, which autograd would copy
        (name,) = self.active_adapters
        output: Tensor = self.base_layer(flat)
        low, up = self.lora_A[name](flat), self.lora_B[name].weight
        output.addmm_(low, up.to(low.dtype).T, alpha=self.scaling[name])
        return output.view(*x.shape[:-1], -1)
