"""Paragraphs -> sentences, by sentencex."""

import re
from collections.abc import Iterable, Iterator

import sentencex

# sentencex keeps what stands inside matching quotes or brackets together, however long it is.
_MAX_WORDS = 100
_MAX_CHARACTERS = 1000
# In scripts without blanks, and after an opened quote, it takes the square of the length.
_MAX_PARAGRAPH_CHARACTERS = 25_000
_INNER_END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])")
_LAST_END = re.compile(r".*(?:[.!?…।॥؟۔።][\"'”’)\]]* |[。！？](?![”’」』）]))", re.DOTALL)
_LETTER = re.compile(r"[^\W_]")


def split(paragraphs: Iterable[str], language: str) -> list[str]:
    """The sentences of a document, each on one line, without blanks at its ends.

    Args:
        language: ISO 639 code, which decides on abbreviations and the marks that end a sentence.
    """
    found: list[str] = []
    for paragraph in paragraphs:
        for piece in _manageable(_one_line(paragraph)):
            for whole in sentencex.segment(language, piece):
                sentence = whole.strip()
                if _is_too_long(sentence):
                    found += filter(_LETTER.search, _shortened(sentence))
                elif _LETTER.search(sentence):
                    found.append(sentence)
    return found


def _one_line(paragraph: str) -> str:
    # The one blank that counts as printable is the space: most paragraphs are right as they are.
    if paragraph.isprintable() and "  " not in paragraph:
        return paragraph.strip()
    return " ".join(_as_text(paragraph).split())


def _as_text(paragraph: str) -> str:
    """U+FFFD for what no text file can hold: a NUL, and half of a surrogate pair."""
    paired = paragraph.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return paired.replace("\0", "\ufffd")


def _manageable(paragraph: str) -> Iterable[str]:
    """The paragraph, or if it is far too long to be one, pieces that end where sentences may."""
    if len(paragraph) <= _MAX_PARAGRAPH_CHARACTERS:
        return (paragraph,)
    return _pieces(paragraph)


def _pieces(paragraph: str) -> Iterator[str]:
    start = 0
    while len(paragraph) - start > _MAX_PARAGRAPH_CHARACTERS:
        window = paragraph[start : start + _MAX_PARAGRAPH_CHARACTERS]
        found = _LAST_END.match(window)
        end = found.end() if found else window.rfind(" ") + 1 or len(window)
        yield window[:end]
        start += end
    yield paragraph[start:]


def _shortened(sentence: str) -> Iterator[str]:
    """Pieces of what is far too long to be a sentence."""
    for piece in _INNER_END.split(sentence):
        yield from _cut(piece) if _is_too_long(piece) else (piece,)


def _is_too_long(sentence: str) -> bool:
    if len(sentence) < 2 * _MAX_WORDS:
        return False
    return len(sentence) > _MAX_CHARACTERS or sentence.count(" ") >= _MAX_WORDS


def _cut(text: str) -> Iterator[str]:
    """Runs of at most `_MAX_WORDS` words; words without blanks between them by characters."""
    words = text.split(" ")
    for start in range(0, len(words), _MAX_WORDS):
        run = " ".join(words[start : start + _MAX_WORDS])
        for first in range(0, len(run), _MAX_CHARACTERS):
            yield run[first : first + _MAX_CHARACTERS].strip()
