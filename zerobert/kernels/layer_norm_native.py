"""Layer norm of `residual + dropout(branch)` by the compiled kernels of a CPU.

Shapes: `X` any leading axes, H hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from zerobert.kernels import dropout, native


def normalize(
    x: Tensor,
    norm: nn.LayerNorm,
    residual_XH: Tensor | None,
    dropout_p: float,
    dense: nn.Linear | None,
) -> Tensor:
    """What is normalised, XH."""
    drop = dropout.new_mask(dropout_p)
    x_XH, offset_H = x, None
    if dense is not None:
        # The kernel reads all that rows share in one precision.
        x_XH, offset_H = F.linear(x, dense.weight), dense.bias.to(norm.weight.dtype)
    if residual_XH is not None and residual_XH.dtype != x_XH.dtype:  # under autocast
        dtype = torch.promote_types(x_XH.dtype, residual_XH.dtype)
        x_XH, residual_XH = x_XH.to(dtype), residual_XH.to(dtype)
    normal_XH: Tensor = _LayerNorm.apply(  # type: ignore[no-untyped-call]
        x_XH, offset_H, residual_XH, norm.weight, norm.bias, norm.eps, drop
    )
    return normal_XH


class _LayerNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_XH: Tensor,
        offset_H: Tensor | None,
        residual_XH: Tensor | None,
        weight_H: Tensor,
        bias_H: Tensor,
        eps: float,
        drop: tuple[int, int],
    ) -> Tensor:
        residual_XH = None if residual_XH is None else residual_XH.contiguous()
        out_XH, *statistics = native.layer_norm_forward(
            x_XH.contiguous(), offset_H, residual_XH, weight_H, bias_H, eps, drop
        )
        ctx.save_for_backward(*statistics, weight_H)
        ctx.eps, ctx.drop = eps, drop
        ctx.has_offset, ctx.has_residual = offset_H is not None, residual_XH is not None
        return out_XH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *statistics, weight_H = ctx.saved_tensors
        grads = native.layer_norm_backward(
            tuple(statistics),
            weight_H,
            ctx.eps,
            ctx.drop,
            gradients[0].contiguous(),
            has_offset=ctx.has_offset,
            has_residual=ctx.has_residual,
        )
        return (*grads, None, None)
