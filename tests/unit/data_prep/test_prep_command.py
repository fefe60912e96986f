"""What the command line makes of its arguments, in this process."""

import io
import os
import tempfile
from pathlib import Path

import pytest

from data_prep.__main__ import _input_files, _print_path, main
from tests.conftest import nobody
from zerobert.errors import DataError


def test_a_long_list_of_files_is_a_list(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.txt" for number in range(100)]
    for path in files:
        path.write_text("One.\n")
    assert _input_files(",".join(map(str, files))) == files
    (tmp_path / "a,b.txt").write_text("One.\n")
    assert _input_files(str(tmp_path / "a,b.txt")) == [tmp_path / "a,b.txt"]
    assert len(_input_files(str(tmp_path))) == 101
    with pytest.raises(DataError, match="none: no such file"):
        _input_files(f"{files[0]},none")
    with pytest.raises(DataError, match="xxx can't be read: File name too long"):
        _input_files("x" * 300)


def test_a_place_that_can_not_be_written_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        (place / "text").mkdir()
        (place / "text" / "a.txt").write_text("One.\n")
        (place / "closed").mkdir(mode=0o555)
        flags = ["--input_dir", f"{place}/text", "--output", f"{place}/closed/v.txt"]
        monkeypatch.setattr("sys.argv", ["data_prep", "vocab", *flags])
        monkeypatch.setattr("zerobert.tokenizer.train_vocabulary", None)
        with nobody(), pytest.raises(DataError, match=r"cannot write .*v\.txt: Permission denied"):
            main()


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_a_path_is_printed_in_its_own_bytes(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    monkeypatch.setattr("sys.stdout", stdout)
    print("Before.")
    _print_path(Path(os.fsdecode("/テ/".encode() + b"\xff")))
    stdout.flush()
    assert raw.getvalue() == b"Before.\n" + "/テ/".encode() + b"\xff\n"
    monkeypatch.setattr("sys.stdout", None)
    _print_path(Path("a"))


def test_rows_are_shown_on_any_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding="latin-1", errors="strict")
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr("sys.argv", ["data_prep", "inspect", "x"])
    monkeypatch.setattr("data_prep.look.inspect_shards", lambda *_, num_rows: ["é 茶"])
    assert main() == 0
    stdout.flush()
    assert raw.getvalue() == b"\xe9 \\u8336\n"
