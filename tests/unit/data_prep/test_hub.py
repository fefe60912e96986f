import json
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.config import TextConfig
from data_prep.hub import find_datasets, read_texts
from zerobert.errors import ConfigError, DataError, MissingDependencyError

ROWS = [f"Row {number}." for number in range(600)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache")


def read(name: Path | str, text_field: str = "text", **settings: str) -> list[str | None]:
    (found,) = find_datasets([str(name)], TextConfig(format="hf", **settings))  # type: ignore[arg-type]
    return list(read_texts(found, text_field))


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [*ROWS, None], "id": range(601)})
    rows.save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == [*ROWS, None]
    both = datasets.DatasetDict(train=rows, validation=rows.select(range(2)))
    both.save_to_disk(tmp_path / "both")
    assert len(read(tmp_path / "both")) == 601
    assert read(tmp_path / "both", dataset_split="validation") == ROWS[:2]
    with pytest.raises(DataError, match="both: wanted the split 'test', got train, validation; ch"):
        read(tmp_path / "both", dataset_split="test")


def write_folder(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    for split, rows in (("train", ROWS), ("test", ROWS[:3])):
        pq.write_table(pa.table({"text": rows}), folder / "data" / f"{split}-00000.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files:\n  - split: train\n"
        "    path: data/train-*\n- config_name: second\n  data_files:\n  - split: test\n"
        "    path: data/test-*\n---\n"
    )
    return folder


def test_a_folder_of_files_is_read_as_datasets_would(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "files")
    assert read(folder, dataset_config_name="first") == ROWS
    assert read(folder, dataset_config_name="second", dataset_split="test") == ROWS[:3]
    with pytest.raises(DataError, match=r"files can't be loaded: Config name is missing.*first"):
        read(folder)
    with pytest.raises(DataError, match=r"files can't be loaded: .*'third' not found.*first"):
        read(folder, dataset_config_name="third")
    with pytest.raises(DataError, match=r"files can't be loaded: Bad split: train.*test"):
        read(folder, dataset_config_name="second")


def test_what_identifies_a_folder_is_its_files(tmp_path: Path) -> None:
    config = TextConfig(format="hf", dataset_config_name="first")
    folder = write_folder(tmp_path / "files")
    (first,) = find_datasets([str(folder)] * 2, config)
    (again,) = find_datasets([str(folder.rename(tmp_path / "moved"))], config)
    assert first.stamp == again.stamp
    assert len(first.stamp) == 64
    pq.write_table(pa.table({"text": ["new"]}), tmp_path / "moved/data/train-00000.parquet")
    (changed,) = find_datasets([str(tmp_path / "moved")], config)
    assert changed.stamp != first.stamp


def test_a_column_without_text_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": ["x"], "id": [1]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        DataError, match=r"saved: wanted one column 'text' of text, got body \(string\), id \(int64"
    ):
        read(tmp_path / "saved")
    assert read(tmp_path / "saved", "body") == ["x"]
    with pytest.raises(DataError, match="wanted one column 'id' of text"):
        read(tmp_path / "saved", "id")


def test_broken_folders_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    with pytest.raises(DataError, match=r"files can't be loaded: .*doesn't contain any data files"):
        read(folder)
    (folder / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n{oops\n")
    with pytest.raises(DataError, match="files can't be loaded: JSON parse error"):
        read(folder)
    (folder / "a.jsonl").write_text(
        "".join(f'{{"text": {cell}}}\n' for cell in ('"x"', "null", "[]"))
    )
    with pytest.raises(
        DataError, match=r"files: wanted one column 'text' of text, got text \(Json"
    ):
        read(folder)
    with pytest.raises(DataError, match=r"a\.jsonl is a file; name it without --format hf"):
        read(folder / "a.jsonl")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="saved can't be loaded: "):
        read(tmp_path / "saved")
    with pytest.raises(ConfigError, match="got an empty one"):
        read("")


def test_a_hub_that_is_not_there_is_one_line_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(
        DataError, match=r"^nobody/nothing can't be loaded: .*; there is no folder of this name"
    ):
        read("nobody/nothing")
    assert time.monotonic() - started < 10


def test_the_hubs_revision_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "files")
    load = datasets.load_dataset_builder
    asked: list[object] = []

    def from_folder(name: str, config: str | None, *, revision: str | None) -> object:
        asked.append((name, config, revision))
        return load(str(folder), config)

    monkeypatch.setattr(datasets, "load_dataset_builder", from_folder)
    monkeypatch.setattr("data_prep.hub._revision", lambda name: f"commit of {name}")
    (found,) = find_datasets(["a/b"], TextConfig(format="hf", dataset_config_name="first"))
    assert (found.name, found.stamp) == ("a/b", "commit of a/b")
    assert asked == [("a/b", "first", "commit of a/b")]
    assert list(read_texts(found, "text")) == ROWS


def test_datasets_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install datasets"):
        read("a/b")
