"""What a run says of itself; W&B is tried for real, offline, in processes of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.wandb_server import serve_wandb
from zerobert import __version__, tracking
from zerobert.errors import ConfigError, DataError, MissingDependencyError
from zerobert.tracking import (
    Tracker,
    code_version,
    lines_before,
    open_tracker,
    read_metrics,
    write_status,
)

KEY = "0123456789abcdef" * 3


def open_plain(folder: Path, resume_step: int = 0) -> Tracker:
    return open_tracker(
        folder, wandb=False, project="p", run_name="r", config={}, resume_step=resume_step
    )


def test_lines_are_on_disk_as_soon_as_they_are_logged(tmp_path: Path) -> None:
    tracker = open_plain(tmp_path / "runs" / "a")
    tracker.log(1, {"train/loss": 2.5, "samples": 64})
    path = tmp_path / "runs" / "a" / "metrics.jsonl"
    assert path.read_text() == '{"step": 1, "train/loss": 2.5, "samples": 64}\n'
    tracker.close(0)
    tracker.close(0)


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    tracker = open_plain(tmp_path)
    tracker.log(1, {"nan": float("nan"), "inf": float("inf"), "none": None, "zero": 0.0})
    tracker.close(0)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "nan": None,
        "inf": None,
        "none": None,
        "zero": 0.0,
    }


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path: Path) -> None:
    tracker = open_plain(tmp_path)
    for step in (10, 20, 20, 30):
        tracker.log(step, {"a": step})
    tracker.close(0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "a"')  # the process was killed while it wrote
    tracker = open_plain(tmp_path, resume_step=20)
    tracker.log(21, {"a": 21})
    tracker.close(0)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 20, 21]


def test_a_run_that_starts_leaves_nothing_of_an_older_one(tmp_path: Path) -> None:
    open_plain(tmp_path).log(0, {"a": 1})
    open_plain(tmp_path).close(0)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def lines_of(*steps: int) -> list[dict[str, Any]]:
    """Lines in this order; a negative step is a rollback to it from the step before it."""
    lines: list[dict[str, Any]] = []
    for step in steps:
        back = {"step": lines[-1]["step"], "event": "rollback", "to_step": -step} if lines else {}
        lines.append({"step": step} if step >= 0 else back)
    return lines


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (15, [10, 20, 30, -10, 15]),  # the run stands on its rollback
        (10, [10, 20, 30, -10]),
        (20, [10, 20, 30, -10, 15, 20]),
        (5, []),  # before the state that the rollback went to: it is undone too
    ],
)
def test_what_led_to_a_rollback_stays_as_long_as_it_is_stood_on(step: int, kept: list[int]) -> None:
    assert lines_before(lines_of(10, 20, 30, -10, 15, 20, 25), step) == lines_of(*kept)


def test_of_two_rollbacks_the_one_that_is_undone_goes() -> None:
    lines = lines_of(10, 20, 30, -20, 25, 30, -10, 15)
    assert lines_before(lines, 12) == lines[:-1]
    lines = lines_of(10, 20, 30, -10, 15, 20, 25, -20, 25)
    assert lines_before(lines, 15) == lines_of(10, 20, 30, -10, 15)


def test_the_latest_value_outlives_a_resumption(tmp_path: Path) -> None:
    tracker = open_plain(tmp_path)
    assert tracker.latest("eval/mlm_accuracy") is None
    tracker.log(10, {"eval/mlm_accuracy": 0.25})
    tracker.log(20, {"eval/mlm_accuracy": 0.5})
    tracker.log(20, {"train/loss": 1.0})
    assert tracker.latest("eval/mlm_accuracy") == 0.5
    assert open_plain(tmp_path, resume_step=10).latest("eval/mlm_accuracy") == 0.25


def test_an_event_is_a_line_of_its_own(tmp_path: Path) -> None:
    tracker = open_plain(tmp_path)
    tracker.event(5, "rollback", to_step=3, reason="a spike")
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 5, "event": "rollback", "to_step": 3, "reason": "a spike"}\n'


def test_the_code_s_version_has_its_commit_in_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "zerobert").mkdir()
    source = tmp_path / "zerobert" / "tracking.py"
    source.write_text("")
    monkeypatch.setattr(tracking, "__file__", str(source))
    assert code_version() == __version__
    git("init", "-q")
    assert code_version() == __version__  # no commit yet
    git("add", ".")
    git("commit", "-q", "-m", "a")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert code_version() == f"{__version__} ({commit})"
    source.write_text("x")
    assert code_version() == f"{__version__} ({commit}, changed)"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "zerobert").mkdir()
    installed = tmp_path / "site" / "zerobert" / "tracking.py"
    monkeypatch.setattr(tracking, "__file__", str(installed))
    assert code_version() == __version__
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(tracking, "__file__", str(source))
    assert code_version() == __version__


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "1"}', '{"step": true}', ""])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: .*delete the line"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl can't be read"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    tracker = Tracker(Path("/dev/full"), None)
    with pytest.raises(DataError, match="cannot write /dev/full: No space left"):
        tracker.log(1, {"a": 1})
    tracker.close(2)


def test_status_says_state_and_code(tmp_path: Path) -> None:
    write_status(tmp_path, "running", None)
    write_status(tmp_path, "preempted", 143, step=7)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status.pop("updated_at").endswith("+00:00")
    assert status == {"state": "preempted", "exit_code": 143, "step": 7}


def test_without_wandb_the_message_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependencyError, match="pip install wandb"):
        open_tracker(tmp_path, wandb=True, project="p", run_name="r", config={}, resume_step=0)


SCRIPT = """
import sys
from pathlib import Path
from zerobert.errors import run_script
from zerobert.tracking import open_tracker

def main():
    folder, resume_step, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    config = {"train_batch_size": 64, "processes": resume_step + 1}
    tracker = open_tracker(folder, wandb=True, project="p", run_name="r", config=config,
                           resume_step=resume_step)
    for step in range(resume_step + 1, end + 1):
        tracker.log(step, {"loss": 1.5 / step, "none": None})
    tracker.close(0)
    return 0

run_script(main)
"""


def run_wandb(
    folder: Path, steps: tuple[int, int], home: Path, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """A run from one step to another."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), *map(str, steps)]
    return subprocess.run(
        command,
        env={**os.environ, "HOME": str(home), "PYTHONPATH": str(Path.cwd()), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_wandb_offline_needs_no_account_keeps_the_run_and_shows_no_key(tmp_path: Path) -> None:
    run, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    environment = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}
    results = [run_wandb(run, steps, home, **environment) for steps in ((0, 1), (1, 2))]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    [run_id] = {path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")}
    assert (run / "wandb_run_id").read_text().strip() == run_id
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2]
    found = all_bytes(tmp_path)
    assert b"train_batch_size" in found  # the search would find what is there
    assert KEY.encode() not in found
    assert not any(KEY in result.stdout + result.stderr for result in results)


def test_wandb_online_is_one_run_over_resumptions_with_every_step_once(tmp_path: Path) -> None:
    """Against a stand-in for the server: the third and fourth steps are made twice."""
    run = tmp_path / "run"
    with serve_wandb() as server:
        environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        results = [run_wandb(run, steps, tmp_path, **environment) for steps in ((0, 4), (2, 6))]
    assert [result.returncode for result in results] == [0, 0], results[1].stderr
    [run_id] = server.configs
    assert (run / "wandb_run_id").read_text().strip() == run_id
    assert server.configs[run_id] == {"train_batch_size": 64, "processes": 3}
    rows = [(row["_step"], row["step"], row["loss"]) for row in server.history[run_id]]
    assert rows == [(step, step, 1.5 / step) for step in range(1, 7)]
    assert "monotonically" not in results[1].stderr


def test_wandb_sync_brings_the_parts_of_an_offline_run_together(tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {"WANDB_API_KEY": KEY}
    for steps in ((0, 4), (2, 6)):
        done = run_wandb(run, steps, tmp_path, WANDB_MODE="offline", **environment)
        assert done.returncode == 0, done.stderr
    with serve_wandb() as server:
        synced = subprocess.run(
            [Path(sys.executable).with_name("wandb"), "sync", "--yes"],
            cwd=run,
            env={
                **os.environ,
                **environment,
                "HOME": str(tmp_path),
                "WANDB_BASE_URL": server.url,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert synced.returncode == 0, synced.stderr
    [run_id] = server.history
    assert run_id == (run / "wandb_run_id").read_text().strip()
    rows = [(row["_step"], row["step"], row["loss"]) for row in server.history[run_id]]
    # What was made twice is there twice, with the same values at the same places.
    assert rows == [(step, step, 1.5 / step) for step in (1, 2, 3, 4, 3, 4, 5, 6)]


def test_wandb_online_without_a_key_says_what_to_do_and_does_not_ask(tmp_path: Path) -> None:
    result = run_wandb(tmp_path / "run", (0, 1), tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    [line] = [line for line in result.stderr.splitlines() if not line.startswith("wandb:")]
    assert line.startswith("error: --tracker wandb: W&B is online and has no API key")
    assert "WANDB_MODE=offline" in line


def test_a_mode_that_wandb_does_not_know_is_one_line(tmp_path: Path) -> None:
    result = run_wandb(tmp_path / "run", (0, 1), tmp_path, WANDB_MODE="bogus")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --tracker wandb: W&B did not start: 1 validation error")


def test_a_key_that_wandb_refuses_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: Any) -> None:
        raise wandb.Error(f"the key {KEY} is not known")

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"the key \*\*\* is not known") as error:
        tracking.open_tracker(
            tmp_path, wandb=True, project="p", run_name="r", config={}, resume_step=0
        )
    assert KEY not in str(error.value)
