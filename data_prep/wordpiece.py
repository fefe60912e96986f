"""Text -> WordPiece ids, each distinct word tokenised once.

What a word becomes depends on that word alone, and a corpus repeats few words often: numbering the
words of a text and tokenising each distinct one is many times faster than tokenising every line.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep import native
from zerobert.tokenizer import CONTINUATION, WordPieceTokenizer

Array = npt.NDArray[Any]

# Words that are one token before WordPiece cuts them, so that many can be tokenised as one text.
_PLAIN = re.compile(r"[0-9A-Za-z]+")
_WORDS_PER_TEXT = 500


class Documents(NamedTuple):
    """Tokenised documents, none of them empty, one after the other.

    Attributes:
        tokens: [T], the ids of all sentences.
        sentence_starts: [sentences + 1], in tokens; the last one is T.
        document_starts: [documents + 1], in sentences.
    """

    tokens: npt.NDArray[np.int32]
    sentence_starts: npt.NDArray[np.int64]
    document_starts: npt.NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.document_starts) - 1

    @property
    def num_sentences(self) -> int:
        """How many sentences there are in all."""
        return len(self.sentence_starts) - 1


def joined(parts: Sequence[Documents]) -> Documents:
    """The documents of all parts."""
    return Documents(
        np.concatenate([part.tokens for part in parts]),
        _joined_starts([part.sentence_starts for part in parts]),
        _joined_starts([part.document_starts for part in parts]),
    )


def _joined_starts(parts: Sequence[Array]) -> Array:
    return _starts(np.concatenate([np.diff(starts) for starts in parts]))


def _starts(lengths: Array) -> npt.NDArray[np.int64]:
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def reordered(documents: Documents, order: Array) -> Documents:
    """The documents in another order."""
    sentences = np.diff(documents.sentence_starts)
    starts = documents.document_starts.tolist()
    places = documents.sentence_starts[documents.document_starts].tolist()
    parts = order.tolist()
    none: list[Array] = [np.empty(0, np.int64)]
    lengths = np.concatenate(none + [sentences[starts[i] : starts[i + 1]] for i in parts])
    tokens = [documents.tokens[places[i] : places[i + 1]] for i in parts]
    return Documents(
        np.concatenate([np.empty(0, np.int32), *tokens]),
        _starts(lengths),
        _starts(np.diff(documents.document_starts)[order]),
    )


def encode(text: bytes, tokenizer: WordPieceTokenizer) -> tuple[Documents, Array]:
    """Tokenise a text: a sentence a line, a blank line between documents.

    Args:
        text: UTF-8; lines end with a newline only.

    Returns:
        The documents, and where each stands in the text ([D, 2], in bytes, without the newline at
        its end). Sentences and documents that come to nothing are left out.
    """
    if not native.is_available():
        return encode_plainly(text, tokenizer)
    words = native.Words(text)
    *arrays, kept = words.put_pieces(*_encode_words(words.distinct, tokenizer))
    return Documents(*arrays), words.document_spans[kept]


def _encode_words(
    words: Sequence[str], tokenizer: WordPieceTokenizer
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The pieces of all words, and where those of each begin."""
    is_plain = np.array([_PLAIN.fullmatch(word) is not None for word in words], dtype=bool)
    plain = list(itertools.compress(words, is_plain))
    texts = [
        " ".join(plain[start : start + _WORDS_PER_TEXT])
        for start in range(0, len(plain), _WORDS_PER_TEXT)
    ]
    of_plain = _flat(tokenizer.encode_words(texts))
    others = tokenizer.encode_words(list(itertools.compress(words, ~is_plain)))
    begins = np.flatnonzero(~_continues(tokenizer)[of_plain])
    lengths = np.empty(len(words), np.int64)
    lengths[is_plain] = np.diff(begins, append=len(of_plain))
    lengths[~is_plain] = [len(ids) for ids in others]
    pieces = np.empty(lengths.sum(), np.int32)
    is_of_plain = np.repeat(is_plain, lengths)
    pieces[is_of_plain] = of_plain
    pieces[~is_of_plain] = _flat(others)
    return pieces, _starts(lengths)


def _flat(lists: Sequence[list[int]]) -> npt.NDArray[np.int32]:
    return np.fromiter(itertools.chain.from_iterable(lists), np.int32)


def _continues(tokenizer: WordPieceTokenizer) -> npt.NDArray[np.bool_]:
    return np.array([token.startswith(CONTINUATION) for token in tokenizer.vocab])


def encode_plainly(text: bytes, tokenizer: WordPieceTokenizer) -> tuple[Documents, Array]:
    """The plain twin of `encode`."""
    # Words end at ASCII spaces only: every tokeniser rule looks at one side of these, while some of
    # what str.split() calls white space (U+001C, say) is a character to drop inside a word.
    lines = text.decode().split("\n")
    words = sorted({word for line in lines for word in line.split(" ")})
    pieces = dict(zip(words, tokenizer.encode_words(words), strict=True))
    sentences: list[list[int]] = []
    document_starts: list[int] = []
    spans: list[list[int]] = []
    offset, is_new = 0, True
    for line in lines:
        end = offset + len(line.encode())
        if line.strip():
            if is_new:
                document_starts.append(len(sentences))
                spans.append([offset, end])
            spans[-1][1] = end
            ids = list(itertools.chain.from_iterable(map(pieces.__getitem__, line.split(" "))))
            sentences += [ids] if ids else []
        is_new = not line.strip()
        offset = end + 1
    sizes = np.diff(document_starts, append=len(sentences)).astype(np.int64)
    documents = Documents(
        _flat(sentences),
        _starts(np.array([len(ids) for ids in sentences], np.int64)),
        _starts(sizes[sizes > 0]),
    )
    return documents, np.array(spans, np.int64).reshape(-1, 2)[sizes > 0]
