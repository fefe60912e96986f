import bz2
import collections
import gzip
import json
import lzma
from pathlib import Path

import pytest

from data_prep import corpus
from data_prep.corpus import Document, Format
from zerobert.errors import DataError


def read(path: Path, file_format: Format = "auto", text_field: str = "text") -> list[Document]:
    counts: corpus.Counts = collections.Counter()
    return list(
        corpus.read_documents(path, file_format=file_format, text_field=text_field, counts=counts)
    )


def paragraphs(document: Document) -> list[str]:
    return corpus.paragraphs(document, collections.Counter())


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.xml", "", "wiki-dump"),
        ("dump.xml.bz2", "<mediawiki>", "wiki-dump"),
        ("dump", "\ufeff\n<mediawiki", "wiki-dump"),
        ("wiki_00", '<doc id="1" url="u" title="T">\n', "wikiextractor"),
        ("wiki_00", '{"id": "1", "url": "http://w?curid=1", "text": "x"}\n', "wikiextractor"),
        ("a.jsonl", '{"text": "x"}\n', "jsonl"),
        ("a.txt", '{"text": "x"}\n', "jsonl"),
        ("book.md", "# A", "text"),
        ("book", "Once upon a time", "text"),
    ],
)
def test_a_format_is_known_by_name_and_first_bytes(
    tmp_path: Path, name: str, content: str, wanted: str
) -> None:
    path = tmp_path / name
    path.write_bytes(bz2.compress(content.encode()) if path.suffix == ".bz2" else content.encode())
    assert corpus.detect_format(path) == wanted


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst", "a.tar.gz"])
def test_what_is_not_served_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"x")
    with pytest.raises(DataError, match="is not read; "):
        corpus.detect_format(path)


def test_folders_are_searched_for_what_can_be_read(tmp_path: Path) -> None:
    for name in (
        "b/wiki_01",
        "b/wiki_00",
        "a.txt.gz",
        "picture.png",
        ".hidden",
        ".git/x.txt",
        "c.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = corpus.find_inputs([tmp_path, tmp_path / "picture.png", tmp_path / "c.md"])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "a.txt.gz",
        "c.md",
        "b/wiki_00",
        "b/wiki_01",
        "picture.png",
    ]
    with pytest.raises(DataError, match="none: no such file or folder"):
        corpus.find_inputs([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no text file in .*empty"):
        corpus.find_inputs([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_text_is_read_through_any_compression(tmp_path: Path, suffix: str, pack: object) -> None:
    assert callable(pack)
    raw = "\ufeffOne é.\n\nTwo.\n".encode()
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(pack(raw))
    assert list(corpus.read_lines(path)) == ["One é.\n", "\n", "Two.\n"]
    assert read(path) == [Document(text="One é.\n\nTwo.\n", form="plain")]
    if suffix:
        path.write_bytes(pack(raw * 100)[:-10])
        with pytest.raises(DataError, match=r"a\.txt.* is cut short or damaged"):
            list(corpus.read_lines(path))
        path.write_bytes(b"hello")
        with pytest.raises(DataError, match=rf"a\.txt\{suffix} "):
            list(corpus.read_lines(path))


def test_what_is_not_text_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nb\xffd\n")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text: invalid start byte at byte 6"):
        list(corpus.read_lines(path))
    path.write_bytes(b"good\nb\0d\n")
    with pytest.raises(DataError, match=r"a\.txt is not text: a NUL at byte 6"):
        list(corpus.read_lines(path))
    with pytest.raises(DataError, match="can't be read: Is a directory"):
        list(corpus.read_lines(tmp_path))


def test_plain_text_is_one_document_of_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    long_line = "This line is not wrapped by hand. " * 4
    path.write_text(f"A line that\ngoes on.\n \t\nAnother.\n\n{long_line}\nIts neighbour.\n")
    (document,) = read(path)
    assert (
        paragraphs(document)
        == ["A line that goes on.", "Another.", long_line, "Its neighbour.", ""][:4]
    )


def test_markdown_loses_its_marks(tmp_path: Path) -> None:
    path = tmp_path / "book.md"
    path.write_text(
        "# The *first* chapter #\nIt **was** a [dark](http://x.y) night, `so` _they_ say.\n\n"
        "![picture](a.png)\n\n> Quoted &amp; true.\n\n- an item\n- snake_case_name\n\n---\n\n"
        "```python\ncode = 1\n```\n\n<br>2 \\* 3\n"
    )
    (document,) = read(path)
    assert [text.strip() for text in paragraphs(document) if text.strip()] == [
        "The first chapter",
        "It was a dark night, so they say.",
        "Quoted & true.",
        "an item snake_case_name",
        "2 * 3",
    ]


def test_json_lines_are_one_document_each(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "One.\\n\\nTwo."}\n\n{"body": ""}\n')
    first, second = read(path, text_field="body")
    assert paragraphs(first) == ["One.", "Two."]
    assert second.text == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "a.jsonl, line 2: not JSON: "),
        (
            '{"body": 3}',
            "a.jsonl, line 2: wanted text in the field 'text', got body; name the field",
        ),
        ("[1]", "a.jsonl, line 2: wanted text in the field 'text', got list"),
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
    assert [text.strip() for text in paragraphs(full) if text.strip()] == [
        "Tea is <hot>.",
        "More.",
    ]
    assert empty.text.strip() == ""
    (record,) = read(records)
    assert paragraphs(record) == ["", "Tea is <hot>.", "More."]


def test_damaged_wikiextractor_output(tmp_path: Path) -> None:
    path = tmp_path / "wiki_00"
    path.write_text('<doc id="1">\nTea\n\nTea is hot.\n')
    with pytest.raises(DataError, match="ends inside a document: </doc> is missing"):
        read(path, "wikiextractor")
    path.write_text("Tea is hot.\n")
    with pytest.raises(DataError, match=r"line 1: wanted <doc \.\.\.>, got 'Tea is hot\.'"):
        read(path, "wikiextractor")


def test_text_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.txt file; `python -m data_prep text"):
        corpus.text_files(tmp_path)
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in corpus.text_files(tmp_path)] == ["a.txt", "b.txt"]
