"""The page of a pretraining run, from the files that a run leaves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.report import write_report
from zerobert.errors import ConfigError


def make_run(folder: Path, loss: float) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"step": 10, "samples": 640, "elapsed_s": 30.0, "train/mlm_loss": 9.0, "perf/mfu": None},
        {"step": 20, "samples": 1280, "elapsed_s": 60.0, "train/mlm_loss": loss, "perf/mfu": None},
        {"step": 20, "eval/mlm_loss": loss + 1, "eval/mlm_accuracy": 0.25},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text('{"train_batch_size": 64}')
    return folder


def titles(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def cells(page: str) -> list[str]:
    return re.findall(r"<td.*?>(.*?)</td>", page)


def test_one_run(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    assert write_report([make_run(tmp_path / "a", 7.5)], output) == output
    page = output.read_text()
    # Metrics that a run has not, or has only as null, get no chart.
    assert titles(page) == [
        "Where it stands",
        "Masked-LM loss",
        "Masked-LM accuracy",
        "Config of a",
    ]
    assert cells(page) == ["a", "20", "1,280", "1.0 min", "7.5000", "8.5000", "25.00%", "-"]
    assert "training <b>7.5</b>" in page
    assert "held-out <b>8.5</b>" in page
    assert "&quot;train_batch_size&quot;: 64" in page


def test_several_runs_share_their_charts(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 7.5), make_run(tmp_path / "b", 6.5)]
    page = write_report(runs, tmp_path / "both.html").read_text()
    assert titles(page).count("Masked-LM loss") == 1
    assert "a, training <b>7.5</b>" in page
    assert "b, training <b>6.5</b>" in page
    assert page.count("Config of") == 2


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "x" / "run", 7.5), make_run(tmp_path / "y" / "run", 6.5)]
    page = write_report(runs, tmp_path / "both.html").read_text()
    assert cells(page)[0] == str(runs[0])
    assert cells(page)[8] == str(runs[1])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found no metrics\.jsonl"):
        write_report([tmp_path], tmp_path / "report.html")


def test_the_command_writes_beside_the_first_run_and_prints_where(
    tmp_path: Path, repository: Path
) -> None:
    run = make_run(tmp_path / "a", 7.5)
    command = [sys.executable, str(repository / "pretrain" / "report.py"), str(run)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout == f"{run / 'report.html'}\n"
    assert (run / "report.html").is_file()


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, str(repository / "pretrain" / "report.py"), str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
