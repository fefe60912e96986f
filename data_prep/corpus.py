"""Dumps, extracted text, plain text and JSON lines -> documents.

A reader yields documents in the order of the file and counts what it leaves out.
"""

import bz2
import collections
import contextlib
import dataclasses
import gzip
import html
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from data_prep import wiki
from zerobert.errors import DataError

Format = Literal["auto", "wiki-dump", "wikiextractor", "text", "jsonl"]
FORMATS: tuple[Format, ...] = ("auto", "wiki-dump", "wikiextractor", "text", "jsonl")
Counts = collections.Counter[str]

_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
_FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".xml": "wiki-dump",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".md": "text",
}
_REFUSED_SUFFIXES = {
    ".zst": "unpack it with `zstd -d` first",
    ".zip": "unpack it first",
    ".tar": "unpack it with `tar -x` first",
    ".7z": "unpack it first",
    ".parquet": "write its text column as JSON lines first",
    ".arrow": "write its text column as JSON lines first",
}
_SNIFFED_BYTES = 4096
# Text wrapped by hand is narrower than this; a longer line is a paragraph of its own.
_WRAPPED_LINE_CHARACTERS = 100
# WikiExtractor puts these where a formula or a piece of code was.
_PLACEHOLDER = re.compile(r"\b(?:formula|codice)_\d+")
# Tags that it leaves standing.
_LEFT_TAG = re.compile(
    r"<ref\b[^<>]*>[^<>]*</ref>|</?(?:br|ref|poem|div|span|small|center|blockquote|sub|sup)\b[^<>]*>"
)
_DOC_OPENING = re.compile(r"<doc\b[^>]*>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """Raw text and what it is written in, so that any process can turn it into paragraphs.

    Attributes:
        namespaces: the dump's own names of what links may lead to without being prose (`Datei`).
    """

    text: str
    form: Literal["lines", "plain", "markdown", "wikitext"]
    namespaces: tuple[str, ...] = ()


def find_inputs(paths: Sequence[Path]) -> list[Path]:
    """Every file to read: those named, and in named folders those with a known suffix or none.

    Raises:
        DataError: a path does not exist, or no file is found.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        found.update(dict.fromkeys(_readable_files(path) if path.is_dir() else [path]))
    if not found:
        raise DataError(
            f"no text file in {', '.join(map(str, paths))}; wanted files that end in "
            f"{', '.join(_FORMAT_OF_SUFFIX)} (also .gz, .bz2, .xz) or in nothing"
        )
    return list(found)


def _readable_files(folder: Path) -> Iterator[Path]:
    for parent, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        for name in sorted(files):
            suffix = _format_suffix(Path(name))
            if not name.startswith(".") and (not suffix or suffix in _FORMAT_OF_SUFFIX):
                yield Path(parent, name)


def _format_suffix(path: Path) -> str:
    """The suffix in front of a compression's: `.xml` of `dump.xml.bz2`."""
    if path.suffix.lower() in _OPENERS:
        path = path.with_suffix("")
    return path.suffix.lower()


def detect_format(path: Path) -> Format:
    """What a file holds, from its name and its first bytes.

    Raises:
        DataError: it can't be read, or is of a kind that is not served.
    """
    for suffix in (path.suffix.lower(), _format_suffix(path)):
        if suffix in _REFUSED_SUFFIXES:
            raise DataError(f"{path}: {suffix} is not read; {_REFUSED_SUFFIXES[suffix]}")
    with _opened(path) as file:
        head = file.read(_SNIFFED_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith((b"<mediawiki", b"<?xml", b"<!DOCTYPE")):
        return "wiki-dump"
    if head.startswith(b"<doc "):
        return "wikiextractor"
    if head.startswith(b"{"):
        extracted = b"?curid=" in head.split(b"\n", 1)[0]  # in the address of every page
        return "wikiextractor" if extracted else "jsonl"
    return _FORMAT_OF_SUFFIX.get(_format_suffix(path), "text")


def read_documents(
    path: Path, *, file_format: Format, text_field: str, counts: Counts
) -> Iterator[Document]:
    """The documents of one file; `counts` learns what is left out.

    Raises:
        DataError: the file is damaged, or is not what the format says.
    """
    if file_format == "auto":
        file_format = detect_format(path)
    if file_format == "wiki-dump":
        with _opened(path) as file:
            for page in wiki.read_pages(file, where=str(path), counts=counts):
                yield Document(text=page.text, form="wikitext", namespaces=page.namespaces)
    elif file_format == "text":
        form: Literal["markdown", "plain"] = "plain"
        if _format_suffix(path) == ".md":
            form = "markdown"
        yield Document(text="".join(read_lines(path)), form=form)
    elif file_format == "jsonl":
        for record in _read_records(path, text_field):
            yield Document(text=record[text_field], form="plain")
    else:
        yield from _read_extracted(path)


def _read_records(path: Path, text_field: str) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, each with text in the field."""
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error.msg}") from error
        text = record.get(text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{path}, line {number}: wanted text in the field {text_field!r}, got {keys}; "
                "name the field with --text_field"
            )
        yield record


def _read_extracted(path: Path) -> Iterator[Document]:
    """WikiExtractor's two forms: `<doc ...>` blocks that start with the title, and JSON lines."""
    if _starts_with_brace(path):
        for record in _read_records(path, "text"):
            text = record["text"].removeprefix(f"{record.get('title')}\n")
            yield Document(text=_clean_extracted(text), form="lines")
        return
    body: list[str] | None = None
    for number, line in enumerate(read_lines(path), start=1):
        if _DOC_OPENING.match(line):
            body = []
        elif line.startswith("</doc>") and body is not None:
            yield Document(text=_clean_extracted("".join(body[1:])), form="lines")
            body = None
        elif body is not None:
            body.append(line)
        elif line.strip():
            raise DataError(f"{path}, line {number}: wanted <doc ...>, got {line.strip()[:40]!r}")
    if body is not None:
        raise DataError(f"{path} ends inside a document: </doc> is missing; extract it again")


def _starts_with_brace(path: Path) -> bool:
    return next((line for line in read_lines(path) if line.strip()), "").lstrip().startswith("{")


def _clean_extracted(text: str) -> str:
    return wiki.tidy(_LEFT_TAG.sub("", _PLACEHOLDER.sub("", html.unescape(text))))


def paragraphs(document: Document, counts: Counts) -> list[str]:
    """A document's paragraphs, markup gone; `counts` learns what had to be dropped."""
    if document.form == "wikitext":
        return wiki.paragraphs(document.text, namespaces=document.namespaces, counts=counts)
    if document.form == "lines":
        return document.text.splitlines()
    text = _strip_markdown(document.text) if document.form == "markdown" else document.text
    blocks = re.split(r"\n[^\S\n]*\n", text)
    return [paragraph for block in blocks for paragraph in _unwrapped(block.splitlines())]


def _unwrapped(lines: list[str]) -> list[str]:
    """Lines that were wrapped by hand become one paragraph; long lines are one each."""
    if all(len(line) <= _WRAPPED_LINE_CHARACTERS for line in lines):
        return [" ".join(lines)]
    return lines


_MARKDOWN = [
    (re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL), ""),  # fenced code
    (re.compile(r"!\[[^\]\n]*\]\([^)\n]*\)"), ""),  # images
    (re.compile(r"\[([^\]\n]*)\]\([^)\n]*\)"), r"\1"),  # links
    (re.compile(r"<[/a-zA-Z!][^>\n]*>"), ""),  # HTML
    (re.compile(r"^[ \t]*(?:#{1,6}[ \t]+(.*?)[ \t#]*)$", re.MULTILINE), r"\n\1\n"),  # headings
    (re.compile(r"^[ \t]*(?:>[ \t]?|[-*+][ \t]+|\d+[.)][ \t]+)", re.MULTILINE), ""),  # lists
    (re.compile(r"^[ \t]*(?:[-*_=][ \t]*){3,}$", re.MULTILINE), ""),  # rules
    (re.compile(r"(?<!\w)(\*\*\*|\*\*|\*|__|_|`)(?=\S)([^\n]*?\S)\1(?!\w)"), r"\2"),  # emphasis
    (re.compile(r"\\([\\`*_{}\[\]()#+.!>-])"), r"\1"),  # escapes
]


def _strip_markdown(text: str) -> str:
    for pattern, replacement in _MARKDOWN:
        text = pattern.sub(replacement, text)
    return html.unescape(text)


def text_files(folder: Path) -> list[Path]:
    """The `.txt` files of a text folder, searched downwards.

    Raises:
        DataError: there are none.
    """
    files = [path for path in _readable_files(folder) if path.suffix == ".txt"]
    if not files:
        raise DataError(
            f"{folder}: no .txt file; `python -m data_prep text --output_dir {folder}` makes them"
        )
    return files


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, compressed or not.

    Raises:
        DataError: the file can't be read, is damaged, or is not text; names the place.
    """
    offset = 0
    with _opened(path) as file:
        for line in file:
            text = decode(line, where=path, offset=offset)
            yield text if offset else text.removeprefix("\ufeff")
            offset += len(line)


def decode(raw: bytes, *, where: Path, offset: int) -> str:
    """Bytes of a text file as text.

    Args:
        offset: where in the file the bytes stand, for messages.

    Raises:
        DataError: they are not UTF-8, or hold the NUL that only binary files have.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text: {error.reason} at byte {offset + error.start}; "
            "convert it with iconv, or leave it out"
        ) from error
    if "\0" in text:
        raise DataError(f"{where} is not text: a NUL at byte {offset + raw.index(0)}; leave it out")
    return text


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, decompressed; whatever goes wrong while it is read names it."""
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} is cut short or damaged ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error
