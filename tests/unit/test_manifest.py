"""A folder is complete or absent, and its manifest notices every change."""

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from zerobert import manifest
from zerobert.errors import DataError, ManifestError

ALPHA = hashlib.sha256(b"alpha\n").hexdigest()


def make_folder(folder: Path) -> manifest.Manifest:
    """A complete folder of two files."""
    with manifest.staged_folder(folder) as staging:
        (staging / "a.txt").write_text("alpha\n")
        (staging / "deep").mkdir()
        (staging / "deep" / "b.bin").write_bytes(b"\0\1")
        return manifest.write_manifest(
            staging,
            kind="text",
            config={"n": 1},
            inputs={"source": "ab" * 32},
            known={"a.txt": manifest.FileRecord(num_bytes=6, sha256=ALPHA, num_rows=1)},
            summary={"documents": 7},
        )


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "out" / "made"  # the parent is made too
    with manifest.staged_folder(final) as staging:
        (staging / "a").write_text("x")
        assert not final.exists()
        assert manifest.is_staging(staging / "a")
        assert staging.parent == final.parent
    assert names(tmp_path) == ["out", "out/made", "out/made/a"]
    assert not manifest.is_staging(final / "a")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fill() -> None:
        with manifest.staged_folder(tmp_path / "made") as staging:
            (staging / "a").write_text("x")
            raise error("stop")

    with pytest.raises(error, match="stop"):
        fill()
    assert names(tmp_path) == []


def test_a_failed_block_keeps_the_folder_that_was_there(tmp_path: Path) -> None:
    make_folder(tmp_path / "made")
    before = names(tmp_path)
    with pytest.raises(ValueError, match="stop"), manifest.staged_folder(tmp_path / "made"):
        raise ValueError("stop")
    assert names(tmp_path) == before
    manifest.verify_folder(tmp_path / "made")


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    leftover = manifest.staging_path(tmp_path / "made")
    leftover.mkdir()
    (leftover / "half").write_text("x")
    with manifest.staged_folder(tmp_path / "made") as staging:
        (staging / "whole").write_text("x")
    assert names(tmp_path) == ["made", "made/whole"]


def test_a_kill_leaves_no_final_folder(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from zerobert.manifest import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])) as staging:\n"
        "    (staging / 'a').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script, str(tmp_path / "made")]
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == -9
    assert names(tmp_path) == [".incomplete-made", ".incomplete-made/a"]


def test_an_older_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    make_folder(tmp_path / "made")
    with manifest.staged_folder(tmp_path / "made") as staging:
        (staging / "new").write_text("x")
    assert names(tmp_path) == ["made", "made/new"]


def test_a_place_where_no_folder_can_be_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        DataError, match=r"cannot write .*file/made: Not a directory; choose another path"
    ):
        with manifest.staged_folder(tmp_path / "file" / "made"):
            pass


def test_a_manifest_read_back_is_what_was_written(tmp_path: Path) -> None:
    written = make_folder(tmp_path / "made")
    assert manifest.read_manifest(tmp_path / "made") == written
    assert manifest.verify_folder(tmp_path / "made") == written
    assert dataclasses.asdict(written) == {
        "kind": "text",
        "config": {"n": 1},
        "inputs": {"source": "ab" * 32},
        "files": {
            "a.txt": {
                "num_bytes": 6,
                "sha256": hashlib.sha256(b"alpha\n").hexdigest(),
                "num_rows": 1,
            },
            "deep/b.bin": {
                "num_bytes": 2,
                "sha256": hashlib.sha256(b"\0\1").hexdigest(),
                "num_rows": None,
            },
        },
        "summary": {"documents": 7},
        "format_version": 1,
    }


def test_completeness_is_the_manifest_s_presence(tmp_path: Path) -> None:
    make_folder(tmp_path / "made")
    assert manifest.is_complete(tmp_path / "made")
    (tmp_path / "made" / "manifest.json").unlink()
    assert not manifest.is_complete(tmp_path / "made")


def edit_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        path = folder / "manifest.json"
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))

    return apply


def drop_files(raw: dict[str, Any]) -> None:
    del raw["files"]


CORRUPTIONS = {
    "a.txt: missing": lambda folder: (folder / "a.txt").unlink(),
    "a.txt: 5 bytes, the manifest says 6": lambda folder: os.truncate(folder / "a.txt", 5),
    "a.txt: its contents differ from the manifest's sha256": lambda folder: (
        folder / "a.txt"
    ).write_text("alphb\n"),
    "never completed": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json can't be read": lambda folder: os.truncate(folder / "manifest.json", 20),
    "can't be read .*utf-8": lambda folder: (folder / "manifest.json").write_bytes(b"\xff"),
    "wanted format_version 1, got 2": edit_manifest(lambda raw: raw.update(format_version=2)),
    "wanted format_version 1, got list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "is not a manifest": edit_manifest(drop_files),
    "is not a manifest .*surprise": edit_manifest(lambda raw: raw.update(surprise=1)),
    "is not a manifest .*size": edit_manifest(lambda raw: raw["files"]["a.txt"].update(size=1)),
}


@pytest.mark.parametrize("message", CORRUPTIONS)
def test_each_damage_has_its_message(tmp_path: Path, message: str) -> None:
    make_folder(tmp_path / "made")
    CORRUPTIONS[message](tmp_path / "made")
    with pytest.raises(ManifestError, match=message):
        manifest.verify_folder(tmp_path / "made")


def test_every_problem_is_listed(tmp_path: Path) -> None:
    make_folder(tmp_path / "made")
    (tmp_path / "made" / "a.txt").unlink()
    (tmp_path / "made" / "deep" / "b.bin").write_bytes(b"\0\2")
    assert len(manifest.find_problems(tmp_path / "made")) == 2


def test_a_file_that_can_not_be_read_is_one_problem(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    make_folder(folder)
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to("x" * 300)  # which root can't read either
    (folder / "deep" / "b.bin").unlink()
    assert manifest.find_problems(folder) == [
        f"{folder}/a.txt: can't be read: File name too long",
        f"{folder}/deep/b.bin: missing",
    ]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"there is no folder .*nowhere"):
        manifest.read_manifest(tmp_path / "nowhere")


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    manifest.write_json(path, {"n": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "n": "é"\n}\n'

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*a\.json: No space left on device"):
        manifest.write_text(path, "new")
    assert names(tmp_path) == ["a.json"]
    assert json.loads(path.read_text(encoding="utf-8")) == {"n": "é"}


def test_writing_passes_on_what_is_no_failed_write() -> None:
    with pytest.raises(KeyError, match="x"), manifest.writing("somewhere"):
        raise KeyError("x")


def test_a_full_disk_is_a_data_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk without space."""
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from zerobert.errors import run_script\nfrom zerobert.manifest import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "def main():\n"
        "    with staged_folder(Path(sys.argv[1])) as staging:\n"
        "        write_text(staging / 'small', 'x')\n"
        "        write_text(staging / 'large', 'x' * 5000)\n"
        "    return 0\n"
        "run_script(main)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "made")],
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot write ")
    assert "large: File too large; free space or choose another output folder" in result.stderr
    assert result.stderr.count("\n") == 1
    assert names(tmp_path) == []


def test_a_folder_that_another_process_fills_is_left_alone(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with manifest.staged_folder(final) as staging:
        (staging / "file").write_text("mine")
        with pytest.raises(DataError, match="another process is filling"):
            with manifest.staged_folder(final):
                pass
    assert (final / "file").read_text() == "mine"


def break_off(final: Path, identity: dict[str, Any]) -> None:
    """Begin a folder of two files, one of them hidden, and fail."""

    def fill() -> None:
        with manifest.resumable_folder(final, identity) as staging:
            (staging / "first").write_text("1")
            (staging / ".notes").write_text("first is done")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill()


def test_a_broken_off_folder_goes_on_where_it_was(tmp_path: Path) -> None:
    final = tmp_path / "out"
    break_off(final, {"seed": 1})
    assert not final.exists()
    with manifest.resumable_folder(final, {"seed": 1}) as staging:
        assert (staging / "first").read_text() == "1"
        (staging / "second").write_text("2")
        made = manifest.write_manifest(staging, kind="text", config={}, inputs={})
    assert sorted(made.files) == ["first", "second"]
    assert names(final) == ["first", "manifest.json", "second"]
    assert manifest.leftovers(tmp_path) == []


def test_a_folder_begun_with_other_settings_starts_over(tmp_path: Path) -> None:
    final = tmp_path / "out"
    break_off(final, {"seed": 1})
    with manifest.resumable_folder(final, {"seed": (2,)}) as staging:
        assert names(staging) == [".identity.json"]
        with pytest.raises(DataError, match="another process is filling"):
            with manifest.resumable_folder(final, {"seed": 3}):
                pass
    assert names(final) == []


def test_what_somebody_else_put_there_meanwhile_is_left_alone(tmp_path: Path) -> None:
    final = tmp_path / "out"

    def fill() -> None:
        with manifest.resumable_folder(final, {"seed": 1}) as staging:
            (staging / "first").write_text("1")
            final.mkdir(exist_ok=True)
            (final / "mine").write_text("precious")

    with pytest.raises(DataError, match="was filled by somebody else in the meantime"):
        fill()
    assert names(final) == ["mine"]
    (final / "mine").unlink()
    with manifest.resumable_folder(final, {"seed": 1}) as staging:
        assert (staging / "first").read_text() == "1"
    assert names(final) == ["first"]


def test_a_folder_that_can_not_be_replaced_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "out"
    final.mkdir()

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(Path, "rmdir", busy)
    with pytest.raises(DataError, match=r"cannot write .*out: Device or resource busy; "):
        with manifest.resumable_folder(final, {"seed": 1}):
            pass
