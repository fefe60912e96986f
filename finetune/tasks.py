"""The GLUE tasks, one frozen row each, and the row that a user's own data becomes.

All that differs between tasks is written here; no other file asks for a task's name.

Source: Wang et al. 2018 (arXiv:1804.07461); the files and row counts of gluebenchmark.com and of
the hub's `nyu-mll/glue`, whose label order is kept.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from zerobert.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A file that a split was published in.

    Args:
        name: in the task's folder; an absolute path for a user's own file.
        header: the columns of a file whose first line does not name them.
        columns: of the texts and the label, where it names them otherwise than the task.
        rows: MRPC's first release keeps train and dev in one file; `dev_ids.tsv` lists the latter.
    """

    name: str
    header: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: Literal["all", "listed", "unlisted"] = "all"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """One set of examples.

    Args:
        files: the forms in which it was published; the first that exists is read.
        num_rows: the official count, None where there is none.
        hub_num_rows: the hub's, where it has another.
        hub: its name on the hub.
        suffix: what its metrics' names end in, where a task has a second dev set.
        submission: the name of a test set's predictions on the GLUE server.
    """

    files: tuple[File, ...]
    num_rows: int | None = None
    hub_num_rows: int | None = None
    hub: str = ""
    suffix: str = ""
    submission: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One task: its files, columns, labels, metrics, and the settings used where no flag is given.

    Args:
        folders: the names that its folder goes by.
        labels: as the files spell them, in the order of the model's outputs; () means regression.
        label_names: the same, in words, for whoever loads the fine-tuned model.
        metrics: the first is the task's value.
        dev: the first is the one whose loss is reported.
        sometimes_labelled: a dev set where one of its files has labels; see `data.with_labelled`.
        trained_on: the task whose fine-tuned model answers this one, which has no training set.
        gains_from: the task whose fine-tuned model is a better start than a pretrained one.
            Source: Liu et al. 2019 (arXiv:1907.11692), section 5.1; Phang et al. 2018
            (arXiv:1811.01088).
        skips_broken_rows: its first release has rows torn by line breaks, which readers leave out.
        score_range: the least and the greatest answer of a regression task, where they are known.
        published: percent, in the order of the reported metrics.
            Source: PaddleNLP's README tables for bert-base-uncased.
        learning_rate, batch_size, num_epochs:
            Source: Hugging Face, examples/pytorch/text-classification/README.md.
    """

    name: str
    folders: tuple[str, ...] = ()
    text_columns: tuple[str, ...]
    label_column: str = "label"
    labels: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    metrics: tuple[str, ...]
    train: Split | None = None
    dev: tuple[Split, ...] = ()
    sometimes_labelled: Split | None = None
    test: tuple[Split, ...] = ()
    hub_config: str = ""
    hub_text_columns: tuple[str, ...] = ()
    trained_on: str = ""
    gains_from: str = ""
    skips_broken_rows: bool = False
    score_range: tuple[float, float] | None = None
    published: tuple[float, ...] = ()
    learning_rate: float = 2e-5
    batch_size: int = 32
    num_epochs: float = 3.0

    @property
    def is_regression(self) -> bool:
        """Whether the answer is a number, not a class."""
        return not self.labels

    @property
    def num_outputs(self) -> int:
        """The width of the classification head."""
        return len(self.labels) or 1

    @property
    def reported(self) -> tuple[str, ...]:
        """The names of all metrics of all dev sets."""
        return tuple(metric + split.suffix for split in self.dev for metric in self.metrics)

    @property
    def published_scores(self) -> dict[str, float]:
        """The published figures by the reported metrics' names; empty where there are none."""
        return dict(zip(self.reported, self.published, strict=bool(self.published)))


def _train(num_rows: int, *files: File) -> Split:
    return Split(files=files or (File(name="train.tsv"),), num_rows=num_rows, hub="train")


def _dev(num_rows: int, *files: File) -> tuple[Split, ...]:
    files = files or (File(name="dev.tsv"),)
    return (Split(files=files, num_rows=num_rows, hub="validation"),)


def _test(num_rows: int, submission: str, *files: File) -> tuple[Split, ...]:
    files = files or (File(name="test.tsv"),)
    return (Split(files=files, num_rows=num_rows, hub="test", submission=submission),)


_COLA_HEADER = ("source", "label", "annotation", "sentence")
_AX_FILES = (
    *(File(name="ax.tsv"), File(name="AX.tsv"), File(name="diagnostic.tsv")),
    File(name="diagnostic-full.tsv", columns=("Premise", "Hypothesis", "Label")),
)
_MRPC_TRAIN = "msr_paraphrase_train.txt"

TASKS: tuple[Task, ...] = (
    Task(
        name="CoLA",
        folders=("CoLA",),
        text_columns=("sentence",),
        labels=("0", "1"),
        label_names=("unacceptable", "acceptable"),
        metrics=("matthews",),
        train=_train(8551, File(name="train.tsv", header=_COLA_HEADER)),
        dev=_dev(1043, File(name="dev.tsv", header=_COLA_HEADER)),
        test=_test(1063, "CoLA"),
        hub_config="cola",
        hub_text_columns=("sentence",),
        published=(59.56,),
    ),
    Task(
        name="SST-2",
        folders=("SST-2",),
        text_columns=("sentence",),
        labels=("0", "1"),
        label_names=("negative", "positive"),
        metrics=("accuracy",),
        train=_train(67349),
        dev=_dev(872),
        test=_test(1821, "SST-2"),
        hub_config="sst2",
        hub_text_columns=("sentence",),
        published=(92.88,),
    ),
    Task(
        name="MRPC",
        folders=("MRPC",),
        text_columns=("#1 String", "#2 String"),
        label_column="Quality",
        labels=("0", "1"),
        label_names=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        train=_train(3668, File(name="train.tsv"), File(name=_MRPC_TRAIN, rows="unlisted")),
        dev=_dev(408, File(name="dev.tsv"), File(name=_MRPC_TRAIN, rows="listed")),
        test=_test(1725, "MRPC", File(name="test.tsv"), File(name="msr_paraphrase_test.txt")),
        hub_config="mrpc",
        gains_from="MNLI",
        hub_text_columns=("sentence1", "sentence2"),
        published=(88.24, 91.67),
        num_epochs=5.0,
    ),
    Task(
        name="STS-B",
        folders=("STS-B",),
        text_columns=("sentence1", "sentence2"),
        label_column="score",
        metrics=("pearson", "spearman"),
        train=_train(5749),
        dev=_dev(1500),
        test=_test(1379, "STS-B"),
        hub_config="stsb",
        gains_from="MNLI",
        hub_text_columns=("sentence1", "sentence2"),
        score_range=(0.0, 5.0),
        published=(88.85, 88.35),
    ),
    Task(
        name="QQP",
        folders=("QQP",),
        text_columns=("question1", "question2"),
        label_column="is_duplicate",
        labels=("0", "1"),
        label_names=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        train=dataclasses.replace(_train(363_849), hub_num_rows=363_846),
        dev=_dev(40_430),
        test=_test(390_965, "QQP"),
        hub_config="qqp",
        hub_text_columns=("question1", "question2"),
        skips_broken_rows=True,
        published=(90.58, 87.35),
    ),
    Task(
        name="MNLI",
        folders=("MNLI",),
        text_columns=("sentence1", "sentence2"),
        label_column="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        label_names=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        train=_train(392_702),
        dev=(
            Split(files=(File(name="dev_matched.tsv"),), num_rows=9815, hub="validation_matched"),
            Split(
                files=(File(name="dev_mismatched.tsv"),),
                num_rows=9832,
                hub="validation_mismatched",
                suffix="_mismatched",
            ),
        ),
        test=(
            Split(
                files=(File(name="test_matched.tsv"),),
                num_rows=9796,
                hub="test_matched",
                submission="MNLI-m",
            ),
            Split(
                files=(File(name="test_mismatched.tsv"),),
                num_rows=9847,
                hub="test_mismatched",
                submission="MNLI-mm",
            ),
        ),
        hub_config="mnli",
        hub_text_columns=("premise", "hypothesis"),
        published=(84.42, 84.83),
    ),
    Task(
        name="QNLI",
        folders=("QNLI", "QNLIv2"),
        text_columns=("question", "sentence"),
        labels=("entailment", "not_entailment"),
        label_names=("entailment", "not_entailment"),
        metrics=("accuracy",),
        train=_train(104_743),
        dev=_dev(5463),
        test=_test(5463, "QNLI"),
        hub_config="qnli",
        hub_text_columns=("question", "sentence"),
        published=(91.67,),
    ),
    Task(
        name="RTE",
        folders=("RTE",),
        text_columns=("sentence1", "sentence2"),
        labels=("entailment", "not_entailment"),
        label_names=("entailment", "not_entailment"),
        metrics=("accuracy",),
        train=_train(2490),
        dev=_dev(277),
        test=_test(3000, "RTE"),
        hub_config="rte",
        gains_from="MNLI",
        hub_text_columns=("sentence1", "sentence2"),
        published=(71.12,),
    ),
    Task(
        name="WNLI",
        folders=("WNLI",),
        text_columns=("sentence1", "sentence2"),
        labels=("0", "1"),
        label_names=("not_entailment", "entailment"),
        metrics=("accuracy",),
        train=_train(635),
        dev=_dev(71),
        test=_test(146, "WNLI"),
        hub_config="wnli",
        hub_text_columns=("sentence1", "sentence2"),
        num_epochs=5.0,
    ),
    Task(
        name="AX",
        folders=("AX", "diagnostic"),
        text_columns=("sentence1", "sentence2"),
        labels=("entailment", "neutral", "contradiction"),
        label_names=("entailment", "neutral", "contradiction"),
        metrics=("matthews",),
        sometimes_labelled=Split(files=_AX_FILES, num_rows=1104),
        test=_test(1104, "AX", *_AX_FILES),
        hub_config="ax",
        hub_text_columns=("premise", "hypothesis"),
        trained_on="MNLI",
    ),
)


def plain(name: str) -> str:
    """A name without case and punctuation: `SST-2`, `sst-2` and `sst2` are one task."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_task(name: str) -> Task:
    """The row of a task, in any usual spelling.

    Raises:
        ConfigError: there is no such task; names the known ones.
    """
    rows = {plain(task.name): task for task in TASKS}
    if plain(name) in rows:
        return rows[plain(name)]
    close = difflib.get_close_matches(plain(name), rows, n=1)
    hint = f" (did you mean {rows[close[0]].name}?)" if close else ""
    known = ", ".join(task.name for task in TASKS)
    raise ConfigError(
        f"--task_name {name}: unknown task{hint}; known are {known}, glue (all of them) and custom"
    )


def custom_task(
    *,
    train_file: Path,
    dev_file: Path,
    test_file: Path | None,
    text_columns: Sequence[str],
    label_column: str,
    labels: Sequence[str],
) -> Task:
    """The row of a user's own data.

    Args:
        labels: as the file spells them; () for regression.
    """

    def split(path: Path, submission: str = "") -> Split:
        return Split(files=(File(name=str(path.absolute())),), submission=submission)

    return Task(
        name="custom",
        text_columns=tuple(text_columns),
        label_column=label_column,
        labels=tuple(labels),
        label_names=tuple(labels),
        metrics=("accuracy",) if labels else ("pearson", "spearman"),
        train=split(train_file),
        dev=(split(dev_file),),
        test=(split(test_file, "custom"),) if test_file else (),
    )
