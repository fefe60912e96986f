"""A document's text -> its paragraphs, whatever it is written in.

Every pattern here takes time in proportion to the text: some file holds what makes another hang.
"""

import bisect
import dataclasses
import functools
import html
import re
from collections.abc import Callable
from typing import Literal

from data_prep import wiki
from data_prep.tidy import tidy
from data_prep.wiki import Counts

# Text wrapped by hand is narrower than this; a longer line is a paragraph of its own.
_WRAPPED_LINE_CHARACTERS = 100
# A line's end between two letters of a script that has no blanks between words: Thai, Lao, Myanmar,
# Khmer, kana, Han; and marks of East Asian width, which have theirs in them.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"
    r"\u2e80-\u2fdf\u3001-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\uff01-\uff9f\U00020000-\U0003ffff"
)
_UNSPACED_BREAK = re.compile(rf"\n(?<=[{_UNSPACED}]\n)(?=[{_UNSPACED}])")
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n")
# WikiExtractor puts these where a formula or a piece of code was.
_PLACEHOLDER = re.compile(r"\b(?:formula|codice)_\d+")
# Tags that it leaves standing.
_LEFT_TAG = re.compile(
    r"<ref\b[^<>]*>[^<>]*</ref>|</?(?:br|ref|poem|div|span|small|center|blockquote|sub|sup)\b[^<>]*>"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """Raw text and what it is written in, so that any process can turn it into paragraphs.

    Attributes:
        namespaces: the dump's own names of what links may lead to without being prose (`Datei`).
    """

    text: str
    form: Literal["plain", "markdown", "wikitext", "wikiextractor"]
    namespaces: tuple[str, ...] = ()


def paragraphs(document: Document, counts: Counts) -> list[str]:
    """A document's paragraphs, markup gone; `counts` learns what had to be dropped."""
    if document.form == "wikitext":
        return wiki.paragraphs(document.text, namespaces=document.namespaces, counts=counts)
    if document.form == "wikiextractor":
        return _clean_extracted(document.text).splitlines()
    text = _strip_markdown(document.text) if document.form == "markdown" else document.text
    return [
        paragraph
        for block in _BLANK_LINES.split(text)
        for paragraph in _unwrapped(block.splitlines())
    ]


def _unwrapped(lines: list[str]) -> list[str]:
    """Lines that were wrapped by hand become one paragraph; long lines are one each."""
    if len(max(lines, key=len, default="")) > _WRAPPED_LINE_CHARACTERS:
        return lines
    return [_UNSPACED_BREAK.sub("", "\n".join(lines)).replace("\n", " ")]


def _clean_extracted(text: str) -> str:
    text = html.unescape(text)
    if "formula_" in text or "codice_" in text:
        text = _PLACEHOLDER.sub("", text)
    return tidy(_LEFT_TAG.sub("", text))


def _heading(found: re.Match[str]) -> str:
    return "\n\n" + found[1].rstrip(" \t#") + "\n"


def _closed(found: re.Match[str], opening: re.Pattern[str], *, keeps_label: bool = False) -> str:
    """A run from an opening on, without what its end closes: from the first opening in its window.

    Where there is no end none of the openings in the run is closed: each is looked at once.
    """
    run, end = found.groups()
    if end is not None:
        for opened in opening.finditer(run, max(0, len(run) - _WINDOW_CHARACTERS - 2)):
            if len(run) - opened.end() <= _WINDOW_CHARACTERS:
                return run[: opened.start()] + (run[opened.end() :] if keeps_label else "")
    return found[0]


# The patterns start with what is rare, which makes the search for it fast; a newline is put before
# the text, so that every line has one. Whatever opens has to close within a window.
_WINDOW_CHARACTERS = 4000
_TARGET = rf"(\]\([^)\n]{{0,{_WINDOW_CHARACTERS}}}\))?"
_IMAGE, _LINK, _TAG = re.compile(r"!\["), re.compile(r"\["), re.compile(r"<[/a-zA-Z!]")
_MARKDOWN: tuple[tuple[str, re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    # what the text must hold, the pattern, what stands in its place
    ("```", re.compile(r"\n```.*?\n```[^\n]*", re.DOTALL), "\n"),  # fenced code
    ("~~~", re.compile(r"\n~~~.*?\n~~~[^\n]*", re.DOTALL), "\n"),
    (
        "![",
        re.compile(rf"(!\[[^\]\n]*){_TARGET}"),
        functools.partial(_closed, opening=_IMAGE),
    ),
    (
        "](",
        re.compile(rf"(\[[^\]\n]*){_TARGET}"),
        functools.partial(_closed, opening=_LINK, keeps_label=True),
    ),
    (
        "<",
        re.compile(r"(<[/a-zA-Z!][^>\n]*)(>)?"),
        functools.partial(_closed, opening=_TAG),
    ),
    ("#", re.compile(r"\n[ \t]*#{1,6}[ \t]+([^\n]*)"), _heading),
    ("", re.compile(r"\n[ \t]*(?:>[ \t]?|[-*+][ \t]+|\d+[.)][ \t]+)"), "\n"),  # quotes, lists
    ("", re.compile(r"\n[ \t]*(?:[-*_=][ \t]*){3,}(?=\n|\Z)"), "\n"),  # rules
)
_ESCAPE = re.compile(r"\\([\\`*_{}\[\]()#+.!>-])")
# Marks of emphasis stand at the edges of words; of those that begin alike the longest comes first.
_EMPHASIS_OPENING = re.compile(r"[*_`](?<!\w.)(?=\S)")
_EMPHASIS_ENDS = {
    mark: re.compile(rf"{re.escape(mark[0])}(?<=\S.)(?={re.escape(mark[1:])}(?!\w))")
    for mark in ("***", "**", "*", "__", "_", "`")
}


def _strip_markdown(text: str) -> str:
    text = f"\n{text}"
    for mark, pattern, replacement in _MARKDOWN:
        if mark in text:
            text = pattern.sub(replacement, text)
    return html.unescape(_ESCAPE.sub(r"\1", _without_emphasis(text)))


def _without_emphasis(text: str) -> str:
    """Text without marks of emphasis that close in their line; what they hold is kept as it is."""
    ends = {
        mark: [found.start() for found in pattern.finditer(text)]
        for mark, pattern in _EMPHASIS_ENDS.items()
        if mark in text
    }
    pieces: list[str] = []
    done = place = 0
    while opening := _EMPHASIS_OPENING.search(text, place):
        place = opening.start() + 1
        for mark, places in ends.items():
            start = opening.start() + len(mark)
            if text.startswith(mark, opening.start()) and (end := _end(text, start, places)):
                pieces += (text[done : opening.start()], text[start:end])
                done = place = end + len(mark)
                break
    return "".join([*pieces, text[done:]])


def _end(text: str, start: int, places: list[int]) -> int:
    """The first place behind a start, in its line and its window, unless a blank follows it; or 0.

    Args:
        places: where the mark may end, ascending.
    """
    index = bisect.bisect_right(places, start)
    if index == len(places) or text[start].isspace():
        return 0
    end = places[index]
    is_near = end - start <= _WINDOW_CHARACTERS + 1 and "\n" not in text[start:end]
    return end if is_near else 0
