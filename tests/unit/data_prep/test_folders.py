from pathlib import Path
from typing import Any

import pytest

from data_prep.folders import is_done
from zerobert.errors import ConfigError, DataError
from zerobert.manifest import write_manifest

CONFIG = {"seed": 1, "names": ("a", "b")}
INPUTS = {"a.txt": "1234"}


def ask(folder: Path, **changes: Any) -> bool:
    return is_done(folder, **{"kind": "text", "config": CONFIG, "inputs": INPUTS} | changes)


@pytest.fixture
def done(tmp_path: Path) -> Path:
    folder = tmp_path / "done"
    folder.mkdir()
    (folder / "part.txt").write_text("hello")
    write_manifest(folder, kind="text", config=CONFIG, inputs=INPUTS)
    return folder


def test_what_is_there_as_asked_is_done(done: Path) -> None:
    assert ask(done)
    assert ask(done, inputs={"moved/a.txt": "1234"})


def test_what_is_not_there_is_not_done(tmp_path: Path) -> None:
    assert not ask(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert not ask(tmp_path / "empty")


def test_what_differs_is_not_replaced(done: Path) -> None:
    for changes, message in [
        ({"kind": "shards"}, "it holds text; remove it"),
        ({"config": {"seed": 2}}, "it was made with seed 1 instead of 2; remove it"),
        ({"inputs": {"a.txt": "99"}}, "it was made from other text or another vocabulary"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ask(done, **changes)
    (done / "part.txt").write_text("jello")
    with pytest.raises(ConfigError, match=r"it was changed since .*part\.txt"):
        ask(done)


def test_a_file_in_the_way(done: Path) -> None:
    with pytest.raises(ConfigError, match=r"part\.txt is a file; choose another"):
        ask(done / "part.txt")


def test_a_mount_point_is_refused_unless_it_is_done(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    assert ask(done)
    with pytest.raises(ConfigError, match="empty is a mount point; name a folder inside it"):
        ask(tmp_path / "empty")


def test_a_name_that_no_disk_takes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write .*: File name too long; choose another"):
        ask(tmp_path / ("x" * 300))
