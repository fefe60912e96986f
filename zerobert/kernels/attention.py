"""Scaled dot-product attention with a padding mask and dropout.

Shapes: B batch, N heads, S sequence, D head width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def plain(
    q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, keep_B11S: Tensor, dropout_p: float
) -> Tensor:
    """The formula as it stands in the paper; softmax in fp32 whatever the inputs are.

    Args:
        keep_B11S: True where a key may be attended to.
        dropout_p: probability of dropping an attention weight; 0 in evaluation.

    Returns:
        The mixed values, BNSD.

    Source: Vaswani et al. 2017, section 3.2.1.
    """
    scores_BNSS = q_BNSD @ k_BNSD.mT / math.sqrt(q_BNSD.shape[-1])
    scores_BNSS = scores_BNSS.masked_fill(~keep_B11S, float("-inf"))
    weights_BNSS = scores_BNSS.softmax(dim=-1, dtype=torch.float32).to(v_BNSD.dtype)
    return F.dropout(weights_BNSS, dropout_p, training=dropout_p > 0) @ v_BNSD


def sdpa(
    q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, keep_B11S: Tensor, dropout_p: float
) -> Tensor:
    """The same by torch's `scaled_dot_product_attention`, which has fused kernels."""
    return F.scaled_dot_product_attention(
        q_BNSD, k_BNSD, v_BNSD, attn_mask=keep_B11S, dropout_p=dropout_p
    )


IMPLEMENTATIONS: dict[str, Attention] = {"plain": plain, "sdpa": sdpa}


def choose(requested: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The implementation's name for a device and precision, and the reason for it."""
    if requested != "auto":
        return requested, "asked for in the configuration"
    if device.type == "cuda":
        return "sdpa", "memory-efficient fused kernel"
    if dtype in (torch.bfloat16, torch.float16):
        return "plain", "faster than sdpa in 16 bits on CPU at short lengths"
    return "sdpa", "torch's fused CPU kernel where there is no dropout"
