import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.sources import local_source
from data_prep.tables import read_texts
from zerobert.errors import DataError, MissingDependencyError

ROWS = [f"Row {number}. " + "é" * (number % 50) for number in range(1500)]


def read(path: Path, text_field: str = "text") -> list[str | None]:
    return list(read_texts(local_source(path), text_field))


@pytest.mark.parametrize(
    "column",
    [
        pa.array(ROWS),
        pa.array(ROWS, pa.large_string()),
        pa.array(ROWS).dictionary_encode(),
        pa.chunked_array([ROWS[:7], ROWS[7:]]),
    ],
    ids=["string", "large_string", "dictionary", "chunks"],
)
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_the_text_column_is_read_in_order(
    tmp_path: Path, column: pa.Array, compression: str
) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"id": range(1500), "text": column, "other": ["x" * 100] * 1500})
    pq.write_table(table, path, row_group_size=400, compression=compression)
    assert read(path) == ROWS
    seen: list[int] = []
    list(read_texts(local_source(path), "text", seen.append))
    assert 0.9 < sum(seen) / path.stat().st_size <= 1


def test_a_null_is_none_and_no_rows_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None]}), path)
    assert read(path) == ["a", None]
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert read(path) == []


@pytest.mark.parametrize(
    ("columns", "listed"),
    [
        ({"body": ["x"], "id": [1]}, r"body \(string\), id \(int64\)"),
        ({"text": [1]}, r"text \(int64\)"),
        ({"text": [b"x"]}, r"text \(binary\)"),
        ({"text": [None]}, r"text \(null\)"),
        ({"text": [["x"]]}, r"text \(list<element: string>\)"),
        ({"text": [{"a": "x"}]}, r"text \(struct<a: string>\)"),
    ],
)
def test_a_column_without_text_is_refused(
    tmp_path: Path, columns: dict[str, list[object]], listed: str
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(
        DataError, match=rf"a\.parquet: wanted one column 'text' of text, got {listed}; name the"
    ):
        read(path)


def test_damage_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ROWS}), path, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    for broken in (b"", b"PAR1", whole[:-100], whole[: len(whole) // 2], whole[:4] + whole[5000:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.parquet (is no whole Parquet file|can't be read)"):
            read(path)
    at = whole.index("Row 701. é".encode()) + len("Row 701. ")
    path.write_bytes(whole[:at] + b"\xff\xff" + whole[at + 2 :])
    with pytest.raises(DataError, match=r"a\.parquet is no whole Parquet file \('utf-8' codec"):
        read(path)
    packed = tmp_path / "a.parquet.gz"
    packed.write_bytes(b"")
    with pytest.raises(DataError, match="Parquet is packed inside"):
        read(packed)


def test_pyarrow_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match="pip install pyarrow"):
        read(tmp_path / "a.parquet")
