"""The floor that a language model has to beat: guessing masked tokens by frequency alone."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zerobert.shards import find_shards, read_shard


def unigram_loss(
    train: Iterable[NDArray[np.int32]], held_out: Iterable[NDArray[np.int32]], vocab_size: int
) -> float:
    """Mean loss, in nats, of predicting held-out tokens by the training tokens' frequency.

    Every token of the vocabulary counts once more than it was seen, so that none has probability 0.
    """
    counts = np.ones(vocab_size, dtype=np.int64)
    for ids in train:
        counts += np.bincount(ids, minlength=vocab_size)
    losses = np.log(counts.sum()) - np.log(counts)
    total, num_tokens = 0.0, 0
    for ids in held_out:
        total += float(losses[ids].sum())
        num_tokens += len(ids)
    return total / num_tokens


def shards_unigram_loss(folder: Path, vocab_size: int) -> float:
    """`unigram_loss` of the test shards' masked tokens by the training shards' masked tokens."""

    def masked_ids(split: str) -> Iterable[NDArray[np.int32]]:
        for shard in find_shards([folder], "training" if split == "training" else "test"):
            arrays = read_shard(shard.path)
            # Position 0 is [CLS], never masked: it fills the end of a row's list.
            yield arrays["masked_lm_ids"][arrays["masked_lm_positions"] > 0]

    return unigram_loss(masked_ids("training"), masked_ids("test"), vocab_size)
