"""Masks drawn afresh: which tokens, how many, by what, and by whom they are decided."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.masking import Masking, mask_afresh, masking_of, num_predictions, unmasked
from zerobert.shards import check_values
from zerobert.tokenizer import WordPieceTokenizer

CLS, SEP, MASK, FIRST = 2, 3, 4, 5
VOCAB_SIZE = 1000
# Every third piece goes on with the word before it.
CONTINUES = np.arange(VOCAB_SIZE) % 3 == 0
CONTINUES[:FIRST] = False
Arrays = dict[str, Any]


def make_masking(**options: Any) -> Masking:
    chosen: dict[str, Any] = {
        "seed": 42,
        "masked_lm_prob": 0.15,
        "max_predictions": 19,
        "vocab_size": VOCAB_SIZE,
        "cls_id": CLS,
        "sep_id": SEP,
        "mask_id": MASK,
        "continues_V": None,
        **options,
    }
    return Masking(**chosen)


def make_rows(B: int, S: int = 128, P: int = 20, *, dtype: Any = np.int64, seed: int = 0) -> Arrays:
    """Rows of random words, some of them short, with two or so masks of the shard's."""
    random = np.random.default_rng(seed)
    lengths = np.where(random.random(B) < 0.8, S, random.integers(5, S + 1, B))
    mask = np.arange(S) < lengths[:, None]
    ids = random.integers(FIRST, VOCAB_SIZE, (B, S)) * mask
    middles = lengths // 2
    ids[:, 0] = CLS
    ids[np.arange(B), middles] = SEP
    ids[np.arange(B), lengths - 1] = SEP
    text = ids.copy()
    positions = np.zeros((B, P), dtype=np.int64)
    positions[:, 0] = 1
    positions[:, 1] = np.where(middles + 1 < lengths - 1, middles + 1, 0)
    answers = np.take_along_axis(ids, positions, axis=1) * (positions > 0)
    ids[:, 1] = MASK
    ids[np.arange(B), positions[:, 1]] = np.where(positions[:, 1] > 0, 7, CLS)
    rows = {
        "input_ids": ids,
        "input_mask": mask,
        "segment_ids": mask & (np.arange(S) > middles[:, None]),
        "masked_lm_positions": positions,
        "masked_lm_ids": answers,
        "next_sentence_labels": random.integers(0, 2, B),
    }
    np.testing.assert_array_equal(unmasked({k: v.astype(dtype) for k, v in rows.items()}), text)
    return {name: array.astype(dtype) for name, array in rows.items()}


def text_of(rows: Mapping[str, Any]) -> Any:
    return unmasked(rows)


def test_the_text_stays_and_every_mask_is_a_word_of_it() -> None:
    rows = make_rows(500)
    got = mask_afresh(rows, 0, make_masking())
    check_values(got, vocab_size=VOCAB_SIZE, where="rows")
    np.testing.assert_array_equal(text_of(got), text_of(rows))
    for name in ("input_mask", "segment_ids", "next_sentence_labels"):
        assert got[name] is rows[name]
    positions, answers = got["masked_lm_positions"], got["masked_lm_ids"]
    assert positions.shape == answers.shape == (500, 19)
    assert not np.isin(answers[positions > 0], (0, CLS, SEP)).any()
    assert (answers[positions == 0] == 0).all()
    assert (np.diff(positions, axis=1)[positions[:, 1:] > 0] > 0).all()
    changed = got["input_ids"] != text_of(rows)
    for row in range(500):
        assert set(np.flatnonzero(changed[row])) <= set(positions[row])


def test_how_many_is_the_rule_of_the_reference() -> None:
    rows = make_rows(2000)
    lengths = rows["input_mask"].sum(1)
    for prob in (0.15, 0.3, 0.005):
        masking = make_masking(masked_lm_prob=prob, max_predictions=num_predictions(128, prob))
        got = mask_afresh(rows, 0, masking)
        counts = (got["masked_lm_positions"] > 0).sum(1)
        assert counts.tolist() == [max(1, round(int(length) * prob)) for length in lengths]
    assert num_predictions(128, 0.3) == 38  # more than the 20 of the shards
    assert num_predictions(128, 0.15) == 19
    assert num_predictions(512, 0.15) == 77


def test_a_row_of_specials_alone_has_no_masks() -> None:
    rows = make_rows(3, S=12, P=4)
    rows["input_ids"][1] = [CLS, SEP, SEP, *[0] * 9]
    rows["input_mask"][1] = [1, 1, 1, *[0] * 9]
    rows["masked_lm_positions"][1] = rows["masked_lm_ids"][1] = 0
    for continues in (None, CONTINUES):
        got = mask_afresh(rows, 5, make_masking(max_predictions=2, continues_V=continues))
        assert not got["masked_lm_positions"][1].any()
        np.testing.assert_array_equal(got["input_ids"][1], rows["input_ids"][1])
        assert got["masked_lm_positions"][[0, 2]].any(axis=1).all()


def within(share: float, wanted: float, num_draws: float) -> bool:
    """Within four standard deviations."""
    return abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / num_draws)


@pytest.mark.parametrize("continues", [None, CONTINUES], ids=["pieces", "words"])
def test_eight_of_ten_are_hidden_one_is_any_word_and_one_stays(continues: Any) -> None:
    rows = make_rows(4000)
    got = mask_afresh(rows, 77, make_masking(continues_V=continues))
    positions = got["masked_lm_positions"]
    is_asked = positions > 0
    shown = np.take_along_axis(got["input_ids"], positions, axis=1)[is_asked]
    answers = got["masked_lm_ids"][is_asked]
    total = len(answers)
    assert within(np.mean(shown == MASK), 0.8 + 0.1 / VOCAB_SIZE, total)
    assert within(np.mean(shown == answers), 0.1 + 0.1 / VOCAB_SIZE, total)
    others = shown[(shown != MASK) & (shown != answers)]
    counts = np.bincount(others, minlength=VOCAB_SIZE)
    assert others.max() == VOCAB_SIZE - 1
    assert within((others < FIRST).mean(), (FIRST - 1) / VOCAB_SIZE, len(others))
    # Pearson's statistic has mean 999 and variance twice that.
    expected = len(others) / VOCAB_SIZE
    assert abs(((counts - expected) ** 2 / expected).sum() - VOCAB_SIZE) < 4 * np.sqrt(2000) + 20


def test_every_word_of_a_row_is_as_likely() -> None:
    rows = make_rows(1, S=32, P=4)
    lengths = int(rows["input_mask"].sum())
    many = {name: np.repeat(array, 20_000, axis=0) for name, array in rows.items()}
    got = mask_afresh(many, 0, make_masking(max_predictions=5))
    counts = np.bincount(got["masked_lm_positions"].ravel(), minlength=32)
    places = [place for place in range(1, lengths) if text_of(rows)[0, place] not in (CLS, SEP)]
    assert set(np.flatnonzero(counts[1:]) + 1) == set(places)
    wanted = max(1, round(lengths * 0.15)) / len(places)
    assert all(within(counts[place] / 20_000, wanted, 20_000) for place in places)


def words_of(ids: Any) -> list[list[int]]:
    """The places of a row's words, as the reference's whole-word masking sees them."""
    words: list[list[int]] = []
    follows = False
    for place, token in enumerate(ids):
        if token in (0, CLS, SEP):
            follows = False
        elif follows and CONTINUES[token]:
            words[-1].append(place)
        else:
            words.append([place])
            follows = True
    return words


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 10**12), prob=st.floats(0.01, 0.9), S=st.integers(8, 70))
def test_whole_words_are_masked_or_none_of_them(first: int, prob: float, S: int) -> None:
    masking = make_masking(
        masked_lm_prob=prob, max_predictions=num_predictions(S, prob), continues_V=CONTINUES
    )
    rows = make_rows(20, S=S, P=4, seed=first)
    got = mask_afresh(rows, first, masking)
    check_values(got, vocab_size=VOCAB_SIZE, where="rows")
    text = text_of(rows)
    np.testing.assert_array_equal(text_of(got), text)
    for ids, mask, positions in zip(
        text, rows["input_mask"], got["masked_lm_positions"], strict=True
    ):
        masked = set(positions[positions > 0].tolist())
        words = words_of(ids)
        for word in words:
            assert set(word) <= masked or not masked & set(word)
        # What was left over was too little for any word that was passed over.
        left = max(1, round(int(mask.sum()) * prob)) - len(masked)
        assert left >= 0
        assert all(len(word) > left for word in words if not masked & set(word)) or left == 0


@settings(max_examples=40, deadline=None)
@given(
    first=st.integers(0, 10**12),
    cut=st.integers(1, 39),
    dtype=st.sampled_from([np.int32, np.int64]),
    continues=st.sampled_from([None, CONTINUES]),
)
def test_a_samples_masks_are_its_own(first: int, cut: int, dtype: Any, continues: Any) -> None:
    """However the samples are cut into slices, and whatever type they come in."""
    masking = make_masking(max_predictions=5, continues_V=continues)
    rows = make_rows(40, S=33, P=4)
    whole = mask_afresh(rows, first, masking)
    parts = [
        mask_afresh({name: array[part].astype(dtype) for name, array in rows.items()}, at, masking)
        for part, at in [(slice(0, cut), first), (slice(cut, 40), first + cut)]
    ]
    for name in rows:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
        assert parts[1][name].dtype == dtype


def test_samples_and_seeds_have_masks_of_their_own() -> None:
    rows = make_rows(50)
    masking = make_masking()
    others = [
        mask_afresh(rows, 0, masking),
        mask_afresh(rows, 50, masking),
        mask_afresh(rows, 0, dataclasses.replace(masking, seed=43)),
    ]
    for i, one in enumerate(others):
        for other in others[:i]:
            same = (one["masked_lm_positions"] == other["masked_lm_positions"]).all(axis=1)
            assert not same[rows["input_mask"].sum(1) > 40].any()


def test_the_masks_are_these() -> None:
    """Exact numbers: a run that is resumed by a later version must find the same masks."""
    ids = np.array([[CLS, *range(5, 18), SEP, 0], [CLS, *range(50, 64), SEP]])
    rows = {
        "input_ids": ids,
        "input_mask": (ids > 0).astype("i1"),
        "masked_lm_positions": np.zeros((2, 2), "i4"),
        "masked_lm_ids": np.zeros((2, 2), "i4"),
    }
    masking = make_masking(masked_lm_prob=0.5, max_predictions=8)
    got = mask_afresh(rows, 1000, masking)
    assert got["masked_lm_positions"].tolist() == [
        [2, 3, 4, 7, 9, 10, 11, 12],
        [1, 2, 5, 7, 9, 11, 12, 14],
    ]
    assert got["input_ids"].tolist() == [
        [2, 5, 4, 4, 467, 9, 10, 4, 12, 4, 938, 15, 4, 17, 3, 0],
        [2, 4, 4, 52, 53, 4, 55, 4, 57, 4, 59, 4, 4, 62, 4, 3],
    ]


def test_what_masking_needs_of_a_vocabulary() -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]
    tokenizer = WordPieceTokenizer(words, do_lower_case=True)
    masking = masking_of(
        tokenizer, seed=1, masked_lm_prob=0.3, seq_length=128, whole_word_mask=True
    )
    assert (masking.cls_id, masking.sep_id, masking.mask_id, masking.vocab_size) == (2, 3, 4, 7)
    assert masking.max_predictions == 38
    assert masking.continues_V is not None
    assert masking.continues_V.tolist() == [False] * 6 + [True]
