"""Rows of the tables that tasks come in: TAB-separated as GLUE's, CSV and JSON lines.

GLUE's files are plain lines of cells between tabs: a quote is a character like any other, and a csv
reader that takes it for more swallows rows. Every fault is a `DataError` with file and line.
"""

import contextlib
import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zerobert.errors import DataError, print_aside

_MAX_CELL = 2**31 - 1


def read_rows(
    path: Path,
    columns: Sequence[str],
    *,
    header: Sequence[str] = (),
    skips_broken_rows: bool = False,
    tells_of_quotes: bool = False,
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield each row's line number and its cells of `columns`; the file's suffix tells its format.

    Args:
        header: the columns of a TAB-separated file whose first line does not name them.
        skips_broken_rows: leave out rows of another width and say how many; else it is an error.
        tells_of_quotes: say so where a TAB-separated file is quoted as CSV, which is not undone.

    Raises:
        DataError: the file is missing, not UTF-8, lacks a column, or has a row of another width.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with _reading(path):
        match path.suffix.lower():
            case ".csv":
                yield from _csv_rows(path, columns)
            case ".jsonl" | ".json":
                yield from _json_rows(path, columns)
            case _:
                yield from _tab_rows(path, columns, header, skips_broken_rows, tells_of_quotes)


def read_header(path: Path) -> list[str]:
    """The columns that the first line of a TAB-separated file names.

    Raises:
        DataError: the file can't be read.
    """
    with _reading(path):
        return next(_lines(path), (0, ""))[1].split("\t")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong into a `DataError` that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{path}: wanted UTF-8 text, got the byte 0x{byte:02x}; convert it to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Only "\n" ends a line: str.splitlines would also cut at characters that sentences contain.
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            yield number, line.rstrip("\r\n")


def _tab_rows(
    path: Path,
    columns: Sequence[str],
    header: Sequence[str],
    skips_broken_rows: bool,
    tells_of_quotes: bool,
) -> Iterator[tuple[int, tuple[str, ...]]]:
    lines = _lines(path)
    if not header:
        header = next(lines, (0, ""))[1].split("\t")
    indices = _find_columns(path, header, columns)
    num_broken = num_quoted = 0
    for number, line in lines:
        if not line and len(header) > 1:
            continue  # no row; in a table of one column it is one without a text
        cells = line.split("\t")
        if len(cells) == len(header):
            chosen = tuple(cells[index] for index in indices)
            if tells_of_quotes:
                num_quoted += any(map(_is_csv_quoted, chosen))
            yield number, chosen
        elif skips_broken_rows:
            num_broken += 1
        else:
            raise _wrong_width(path, number, header, cells, "TAB")
    if num_broken:
        print_aside(f"warning: {path}: left out {num_broken} rows torn by line breaks")
    if num_quoted:
        print_aside(
            f"warning: {path}: {num_quoted} rows are quoted as CSV is; between tabs a quote is a "
            "character like any other and stays in the text: write the file without quoting, or "
            "as .csv with commas"
        )


def _is_csv_quoted(cell: str) -> bool:
    """Whether a cell looks like what a CSV writer makes of a text with quotes in it."""
    inner = cell[1:-1]
    is_between_quotes = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return is_between_quotes and '""' in inner and '"' not in inner.replace('""', "")


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    csv.field_size_limit(_MAX_CELL)  # the library's own would refuse a long text
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            indices = _find_columns(path, header, columns)
            for cells in reader:
                if len(cells) == len(header):
                    yield reader.line_num, tuple(cells[index] for index in indices)
                elif cells:
                    raise _wrong_width(path, reader.line_num, header, cells, "comma")
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: not CSV: {error}") from error


def _wrong_width(
    path: Path, line: int, header: Sequence[str], cells: Sequence[str], separator: str
) -> DataError:
    return DataError(
        f"{path} line {line}: wanted {len(header)} columns between {separator}s "
        f"({', '.join(header)}), got {len(cells)}"
    )


def _find_columns(path: Path, header: Sequence[str], columns: Sequence[str]) -> list[int]:
    if header in ([], [""]):
        raise DataError(f"{path}: the file is empty")
    for column in columns:
        if column not in header:
            known = ", ".join(map(repr, header))
            is_other = len(header) == 1 and column in re.split("[;,\t|]", header[0])
            hint = "; TSV has TABs between its cells, CSV commas" if is_other else ""
            raise DataError(f"{path} line 1: no column {column!r}; its columns are {known}{hint}")
        if (count := header.count(column)) > 1:
            raise DataError(f"{path} line 1: {count} columns {column!r}, wanted one; rename them")
    return [header.index(column) for column in columns]


def _json_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    for number, line in _lines(path):
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # digits or brackets by the thousand
            raise DataError(f"{path} line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number}: wanted an object {{...}}, got {line[:40]!r}")
        yield number, tuple(_json_cell(row, column, path, number) for column in columns)


def _json_cell(row: dict[str, Any], column: str, path: Path, line: int) -> str:
    value = row.get(column)
    if isinstance(value, str):
        if not is_text(value):
            raise DataError(
                f"{path} line {line}: {column!r} has half of a UTF-16 character; write it in full"
            )
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    got = f"{value!r}" if column in row else f"only {', '.join(map(repr, row))}"
    raise DataError(f"{path} line {line}: wanted a string or a number in {column!r}, got {got}")


def one_line(text: str) -> str:
    """A text as a cell of a TAB-separated file."""
    return " ".join(text.split())


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it; JSON can spell halves of characters, which no text has."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
