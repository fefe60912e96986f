"""Batches without their padding: which places of a batch hold tokens, and where each row starts.

Shapes: B batch, S sequence, T packed tokens.
"""

import numpy as np
import torch
from torch import Tensor

from zerobert.kernels.attention import Packing

# The number of packed tokens is a multiple of the batch's places by this: 0.8 % of a batch is
# filled up where a tenth is padding, and batches of 64 to 256 rows have 6 to 11 numbers, for each
# of which code is compiled.
NUM_SHAPES = 64


def pack(input_mask_BS: Tensor, num_shapes: int = NUM_SHAPES) -> Packing:
    """Where the tokens of a batch are. Made on the CPU, so that no device is waited for.

    Args:
        input_mask_BS: 1 up to the end of each row, then 0.
        num_shapes: how many numbers of tokens there may be.
    """
    mask_BS = input_mask_BS.cpu().numpy()  # whose small operations take a tenth of torch's
    lengths_B = mask_BS.sum(1, dtype=np.int64)
    ends_B = lengths_B.cumsum()
    num_tokens, num_places = int(ends_B[-1]), mask_BS.size
    unit = max(1, num_places // num_shapes)
    num_packed = min(num_places, -(-num_tokens // unit) * unit)
    places_T = np.arange(num_packed)
    # What padding lies before a row is what its tokens are further on in the batch.
    gaps_B = np.arange(0, num_places, mask_BS.shape[1]) - (ends_B - lengths_B)
    places_T[:num_tokens] += np.repeat(gaps_B, lengths_B)
    places_T[num_tokens:] = np.flatnonzero(mask_BS == 0)[: num_packed - num_tokens]
    # What is filled up at the end is cut, for kernels that are told how long a row is at most.
    fill = num_tokens + np.arange(1, -(-unit // mask_BS.shape[1]) + 1) * mask_BS.shape[1]
    starts = np.concatenate([[0], ends_B, np.minimum(fill, num_packed)])
    return Packing(
        places_T=torch.from_numpy(places_T), cu_seqlens=torch.from_numpy(starts.astype(np.int32))
    )
