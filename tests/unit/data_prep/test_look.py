import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.look import inspect_shards, verify
from tests.conftest import nobody
from zerobert.errors import ConfigError, DataError, ShardFormatError
from zerobert.manifest import write_manifest
from zerobert.shards import write_shard
from zerobert.tokenizer import SPECIAL_TOKENS

VOCAB = [*SPECIAL_TOKENS, "the", "cat", "##s", "sat", "on", "mat"]


def one_row(**changes: Any) -> dict[str, Any]:
    """`the cats sat [SEP] on the mat`: ##s masked, sat kept, mat replaced by cat."""
    arrays = {
        "input_ids": np.array([[2, 5, 6, 4, 8, 3, 9, 5, 6, 3, 0, 0]], "i4"),
        "input_mask": np.array([[1] * 10 + [0] * 2], "i1"),
        "segment_ids": np.array([[0] * 6 + [1] * 4 + [0] * 2], "i1"),
        "masked_lm_positions": np.array([[3, 4, 8, 0]], "i4"),
        "masked_lm_ids": np.array([[7, 8, 10, 0]], "i4"),
        "next_sentence_labels": np.array([1], "i1"),
    }
    return arrays | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB))
    write_shard(tmp_path / "x_training_0.hdf5", one_row())
    write_shard(tmp_path / "x_test_0.hdf5", one_row(next_sentence_labels=np.zeros(1, dtype="i1")))
    return tmp_path


def test_rows_are_shown_as_a_person_reads_them(folder: Path) -> None:
    lines = list(inspect_shards(folder, None, num_rows=5))
    assert lines[1:5] == [
        "\nx_training_0.hdf5 row 0: random next",
        "[CLS] the cat [MASK]{##s} =sat= [SEP] on the cat{mat} [SEP]",
        "\nx_test_0.hdf5 row 0: actual next",
        "[CLS] the cat [MASK]{##s} =sat= [SEP] on the cat{mat} [SEP]",
    ]
    assert lines[6:] == [
        "files 2, rows 2",
        "fill 83.3% of 12 places a row",
        "masks a row 3.00",
        "masked / kept / random 33.3% / 33.3% / 33.3%",
        "random next 50.0%",
        "vocabulary used 8 of 11",
    ]


def test_as_many_rows_as_asked_for(folder: Path) -> None:
    for num_rows, wanted in [(0, 0), (1, 1), (9, 2)]:
        lines = list(inspect_shards(folder, None, num_rows=num_rows))
        assert sum(" row 0: " in line for line in lines) == wanted


def test_one_shard_and_a_vocabulary_by_name(folder: Path, tmp_path_factory: Any) -> None:
    vocab_file = (folder / "vocab.txt").rename(tmp_path_factory.mktemp("v") / "v.txt")
    shard = folder / "x_training_0.hdf5"
    assert "files 1, rows 1" in list(inspect_shards(shard, vocab_file, num_rows=1))
    with pytest.raises(ConfigError, match=r"no vocab\.txt beside its shards; name it with"):
        list(inspect_shards(shard, None, num_rows=1))


def test_colours_are_for_terminals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = "\n".join(inspect_shards(folder, None, num_rows=1))
    assert "cat \033[32m[MASK]{##s}\033[0m \033[31m=sat=\033[0m" in shown


def test_what_can_not_be_shown(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no shard with `train` or `test` in its name"):
        list(inspect_shards(tmp_path / "empty", None, num_rows=1))
    ids = one_row()["input_ids"]
    ids[0, 1] = 11
    write_shard(folder / "x_training_0.hdf5", one_row(input_ids=ids))
    with pytest.raises(ShardFormatError, match="input_ids wanted 0 to 10, got 11 in row 0"):
        list(inspect_shards(folder, None, num_rows=1))


def test_shards_without_a_manifest_are_held_against_the_layout(folder: Path) -> None:
    assert verify(folder) == (2, [])
    assert verify(folder / "x_test_0.hdf5") == (1, [])
    write_shard(folder / "x_test_0.hdf5", one_row(segment_ids=np.full((1, 12), 2, "i1")))
    (folder / "x_training_0.hdf5").write_text("no")
    num_files, problems = verify(folder)
    assert num_files == 2
    assert ["segment_ids wanted 0 to 1" in line for line in problems] == [True, False]
    assert "x_training_0.hdf5 is not HDF5 or is damaged" in problems[1]


def test_every_file_is_held_against_the_manifest(folder: Path) -> None:
    write_manifest(folder, kind="shards", config={}, inputs={})
    assert verify(folder) == (3, [])
    raw = bytearray((folder / "x_test_0.hdf5").read_bytes())
    raw[random.Random(0).randrange(len(raw))] ^= 1
    (folder / "x_test_0.hdf5").write_bytes(raw)
    (folder / "vocab.txt").unlink()
    _, problems = verify(folder)
    assert [line.partition(": ")[2] for line in problems] == [
        "missing",
        "its contents differ from the manifest's sha256",
    ]


def test_a_broken_manifest_is_a_problem(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")
    _, problems = verify(folder)
    assert "wanted format_version 1" in problems[0]


def test_nothing_to_check_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither a manifest\.json nor an HDF5 file"):
        verify(tmp_path)
    with pytest.raises(DataError, match="none: no such file or folder"):
        verify(tmp_path / "none")
    for look in (verify, lambda path: list(inspect_shards(path, None, num_rows=1))):
        with pytest.raises(DataError, match="xxx can't be read: File name too long"):
            look(tmp_path / ("x" * 300))


def test_links_are_followed_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("place")
    (place / "a").symlink_to(folder)
    (place / "b").symlink_to(folder)
    (folder / "up").symlink_to(place)
    assert verify(place) == (2, [])
    write_manifest(folder, kind="shards", config={}, inputs={})
    assert verify(place) == (3, [])
    (folder / "x_test_0.hdf5").write_text("no")
    num_files, problems = verify(place)
    assert num_files == 3
    assert [line.partition(": ")[0] for line in problems] == [f"{place}/a/x_test_0.hdf5"]


def test_folders_that_may_not_be_entered_are_problems() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        (place / "closed").mkdir(mode=0)
        (place / ".incomplete-x").mkdir(mode=0)
        write_shard(place / "x_test_0.hdf5", one_row())
        with nobody():
            num_files, problems = verify(place)
    assert num_files == 1
    assert problems == [
        f"{place}/.incomplete-x can't be read: Permission denied",
        f"{place}/closed can't be read: Permission denied",
    ]


def test_verify_tells_of_what_was_never_completed(tmp_path: Path) -> None:
    (tmp_path / "out" / ".incomplete-wiki").mkdir(parents=True)
    num_files, problems = verify(tmp_path)
    assert num_files == 0
    folder = tmp_path / "out" / ".incomplete-wiki"
    assert problems == [f"{folder}: never completed; run its command again, or remove it"]
