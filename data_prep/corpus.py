"""Dumps, extracted text, plain text, JSON lines and tables -> documents.

A reader yields documents in the order of the file and counts what it leaves out.
"""

import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep import hub, tables, wiki
from data_prep.config import Format, TextConfig
from data_prep.hub import HubDataset
from data_prep.prose import Document
from data_prep.sources import Source, find_sources, opened
from data_prep.streams import COMPRESSIONS, OnRead, decode
from data_prep.wiki import Counts
from zerobert.errors import DataError

_FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".xml": "wiki-dump",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
_REFUSED_SUFFIXES = {
    ".zip": "unpack it first",
    ".tar": "unpack it with `tar -x` first",
    ".7z": "unpack it first",
    ".arrow": "name the folder that holds it, with --format hf",
    ".html": "extract its text into a .txt first, or pass --format text to keep the tags",
    ".htm": "extract its text into a .txt first, or pass --format text to keep the tags",
    ".csv": "make a .jsonl or .parquet of it first, or pass --format text to keep the commas",
    ".tsv": "make a .jsonl or .parquet of it first, or pass --format text to keep the tabs",
}
_SNIFFED_BYTES = 4096
_BLOCK_BYTES = 1 << 20
# No book, page or record comes near; what does is many of them in one, or no text.
_MAX_DOCUMENT_BYTES = 256 << 20
_JSON_OPENING = re.compile(rb'\{\s*["}]')
_DOC_OPENING = re.compile(r"<doc\b[^>]*>")


def find_inputs(inputs: Sequence[str], config: TextConfig) -> list[Source] | list[HubDataset]:
    """Every file to read, or every dataset: those named, and in named folders what can be read.

    Raises:
        DataError: an input does not exist or can't be reached, or no file is found.
        ConfigError: a kind of URL, or a part of a dataset, that there is not.
        MissingDependencyError: an input needs a package that is not installed.
    """
    if config.format == "hf":
        return hub.find_datasets(inputs, config)
    if found := find_sources(inputs, _FORMAT_OF_SUFFIX):
        return found
    raise DataError(
        f"no text file in {', '.join(inputs)}; wanted files that end in "
        f"{', '.join(_FORMAT_OF_SUFFIX)} (also {', '.join(COMPRESSIONS)}) or in nothing"
    )


def detect_format(source: Source, head: bytes) -> Format:
    """What a file holds, from its name and its first bytes.

    Raises:
        DataError: it is of a kind that is not served.
    """
    for suffix in (Path(source.path).suffix.lower(), source.suffix):
        if suffix in _REFUSED_SUFFIXES:
            raise DataError(f"{source.name}: {suffix} is not read; {_REFUSED_SUFFIXES[suffix]}")
    if head.startswith(tables.PARQUET_MAGIC):
        return "parquet"
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith((b"<mediawiki", b"<?xml", b"<!DOCTYPE")):
        return "wiki-dump"
    if head.startswith(b"<doc "):
        return "wikiextractor"
    if _JSON_OPENING.match(head):
        extracted = b"?curid=" in head.split(b"\n", 1)[0]  # in the address of every page
        return "wikiextractor" if extracted else "jsonl"
    if source.suffix == ".json":
        raise DataError(
            f"{source.name}: wanted an object a line, got a file that begins with "
            f"{head[:1].decode(errors='replace')!r}; put each document into a line of its own, "
            '{"text": "..."}, in a .jsonl'
        )
    return _FORMAT_OF_SUFFIX.get(source.suffix, "text")


def read_documents(
    source: Source | HubDataset,
    config: TextConfig,
    counts: Counts,
    on_read: OnRead | None = None,
) -> Iterator[Document]:
    """The documents of one input; `counts` learns what is left out.

    Raises:
        DataError: the input is damaged, or is not what the format says.
    """
    if isinstance(source, HubDataset):
        yield from map(_plain, hub.read_texts(source, config.text_field, on_read))
        return
    with opened(source, on_read) as file:
        head = file.peek(_SNIFFED_BYTES)[:_SNIFFED_BYTES]
        file_format = detect_format(source, head) if config.format == "auto" else config.format
        if file_format == "wiki-dump":
            for page in wiki.read_pages(file, where=source.name, counts=counts):
                yield Document(text=page.text, form="wikitext", namespaces=page.namespaces)
        elif file_format == "jsonl":
            for record in _read_records(file, source.name, config.text_field):
                yield _plain(record[config.text_field])
        elif file_format == "wikiextractor":
            yield from _read_extracted(file, source.name, is_json=head.lstrip()[:1] == b"{")
        elif file_format == "text":
            yield from _read_text(file, source, config)
    if file_format == "parquet":
        yield from map(_plain, tables.read_texts(source, config.text_field, on_read))


def _plain(text: str | None) -> Document:
    """A table's cell; a null is as good as empty text."""
    return Document(text=text or "", form="plain")


def _read_text(file: io.BufferedReader, source: Source, config: TextConfig) -> Iterator[Document]:
    if source.suffix == ".md":
        yield Document(text=_joined(_blocks(file, source.name), source.name), form="markdown")
    elif config.document_break == "file":
        yield Document(text=_joined(_blocks(file, source.name), source.name), form="plain")
    else:
        lines = _lines(file, source.name)
        for line in lines:
            if line.strip():
                yield _plain(_joined(_up_to_blank(line, lines), source.name))


def _up_to_blank(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from itertools.takewhile(str.strip, rest)


def _joined(pieces: Iterable[str], where: str) -> str:
    """The pieces of one document as one text."""
    kept, num_characters = [], 0
    for piece in pieces:
        kept.append(piece)
        num_characters += len(piece)
        if num_characters > _MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{where} holds a document of more than {_MAX_DOCUMENT_BYTES >> 20} MiB; if blank "
                "lines end its documents, say so with --document_break blank_line, else split it"
            )
    return "".join(kept)


def _read_records(file: io.BufferedReader, where: str, text_field: str) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, each with text, or with null, in the field."""
    for number, line in enumerate(_lines(file, where), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(
                f"{where}, line {number}: not JSON: {reason}; wanted an object a line; plain text "
                "is read with --format text"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get(text_field, 0), str | None):
            if not isinstance(record, dict):
                got = type(record).__name__
            elif text_field in record:
                got = f"{type(record[text_field]).__name__} there"
            else:
                got = ", ".join(record)
            raise DataError(
                f"{where}, line {number}: wanted text in the field {text_field!r}, got {got}; "
                "name the field with --text_field"
            )
        yield record


def _read_extracted(file: io.BufferedReader, where: str, *, is_json: bool) -> Iterator[Document]:
    """WikiExtractor's two forms: `<doc ...>` blocks that start with the title, and JSON lines."""
    if is_json:
        for record in _read_records(file, where, "text"):
            text = (record["text"] or "").removeprefix(f"{record.get('title')}\n")
            yield Document(text=text, form="wikiextractor")
        return
    body: list[str] | None = None
    for number, line in enumerate(_lines(file, where), start=1):
        if line.startswith("<doc") and _DOC_OPENING.match(line):
            body = []
        elif line.startswith("</doc>") and body is not None:
            yield Document(text="".join(body[1:]), form="wikiextractor")
            body = None
        elif body is not None:
            body.append(line)
        elif line.strip():
            raise DataError(f"{where}, line {number}: wanted <doc ...>, got {line.strip()[:40]!r}")
    if body is not None:
        raise DataError(f"{where} ends inside a document: </doc> is missing; extract it again")


def _lines(file: io.BufferedReader, where: str) -> Iterator[str]:
    for block in _blocks(file, where):
        yield from io.StringIO(block, newline="\n")


def _blocks(file: io.BufferedReader, where: str) -> Iterator[str]:
    """Text in pieces of whole lines, which take a tenth of the time of single ones."""
    offset = 0
    while block := file.read(_BLOCK_BYTES):
        if not block.endswith(b"\n"):
            block += file.readline(_MAX_DOCUMENT_BYTES)
        if len(block) > _MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{where} has a line of more than {_MAX_DOCUMENT_BYTES >> 20} MiB after byte "
                f"{offset}, which is no text; leave it out"
            )
        text = decode(block, where=where, offset=offset)
        yield text if offset else text.removeprefix("\ufeff")
        offset += len(block)
