import re
import tempfile
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.conftest import nobody
from zerobert.errors import ConfigError, DataError, ShardFormatError
from zerobert.manifest import write_manifest
from zerobert.shards import (
    DTYPES,
    ShardInfo,
    check_values,
    describe_shard,
    empty_arrays,
    find_shards,
    read_rows,
    read_shard,
    shard_lower_case,
    shard_vocabulary,
    write_shard,
)


def make_arrays(num_rows: int = 3, seq_length: int = 8, max_predictions: int = 2) -> dict[str, Any]:
    """Rows `[CLS] 5 6 [SEP] 7 [SEP]` with one mask, padded."""
    arrays = {
        name: np.zeros((num_rows, seq_length), dtype)
        for name, dtype in DTYPES.items()
        if name in ("input_ids", "input_mask", "segment_ids")
    }
    arrays["input_ids"][:, :6] = [2, 5, 4, 3, 7, 3]
    arrays["input_mask"][:, :6] = 1
    arrays["segment_ids"][:, 4:6] = 1
    for name in ("masked_lm_positions", "masked_lm_ids"):
        arrays[name] = np.zeros((num_rows, max_predictions), DTYPES[name])
    arrays["masked_lm_positions"][:, 0] = 2
    arrays["masked_lm_ids"][:, 0] = 6
    arrays["next_sentence_labels"] = (np.arange(num_rows) % 2).astype("i1")
    return arrays


def write_plain(path: Path, arrays: dict[str, Any]) -> None:
    """What any other program would write: h5py with its defaults."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip")


def test_a_shard_read_back_is_what_was_written(tmp_path: Path) -> None:
    arrays = make_arrays(num_rows=20_000)
    arrays["input_ids"][:, 1] = np.arange(20_000)
    path = tmp_path / "a_training_0.hdf5"
    write_shard(path, arrays)
    assert describe_shard(path) == ShardInfo(
        path=path,
        num_rows=20_000,
        seq_length=8,
        max_predictions=2,
        chunks=(*((16_384, 8),) * 3, *((16_384, 2),) * 2, (16_384,)),
    )
    assert describe_shard(path).chunk_rows == 16_384
    again = read_shard(path)
    assert list(again) == list(DTYPES)
    for name, dtype in DTYPES.items():
        assert again[name].dtype == dtype
        np.testing.assert_array_equal(again[name], arrays[name])


def test_any_h5py_reads_it_by_rows(tmp_path: Path) -> None:
    path = tmp_path / "a_training_0.hdf5"
    write_shard(path, make_arrays(num_rows=20_000))
    with h5py.File(path, "r") as file:
        assert {name: dataset.chunks for name, dataset in file.items()} == {
            "input_ids": (16_384, 8),
            "input_mask": (16_384, 8),
            "segment_ids": (16_384, 8),
            "masked_lm_positions": (16_384, 2),
            "masked_lm_ids": (16_384, 2),
            "next_sentence_labels": (16_384,),
        }
        assert {dataset.compression for dataset in file.values()} == {"gzip"}


@pytest.mark.parametrize(
    "layout",
    [
        {"compression": "gzip"},
        {"compression": "gzip", "chunks": (7, 3)},  # columns that the width cuts
        {"compression": "gzip", "shuffle": True},
        {"compression": "lzf"},
        {"chunks": (100, 8)},
        {},
    ],
    ids=str,
)
def test_rows_are_read_from_any_layout(layout: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a_training_0.hdf5"
    random = np.random.default_rng(0)
    arrays = {
        name: random.integers(0, 100, array.shape).astype(array.dtype)
        for name, array in make_arrays(num_rows=1000).items()
    }
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            shape = tuple(layout.get("chunks", ())[: array.ndim])
            chunks = tuple(map(min, shape, array.shape)) or None
            file.create_dataset(name, data=array, **{**layout, "chunks": chunks})
    shard = describe_shard(path)
    parts = {0: 1000, 1: 2, 999: 1000, 6: 8, 123: 456}
    wanted = {first: empty_arrays(shard, stop - first) for first, stop in parts.items()}
    read_rows(shard, wanted)
    for first, got in wanted.items():
        for name, dtype in DTYPES.items():
            assert got[name].dtype == dtype
            np.testing.assert_array_equal(got[name], arrays[name][first : parts[first]])


def test_a_chunk_that_was_stored_without_the_filter_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a_training_0.hdf5"
    arrays = make_arrays(num_rows=256)
    write_shard(path, arrays)
    with h5py.File(path, "r+") as file:
        file["input_ids"].id.write_direct_chunk((0, 0), arrays["input_ids"].tobytes(), 1)
    np.testing.assert_array_equal(read_shard(path)["input_ids"], arrays["input_ids"])


def test_a_chunk_of_another_size_than_it_says_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a_training_0.hdf5"
    write_shard(path, make_arrays(num_rows=256))
    for raw in (bytes(100), bytes(100_000)):
        with h5py.File(path, "r+") as file:
            file["input_ids"].id.write_direct_chunk((0, 0), zlib.compress(raw))
        with pytest.raises(ShardFormatError, match="is not HDF5 or is damaged"):
            read_shard(path)


def test_the_same_arrays_give_the_same_bytes_and_leave_nothing_else(tmp_path: Path) -> None:
    for name in ("a.hdf5", "b.hdf5"):
        write_shard(tmp_path / name, make_arrays())
    assert (tmp_path / "a.hdf5").read_bytes() == (tmp_path / "b.hdf5").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.hdf5", "b.hdf5"]


def test_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardFormatError, match="no rows to write"):
        write_shard(tmp_path / "a.hdf5", make_arrays(num_rows=0))
    write_plain(
        tmp_path / "b.hdf5", make_arrays(num_rows=0) | {"next_sentence_labels": np.zeros(0, "i1")}
    )
    with pytest.raises(ShardFormatError, match="has no rows"):
        describe_shard(tmp_path / "b.hdf5")


def test_a_folder_that_is_missing_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write .*none/a\.hdf5: No such file"):
        write_shard(tmp_path / "none" / "a.hdf5", make_arrays())


def test_each_breach_of_the_schema_has_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "a_training_0.hdf5"

    def refuse(arrays: dict[str, Any], match: str) -> None:
        write_plain(path, arrays)
        with pytest.raises(ShardFormatError, match=match):
            describe_shard(path)

    good = make_arrays()
    refuse(
        {name: array for name, array in good.items() if name != "segment_ids"},
        "the dataset segment_ids is missing; wanted input_ids, .*, got input_ids, input_mask",
    )
    refuse(
        good | {"input_ids": good["input_ids"].astype("i8")},
        "input_ids wanted type int32, got int64",
    )
    refuse(good | {"masked_lm_ids": good["masked_lm_ids"][:, 0]}, "masked_lm_ids wanted 2 axes")
    refuse(
        good | {"input_mask": good["input_mask"][:2]},
        re.escape("input_mask wanted shape [3, 8]"),
    )
    refuse(
        good | {"masked_lm_ids": np.zeros((3, 5), "i4")},
        re.escape("masked_lm_ids wanted shape [3, 2]"),
    )


def test_names_that_are_no_text_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "a_training_0.hdf5"
    with h5py.File(path, "w") as file:
        for name in (b"ids", b"input_\xff"):
            file.create_dataset(name, data=[1])
    with pytest.raises(ShardFormatError, match=r"input_ids is missing; wanted .*, got .*\bids"):
        describe_shard(path)


def test_what_is_not_hdf5_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a_training_0.hdf5"
    with pytest.raises(DataError, match="no such shard"):
        read_shard(path)
    with pytest.raises(DataError, match="File name too long"):
        read_shard(tmp_path / ("x" * 300))
    path.write_text("hello")
    with pytest.raises(ShardFormatError, match="is not HDF5 or is damaged"):
        read_shard(path)
    write_shard(path, make_arrays())
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ShardFormatError, match="is not HDF5 or is damaged"):
        read_shard(path)


def test_a_damaged_chunk_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a_training_0.hdf5"
    arrays = make_arrays(num_rows=256)
    arrays["input_ids"][:] = np.random.default_rng(0).integers(0, 30000, arrays["input_ids"].shape)
    write_shard(path, arrays)
    with h5py.File(path, "r") as file:
        offset = file["input_ids"].id.get_chunk_info(0).byte_offset
    raw = bytearray(path.read_bytes())
    raw[offset : offset + 200] = bytes(200)
    path.write_bytes(raw)
    describe_shard(path)
    with pytest.raises(ShardFormatError, match="is not HDF5 or is damaged"):
        read_shard(path)


def test_good_values_pass() -> None:
    check_values(make_arrays(), vocab_size=8, where="x")
    check_values(make_arrays(), vocab_size=None, where="x")


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("input_ids", (1, 1), 8, "x: input_ids wanted 0 to 7, got 8 in row 1 (1 such values)"),
        ("input_ids", (1, 1), -1, "x: input_ids wanted 0 to 7, got -1 in row 1"),
        ("input_mask", (2, 0), 2, "x: input_mask wanted 0 to 1, got 2 in row 2"),
        (
            "input_mask",
            (2, slice(None)),
            0,
            "x: input_mask wanted a token in each row, got 0 in row 2",
        ),
        ("input_mask", (2, 3), 0, "x: input_mask wanted ones, then zeros, got 1 in row 2"),
        ("segment_ids", (0, 5), -1, "x: segment_ids wanted 0 to 1, got -1"),
        ("masked_lm_positions", (0, 1), 8, "x: masked_lm_positions wanted 0 to 7, got 8"),
        ("masked_lm_positions", (0, 1), 6, "x: masked_lm_positions wanted a place inside the text"),
        ("masked_lm_positions", (0, 0), 0, None),
        ("masked_lm_ids", (1, 0), 8, "x: masked_lm_ids wanted 0 to 7, got 8 in row 1"),
        ("next_sentence_labels", (1,), 2, "x: next_sentence_labels wanted 0 to 1, got 2 in row 1"),
    ],
)
def test_each_value_out_of_range_is_named(
    name: str, place: tuple[int, ...], value: int, message: str | None
) -> None:
    arrays = make_arrays()
    arrays[name][place] = value
    if message is None:
        check_values(arrays, vocab_size=8, where="x")
        return
    with pytest.raises(ShardFormatError, match=re.escape(message)):
        check_values(arrays, vocab_size=8, where="x")


def test_a_position_behind_the_end_of_the_list_is_refused() -> None:
    arrays = make_arrays()
    arrays["masked_lm_positions"][1] = [0, 2]
    with pytest.raises(ShardFormatError, match="only zeros after the first 0, got 2 in row 1"):
        check_values(arrays, vocab_size=8, where="x")
    with pytest.raises(ShardFormatError, match="got 2 in row 71"):
        check_values(arrays, vocab_size=8, where="x", first_row=70)


def test_shards_are_found_by_name_below_the_folders(tmp_path: Path) -> None:
    for name in (
        "b/x_training_1.hdf5",
        "b/x_training_0.h5",
        "a/x_test_0.hdf5",
        "a/latest_training_0.hdf5",
        "a/other.hdf5",
        ".incomplete-c/x_training_0.hdf5",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_shard(tmp_path / name, make_arrays())
    (tmp_path / "a" / "training.txt").write_text("not a shard")

    def names(*folders: Path) -> list[str]:
        return [str(shard.path.relative_to(tmp_path)) for shard in find_shards(folders, "training")]

    assert names(tmp_path) == [
        "a/latest_training_0.hdf5",
        "b/x_training_0.h5",
        "b/x_training_1.hdf5",
    ]
    assert names(tmp_path / "b", tmp_path) == [
        "b/x_training_0.h5",
        "b/x_training_1.hdf5",
        "a/latest_training_0.hdf5",
    ]
    assert [shard.path.name for shard in find_shards([tmp_path], "test")] == ["x_test_0.hdf5"]
    assert find_shards([tmp_path / "none"], "training") == []


def test_a_folder_that_may_not_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_shard(folder / "a_training_0.hdf5", make_arrays())
        (folder / "closed").mkdir(mode=0)
        with nobody(), pytest.raises(DataError, match="closed can't be read: Permission denied"):
            find_shards([folder], "training")


def test_shards_of_two_lengths_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a_training_0.hdf5", make_arrays())
    write_shard(tmp_path / "a_training_1.hdf5", make_arrays(seq_length=16))
    with pytest.raises(ConfigError, match="has sequences of 16 with 2 predictions"):
        find_shards([tmp_path], "training")


def test_the_vocabulary_beside_the_shards(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "x_training_0.hdf5", make_arrays())
    assert shard_vocabulary([tmp_path]) is None
    for folder in ("a", "b"):
        (tmp_path / folder / "vocab.txt").write_text("[PAD]\n")
    assert shard_vocabulary([tmp_path]) in (tmp_path / "a/vocab.txt", tmp_path / "b/vocab.txt")
    (tmp_path / "b" / "vocab.txt").write_text("[PAD]\nb\n")
    with pytest.raises(ConfigError, match="different vocabularies"):
        shard_vocabulary([tmp_path])
    assert shard_vocabulary([tmp_path / "b"]) == tmp_path / "b" / "vocab.txt"
    (tmp_path / "c" / "vocab.txt").symlink_to("x" * 300)
    with pytest.raises(DataError, match=r"c/vocab\.txt can't be read: File name too long"):
        shard_vocabulary([tmp_path / "c"])


def test_the_case_of_the_shards(tmp_path: Path) -> None:
    lower = tmp_path / "hdf5_lower_case_1_seq_len_8" / "books"
    cased = tmp_path / "hdf5_lower_case_0_seq_len_8"
    ours = tmp_path / "ours"
    for folder in (lower, cased, ours):
        folder.mkdir(parents=True)
        write_shard(folder / "x_training_0.hdf5", make_arrays())
    assert shard_lower_case([lower]) is True
    assert shard_lower_case([cased]) is False
    assert shard_lower_case([ours]) is None
    with pytest.raises(ConfigError, match="some shards are lower-cased and some are not"):
        shard_lower_case([tmp_path])
    write_manifest(ours, kind="shards", config={"do_lower_case": False}, inputs={})
    assert shard_lower_case([ours]) is False
