import gzip
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import extract, parts
from data_prep.config import TextConfig
from data_prep.extract import extract_text
from data_prep.parts import Piece
from zerobert.errors import ConfigError, DataError
from zerobert.manifest import FileRecord, read_manifest, staging_path, verify_folder

ROOT = Path(__file__).resolve().parents[3]


def run(source: Path | str, output: Path, *, workers: int = 1, **settings: Any) -> dict[str, Any]:
    return extract_text([str(source)], output, TextConfig(**settings), workers=workers)


def write_records(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def files(folder: Path) -> dict[str, FileRecord]:
    return verify_folder(folder).files


def counts(folder: Path) -> dict[str, Any]:
    summary = dict(read_manifest(folder).summary)
    del summary["seconds"]
    return summary


def test_documents_become_sentences_with_a_blank_line_between(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.jsonl", ["One. Two!", " ", "Three is here."])
    summary = run(source, tmp_path / "out")
    assert (tmp_path / "out" / "part_00000.txt").read_text() == "One.\nTwo!\n\nThree is here.\n\n"
    manifest = verify_folder(tmp_path / "out")
    assert manifest.kind == "text"
    assert manifest.config == {
        "format": "auto",
        "text_field": "text",
        "language": "en",
        "document_break": "file",
        "dataset_config_name": None,
        "dataset_split": "train",
    }
    assert list(manifest.inputs) == [str(source)]
    assert manifest.summary == summary
    assert counts(tmp_path / "out") == {
        "bytes": 27,
        "documents": 2,
        "empty documents": 1,
        "sentences": 3,
        "words": 5,
    }
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name[0] == "."] == []


def test_workers_and_parts_do_not_change_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        f"This is text {number}. It is {'very ' * (number % 7)}short." for number in range(500)
    ]
    source = write_records(tmp_path / "a.jsonl", texts)
    run(source, tmp_path / "one")
    monkeypatch.setattr(extract, "_BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(parts, "_PART_BYTES", 5000)
    run(source, tmp_path / "two", workers=2)
    written = sorted((tmp_path / "two").glob("part_*.txt"))
    assert len(written) > 3
    assert (
        "".join(part.read_text() for part in written)
        == (tmp_path / "one" / "part_00000.txt").read_text()
    )
    assert all(part.read_text().endswith("\n\n") for part in written)


def test_a_done_folder_is_left_alone_and_another_one_is_not_replaced(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.jsonl", ["One. Two!"])
    out = tmp_path / "out"
    first = run(source, out)
    written = (out / "part_00000.txt").stat().st_mtime_ns
    assert run(source, out) == first
    assert (out / "part_00000.txt").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="made with language 'en' instead of 'de'"):
        run(source, out, language="de")
    write_records(source, ["Changed."])
    with pytest.raises(ConfigError, match="made from other text"):
        run(source, out)


@pytest.mark.parametrize("output", [".", "text/out"])
def test_an_output_inside_the_input_is_refused(tmp_path: Path, output: str) -> None:
    write_records(tmp_path / "a.jsonl", ["One. Two!"])
    with pytest.raises(ConfigError, match="lies inside --input"):
        run(tmp_path, tmp_path / output)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_link_to_an_empty_folder_is_filled_where_it_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_records(tmp_path / "a.jsonl", ["One. Two!"])
    (tmp_path / "disk" / "here").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/here")
    run(source, tmp_path / "out")
    assert "part_00000.txt" in files(tmp_path / "disk" / "here")
    assert (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "disk", "out"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    run(source, Path())
    assert "part_00000.txt" in files(tmp_path / "empty")


def test_a_users_folder_is_never_replaced(tmp_path: Path) -> None:
    source = write_records(tmp_path / "a.jsonl", ["One. Two!"])
    with pytest.raises(ConfigError, match="holds files that this command did not write"):
        run(source, tmp_path)
    assert source.exists()


def test_nothing_is_left_behind_by_a_failure_before_the_first_part(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", ["One. Two!"])
    (tmp_path / "b.jsonl").write_text("{oops\n")
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: not JSON"):
        extract_text(
            [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
            tmp_path / "out",
            TextConfig(),
            workers=1,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("text", ["", " \n\n", "...\n\n--\n"])
def test_no_text_is_an_error(tmp_path: Path, text: str) -> None:
    source = tmp_path / "a.txt"
    source.write_text(text)
    with pytest.raises(DataError, match=r"no text in .*a\.txt: 1 empty documents"):
        run(source, tmp_path / "out")
    with pytest.raises(DataError, match=r"no text in .*a\.txt: ([12] empty|no document was found)"):
        run(source, tmp_path / "out", document_break="blank_line")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_inputs_of_all_kinds_at_once(tmp_path: Path) -> None:
    sources = tmp_path / "in"
    sources.mkdir()
    write_records(sources / "a.jsonl", ["One."])
    pq.write_table(pa.table({"text": ["Two.", None]}), sources / "b.parquet")
    (sources / "c.txt").write_text("Three.\n\nFour.")
    (sources / "d.md").write_text("# Five\n\n*Six.*")
    (sources / "e").write_text('<doc id="1">\nTitle\n\nSeven.\n</doc>\n')
    (sources / os.fsdecode(b"f\xff.txt")).write_text("Eight.")
    (sources / "g.txt").write_text("")
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/text/h.txt", b"Nine.")
    settings = TextConfig(document_break="blank_line")
    both = [str(sources), "memory://text"]
    extract_text(both, tmp_path / "out", settings, workers=1)
    assert (tmp_path / "out/part_00000.txt").read_text() == (
        "One.\n\nTwo.\n\nThree.\n\nFour.\n\nFive\nSix.\n\nSeven.\n\nEight.\n\nNine.\n\n"
    )
    assert counts(tmp_path / "out")["empty documents"] == 1
    assert [Path(name).name for name in read_manifest(tmp_path / "out").inputs] == [
        *("a.jsonl", "b.parquet", "c.txt", "d.md", "e", "f\\xff.txt", "g.txt", "h.txt"),
    ]
    assert extract_text(both, tmp_path / "out", settings, workers=1)["documents"] == 8
    filesystem.rm("/text", recursive=True)


def test_a_dataset_is_text_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": ["One. Two.", None, "Three."]})
    rows.save_to_disk(tmp_path / "saved")
    run(tmp_path / "saved", tmp_path / "out", format="hf", text_field="body")
    assert (tmp_path / "out/part_00000.txt").read_text() == "One.\nTwo.\n\nThree.\n\n"
    assert counts(tmp_path / "out")["empty documents"] == 1


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_the_bytes_read_where_somebody_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "A line of text.\n" * 5000
    sources = tmp_path / "in"
    sources.mkdir()
    (sources / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    pq.write_table(pa.table({"text": [text], "id": [1]}), sources / "b.parquet")
    size = sum(path.stat().st_size for path in sources.iterdir())
    terminal, pipe = _Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(sources, tmp_path / "out")
    last = terminal.getvalue().rstrip().rpartition("\r")[2]
    assert re.match(rf"text: 100%.* {size / 1000:.2f}k/{size / 1000:.2f}k \[", last)
    monkeypatch.setattr(sys, "stderr", pipe)
    run(sources, tmp_path / "again")
    assert pipe.getvalue() == ""


def test_equal_inputs_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = tmp_path / "in"
    sources.mkdir()
    for name in ("a.txt", "b.txt"):
        (sources / name).write_text("The same.")
    run(sources, tmp_path / "out")
    assert capsys.readouterr().err == (
        f"warning: {sources}/b.txt holds the same as {sources}/a.txt\n"
    )
    assert counts(tmp_path / "out")["documents"] == 2


def test_an_input_that_goes_or_changes_on_the_way_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "in"
    sources.mkdir()
    for name in ("a.txt", "b.txt"):
        (sources / name).write_text(f"{name} is here.")
    identify = extract._identify

    def lose(found_sources: Any) -> dict[str, str]:
        found = identify(found_sources)
        (sources / "b.txt").unlink()
        return found

    monkeypatch.setattr(extract, "_identify", lose)
    with pytest.raises(DataError, match=r"b\.txt: no such file"):
        run(sources, tmp_path / "out")

    def grow(found_sources: Any) -> dict[str, str]:
        found = identify(found_sources)
        (sources / "a.txt").write_text("a.txt is still being written.")
        return found

    monkeypatch.setattr(extract, "_identify", grow)
    with pytest.raises(DataError, match=r"a\.txt was changed while it was read"):
        run(sources, tmp_path / "out")


def write_wiki(folder: Path) -> Path:
    """Two dumps and a file of records: counts come from their readers and from the splitting."""
    folder.mkdir()
    for name in ("a", "c"):
        pages = "".join(
            f"<page><ns>{number % 5 == 4}</ns></page>".replace("True", "1").replace("False", "0")
            + f"<page><ns>0</ns>{'<redirect/>' * (number % 3 == 0)}<revision><text>"
            + f"Article {name} {number} is here. It ends.\n{{{{open\n</text></revision></page>"
            for number in range(60)
        )
        (folder / f"{name}.xml").write_text(f"<mediawiki>{pages}</mediawiki>")
    write_records(
        folder / "b.jsonl", [f"Text {number}." * (number % 4 != 3) for number in range(90)]
    )
    return folder


@pytest.fixture
def wiki(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(extract, "_BATCH_CHARACTERS", 300)
    monkeypatch.setattr(parts, "_PART_BYTES", 400)
    return write_wiki(tmp_path / "in")


class _BrokenOffError(Exception):
    pass


def break_off(monkeypatch: pytest.MonkeyPatch, num_pieces: int) -> None:
    """Let the next run end in an error after so many documents are split."""
    whole = parts.write_parts

    def broken(folder: Path, pieces: Iterator[Piece], *rest: Any) -> Any:
        def some() -> Iterator[Piece]:
            for number, piece in enumerate(pieces):
                if number == num_pieces:
                    raise _BrokenOffError
                yield piece

        return whole(folder, some(), *rest)

    monkeypatch.setattr(extract, "write_parts", broken)


@pytest.mark.parametrize("num_pieces", [1, 7, 38, 40, 41, 100, 129, 131, 169])
def test_what_is_broken_off_goes_on_to_the_same_bytes(
    wiki: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_pieces: int,
) -> None:
    run(wiki, tmp_path / "whole")
    assert counts(tmp_path / "whole")["redirects"] == 40
    out = tmp_path / "out"
    for _ in range(3):  # each time so many documents after the parts that are complete
        with monkeypatch.context() as patch:
            break_off(patch, num_pieces)
            try:
                run(wiki, out)
            except _BrokenOffError:
                assert not out.exists()
    capsys.readouterr()
    run(wiki, out)
    assert files(out) == files(tmp_path / "whole")
    assert counts(out) == counts(tmp_path / "whole")
    assert not staging_path(out).exists()
    assert not list(out.glob(".*"))
    said = capsys.readouterr().err
    assert ("going on after" in said) == (num_pieces > 20 and num_pieces < 60)


def test_workers_may_change_on_the_way(
    wiki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(wiki, tmp_path / "whole")
    with monkeypatch.context() as patch:
        break_off(patch, 100)
        with pytest.raises(_BrokenOffError):
            run(wiki, tmp_path / "out", workers=2)
    run(wiki, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert counts(tmp_path / "out") == counts(tmp_path / "whole")


@pytest.mark.parametrize("change", ["input", "language", "part gone", "part cut", "record"])
def test_parts_of_something_else_are_not_gone_on_with(
    wiki: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        break_off(patch, 100)
        with pytest.raises(_BrokenOffError):
            run(wiki, out)
    staging = staging_path(out)
    assert (staging / "part_00003.txt").is_file()
    settings = {}
    if change == "input":
        write_records(wiki / "b.jsonl", ["New."])
    elif change == "language":
        settings["language"] = "fr"
    elif change == "part gone":
        (staging / "part_00001.txt").unlink()
    elif change == "part cut":
        (staging / "part_00001.txt").write_text("cut")
    else:
        (staging / ".progress.json").write_text('{"files": {"part_00000.txt": {}}}')
    run(wiki, tmp_path / "whole", **settings)
    capsys.readouterr()
    run(wiki, out, **settings)
    assert "going on" not in capsys.readouterr().err
    assert files(out) == files(tmp_path / "whole")
    assert counts(out) == counts(tmp_path / "whole")


_SMALL_RUN = """
import sys
from pathlib import Path
from data_prep import extract, parts
from data_prep.config import TextConfig
extract._BATCH_CHARACTERS, parts._PART_BYTES = 2_000, 50_000
if __name__ == "__main__":
    from zerobert.errors import run_script
    source, output, workers = sys.argv[1:]
    run_script(lambda: bool(extract.extract_text(
        [source], Path(output), TextConfig(), workers=int(workers))) - 1)
"""


def command(tmp_path: Path, source: Path, output: Path, workers: int) -> list[str]:
    """The command with parts so small that a run has many."""
    script = tmp_path / "run.py"
    script.write_text(_SMALL_RUN)
    return [sys.executable, str(script), str(source), str(output), str(workers)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def limit_file_size() -> None:
    """As good as a disk that is full once the first parts are written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_full_disk_costs_no_complete_part(tmp_path: Path) -> None:
    texts = [f"Document {number} says this. " * 10 for number in range(450)]
    source = write_records(tmp_path / "a.jsonl", [*texts, "A long one. " * 10_000])
    out = tmp_path / "out"
    arguments = command(tmp_path, source, out, 1)
    full = subprocess.run(
        arguments, env=ENVIRONMENT, capture_output=True, text=True, preexec_fn=limit_file_size
    )
    assert full.returncode == 2
    assert full.stderr.splitlines() == [
        f"error: cannot write {staging_path(out)}/part_00002.txt: File too large; free space or "
        "choose another output folder, then run the same command again"
    ]
    again = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert again.stderr == "text: going on after part_00001.txt\n"
    assert counts(out)["documents"] == 451


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kills_at_any_moment_change_no_byte(tmp_path: Path, workers: int) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        texts = [f"{name} {number} says this. " * (number % 90) for number in range(4000)]
        write_records(source / name, texts)
    whole = tmp_path / "whole"
    started = time.monotonic()
    subprocess.run(command(tmp_path, source, whole, workers), env=ENVIRONMENT, check=True)
    seconds = time.monotonic() - started
    draw = random.Random(workers)
    num_resumed = 0
    for attempt in range(4):
        out = tmp_path / f"out_{attempt}"
        for _ in range(50):
            process = subprocess.Popen(
                command(tmp_path, source, out, workers),
                env=ENVIRONMENT,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            try:
                _, said = process.communicate(timeout=draw.uniform(0.2, 1) * seconds)
                assert process.returncode == 0, said
                num_resumed += "going on" in said
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        assert files(out) == files(whole)
        assert counts(out) == counts(whole)
        assert not staging_path(out).exists()
    assert num_resumed > 0
