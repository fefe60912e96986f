"""What removed markup leaves behind in a text: empty brackets, doubled blanks and commas."""

import re
from collections.abc import Iterable

_QUOTES = re.compile(r"'{2,}")
_SWITCH = re.compile(r"__[A-Z]+__")
# These come after runs of blanks became one, so that none of them takes more than linear time.
_EMPTY_BRACKETS = re.compile(r"[(\[（] ?(?:[;,:/–-] ?)*[)\]）]")
_OPENING_JUNK = re.compile(r"([(（]) ?(?:[;,:] ?)*")
_CLOSING_JUNK = re.compile(r"[;,:] ?[)）]")
_JUNK = " ;,:"
_DOUBLED_COMMAS = re.compile(r",(?: ?,)+")
_SPACE_BEFORE = re.compile(r" ([,.;:!?)])(?=\s|$)", re.MULTILINE)
_OPENINGS = tuple(bracket + junk for bracket in "(（" for junk in _JUNK)
_SPACED_MARKS = (" ,", " .", " ;", " :", " !", " ?", " )")
_OTHER_BLANKS = re.compile(r"[^\S\n ]")


def tidy(text: str) -> str:
    """Text without what removed markup leaves behind: empty brackets, doubled spaces."""
    text = _QUOTES.sub("", _SWITCH.sub("", text)) if _holds(text, ("''", "__")) else text
    text = _single_spaced(_OTHER_BLANKS.sub(" ", text))
    if _holds(text, _OPENINGS):
        text = _OPENING_JUNK.sub(r"\1", text)
    text = _without_closing_junk(text)
    text = _EMPTY_BRACKETS.sub("", text)
    if _holds(text, (",,", ", ,")):
        text = _DOUBLED_COMMAS.sub(",", text)
    text = _single_spaced(text)
    return _SPACE_BEFORE.sub(r"\1", text) if _holds(text, _SPACED_MARKS) else text


def _holds(text: str, marks: Iterable[str]) -> bool:
    """Whether any mark occurs: ten times faster than a pattern that finds nothing."""
    return any(mark in text for mark in marks)


def _without_closing_junk(text: str) -> str:
    pieces, end = [], 0
    for found in _CLOSING_JUNK.finditer(text):
        pieces.append(text[end : found.start()].rstrip(_JUNK))
        end = found.end() - 1
    return "".join([*pieces, text[end:]])


def _single_spaced(text: str) -> str:
    while "  " in text:
        text = text.replace("  ", " ")
    return text
