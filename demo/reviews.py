"""Rated sentences -> a task for fine-tuning: is the sentence kind to the film or not?"""

import random
from collections.abc import Sequence
from pathlib import Path

from zerobert.manifest import write_text

POSITIVE, NEGATIVE = "positive", "negative"
MIN_RATING = 0.5  # below it the raters did not agree on a side
DEV_SHARE = 0.15
SEED = 20


def label_reviews(reviews: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """Sentences with the sign of their rating; the neutral middle is left out.

    A sentence that is there twice, letter case aside, counts once: it must not be in both parts.
    """
    labelled: dict[str, tuple[str, str]] = {}
    for sentence, rating in reviews:
        if abs(rating) >= MIN_RATING:
            label = POSITIVE if rating > 0 else NEGATIVE
            labelled.setdefault(sentence.casefold(), (sentence, label))
    return list(labelled.values())


def split_reviews(
    labelled: Sequence[tuple[str, str]],
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training and held-out rows, drawn by `SEED`."""
    rows = list(labelled)
    random.Random(SEED).shuffle(rows)
    num_dev = round(len(rows) * DEV_SHARE)
    return rows[num_dev:], rows[:num_dev]


def majority_accuracy(
    train: Sequence[tuple[str, str]], dev: Sequence[tuple[str, str]]
) -> tuple[str, float]:
    """The commonest label of `train`, and the share of `dev` that has it."""
    labels = [label for _, label in train]
    commonest = max(sorted(set(labels)), key=labels.count)
    return commonest, sum(label == commonest for _, label in dev) / len(dev)


def write_tsv(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write rows under the header `sentence label`, separated by tabs, without quoting.

    Raises:
        DataError: the file can't be written.
    """
    lines = [f"{' '.join(sentence.split())}\t{label}\n" for sentence, label in rows]
    write_text(path, "sentence\tlabel\n" + "".join(lines))


def read_tsv(path: Path) -> list[tuple[str, str]]:
    """The rows that `write_tsv` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [(sentence, label) for sentence, label in (line.split("\t") for line in lines)]
