"""The `text` command: sources of any format -> a folder of sentences."""

import collections
import contextlib
import dataclasses
import importlib.metadata
import itertools
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import zerobert
from data_prep import corpus, prose, sentences
from data_prep.config import TextConfig
from data_prep.folders import is_done
from data_prep.hub import HubDataset
from data_prep.parallel import pool
from data_prep.parts import Piece, Place, Progress, load_progress, write_parts
from data_prep.prose import Document
from data_prep.sources import Source, check_unchanged, identify
from data_prep.wiki import Counts
from zerobert.errors import ConfigError, DataError
from zerobert.manifest import read_manifest, resumable_folder, write_manifest

KIND = "text"
# A worker's bite: enough that handing it over costs little.
_BATCH_CHARACTERS = 1 << 18
# What a document costs besides its text.
_DOCUMENT_CHARACTERS = 64
# Another version of these may split another way: its parts can't stand beside this one's.
_SPLITTERS = ("mwparserfromhell", "sentencex")


class _Batch(NamedTuple):
    documents: list[tuple[Place, Document]]
    language: str


def extract_text(
    inputs: Sequence[str], output_dir: Path, config: TextConfig, *, workers: int
) -> dict[str, Any]:
    """Fill a folder with `part_*.txt`: one sentence a line, a blank line between documents.

    A folder that already holds this is left as it is. What was broken off goes on after its last
    complete part, and ends in the same bytes.

    Args:
        inputs: files, folders and URLs; with `config.format` "hf" names of datasets.

    Returns:
        The manifest's summary.

    Raises:
        DataError: an input is missing, damaged or not what it should be, or there is no text in it.
        ConfigError: the output folder holds something else, or lies in an input.
        MissingDependencyError: an input needs a package that is not installed.
    """
    output_dir = output_dir.resolve()  # the text is filled in beside it, not beside a link
    sources = corpus.find_inputs(inputs, config)
    _refuse_inside(inputs, output_dir)
    hashes = _identify(sources)
    settings = dataclasses.asdict(config)
    if is_done(output_dir, kind=KIND, config=settings, inputs=hashes):
        return read_manifest(output_dir).summary
    identity = {"config": settings, "inputs": list(hashes.values()), "versions": _versions()}
    with resumable_folder(output_dir, identity) as folder, _cleared_if_useless(folder):
        start = load_progress(folder)
        if start.files:
            print(f"text: going on after {max(start.files)}", file=sys.stderr)
        left_out = _LeftOut(start, len(sources))
        batches = _batches(_documents(sources, config, start.place, left_out), config.language)
        with pool(workers) as processes:
            pieces = itertools.chain.from_iterable(processes.map(_split, batches))
            end = write_parts(folder, pieces, start, left_out.before)
        counts = left_out.before(len(sources)) + collections.Counter(end.counts)
        if not end.files:
            raise DataError(
                f"no text in {', '.join(source.name for source in sources)}: "
                + (_listed(counts) or "no document was found")
            )
        summary = {**dict(sorted(counts.items())), "seconds": round(end.seconds, 1)}
        write_manifest(
            folder, kind=KIND, config=settings, inputs=hashes, known=end.files, summary=summary
        )
    return summary


def _refuse_inside(inputs: Sequence[str], output_dir: Path) -> None:
    """Refuse an output whose text the same command would take for input the next time."""
    for name in inputs:
        folder = Path(name).resolve()
        if folder in (output_dir, *output_dir.parents) and folder.is_dir():
            raise ConfigError(
                f"--output_dir {output_dir} lies inside --input {name}, where the next run would "
                "take it for input; choose a folder outside"
            )


def _identify(sources: Sequence[Source | HubDataset]) -> dict[str, str]:
    """What identifies each input; says which hold the same, whose text will count twice."""
    hashes: dict[str, str] = {}
    first_names: dict[str, str] = {}
    num_bytes = sum(source.num_bytes for source in sources)
    with _bar("text: looking through the input", num_bytes, leave=False) as bar:
        for source in sources:
            stamp = identify(source, bar.update) if isinstance(source, Source) else source.stamp
            hashes[source.name] = stamp
            if source.num_bytes:
                first_names.setdefault(stamp, source.name)
    for name, stamp in hashes.items():
        if (first := first_names.get(stamp, name)) != name:
            print(f"warning: {name} holds the same as {first}", file=sys.stderr)
    return hashes


def _versions() -> dict[str, str]:
    known = {name: importlib.metadata.version(name) for name in _SPLITTERS}
    return {"zerobert": zerobert.__version__, **known}


@contextlib.contextmanager
def _cleared_if_useless(folder: Path) -> Iterator[None]:
    """Leave nothing behind by a failure before the first part is complete."""
    try:
        yield
    except BaseException:
        if not load_progress(folder).files:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count)


def _bar(label: str, num_bytes: int, *, leave: bool = True) -> "tqdm[Any]":
    """A bar of bytes on stderr, where that is a terminal."""
    return tqdm(
        desc=label,
        total=num_bytes or None,
        unit="B",
        unit_scale=True,
        disable=None,
        leave=leave,
        mininterval=0.5,
    )


class _LeftOut:
    """What readers leave out, by source: to go on inside one, it is read again from its start."""

    def __init__(self, start: Progress, num_sources: int) -> None:
        self._first = start.place.source
        self._before: Counts = collections.Counter(start.left_out)
        self.of_source: list[Counts] = [collections.Counter() for _ in range(num_sources)]

    def before(self, source: int) -> Counts:
        """The counts of all sources before this one."""
        return sum(self.of_source[self._first : source], start=collections.Counter(self._before))


def _documents(
    sources: Sequence[Source | HubDataset], config: TextConfig, start: Place, left_out: _LeftOut
) -> Iterator[tuple[Place, Document]]:
    """The documents from a place on, with theirs; the bar shows how far the reader is."""
    ends = list(itertools.accumulate(source.num_bytes for source in sources))
    with _bar("text", ends[-1]) as bar:
        for index in range(start.source, len(sources)):
            source, first = sources[index], start.document if index == start.source else 0
            bar.update(ends[index] - source.num_bytes - bar.n)
            documents = corpus.read_documents(source, config, left_out.of_source[index], bar.update)
            for number, document in enumerate(documents):
                if number >= first:
                    yield Place(index, number), document
            bar.update(ends[index] - bar.n)
            if isinstance(source, Source):
                check_unchanged(source)


def _batches(documents: Iterable[tuple[Place, Document]], language: str) -> Iterator[_Batch]:
    batch: list[tuple[Place, Document]] = []
    num_characters = 0
    for place, document in documents:
        batch.append((place, document))
        num_characters += len(document.text) + _DOCUMENT_CHARACTERS
        if num_characters >= _BATCH_CHARACTERS:
            yield _Batch(batch, language)
            batch, num_characters = [], 0
    if batch:
        yield _Batch(batch, language)


def _split(batch: _Batch) -> list[Piece]:
    return [_piece(place, document, batch.language) for place, document in batch.documents]


def _piece(place: Place, document: Document, language: str) -> Piece:
    counts: Counts = collections.Counter()
    lines = sentences.split(prose.paragraphs(document, counts), language)
    if not lines:
        counts["empty documents"] += 1
        return Piece(place, b"", counts)
    raw = ("\n".join(lines) + "\n\n").encode()
    # Sentences have single blanks, so that a word is what a blank or a line's end follows.
    num_words = raw.count(b" ") + len(lines)
    counts.update(documents=1, sentences=len(lines), words=num_words, bytes=len(raw))
    return Piece(place, raw, counts)
