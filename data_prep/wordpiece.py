"""Sentences -> WordPiece ids, each distinct word tokenised once.

What a word becomes depends on that word alone, and a corpus repeats few words often: looking words
up is several times faster than tokenising every sentence.
"""

import itertools
from collections.abc import Sequence

from zerobert.tokenizer import WordPieceTokenizer

Sentence = list[int]
Document = list[Sentence]


def encode_documents(
    documents: Sequence[Sequence[str]], tokenizer: WordPieceTokenizer
) -> list[Document]:
    """The ids of every sentence; sentences and documents that come to nothing are left out."""
    # At ASCII blanks only: every tokeniser rule looks at one side of them, while some of what
    # str.split() calls white space (U+001C, say) is a character to drop inside a word.
    words = {word for document in documents for line in document for word in line.split(" ")}
    ordered = sorted(words)
    pieces = dict(zip(ordered, tokenizer.encode_words(ordered), strict=True))
    encoded = (
        [ids for line in document if (ids := _concatenated(line, pieces))] for document in documents
    )
    return [document for document in encoded if document]


def _concatenated(line: str, pieces: dict[str, list[int]]) -> Sentence:
    return list(itertools.chain.from_iterable(map(pieces.__getitem__, line.split(" "))))
