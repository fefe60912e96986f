import pytest

from finetune.tasks import TASKS, Task, custom_task, find_task
from zerobert.errors import ConfigError

# The counts and the order of the labels as the hub's nyu-mll/glue has them.
OFFICIAL_ROWS = {
    "CoLA": (8551, (1043,), (1063,)),
    "SST-2": (67349, (872,), (1821,)),
    "MRPC": (3668, (408,), (1725,)),
    "STS-B": (5749, (1500,), (1379,)),
    "QQP": (363849, (40430,), (390965,)),
    "MNLI": (392702, (9815, 9832), (9796, 9847)),
    "QNLI": (104743, (5463,), (5463,)),
    "RTE": (2490, (277,), (3000,)),
    "WNLI": (635, (71,), (146,)),
    "AX": (None, (), (1104,)),
}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_rows_carry_the_official_counts(task: Task) -> None:
    train, dev, test = OFFICIAL_ROWS[task.name]
    assert (task.train.num_rows if task.train else None) == train
    assert tuple(split.num_rows for split in task.dev) == dev
    assert tuple(split.num_rows for split in task.test) == test


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_rows_are_whole(task: Task) -> None:
    assert len(task.label_names) == len(task.labels)
    assert len(task.hub_text_columns) == len(task.text_columns)
    assert len(task.published) in (0, len(task.reported))
    assert task.train or task.trained_on
    assert task.num_outputs == (1 if task.is_regression else len(task.labels))


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("SST-2", "SST-2"),
        ("sst2", "SST-2"),
        ("sst-2", "SST-2"),
        ("STS_B", "STS-B"),
        ("cola", "CoLA"),
        ("mnli", "MNLI"),
        ("ax", "AX"),
    ],
)
def test_any_usual_spelling_is_accepted(spelling: str, name: str) -> None:
    assert find_task(spelling).name == name


def test_unknown_task_names_the_closest_and_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"mean SST-2\?.*CoLA, SST-2, MRPC.*custom"):
        find_task("ss2")


def test_submissions_have_the_servers_file_names() -> None:
    names = {split.submission for task in TASKS for split in task.test}
    assert names == {
        *("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI-m", "MNLI-mm", "QNLI", "RTE", "WNLI"),
        "AX",
    }


def test_second_dev_set_has_its_own_metric_name() -> None:
    assert find_task("mnli").reported == ("accuracy", "accuracy_mismatched")
    assert find_task("mrpc").reported == ("accuracy", "f1")


def test_custom_rows_are_classes_or_scores(tmp_path) -> None:
    files = {"train_file": tmp_path / "a", "dev_file": tmp_path / "b", "test_file": None}
    columns = {"text_columns": ("x",), "label_column": "y"}
    classes = custom_task(**files, **columns, labels=("bad", "good"))
    scores = custom_task(**files, **columns, labels=())
    assert (classes.metrics, classes.num_outputs) == (("accuracy",), 2)
    assert (scores.metrics, scores.num_outputs) == (("pearson", "spearman"), 1)
    assert classes.test == ()
