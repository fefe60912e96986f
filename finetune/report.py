"""A fine-tuned model's page: its scores, what it confuses, and where it is wrong by most.

All figures are functions of a dev set's labels and the model's logits. Shapes: N examples,
C classes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune import metrics
from finetune.data import Examples, Labels
from finetune.tasks import Task
from zerobert.manifest import write_text
from zerobert.page import Table, render_page

REPORT_NAME = "report.html"
_NUM_WORST = 20
_MAX_CLASSES = 60  # of more, a square of all and a column for each were no table to read
_MAX_TEXT = 1000  # characters; more than a model reads, and a page of some documents stays small


@dataclass(frozen=True, kw_only=True)
class DevSet:
    """One dev set and what the model makes of it.

    Args:
        suffix: what its metrics' names end in.
    """

    examples: Examples
    logits_NC: npt.NDArray[np.float32]
    suffix: str = ""

    @property
    def name(self) -> str:
        """The file's name, or the hub's of the split."""
        return Path(self.examples.source).name

    @property
    def labels(self) -> Labels:
        """What is right."""
        assert self.examples.labels is not None
        return self.examples.labels


def write_report(
    path: Path,
    task: Task,
    dev: Sequence[DevSet],
    *,
    train_labels: Labels | None,
    title: str,
    settings: Mapping[str, Any],
) -> None:
    """Write the page.

    Args:
        train_labels: for the scores of the commonest class; None leaves them out.
        settings: what the model was made from and how, nested as it likes.

    Raises:
        DataError: the file can't be written.
    """
    by_set = [table for each in dev for table in dev_tables(task, each)]
    sections = [
        scores_table(task, dev, train_labels),
        losses_table(task, dev),
        *by_set,
        settings_table(settings),
    ]
    write_text(path, render_page(title, sections))


def scores_table(task: Task, dev: Sequence[DevSet], train_labels: Labels | None) -> Table:
    """Every metric of every dev set, beside a constant answer and PaddleNLP."""
    rows = []
    for each in dev:
        ours = metrics.score(task, each.labels, metrics.rated(task, each.logits_NC))
        constant: Mapping[str, float] = {}
        if train_labels is not None:
            constant = metrics.majority_scores(task, train_labels, each.labels)
        for name, value in ours.items():
            published = task.published_scores.get(name + each.suffix)
            rows.append(
                (
                    name + each.suffix,
                    f"{100 * value:.2f}",
                    f"{100 * constant[name]:.2f}" if constant else "-",
                    "-" if published is None else f"{published:.2f}",
                )
            )
    alone = "mean score" if task.is_regression else "majority class"
    return Table(
        title="Scores, in percent", header=("metric", "this model", alone, "PaddleNLP"), rows=rows
    )


def losses(task: Task, dev: DevSet) -> npt.NDArray[np.float64]:
    """Each example's loss, N: the cross-entropy in nats, or the squared error."""
    if task.is_regression:
        return (dev.logits_NC[:, 0].astype(np.float64) - dev.labels) ** 2
    gold_N1 = dev.labels.astype(np.int64)[:, None]
    return -np.take_along_axis(metrics.log_probabilities(dev.logits_NC), gold_N1, axis=1)[:, 0]


def errors(task: Task, dev: DevSet) -> npt.NDArray[np.float64]:
    """Answer less gold of a regression task, N."""
    return metrics.answers(task, dev.logits_NC).astype(np.float64) - dev.labels


def losses_table(task: Task, dev: Sequence[DevSet]) -> Table:
    """The mean losses, and whether the model is as sure as it is right.

    A model whose mean confidence (the greatest probability) is above its accuracy is too sure.
    """
    header, rows = ["dev set", "rows", "loss"], []
    header += ["mean error"] if task.is_regression else ["mean confidence", "accuracy"]
    for each in dev:
        row = [each.name, f"{len(each.labels):,}", f"{losses(task, each).mean():.4f}"]
        if task.is_regression:
            row += [f"{np.abs(errors(task, each)).mean():.4f}"]
        else:
            confidence, accuracy = calibration(task, each)
            row += [f"{confidence:.2%}", f"{accuracy:.2%}"]
        rows.append(row)
    return Table(
        title="Loss" if task.is_regression else "Loss and calibration", header=header, rows=rows
    )


def calibration(task: Task, dev: DevSet) -> tuple[float, float]:
    """The mean of the greatest probabilities, and the share of right answers."""
    confidence = metrics.probabilities(dev.logits_NC).max(axis=1).mean()
    accuracy = (metrics.answers(task, dev.logits_NC) == dev.labels).mean()
    return float(confidence), float(accuracy)


def dev_tables(task: Task, dev: DevSet) -> list[Table]:
    """What a dev set says of the model in detail."""
    if task.is_regression:
        return [errors_table(task, dev)]
    return [confusion_table(task, dev), mistakes_table(task, dev)]


def confusion(task: Task, dev: DevSet) -> npt.NDArray[np.int64]:
    """How often each class (row) got each answer (column), CC."""
    counts_CC = np.zeros((task.num_outputs, task.num_outputs), np.int64)
    given_N = metrics.answers(task, dev.logits_NC)
    np.add.at(counts_CC, (dev.labels.astype(np.int64), given_N.astype(np.int64)), 1)
    return counts_CC


def confusion_table(task: Task, dev: DevSet) -> Table:
    """`confusion` with the classes' names; of very many classes, the commonest confusions."""
    title = f"Answers on {dev.name}"
    if task.num_outputs > _MAX_CLASSES:
        return _confusion_list(task, dev, title)
    counts_CC = confusion(task, dev)
    return Table(
        title=title,
        header=("gold \\ answered", *task.label_names),
        rows=[
            (name, *(f"{count:,}" for count in counts_C))
            for name, counts_C in zip(task.label_names, counts_CC, strict=True)
        ],
    )


def _confusion_list(task: Task, dev: DevSet, title: str) -> Table:
    pairs_N2 = np.stack([dev.labels, metrics.answers(task, dev.logits_NC)], axis=1)
    wrong_N2 = pairs_N2[pairs_N2[:, 0] != pairs_N2[:, 1]].astype(np.int64)
    pairs_P2, counts_P = np.unique(wrong_N2, axis=0, return_counts=True)
    commonest = np.argsort(-counts_P, kind="stable")[:_MAX_CLASSES]
    rows = [
        (*(task.label_names[index] for index in pairs_P2[i]), f"{counts_P[i]:,}") for i in commonest
    ]
    header = ("gold", "answered", "times")
    return Table(title=f"{title}: the commonest confusions", header=header, rows=rows)


def mistakes_table(task: Task, dev: DevSet) -> Table:
    """The wrong answers of the greatest loss; rows are counted from 1.

    Of very many classes, only those that were gold or answered have their probability.
    """
    names = task.label_names
    is_wide = len(names) > _MAX_CLASSES
    gold_N = dev.labels.astype(np.int64)
    given_N = metrics.answers(task, dev.logits_NC).astype(np.int64)
    loss_N = losses(task, dev)
    wrong = np.flatnonzero(given_N != gold_N)
    worst = wrong[np.argsort(-loss_N[wrong], kind="stable")][:_NUM_WORST]
    rows = []
    for i in worst:
        gold, given = gold_N[i], given_N[i]
        [chances_C] = metrics.probabilities(dev.logits_NC[i : i + 1])
        shown = chances_C[[gold, given]] if is_wide else chances_C
        figures = [f"{chance:.4f}" for chance in shown]
        rows.append((f"{i + 1:,}", *_texts(dev.examples, i), names[gold], names[given], *figures))
    columns = ("p(gold)", "p(answered)") if is_wide else names
    header = ("row", *task.text_columns, "gold", "answered", *columns)
    return Table(title=_title("mistakes", len(worst), len(wrong), dev), header=header, rows=rows)


def errors_table(task: Task, dev: DevSet) -> Table:
    """The answers that are farthest from what is right; rows are counted from 1."""
    given_N = metrics.answers(task, dev.logits_NC)
    error_N = errors(task, dev)
    worst = np.argsort(-np.abs(error_N), kind="stable")[:_NUM_WORST]
    rows = [
        (
            f"{i + 1:,}",
            *_texts(dev.examples, i),
            f"{dev.labels[i]:.3f}",
            f"{given_N[i]:.3f}",
            f"{error_N[i]:+.3f}",
        )
        for i in worst
    ]
    header = ("row", *task.text_columns, "gold", "answered", "error")
    return Table(title=_title("errors", len(worst), len(error_N), dev), header=header, rows=rows)


def _title(kind: str, num_shown: int, num_all: int, dev: DevSet) -> str:
    share = f"{num_shown} of {num_all:,}" if num_all else "none"
    return f"Worst {kind} on {dev.name}: {share}"


def _texts(examples: Examples, i: int) -> list[str]:
    sides = [examples.first, *([examples.second] if examples.second is not None else [])]
    texts = [side[i] for side in sides]
    return [text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} ..." for text in texts]


def settings_table(settings: Mapping[str, Any]) -> Table:
    """What the model was made from and how."""
    return Table(
        title="Settings",
        header=("setting", "value"),
        rows=list(_flatten(settings, "")),
        is_long=True,
    )


def _flatten(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{key}", text
