"""The GELU of a dense layer, with the layer's bias.

Shapes: `X` any leading axes, H hidden, I intermediate.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from zerobert.kernels import native as compiled_kernels

Gelu = Callable[[Tensor, nn.Linear], Tensor]


def torch_native(x_XH: Tensor, dense: nn.Linear) -> Tensor:
    """The layer's GELU by torch, XI. Source: Hendrycks and Gimpel 2016, the exact form."""
    return F.gelu(dense(x_XH))


def native(x_XH: Tensor, dense: nn.Linear) -> Tensor:
    """The same in C; fp32 and bf16 on CPU only.

    The bias is added where GELU reads what it is added to, in fp32: a product on a CPU takes a pass
    over memory of its own for it, and so does its gradient.
    """
    wide_XI = F.linear(x_XH, dense.weight)
    out_XI: Tensor = _BiasGelu.apply(wide_XI, dense.bias)  # type: ignore[no-untyped-call]
    return out_XI


class _BiasGelu(Function):
    @staticmethod
    def forward(ctx: Any, wide_XI: Tensor, bias_I: Tensor) -> Tensor:
        ctx.save_for_backward(wide_XI, bias_I)
        return compiled_kernels.gelu_forward(wide_XI, bias_I)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        wide_XI, bias_I = ctx.saved_tensors
        return compiled_kernels.gelu_backward(wide_XI, bias_I, gradients[0].contiguous())


IMPLEMENTATIONS: dict[str, Gelu] = {"torch": torch_native, "native": native}
