"""Rows against an independent restatement of the reference's rules; the options on their own."""

import random
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config import InstanceConfig
from data_prep.instances import Instances, Vocabulary, create_instances, create_rows_plainly
from tests.unit.data_prep.test_wordpiece import documents_of
from zerobert.errors import DataError

PAD, UNK, CLS, SEP, MASK = range(5)
SIZE = 40
FIRST_CONTINUATION = 25  # ids from here on go on with a word
VOCABULARY = Vocabulary(
    size=SIZE,
    cls_id=CLS,
    sep_id=SEP,
    mask_id=MASK,
    continues=np.arange(SIZE) >= FIRST_CONTINUATION,
)

Rows = list[tuple[list[int], list[int], list[int], list[int], int]]


def restated(documents: list[list[list[int]]], config: InstanceConfig, seed: int) -> Rows:
    """The reference's procedure, written down from its description, row by row."""
    rng = random.Random(seed)
    documents = documents[:]
    rng.shuffle(documents)
    rows: Rows = []
    for _ in range(config.dupe_factor):
        for own in range(len(documents)):
            rows += restated_document(documents, own, config, rng)
    rng.shuffle(rows)
    return rows


def restated_document(
    documents: list[list[list[int]]], own: int, config: InstanceConfig, rng: random.Random
) -> Rows:
    document = documents[own]
    room = config.max_seq_length - 3
    target = room
    if rng.random() < config.short_seq_prob:
        target = rng.randint(2, room)
    rows: Rows = []
    collected: list[list[int]] = []
    at = 0
    while at < len(document):
        collected.append(document[at])
        if at == len(document) - 1 or sum(map(len, collected)) >= target:
            a_end = 1 if len(collected) < 2 else rng.randint(1, len(collected) - 1)
            a = list(chain(*collected[:a_end]))
            label = 0
            if len(collected) == 1 or rng.random() < 0.5:
                label = 1
                for _ in range(10):
                    other = rng.randint(0, len(documents) - 1)
                    if other != own:
                        break
                if other == own:
                    label = 0
                b: list[int] = []
                start = rng.randint(0, len(documents[other]) - 1)
                for sentence in documents[other][start:]:
                    b = b + sentence
                    if len(b) >= target - len(a):
                        break
                at -= len(collected) - a_end
            else:
                b = list(chain(*collected[a_end:]))
            while len(a) + len(b) > room:
                cut_first = len(a) > len(b)
                longer = a if cut_first else b
                longer = longer[1:] if rng.random() < 0.5 else longer[:-1]
                a, b = (longer, b) if cut_first else (a, longer)
            rows.append(restated_masks(a, b, label, config, rng))
            collected = []
        at += 1
    return rows


def restated_masks(
    a: list[int], b: list[int], label: int, config: InstanceConfig, rng: random.Random
) -> tuple[list[int], list[int], list[int], list[int], int]:
    tokens = [CLS, *a, SEP, *b, SEP]
    segments = [0] * (len(a) + 2) + [1] * (len(b) + 1)
    candidates = [i for i, token in enumerate(tokens) if token not in (CLS, SEP)]
    rng.shuffle(candidates)
    count = min(config.max_predictions_per_seq, max(1, round(len(tokens) * config.masked_lm_prob)))
    shown = tokens[:]
    chosen = candidates[:count]
    for position in chosen:
        if rng.random() < 0.8:
            shown[position] = MASK
        elif rng.random() < 0.5:
            pass
        else:
            shown[position] = rng.randint(0, SIZE - 1)
    chosen.sort()
    return shown, segments, chosen, [tokens[position] for position in chosen], label


def padded(rows: list[list[int]], width: int) -> Any:
    return np.array([row + [0] * (width - len(row)) for row in rows])


def arrays_of(
    documents: list[list[list[int]]], config: InstanceConfig, seed: int
) -> dict[str, Any]:
    """All rows by the compiled code."""
    made = create_instances(documents_of(documents), config, VOCABULARY, random.Random(seed))
    return made.arrays()


sentences = st.lists(st.integers(5, SIZE - 1), min_size=1, max_size=12)
corpora = st.lists(st.lists(sentences, min_size=1, max_size=6), min_size=2, max_size=5)


@settings(max_examples=1000, deadline=None)
@given(
    documents=corpora,
    seed=st.integers(0, 2**32),
    max_seq_length=st.integers(5, 40),
    max_predictions=st.integers(1, 5),
    short_seq_prob=st.sampled_from([0.0, 0.1, 0.9]),
    dupe_factor=st.integers(1, 3),
)
def test_rows_follow_the_references_rules(
    documents: list[list[list[int]]],
    seed: int,
    max_seq_length: int,
    max_predictions: int,
    short_seq_prob: float,
    dupe_factor: int,
) -> None:
    config = InstanceConfig(
        max_seq_length=max_seq_length,
        max_predictions_per_seq=max_predictions,
        short_seq_prob=short_seq_prob,
        dupe_factor=dupe_factor,
    )
    ids, segments, positions, answers, labels = zip(*restated(documents, config, seed), strict=True)
    arrays = arrays_of(documents, config, seed)
    plain = create_rows_plainly(documents_of(documents), config, VOCABULARY, random.Random(seed))
    plain_arrays = Instances(plain, config).arrays()
    wanted = {
        "input_ids": padded(ids, max_seq_length),
        "input_mask": padded([[1] * len(row) for row in ids], max_seq_length),
        "segment_ids": padded(segments, max_seq_length),
        "masked_lm_positions": padded(positions, max_predictions),
        "masked_lm_ids": padded(answers, max_predictions),
        "next_sentence_labels": np.array(labels),
    }
    assert list(arrays) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
        np.testing.assert_array_equal(plain_arrays[name], array, err_msg=name)


def make_corpus(num_documents: int, seed: int = 0) -> list[list[list[int]]]:
    rng = random.Random(seed)
    return [
        [[rng.randint(5, SIZE - 1) for _ in range(rng.randint(3, 20))] for _ in range(10)]
        for _ in range(num_documents)
    ]


def words_of(ids: list[int]) -> list[tuple[int, ...]]:
    """The positions of each word of a row."""
    words: list[tuple[int, ...]] = []
    for position, token in enumerate(ids):
        continues = VOCABULARY.continues[token] and ids[position - 1] not in (CLS, SEP)
        if continues and words:
            words[-1] = (*words[-1], position)
        elif token not in (CLS, SEP):
            words.append((position,))
    return words


def test_whole_words_are_masked_or_left_together() -> None:
    config = InstanceConfig(
        max_seq_length=48, max_predictions_per_seq=8, masked_lm_prob=0.2, whole_word_mask=True
    )
    arrays = arrays_of(make_corpus(20), config, 1)
    num_split_words = 0
    for row in range(len(arrays["input_ids"])):
        end = int(arrays["input_mask"][row].sum())
        answers = dict(
            zip(
                arrays["masked_lm_positions"][row].tolist(),
                arrays["masked_lm_ids"][row].tolist(),
                strict=True,
            )
        )
        answers.pop(0, None)
        original = arrays["input_ids"][row, :end].tolist()
        for position, answer in answers.items():
            original[position] = answer
        for word in words_of(original):
            touched = [position in answers for position in word]
            assert all(touched) or not any(touched)
            num_split_words += len(word) > 1 and all(touched)
        assert len(answers) <= min(8, max(1, round(end * 0.2)))
    assert num_split_words > 100


def test_without_pairs_rows_are_the_text_in_one_segment() -> None:
    rng = random.Random(0)
    document = [[rng.randint(5, SIZE - 1) for _ in range(10)] for _ in range(30)]
    config = InstanceConfig(
        max_seq_length=32, max_predictions_per_seq=4, short_seq_prob=0, dupe_factor=1, no_nsp=True
    )
    arrays = arrays_of([document], config, 0)
    ids = arrays["input_ids"].copy()
    for row, positions in enumerate(arrays["masked_lm_positions"]):
        ids[row, positions[positions > 0]] = arrays["masked_lm_ids"][row, positions > 0]
    wanted = {(CLS, *chain(*document[at : at + 3]), SEP) for at in range(0, 30, 3)}
    assert {tuple(row) for row in ids.tolist()} == wanted
    assert len(ids) == 10
    assert arrays["input_mask"].all()
    assert not arrays["segment_ids"].any()
    assert not arrays["next_sentence_labels"].any()


def test_masks_are_80_10_10_and_next_is_random_half_the_time() -> None:
    # Short sentences: were a sentence to fill a row, its next one would always be random.
    rng = random.Random(3)
    documents = [[[rng.randint(5, 24) for _ in range(4)] for _ in range(60)] for _ in range(60)]
    config = InstanceConfig(max_seq_length=64, max_predictions_per_seq=20)
    arrays = arrays_of(documents, config, 2)
    asked = arrays["masked_lm_positions"] > 0
    shown = np.take_along_axis(arrays["input_ids"], arrays["masked_lm_positions"], axis=1)[asked]
    answers = arrays["masked_lm_ids"][asked]
    count = len(answers)

    def within_4_sigma(observed: int, probability: float, total: int) -> bool:
        sigma = (total * probability * (1 - probability)) ** 0.5
        return abs(observed - total * probability) < 4 * sigma

    # A random word is [MASK] or the word itself once in SIZE times.
    assert within_4_sigma(int((shown == MASK).sum()), 0.8 + 0.1 / SIZE, count)
    assert within_4_sigma(int((shown == answers).sum()), 0.1 + 0.1 / SIZE, count)
    labels = arrays["next_sentence_labels"]
    # The last row of a document may hold one sentence only, and then is random: a bit over half.
    assert 0.5 < labels.mean() < 0.62


def test_a_pair_needs_two_documents() -> None:
    with pytest.raises(DataError, match="wanted at least 2 documents with text, got 1"):
        arrays_of(make_corpus(1), InstanceConfig(), 0)
