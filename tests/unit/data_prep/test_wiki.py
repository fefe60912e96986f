import collections
import io
import time

import pytest

from data_prep import wiki
from zerobert.errors import DataError

SITE = '<siteinfo><namespaces><namespace key="6">Datei</namespace></namespaces></siteinfo>'


def page(text: str, *, ns: int = 0, extra: str = "") -> str:
    return (
        f"<page><title>T</title><ns>{ns}</ns>{extra}<revision><text>{text}</text></revision></page>"
    )


def read(xml: str) -> tuple[list[wiki.Page], wiki.Counts]:
    counts: wiki.Counts = collections.Counter()
    return list(wiki.read_pages(io.BytesIO(xml.encode()), where="x.xml", counts=counts)), counts


def prose(markup: str) -> list[str]:
    return wiki.paragraphs(markup, namespaces=("file", "category"), counts=collections.Counter())


def test_articles_are_read_and_the_rest_is_counted() -> None:
    pages, counts = read(
        f'<mediawiki xmlns="http://x">{SITE}{page("A &lt;b&gt;.")}{page("talk", ns=1)}'
        f"{page('x', extra='<redirect/>')}{page('#redirect [[A]]')}{page(' ')}{page('B.')}"
        "</mediawiki>"
    )
    assert [found.text for found in pages] == ["A <b>.", "B."]
    assert pages[0].namespaces == ("media", "file", "image", "category", "datei")
    assert counts == {"pages in other namespaces": 1, "redirects": 2, "empty documents": 1}


def test_a_page_of_more_than_two_mebibytes_is_counted() -> None:
    pages, counts = read(f"<mediawiki>{page('a ' * (1 << 20) + 'a')}{page('B.')}</mediawiki>")
    assert [found.text for found in pages] == ["B."]
    assert counts == {"pages over 2 MiB": 1}


def test_the_last_revision_of_a_page_counts() -> None:
    large, small = f"<revision><text>{'a ' * (1 << 20)}a</text></revision>", page("B.")
    first = small.replace("<revision>", f"{large}<revision>")
    last = small.replace("</revision>", f"</revision>{large}")
    pages, counts = read(f"<mediawiki>{first}{last}</mediawiki>")
    assert [found.text for found in pages] == ["B."]
    assert counts == {"pages over 2 MiB": 1}


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<mediawiki><page>", "x.xml is not a complete MediaWiki dump: no element found"),
        (f"<mediawiki>{page('A.')}", "x.xml is not a complete MediaWiki dump"),
        ("", "x.xml is not a complete MediaWiki dump"),
        ("plain text", "x.xml is not a complete MediaWiki dump: syntax error"),
        ("<html></html>", "x.xml is not a MediaWiki dump: wanted <mediawiki>, got <html>"),
        (
            '<!DOCTYPE m [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]><mediawiki>&b;</mediawiki>',
            "x.xml declares a DOCTYPE",
        ),
        ("<mediawiki>&undeclared;</mediawiki>", "undefined entity"),
        ('<?xml version="1.0" encoding="foo"?><mediawiki/>', "complete .*: unknown encoding: foo"),
        ('<?xml version="1.0" encoding="utf-7"?><mediawiki/>', "multi-byte encodings are not"),
    ],
)
def test_what_is_no_dump(xml: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(xml)


def test_markup_goes_and_prose_stays() -> None:
    markup = """{{Infobox|name={{nested}}|text=Hidden.}}
[[File:Tea.jpg|thumb|A [[cup]] of tea.]]
'''Tea''' ({{IPA|ti}}; {{lang|zh|茶}}) is a [[Drink|hot drink]]<ref name="a">Smith.</ref> of
[[water]]s&nbsp;and [http://x.y leaves]<ref name="b" />, about {{convert|90|C}} warm.<!-- no -->
{| class="wikitable"
! Head
|-
| Cell.
|}
* A list item that is a sentence.
* [[Just a link]]
:; "An indented one."

== History ==
It began<br>in [[:Category:China|China]] with <math>x^2</math> and H<sub>2</sub>O. __NOTOC__
[[Category:Drinks]] [[de:Tee]]
=== See also ===
* Not here. It is a list of links.
== Literature ==
The end."""
    assert prose(markup) == [
        "Tea (茶) is a hot drink of",
        "waters and leaves, about 90 C warm.",
        "A list item that is a sentence.",
        '"An indented one."',
        "It began",
        "in China with and H2O.",
        "The end.",
    ]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("== Notes ==", ["Before."]),
        ("=== See also ===\t", ["Before."]),
        ("=Notes=", ["Before."]),
        ("=== Notes ==", ["Before.", "After."]),  # its title is "= Notes"
        ("==", ["Before.", "==", "After."]),
        ("= 5 is a sum", ["Before.", "= 5 is a sum", "After."]),
    ],
)
def test_what_a_heading_is(line: str, wanted: list[str]) -> None:
    assert prose(f"Before.\n{line}\nAfter.") == wanted


@pytest.mark.parametrize(
    "link",
    [
        "[[Imagen:Foto.jpg|thumb|200px|Vista de [[Madrid]].]]",
        "[[画像:Tea cup.PNG|thumb]]",
        "[[Bild:a.svg]]",
        "[[Изображение:Чай|мини|Чай.]]",
    ],
)
def test_files_are_silent_under_any_name_of_their_namespace(link: str) -> None:
    assert prose(f"Before. {link}\nAfter.") == ["Before.", "After."]


@pytest.mark.parametrize(
    ("link", "wanted"),
    [
        ("[[:Imagen:Foto.jpg|a photo]]", "a photo"),
        ("[[Help:Files|the help]]", "the help"),
        ("[[Tea|a {{lang|zh|茶}} [[Cup|cup]]]]", "a 茶 cup"),
        ("[[Node.js|the server]]", "the server"),
        ("[[Tea|hot|drink]]", "hot|drink"),  # a slip of its author
    ],
)
def test_other_links_show_their_label(link: str, wanted: str) -> None:
    assert prose(f"See {link}.") == [f"See {wanted}."]


def test_an_unclosed_tag_costs_its_section_at_most() -> None:
    counts: wiki.Counts = collections.Counter()
    markup = "Before.\n== A ==\n<div>Inside {{broken\n{| \n|row\n== B ==\nAfter.\n<!-- open"
    found = wiki.paragraphs(markup, namespaces=(), counts=counts)
    assert (found[0], found[-1]) == ("Before.", "After.")
    assert counts["lines with leftover markup"] >= 1
    assert not any("{" in line or "|" in line for line in found)


@pytest.mark.parametrize(
    "markup",
    [
        *("<div>" * 30_000, "{|\n" * 30_000, "<!--" * 50_000, "<ref " * 50_000),
        *("[[a|{{b|" * 10_000, "[http://a " * 20_000, "= a" + " " * 200_000 + "x"),
        *("= " * 100_000 + "x", "=a" * 100_000 + "\n= b =c", "; " * 200_000, " " * 500_000),
    ],
    ids=[
        *("tags", "tables", "comments", "references", "nests", "links", "wide heading"),
        *("deep heading", "long heading", "semicolons", "blanks"),
    ],
)
def test_hostile_markup_takes_bounded_time(markup: str) -> None:
    started = time.process_time()
    assert prose(f"Good.\n= A =\n{markup}\n= B =\nFine.")[0] == "Good."
    assert time.process_time() - started < 10
