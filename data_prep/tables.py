"""The text column of Parquet files, through pyarrow."""

from collections.abc import Iterable, Iterator
from typing import Any

from data_prep.sources import Source, opened_packed
from data_prep.streams import OnRead
from zerobert.errors import DataError, MissingDependencyError

PARQUET_MAGIC = b"PAR1"
_ROWS_AT_A_TIME = 256
# Pages are read as they are needed, not a row group's whole column at once.
_BUFFER_BYTES = 1 << 20


def read_texts(
    source: Source, text_field: str, on_read: OnRead | None = None
) -> Iterator[str | None]:
    """The cells of the text column, in order; a null is None.

    Raises:
        DataError: no Parquet file, a damaged one, or one without text in the column.
        MissingDependencyError: pyarrow is not installed.
    """
    pyarrow, parquet = _pyarrow(source.name)
    if source.compression:
        raise DataError(
            f"{source.name}: Parquet is packed inside, and read out of order; unpack it first"
        )
    with opened_packed(source) as file:
        try:
            table = parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            check_column(_types(table.schema_arrow), text_field, source.name)
            num_rows = 0
            for batch in table.iter_batches(_ROWS_AT_A_TIME, columns=[text_field]):
                yield from batch.column(0).to_pylist()
                num_rows += batch.num_rows
                if on_read is not None:
                    on_read(source.num_bytes * batch.num_rows // table.metadata.num_rows)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(
                f"{source.name} is no whole Parquet file ({error}); fetch it again"
            ) from error
    if num_rows != table.metadata.num_rows:
        raise DataError(
            f"{source.name}: wanted {table.metadata.num_rows} rows, as its footer says, got "
            f"{num_rows}; fetch it again"
        )


def _pyarrow(name: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"{name}: Parquet is read by pyarrow: pip install pyarrow"
        ) from error
    return pyarrow, pyarrow.parquet


def _types(schema: Any) -> list[tuple[str, str]]:
    return [(field.name, str(field.type)) for field in schema]


def check_column(columns: Iterable[tuple[str, str]], text_field: str, name: str) -> None:
    """Refuse a table that has no such column, or one that holds no text.

    Args:
        columns: names and the names of their Arrow types.

    Raises:
        DataError: lists the columns that there are.
    """
    columns = list(columns)
    types = [kind for column, kind in columns if column == text_field]
    if len(types) != 1 or not _is_text(types[0]):
        listed = ", ".join(f"{column} ({kind})" for column, kind in columns) or "no columns"
        raise DataError(
            f"{name}: wanted one column {text_field!r} of text, got {listed}; name the column with "
            "--text_field"
        )


def _is_text(kind: str) -> bool:
    """Whether an Arrow type is text; a dictionary of texts is."""
    if kind.startswith("dictionary<values="):
        kind = kind.removeprefix("dictionary<values=").partition(",")[0]
    return kind in ("string", "large_string", "string_view")
