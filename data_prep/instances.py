"""Tokenised documents -> sentence pairs with masks, equal to the reference implementation's.

Every draw comes from one `random.Random`, in the reference's order, so that the same documents
and seed give the same rows. A habit of the reference that looks like a slip is kept: where ten
draws for another document all hit this one, the row is labelled "actual next" though it is not.

Source: NVIDIA DeepLearningExamples, PyTorch/LanguageModeling/BERT/create_pretraining_data.py; for
whole words, create_pretraining_data.py of google-research/bert.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.wordpiece import Document, Sentence
from zerobert.errors import ConfigError, DataError
from zerobert.shards import DTYPES
from zerobert.tokenizer import CONTINUATION, WordPieceTokenizer

# [CLS] a [SEP] b [SEP] with one piece each.
_MIN_SEQ_LENGTH = 5
_RANDOM_DOCUMENT_DRAWS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceConfig:
    """How rows are made; the names are the flags'."""

    max_seq_length: int = 128
    max_predictions_per_seq: int = 20
    masked_lm_prob: float = 0.15
    short_seq_prob: float = 0.1
    dupe_factor: int = 5
    whole_word_mask: bool = False
    no_nsp: bool = False

    def __post_init__(self) -> None:
        if self.max_seq_length < _MIN_SEQ_LENGTH:
            raise ConfigError(
                f"--max_seq_length: wanted at least {_MIN_SEQ_LENGTH}, got {self.max_seq_length}"
            )
        if not 1 <= self.max_predictions_per_seq <= self.max_seq_length:
            raise ConfigError(
                f"--max_predictions_per_seq: wanted 1 to the sequence's {self.max_seq_length}, "
                f"got {self.max_predictions_per_seq}"
            )
        if self.dupe_factor < 1:
            raise ConfigError(f"--dupe_factor: wanted at least 1, got {self.dupe_factor}")
        for name in ("masked_lm_prob", "short_seq_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"--{name}: wanted a probability from 0 to 1, got {getattr(self, name)}"
                )

    @property
    def min_documents(self) -> int:
        """How many documents a file needs: a random next sentence comes from another one."""
        return 1 if self.no_nsp else 2


class Vocabulary(NamedTuple):
    """What instances need to know of a tokenizer."""

    size: int
    cls_id: int
    sep_id: int
    mask_id: int
    continues: list[bool]  # by id: whether the piece goes on with the word before it


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


def vocabulary_of(tokenizer: WordPieceTokenizer) -> Vocabulary:
    """The few facts about a vocabulary that rows are made with."""
    return Vocabulary(
        size=len(tokenizer.vocab),
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        mask_id=tokenizer.mask_id,
        continues=[token.startswith(CONTINUATION) for token in tokenizer.vocab],
    )


def create_instances(
    documents: Sequence[Document],
    config: InstanceConfig,
    vocabulary: Vocabulary,
    rng: random.Random,
) -> dict[str, npt.NDArray[Any]]:
    """The six arrays of a shard.

    Args:
        documents: without empty sentences and empty documents.

    Raises:
        DataError: too few documents for a random next sentence.
    """
    if len(documents) < config.min_documents:
        raise DataError(
            f"wanted at least {config.min_documents} documents with text, got {len(documents)}: a "
            "random next sentence comes from another document (a blank line separates them); "
            "give more text, or turn the pairs off with --no_nsp"
        )
    shuffled = list(documents)
    rng.shuffle(shuffled)
    make_pairs = _single_segments if config.no_nsp else _pairs
    rows = [
        _masked_row(pair, config, vocabulary, rng)
        for _ in range(config.dupe_factor)
        for index in range(len(shuffled))
        for pair in make_pairs(shuffled, index, config, rng)
    ]
    rng.shuffle(rows)
    return _as_arrays(rows, config)


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
    num_wanted = min(
        config.max_predictions_per_seq, max(1, round(len(ids) * config.masked_lm_prob))
    )
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


def _as_arrays(rows: Sequence[_Row], config: InstanceConfig) -> dict[str, npt.NDArray[Any]]:
    num_rows, length, width = len(rows), config.max_seq_length, config.max_predictions_per_seq
    arrays = {
        "input_ids": np.zeros((num_rows, length), DTYPES["input_ids"]),
        "input_mask": np.zeros((num_rows, length), DTYPES["input_mask"]),
        "segment_ids": np.zeros((num_rows, length), DTYPES["segment_ids"]),
        "masked_lm_positions": np.zeros((num_rows, width), DTYPES["masked_lm_positions"]),
        "masked_lm_ids": np.zeros((num_rows, width), DTYPES["masked_lm_ids"]),
        "next_sentence_labels": np.zeros(num_rows, DTYPES["next_sentence_labels"]),
    }
    for i, row in enumerate(rows):
        end, num_masked = len(row.ids), len(row.positions)
        arrays["input_ids"][i, :end] = row.ids
        arrays["input_mask"][i, :end] = 1
        arrays["segment_ids"][i, row.second_start : end] = 1
        arrays["masked_lm_positions"][i, :num_masked] = row.positions
        arrays["masked_lm_ids"][i, :num_masked] = row.answers
        arrays["next_sentence_labels"][i] = row.label
    return arrays
