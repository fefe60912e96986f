"""The final tables and the page, from a folder such as the stages leave."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from demo import results, reviews, stages
from demo.__main__ import clear
from demo.pipeline import Record, Stage
from demo.unigram import shards_unigram_loss
from zerobert.shards import write_shard


def write_rows(path: Path, masked: list[list[int]]) -> None:
    """A shard of sequences of 8 with at most 2 masks, whose masked tokens are given."""
    rows = len(masked)
    positions = np.array([[1, 2][: len(ids)] + [0] * (2 - len(ids)) for ids in masked], np.int32)
    write_shard(
        path,
        {
            "input_ids": np.full((rows, 8), 4, np.int32),
            "input_mask": np.ones((rows, 8), np.int8),
            "segment_ids": np.zeros((rows, 8), np.int8),
            "masked_lm_positions": positions,
            "masked_lm_ids": np.array([ids + [0] * (2 - len(ids)) for ids in masked], np.int32),
            "next_sentence_labels": np.zeros(rows, np.int8),
        },
    )


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """What a demo needs for its tables."""
    for name in ("shards", "pretrain", "reviews", "finetune_random", "finetune_pretrained"):
        (tmp_path / name).mkdir()
    write_rows(tmp_path / "shards" / "x_training_0.hdf5", [[4, 5], [5]])
    write_rows(tmp_path / "shards" / "x_test_0.hdf5", [[5], [4, 0]])
    (tmp_path / "vocab.txt").write_text("\n".join("abcdef") + "\n")
    lines = [
        {"step": 1, "train/mlm_loss": 3.0, "train/lr": 0.1},
        {"step": 2, "eval/mlm_loss": 1.25, "eval/mlm_accuracy": 0.5, "eval/nsp_accuracy": 0.5},
    ]
    metrics = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "pretrain" / "metrics.jsonl").write_text(metrics)
    reviews.write_tsv(tmp_path / "reviews" / "train.tsv", [("a", "positive"), ("b", "positive")])
    reviews.write_tsv(tmp_path / "reviews" / "dev.tsv", [("c", "positive"), ("d", "negative")])
    for name, value in (("finetune_random", 0.6), ("finetune_pretrained", 0.7)):
        (tmp_path / name / "result.json").write_text(json.dumps({"value": value}))
    return tmp_path


def test_only_masked_tokens_count_and_padding_does_not(finished: Path) -> None:
    # Seen: 4 once, 5 twice; one added to each of 6 makes 9. Held out: 5, 4, and an id of 0 that is
    # a masked token because its position is not 0.
    expected = -(math.log(3 / 9) + math.log(2 / 9) + math.log(1 / 9)) / 3
    assert shards_unigram_loss(finished / "shards", 6) == pytest.approx(expected, rel=1e-12)
    assert results.unigram_loss(finished) == pytest.approx(expected, rel=1e-12)


def test_the_tables(finished: Path) -> None:
    assert [row[1] for row in results.language_table(finished, 2.0).rows] == [
        "2.000",
        "1.250",
        "+0.750",
    ]
    assert list(results.task_table(finished).rows) == [
        ("always 'positive', the commonest label", "50.0%"),
        ("fine-tuned from random weights", "60.0%"),
        ("fine-tuned from the pretrained model", "70.0%"),
    ]


def test_a_pretrained_model_that_is_no_better_is_explained(finished: Path) -> None:
    assert results.task_note(finished, 1000) is None
    (finished / "finetune_pretrained" / "result.json").write_text(json.dumps({"value": 0.6}))
    note = results.task_note(finished, 1000)
    assert note is not None
    assert note.startswith("1,000 steps on so little text are too few")


def test_the_page_has_tables_curves_and_times(finished: Path) -> None:
    stage = Stage(
        name="text", output=finished, settings=[], run=lambda: 0, summarize=lambda: "2 documents"
    )
    record = Record(fingerprint="x", line="2 documents", seconds=3.4)
    path = results.write_page(
        finished, [stage], [record], [results.task_table(finished)], unigram=2.0
    )
    page = path.read_text()
    assert path == finished / "report.html"
    for text in ("fine-tuned from random weights", "by frequency alone", "2 documents", "<td"):
        assert text in page


def test_starting_over_removes_its_own_work_only(finished: Path) -> None:
    (finished / "sources").mkdir()
    (finished / "logs").mkdir()
    (finished / "the user's own").touch()
    clear(finished, stages.plan(finished, 7))
    assert {path.name for path in finished.iterdir()} == {"sources", "the user's own"}
