"""Layer normalisation.

Shapes: `X` any leading axes, H hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine as _apex
except ImportError:
    _apex = None

APEX_KERNEL: Any = _apex  # None where it is not installed

LayerNorm = Callable[[Tensor, nn.LayerNorm], Tensor]


def plain(x_XH: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The formula; statistics in fp32 whatever the input is. Source: Ba et al. 2016."""
    x_XH, dtype = x_XH.float(), x_XH.dtype
    centred_XH = x_XH - x_XH.mean(-1, keepdim=True)
    variance_X1 = centred_XH.square().mean(-1, keepdim=True)
    normal_XH = centred_XH * torch.rsqrt(variance_X1 + norm.eps)
    return (normal_XH * norm.weight.float() + norm.bias.float()).to(dtype)


def torch_native(x_XH: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The same by torch."""
    return F.layer_norm(x_XH, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def apex(x_XH: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The same by apex's fused kernel; CUDA only.

    Written after apex's source; it has not run on a device yet.
    """
    normal_XH: Tensor = APEX_KERNEL(x_XH, norm.weight, norm.bias, norm.normalized_shape, norm.eps)
    return normal_XH


IMPLEMENTATIONS: dict[str, LayerNorm] = {"plain": plain, "torch": torch_native, "apex": apex}
