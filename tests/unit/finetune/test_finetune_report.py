"""A fine-tuned model's page: its figures by hand, and as a browser shows them."""

import dataclasses
import html
import math
import re
from pathlib import Path

import numpy as np
import pytest

from finetune import batches, report
from finetune.data import Examples
from finetune.report import DevSet
from finetune.tasks import find_task
from tests.browser import Browser

SST2, STSB, MNLI = map(find_task, ("sst2", "stsb", "mnli"))
LOG3 = math.log(3)
EVIL = "</td><img src=x onerror=\"document.title='lost'\"> Tom & 'Jerry' \\"


def dev_set(
    logits: list[list[float]],
    labels: list[float],
    *,
    first: list[str] | None = None,
    second: list[str] | None = None,
    source: str = "data/dev.tsv",
) -> DevSet:
    """A dev set; its texts are numbered unless they are given."""
    is_regression = len(logits[0]) == 1
    return DevSet(
        examples=Examples(
            source=source,
            version="",
            first=first or [f"text {i}" for i in range(len(labels))],
            second=second,
            labels=np.array(labels, np.float32 if is_regression else np.int64),
        ),
        logits_NC=np.array(logits, np.float32),
    )


# Row 3 is wrong by most, rows 2 and 5 alike.
FILMS = dev_set(
    [[0, LOG3], [0, LOG3], [2 * LOG3, 0], [2 * LOG3, 0], [0, LOG3]],
    [1, 0, 1, 0, 0],
    first=["good", "dull", EVIL, "bad", "poor"],
)
PAIRS = dev_set([[6], [2], [1]], [4.5, 2, 3], first=["a", "b", "c"], second=["x", "y", "z"])


def test_each_class_is_counted_by_what_was_answered() -> None:
    table = report.confusion_table(SST2, FILMS)
    assert table.title == "Answers on dev.tsv"
    assert table.header == ("gold \\ answered", "negative", "positive")
    assert table.rows == [("negative", "1", "2"), ("positive", "1", "1")]


def test_a_class_that_is_neither_there_nor_answered_has_its_row_and_column() -> None:
    counts = report.confusion(MNLI, dev_set([[1, 0, 0]], [2]))
    assert counts.tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0]]


def test_mistakes_come_by_their_loss() -> None:
    table = report.mistakes_table(SST2, FILMS)
    assert table.title == "Worst mistakes on dev.tsv: 3 of 3"
    assert table.header == ("row", "sentence", "gold", "answered", "negative", "positive")
    assert table.rows == [
        ("3", EVIL, "positive", "negative", "0.9000", "0.1000"),
        ("2", "dull", "negative", "positive", "0.2500", "0.7500"),
        ("5", "poor", "negative", "positive", "0.2500", "0.7500"),
    ]


def test_only_the_twenty_worst_are_shown_and_no_right_answer() -> None:
    wrong = [[0.0, i / 10] for i in range(1, 26)]
    table = report.mistakes_table(SST2, dev_set([*wrong, [9, 0]], [0] * 26))
    assert table.title == "Worst mistakes on dev.tsv: 20 of 25"
    assert [row[0] for row in table.rows] == [str(row) for row in range(25, 5, -1)]
    none = report.mistakes_table(SST2, dev_set([[9, 0]], [0]))
    assert (none.title, none.rows) == ("Worst mistakes on dev.tsv: none", [])


def test_a_loss_beyond_what_a_probability_can_say_keeps_its_rank() -> None:
    table = report.mistakes_table(SST2, dev_set([[800, 0], [900, 0]], [1, 1]))
    assert [row[0] for row in table.rows] == ["2", "1"]
    assert report.losses(SST2, dev_set([[800, 0]], [1])).tolist() == [800.0]


def test_very_many_classes_are_told_by_their_commonest_confusions() -> None:
    names = tuple(f"class {i}" for i in range(100))
    task = dataclasses.replace(SST2, labels=names, label_names=names)
    logits = np.zeros((5, 100), np.float32)
    for row, given in enumerate([3, 3, 7, 7, 7]):
        logits[row, given] = math.log(99)  # against 99 others: one half
    dev = dev_set(logits.tolist(), [4, 2, 7, 4, 4])
    table = report.confusion_table(task, dev)
    assert table.header == ("gold", "answered", "times")
    assert table.rows == [
        ("class 4", "class 7", "2"),
        ("class 2", "class 3", "1"),
        ("class 4", "class 3", "1"),
    ]
    table = report.mistakes_table(task, dev)
    assert table.header == ("row", "sentence", "gold", "answered", "p(gold)", "p(answered)")
    assert table.rows[0] == ("1", "text 0", "class 4", "class 3", "0.0051", "0.5000")


def test_errors_of_scores_come_by_size() -> None:
    table = report.errors_table(STSB, PAIRS)
    assert table.title == "Worst errors on dev.tsv: 3 of 3"
    assert table.header == ("row", "sentence1", "sentence2", "gold", "answered", "error")
    assert table.rows == [
        ("3", "c", "z", "3.000", "1.000", "-2.000"),
        ("1", "a", "x", "4.500", "5.000", "+0.500"),  # cut to the task's range
        ("2", "b", "y", "2.000", "2.000", "+0.000"),
    ]


def test_a_long_text_is_cut() -> None:
    [row] = report.mistakes_table(SST2, dev_set([[0, 1]], [0], first=["ab" * 600])).rows
    assert row[1] == "ab" * 500 + " ..."


def test_losses_and_calibration() -> None:
    table = report.losses_table(SST2, [FILMS])
    assert table.header == ["dev set", "rows", "loss", "mean confidence", "accuracy"]
    assert table.rows == [["dev.tsv", "5", "1.0936", "81.00%", "40.00%"]]
    table = report.losses_table(STSB, [PAIRS])
    assert table.header == ["dev set", "rows", "loss", "mean error"]
    assert table.rows == [["dev.tsv", "3", "2.0833", "0.8333"]]


@pytest.mark.parametrize(("task", "dev"), [(SST2, FILMS), (STSB, PAIRS)])
def test_the_mean_loss_is_that_of_evaluation(task, dev) -> None:
    expected = batches.mean_loss(dev.logits_NC, dev.labels)
    assert report.losses(task, dev).mean() == pytest.approx(expected, rel=1e-12)


def test_scores_stand_beside_a_constant_answer_and_published_ones() -> None:
    table = report.scores_table(SST2, [FILMS], np.array([1, 1, 0]))
    assert table.header == ("metric", "this model", "majority class", "PaddleNLP")
    assert table.rows == [("accuracy", "40.00", "40.00", "92.88")]
    logits = [[1, 0, 0], [0, 1, 0]]
    both = [
        dev_set(logits, [0, 1]),
        dataclasses.replace(dev_set(logits, [0, 2]), suffix="_mismatched"),
    ]
    assert report.scores_table(MNLI, both, np.array([2])).rows == [
        ("accuracy", "100.00", "0.00", "84.42"),
        ("accuracy_mismatched", "50.00", "50.00", "84.83"),
    ]
    table = report.scores_table(STSB, [PAIRS], None)
    assert table.header[2] == "mean score"
    assert [row[0] for row in table.rows] == ["pearson", "spearman"]
    assert [row[2:] for row in table.rows] == [("-", "88.85"), ("-", "88.35")]


def write(path: Path, task, *dev: DevSet) -> str:
    settings = {"seed": 7, "model": {"path": "runs/<m>"}, "schedule": {"warmup_steps": None}}
    report.write_report(path, task, dev, train_labels=None, title="T & co", settings=settings)
    return path.read_text()


def test_the_page_has_each_dev_set_s_tables_and_the_settings(tmp_path: Path) -> None:
    logits = [[1, 0, 0]]
    second = ["b"]
    page = write(
        tmp_path / "report.html",
        MNLI,
        dev_set(logits, [0], second=second, source="MNLI/dev_matched.tsv"),
        dev_set(logits, [1], second=second, source="nyu-mll/glue mnli/validation_mismatched"),
    )
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Scores, in percent",
        "Loss and calibration",
        "Answers on dev_matched.tsv",
        "Worst mistakes on dev_matched.tsv: none",
        "Answers on validation_mismatched",
        "Worst mistakes on validation_mismatched: 1 of 1",
        "Settings",
    ]
    settings = re.findall(r"<td>(.*?)</td><td>(.*?)</td></tr>", page.split("<h2>Settings")[1])
    assert [tuple(map(html.unescape, pair)) for pair in settings] == [
        ("seed", "7"),
        ("model.path", "runs/<m>"),
        ("schedule.warmup_steps", "null"),
    ]


def test_texts_that_are_markup_stay_text_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(path, SST2, FILMS)
    browser.open(path.as_uri())
    assert browser.run("document.title") == "T & co"
    assert browser.run("document.querySelectorAll('img').length") == 0
    cells = browser.run(
        "[...document.querySelectorAll('section[data-key^=\"Worst\"] tbody td:nth-child(2)')]"
        ".map((cell) => cell.textContent)"
    )
    assert cells == [EVIL, "dull", "poor"]
    browser.run("document.querySelector('summary').click()")
    browser.run("document.querySelector('input[type=search]').focus()")
    for key in "warm":
        browser.key(key)
    assert browser.run("document.querySelector('.find output').textContent") == "1 shown"
    browser.open(path.as_uri(), width=360)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
