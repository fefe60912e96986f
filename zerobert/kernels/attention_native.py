"""Attention over packed tokens by the compiled kernels of a CPU.

Shapes: T packed tokens, N heads, D head width.
"""

from typing import Any

from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from zerobert.kernels import dropout, native


def attend(
    q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, starts: Tensor, longest: int, dropout_p: float
) -> Tensor:
    """Mixed values, TND; zeros for tokens that are in no row.

    Args:
        starts: int32 [rows + 1], each row's first token, and the last one's end.
        longest: tokens of a row, at most.
    """
    drop = dropout.new_mask(dropout_p)
    mixed_TND: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        q_TND, k_TND, v_TND, starts, longest, drop
    )
    return mixed_TND


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TND: Tensor,
        k_TND: Tensor,
        v_TND: Tensor,
        starts: Tensor,
        longest: int,
        drop: tuple[int, int],
    ) -> Tensor:
        inputs = (q_TND, k_TND, v_TND)
        # Parts of one product lie apart, each token's heads together; they are read where they are.
        is_alike = len({x_TND.stride() for x_TND in inputs}) == 1
        if not is_alike or q_TND.stride()[1:] != (q_TND.shape[-1], 1):
            inputs = (q_TND.contiguous(), k_TND.contiguous(), v_TND.contiguous())
        mixed_TND, log_sums_TN = native.attention_forward(*inputs, starts, longest, drop)
        ctx.save_for_backward(*inputs, log_sums_TN, starts)
        ctx.longest, ctx.drop = longest, drop
        return mixed_TND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *forward, starts = ctx.saved_tensors
        grads = native.attention_backward(
            tuple(forward), starts, ctx.longest, ctx.drop, gradients[0].contiguous()
        )
        return (*grads, None, None, None)
