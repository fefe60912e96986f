"""The fast tokeniser gives the library's ids, compiled or plain, whatever the text."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep import native
from data_prep.wordpiece import Documents, encode, encode_plainly, joined, reordered
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCAB = [
    *SPECIAL_TOKENS,
    "the",
    "σ",
    *LETTERS,
    *LETTERS.upper(),
    *(f"##{letter}" for letter in LETTERS),
    *("##σ", "東", "##́", "é", ".", ",", "-", "[", "]", "“", "”", "’", "。", "，", "1", "##1"),
]
TOKENIZERS = {
    lower_case: WordPieceTokenizer(VOCAB, do_lower_case=lower_case) for lower_case in (True, False)
}


def sentences_of(documents: Documents) -> list[list[list[int]]]:
    """The documents as lists of sentences."""
    tokens, sentences, starts = (array.tolist() for array in documents)
    return [
        [tokens[sentences[i] : sentences[i + 1]] for i in range(first, end)]
        for first, end in itertools.pairwise(starts)
    ]


def documents_of(documents: list[list[list[int]]]) -> Documents:
    """The inverse of `sentences_of`."""
    sentences = [sentence for document in documents for sentence in document]

    def starts(lengths: list[int]) -> Any:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])

    return Documents(
        np.array([token for sentence in sentences for token in sentence], np.int32),
        starts([len(sentence) for sentence in sentences]),
        starts([len(document) for document in documents]),
    )


def restated(text: str, tokenizer: WordPieceTokenizer) -> list[list[list[int]]]:
    """Every line through the library, as the reference script reads lines and documents."""
    lines = [line.strip() for line in text.split("\n")]
    documents: list[list[list[int]]] = [[]]
    for line, ids in zip(lines, tokenizer.encode_words(lines), strict=True):
        if not line:
            documents.append([])
        elif ids:
            documents[-1].append(ids)
    return [document for document in documents if document]


def check(text: str, lower_case: bool) -> None:
    """Both twins give the library's ids, and agree on where documents stand."""
    tokenizer = TOKENIZERS[lower_case]
    raw = text.encode()
    fast, spans = encode(raw, tokenizer)
    plain, plain_spans = encode_plainly(raw, tokenizer)
    assert sentences_of(fast) == restated(text, tokenizer)
    for array, wanted in zip(fast, plain, strict=True):
        np.testing.assert_array_equal(array, wanted)
    np.testing.assert_array_equal(spans, plain_spans)
    assert all(
        "\n\n" not in raw[start:end].decode() and raw[start:end].strip() for start, end in spans
    )


def test_there_is_a_compiler() -> None:
    """Without one the other tests would hold the plain twin against itself."""
    assert native.is_available()


# No surrogates, which UTF-8 has not; a newline ends a sentence.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=120)
# What the two tokenisers could cut differently: marks that combine, blanks, punctuation, brackets.
hard_texts = st.text(
    st.sampled_from(
        "aBé\u0301\u0338 \n\t\u00a0\u0085\u1680\u2003\u2028\u3000\x1c\u200b\ufeff\u00ad\u200d.,-[]"
        "'’“”。，"
        "東京가İßσςΣﬁ½١\ufffd\U00020000\U0001f600<≮"
    ),
    max_size=60,
)


@settings(max_examples=500, deadline=None)
@given(st.one_of(texts, hard_texts), st.booleans())
@example("", True)
@example("\n \n\u3000\n", True)
@example("the [SEP] x[MASK]. [UNK]y\n[ CLS]", True)
@example("a\u200b\n\n\u200b\n\nb", True)
@example("é́.\u0301a ≮<\u0338", False)
@example("the" + "a" * 101 + " " + "b" * 100, True)
def test_ids_are_the_librarys(text: str, lower_case: bool) -> None:
    check(text, lower_case)


def whole_plane(number: int) -> range:
    return range(number << 16, (number + 1) << 16)


@pytest.mark.parametrize("lower_case", [True, False])
@pytest.mark.parametrize(
    "points",
    [
        pytest.param(whole_plane(0), id="plane 0"),
        pytest.param(range(0x10000, 0xF0000, 61), id="some of planes 1 to 14"),
        pytest.param(whole_plane(1), id="plane 1", marks=pytest.mark.slow),
        pytest.param(whole_plane(2), id="plane 2", marks=pytest.mark.slow),
        pytest.param(whole_plane(14), id="plane 14", marks=pytest.mark.slow),
    ],
)
def test_every_character_is_cut_as_the_library_cuts_it(points: range, lower_case: bool) -> None:
    """Each alone, between letters, beside punctuation and under a combining mark."""
    letters = [
        chr(point) for point in points if not 0xD800 <= point < 0xE000 and point not in (10, 13)
    ]
    lines = (f"{c} a{c}b .{c}, {c}\u0301{c}" for c in letters)
    check("\n".join(lines), lower_case)


def test_many_distinct_words_fill_the_table() -> None:
    words = [f"{LETTERS[i % 26]}{i:x}" for i in range(50_000)]
    check("\n".join(" ".join(words[i : i + 100]) for i in range(0, len(words), 100)), True)


documents_lists = st.lists(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    max_size=6,
)


@given(documents_lists, documents_lists, st.randoms(use_true_random=False))
def test_documents_are_joined_and_reordered(one: Any, other: Any, rng: Any) -> None:
    both = joined([documents_of(one), documents_of(other)])
    assert sentences_of(both) == one + other
    assert (both.num_documents, both.num_sentences) == (
        len(one + other),
        sum(map(len, one + other)),
    )
    order = rng.sample(range(len(one + other)), len(one + other))
    moved = reordered(both, np.array(order, np.int64))
    assert sentences_of(moved) == [(one + other)[i] for i in order]
