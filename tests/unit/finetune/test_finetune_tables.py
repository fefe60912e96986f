import pytest

from finetune.tables import read_rows
from zerobert.errors import DataError


def write(path, text: str, encoding: str = "utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def cells(path, columns, **kwargs):
    return [row for _, row in read_rows(path, columns, **kwargs)]


def test_tab_quotes_are_plain_characters(tmp_path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"She left\t0\n5" nails"\t1\n')
    assert cells(path, ["text", "label"]) == [('"She left', "0"), ('5" nails"', "1")]


def test_tab_csv_quoting_in_a_users_file_is_told(tmp_path, capsys) -> None:
    path = write(tmp_path / "a.tsv", 'text\n"She said ""no"""\n"no" and ""no""\n""\n"\n"a" ""\n')
    wanted = [('"She said ""no"""',), ('"no" and ""no""',), ('""',), ('"',), ('"a" ""',)]
    assert cells(path, ["text"]) == wanted
    assert capsys.readouterr().err == ""
    assert cells(path, ["text"], tells_of_quotes=True) == wanted
    assert "a.tsv: 1 rows are quoted as CSV is" in capsys.readouterr().err


def test_tab_bom_blank_cells_and_a_missing_last_newline(tmp_path) -> None:
    path = write(tmp_path / "a.tsv", "a\tb\tc\n1\t\t3\n\t\tz", "utf-8-sig")
    assert cells(path, ["a", "c"]) == [("1", "3"), ("", "z")]


def test_tab_only_a_newline_ends_a_row(tmp_path) -> None:
    path = write(tmp_path / "a.tsv", "text\tlabel\r\none\x85two\u2028three\x0cfour\t1\r\n")
    assert list(read_rows(path, ["text", "label"])) == [(2, ("one\x85two\u2028three\x0cfour", "1"))]


def test_tab_without_header_takes_the_given_one(tmp_path) -> None:
    path = write(tmp_path / "a.tsv", "x1\t0\t*\tMe go.\nx1\t1\t\tI go.\n")
    header = ("source", "label", "mark", "sentence")
    assert cells(path, ["sentence", "label"], header=header) == [("Me go.", "0"), ("I go.", "1")]


def test_tab_a_blank_line_is_a_row_where_there_is_one_column_alone(tmp_path) -> None:
    one = write(tmp_path / "a.tsv", "text\none\n\nthree\n")
    assert list(read_rows(one, ["text"])) == [(2, ("one",)), (3, ("",)), (4, ("three",))]
    two = write(tmp_path / "b.tsv", "text\tlabel\none\t1\n\nthree\t0\n\n")
    assert cells(two, ["text"]) == [("one",), ("three",)]


def test_tab_wrong_width_names_file_and_line(tmp_path) -> None:
    path = write(tmp_path / "a.tsv", "a\tb\n1\t2\n3\n")
    with pytest.raises(
        DataError, match=r"a\.tsv line 3: wanted 2 columns between TABs \(a, b\), got 1"
    ):
        cells(path, ["a"])


def test_tab_broken_rows_are_left_out_where_the_task_says_so(tmp_path, capsys) -> None:
    path = write(tmp_path / "a.tsv", "a\tb\n1\t2\ntorn\n3\t4\n")
    assert cells(path, ["a"], skips_broken_rows=True) == [("1",), ("3",)]
    assert "left out 1 rows" in capsys.readouterr().err


def test_csv_follows_quotes_and_counts_lines(tmp_path) -> None:
    text = 'text,label\n"one, ""two""\nthree",1\n\nfour,0\n'
    path = write(tmp_path / "a.csv", text)
    assert list(read_rows(path, ["label", "text"])) == [
        (3, ("1", 'one, "two"\nthree')),
        (5, ("0", "four")),
    ]


def test_csv_has_room_for_a_book_in_a_cell(tmp_path) -> None:
    book = "word " * 100_000
    assert cells(write(tmp_path / "a.csv", f"t,y\n{book},1\n"), ["t"]) == [(book,)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2,3\n", r"line 2: wanted 2 columns between commas \(a, b\), got 3"),
        ('a,b\n"open,1\n', r"line 2: not CSV: unexpected end"),
        ("", "the file is empty"),
    ],
)
def test_csv_faults(tmp_path, text: str, message: str) -> None:
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(DataError, match=message):
        cells(path, ["a", "b"])


def test_jsonl_takes_strings_numbers_and_truth(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", '{"t": "x", "y": 1}\n\n{"y": true, "t": "z"}\n')
    assert list(read_rows(path, ["t", "y"])) == [(1, ("x", "1")), (3, ("z", "true"))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"t": ' + "9" * 5000 + "}", "line 1: not JSON: Exceeds the limit"),
        ('{"t": ' + "[" * 100_000 + "}", "line 1: not JSON: maximum recursion"),
        ("[1]", r"line 1: wanted an object \{\.\.\.\}, got '\[1\]'"),
        ('{"t": "x"}', "line 1: wanted a string or a number in 'y', got only 't'"),
        ('{"t": "x", "y": null}', "in 'y', got None"),
        ('{"t": "x \\ud83d", "y": 1}', "line 1: 't' has half of a UTF-16 character"),
    ],
)
def test_jsonl_faults(tmp_path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cells(write(tmp_path / "a.jsonl", line + "\n"), ["t", "y"])


@pytest.mark.parametrize(("name", "line"), [("a.csv", "text;label"), ("a.tsv", "text,label")])
def test_cells_between_other_marks_are_told(tmp_path, name: str, line: str) -> None:
    path = write(tmp_path / name, f"{line}\none,1\n")
    with pytest.raises(DataError, match=r"no column 'label'.*; TSV has TABs between its cells"):
        cells(path, ["label"])


def test_missing_column_names_those_that_are_there(tmp_path) -> None:
    path = write(tmp_path / "a.tsv", "text\tstars\n")
    with pytest.raises(DataError, match="line 1: no column 'label'; its columns are 'text', 'st"):
        cells(path, ["text", "label"])


@pytest.mark.parametrize(("name", "line"), [("a.tsv", "t\ty\tt\n"), ("a.csv", "t,y,t\n")])
def test_a_column_that_is_there_twice_is_refused(tmp_path, name: str, line: str) -> None:
    path = write(tmp_path / name, line)
    assert cells(path, ["y"]) == []
    with pytest.raises(DataError, match="line 1: 2 columns 't', wanted one; rename them"):
        cells(path, ["t"])


def test_empty_missing_and_foreign_files(tmp_path) -> None:
    with pytest.raises(DataError, match="the file is empty"):
        cells(write(tmp_path / "a.tsv", ""), ["a"])
    with pytest.raises(DataError, match=r"b\.tsv: no such file"):
        cells(tmp_path / "b.tsv", ["a"])
    with pytest.raises(DataError, match="wanted UTF-8 text, got the byte 0xe9"):
        cells(write(tmp_path / "c.tsv", "a\tb\ncafé\t1\n", "latin-1"), ["a"])
