"""The `text` command: sources of any format -> a folder of sentences."""

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from data_prep import corpus, sentences
from data_prep.corpus import Counts, Document, Format
from data_prep.folders import is_done
from data_prep.parallel import ordered_map, progress
from zerobert.errors import DataError
from zerobert.manifest import read_manifest, sha256_file, staged_folder, write_manifest, writing

KIND = "text"
_PART_BYTES = 64 << 20
# A worker's bite: enough that handing it over costs little.
_BATCH_CHARACTERS = 1 << 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How text is read; the names are the flags'."""

    format: Format = "auto"
    text_field: str = "text"
    language: str = "en"

    def __post_init__(self) -> None:
        sentences.check_language(self.language)


class _Batch(NamedTuple):
    documents: list[Document]
    language: str


class _Split(NamedTuple):
    documents: list[list[str]]
    counts: Counts


def extract_text(
    inputs: Sequence[Path], output_dir: Path, config: TextConfig, *, workers: int
) -> dict[str, Any]:
    """Fill a folder with `part_*.txt`: one sentence a line, a blank line between documents.

    A folder that already holds this is left as it is.

    Returns:
        The manifest's summary.

    Raises:
        DataError: an input is missing, damaged or not what it should be, or there is no text in it.
        ConfigError: the output folder holds something else.
    """
    started = time.monotonic()
    files = corpus.find_inputs(inputs)
    hashes = {str(path): _hash(path) for path in files}
    settings = dataclasses.asdict(config)
    if is_done(output_dir, kind=KIND, config=settings, inputs=hashes):
        return read_manifest(output_dir).summary
    counts: Counts = collections.Counter()
    with staged_folder(output_dir) as staging:
        documents = _all_sentences(_batches(files, config, counts), workers, counts)
        _write_parts(
            staging, progress(documents, label="text", total=None, unit=" documents"), counts
        )
        if counts["documents"] == 0:
            raise DataError(
                f"no text in {', '.join(map(str, inputs))}: "
                + (_listed(counts) or "no document was found")
            )
        summary = {**dict(sorted(counts.items())), "seconds": round(time.monotonic() - started, 1)}
        write_manifest(staging, kind=KIND, config=settings, inputs=hashes, summary=summary)
    return summary


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def _listed(counts: Counts) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count)


def _batches(files: Iterable[Path], config: TextConfig, counts: Counts) -> Iterator[_Batch]:
    documents = itertools.chain.from_iterable(
        corpus.read_documents(
            path, file_format=config.format, text_field=config.text_field, counts=counts
        )
        for path in files
    )
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if num_characters >= _BATCH_CHARACTERS:
            yield _Batch(batch, config.language)
            batch, num_characters = [], 0
    if batch:
        yield _Batch(batch, config.language)


def _split_batch(batch: _Batch) -> _Split:
    counts: Counts = collections.Counter()
    documents = []
    for document in batch.documents:
        lines = sentences.split(corpus.paragraphs(document, counts), batch.language)
        if lines:
            documents.append(lines)
        else:
            counts["empty documents"] += 1
    return _Split(documents, counts)


def _all_sentences(batches: Iterable[_Batch], workers: int, counts: Counts) -> Iterator[list[str]]:
    for split in ordered_map(_split_batch, batches, workers=workers):
        counts.update(split.counts)
        yield from split.documents


def _write_parts(folder: Path, documents: Iterator[list[str]], counts: Counts) -> None:
    """Write documents in order, a new file each time one is full."""
    for number in itertools.count():
        first = next(documents, None)
        if first is None:
            return
        path = folder / f"part_{number:05d}.txt"
        with writing(path), open(path, "wb") as file:
            _fill_part(file, itertools.chain([first], documents), counts)


def _fill_part(file: IO[bytes], documents: Iterator[list[str]], counts: Counts) -> None:
    num_bytes = 0
    for lines in documents:
        raw = "".join(f"{line}\n" for line in [*lines, ""]).encode()
        file.write(raw)
        num_bytes += len(raw)
        counts["documents"] += 1
        counts["sentences"] += len(lines)
        counts["words"] += sum(line.count(" ") + 1 for line in lines)
        counts["bytes"] += len(raw)
        if num_bytes >= _PART_BYTES:
            return
