"""From logits to the answers of SQuAD's questions, their scores and their file.

Shapes: N windows, S sequence, C candidates, K pieces of all contexts.
"""

import collections
import re
import string
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.squad import Features, Questions
from zerobert.manifest import write_json

# Source of both: google-research/bert run_squad.py.
NUM_BEST = 20
MAX_ANSWER_LENGTH = 30

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

Logits = npt.NDArray[np.float32]


def best_answers(
    questions: Questions,
    features: Features,
    start_logits_NS: Logits,
    end_logits_NS: Logits,
    *,
    num_best: int = NUM_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> dict[str, str]:
    """The answer to each question by its id: the best span of all its windows, as the text has it.

    A span's score is the sum of its two logits. Where no window has a span to offer the answer is
    empty.

    Args:
        num_best: starts and ends of each window that are tried with one another, the best of those
            that lie in the context.
        max_answer_length: in tokens.
    """
    starts_N, ends_N, scores_N = _best_spans(
        features, start_logits_NS, end_logits_NS, num_best, max_answer_length
    )
    # By question, the best window first, the earlier one of equals.
    order_N = np.lexsort((-scores_N, features.questions_N))
    _, first = np.unique(features.questions_N[order_N], return_index=True)
    answers = {}
    for row, window in zip(questions.rows, order_N[first], strict=True):
        answers[row.id] = ""
        if np.isfinite(scores_N[window]):
            piece = features.pieces_N[window] - features.contexts_N2[window, 0]
            start = features.offsets_K2[piece + starts_N[window], 0]
            end = features.offsets_K2[piece + ends_N[window], 1]
            answers[row.id] = _cut(row.context, int(start), int(end))
    return answers


def _best_spans(
    features: Features,
    start_logits_NS: Logits,
    end_logits_NS: Logits,
    num_best: int,
    max_answer_length: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Logits]:
    """The first and the last token of each window's best span, and its score: -inf for no span."""
    places_S = np.arange(start_logits_NS.shape[1])
    first_N1, end_N1 = features.contexts_N2[:, :1], features.contexts_N2[:, 1:]
    is_context_NS = (first_N1 <= places_S) & (places_S < end_N1)
    starts_NC, start_scores_NC = _top(start_logits_NS, is_context_NS, num_best)
    ends_NC, end_scores_NC = _top(end_logits_NS, is_context_NS, num_best)
    lengths_NCC = ends_NC[:, None, :] - starts_NC[:, :, None] + 1
    scores_NCC = start_scores_NC[:, :, None] + end_scores_NC[:, None, :]
    scores_NCC[(lengths_NCC < 1) | (lengths_NCC > max_answer_length)] = -np.inf
    rows_N = np.arange(len(scores_NCC))
    best_N = scores_NCC.reshape(len(scores_NCC), -1).argmax(axis=1)
    start_N, end_N = np.unravel_index(best_N, scores_NCC.shape[1:])
    return (
        starts_NC[rows_N, start_N],
        ends_NC[rows_N, end_N],
        scores_NCC[rows_N, start_N, end_N],
    )


def _top(
    logits_NS: Logits, is_context_NS: npt.NDArray[np.bool_], num_best: int
) -> tuple[npt.NDArray[np.int64], Logits]:
    scores_NS = np.where(is_context_NS, logits_NS, np.float32(-np.inf))
    order_NC = np.argsort(-scores_NS, axis=1, kind="stable")[:, :num_best]
    return order_NC, np.take_along_axis(scores_NS, order_NC, axis=1)


def _cut(text: str, start: int, end: int) -> str:
    # The accents that an uncased vocabulary drops belong to the letter before them.
    while end < len(text) and unicodedata.category(text[end]) == "Mn":
        end += 1
    return text[start:end]


def score(questions: Questions, answers: Mapping[str, str]) -> dict[str, float]:
    """Exact match and F1: of each question against the gold answer that fits best, then the mean.

    Args:
        answers: of every question, by its id.

    Source: Rajpurkar et al. 2016, section 6.1; the official evaluate-v1.1.py, in percent there.
    """

    def mean(metric: Callable[[str, str], float]) -> float:
        best = [
            max(metric(answers[row.id], gold) for gold in row.answers) for row in questions.rows
        ]
        return sum(best) / len(best)

    return {"exact_match": mean(exact_match), "f1": mean(f1)}


def exact_match(answer: str, gold: str) -> float:
    """Whether both are the same but for case, ASCII punctuation, articles and blanks."""
    return float(_normalized(answer) == _normalized(gold))


def f1(answer: str, gold: str) -> float:
    """The harmonic mean of precision and recall of the words, each as often as it is there.

    Without a word in common it is 0, and so it is where neither has any: only later scripts, which
    know of questions without an answer, call that a match.
    """
    words, gold_words = _normalized(answer).split(), _normalized(gold).split()
    num_common = (collections.Counter(words) & collections.Counter(gold_words)).total()
    return 2 * num_common / (len(words) + len(gold_words)) if num_common else 0.0


def _normalized(text: str) -> str:
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def write_predictions(path: Path, answers: Mapping[str, str]) -> None:
    """Write the answers as the official evaluate-v1.1.py takes them: `{"id": "text"}`.

    Raises:
        DataError: the file can't be written.
    """
    write_json(path, dict(answers))
