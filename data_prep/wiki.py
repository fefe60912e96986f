"""MediaWiki dumps -> articles -> paragraphs.

The XML is streamed: memory is one page, whatever the dump's size. Markup is parsed by
mwparserfromhell, section by section, so that an unclosed tag costs a section and not an article.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import IO
from xml.etree import ElementTree

import mwparserfromhell
from mwparserfromhell import nodes

from data_prep.tidy import tidy
from zerobert.errors import DataError

_BLOCK_BYTES = 1 << 20
_ARTICLES = "0"
# Namespaces whose links show a picture or file the page away: media, files, categories.
_SILENT_NAMESPACES = frozenset({"-2", "6", "14"})
_SILENT_NAMES = ("media", "file", "image", "category")
# A dump lists one name of each namespace, and pages use others too: `Imagen:`, `Bild:`, `画像:`.
# What they lead to ends as files do.
_MEDIA_TITLE = re.compile(
    r"[^:]+:.+\.(?:jpe?g|png|gif|svg|tiff?|webp|xcf|bmp|pdf|djvu|og[agv]|opus|flac|wav|mp[34]|midi?"
    r"|webm|mpe?g|stl)\s*",
    re.IGNORECASE | re.DOTALL,
)
# Source: MediaWiki's $wgMaxArticleSize, 2 MiB of markup.
_MAX_PAGE_CHARACTERS = 2 << 20
# An unclosed tag makes the parser read on to the end of the section and come back. Openings times
# length bounds that: this much takes a few seconds, twenty times what the fullest articles need.
_MAX_PARSER_WORK = 100_000_000

_SILENT_TAGS = frozenset(
    {
        *("ref", "references", "gallery", "timeline", "imagemap", "table"),
        *("math", "chem", "ce", "hiero", "score", "graph", "mapframe", "maplink"),
        *("syntaxhighlight", "source", "code", "pre", "script", "style"),
        *("templatedata", "templatestyles"),
    }
)
# Templates that stand inside sentences: which of their arguments the reader sees.
_INLINE_TEMPLATES = {
    "convert": ("1", "2"),
    "cvt": ("1", "2"),
    "lang": ("2",),
    "nowrap": ("1",),
    "nobr": ("1",),
    "abbr": ("1",),
    "small": ("1",),
    "smaller": ("1",),
    "quote": ("1",),
    "blockquote": ("1",),
    "nihongo": ("1",),
}
_SILENT_SECTIONS = frozenset(
    {
        "references",
        "external links",
        "see also",
        "further reading",
        "notes",
        "footnotes",
        "bibliography",
        "sources",
        "citations",
        "notes and references",
    }
)
_HEADING = re.compile(r"^(=[^\n]*=)[ \t]*$", re.MULTILINE)
_MAX_HEADING_LEVEL = 6
_REFERENCE = re.compile(r"<ref\b[^<>]*(?:/>|>[^<]*</ref\s*>)", re.IGNORECASE)
_LINE_BREAK = re.compile(r"<(?:br|p)\b[^<>]*>|</p>", re.IGNORECASE)
_PARSER_OPENING = re.compile(r"<[a-zA-Z]|\{\||\{\{|\[[\[/a-zA-Z]")
# The parser calls itself for each equals sign of what may be a heading, until the stack is full.
_TANGLED_HEADING = re.compile(r"^=(?=(?:[^\n=]*=){100})", re.MULTILINE)
_INTERLANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z-]+)?:")
_LIST_MARKS = "*#:;"
_SENTENCE_ENDS = tuple(".!?…。！？।؟۔")
_CLOSING_MARKS = "\"'”’)]»」』）"
# What is left of a template, table or link that was opened in another section than it closed in.
_RESIDUE = re.compile(r"\{\{|\}\}|\{\||\|\}|\[\[|\]\]|<ref\b|</|\|\||^[|!]")

Counts = collections.Counter[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """An article's markup, and what this wiki calls its media and category namespaces."""

    text: str
    namespaces: tuple[str, ...]


def read_pages(file: IO[bytes], *, where: str, counts: Counts) -> Iterator[Page]:
    """The articles of a pages-articles dump; redirects, other namespaces, empty pages are counted.

    Raises:
        DataError: not a complete MediaWiki dump, or one that declares a DOCTYPE.
    """
    target = _DumpTarget(where, counts)
    parser = ElementTree.XMLParser(target=target)
    try:
        while block := file.read(_BLOCK_BYTES):
            parser.feed(block)
            yield from target.take_pages()
        parser.close()
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the latter: its encoding
        raise DataError(
            f"{where} is not a complete MediaWiki dump: {error}; fetch it again"
        ) from error
    yield from target.take_pages()


class _DumpTarget:
    """What the XML parser tells its events to: it keeps one page's fields and nothing else."""

    _FIELDS = frozenset({"ns", "text", "namespace"})

    def __init__(self, where: str, counts: Counts) -> None:
        self._where = where
        self._counts = counts
        self._pages: list[Page] = []
        self._namespaces: list[str] = list(_SILENT_NAMES)
        self._fields: dict[str, str] = {}
        self._pieces: list[str] | None = None
        self._num_characters = 0
        self._namespace_key = ""
        self._is_redirect = False
        self._is_too_large = False
        self._depth = 0

    def take_pages(self) -> list[Page]:
        pages, self._pages = self._pages, []
        return pages

    def doctype(self, name: str, public_id: str, system_id: str) -> None:
        """Refuse it: a dump has none, and it is where entities that explode are declared."""
        raise DataError(f"{self._where} declares a DOCTYPE, which no MediaWiki dump does; not read")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        name = _local_name(tag)
        if self._depth == 0 and name != "mediawiki":
            raise DataError(
                f"{self._where} is not a MediaWiki dump: wanted <mediawiki>, got <{name}>"
            )
        self._depth += 1
        if name == "page":
            self._fields, self._is_redirect, self._is_too_large = {}, False, False
        elif name == "redirect":
            self._is_redirect = True
        elif name in self._FIELDS:
            self._pieces, self._num_characters = [], 0
            self._namespace_key = attributes.get("key", "")

    def data(self, text: str) -> None:
        if self._pieces is not None:
            self._num_characters += len(text)
            if self._num_characters <= _MAX_PAGE_CHARACTERS:
                self._pieces.append(text)

    def end(self, tag: str) -> None:
        self._depth -= 1
        name = _local_name(tag)
        if name in self._FIELDS and self._pieces is not None:
            self._fields[name] = "".join(self._pieces)
            self._pieces = None
            if name == "text":  # the last one counts, where a page has several revisions
                self._is_too_large = self._num_characters > _MAX_PAGE_CHARACTERS
        if name == "namespace" and self._namespace_key in _SILENT_NAMESPACES:
            self._namespaces.append(self._fields["namespace"].casefold())
        if name == "page":
            self._keep_or_count()

    def _keep_or_count(self) -> None:
        text = self._fields.get("text", "").strip()
        if self._fields.get("ns", _ARTICLES) != _ARTICLES:
            self._counts["pages in other namespaces"] += 1
        elif self._is_redirect or text[:9].upper() == "#REDIRECT":
            self._counts["redirects"] += 1
        elif not text:
            self._counts["empty documents"] += 1
        elif self._is_too_large:
            self._counts["pages over 2 MiB"] += 1
        else:
            self._pages.append(Page(text=text, namespaces=tuple(self._namespaces)))

    def close(self) -> None:
        """Nothing is left to build; the parser asks for this method."""


def _local_name(tag: str) -> str:
    return tag.rpartition("}")[2]


def paragraphs(markup: str, *, namespaces: Iterable[str], counts: Counts) -> list[str]:
    """The prose of an article; `counts` learns of sections and lines that had to be dropped."""
    silent = frozenset(namespaces)
    found: list[str] = []
    for section in _sections(_without_comments(markup)):
        prepared = _LINE_BREAK.sub("\n", _REFERENCE.sub("", section))
        prepared = _TANGLED_HEADING.sub(" =", prepared)
        if len(_PARSER_OPENING.findall(prepared)) * len(prepared) > _MAX_PARSER_WORK:
            counts["sections too tangled to parse"] += 1
            continue
        tree = mwparserfromhell.parse(prepared, skip_style_tags=True)
        found += _prose_lines(tidy("".join(_visible(tree.nodes, silent))), counts)
    return found


def _without_comments(markup: str) -> str:
    """Markup without comments, in linear time; an unclosed one hides the rest, as in MediaWiki."""
    kept, rest = [], markup
    while True:
        before, opening, hidden = rest.partition("<!--")
        kept.append(before)
        if not opening:
            return "".join(kept)
        rest = hidden.partition("-->")[2]


def _sections(markup: str) -> Iterator[str]:
    """The text under each heading, without those that hold no prose."""
    title, start = "", 0
    for heading in _HEADING.finditer(markup):
        if not (level := _heading_level(heading[1])):
            continue
        if title not in _SILENT_SECTIONS:
            yield markup[start : heading.start()]
        title, start = heading[1][level:-level].strip(" \t").casefold(), heading.end()
    if title not in _SILENT_SECTIONS:
        yield markup[start:]


def _heading_level(line: str) -> int:
    """How many equals signs on both sides are marks; 0 where nothing stands between them."""
    before = len(line) - len(line.lstrip("="))
    after = len(line) - len(line.rstrip("="))
    return min(before, after, _MAX_HEADING_LEVEL, (len(line) - 1) // 2)


def _visible(tree: Iterable[nodes.Node], silent: frozenset[str]) -> Iterator[str]:
    """What a reader sees of some nodes; one walk, where removing nodes would search for each."""
    for node in tree:
        if isinstance(node, nodes.Text):
            yield node.value
        elif isinstance(node, nodes.HTMLEntity):
            yield node.normalize()
        elif isinstance(node, nodes.Wikilink):
            if not _is_silent_link(node, silent):
                label = node.title if node.text is None else node.text
                yield "".join(_visible(label.nodes, silent)).lstrip(":")
        elif isinstance(node, nodes.ExternalLink):
            if node.title is not None:
                yield from _visible(node.title.nodes, silent)
        elif isinstance(node, nodes.Template):
            yield from _visible_arguments(node, silent)
        elif isinstance(node, nodes.Tag):
            yield from _visible_tag(node, silent)


def _is_silent_link(link: nodes.Wikilink, silent: frozenset[str]) -> bool:
    title = str(link.title)
    prefix, colon, _ = title.partition(":")
    if not colon or not prefix:
        return False
    if prefix.strip().casefold() in silent or _INTERLANGUAGE.match(title):
        return True
    return bool(_MEDIA_TITLE.fullmatch(title)) or _has_parameters(link)


def _has_parameters(link: nodes.Wikilink) -> bool:
    """Whether more than one pipe stands in the link, as only in those of media."""
    label = () if link.text is None else link.text.nodes
    return any(isinstance(node, nodes.Text) and "|" in node.value for node in label)


def _visible_arguments(template: nodes.Template, silent: frozenset[str]) -> Iterator[str]:
    wanted = _INLINE_TEMPLATES.get(str(template.name).strip().casefold(), ())
    texts = [
        "".join(_visible(template.get(key).value.nodes, silent)).strip()
        for key in wanted
        if template.has(key)
    ]
    yield " ".join(texts)


def _visible_tag(tag: nodes.Tag, silent: frozenset[str]) -> Iterator[str]:
    list_mark: str | None = tag.wiki_markup
    if list_mark and list_mark in _LIST_MARKS:
        yield list_mark
    elif str(tag.tag).strip().casefold() not in _SILENT_TAGS and tag.contents is not None:
        yield from _visible(tag.contents.nodes, silent)


def _prose_lines(text: str, counts: Counts) -> Iterator[str]:
    """Lines that read as text: of list items the sentences, and nothing that is left of markup."""
    for raw in text.splitlines():
        marked = raw.strip()
        line = marked.lstrip(_LIST_MARKS + " ")
        is_item = line != marked
        if not line or (is_item and not line.rstrip(_CLOSING_MARKS).endswith(_SENTENCE_ENDS)):
            continue
        if _RESIDUE.search(line):
            counts["lines with leftover markup"] += 1
        else:
            yield line
