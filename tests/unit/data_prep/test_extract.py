import json
from pathlib import Path

import pytest

from data_prep import extract
from data_prep.extract import TextConfig, extract_text
from zerobert.errors import ConfigError, DataError
from zerobert.manifest import read_manifest, verify_folder


def write_records(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_documents_become_sentences_with_a_blank_line_between(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.jsonl", ["One. Two!", " ", "Three is here."])
    summary = extract_text([source], tmp_path / "out", TextConfig(), workers=1)
    assert (tmp_path / "out" / "part_00000.txt").read_text() == "One.\nTwo!\n\nThree is here.\n\n"
    manifest = verify_folder(tmp_path / "out")
    assert manifest.kind == "text"
    assert manifest.config == {"format": "auto", "text_field": "text", "language": "en"}
    assert list(manifest.inputs) == [str(source)]
    del summary["seconds"]
    assert summary == {
        "bytes": 27,
        "documents": 2,
        "empty documents": 1,
        "sentences": 3,
        "words": 5,
    }


def test_workers_and_parts_do_not_change_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        f"This is text {number}. It is {'very ' * (number % 7)}short." for number in range(500)
    ]
    source = write_records(tmp_path / "a.jsonl", texts)
    extract_text([source], tmp_path / "one", TextConfig(), workers=1)
    monkeypatch.setattr(extract, "_BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(extract, "_PART_BYTES", 5000)
    extract_text([source], tmp_path / "two", TextConfig(), workers=2)
    parts = sorted((tmp_path / "two").glob("part_*.txt"))
    assert len(parts) > 3
    assert (
        "".join(part.read_text() for part in parts)
        == (tmp_path / "one" / "part_00000.txt").read_text()
    )
    assert all(part.read_text().endswith("\n\n") for part in parts)


def test_a_done_folder_is_left_alone_and_another_one_is_not_replaced(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.jsonl", ["One. Two!"])
    out = tmp_path / "out"
    first = extract_text([source], out, TextConfig(), workers=1)
    written = (out / "part_00000.txt").stat().st_mtime_ns
    assert extract_text([source], out, TextConfig(), workers=1) == first
    assert (out / "part_00000.txt").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="made with language 'en' instead of 'de'"):
        extract_text([source], out, TextConfig(language="de"), workers=1)
    write_records(source, ["Changed."])
    with pytest.raises(ConfigError, match="made from other text"):
        extract_text([source], out, TextConfig(), workers=1)


def test_a_users_folder_is_never_replaced(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.jsonl", ["One. Two!"])
    with pytest.raises(ConfigError, match="holds files that this command did not write"):
        extract_text([source], tmp_path, TextConfig(), workers=1)
    assert source.exists()


def test_nothing_is_left_behind_by_a_failure(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.jsonl", ["One. Two!"])
    broken = tmp_path / "b.jsonl"
    broken.write_text("{oops\n")
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: not JSON"):
        extract_text([source, broken], tmp_path / "out", TextConfig(), workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("text", ["", " \n\n", "...\n\n--\n"])
def test_no_text_is_an_error(tmp_path: Path, text: str) -> None:
    source = tmp_path / "a.txt"
    source.write_text(text)
    with pytest.raises(DataError, match=r"no text in .*a\.txt: 1 empty documents"):
        extract_text([source], tmp_path / "out", TextConfig(), workers=1)
    assert not (tmp_path / "out").exists()


def test_the_summary_is_kept(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.jsonl", ["One. Two!"])
    summary = extract_text([source], tmp_path / "out", TextConfig(), workers=1)
    assert read_manifest(tmp_path / "out").summary == summary
