"""Batches without their padding: which places of a batch hold tokens, and where each row starts.

Shapes: B batch, S sequence, T packed tokens.
"""

import torch
from torch import Tensor

from zerobert.kernels.attention import Packing

# The number of packed tokens is a multiple of the batch's places by this: few shapes, so that
# compiled code is made for few.
NUM_SHAPES = 32


def pack(input_mask_BS: Tensor) -> Packing:
    """Where the tokens of a batch are. Made on the CPU, so that no device is waited for.

    Args:
        input_mask_BS: 1 up to the end of each row, then 0.
    """
    lengths_B = input_mask_BS.sum(1, dtype=torch.int32)
    num_tokens, num_places = int(lengths_B.sum()), input_mask_BS.numel()
    unit = max(1, num_places // NUM_SHAPES)
    num_packed = min(num_places, -(-num_tokens // unit) * unit)
    is_token = input_mask_BS.flatten().bool()
    padding = (~is_token).nonzero().flatten()[: num_packed - num_tokens]
    starts = torch.zeros(len(lengths_B) + 2, dtype=torch.int32)
    starts[1:-1] = lengths_B.cumsum(0)
    starts[-1] = num_packed
    return Packing(places_T=torch.cat([is_token.nonzero().flatten(), padding]), cu_seqlens=starts)
