import sys
import types
from pathlib import Path

import numpy as np
import pytest

from finetune import data
from finetune.tasks import TASKS, custom_task, find_task
from tests.glue_files import write_every_task
from zerobert.errors import ConfigError, DataError, MissingDependencyError
from zerobert.manifest import sha256_file

SHARED_GLUE = Path(__file__).resolve().parents[4] / "shared" / "data" / "glue"

TRAIN = {
    "CoLA": (["The kettle sang.", "Kettle the sang."], None, [1, 0]),
    "SST-2": (['a " warm ', "dull and long "], None, [1, 0]),
    "MRPC": (['He said " no .', "Rain fell ."], ["No , he said .", "The sun shone ."], [1, 0]),
    "STS-B": (["A dog runs."] * 2, ["A dog is running.", "Rice boils."], [4.8, 0.0]),
    "QQP": (["How far is it?", "Why?"], ["What is the distance?", "Who?"], [1, 0]),
    "MNLI": (["It rained."] * 2, ["It poured.", "It was dry."], [1, 2]),
    "QNLI": (["Where is it?"] * 2, ["It is here.", "It is red."], [0, 1]),
    "RTE": (["It is red."] * 2, ["It has a colour.", "It is small."], [0, 1]),
    "WNLI": (["The cup fell, it broke."] * 2, ["The cup broke.", "The floor broke."], [1, 0]),
}


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    """A GLUE folder with a few rows of every task."""
    return write_every_task(tmp_path / "glue")


@pytest.mark.parametrize("name", TRAIN)
def test_training_files_of_every_task(glue: Path, name: str) -> None:
    task = find_task(name)
    first, second, labels = TRAIN[name]
    examples = data.load_split(task, task.train, glue / name)
    assert (examples.first, examples.second) == (first, second)
    np.testing.assert_array_equal(
        examples.labels, np.array(labels, np.float32 if task.is_regression else np.int64)
    )
    assert examples.labels.dtype == (np.float32 if task.is_regression else np.int64)
    assert examples.version == sha256_file(glue / name / "train.tsv")


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_dev_and_test_files_of_every_task(glue: Path, task) -> None:
    for split in task.dev:
        assert len(data.load_split(task, split, glue / task.name).labels) == 1
    for split in task.test:
        examples = data.load_split(task, split, glue / task.name)
        assert examples.labels is None
        assert len(examples) == 1


def test_mnli_reads_the_gold_label(glue: Path) -> None:
    task = find_task("mnli")
    matched, mismatched = (data.load_split(task, split, glue / "MNLI") for split in task.dev)
    assert matched.labels.tolist() == [0]
    assert mismatched.labels.tolist() == [1]


def test_mrpc_of_the_first_release_is_divided_by_its_id_list(tmp_path: Path) -> None:
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    rows = "1\t1\t2\ta\tb\n0\t3\t4\tc\td\n1\t5\t6\te\tf\n"
    (tmp_path / "msr_paraphrase_train.txt").write_text(header + rows, encoding="utf-8")
    (tmp_path / "msr_paraphrase_test.txt").write_text(header + "1\t7\t8\tg\th", encoding="utf-8")
    task = find_task("mrpc")
    with pytest.raises(DataError, match=r"dev_ids\.tsv: no such file"):
        data.load_split(task, task.train, tmp_path)
    (tmp_path / "dev_ids.tsv").write_text("3\t4\n", encoding="utf-8")
    assert data.load_split(task, task.train, tmp_path).first == ["a", "e"]
    dev = data.load_split(task, task.dev[0], tmp_path)
    assert (dev.first, dev.labels.tolist()) == (["c"], [0])
    test = data.load_split(task, task.test[0], tmp_path)
    assert (test.second, test.labels) == (["h"], None)


def test_torn_rows_of_qqp_are_left_out_but_not_of_other_tasks(glue: Path, capsys) -> None:
    for name in ("QQP", "RTE"):
        with open(glue / name / "train.tsv", "a", encoding="utf-8") as file:
            file.write("the rest of a question?\n")
    qqp, rte = find_task("qqp"), find_task("rte")
    assert len(data.load_split(qqp, qqp.train, glue / "QQP")) == 2
    assert "left out 1 rows" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"RTE/train\.tsv line 4: wanted 4 columns"):
        data.load_split(rte, rte.train, glue / "RTE")


def test_unofficial_row_count_is_a_warning_line(glue: Path, capsys) -> None:
    task = find_task("sst2")
    data.load_split(task, task.dev[0], glue / "SST-2")
    assert "dev.tsv: wanted SST-2's official 872 rows, got 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("SST-2", "fine\tgood", r"train\.tsv line 4: unknown label 'good' in 'label'; SST-2 knows"),
        ("STS-B", "\t" * 9 + "high", r"line 4: wanted a number in 'score' .*, got 'high'"),
        ("STS-B", "\t" * 9 + "nan", r"line 4: wanted a number in 'score' .*, got 'nan'"),
        ("STS-B", "\t" * 9 + "1e39", r"line 4: .*'score' that float32 holds, got '1e39'"),
        ("STS-B", "\t" * 9 + "9" * 5000, r"line 4: wanted a number .*, got '9{60}'$"),
    ],
)
def test_bad_labels_name_file_and_line(glue: Path, name: str, row: str, message: str) -> None:
    with open(glue / name / "train.tsv", "a", encoding="utf-8") as file:
        file.write(row + "\n")
    task = find_task(name)
    with pytest.raises(DataError, match=message):
        data.load_split(task, task.train, glue / name)


def test_missing_and_empty_files(glue: Path) -> None:
    task = find_task("cola")
    (glue / "CoLA" / "train.tsv").write_text("")
    with pytest.raises(DataError, match=r"CoLA/train\.tsv: no rows"):
        data.load_split(task, task.train, glue / "CoLA")
    (glue / "CoLA" / "dev.tsv").unlink()
    with pytest.raises(DataError, match=r"CoLA/dev\.tsv: no such file; put CoLA's official file"):
        data.load_split(task, task.dev[0], glue / "CoLA")


def test_data_dir_is_the_tasks_folder_or_the_root(glue: Path, tmp_path: Path) -> None:
    task = find_task("sst2")
    assert data.choose_folder(task, glue) == glue / "SST-2"
    assert data.choose_folder(task, glue / "SST-2") == glue / "SST-2"
    (glue / "SST-2").rename(glue / "sst2")
    assert data.choose_folder(task, glue) == glue / "sst2"
    with pytest.raises(DataError, match=r"--data_dir .*: found no train\.tsv and dev\.tsv"):
        data.choose_folder(task, tmp_path)


def test_without_data_dir_the_environment_then_data_glue(
    glue: Path, tmp_path: Path, monkeypatch
) -> None:
    task = find_task("rte")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GLUE_DIR", raising=False)
    assert data.choose_folder(task, None) is None
    (tmp_path / "data").mkdir()
    glue.rename(tmp_path / "data" / "glue")
    assert data.choose_folder(task, None) == Path("data/glue/RTE")
    monkeypatch.setenv("GLUE_DIR", str(tmp_path / "data" / "glue"))
    assert data.choose_folder(task, None) == tmp_path / "data" / "glue" / "RTE"
    monkeypatch.setenv("GLUE_DIR", str(tmp_path))  # nothing of data/glue is mixed in
    assert data.choose_folder(task, None) is None
    monkeypatch.setenv("GLUE_DIR", "glue/typo")
    with pytest.raises(DataError, match="GLUE_DIR glue/typo: no such folder; name GLUE's folder"):
        data.choose_folder(task, None)


class FakeTable(dict):
    """What datasets.load_dataset returns, as far as it is used."""

    _fingerprint = "f00d"

    def __init__(self, columns, names) -> None:
        super().__init__(columns)
        self.features = {"label": types.SimpleNamespace(names=names)}


def fake_hub(monkeypatch, answer) -> list[tuple]:
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((*args, kwargs))
        if isinstance(answer, Exception):
            raise answer
        return answer

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_columns_become_ours(monkeypatch, capsys) -> None:
    columns = {"premise": ["a"], "hypothesis": ["b"], "label": [2]}
    task = find_task("mnli")
    calls = fake_hub(monkeypatch, FakeTable(columns, list(task.label_names)))
    examples = data.load_split(task, task.dev[1], None)
    assert calls == [("nyu-mll/glue", "mnli", {"split": "validation_mismatched"})]
    assert (examples.first, examples.second, examples.labels.tolist()) == (["a"], ["b"], [2])
    assert examples.version == "f00d"
    assert "wanted MNLI's official 9832 rows" in capsys.readouterr().err


def test_hub_test_sets_have_no_labels(monkeypatch) -> None:
    task = find_task("sst2")
    fake_hub(monkeypatch, FakeTable({"sentence": ["a"], "label": [-1]}, list(task.label_names)))
    assert data.load_split(task, task.test[0], None).labels is None


def test_hub_with_another_label_order_is_refused(monkeypatch) -> None:
    fake_hub(monkeypatch, FakeTable({"sentence": ["a"], "label": [0]}, ["positive", "negative"]))
    task = find_task("sst2")
    with pytest.raises(DataError, match="wanted the labels negative, positive, got positive, neg"):
        data.load_split(task, task.dev[0], None)


def test_the_hub_s_own_count_is_no_warning(monkeypatch, capsys) -> None:
    task = find_task("qqp")
    rows = 363_846
    columns = {"question1": ["a"] * rows, "question2": ["b"] * rows, "label": [1] * rows}
    fake_hub(monkeypatch, FakeTable(columns, list(task.label_names)))
    assert len(data.load_split(task, task.train, None)) == rows
    assert "warning" not in capsys.readouterr().err


# Where another task is in its cache, `datasets` raises the second.
@pytest.mark.parametrize("kind", [ConnectionError, ValueError])
def test_no_network_says_what_to_do(monkeypatch, kind: type[Exception]) -> None:
    fake_hub(monkeypatch, kind("no route"))
    task = find_task("sst2")
    with pytest.raises(
        DataError, match=r"no route\); put the official files into data/glue/SST-2/"
    ):
        data.load_split(task, task.train, None)


def test_without_datasets_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    task = find_task("sst2")
    with pytest.raises(MissingDependencyError, match=r"data/glue/SST-2/.*pip install datasets"):
        data.load_split(task, task.train, None)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["bad", "good", "bad"], ("bad", "good")),
        (["10", "9", "-1"], ("-1", "9", "10")),
        (["b", "1"], ("1", "b")),
    ],
)
def test_own_labels_are_found_and_sorted(tmp_path: Path, capsys, labels, found) -> None:
    path = tmp_path / "own.tsv"
    path.write_text("text\tstars\n" + "".join(f"x\t{label}\n" for label in labels))
    assert data.find_labels(path, "stars") == found
    said = capsys.readouterr()
    assert said.out == f"{path}: {len(found)} classes: {', '.join(map(repr, found))}\n"
    assert not said.err


def test_scores_taken_for_classes_are_told(tmp_path: Path, capsys) -> None:
    path = tmp_path / "own.tsv"
    path.write_text("text\tstars\n" + "".join(f"x\t{i / 2}\n" for i in range(30)))
    assert len(data.find_labels(path, "stars")) == 30
    said = capsys.readouterr()
    assert "'stars' has numbers such as 0.5, each a class of its own" in said.err
    assert said.out.endswith("'9.0', '9.5', ...\n")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["good", "bad", "good "], r"'good' in line 2 and 'good ' in line 4 are one label in two"),
        (["1", "0", "1.0"], r"own\.csv: 'stars': '1' in line 2 and '1.0' in line 4 are one"),
        (["1", "0", "01"], "'1' in line 2 and '01' in line 4"),
    ],
)
def test_one_label_in_two_spellings_is_refused(tmp_path: Path, labels, message: str) -> None:
    path = tmp_path / "own.csv"
    path.write_text("text,stars\n" + "".join(f"x,{label}\n" for label in labels))
    with pytest.raises(DataError, match=message):
        data.find_labels(path, "stars")


@pytest.mark.parametrize("label", ["", " ", "nan", "NaN"])
def test_a_row_without_a_label_is_told_with_its_line(tmp_path: Path, label: str) -> None:
    path = tmp_path / "own.tsv"
    path.write_text(f"text\tstars\nx\t1\ny\t{label}\nz\t2\n")
    with pytest.raises(DataError, match=r"own\.tsv line 3: no label in 'stars'"):
        data.find_labels(path, "stars")


def test_an_own_file_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "none.csv"
    task = custom_task(
        train_file=missing,
        dev_file=missing,
        test_file=None,
        text_columns=("q",),
        label_column="y",
        labels=(),
    )
    with pytest.raises(DataError, match=r"none\.csv: no such file; give one that exists"):
        data.load_split(task, task.train, Path())


def test_one_label_is_no_task(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("text,stars\nx,1\ny,1\n")
    with pytest.raises(DataError, match="wanted two or more labels in 'stars', got '1'"):
        data.find_labels(path, "stars")


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("tsv", "q\ta\tscore\nhow\tso\t-1.5\n"),
        ("csv", 'q,a,score\n"how",so,-1.5\n'),
        ("jsonl", '{"q": "how", "a": "so", "score": -1.5}\n'),
    ],
)
def test_own_files_of_each_format(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"own.{suffix}"
    path.write_text(text)
    task = custom_task(
        train_file=path,
        dev_file=path,
        test_file=path,
        text_columns=("q", "a"),
        label_column="score",
        labels=(),
    )
    examples = data.load_split(task, task.train, Path())
    assert (examples.first, examples.second) == (["how"], ["so"])
    assert examples.labels.tolist() == [-1.5]
    assert data.load_split(task, task.test[0], Path()).labels is None


def test_text_columns_are_one_or_two() -> None:
    assert data.parse_columns("a") == ("a",)
    assert data.parse_columns("a, b") == ("a", "b")
    for text in ("a,b,c", "a,", ""):
        with pytest.raises(ConfigError, match="wanted one name, or two"):
            data.parse_columns(text)


@pytest.mark.skipif(not SHARED_GLUE.is_dir(), reason="the real GLUE files are not at hand")
@pytest.mark.parametrize("name", ["SST-2", "MRPC", "STS-B", "WNLI"])
def test_real_files_have_the_official_counts(name: str, capsys) -> None:
    task = find_task(name)
    folder = data.choose_folder(task, SHARED_GLUE)
    for split in (task.train, *task.dev, *task.test):
        assert len(data.load_split(task, split, folder)) == split.num_rows
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not SHARED_GLUE.is_dir(), reason="the real GLUE files are not at hand")
def test_real_mrpc_is_the_same_in_both_forms(tmp_path: Path) -> None:
    task = find_task("mrpc")
    for name in ("msr_paraphrase_train.txt", "dev_ids.tsv"):
        (tmp_path / name).symlink_to(SHARED_GLUE / "MRPC" / name)
    for split in (task.train, task.dev[0]):
        ours = data.load_split(task, split, SHARED_GLUE / "MRPC")
        raw = data.load_split(task, split, tmp_path)
        assert sorted(zip(ours.first, ours.second, ours.labels, strict=True)) == sorted(
            zip(raw.first, raw.second, raw.labels, strict=True)
        )
