"""The projection on the vocabulary and its cross entropy in one.

Shapes: R rows, H hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -1
# Logits held at a time, in values; the products are long enough to run at full speed.
_CHUNK_VALUES = 1 << 26
# Of the rows of many, so that they fill a GPU's tiles.
_ROW_MULTIPLE = 256

LinearCrossEntropy = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(x_RH: Tensor, weight_VH: Tensor, bias_V: Tensor, labels_R: Tensor) -> Tensor:
    """The sum of the rows' losses in nats, through all logits at once.

    Args:
        labels_R: the right word of each row; `IGNORED_LABEL` where there is none.
    """
    logits_RV = F.linear(x_RH, weight_VH, bias_V).float()
    return F.cross_entropy(logits_RV, labels_R, ignore_index=IGNORED_LABEL, reduction="sum")


def chunked(x_RH: Tensor, weight_VH: Tensor, bias_V: Tensor, labels_R: Tensor) -> Tensor:
    """The same without ever holding all logits: gradients are made chunk by chunk on the way.

    Source of the idea: Hsu et al. 2024, Liger Kernel (arXiv:2410.10989).
    """
    device = x_RH.device.type
    if torch.is_autocast_enabled(device):  # the products below are none of those that it casts
        dtype = torch.get_autocast_dtype(device)
        x_RH, weight_VH = x_RH.to(dtype), weight_VH.to(dtype)
    with torch.autocast(device, enabled=False):
        loss: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]
            x_RH, weight_VH, bias_V.to(weight_VH.dtype), labels_R
        )
    return loss


def chunks(x_RH: Tensor, weight_VH: Tensor) -> list[slice]:
    """The rows of each part whose logits are held at a time."""
    num_rows = max(1, _CHUNK_VALUES // len(weight_VH))
    num_rows -= num_rows % _ROW_MULTIPLE if num_rows > _ROW_MULTIPLE else 0
    return [slice(start, start + num_rows) for start in range(0, len(x_RH), num_rows)]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RH: Tensor, weight_VH: Tensor, bias_V: Tensor, labels_R: Tensor
    ) -> Tensor:
        loss = x_RH.new_zeros((), dtype=torch.float32)
        x_grad_RH = torch.empty_like(x_RH)
        parts = chunks(x_RH, weight_VH)
        # Summed over chunks in fp32: 16 bits would lose what each of many adds.
        exact = torch.float32
        weight_grad_VH = torch.zeros_like(weight_VH, dtype=exact) if len(parts) != 1 else None
        bias_grad_V = torch.zeros_like(bias_V, dtype=exact)
        for rows in parts:
            is_asked_C1 = (labels_R[rows] != IGNORED_LABEL)[:, None]
            labels_C1 = labels_R[rows, None].clamp(min=0)
            logits_CV = F.linear(x_RH[rows], weight_VH, bias_V)
            logs_CV = logits_CV.log_softmax(-1, dtype=torch.float32)
            loss -= (logs_CV.gather(1, labels_C1) * is_asked_C1).sum()
            # The gradient of the logits: softmax less one at the right word. Rows without one are
            # left out where they are short, in what they are multiplied by.
            grad_CV = logs_CV.exp_().scatter_add_(1, labels_C1, torch.full_like(logs_CV[:, :1], -1))
            grad_CV, asked_C1 = grad_CV.to(x_RH.dtype), is_asked_C1.to(x_RH.dtype)
            x_grad_RH[rows] = (grad_CV @ weight_VH) * asked_C1
            x_CH = x_RH[rows] * asked_C1
            bias_grad_V += (asked_C1.mT @ grad_CV)[0]
            if weight_grad_VH is None:
                weight_grad_VH = grad_CV.mT @ x_CH
            elif weight_VH.dtype == torch.float32:
                weight_grad_VH.addmm_(grad_CV.mT, x_CH)
            else:
                weight_grad_VH += grad_CV.mT @ x_CH
        assert weight_grad_VH is not None
        ctx.save_for_backward(
            x_grad_RH, weight_grad_VH.to(weight_VH.dtype), bias_grad_V.to(bias_V.dtype)
        )
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_grad_RH, weight_grad_VH, bias_grad_V = ctx.saved_tensors
        (grad,) = gradients
        return x_grad_RH * grad, weight_grad_VH * grad, bias_grad_V * grad, None


IMPLEMENTATIONS: dict[str, LinearCrossEntropy] = {"plain": plain, "chunked": chunked}
