"""Text -> a folder of tokenised documents, from which shards of any length are built.

The text is cut into pieces at blank lines; every piece is tokenised on its own, in any process, and
its documents are sorted by a seeded hash of their text. The documents of all pieces thus have one
order, which neither the order of files nor the cutting changes, and a range of it is read without
reading the rest. Memory is that of a piece.

A piece is one file: a header of four numbers, the keys (their upper 64 bits, then the lower), the
starts of documents and of sentences, and the tokens.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.folders import is_done
from data_prep.parallel import Pool, progress
from data_prep.streams import decode
from data_prep.wordpiece import Documents, encode, joined, reordered
from zerobert import __version__
from zerobert.errors import DataError
from zerobert.manifest import (
    read_manifest,
    resumable_folder,
    write_bytes,
    write_json,
    write_manifest,
    write_text,
)
from zerobert.shards import VOCAB_NAME
from zerobert.tokenizer import WordPieceTokenizer, vocabulary_text

Array = npt.NDArray[Any]

KIND = "tokens"
# Large enough that its distinct words are few beside its words.
_PIECE_BYTES = 16 << 20
_KEY_BYTES = 16
_NUM_HEADER = 4
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """What decides what the folder holds."""

    do_lower_case: bool
    random_seed: int

    @property
    def folder_name(self) -> str:
        """Beside the folders of the shards that are built from it."""
        return f"tokens_lower_case_{int(self.do_lower_case)}_random_seed_{self.random_seed}"


class Range(NamedTuple):
    """A part of a text file: whole documents, between two of its bytes."""

    path: Path
    start: int
    end: int


class Stamp(NamedTuple):
    """What of a file changes when somebody writes to it."""

    num_bytes: int
    modified_ns: int


class _Task(NamedTuple):
    """All that a worker needs to make a piece."""

    ranges: list[Range]
    path: Path
    vocab_file: Path
    vocab_sha256: str
    config: TokensConfig

    @property
    def num_bytes(self) -> int:
        return sum(part.end - part.start for part in self.ranges)

    @property
    def receipt(self) -> Path:
        """Written when the piece is complete: its figures."""
        return self.path.with_name(f".{self.path.name}.json")


def tokenize_text(
    files: Mapping[Path, Stamp],
    tokenizer: WordPieceTokenizer,
    folder: Path,
    config: TokensConfig,
    *,
    inputs: dict[str, str],
    pool: Pool,
) -> dict[str, Any]:
    """Fill a folder with the tokens of text files; what an earlier run has done is kept.

    Args:
        files: with their stamps from before they were hashed.
        inputs: name -> sha256 of the text and the vocabulary.

    Returns:
        The summary: documents, sentences, tokens, unknown ones, bytes of text.

    Raises:
        DataError: a file is not text or changes meanwhile, or the disk is full.
        ConfigError: the folder holds something else.
    """
    record = dataclasses.asdict(config)
    if is_done(folder, kind=KIND, config=record, inputs=inputs):
        return read_manifest(folder).summary
    identity = {
        "config": record,
        "inputs": inputs,
        "piece_bytes": _PIECE_BYTES,
        "version": __version__,
    }
    with resumable_folder(folder, identity) as staging:
        # The workers read this copy: the original may change under them.
        write_text(staging / VOCAB_NAME, vocabulary_text(tokenizer.vocab))
        tasks = [
            _Task(
                ranges,
                staging / f"piece_{number:05d}.bin",
                staging / VOCAB_NAME,
                tokenizer.sha256,
                config,
            )
            for number, ranges in enumerate(plan_pieces(list(files), _PIECE_BYTES))
        ]
        missing = [task for task in tasks if not task.receipt.exists()]
        done = sum(task.num_bytes for task in tasks) - sum(task.num_bytes for task in missing)
        results = pool.map(_tokenize_piece, missing)
        sizes = [task.num_bytes for task in missing]
        for _ in progress(results, label="tokens", sizes=sizes, skipped=done):
            pass
        if changed := [path for path, before in files.items() if stamp(path) != before]:
            for task in tasks:
                task.receipt.unlink()
            raise DataError(f"{changed[0]} changed while it was read; run the same command again")
        summary = collections.Counter(documents=0, sentences=0, tokens=0, unknown=0, text_bytes=0)
        for task in tasks:
            summary.update(json.loads(task.receipt.read_text(encoding="utf-8")))
        write_manifest(staging, kind=KIND, config=record, inputs=inputs, summary=summary)
    return dict(summary)


def stamp(path: Path) -> Stamp:
    """The stamp of a file as it is now.

    Raises:
        DataError: it can't be read.
    """
    with _reading(path) as file:
        status = os.fstat(file.fileno())
    return Stamp(status.st_size, status.st_mtime_ns)


def plan_pieces(files: Sequence[Path], piece_bytes: int) -> list[list[Range]]:
    """Cut large files into pieces, and put small ones together.

    A piece is longer than wanted by what its last document needs.

    Raises:
        DataError: a file can't be read.
    """
    pieces: list[list[Range]] = []
    room = 0
    for part in itertools.chain.from_iterable(_ranges(path, piece_bytes) for path in files):
        if part.end - part.start > room:
            pieces.append([])
            room = piece_bytes
        pieces[-1].append(part)
        room -= part.end - part.start
    return pieces


def _ranges(path: Path, num_bytes: int) -> Iterator[Range]:
    with _reading(path) as file:
        size = file.seek(0, os.SEEK_END)
        start = 0
        while start < size:
            end = min(start + num_bytes, size)
            if end < size:
                end = _next_document(file, end)
            yield Range(path, start, end)
            start = end


def _next_document(file: IO[bytes], offset: int) -> int:
    """Where the first line after a blank one that begins behind the offset is, or the end."""
    file.seek(offset)
    file.readline()
    while (line := file.readline()) and line.decode("utf-8", "replace").strip():
        pass
    return file.tell()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def _tokenize_piece(task: _Task) -> None:
    tokenizer = _tokenizer(task.vocab_file, task.vocab_sha256, task.config.do_lower_case)
    text = b"\n\n".join(read_range(part) for part in task.ranges)
    documents, spans = encode(text, tokenizer)
    keys = _keys(text, spans, task.config.random_seed)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    write_bytes(task.path, *_packed(reordered(documents, order), keys[order], tokenizer))
    counts = {
        "documents": documents.num_documents,
        "sentences": documents.num_sentences,
        "tokens": len(documents.tokens),
        "unknown": int((documents.tokens == tokenizer.unk_id).sum()),
        "text_bytes": task.num_bytes,
    }
    write_json(task.receipt, counts)


@functools.lru_cache(maxsize=1)
def _tokenizer(vocab_file: Path, sha256: str, do_lower_case: bool) -> WordPieceTokenizer:
    # By its hash too: a worker of a cluster outlives the command, and may see another vocabulary
    # at the same path in the next one.
    return WordPieceTokenizer.from_file(vocab_file, do_lower_case=do_lower_case)


def read_range(part: Range) -> bytes:
    """The documents of a range, each line ended by a newline only.

    Raises:
        DataError: they can't be read, or are not text.
    """
    with _reading(part.path) as file:
        file.seek(part.start)
        raw = file.read(part.end - part.start)
    decode(raw, where=part.path, offset=part.start)
    if part.start == 0:
        raw = raw.removeprefix(_BYTE_ORDER_MARK)
    return raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in raw else raw


def _keys(text: bytes, spans: Array, seed: int) -> npt.NDArray[np.uint64]:
    """The key of each document, [D, 2]: a hash of its text, seeded."""
    view, salt = memoryview(text), hashlib.sha256(str(seed).encode()).digest()
    digests = b"".join(
        hashlib.blake2b(view[start:end], digest_size=_KEY_BYTES, key=salt).digest()
        for start, end in spans.tolist()
    )
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def _packed(documents: Documents, keys: Array, tokenizer: WordPieceTokenizer) -> Iterator[bytes]:
    is_small = len(tokenizer.vocab) <= 1 << 16
    tokens = documents.tokens.astype(np.uint16 if is_small else np.int32)
    header = [documents.num_documents, documents.num_sentences, len(tokens), tokens.itemsize]
    yield np.array(header, np.int64).tobytes()
    yield from (np.ascontiguousarray(half).tobytes() for half in keys.T)
    yield documents.document_starts.tobytes()
    yield documents.sentence_starts.tobytes()
    yield tokens.tobytes()


class _Piece:
    """A piece on disk, of which the parts that are used are read."""

    def __init__(self, path: Path) -> None:
        raw = np.memmap(path, mode="r")
        header = raw[: 8 * _NUM_HEADER].view(np.int64).tolist()
        num_documents, num_sentences, num_tokens, token_bytes = header
        self.num_documents: int = num_documents
        self._raw, self._at = raw, 8 * _NUM_HEADER
        self.keys = self._take(num_documents, np.uint64)
        self.lower_keys = self._take(num_documents, np.uint64)
        self._document_starts = self._take(num_documents + 1, np.int64)
        self._sentence_starts = self._take(num_sentences + 1, np.int64)
        self._tokens = self._take(num_tokens, np.uint16 if token_bytes == 2 else np.int32)

    def _take(self, count: int, dtype: Any) -> Array:
        start, self._at = self._at, self._at + count * np.dtype(dtype).itemsize
        return self._raw[start : self._at].view(dtype)

    def read(self, first: int, end: int) -> Documents:
        documents = self._document_starts[first : end + 1]
        sentences = self._sentence_starts[documents[0] : documents[-1] + 1]
        tokens = self._tokens[sentences[0] : sentences[-1]]
        return Documents(
            tokens.astype(np.int32), sentences - sentences[0], documents - documents[0]
        )


def piece_files(folder: Path) -> list[Path]:
    """The pieces of a folder, in their order."""
    return sorted(folder.glob("piece_*.bin"))


def find_places(pieces: Sequence[Path], ranks: Sequence[int]) -> Array:
    """Where documents of some ranks in the order of all keys stand in every piece.

    Of documents with one key, those of earlier pieces come first; their texts are the same.

    Returns:
        [ranks, pieces]: how many documents of the piece come before the rank.
    """
    keys, wanted = _keys_of(pieces), np.array(ranks, np.int64)
    last = _last_keys(keys, wanted)
    before, upto = _counts(keys, last, "left"), _counts(keys, last, "right")
    # Of the documents with that very key, as many as are lacking, piece by piece.
    lacking = (wanted - before.sum(axis=1))[:, None]
    earlier = np.cumsum(upto - before, axis=1) - (upto - before)
    places: Array = before + np.clip(lacking - earlier, 0, upto - before)
    return places


def end_of_equals(pieces: Sequence[Path], rank: int) -> int:
    """The first rank from this one on where a key differs from that of the document before."""
    if rank == 0:
        return 0
    keys = _keys_of(pieces)
    return int(_counts(keys, _last_keys(keys, np.array([rank])), "right").sum())


def _keys_of(pieces: Sequence[Path]) -> list[Array]:
    # Copies: a piece that is mapped holds a file open, and there may be more than a process may.
    return [np.array(_Piece(path).keys) for path in pieces]


def _last_keys(keys: Sequence[Array], ranks: Array) -> Array:
    """The least key with at least as many documents up to it as each rank says, by bisection."""
    low, high = np.zeros(len(ranks), np.uint64), np.full(len(ranks), np.iinfo(np.uint64).max)
    while (low < high).any():
        middle = low + (high - low) // np.uint64(2)
        is_enough = _counts(keys, middle, "right").sum(axis=1) >= ranks
        high = np.where(is_enough, middle, high)
        low = np.where(is_enough, low, middle + np.uint64(1))
    return low


def _counts(keys: Sequence[Array], wanted: Array, side: Any) -> Array:
    found = [np.searchsorted(of_piece, wanted, side=side) for of_piece in keys]
    return np.stack(found, axis=1) if found else np.zeros((len(wanted), 0), np.int64)


def read_documents(pieces: Sequence[Path], first: Sequence[int], end: Sequence[int]) -> Documents:
    """The documents between two places of every piece, in the order of their keys."""
    parts, keys = [], []
    for path, start, stop in zip(pieces, first, end, strict=True):
        if start < stop:
            piece = _Piece(path)
            parts.append(piece.read(start, stop))
            keys.append(np.stack([piece.lower_keys[start:stop], piece.keys[start:stop]]))
    return reordered(joined(parts), np.lexsort(np.concatenate(keys, axis=1)))
