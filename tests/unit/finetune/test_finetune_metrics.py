import dataclasses
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from finetune import metrics
from finetune.tasks import custom_task, find_task

RNG = np.random.default_rng(3)
CLASSES = RNG.integers(0, 2, 200)
GUESSES = np.where(RNG.random(200) < 0.7, CLASSES, 1 - CLASSES)
SCORES = RNG.uniform(0, 5, 200).astype(np.float32)
NEAR = (SCORES + RNG.normal(0, 1, 200)).astype(np.float32)


def test_classification_metrics_are_scikit_learns() -> None:
    assert metrics.score(find_task("qqp"), CLASSES, GUESSES) == {
        "accuracy": sklearn.metrics.accuracy_score(CLASSES, GUESSES),
        "f1": sklearn.metrics.f1_score(CLASSES, GUESSES),
    }
    assert metrics.score(find_task("cola"), CLASSES, GUESSES) == {
        "matthews": sklearn.metrics.matthews_corrcoef(CLASSES, GUESSES)
    }


def test_regression_metrics_are_scipys() -> None:
    found = metrics.score(find_task("stsb"), SCORES, NEAR)
    assert found["pearson"] == pytest.approx(np.corrcoef(SCORES, NEAR)[0, 1], abs=1e-6)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(SCORES, NEAR)[0], abs=1e-9)


def test_exact_values_by_hand() -> None:
    labels, given = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 0, 1])
    found = metrics.score(find_task("mrpc"), labels, given)
    assert found == {"accuracy": 0.6, "f1": pytest.approx(2 / 3)}
    matthews = metrics.score(find_task("cola"), labels, given)["matthews"]
    assert matthews == pytest.approx((2 * 1 - 1 * 1) / 6)


@pytest.mark.parametrize("name", ["cola", "stsb"])
def test_a_constant_answer_correlates_with_nothing(name: str) -> None:
    labels = CLASSES if name == "cola" else SCORES
    found = metrics.score(find_task(name), labels, np.ones_like(labels))
    assert set(found.values()) == {0.0}


def test_f1_without_a_positive_answer_is_zero() -> None:
    assert metrics.score(find_task("mrpc"), CLASSES, np.zeros_like(CLASSES))["f1"] == 0.0


def test_answers_are_the_greatest_logit_or_a_score_in_range() -> None:
    logits = np.array([[0.1, 0.2, -1.0], [3.0, 0.0, 0.0]], np.float32)
    assert metrics.answers(find_task("mnli"), logits).tolist() == [1, 0]
    scores = np.array([[-0.5], [2.5], [7.0]], np.float32)
    assert metrics.answers(find_task("stsb"), scores).tolist() == [0.0, 2.5, 5.0]
    assert metrics.rated(find_task("stsb"), scores).tolist() == [-0.5, 2.5, 7.0]
    assert metrics.rated(find_task("mnli"), logits).tolist() == [1, 0]
    own = custom_task(
        train_file=Path("a"),
        dev_file=Path("b"),
        test_file=None,
        text_columns=("t",),
        label_column="y",
        labels=(),
    )
    assert metrics.answers(own, scores).tolist() == [-0.5, 2.5, 7.0]


def test_majority_is_that_of_the_training_set() -> None:
    train, dev = np.array([0, 1, 1]), np.array([0, 0, 0, 1])
    assert metrics.majority_scores(find_task("sst2"), train, dev) == {"accuracy": 0.25}
    means = metrics.majority_scores(find_task("stsb"), SCORES, NEAR)
    assert means == {"pearson": 0.0, "spearman": 0.0}


def test_seeds_are_summarised_by_median_best_and_all() -> None:
    results = [
        {"seed": seed, "value": value, "metrics": {"accuracy": value}, "wall_s": 1.5}
        for seed, value in [(1, 0.5), (2, 0.9), (3, 0.6)]
    ]
    summary = metrics.summarize_seeds(results)
    assert (summary["seed"], summary["value"], summary["best"]) == (2, 0.9, 0.9)
    assert summary["median"] == 0.6
    assert summary["median_metrics"] == {"accuracy": 0.6}
    assert summary["all"] == [
        {"seed": 1, "value": 0.5, "metrics": {"accuracy": 0.5}},
        {"seed": 2, "value": 0.9, "metrics": {"accuracy": 0.9}},
        {"seed": 3, "value": 0.6, "metrics": {"accuracy": 0.6}},
    ]
    assert summary["wall_s"] == 4.5


def test_predictions_are_in_the_servers_form(tmp_path) -> None:
    path = tmp_path / "x.tsv"
    metrics.write_predictions(path, find_task("rte"), np.array([1, 0]))
    assert path.read_text() == "index\tprediction\n0\tnot_entailment\n1\tentailment\n"
    metrics.write_predictions(path, find_task("cola"), np.array([1]))
    assert path.read_text() == "index\tprediction\n0\t1\n"
    metrics.write_predictions(path, find_task("stsb"), np.array([2.34567], np.float32))
    assert path.read_text() == "index\tprediction\n0\t2.346\n"


def test_labels_with_a_tab_or_a_line_break_are_one_cell(tmp_path) -> None:
    task = dataclasses.replace(find_task("rte"), labels=("a\tb", "c\nd"))
    metrics.write_predictions(tmp_path / "x.tsv", task, np.array([0, 1]))
    assert (tmp_path / "x.tsv").read_text() == "index\tprediction\n0\ta b\n1\tc d\n"
