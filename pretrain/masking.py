"""Masks drawn afresh: a row's stored answers are put back, and others are asked for.

The draws of a sample come from counters of its own, so they depend on the seed and on the sample's
number alone: another epoch masks the same row otherwise, another number of ranks does not.

Shapes: B rows, S sequence, P predictions.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from zerobert.tokenizer import CONTINUATION, WordPieceTokenizer

Array = npt.NDArray[Any]
MASKED_LM_PROB = 0.15  # Source: Devlin et al. 2018, BERT, section 3.1
_PURPOSE_MASKS = 4
_WORDS_A_COUNT = 4  # Philox gives four 64-bit words for each count
# Source: Devlin et al. 2018, BERT, section 3.1: 80 % [MASK], 10 % any word, 10 % as it was.
_MASK_SHARE, _MASK_OR_RANDOM_SHARE = 0.8, 0.9


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Masking:
    """How rows are masked.

    Attributes:
        max_predictions: P of the batches.
        continues_V: by id, whether a piece goes on with the word before it, which is then masked
            whole or not at all; None masks each piece by itself.
    """

    seed: int
    masked_lm_prob: float
    max_predictions: int
    vocab_size: int
    cls_id: int
    sep_id: int
    mask_id: int
    continues_V: npt.NDArray[np.bool_] | None


def masking_of(
    tokenizer: WordPieceTokenizer,
    *,
    seed: int,
    masked_lm_prob: float,
    seq_length: int,
    whole_word_mask: bool,
) -> Masking:
    """The masking of rows that were made with a vocabulary."""
    continues_V = np.array([token.startswith(CONTINUATION) for token in tokenizer.vocab])
    return Masking(
        seed=seed,
        masked_lm_prob=masked_lm_prob,
        max_predictions=num_predictions(seq_length, masked_lm_prob),
        vocab_size=len(tokenizer.vocab),
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        mask_id=tokenizer.mask_id,
        continues_V=continues_V if whole_word_mask else None,
    )


def num_predictions(num_tokens: int, masked_lm_prob: float) -> int:
    """How many of a row's tokens are masked, [CLS] and [SEP] counted as tokens.

    Source: create_pretraining_data.py of NVIDIA DeepLearningExamples, without the cap.
    """
    return max(1, round(num_tokens * masked_lm_prob))


def mask_afresh(rows: Mapping[str, Array], first_sample: int, how: Masking) -> dict[str, Array]:
    """Samples that follow each other, with masks of their own.

    Args:
        first_sample: the number in the run of the first of them.
    """
    ids_BS = unmasked(rows)
    lengths_B = rows["input_mask"].sum(1, dtype=np.int64)
    wanted_B = np.maximum(1, np.rint(lengths_B * how.masked_lm_prob)).astype(np.int64)
    order_BS, choice_BP = _draws(first_sample, len(ids_BS), ids_BS.shape[1], how)
    is_word_BS = (rows["input_mask"] > 0) & (ids_BS != how.cls_id) & (ids_BS != how.sep_id)
    if how.continues_V is None:
        positions_BP = _first_pieces(order_BS, is_word_BS, wanted_B, how.max_predictions)
    else:
        continues_BS = is_word_BS & how.continues_V[ids_BS]
        positions_BP = _first_words(
            order_BS, is_word_BS, continues_BS, wanted_B, how.max_predictions
        )
    is_asked_BP = positions_BP > 0
    answers_BP = np.take_along_axis(ids_BS, positions_BP, axis=1)
    _hide(ids_BS, positions_BP, answers_BP, choice_BP, how)
    return {
        **rows,
        "input_ids": ids_BS,
        "masked_lm_positions": positions_BP.astype(rows["masked_lm_positions"].dtype),
        "masked_lm_ids": np.where(is_asked_BP, answers_BP, 0),
    }


def unmasked(rows: Mapping[str, Array]) -> Array:
    """The rows' text, BS: the answers put back where they were asked for."""
    ids_BS: Array = rows["input_ids"].copy()
    positions_BP, answers_BP = rows["masked_lm_positions"], rows["masked_lm_ids"]
    cls_B = ids_BS[:, 0].copy()  # a position of 0 is an empty place of the list
    np.put_along_axis(ids_BS, positions_BP, answers_BP, axis=1)
    ids_BS[:, 0] = cls_B
    return ids_BS


def _draws(first_sample: int, B: int, S: int, how: Masking) -> tuple[Array, Array]:
    """64 random bits for each place of each sample, BS, and as many for each prediction, BP."""
    counts = -(-(S + how.max_predictions) // _WORDS_A_COUNT)
    key = np.random.SeedSequence([how.seed, _PURPOSE_MASKS]).generate_state(2, np.uint64)
    words = np.random.Philox(key=key, counter=first_sample * counts).random_raw(
        B * counts * _WORDS_A_COUNT
    )
    words_BX = words.reshape(B, -1)
    return words_BX[:, :S], words_BX[:, S : S + how.max_predictions]


def _first_pieces(order_BS: Array, is_word_BS: Array, wanted_B: Array, P: int) -> Array:
    """The wanted number of words' places that come first in a random order, ascending, BP."""
    S = order_BS.shape[1]
    # The place in the lowest bits: no two are alike, whatever machine sorts them.
    bits = np.uint64((S - 1).bit_length())
    places_S = np.arange(S, dtype=np.uint64)
    keys_BS = np.where(is_word_BS, order_BS >> bits << bits | places_S, ~np.uint64(0))
    if P < S:
        keys_BS = np.partition(keys_BS, P - 1, axis=1)[:, :P]
    keys_BP = np.sort(keys_BS, axis=1)
    num_B = np.minimum(wanted_B, is_word_BS.sum(1))
    positions_BP = (keys_BP & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    return _ascending(positions_BP, np.arange(P) < num_B[:, None], S)


def _first_words(
    order_BS: Array, is_word_BS: Array, continues_BS: Array, wanted_B: Array, P: int
) -> Array:
    """As `_first_pieces`, by whole words: one that is too long for what is left is passed over.

    Source: create_pretraining_data.py of google-research/bert.
    """
    B, S = order_BS.shape
    rows_B = np.arange(B)
    follows_BS = np.zeros_like(is_word_BS)
    follows_BS[:, 1:] = is_word_BS[:, :-1]
    starts_BS = is_word_BS & ~(continues_BS & follows_BS)
    # Words are numbered in their row; number 0 is what is no word.
    number_BS = np.where(is_word_BS, starts_BS.cumsum(1), 0)
    flat = (number_BS + rows_B[:, None] * (S + 1)).ravel()
    sizes_BW = np.bincount(flat, minlength=B * (S + 1)).reshape(B, S + 1)
    in_turn_BS = np.argsort(np.where(starts_BS, order_BS, ~np.uint64(0)), axis=1, kind="stable")
    is_chosen_BW = np.zeros((B, S + 1), dtype=bool)
    left_B = wanted_B.copy()
    num_words_B = starts_BS.sum(1)
    for turn in range(int(num_words_B.max(initial=0))):
        words_B = number_BS[rows_B, in_turn_BS[:, turn]]
        sizes_B = sizes_BW[rows_B, words_B]
        fits_B = (turn < num_words_B) & (sizes_B <= left_B)
        is_chosen_BW[rows_B[fits_B], words_B[fits_B]] = True
        left_B -= np.where(fits_B, sizes_B, 0)
        if not left_B.any():
            break
    is_masked_BS = is_chosen_BW[rows_B[:, None], number_BS]
    first_BP = np.argsort(~is_masked_BS, axis=1, kind="stable")[:, :P]
    return _ascending(first_BP, np.arange(P) < is_masked_BS.sum(1)[:, None], S)


def _ascending(positions_BP: Array, is_asked_BP: Array, S: int) -> Array:
    """Those that are asked for in the order of the row, then zeros."""
    sorted_BP = np.sort(np.where(is_asked_BP, positions_BP, S), axis=1)
    return np.where(sorted_BP < S, sorted_BP, 0)


def _hide(
    ids_BS: Array, positions_BP: Array, answers_BP: Array, choice_BP: Array, how: Masking
) -> None:
    """Put [MASK], a random word or what was there at the positions, in place."""
    share_BP = (choice_BP >> np.uint64(32)).astype(np.float64) / 2**32
    random_BP = (choice_BP & np.uint64(0xFFFFFFFF)) * np.uint64(how.vocab_size) >> np.uint64(32)
    hidden_BP = np.select(
        [share_BP < _MASK_SHARE, share_BP < _MASK_OR_RANDOM_SHARE],
        [np.full_like(answers_BP, how.mask_id), random_BP.astype(answers_BP.dtype)],
        answers_BP,
    )
    cls_B = ids_BS[:, 0].copy()
    np.put_along_axis(ids_BS, positions_BP, hidden_BP, axis=1)
    ids_BS[:, 0] = cls_B
