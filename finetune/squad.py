"""SQuAD v1.1: questions about paragraphs, read and cut into windows of a model's length.

Shapes: N windows, B batch, S sequence, K pieces of all contexts.

Source: Rajpurkar et al. 2016 (arXiv:1606.05250); windows as in google-research/bert run_squad.py.
"""

import collections
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from finetune.batches import Encoded, Indices
from finetune.tables import is_text
from finetune.tasks import File, Split
from zerobert.device import copied_to
from zerobert.errors import ConfigError, DataError, print_aside
from zerobert.manifest import sha256_file
from zerobert.model import span_loss
from zerobert.tokenizer import WordPieceTokenizer

TRAIN = Split(files=(File(name="train-v1.1.json"),), num_rows=87_599)
DEV = Split(files=(File(name="dev-v1.1.json"),), num_rows=10_570)

# Source of the three: google-research/bert run_squad.py.
MAX_SEQ_LENGTH = 384
DOC_STRIDE = 128
MAX_QUERY_LENGTH = 64

# [CLS] question [SEP] context [SEP]
_NUM_SPECIAL = 3
_KINDS = {str: "a string", int: "a whole number", list: "a list"}

Value = TypeVar("Value", str, int, list[Any])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question, its paragraph, and the texts that answer it.

    Args:
        place: the characters [start, end) of the first answer that is where the file says it is;
            None where none is.
    """

    id: str
    text: str
    context: str
    answers: tuple[str, ...]
    place: tuple[int, int] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
    """One split, read.

    Args:
        version: the file's sha256.
    """

    source: str
    version: str
    rows: tuple[Question, ...]

    def __len__(self) -> int:
        return len(self.rows)


def load_questions(split: Split, path: Path, *, for_training: bool) -> Questions:
    """Read one split, warning of a count that is not the official one.

    Args:
        for_training: leave out questions whose answer is not where the file says it is, and say how
            many. Scores need an answer's text alone.

    Raises:
        DataError: the file is missing, empty or broken, or all its answers are elsewhere.
    """
    rows = tuple(_questions(_read_json(path), str(path)))
    if not rows:
        raise DataError(f"{path}: no questions; the file is empty or was cut off")
    name, count = collections.Counter(row.id for row in rows).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: the id {name!r} is there {count} times, wanted once")
    if split.num_rows is not None and len(rows) != split.num_rows:
        print_aside(
            f"warning: {path}: wanted SQuAD's official {split.num_rows} questions, got "
            f"{len(rows)}; scores can't be compared with published ones"
        )
    if for_training:
        rows = _with_place(rows, path)
    return Questions(source=str(path), version=sha256_file(path), rows=rows)


def _with_place(rows: tuple[Question, ...], path: Path) -> tuple[Question, ...]:
    kept = tuple(row for row in rows if row.place is not None)
    if not kept:
        raise DataError(
            f"{path}: none of {len(rows)} answers is where its answer_start says; it counts "
            "characters of the context, from 0"
        )
    if len(kept) < len(rows):
        print_aside(
            f"warning: {path}: left out {len(rows) - len(kept)} of {len(rows)} questions, whose "
            "answers are not where answer_start says"
        )
    return kept


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: no such file; put SQuAD v1.1's official file there")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if not text.strip():
            raise DataError(f"{path}: the file is empty")
        return json.loads(text)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{path}: wanted UTF-8 text, got the byte 0x{byte:02x}; convert it to UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} line {error.lineno} column {error.colno}: not JSON ({error.msg}); the file is "
            "broken or was cut off"
        ) from error
    except (ValueError, RecursionError) as error:  # digits or brackets by the thousand
        raise DataError(f"{path}: not JSON that can be read: {error}") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def _questions(raw: Any, where: str) -> Iterator[Question]:
    for article, in_article in _items(raw, "data", where):
        for paragraph, in_paragraph in _items(article, "paragraphs", in_article):
            context = _value(paragraph, "context", str, in_paragraph)
            for row, in_row in _items(paragraph, "qas", in_paragraph):
                answers = [
                    (_value(answer, "text", str, at), _value(answer, "answer_start", int, at))
                    for answer, at in _items(row, "answers", in_row)
                ]
                if not answers:
                    raise DataError(
                        f"{in_row}: wanted an answer, got none; this is for SQuAD v1.1, which has "
                        "no questions without one"
                    )
                yield Question(
                    id=_value(row, "id", str, in_row),
                    text=_value(row, "question", str, in_row),
                    context=context,
                    answers=tuple(text for text, _ in answers),
                    place=_place(context, answers),
                )


def _place(context: str, answers: Sequence[tuple[str, int]]) -> tuple[int, int] | None:
    for text, start in answers:
        if text.strip() and start >= 0 and context.startswith(text, start):
            return start, start + len(text)
    return None


def _items(record: Any, key: str, where: str) -> Iterator[tuple[Any, str]]:
    """The items of a list in a record, each with where it is."""
    separator = "." if where.endswith("]") else ": "
    for index, item in enumerate(_value(record, key, list, where)):
        yield item, f"{where}{separator}{key}[{index}]"


def _value(record: Any, key: str, kind: type[Value], where: str) -> Value:
    if not isinstance(record, dict):
        raise DataError(f"{where}: wanted an object {{...}}, got {record!r:.40}")
    if key not in record:
        found = ", ".join(map(repr, record)) or "nothing"
        raise DataError(f"{where}: wanted {key!r}, got only {found}; this is for SQuAD v1.1")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: wanted {_KINDS[kind]} in {key!r}, got {value!r:.40}")
    if isinstance(value, str) and not is_text(value):
        raise DataError(f"{where}: {key!r} has half of a UTF-16 character; write it in full")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """Questions as the model reads them: `[CLS] question [SEP] a window of the context [SEP]`.

    Args:
        tokens: the windows, without labels.
        positions_N2: the first and the last token of the answer; both 0, the [CLS], in a window
            that it is not wholly in, and both `max_seq_length`, which no row reaches, where its
            place is unknown.
        questions_N: each window's question, in the order of the split.
        contexts_N2: the tokens [start, end) of each window that are the context's.
        pieces_N: where the first of them is in `offsets_K2`.
        offsets_K2: the characters [start, end) of each piece in its own context.
    """

    tokens: Encoded
    positions_N2: npt.NDArray[np.int64]
    questions_N: npt.NDArray[np.int64]
    contexts_N2: npt.NDArray[np.int64]
    pieces_N: npt.NDArray[np.int64]
    offsets_K2: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of each window, N."""
        return self.tokens.lengths()

    def inputs(self, indices: Indices, device: torch.device) -> dict[str, Tensor]:
        """A batch, by the names of the model's arguments: ids, mask and segment ids, BS."""
        return self.tokens.inputs(indices, device)

    def loss_sum(self, outputs: tuple[Tensor, Tensor], indices: Indices) -> Tensor:
        """The summed loss of what the model answers to that batch."""
        positions_B2 = torch.from_numpy(self.positions_N2[indices])
        starts_B, ends_B = copied_to(outputs[0].device, positions_B2).T
        return span_loss(*outputs, starts_B, ends_B)


def encode(
    questions: Questions,
    tokenizer: WordPieceTokenizer,
    *,
    max_seq_length: int = MAX_SEQ_LENGTH,
    doc_stride: int = DOC_STRIDE,
    max_query_length: int = MAX_QUERY_LENGTH,
) -> Features:
    """Tokenise a split and cut what is too long into windows.

    Args:
        doc_stride: from the start of one window to that of the next, in pieces, as in BERT; in the
            `tokenizers` library a stride is what two windows share.
        max_query_length: pieces of the question; the rest of it is left out.

    Raises:
        ConfigError: there is no room for the context.
    """
    if max_query_length < 1 or doc_stride < 1:
        raise ConfigError(
            f"max_query_length and doc_stride: wanted 1 or more, got {max_query_length} and "
            f"{doc_stride}"
        )
    if max_seq_length <= max_query_length + _NUM_SPECIAL:
        raise ConfigError(
            f"max_seq_length: wanted more than {max_query_length + _NUM_SPECIAL}, the question's "
            f"room, got {max_seq_length}; lower max_query_length"
        )
    texts = list(dict.fromkeys(row.context for row in questions.rows))
    contexts = dict(zip(texts, _encode_contexts(texts, tokenizer), strict=True))
    queries = tokenizer.encode_words([row.text for row in questions.rows])
    input_ids: list[list[int]] = []
    segment_ids: list[list[int]] = []
    records: list[tuple[int, ...]] = []
    for number, (row, query) in enumerate(zip(questions.rows, queries, strict=True)):
        context = contexts[row.context]
        head = [tokenizer.cls_id, *query[:max_query_length], tokenizer.sep_id]
        room = max_seq_length - len(head) - 1
        for first, end in windows(len(context.ids), room=room, stride=doc_stride):
            input_ids.append([*head, *context.ids[first:end], tokenizer.sep_id])
            segment_ids.append([0] * len(head) + [1] * (end - first + 1))
            positions = (max_seq_length, max_seq_length)
            if row.place is not None:
                positions = _positions(context.pieces(row.place), first, end, len(head))
            span = (len(head), len(head) + end - first)
            records.append((*positions, number, *span, context.start + first))
    table = np.array(records, dtype=np.int64)
    return Features(
        tokens=Encoded(
            input_ids=input_ids, segment_ids=segment_ids, labels=None, max_seq_length=max_seq_length
        ),
        positions_N2=table[:, 0:2],
        questions_N=table[:, 2],
        contexts_N2=table[:, 3:5],
        pieces_N=table[:, 5],
        offsets_K2=np.concatenate([context.offsets_K2 for context in contexts.values()]),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Context:
    """A paragraph's pieces; `start` is where they are among those of all contexts."""

    ids: list[int]
    offsets_K2: npt.NDArray[np.int64]
    start: int

    def pieces(self, place: tuple[int, int]) -> tuple[int, int]:
        """The first and the last piece that share a character with [start, end)."""
        starts_K, ends_K = self.offsets_K2.T
        first = np.searchsorted(ends_K, place[0], side="right")
        last = np.searchsorted(starts_K, place[1], side="left") - 1
        return int(first), int(last)


def _encode_contexts(texts: Sequence[str], tokenizer: WordPieceTokenizer) -> Iterator[_Context]:
    start = 0
    for ids, offsets in tokenizer.encode_words_with_offsets(texts):
        offsets_K2 = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        yield _Context(ids=ids, offsets_K2=offsets_K2, start=start)
        start += len(ids)


def windows(num_pieces: int, *, room: int, stride: int) -> list[tuple[int, int]]:
    """The pieces [start, end) of each window, which together are all; no text is one empty window.

    Args:
        room: the most pieces of a window; a larger stride than this is cut to it.
    """
    step = min(stride, room)
    num_windows = 1 + max(0, -(-(num_pieces - room) // step))
    return [(i * step, min(i * step + room, num_pieces)) for i in range(num_windows)]


def _positions(answer: tuple[int, int], first: int, end: int, shift: int) -> tuple[int, int]:
    is_inside = first <= answer[0] <= answer[1] < end
    return (answer[0] - first + shift, answer[1] - first + shift) if is_inside else (0, 0)
