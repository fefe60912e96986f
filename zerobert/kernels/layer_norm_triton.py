"""Dropout, the addition to the residual and layer normalisation in one Triton kernel each way.

Imported where the op is first called, because only some machines have triton. No mask is stored:
the backward pass draws it again from the seed, which torch's CPU generator gives.

Shapes: `X` any leading axes, H hidden; inside a kernel one row of H values, filled up to BLOCK.

The kernels run in Triton's interpreter and compile for sm_90; they have not run on a device yet.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zerobert.kernels import dropout

_LEVELS_IN_KERNELS = tl.constexpr(dropout.LEVELS)
# Rows that one processor works on at a time in the backward pass: enough to hide the memory's
# latency, few enough that their partial sums stay small.
_PROGRAMS_PER_PROCESSOR = 4


def normalize(
    x_XH: Tensor, norm: nn.LayerNorm, residual_XH: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Layer norm of `residual_XH + dropout(x_XH)`, summed in fp32."""
    normal_XH: Tensor = _LayerNorm.apply(  # type: ignore[no-untyped-call]
        x_XH, residual_XH, norm.weight, norm.bias, norm.eps, *dropout.new_mask(dropout_p)
    )
    return normal_XH


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_XH: Tensor,
        residual_XH: Tensor | None,
        weight_H: Tensor,
        bias_H: Tensor,
        eps: float,
        threshold: int,
        seed: int,
    ) -> Tensor:
        x_XH = x_XH.contiguous()
        residual_XH = None if residual_XH is None else residual_XH.contiguous()
        num_rows = x_XH.numel() // len(weight_H)
        dtype = torch.result_type(x_XH, x_XH if residual_XH is None else residual_XH)
        out_XH = torch.empty_like(x_XH, dtype=dtype)
        # Means and inverse deviations.
        statistics_2X = x_XH.new_empty((2, num_rows), dtype=torch.float32)
        ctx.seed, ctx.settings = seed, _settings(len(weight_H), threshold, residual_XH)
        _forward[(num_rows,)](
            *(x_XH, residual_XH, weight_H, bias_H, out_XH, *statistics_2X, eps, seed),
            **ctx.settings,
        )
        ctx.save_for_backward(x_XH, residual_XH, weight_H, statistics_2X)
        return out_XH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_XH, residual_XH, weight_H, statistics_2X = ctx.saved_tensors
        num_rows = statistics_2X.shape[1]
        grad_out_XH = gradients[0].contiguous()
        grad_sum_XH = torch.empty_like(grad_out_XH)
        # Without dropout it is the sum's, and the kernel writes that alone.
        grad_x_XH = torch.empty_like(x_XH) if ctx.settings["THRESHOLD"] else grad_sum_XH
        num_programs = min(num_rows, _num_programs(x_XH.device))
        parts_2PH = x_XH.new_empty((2, num_programs, len(weight_H)), dtype=torch.float32)
        _backward[(num_programs,)](
            *(grad_out_XH, x_XH, residual_XH, weight_H, *statistics_2X),
            *(grad_x_XH, grad_sum_XH, *parts_2PH, num_rows, ctx.seed),
            **ctx.settings,
        )
        grad_residual_XH = None if residual_XH is None else grad_sum_XH.to(residual_XH.dtype)
        grad_weight_H, grad_bias_H = parts_2PH.sum(1).to(weight_H.dtype)
        nothing = (None, None, None)
        return grad_x_XH.to(x_XH.dtype), grad_residual_XH, grad_weight_H, grad_bias_H, *nothing


def _settings(hidden: int, threshold: int, residual_XH: Tensor | None) -> dict[str, Any]:
    """What both kernels are compiled for."""
    block = max(triton.next_power_of_2(hidden), 16)
    return {
        "HIDDEN": hidden,
        "BLOCK": block,
        "THRESHOLD": threshold,
        "HAS_RESIDUAL": residual_XH is not None,
        # A thread has 8 values: 16 bytes to load in 16 bits, and one draw decides on them.
        "num_warps": min(max(block // 256, 1), 16),
    }


def _num_programs(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter; more than one, to have parts to sum
        return _PROGRAMS_PER_PROCESSOR
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return _PROGRAMS_PER_PROCESSOR * processors


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator]
def _forward(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    eps: tl.tensor,
    seed: tl.tensor,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    """One row a program."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    is_value = columns < HIDDEN
    joined, _ = _joined(x_ptr, residual_ptr, row, seed, HIDDEN, BLOCK, THRESHOLD, HAS_RESIDUAL)
    mean = tl.sum(joined, axis=0) / HIDDEN
    centred = tl.where(is_value, joined - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=0) / HIDDEN + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(inverse_ptr + row, inverse)
    weight = tl.load(weight_ptr + columns, mask=is_value, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=is_value, other=0.0).to(tl.float32)
    out = centred * inverse * weight + bias
    tl.store(out_ptr + row.to(tl.int64) * HIDDEN + columns, out, mask=is_value)


@triton.jit(do_not_specialize=["num_rows", "seed"])  # type: ignore[untyped-decorator]
def _backward(
    grad_out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_sum_ptr: tl.tensor,
    weight_parts_ptr: tl.tensor,
    bias_parts_ptr: tl.tensor,
    num_rows: tl.tensor,
    seed: tl.tensor,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    """Every n-th row a program, n being their number; each adds up what its rows give to the
    parameters' gradients, in the same order every time.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    is_value = columns < HIDDEN
    weight = tl.load(weight_ptr + columns, mask=is_value, other=0.0).to(tl.float32)
    weight_part = tl.zeros([BLOCK], dtype=tl.float32)
    bias_part = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(program, num_rows, tl.num_programs(0)):
        places = tl.cast(row, tl.int64) * HIDDEN + columns
        joined, factor = _joined(
            x_ptr, residual_ptr, row, seed, HIDDEN, BLOCK, THRESHOLD, HAS_RESIDUAL
        )
        inverse = tl.load(inverse_ptr + row)
        normal = tl.where(is_value, (joined - tl.load(mean_ptr + row)) * inverse, 0.0)
        grad_out = tl.load(grad_out_ptr + places, mask=is_value, other=0.0).to(tl.float32)
        weight_part += grad_out * normal
        bias_part += grad_out
        grad = grad_out * weight
        # The mean and the deviation are functions of the row as well.
        mean_share = tl.sum(grad, axis=0) / HIDDEN
        deviation_share = tl.sum(grad * normal, axis=0) / HIDDEN
        grad = (grad - mean_share - normal * deviation_share) * inverse
        tl.store(grad_sum_ptr + places, grad, mask=is_value)
        if THRESHOLD > 0:
            tl.store(grad_x_ptr + places, grad * factor, mask=is_value)
    tl.store(weight_parts_ptr + program * HIDDEN + columns, weight_part, mask=is_value)
    tl.store(bias_parts_ptr + program * HIDDEN + columns, bias_part, mask=is_value)


@triton.jit  # type: ignore[untyped-decorator]
def _joined(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    row: tl.tensor,
    seed: tl.tensor,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A row of what is normalised, in fp32, and what dropout takes x times, value by value."""
    columns = tl.arange(0, BLOCK)
    is_value = columns < HIDDEN
    places = tl.cast(row, tl.int64) * HIDDEN + columns
    x = tl.load(x_ptr + places, mask=is_value, other=0.0).to(tl.float32)
    factor = tl.full([BLOCK], 1.0, dtype=tl.float32)
    if THRESHOLD > 0:
        # Philox gives four words of 32 bits at a time, each good for two decisions.
        a, b, c, d = tl.randint4x(seed, row * (BLOCK // 8) + tl.arange(0, BLOCK // 8))
        words = tl.join(tl.join(a, b), tl.join(c, d)).reshape([BLOCK // 2])
        levels = tl.join(words & 0xFFFF, words >> 16).reshape([BLOCK])
        scale = _LEVELS_IN_KERNELS / (_LEVELS_IN_KERNELS - THRESHOLD)
        factor = tl.where(levels >= THRESHOLD, scale, 0.0)
        x = x * factor
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + places, mask=is_value, other=0.0).to(tl.float32)
    return x, factor
