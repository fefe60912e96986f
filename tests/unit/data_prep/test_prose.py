import collections
import time

import pytest

from data_prep.prose import Document, _strip_markdown, paragraphs


def prose(document: Document) -> list[str]:
    found = paragraphs(document, collections.Counter())
    return [text.strip() for text in found if text.strip()]


def test_plain_text_is_paragraphs() -> None:
    long_line = "This line is not wrapped by hand. " * 4
    text = f"A line that\ngoes on.\n \t\nAnother.\n\n{long_line}\nIts neighbour.\n"
    assert prose(Document(text=text, form="plain")) == [
        *("A line that goes on.", "Another.", long_line.strip(), "Its neighbour."),
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "おばあさんがいま\nした。川へせんた\nくに、\n「行き」\nました。",
            "おばあさんがいました。川へせんたくに、「行き」ました。",
        ),
        ("今天天\n气很好\n𠀀", "今天天气很好𠀀"),
        ("สวัส\nดี ครับ\n\nສະບາຍ\nດີ", "สวัสดี ครับ\n\nສະບາຍດີ"),
        ("សួស្\nតី", "សួស្តី"),
        ("မင်္ဂ\nလာပါ", "မင်္ဂလာပါ"),
        ("나는\n학교에 간다", "나는 학교에 간다"),
        ("これは\nBERT\nです \nよ", "これは BERT です  よ"),
        ("Он\nидёт. यह\nठीक है", "Он идёт. यह ठीक है"),
    ],
)
def test_lines_are_joined_as_the_script_is_written(text: str, wanted: str) -> None:
    assert prose(Document(text=text, form="plain")) == wanted.split("\n\n")


def test_markdown_loses_its_marks() -> None:
    text = (
        "# The *first* chapter #\nIt **was** a [dark](http://x.y) night, `so` _they_ say.\n\n"
        "![picture](a.png)\n\n> Quoted &amp; true.\n\n- an item\n- snake_case_name\n\n---\n\n"
        "```python\ncode = 1\n```\n\n~~~\nmore code\n~~~ \n\n<br>2 \\* 3\n## Its end"
    )
    assert prose(Document(text=text, form="markdown")) == [
        "The first chapter",
        "It was a dark night, so they say.",
        "Quoted & true.",
        "an item snake_case_name",
        "2 * 3",
        "Its end",
    ]


def test_emphasis_needs_the_edges_of_words() -> None:
    text = "***All*** _of_ `it`, 2*3*4, a_b_c, * no *, __init__(x), **half\n\n**way** " + "x" * 5000
    assert prose(Document(text=text, form="markdown")) == [
        "All of it, 2*3*4, a_b_c, * no *, init(x), **half",
        "way " + "x" * 5000,
    ]


def test_extracted_text_is_a_paragraph_a_line() -> None:
    text = 'Tea () is &lt;hot&gt; formula_12 .\nMore<ref name="a"></ref>.<br>\n\ncodice_1'
    assert prose(Document(text=text, form="wikiextractor")) == ["Tea is <hot>.", "More."]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[a [b](c) d](e)", "a [b d](e)"),
        ("![a ![b](c) [![d](e)](f)", " "),
        ("[![a](b) c](d)", " c"),
        ("a <b <c> d> <e\nf> <!-- g -->", "a  d> <e\nf> "),
        ("[" + "a" * 4000 + "](b)", "a" * 4000),
        ("[" + "a" * 4001 + "](b)", None),
        ("[[" + "a" * 4000 + "](b)", "[" + "a" * 4000),
        ("<a" + "a" * 4001 + ">", None),
        ("<a<b" + "a" * 4000 + ">", "<a"),
        ("*" + "a" * 4001 + "*", "a" * 4001),
        ("*" + "a" * 4002 + "*", None),
        ("**a* b** *c **d* e**", "a* b c **d e**"),
        ("***a** b* _c\nd_ `e _f_`", "*a b* _c\nd_ e _f_"),
    ],
)
def test_what_opens_closes_in_its_line_and_window(text: str, wanted: str | None) -> None:
    assert _strip_markdown(text) == "\n" + (text if wanted is None else wanted)


@pytest.mark.parametrize(
    "unit",
    [
        *("*a ", "_a __b ", "_", "# ", "[a](", "![a](", "![", "[", "<a ", "- ", "```\n", "1. \\"),
        *("`a ", "***a b", "[a](b) ", "*a b* "),
    ],
)
def test_hostile_marks_take_bounded_time(unit: str) -> None:
    started = time.process_time()
    for end in ("", "\nx", "x"):
        prose(Document(text=unit * (24_000 // len(unit)) + end, form="markdown"))
    assert time.process_time() - started < 3
