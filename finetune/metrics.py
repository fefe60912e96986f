"""Scores, what they are to be held against, and predictions in the GLUE server's form."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.stats
import sklearn.metrics

from finetune.data import Labels
from finetune.tables import one_line
from finetune.tasks import Task
from zerobert.manifest import write_text


def _accuracy(labels: Labels, given: Labels) -> float:
    return float(sklearn.metrics.accuracy_score(labels, given))


def _f1(labels: Labels, given: Labels) -> float:
    return float(sklearn.metrics.f1_score(labels, given, zero_division=0.0))


def _matthews(labels: Labels, given: Labels) -> float:
    return float(sklearn.metrics.matthews_corrcoef(labels, given))


# In float64: a narrow spread of float32 scores loses digits.
def _pearson(labels: Labels, given: Labels) -> float:
    return float(
        scipy.stats.pearsonr(labels.astype(np.float64), given.astype(np.float64)).statistic
    )


def _spearman(labels: Labels, given: Labels) -> float:
    return float(scipy.stats.spearmanr(labels, given).statistic)


_METRICS: dict[str, Callable[[Labels, Labels], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
_CORRELATIONS = ("matthews", "pearson", "spearman")


def rated(task: Task, logits_BC: npt.NDArray[np.float32]) -> Labels:
    """What the metrics rate: the class of the greatest logit, or the score as the model gives it,
    for where all are out of range they may still be in order.
    """
    if not task.is_regression:
        classes_B: npt.NDArray[np.int64] = logits_BC.argmax(axis=1)
        return classes_B
    return logits_BC[:, 0].astype(np.float32)


def answers(task: Task, logits_BC: npt.NDArray[np.float32]) -> Labels:
    """What people and files are told: the class, or the score cut to the task's range."""
    given = rated(task, logits_BC)
    return given if task.score_range is None else given.clip(*task.score_range)


def probabilities(logits_NC: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """What the model gives each class, NC; rows add up to 1."""
    return np.exp(log_probabilities(logits_NC))


def log_probabilities(logits_NC: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The natural logarithm of `probabilities`, finite where they would be rounded to 0."""
    shifted_NC = logits_NC.astype(np.float64) - logits_NC.max(axis=1, keepdims=True)
    logs_NC: npt.NDArray[np.float64] = shifted_NC - np.log(
        np.exp(shifted_NC).sum(axis=1, keepdims=True)
    )
    return logs_NC


def score(task: Task, labels: Labels, given: Labels) -> dict[str, float]:
    """The task's metrics, by name.

    A correlation is 0 where either side is constant: the quotient is undefined there, and a
    constant answer predicts nothing.
    """
    is_constant = np.ptp(labels) == 0 or np.ptp(given) == 0
    return {
        name: 0.0 if is_constant and name in _CORRELATIONS else _METRICS[name](labels, given)
        for name in task.metrics
    }


def majority_scores(task: Task, train_labels: Labels, labels: Labels) -> dict[str, float]:
    """The metrics of always giving the training set's commonest class (or mean score)."""
    if task.is_regression:
        constant: Labels = np.full_like(labels, train_labels.mean())
    else:
        constant = np.full_like(labels, np.bincount(train_labels.astype(np.int64)).argmax())
    return score(task, labels, constant)


def summarize_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best seed's result, with the median, best, spread and every value beside it.

    The value and the metrics are those of the model that is kept; compare runs by the median.
    """
    values = [result["value"] for result in results]
    best = max(results, key=lambda result: result["value"])
    return {
        **best,
        "median": statistics.median(values),
        "median_metrics": {
            name: statistics.median(result["metrics"][name] for result in results)
            for name in best["metrics"]
        },
        "best": max(values),
        "spread": max(values) - min(values),
        "all": [
            {name: result[name] for name in ("seed", "value", "metrics")} for result in results
        ],
        "wall_s": round(sum(result["wall_s"] for result in results), 3),
    }


def write_predictions(path: Path, task: Task, given: Labels) -> None:
    """Write `index<TAB>prediction` rows, spelling the labels as the task's files do.

    Raises:
        DataError: the file can't be written.
    """
    if task.is_regression:
        cells = [f"{value:.3f}" for value in given]
    else:
        cells = [one_line(task.labels[value]) for value in given.astype(np.int64)]
    rows = [f"{index}\t{cell}\n" for index, cell in enumerate(cells)]
    write_text(path, "".join(["index\tprediction\n", *rows]))
