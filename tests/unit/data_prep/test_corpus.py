import bz2
import collections
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import corpus
from data_prep.config import DocumentBreak, Format, TextConfig
from data_prep.prose import Document, paragraphs
from data_prep.sources import Source, local_source, opened
from zerobert.errors import DataError


def read_lines(path: Path) -> Iterator[str]:
    source = local_source(path)
    with opened(source) as file:
        yield from corpus._lines(file, source.name)


def read(
    path: Path,
    file_format: Format = "auto",
    text_field: str = "text",
    document_break: DocumentBreak = "file",
) -> list[Document]:
    config = TextConfig(format=file_format, text_field=text_field, document_break=document_break)
    return list(corpus.read_documents(local_source(path), config, collections.Counter()))


def prose(document: Document) -> list[str]:
    return [text for text in paragraphs(document, collections.Counter()) if text.strip()]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.xml", "", "wiki-dump"),
        ("dump.xml.bz2", "<mediawiki>", "wiki-dump"),
        ("dump", "\ufeff\n<mediawiki", "wiki-dump"),
        ("wiki_00", '<doc id="1" url="u" title="T">\n', "wikiextractor"),
        ("wiki_00", '{"id": "1", "url": "http://w?curid=1", "text": "x"}\n', "wikiextractor"),
        ("a.jsonl.zst", '{"text": "x"}\n', "jsonl"),
        ("a.txt", '{"text": "x"}\n', "jsonl"),
        ("a.json", '{\t"text": "x"}\n', "jsonl"),
        ("a.txt", "{Enter the king.}\n", "text"),
        ("a.md", "{{ title }}\n", "text"),
        ("a.jsonl", "{oops}\n", "jsonl"),
        ("book.md", "# A", "text"),
        ("book", "Once upon a time", "text"),
        ("table", "PAR1", "parquet"),
        ("a.PARQUET", "", "parquet"),
    ],
)
def test_a_format_is_known_by_name_and_first_bytes(name: str, content: str, wanted: str) -> None:
    source = Source(name=name, path=name, num_bytes=0, stamp="")
    assert corpus.detect_format(source, content.encode()) == wanted


@pytest.mark.parametrize(
    "name",
    [
        *("a.arrow", "a.zip", "a.tar.gz", "a.TAR.zst", "a.7z"),
        *("a.html", "a.HTM.gz", "a.csv", "a.tsv.bz2"),
    ],
)
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="is not read; "):
        corpus.detect_format(Source(name=name, path=name, num_bytes=0, stamp=""), b"x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "x"}]', r"an object a line, got a file that begins with '\['; .* in a \.jsonl"),
        ("", "got a file that begins with ''"),
        ("One.", "got a file that begins with 'O'"),
    ],
)
def test_json_that_is_not_lines_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read(path)
    assert read(path, "text") == [Document(text=content, form="plain")]


def test_no_file_to_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_text("x")
    with pytest.raises(DataError, match=r"no text file in .*; wanted files that end in \.xml, .*"):
        corpus.find_inputs([str(tmp_path)], TextConfig())


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_text_is_read_through_any_compression(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    raw = "\ufeffOne é.\n\nTwo.\n".encode()
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(raw))
    assert list(read_lines(path)) == ["One é.\n", "\n", "Two.\n"]
    assert read(path) == [Document(text="One é.\n\nTwo.\n", form="plain")]
    if suffix:
        path.write_bytes(pack(raw * 100)[:-10])
        with pytest.raises(DataError, match=r"a\.txt.* is cut short or damaged"):
            list(read_lines(path))


def test_what_is_not_text_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nb\xffd\n")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text: invalid start byte at byte 6"):
        list(read_lines(path))
    path.write_bytes(b"good\nb\0d\n")
    with pytest.raises(DataError, match=r"a\.txt is not text: a NUL at byte 6"):
        list(read_lines(path))
    path.write_bytes(b"line\n" * 500_000 + b"b\xffd\n")
    with pytest.raises(DataError, match="invalid start byte at byte 2500001"):
        list(read_lines(path))
    with pytest.raises(DataError, match="can't be read: Is a directory"):
        list(read_lines(tmp_path))


def test_json_lines_are_one_document_each(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "One.\\n\\nTwo."}\n\n{"body": ""}\n{"body": null}')
    first, second, third = read(path, text_field="body")
    assert prose(first) == ["One.", "Two."]
    assert second == third == Document(text="", form="plain")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "a.jsonl, line 2: not JSON: .*; plain text is read with --format text"),
        (
            '{"body": 3}',
            "a.jsonl, line 2: wanted text in the field 'text', got body; name the field",
        ),
        (
            '{"text": {"a": "b"}}',
            "a.jsonl, line 2: wanted text in the field 'text', got dict there;",
        ),
        ("[1]", "a.jsonl, line 2: wanted text in the field 'text', got list"),
        ("[" * 100_000, "a.jsonl, line 2: not JSON: maximum recursion depth"),
        (f'{{"text": {"9" * 5000}}}', "a.jsonl, line 2: not JSON: Exceeds the limit"),
    ],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        read(path)


def test_both_forms_of_wikiextractor(tmp_path: Path) -> None:
    blocks = tmp_path / "wiki_00"
    blocks.write_text(
        '<doc id="1" url="u" title="Tea">\nTea\n\n'
        'Tea () is &lt;hot&gt; formula_1 .\nMore<ref name="a"></ref>.<br>\n\n</doc>\n'
        '<doc id="2" url="u" title="Empty">\nEmpty\n\n</doc>\n'
    )
    records = tmp_path / "wiki_01"
    address = "https://en.wikipedia.org/wiki?curid=1"
    text = "Tea\n\nTea is &lt;hot&gt;.\nMore."
    records.write_text(json.dumps({"url": address, "text": text, "title": "Tea"}))
    full, empty = read(blocks)
    assert [text.strip() for text in prose(full)] == [
        "Tea is <hot>.",
        "More.",
    ]
    assert empty.text.strip() == ""
    (record,) = read(records)
    assert prose(record) == ["Tea is <hot>.", "More."]


def test_damaged_wikiextractor_output(tmp_path: Path) -> None:
    path = tmp_path / "wiki_00"
    path.write_text('<doc id="1">\nTea\n\nTea is hot.\n')
    with pytest.raises(DataError, match="ends inside a document: </doc> is missing"):
        read(path, "wikiextractor")
    path.write_text("Tea is hot.\n")
    with pytest.raises(DataError, match=r"line 1: wanted <doc \.\.\.>, got 'Tea is hot\.'"):
        read(path, "wikiextractor")


def test_what_ends_a_document_of_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("\n \nOne.\nIts end.\n\n\t\n\nTwo.\n \r\nThree.")
    (whole,) = read(path)
    assert prose(whole) == ["One. Its end.", "Two.", "Three."]
    assert [found.text for found in read(path, document_break="blank_line")] == [
        *("One.\nIts end.\n", "Two.\n", "Three."),
    ]
    book = tmp_path / "book.md"
    book.write_text("# One\n\nTwo.")
    (one,) = read(book, document_break="blank_line")
    assert one.form == "markdown"
    path.write_text("\n\n")
    assert read(path, document_break="blank_line") == []


def test_what_is_far_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_MAX_DOCUMENT_BYTES", 2 << 20)
    monkeypatch.setattr(corpus, "_BLOCK_BYTES", 1 << 20)
    path = tmp_path / "a.txt"
    path.write_text("line\n\n" * 400_000)
    with pytest.raises(DataError, match=r"a\.txt holds a document of more than 2 MiB; if blank"):
        read(path)
    assert len(read(path, document_break="blank_line")) == 400_000
    path.write_text("short\n" * 10 + "word " * 500_000)
    with pytest.raises(DataError, match=r"a\.txt has a line of more than 2 MiB after byte 0"):
        read(path)


def test_parquet_is_a_document_a_row(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3], "body": ["One.\n\nTwo.", None, "Three."]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    found = read(tmp_path / "a.parquet", text_field="body")
    assert [document.text for document in found] == ["One.\n\nTwo.", "", "Three."]
    (tmp_path / "b.parquet").write_text("One.")
    with pytest.raises(DataError, match=r"b\.parquet is no whole Parquet file"):
        read(tmp_path / "b.parquet")
