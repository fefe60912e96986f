"""The compiled twins of wordpiece.py and instances.py, with NumPy arrays in and out."""

import ctypes
import dataclasses
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.native.compiler import load

Array = npt.NDArray[Any]

_I4 = ctypes.POINTER(ctypes.c_int32)
_I8 = ctypes.POINTER(ctypes.c_int64)


class _Words(ctypes.Structure):
    """`Words` of words.c."""

    _fields_ = (
        ("num_words", ctypes.c_int64),
        ("num_distinct", ctypes.c_int64),
        ("num_sentences", ctypes.c_int64),
        ("num_documents", ctypes.c_int64),
        ("numbers", _I4),
        ("word_spans", _I8),
        ("sentence_ends", _I8),
        ("sentence_documents", _I8),
        ("document_spans", _I8),
    )


class _Documents(ctypes.Structure):
    """`Documents` of instances.c."""

    _fields_ = (
        ("tokens", ctypes.c_void_p),
        ("sentence_starts", ctypes.c_void_p),
        ("document_starts", ctypes.c_void_p),
        ("num_documents", ctypes.c_int64),
    )


class _Rules(ctypes.Structure):
    """`Rules` of instances.c."""

    _fields_ = (
        ("seq_length", ctypes.c_int64),
        ("max_predictions", ctypes.c_int64),
        ("num_passes", ctypes.c_int64),
        ("short_seq_prob", ctypes.c_double),
        ("no_nsp", ctypes.c_int64),
        ("whole_word_mask", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("cls_id", ctypes.c_int64),
        ("sep_id", ctypes.c_int64),
        ("mask_id", ctypes.c_int64),
        ("num_masks", ctypes.c_void_p),
        ("continues", ctypes.c_void_p),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = load()
    if library is not None:
        library.find_words.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        library.find_words.restype = ctypes.POINTER(_Words)
        library.free_words.argtypes = [ctypes.POINTER(_Words)]
        library.put_pieces.argtypes = [ctypes.POINTER(_Words), *[ctypes.c_void_p] * 7]
        library.build_rows.argtypes = [
            ctypes.c_void_p,
            ctypes.POINTER(_Documents),
            ctypes.POINTER(_Rules),
        ]
        library.build_rows.restype = ctypes.c_void_p
        library.free_rows.argtypes = [ctypes.c_void_p]
        library.read_rows.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.POINTER(_Rules),
            ctypes.c_int64,
            ctypes.c_int64,
            *[ctypes.c_void_p] * 6,
        ]
        for function in ("free_words", "put_pieces", "free_rows", "read_rows"):
            getattr(library, function).restype = None
    return library


def is_available() -> bool:
    """Whether the compiled code can be used; builds it at the first call."""
    return _library() is not None


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "callers ask is_available() first"
    return library


def _address(array: Array, dtype: Any) -> int:
    """Where an array's values begin; C knows nothing of types and strides."""
    assert array.dtype == dtype
    assert array.flags.c_contiguous
    return array.ctypes.data


class Words:
    """The words of a text, numbered; what they come from are lines of UTF-8.

    Attributes:
        distinct: each distinct word, by its number.
        document_spans: [D, 2], where each document stands in the text, in bytes.
    """

    def __init__(self, text: bytes) -> None:
        library = _loaded()
        self._words = library.find_words(text, len(text))
        if not self._words:
            raise MemoryError
        weakref.finalize(self, library.free_words, self._words)
        found = self._words.contents
        spans = _view(found.word_spans, (found.num_distinct, 2), np.int64).tolist()
        self.distinct = [text[start:end].decode() for start, end in spans]
        self.document_spans = np.array(
            _view(found.document_spans, (found.num_documents, 2), np.int64)
        )

    def put_pieces(
        self, pieces: npt.NDArray[np.int32], piece_starts: npt.NDArray[np.int64]
    ) -> tuple[Array, Array, Array, Array]:
        """Put the ids of every word in its place.

        Args:
            pieces: the ids of all distinct words, one after the other.
            piece_starts: [W + 1], where those of each begin.

        Returns:
            The tokens; where each sentence begins in them ([S + 1]); where each document begins in
            these ([D + 1]); which documents have any tokens.
        """
        found = self._words.contents
        numbers = _view(found.numbers, (found.num_words,), np.int32)
        tokens = np.empty(int(np.diff(piece_starts)[numbers].sum()), np.int32)
        sentence_starts = np.empty(found.num_sentences + 1, np.int64)
        document_starts = np.empty(found.num_documents + 1, np.int64)
        kept = np.empty(found.num_documents, np.int64)
        counts = np.empty(2, np.int64)
        _loaded().put_pieces(
            self._words,
            _address(pieces, np.int32),
            _address(piece_starts, np.int64),
            *(array.ctypes.data for array in (tokens, sentence_starts, document_starts, kept)),
            counts.ctypes.data,
        )
        num_sentences, num_documents = counts.tolist()
        return (
            tokens,
            sentence_starts[: num_sentences + 1],
            document_starts[: num_documents + 1],
            kept[:num_documents],
        )


def _view(pointer: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """C's memory as an array, as long as it is there."""
    array: Array = np.ctypeslib.as_array(pointer, shape) if pointer else np.empty(shape, dtype)
    return array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What rows are made by; see data_prep/config.py.

    Attributes:
        num_masks: [S + 1], by the number of tokens of a row.
        continues: [V], whether a piece goes on with the word before it.
    """

    seq_length: int
    max_predictions: int
    num_passes: int
    short_seq_prob: float
    no_nsp: bool
    whole_word_mask: bool
    vocab_size: int
    cls_id: int
    sep_id: int
    mask_id: int
    num_masks: npt.NDArray[np.int64]
    continues: npt.NDArray[np.bool_]


class Rows:
    """The rows of a shard, in their final order."""

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        sentence_starts: npt.NDArray[np.int64],
        document_starts: npt.NDArray[np.int64],
        rules: Rules,
        state: Sequence[int],
    ) -> None:
        """Make the rows.

        Args:
            state: what `random.Random.getstate()` has as its second item.
        """
        library = _loaded()
        self._tokens = tokens
        self._arrays = (rules.num_masks, rules.continues)  # C reads them as long as this lives
        fields = {field.name: getattr(rules, field.name) for field in dataclasses.fields(rules)}
        fields["num_masks"] = _address(rules.num_masks, np.int64)
        fields["continues"] = _address(rules.continues, np.bool_)
        self._rules = _Rules(**fields)
        documents = _Documents(
            _address(tokens, np.int32),
            _address(sentence_starts, np.int64),
            _address(document_starts, np.int64),
            len(document_starts) - 1,
        )
        words = np.array(state, dtype=np.uint32)
        self._rows = library.build_rows(
            words.ctypes.data, ctypes.byref(documents), ctypes.byref(self._rules)
        )
        if not self._rows:
            raise MemoryError
        weakref.finalize(self, library.free_rows, self._rows)

    def __len__(self) -> int:
        num_rows: int = ctypes.cast(self._rows, _I8).contents.value  # the first field of `Rows`
        return num_rows

    def read(self, start: int, stop: int, arrays: Sequence[Array]) -> None:
        """Write the rows from `start` to before `stop` into the six arrays of a shard, of zeros."""
        assert 0 <= start <= stop <= len(self)
        _loaded().read_rows(
            self._rows,
            _address(self._tokens, np.int32),
            ctypes.byref(self._rules),
            start,
            stop,
            *(array.ctypes.data for array in arrays),
        )
