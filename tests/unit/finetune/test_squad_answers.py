import json
from pathlib import Path

import numpy as np
import pytest

from finetune import squad_answers
from finetune.squad import Features, Question, Questions, encode, load_questions
from finetune.squad_answers import best_answers, exact_match, f1, score
from tests.questions import FILE, TOKENIZER, example, write


def questions_of(*contexts: str) -> Questions:
    rows = tuple(
        Question(id=str(i), text="x", context=context, answers=("y",), place=None)
        for i, context in enumerate(contexts)
    )
    return Questions(source="here", version="", rows=rows)


def encode_small(questions: Questions, *, doc_stride: int = 4) -> Features:
    """Windows of 8 pieces, which here are letters, from the token 3 on."""
    return encode(
        questions, TOKENIZER, max_seq_length=12, doc_stride=doc_stride, max_query_length=1
    )


def logits(features: Features, *scores: dict[int, float]) -> np.ndarray:
    """Zeros but for some tokens of each window."""
    table = np.zeros((len(features), 12), np.float32)
    for row, at in zip(table, scores, strict=True):
        row[list(at)] = list(at.values())
    return table


def gold(features: Features, column: int, width: int) -> np.ndarray:
    table = np.zeros((len(features), width), np.float32)
    table[np.arange(len(features)), features.positions_N2[:, column]] = 9
    return table


@pytest.mark.parametrize(("max_seq_length", "doc_stride"), [(384, 128), (100, 40)])
def test_gold_logits_score_full_marks(tmp_path: Path, max_seq_length: int, doc_stride: int) -> None:
    questions = load_questions(FILE, write(tmp_path, example()), for_training=True)
    features = encode(questions, TOKENIZER, max_seq_length=max_seq_length, doc_stride=doc_stride)
    assert (len(features) > len(questions)) == (max_seq_length == 100)
    found = best_answers(
        questions, features, *(gold(features, column, max_seq_length) for column in (0, 1))
    )
    assert found == {row.id: row.answers[0] for row in questions.rows}
    assert score(questions, found) == {"exact_match": 1.0, "f1": 1.0}

    squad_answers.write_predictions(tmp_path / "predictions.json", found)
    assert json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8")) == found


def by_hand(
    questions: Questions, features: Features, start_NS: np.ndarray, end_NS: np.ndarray, most: int
) -> dict[str, str]:
    """Every span of every window."""
    best: dict[str, tuple[float, str]] = {}
    for window in range(len(features)):
        row = questions.rows[features.questions_N[window]]
        begin, stop = features.contexts_N2[window]
        for start in range(begin, stop):
            for end in range(start, min(start + most, stop)):
                value = float(start_NS[window, start] + end_NS[window, end])
                first, last = features.pieces_N[window] + np.array([start, end]) - begin
                text = row.context[features.offsets_K2[first, 0] : features.offsets_K2[last, 1]]
                if value > best.get(row.id, (-np.inf, ""))[0]:
                    best[row.id] = (value, text)
    return {name: text for name, (_, text) in best.items()}


@pytest.mark.parametrize("most", [1, 3, 30])
def test_answers_are_the_best_of_all_spans(most: int) -> None:
    questions = questions_of("abcd efgh ijk", "lm", "nopq rstuvwxyz 0123, 456789", "abcd efg")
    features = encode_small(questions)
    generator = np.random.default_rng(most)
    for _ in range(50):
        start_NS, end_NS = generator.normal(size=(2, len(features), 12)).astype(np.float32)
        found = best_answers(questions, features, start_NS, end_NS, max_answer_length=most)
        assert found == by_hand(questions, features, start_NS, end_NS, most)


def test_question_padding_and_order_are_no_answers() -> None:
    questions = questions_of("abcdef")
    features = encode_small(questions)
    # [CLS] x [SEP] a b c d e f [SEP]: what is high lies outside, or ends before it starts.
    start_NS = logits(features, {0: 99, 1: 99, 8: 5, 4: 3, 9: 99, 11: 99})
    end_NS = logits(features, {0: 99, 2: 99, 3: 5, 6: 2.5, 9: 99, 10: 99})
    assert best_answers(questions, features, start_NS, end_NS) == {"0": "bcd"}
    # 3 + 2.5; of one or two letters "f" is the best, 5 + 0.
    assert best_answers(questions, features, start_NS, end_NS, max_answer_length=2) == {"0": "f"}


def test_the_best_window_gives_the_answer() -> None:
    questions = questions_of("abcdefghijkl", "mn")
    features = encode_small(questions)
    assert features.pieces_N.tolist() == [0, 4, 12]
    start_NS = logits(features, {4: 2}, {5: 3}, {3: 1})
    end_NS = logits(features, {5: 2}, {6: 2}, {3: 1})
    assert best_answers(questions, features, start_NS, end_NS) == {"0": "gh", "1": "m"}


def test_only_the_best_starts_and_ends_are_tried() -> None:
    questions = questions_of("abcdef")
    features = encode_small(questions)
    start_NS = logits(features, {8: 3, 7: 2, 3: 1})
    end_NS = logits(features, {3: 3, 4: 2, 8: -5, 7: -5})
    answers = {
        num_best: best_answers(questions, features, start_NS, end_NS, num_best=num_best)["0"]
        for num_best in (1, 2, 3)
    }
    assert answers == {1: "", 2: "", 3: "a"}


def test_without_a_context_the_answer_is_empty() -> None:
    questions = questions_of(" ", "ab")
    features = encode_small(questions)
    zeros = np.zeros((2, 12), np.float32)
    assert best_answers(questions, features, zeros, zeros) == {"0": "", "1": "a"}


def test_logits_may_be_as_wide_as_their_batches() -> None:
    questions = questions_of("abc")
    features = encode_small(questions)
    start_NS, end_NS = (table[:, :7] for table in (logits(features, {4: 1}),) * 2)
    assert best_answers(questions, features, start_NS, end_NS) == {"0": "b"}


def test_an_answer_keeps_the_accents_of_its_last_letter() -> None:
    questions = questions_of("cafe\u0301 de\u0301ja\u0300")
    features = encode_small(questions)
    end_NS = logits(features, {6: 1})
    assert best_answers(questions, features, np.zeros_like(end_NS), end_NS) == {"0": "cafe\u0301"}


@pytest.mark.parametrize(
    ("answer", "right", "exact", "wanted_f1"),
    [
        ("Ada Thorn", "Ada Thorn", 1, 1),
        ("the Ada  thorn!", "Ada Thorn", 1, 1),
        ("An apple", "a apple", 1, 1),
        ("Thorn", "Ada Thorn", 0, 2 / 3),
        ("Ada Thorn of the Skerry", "Thorn of Skerry Rock", 0, 3 / 4),
        ("red granite", "pencil", 0, 0),
        ("so so so", "so so", 0, 4 / 5),  # a word counts as often as it is there
        ("9,310", "9310", 1, 1),
        ("forty-two", "forty two", 0, 0),  # a hyphen goes without leaving a blank
        ("theatre", "theater", 0, 0),
        ("another", "other", 0, 0),  # an article is a whole word
        ("the-atre", "theatre", 1, 1),  # punctuation goes first
        ("\u201cpencil\u201d", "pencil", 0, 0),  # these quotes are not string.punctuation
        ("a\u2014b", "\u2014b", 1, 1),  # "a" ends at the dash, which stays
        ("red\u00a0granite", "red granite", 1, 1),
        ("École", "école", 1, 1),
        ("", "pencil", 0, 0),
        ("", "", 1, 0),
        ("the", "", 1, 0),  # equal, but with no word in common
        ("a", "An.", 1, 0),
    ],
)
def test_scores_by_hand(answer: str, right: str, exact: int, wanted_f1: float) -> None:
    assert exact_match(answer, right) == exact
    assert exact_match(right, answer) == exact
    assert f1(answer, right) == pytest.approx(wanted_f1)
    assert f1(right, answer) == pytest.approx(wanted_f1)


def test_each_question_counts_once_with_the_answer_that_fits_best() -> None:
    rows = tuple(
        Question(id=name, text="x", context="", answers=answers, place=None)
        for name, answers in [
            ("1", ("Grey Skerry rock", "the Skerry")),
            ("2", ("one two three", "two four")),
            ("3", ("no",)),
            ("4", ("yes",)),
        ]
    )
    questions = Questions(source="here", version="", rows=rows)
    answers = {"1": "Skerry", "2": "one two", "3": "", "4": "Yes."}
    # 1, and 2 * 2 / 5 rather than 2 * 1 / 4, and 0, and 1.
    assert score(questions, answers) == {"exact_match": 0.5, "f1": pytest.approx(0.7)}
