"""Tokenised documents -> sentence pairs with masks, equal to the reference implementation's.

Every draw comes from one `random.Random`, in the reference's order, so that the same documents
and seed give the same rows. A habit of the reference that looks like a slip is kept: where ten
draws for another document all hit this one, the row is labelled "actual next" though it is not.

native/instances.c does the same, many times faster; what follows `create_rows_plainly` is its twin.

Source: NVIDIA DeepLearningExamples, PyTorch/LanguageModeling/BERT/create_pretraining_data.py; for
whole words, create_pretraining_data.py of google-research/bert.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from data_prep import native
from data_prep.config import InstanceConfig
from data_prep.wordpiece import Documents
from zerobert.errors import DataError
from zerobert.shards import DTYPES, array_shapes
from zerobert.tokenizer import CONTINUATION, WordPieceTokenizer

_RANDOM_DOCUMENT_DRAWS = 10

Sentence = list[int]
Document = list[Sentence]
Array = npt.NDArray[Any]


class Vocabulary(NamedTuple):
    """What rows need to know of a tokenizer."""

    size: int
    cls_id: int
    sep_id: int
    mask_id: int
    continues: npt.NDArray[np.bool_]  # by id: whether the piece goes on with the word before it


def vocabulary_of(tokenizer: WordPieceTokenizer) -> Vocabulary:
    """The few facts about a vocabulary that rows are made with."""
    return Vocabulary(
        size=len(tokenizer.vocab),
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        mask_id=tokenizer.mask_id,
        continues=np.array([token.startswith(CONTINUATION) for token in tokenizer.vocab]),
    )


class _Rows(Protocol):
    def __len__(self) -> int: ...

    def read(self, start: int, stop: int, arrays: Sequence[Array]) -> None: ...


class Instances(NamedTuple):
    """The rows of a shard, which become arrays where they are read."""

    rows: _Rows
    config: InstanceConfig

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    def arrays(self, start: int = 0, stop: int | None = None) -> dict[str, Array]:
        """The six arrays of a shard, from row `start` to before `stop`."""
        stop = self.num_rows if stop is None else stop
        shapes = array_shapes(
            stop - start, self.config.max_seq_length, self.config.max_predictions_per_seq
        )
        arrays = {name: np.zeros(shapes[name], dtype) for name, dtype in DTYPES.items()}
        self.rows.read(start, stop, list(arrays.values()))
        return arrays


def create_instances(
    documents: Documents, config: InstanceConfig, vocabulary: Vocabulary, rng: random.Random
) -> Instances:
    """The rows of a shard.

    Args:
        documents: without empty sentences and empty documents.
        rng: where the draws come from; do not use it further.

    Raises:
        DataError: too few documents for a random next sentence.
    """
    if documents.num_documents < config.min_documents:
        raise DataError(
            f"wanted at least {config.min_documents} documents with text, got "
            f"{documents.num_documents}: a random next sentence comes from another document (a "
            "blank line separates them); give more text, or turn the pairs off with --no_nsp"
        )
    create = _create_natively if native.is_available() else create_rows_plainly
    return Instances(create(documents, config, vocabulary, rng), config)


def _create_natively(
    documents: Documents, config: InstanceConfig, vocabulary: Vocabulary, rng: random.Random
) -> _Rows:
    rules = native.Rules(
        seq_length=config.max_seq_length,
        max_predictions=config.max_predictions_per_seq,
        num_passes=config.dupe_factor,
        short_seq_prob=config.short_seq_prob,
        no_nsp=config.no_nsp,
        whole_word_mask=config.whole_word_mask,
        num_masks=np.array(
            [_num_masks(length, config) for length in range(config.max_seq_length + 1)], np.int64
        ),
        vocab_size=vocabulary.size,
        cls_id=vocabulary.cls_id,
        sep_id=vocabulary.sep_id,
        mask_id=vocabulary.mask_id,
        continues=vocabulary.continues,
    )
    return native.Rows(*documents, rules, rng.getstate()[1])


def _num_masks(num_tokens: int, config: InstanceConfig) -> int:
    wanted = max(1, round(num_tokens * config.masked_lm_prob))
    return min(config.max_predictions_per_seq, wanted)


def create_rows_plainly(
    documents: Documents, config: InstanceConfig, vocabulary: Vocabulary, rng: random.Random
) -> _Rows:
    """The plain twin of the compiled code."""
    shuffled = _as_lists(documents)
    rng.shuffle(shuffled)
    make_pairs = _single_segments if config.no_nsp else _pairs
    rows = _PlainRows(
        _masked_row(pair, config, vocabulary, rng)
        for _ in range(config.dupe_factor)
        for index in range(len(shuffled))
        for pair in make_pairs(shuffled, index, config, rng)
    )
    rng.shuffle(rows)
    return rows


def _as_lists(documents: Documents) -> list[Document]:
    tokens, sentences, starts = (array.tolist() for array in documents)
    return [
        [tokens[sentences[i] : sentences[i + 1]] for i in range(first, end)]
        for first, end in itertools.pairwise(starts)
    ]


class _Pair(NamedTuple):
    first: Sentence
    second: Sentence
    is_random_next: bool


class _Row(NamedTuple):
    ids: list[int]
    second_start: int  # where the second segment begins
    positions: list[int]
    answers: list[int]
    label: int


class _PlainRows(list[_Row]):
    def read(self, start: int, stop: int, arrays: Sequence[Array]) -> None:
        """Write the rows from `start` to before `stop` into arrays of zeros."""
        ids, mask, segments, positions, answers, labels = arrays
        for i, row in enumerate(self[start:stop]):
            end, num_masked = len(row.ids), len(row.positions)
            ids[i, :end] = row.ids
            mask[i, :end] = 1
            segments[i, row.second_start : end] = 1
            positions[i, :num_masked] = row.positions
            answers[i, :num_masked] = row.answers
            labels[i] = row.label


def _pairs(
    documents: Sequence[Document], index: int, config: InstanceConfig, rng: random.Random
) -> Iterator[_Pair]:
    """The sentence pairs of one document. Each is used up before the next one draws."""
    document = documents[index]
    max_tokens = config.max_seq_length - 3
    target = _target_length(max_tokens, config, rng)
    chunk: list[Sentence] = []
    length = 0
    i = 0
    while i < len(document):
        chunk.append(document[i])
        length += len(document[i])
        if i == len(document) - 1 or length >= target:
            first_end = rng.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
            first = _joined(chunk[:first_end])
            is_random_next = len(chunk) == 1 or rng.random() < 0.5
            if is_random_next:
                other = _random_document(len(documents), index, rng)
                is_random_next = other != index
                second = _random_segment(documents[other], target - len(first), rng)
                i -= len(chunk) - first_end  # the sentences that were not used go back
            else:
                second = _joined(chunk[first_end:])
            _truncate(first, second, max_tokens, rng)
            yield _Pair(first, second, is_random_next)
            chunk, length = [], 0
        i += 1


def _single_segments(
    documents: Sequence[Document], index: int, config: InstanceConfig, rng: random.Random
) -> Iterator[_Pair]:
    """Rows of one segment, for training without next-sentence prediction."""
    max_tokens = config.max_seq_length - 2
    target = _target_length(max_tokens, config, rng)
    chunk: Sentence = []
    last = len(documents[index]) - 1
    for i, sentence in enumerate(documents[index]):
        chunk = chunk + sentence
        if i == last or len(chunk) >= target:
            _truncate(chunk, [], max_tokens, rng)
            yield _Pair(chunk, [], False)
            chunk = []


def _target_length(max_tokens: int, config: InstanceConfig, rng: random.Random) -> int:
    """Most rows are as long as can be; some are shorter, as texts are in use."""
    return rng.randint(2, max_tokens) if rng.random() < config.short_seq_prob else max_tokens


def _joined(sentences: Sequence[Sentence]) -> Sentence:
    return [token for sentence in sentences for token in sentence]


def _random_document(num_documents: int, index: int, rng: random.Random) -> int:
    other = index
    for _ in range(_RANDOM_DOCUMENT_DRAWS):
        other = rng.randint(0, num_documents - 1)
        if other != index:
            break
    return other


def _random_segment(document: Document, target: int, rng: random.Random) -> Sentence:
    """Sentences from a random one on, until the target is reached or the document ends."""
    segment: Sentence = []
    for sentence in document[rng.randint(0, len(document) - 1) :]:
        segment += sentence
        if len(segment) >= target:
            break
    return segment


def _truncate(first: Sentence, second: Sentence, max_tokens: int, rng: random.Random) -> None:
    """Shorten the longer one, token by token, at either end, in place."""
    while len(first) + len(second) > max_tokens:
        longer = first if len(first) > len(second) else second
        if rng.random() < 0.5:
            del longer[0]
        else:
            longer.pop()


def _masked_row(
    pair: _Pair, config: InstanceConfig, vocabulary: Vocabulary, rng: random.Random
) -> _Row:
    cls, sep = vocabulary.cls_id, vocabulary.sep_id
    ids = [cls, *pair.first, sep]
    second_start = len(ids)
    if not config.no_nsp:
        ids += [*pair.second, sep]
    positions = _mask(ids, config, vocabulary, rng)
    ordered = sorted(positions)
    return _Row(
        ids, second_start, ordered, [positions[at] for at in ordered], int(pair.is_random_next)
    )


def _mask(
    ids: list[int], config: InstanceConfig, vocabulary: Vocabulary, rng: random.Random
) -> dict[int, int]:
    """Mask tokens in place.

    Returns:
        The masked positions, with what stood there.
    """
    units = _units(ids, config, vocabulary)
    rng.shuffle(units)
    num_wanted = _num_masks(len(ids), config)
    answers: dict[int, int] = {}
    for unit in units:
        if len(answers) >= num_wanted:
            break
        if len(answers) + len(unit) > num_wanted:
            continue
        for position in unit:
            answers[position] = ids[position]
            if rng.random() < 0.8:
                ids[position] = vocabulary.mask_id
            elif rng.random() >= 0.5:
                ids[position] = rng.randint(0, vocabulary.size - 1)
    return answers


def _units(ids: list[int], config: InstanceConfig, vocabulary: Vocabulary) -> list[list[int]]:
    """The positions that are masked together: one token each, or whole words."""
    units: list[list[int]] = []
    special = (vocabulary.cls_id, vocabulary.sep_id)
    follows_word = False
    for position, token in enumerate(ids):
        if token in special:
            follows_word = False
        elif config.whole_word_mask and follows_word and vocabulary.continues[token]:
            units[-1].append(position)
        else:
            units.append([position])
            follows_word = True
    return units
