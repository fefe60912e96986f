"""Layer normalisation, of a tensor or of a residual and what dropout leaves of a branch.

Shapes: `X` any leading axes, H hidden.
"""

import importlib.util
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerobert.kernels import dropout

try:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine as _apex
except ImportError:
    _apex = None

# None where it is not installed, or without its CUDA part, which it imports at the first call.
APEX_KERNEL: Any = _apex if importlib.util.find_spec("fused_layer_norm_cuda") else None

HAS_TRITON = importlib.util.find_spec("triton") is not None


class LayerNorm(Protocol):
    """The layer norm of `dropout(x)`, or of `residual_XH + dropout(x)`; with a dense layer, of
    `dense(x)` in the place of `x`.
    """

    def __call__(
        self,
        x: Tensor,
        norm: nn.LayerNorm,
        residual_XH: Tensor | None = None,
        dropout_p: float = 0.0,
        dense: nn.Linear | None = None,
    ) -> Tensor:
        """What is normalised, XH."""


def plain(
    x: Tensor,
    norm: nn.LayerNorm,
    residual_XH: Tensor | None = None,
    dropout_p: float = 0.0,
    dense: nn.Linear | None = None,
) -> Tensor:
    """The formula; statistics in fp32 whatever the input is. Source: Ba et al. 2016."""
    x_XH = _joined(x, residual_XH, dropout_p, dense)
    x_XH, dtype = x_XH.float(), x_XH.dtype
    centred_XH = x_XH - x_XH.mean(-1, keepdim=True)
    variance_X1 = centred_XH.square().mean(-1, keepdim=True)
    normal_XH = centred_XH * torch.rsqrt(variance_X1 + norm.eps)
    return (normal_XH * norm.weight.float() + norm.bias.float()).to(dtype)


def _joined(
    x: Tensor, residual_XH: Tensor | None, dropout_p: float, dense: nn.Linear | None
) -> Tensor:
    x_XH = dropout.drop(x if dense is None else dense(x), dropout_p)
    return x_XH if residual_XH is None else residual_XH + x_XH


def torch_native(
    x: Tensor,
    norm: nn.LayerNorm,
    residual_XH: Tensor | None = None,
    dropout_p: float = 0.0,
    dense: nn.Linear | None = None,
) -> Tensor:
    """The same by torch."""
    x_XH = _joined(x, residual_XH, dropout_p, dense)
    return F.layer_norm(x_XH, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def apex(
    x: Tensor,
    norm: nn.LayerNorm,
    residual_XH: Tensor | None = None,
    dropout_p: float = 0.0,
    dense: nn.Linear | None = None,
) -> Tensor:
    """The same by apex's fused kernel; CUDA only.

    Written after apex's source; it has not run on a device yet.
    """
    x_XH = _joined(x, residual_XH, dropout_p, dense)
    normal_XH: Tensor = APEX_KERNEL(x_XH, norm.weight, norm.bias, norm.normalized_shape, norm.eps)
    return normal_XH


def triton(
    x: Tensor,
    norm: nn.LayerNorm,
    residual_XH: Tensor | None = None,
    dropout_p: float = 0.0,
    dense: nn.Linear | None = None,
) -> Tensor:
    """The same in one kernel each way, dropout and the addition included."""
    from zerobert.kernels import layer_norm_triton  # here: it is not installed everywhere

    x_XH = x if dense is None else dense(x)
    return layer_norm_triton.normalize(x_XH, norm, residual_XH, dropout_p)


def native(
    x: Tensor,
    norm: nn.LayerNorm,
    residual_XH: Tensor | None = None,
    dropout_p: float = 0.0,
    dense: nn.Linear | None = None,
) -> Tensor:
    """The same in C, in one pass over memory each way; fp32 and bf16 on CPU only."""
    from zerobert.kernels import layer_norm_native  # here: what it needs is built at its first use

    return layer_norm_native.normalize(x, norm, residual_XH, dropout_p, dense)


IMPLEMENTATIONS: dict[str, LayerNorm] = {
    "plain": plain,
    "torch": torch_native,
    "apex": apex,
    "triton": triton,
    "native": native,
}
