"""Scaled dot-product attention with dropout, over padded batches and over packed ones.

Queries, keys and values come token by token, so that a batch without padding is served as well as
one with it.

Shapes: B batch, S sequence, T packed tokens, N heads, D head width; `X` is `BS` or `T`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zerobert.kernels import dropout

try:
    from flash_attn import flash_attn_varlen_func as _flash
except ImportError:
    _flash = None

# None where it is not installed.
FLASH_KERNEL: Any = _flash
# What torch.nn.attention.varlen calls, which leaves dropout out.
VARLEN_KERNEL: Any = getattr(torch.ops.aten, "_flash_attention_forward", None)


class Packing(NamedTuple):
    """Where the tokens of a batch lie when its padding is left out.

    Attributes:
        places_T: the token's place in the flattened batch. Tokens of a row are neighbours, rows are
            in order; at the end may be a few places of padding, which nobody reads.
        cu_seqlens: [B + 1 or more], where each row starts among the tokens, and where the padding
            starts and ends, in parts that are no longer than a row; int32.
    """

    places_T: Tensor
    cu_seqlens: Tensor


class Layout(NamedTuple):
    """Which tokens may look at which: those of their own row that are no padding.

    Attributes:
        keep_BS: True where there is a token.
        packing: where the tokens lie; None where padding is computed too.
    """

    keep_BS: Tensor
    packing: Packing | None


Attention = Callable[[Tensor, Tensor, Tensor, Layout, float], Tensor]
_Padded = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def plain(q_XND: Tensor, k_XND: Tensor, v_XND: Tensor, layout: Layout, dropout_p: float) -> Tensor:
    """The formula as it stands in the paper; softmax in fp32 whatever the inputs are.

    Args:
        dropout_p: probability of dropping an attention weight; 0 in evaluation.

    Returns:
        The mixed values, XND.

    Source: Vaswani et al. 2017, section 3.2.1.
    """
    return _over_rows(_plain, (q_XND, k_XND, v_XND), layout, dropout_p)


def sdpa(q_XND: Tensor, k_XND: Tensor, v_XND: Tensor, layout: Layout, dropout_p: float) -> Tensor:
    """The same by torch's `scaled_dot_product_attention`, which has fused kernels."""
    return _over_rows(_sdpa, (q_XND, k_XND, v_XND), layout, dropout_p)


def flash(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, layout: Layout, dropout_p: float) -> Tensor:
    """The same over packed tokens by flash-attn (Dao 2023); 16 bits and CUDA only.

    Written after its documentation; it has not run on a device yet.
    """
    if layout.packing is None:
        return sdpa(q_TND, k_TND, v_TND, layout, dropout_p)
    starts, longest = layout.packing.cu_seqlens, layout.keep_BS.shape[1]
    mixed_TND: Tensor = FLASH_KERNEL(
        *(q_TND, k_TND, v_TND, starts, starts, longest, longest), dropout_p=dropout_p
    )
    return mixed_TND


def varlen(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, layout: Layout, dropout_p: float) -> Tensor:
    """The same over packed tokens by torch's own build of flash-attn; 16 bits and CUDA only.

    Written after torch's source; it has not run on a device yet.
    """
    if layout.packing is None:
        return sdpa(q_TND, k_TND, v_TND, layout, dropout_p)
    starts, longest = layout.packing.cu_seqlens, layout.keep_BS.shape[1]
    mixed_TND: Tensor = VARLEN_KERNEL(
        *(q_TND, k_TND, v_TND, starts, starts, longest, longest, dropout_p, False, False)
    )[0]
    return mixed_TND


def native(q_TND: Tensor, k_TND: Tensor, v_TND: Tensor, layout: Layout, dropout_p: float) -> Tensor:
    """The same over packed tokens in C; fp32 and bf16 on CPU only.

    A batch that is not packed goes the plain way, as with the other two of packed tokens.
    """
    if layout.packing is None:
        return plain(q_TND, k_TND, v_TND, layout, dropout_p)
    from zerobert.kernels import attention_native  # here: what it needs is built at its first use

    num_rows, longest = layout.keep_BS.shape
    starts = layout.packing.cu_seqlens[: num_rows + 1]
    return attention_native.attend(q_TND, k_TND, v_TND, starts, longest, dropout_p)


def _over_rows(
    attend: _Padded, qkv_XND: Sequence[Tensor], layout: Layout, dropout_p: float
) -> Tensor:
    """Attention row by row; packed tokens are laid out in rows for it, and packed again."""
    keep_BS, packing = layout
    if packing is not None:
        qkv_XND = [_rows(x_TND, keep_BS, packing.places_T) for x_TND in qkv_XND]
    q_BNSD, k_BNSD, v_BNSD = (x_BSND.transpose(1, 2) for x_BSND in qkv_XND)
    mixed_BNSD = attend(q_BNSD, k_BNSD, v_BNSD, keep_BS[:, None, None, :], dropout_p)
    mixed_BSND = mixed_BNSD.transpose(1, 2)
    if packing is None:
        return mixed_BSND
    # Not by [...], whose way back sorts the places on a GPU, as if one could be there twice.
    return mixed_BSND.flatten(0, 1).index_select(0, packing.places_T)


def _rows(x_TND: Tensor, keep_BS: Tensor, places_T: Tensor) -> Tensor:
    rows = x_TND.new_zeros(keep_BS.numel(), *x_TND.shape[1:]).index_copy(0, places_T, x_TND)
    return rows.view(*keep_BS.shape, *x_TND.shape[1:])


def _plain(
    q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, keep_B11S: Tensor, dropout_p: float
) -> Tensor:
    scores_BNSS = (q_BNSD / math.sqrt(q_BNSD.shape[-1])) @ k_BNSD.mT
    scores_BNSS = scores_BNSS.masked_fill_(~keep_B11S, float("-inf"))  # nobody else has them
    weights_BNSS = scores_BNSS.softmax(dim=-1, dtype=torch.float32).to(v_BNSD.dtype)
    return dropout.drop(weights_BNSS, dropout_p) @ v_BNSD


def _sdpa(
    q_BNSD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor, keep_B11S: Tensor, dropout_p: float
) -> Tensor:
    return F.scaled_dot_product_attention(
        q_BNSD, k_BNSD, v_BNSD, attn_mask=keep_B11S, dropout_p=dropout_p
    )


IMPLEMENTATIONS: dict[str, Attention] = {
    "plain": plain,
    "sdpa": sdpa,
    "flash": flash,
    "varlen": varlen,
    "native": native,
}
