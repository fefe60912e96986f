"""Dropout whose mask costs a fraction of `bernoulli_` on CPU, where a mask is drawn one by one.

A 64-bit draw makes four 16-bit decisions, so a probability is met to 1 in 65,536, exactly the one
that the kept values are scaled by.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 1 << 16


def threshold(p: float) -> int:
    """How many of `LEVELS` values are dropped; of probabilities below 1 never all."""
    return min(round(p * LEVELS), LEVELS - 1)


def new_mask(p: float) -> tuple[int, int]:
    """The `threshold`, and a seed for a kernel that makes its mask again on the way back.

    From the CPU's generator: nothing waits for a device, and checkpointing restores it.
    """
    num_dropped = threshold(p)
    if not num_dropped:
        return 0, 0
    return num_dropped, int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def plain(x: Tensor, p: float) -> Tensor:
    """Torch's own."""
    return F.dropout(x, p)


def words(x: Tensor, p: float) -> Tensor:
    """The same distribution from fewer random numbers; seeded by torch's global generator."""
    dropped: Tensor = _WordDropout.apply(x, p)  # type: ignore[no-untyped-call]
    return dropped


def drop(x: Tensor, p: float) -> Tensor:
    """Drop values of `x` with probability `p` and scale the others up, the fastest way."""
    if p == 0.0:
        return x
    return (
        words(x, p) if x.device.type == "cpu" and not torch.compiler.is_compiling() else plain(x, p)
    )


class _WordDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        num_dropped = threshold(p)
        ctx.scale = LEVELS / (LEVELS - num_dropped)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
        keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= num_dropped - LEVELS // 2
        ctx.save_for_backward(keep)
        return torch.where(keep, x, x.new_zeros(())).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        (grad,) = gradients
        return torch.where(keep, grad, grad.new_zeros(())).mul_(ctx.scale), None
