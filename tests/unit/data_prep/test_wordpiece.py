from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.wordpiece import encode_documents
from zerobert.tokenizer import SPECIAL_TOKENS, WordPieceTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENIZER = WordPieceTokenizer(
    [
        *SPECIAL_TOKENS,
        "the",
        "σ",
        *LETTERS,
        *(f"##{letter}" for letter in LETTERS),
        "##σ",
        "東",
        ".",
    ],
    do_lower_case=True,
)


def test_sentences_and_documents_that_come_to_nothing_are_left_out() -> None:
    documents = [["The ab.", "\u200b"], ["\u200b"], [], ["東"]]
    ids = TOKENIZER.encode_words(["The ab.", "東"])
    assert encode_documents(documents, TOKENIZER) == [[ids[0]], [ids[1]]]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_word_by_word_equals_the_whole_sentence(lines: list[str]) -> None:
    whole = [ids for ids in TOKENIZER.encode_words(lines) if ids]
    assert encode_documents([lines], TOKENIZER) == ([whole] if whole else [])
