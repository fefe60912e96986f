"""Paragraphs -> sentences, by sentencex."""

import re
from collections.abc import Iterable, Iterator

import sentencex

from zerobert.errors import ConfigError

# sentencex keeps what stands inside matching quotes or brackets together, however long it is.
_MAX_WORDS = 100
_MAX_CHARACTERS = 1000
_INNER_END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])")
_LANGUAGE = re.compile(r"[a-z]{2,3}")


def check_language(language: str) -> None:
    """Refuse what is no language code; sentencex would take it for English in silence.

    Raises:
        ConfigError: not two or three lower-case letters.
    """
    if not _LANGUAGE.fullmatch(language):
        raise ConfigError(f"--language: wanted an ISO 639 code such as en or de, got {language!r}")


def split(paragraphs: Iterable[str], language: str) -> list[str]:
    """The sentences of a document, each on one line, without blanks at its ends.

    Args:
        language: ISO 639 code, which decides on abbreviations and the marks that end a sentence.
    """
    return [
        sentence
        for paragraph in paragraphs
        for whole in sentencex.segment(language, _one_line(paragraph))
        for sentence in _shortened(whole.strip())
        if any(character.isalnum() for character in sentence)
    ]


def _one_line(paragraph: str) -> str:
    # A lone surrogate (JSON's "\ud800") has no UTF-8 form; U+FFFD stands for it.
    clean = paragraph.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(clean.split())


def _shortened(sentence: str) -> Iterator[str]:
    """The sentence, or pieces of it if it is far too long to be one."""
    if not _is_too_long(sentence):
        yield sentence
        return
    for piece in _INNER_END.split(sentence):
        yield from _cut(piece) if _is_too_long(piece) else (piece,)


def _is_too_long(sentence: str) -> bool:
    return len(sentence) > _MAX_CHARACTERS or sentence.count(" ") >= _MAX_WORDS


def _cut(text: str) -> Iterator[str]:
    """Runs of at most `_MAX_WORDS` words; words without blanks between them by characters."""
    words = text.split(" ")
    for start in range(0, len(words), _MAX_WORDS):
        run = " ".join(words[start : start + _MAX_WORDS])
        for first in range(0, len(run), _MAX_CHARACTERS):
            yield run[first : first + _MAX_CHARACTERS].strip()
