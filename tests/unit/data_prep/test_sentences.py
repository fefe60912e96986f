import pytest

from data_prep import sentences
from zerobert.errors import ConfigError


def test_a_paragraph_becomes_sentences_without_blanks() -> None:
    paragraphs = ["  Dr. Grey came at 5 p.m. today.  It rained!\tNobody\nminded. ", "", " ... "]
    assert sentences.split(paragraphs, "en") == [
        "Dr. Grey came at 5 p.m. today.",
        "It rained!",
        "Nobody minded.",
    ]


def test_other_languages_end_their_sentences_their_way() -> None:
    assert sentences.split(["今日は雨です。明日は晴れます。"], "ja") == [
        "今日は雨です。",
        "明日は晴れます。",
    ]


def test_no_sentence_is_without_end() -> None:
    quote = '"' + " ".join(f"Word {number} follows." for number in range(200)) + '"'
    pieces = sentences.split(
        [quote, "a" * 2500, "one " * 250, "长" * 600 + "。" + "句" * 600], "en"
    )
    assert all(len(piece) <= 1000 and len(piece.split()) <= 100 for piece in pieces)
    assert "Word 7 follows." in pieces
    assert "".join(pieces).replace(" ", "") == (
        quote + "a" * 2500 + "one" * 250 + "长" * 600 + "。" + "句" * 600
    ).replace(" ", "")


def test_a_lone_surrogate_does_not_stop_the_work() -> None:
    assert sentences.split(["It \ud800 broke."], "en") == ["It \ufffd broke."]


@pytest.mark.parametrize("language", ["", "EN", "english", "e"])
def test_a_language_is_a_code(language: str) -> None:
    with pytest.raises(ConfigError, match="--language: wanted an ISO 639 code"):
        sentences.check_language(language)


def test_known_codes_pass() -> None:
    for language in ("en", "de", "yue"):
        sentences.check_language(language)
