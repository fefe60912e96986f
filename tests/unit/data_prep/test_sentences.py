import time

import pytest

from data_prep import sentences


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


def test_what_no_text_file_holds_is_replaced() -> None:
    assert sentences.split(["A \0 b\ud83d\ude00 c\udc00.\u2028New\x85line."], "en") == [
        "A \ufffd b\U0001f600 c\ufffd.",
        "New line.",
    ]


def test_marks_alone_are_no_sentence() -> None:
    assert sentences.split(["_ * _", "...", "½.", "٣.", "“—”"], "en") == ["½.", "٣."]


@pytest.mark.parametrize(
    "unit", ["长句。", "“a. B ", "word ", "a", "(a. ", "今天天气很好，我们去公园玩吧。"]
)
def test_a_paragraph_without_end_takes_linear_time(unit: str) -> None:
    text = unit * (300_000 // len(unit))
    started = time.process_time()
    pieces = sentences.split([text], "zh")
    assert time.process_time() - started < 10
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")


def test_a_long_paragraph_is_cut_where_a_sentence_ends() -> None:
    wanted = [f"Sentence number {number} of many." for number in range(2000)]
    assert sentences.split([" ".join(wanted)], "en") == wanted


@pytest.mark.parametrize(
    ("language", "sentence"),
    [
        ("hi", "यह वाक्य संख्या {} है।"),
        ("sa", "एतत् वाक्यम् {} अस्ति॥"),
        ("ur", "یہ جملہ نمبر {} ہے۔"),
        ("ar", "هل هذه الجملة رقم {}؟"),
        ("am", "ይህ ዓረፍተ ነገር ቁጥር {} ነው።"),
    ],
)
def test_a_long_paragraph_of_any_script_is_cut_there(language: str, sentence: str) -> None:
    wanted = [sentence.format(number) for number in range(2000)]
    assert sentences.split([" ".join(wanted)], language) == wanted
