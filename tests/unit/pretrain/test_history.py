"""What a run folder tells, whatever has happened to the run or to the folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.history import read_run
from zerobert.errors import ConfigError, DataError


def train(step: int, **more: Any) -> dict[str, Any]:
    """A line after `step` steps of 64 sequences, 2 seconds each."""
    facts = {"step": step, "samples": 64 * step, "tokens": 6400 * step, "elapsed_s": 2.0 * step}
    return {**facts, "train/loss": 10 - step / 10, **more}


def folder_of(folder: Path, *lines: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_metric_is_its_values_by_step(tmp_path: Path) -> None:
    run = read_run(
        folder_of(tmp_path, train(1), train(2, **{"perf/mfu": None}), {"step": 2, "eval/x": 0.5}),
        "a",
    )
    assert run.kept.values("train/loss") == {1: 9.9, 2: 9.8}
    assert run.kept.values("eval/x") == {2: 0.5}
    assert run.kept.values("perf/mfu") == {}
    assert (run.given_up, run.events) == ([], [])


def test_an_evaluation_between_two_lines_lies_between_them_on_every_axis(tmp_path: Path) -> None:
    run = read_run(folder_of(tmp_path, train(10), {"step": 15, "eval/x": 1.0}, train(20)), "a")
    assert run.kept.axes([15, 20]) == {
        "step": [15, 20],
        "samples": [64 * 15, 64 * 20],
        "tokens": [6400 * 15, 6400 * 20],
        "hours": [30 / 3600, 40 / 3600],
    }


def test_axes_that_a_run_does_not_know_are_left_out(tmp_path: Path) -> None:
    run = read_run(folder_of(tmp_path, {"step": 1, "samples": 64, "train/loss": 3.0}), "a")
    assert set(run.kept.axes([1])) == {"step", "samples"}


def test_a_rollback_cuts_off_what_came_after_its_state(tmp_path: Path) -> None:
    rollback = {"step": 40, "event": "rollback", "to_step": 20, "reason": "a spike"}
    lines = [train(10), train(20), train(30), train(40), rollback]
    again = [train(30, **{"train/loss": 5.0})]
    run = read_run(folder_of(tmp_path, *lines, *again), "a")
    assert run.kept.values("train/loss") == {10: 9.0, 20: 8.0, 30: 5.0}
    [end] = run.given_up
    assert end.values("train/loss") == {30: 7.0, 40: 6.0}
    [event] = run.events
    assert (event.step, event.name, event.text) == (40, "rollback", "to step: 20, reason: a spike")
    assert event.xs == {"step": 40, "samples": 2560, "tokens": 256_000, "hours": 80 / 3600}


def test_steps_that_come_again_without_a_word_are_seen_once(tmp_path: Path) -> None:
    run = read_run(folder_of(tmp_path, train(10), train(20), train(30), train(20)), "a")
    assert list(run.kept.values("train/loss")) == [10, 20]
    assert [list(end.values("train/loss")) for end in run.given_up] == [[20, 30]]


def test_any_event_is_told(tmp_path: Path) -> None:
    event = {"step": 10, "event": "resume", "processes": 2, "code": "0.1.0 (abc)"}
    [found] = read_run(folder_of(tmp_path, train(10), event, train(20)), "a").events
    assert (found.name, found.text) == ("resume", "processes: 2, code: 0.1.0 (abc)")


def test_a_torn_last_line_is_left_out_and_a_broken_one_before_it_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, train(10), train(20))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "tr')
    assert list(read_run(folder, "a").kept.values("step")) == [10, 20]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps(train(40)) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:3: wanted a JSON object"):
        read_run(folder, "a")


def test_settings_are_flat_and_a_config_that_is_missing_or_damaged_is_none(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, train(10))
    assert read_run(folder, "a").config == {}
    (folder / "config.json").write_text(
        '{"bert": {"model": {"size": "tiny"}, "data": {}}, "b": [1]}'
    )
    assert read_run(folder, "a").config == {
        "bert.model.size": '"tiny"',
        "bert.data": "{}",
        "b": "[1]",
    }
    for damaged in ('{"bert": ', "[" * 100_000):
        (folder / "config.json").write_text(damaged)
        assert read_run(folder, "a").config == {}


def test_what_no_curve_can_show_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "elapsed_s": NaN, "a": Infinity, "b": 2}\n'
        f'{{"step": 2, "elapsed_s": 1{"0" * 400}, "b": 3}}\n'
    )
    (tmp_path / "status.json").write_text('{"state": "running", "total_steps": "many"}')
    run = read_run(tmp_path, "a")
    assert run.kept.values("elapsed_s") == run.kept.values("a") == {}
    assert run.kept.values("b") == {1: 2, 2: 3}
    assert run.total_steps is None


def test_status_and_the_time_of_the_last_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, train(10))
    assert (read_run(folder, "a").state, len(read_run(folder, "a").written_at)) == ("-", 20)
    (folder / "status.json").write_text('{"state": "failed", "error": "no space left"}')
    assert read_run(folder, "a").state == "failed: no space left"


def test_a_run_that_has_just_begun_has_a_status_only(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text('{"state": "running", "exit_code": null}')
    run = read_run(tmp_path, "a")
    assert (run.state, run.written_at, run.kept.lines) == ("running", "", [])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found no metrics\.jsonl"):
        read_run(tmp_path, "a")
