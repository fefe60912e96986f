"""What a training holds in a device's memory, counted: `plan`, `--dry_run` and `--auto_micro_batch`
have it from here.

Symbols: S sequence, H hidden, N heads, P predictions, V vocabulary, L layers.
"""

from collections.abc import Mapping
from typing import Any

from zerobert import served
from zerobert.config import BertConfig

# Bytes a parameter that every rank holds, and those that the ranks share out, by ZeRO stage, after
# a backward pass: weights, two fp32 moments, gradients, and fp32 masters except in fp32 at stage 0.
# bf16's gradients are added up in fp32, at stage 1 at once; there every rank holds all until a
# step's last micro-batch. Copies that the optimizer's step makes take the place of activations.
# tests/unit/pretrain/test_footprint.py counts them again.
_STATES = {
    "bf16": ((18, 0), (6, 12), (2, 16), (0, 18)),
    "fp16": ((16, 0), (4, 12), (2, 14), (0, 16)),
    "fp32": ((16, 0), (8, 12), (4, 16), (0, 20)),
}


# Bytes a value of the buffer that gradients are gathered in before the ranks' are added up.
_BUCKETS = {"bf16": (0, 0, 2, 2), "fp16": (0, 2, 2, 2), "fp32": (0, 4, 4, 4)}


def state_bytes(
    num_parameters: int,
    *,
    precision: str,
    stage: int,
    ranks: int,
    zero: Mapping[str, Any] | None = None,
) -> float:
    """Weights, gradients and the optimizer's state of a rank.

    Args:
        precision: `fp32`, `bf16` or `fp16`: what the weights of the forward pass are kept in.
        zero: the JSON's `zero_optimization`, for the size of DeepSpeed's buffers.
    """
    whole, shared = _STATES[precision][stage]
    zero = zero or {}
    bucket: float = zero.get("reduce_bucket_size", served.bucket_values(num_parameters))
    if not zero.get("contiguous_gradients", True):
        bucket = 0
    if zero.get("overlap_comm", False) and stage < 3:  # one is filled while the other is sent
        bucket *= 2
    return num_parameters * (whole + shared / ranks) + bucket * _BUCKETS[precision][stage]


def activation_bytes(
    model: BertConfig,
    *,
    num_tokens: float,
    max_predictions: int,
    width: int,
    is_checkpointed: bool,
    kept_scores: float = 0,
) -> float:
    """What the backward pass needs of a sequence.

    Args:
        num_tokens: those that are computed.
        width: bytes of a value: 2 or 4.
        kept_scores: attention scores that each head writes, S x S; 0 where attention is fused.

    Source: Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1: 34 S H + 5 N S S bytes a layer
    in 16 bits, of which 2 S H and N S S are masks of a byte each.
    """
    H, L = model.hidden_size, model.num_hidden_layers
    layer = (16 * width + 2) * H * num_tokens
    layer += (2 * width + 1) * model.num_attention_heads * kept_scores
    layers = width * H * num_tokens * L + layer if is_checkpointed else layer * L
    return layers + (width + 4) * max_predictions * model.vocab_size  # logits, and in fp32 again
