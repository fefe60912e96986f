"""The page of pretraining runs, from the files that they leave; served, too."""

import contextlib
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.report import report_page, write_report
from pretrain.serve import open_server
from tests.browser import Browser
from zerobert.errors import ConfigError, DataError
from zerobert.tracking import write_status


def make_run(folder: Path, loss: float) -> Path:
    folder.mkdir(parents=True)
    lines = [
        {"step": 10, "samples": 640, "elapsed_s": 30.0, "train/mlm_loss": 9.0, "perf/mfu": None},
        {"step": 20, "samples": 1280, "elapsed_s": 60.0, "train/mlm_loss": loss, "perf/mfu": None},
        {"step": 20, "eval/mlm_loss": loss + 1, "eval/mlm_accuracy": 0.25, "eval/rows": 1000},
    ]
    add_lines(folder, *lines)
    config = {"train_batch_size": 64, "bert": {"run": {"max_steps": 1_000_000}}}
    (folder / "config.json").write_text(json.dumps(config))
    status = {"state": "done", "exit_code": 0, "total_steps": 20}
    (folder / "status.json").write_text(json.dumps(status))
    return folder


def add_lines(folder: Path, *lines: dict[str, Any]) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def titles(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def rows(page: str, title: str) -> list[list[str]]:
    """A table's header and rows."""
    [section] = re.findall(rf'data-key="{title}">(.*?)</section>', page, re.DOTALL)
    lines = re.findall(r"<tr.*?>(.*?)</tr>", section)
    return [re.findall(r"<t[dh].*?>(.*?)</t[dh]>", line) for line in lines]


def curves(page: str) -> dict[str, list[dict[str, Any]]]:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return {chart["title"]: chart["series"] for chart in json.loads(text)["charts"]}


def test_one_run(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    assert write_report([make_run(tmp_path / "a", 7.5)], output) == output
    page = output.read_text()
    # Metrics that a run has not, or has only as null, get no chart.
    assert titles(page) == [
        "Where it stands",
        "Masked-LM loss",
        "Masked-LM accuracy",
        "Evaluations on held-out rows",
        "Resolved config",
    ]
    header, line = rows(page, "Where it stands")
    assert dict(zip(header, line, strict=True)) | {"last line": ""} == {
        "run": "a",
        "state": "done",
        "last line": "",
        "step": "20 of 20",
        "samples": "1,280",
        "time": "1:00",
        "training MLM loss": "7.5000",
        "held-out MLM loss": "8.5000",
        "held-out MLM accuracy": "25.00%",
    }
    assert rows(page, "Evaluations on held-out rows")[1] == [
        *("a", "20", "8.5000", "25.00%", "-", "-", "1,000")
    ]
    assert rows(page, "Resolved config")[1:] == [
        ["train_batch_size", "64"],
        ["bert.run.max_steps", "1000000"],
    ]
    training, held_out = curves(page)["Masked-LM loss"]
    assert (training["name"], training["color"], training["ys"]) == ("training", 0, [9, 7.5])
    assert training["xs"] == {
        "step": [10, 20],
        "samples": [640, 1280],
        "hours": [0.00833333, 0.0166667],
    }
    assert (held_out["name"], held_out["color"], held_out["ys"]) == ("held-out", 1, [8.5])


def test_several_runs_share_their_charts(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 7.5), make_run(tmp_path / "b", 6.5)]
    (runs[1] / "config.json").write_text('{"train_batch_size": 128}')
    page = write_report(runs, tmp_path / "both.html").read_text()
    assert titles(page).count("Masked-LM loss") == 1
    found = [
        (each["name"], each["group"], each["color"], each["dashed"])
        for each in curves(page)["Masked-LM loss"]
    ]
    assert found == [
        ("a, training", "a", 0, False),
        ("a, held-out", "a", 0, True),
        ("b, training", "b", 1, False),
        ("b, held-out", "b", 1, True),
    ]
    assert rows(page, "Resolved config") == [
        ["setting", "a", "b"],
        ["train_batch_size", "64", "128"],
        ["bert.run.max_steps", "1000000", "-"],
    ]


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "x" / "run", 7.5), make_run(tmp_path / "y" / "run", 6.5)]
    page = report_page(runs)
    assert [line[0] for line in rows(page, "Where it stands")] == ["run", *map(str, runs)]


def test_runs_of_different_keys_and_missing_files_lie_over_each_other(tmp_path: Path) -> None:
    whole, begun, foreign = make_run(tmp_path / "a", 7.5), tmp_path / "b", tmp_path / "c"
    begun.mkdir()
    (begun / "status.json").write_text('{"state": "running", "exit_code": null}')
    foreign.mkdir()
    add_lines(foreign, {"step": 3, "train/lr": 0.1}, {"step": 4, "unknown": [1, "x"]})
    page = report_page([whole, begun, foreign])
    states = [line[:2] for line in rows(page, "Where it stands")[1:]]
    assert states == [["a", "done"], ["b", "running"], ["c", "-"]]
    assert [each["name"] for each in curves(page)["Learning rate"]] == ["c, rate"]


def test_events_are_marked_and_told_and_what_was_given_up_stays_aside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 7.5)
    add_lines(
        run,
        {"step": 20, "event": "resume", "processes": 2},
        {"step": 30, "train/mlm_loss": 99.0, "train/skipped_steps": 4},
        {"step": 30, "event": "rollback", "to_step": 20, "reason": "<b>a spike</b>"},
        {"step": 30, "train/mlm_loss": 5.0, "train/skipped_steps": 2},
        {"step": 40, "train/mlm_loss": 4.0, "train/skipped_steps": 2},
    )
    page = report_page([run])
    assert rows(page, "Events")[1:] == [
        ["a", "20", "resume", "processes: 2"],
        ["a", "30", "rollback", "to step: 20, reason: &lt;b&gt;a spike&lt;/b&gt;"],
        [
            "a",
            "30",
            "skipped steps",
            "2, whose gradients were no finite numbers, the last by step 30",
        ],
    ]
    aside, training, _ = curves(page)["Masked-LM loss"]
    assert (aside["aside"], aside["ys"]) == (True, [99])
    assert (training["aside"], training["ys"]) == (False, [9, 7.5, 5, 4])
    [text] = re.findall(r'"markers":(\[.*?\])', page)
    assert [marker["xs"]["step"] for marker in json.loads(text)] == [20, 30]


def test_what_never_changes_and_says_nothing_has_no_chart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 7.5)
    add_lines(run, {"step": 30, "train/loss_scale": 1.0, "train/skipped_steps": 0})
    assert not {"Loss scale", "Skipped steps"} & set(titles(report_page([run])))
    add_lines(run, {"step": 40, "train/loss_scale": 2.0, "train/skipped_steps": 1})
    assert {"Loss scale", "Skipped steps"} <= set(titles(report_page([run])))


def test_a_hundred_thousand_lines_make_a_small_page(tmp_path: Path) -> None:
    run = tmp_path / "long"
    run.mkdir()
    keys = ("train/mlm_loss", "train/nsp_loss", "train/loss", "train/lr", "train/grad_norm")
    more = ("perf/samples_per_s", "perf/tokens_per_s", "perf/mfu", "perf/data_wait_frac")
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, 100_001):
            values = ", ".join(f'"{key}": {1 / step}' for key in (*keys, *more))
            line = f'"samples": {step * 64}, "tokens": {step * 6400}, "elapsed_s": {step * 0.37}'
            file.write(f'{{"step": {step}, {line}, {values}}}\n')
    page = report_page([run])
    assert len(page) < 1_000_000
    assert curves(page)["Masked-LM loss"][0]["high"][0] == 1


def command(repository: Path, *words: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
    script = [sys.executable, str(repository / "pretrain" / "report.py")]
    return subprocess.run([*script, *words], capture_output=True, text=True, check=False, cwd=cwd)


def test_the_command_writes_beside_the_first_run_and_prints_where(
    tmp_path: Path, repository: Path
) -> None:
    run = make_run(tmp_path / "a", 7.5)
    result = command(repository, run, cwd=tmp_path)
    assert result.stdout == f"{run / 'report.html'}\n"
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["none"], "none: wanted the output folder of a pretraining run"),
        (["none", "--serve"], "none: wanted the output folder of a pretraining run"),
        (["tuned"], "tuned is of a fine-tuning run, whose page is made as it ends"),
        (["tuning"], "tuning is of a fine-tuning run"),
        (["a", "--output", "tuned/report.html"], "tuned/report.html would lie in a finished"),
        (["a", "--output", "a/metrics.jsonl"], "--output a/metrics.jsonl is there and is no page"),
        (["a", "--serve", "--output", "x"], "--serve writes no page"),
        (["a", "--port", "80"], "--port is where a page is served"),
        (["a", "--serve", "--port", "70000"], "--port 70000 can't be served at"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    tmp_path: Path, repository: Path, words: list[str], wanted: str
) -> None:
    make_run(tmp_path / "a", 7.5)
    for name, status in (("tuned", {}), ("tuning", {"kind": "finetune"})):
        (tmp_path / name).mkdir()
        write_status(tmp_path / name, "running", None, **status)
    (tmp_path / "tuned" / "manifest.json").write_text("{}")
    result = command(repository, *words, cwd=tmp_path)
    assert not (tmp_path / "tuned" / "report.html").exists()
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {wanted}")
    assert len(result.stderr.splitlines()) == 1


@contextlib.contextmanager
def served(page: Callable[[], str]) -> Iterator[str]:
    """The address of a page that is served meanwhile."""
    server = open_server(page, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://localhost:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_served_page_is_made_anew_for_each_request() -> None:
    pages = iter(["one", "two"])
    with served(lambda: next(pages)) as url:
        assert ask(url) == (200, "one")
        assert ask(f"{url}?x") == (200, "two")


def test_only_the_page_is_served_and_only_to_this_machine_s_name() -> None:
    with served(lambda: "page") as url:
        assert ask(f"{url}config.json") == (404, "the page is at /")
        assert ask(url, Host="evil.example:80")[0] == 403
        assert ask(url, Host="evil.example")[0] == 403
        assert ask(url, Host="127.0.0.1:1") == (200, "page")


def test_a_run_that_can_not_be_read_for_a_while_is_told() -> None:
    def page() -> str:
        raise DataError("metrics.jsonl:3: delete the line")

    with served(page) as url:
        assert ask(url) == (503, "metrics.jsonl:3: delete the line")


def test_a_browser_that_goes_away_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    gone = threading.Event()

    def page() -> str:
        gone.wait(30)
        return "x" * 2**24  # more than the system takes off the server's hands

    with served(page) as url:
        port = int(url.rstrip("/").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gone.set()
        assert ask(url)[0] == 200
    assert capsys.readouterr().err == ""


def test_a_port_that_is_taken_is_one_clear_error() -> None:
    server = open_server(str, 0)
    try:
        with pytest.raises(ConfigError, match=rf"--port {server.server_port} can't be served at"):
            open_server(str, server.server_port)
    finally:
        server.server_close()


def test_a_served_page_follows_the_run_and_keeps_what_the_reader_chose(
    tmp_path: Path, browser: Browser
) -> None:
    run = make_run(tmp_path / "a", 7.5)
    with served(lambda: report_page([run], refresh_s=0.2)) as url:
        browser.open(url)
        browser.run(
            "(() => { const axis = document.getElementById('axis'); axis.value = 'samples';"
            " axis.dispatchEvent(new Event('change')); })()"
        )
        browser.run("document.querySelector('summary').click()")
        browser.run("document.querySelector('input[type=search]').focus()")
        add_lines(run, {"step": 30, "samples": 1920, "elapsed_s": 90.0, "train/mlm_loss": 6.25})
        browser.wait_until("document.querySelector('.legend').textContent.includes('6.25')")
        assert browser.run("document.querySelector('.axis-name').textContent") == "samples"
        assert browser.run("document.activeElement.type") == "search"
        assert "30 of 20" in browser.run("document.querySelector('tbody').textContent")
        # A chart and a table that were not there before: the page is laid out anew.
        add_lines(run, {"step": 30, "train/lr": 0.5}, {"step": 30, "event": "resume"})
        browser.wait_until("document.querySelectorAll('section.chart').length === 3")
        assert browser.run("document.querySelectorAll('.marker').length") == 3
        assert browser.errors == []
        assert {request.rstrip("/") for request in browser.requests} <= {url.rstrip("/"), "data:,"}
    browser.wait_until("document.getElementById('news').textContent.startsWith('no news')")


def test_a_served_page_is_begun_anew_for_the_first_figures_and_for_another_run(
    tmp_path: Path, browser: Browser
) -> None:
    runs = [tmp_path / "a"]
    runs[0].mkdir()
    (runs[0] / "status.json").write_text(json.dumps({"state": "running", "total_steps": 20}))
    with served(lambda: report_page(runs, refresh_s=0.2)) as url:
        browser.open(url)
        assert browser.run("document.querySelectorAll('section.chart').length") == 0
        add_lines(runs[0], {"step": 10, "elapsed_s": 30.0, "train/mlm_loss": 7.5})
        browser.wait_until("document.querySelector('.legend')?.textContent.includes('7.5')")
        browser.wait_until("document.getElementById('news').textContent.startsWith('live')")
        runs[0] = make_run(tmp_path / "b", 6.25)
        browser.wait_until("document.querySelector('.legend')?.textContent.includes('6.25')")
        assert browser.run("document.querySelector('h1').textContent") == "b"
        assert browser.errors == []


def test_the_command_serves_until_it_is_interrupted(tmp_path: Path, repository: Path) -> None:
    run = make_run(tmp_path / "a", 7.5)
    process = subprocess.Popen(
        [sys.executable, repository / "pretrain" / "report.py", run, "--serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        assert rows(ask(url)[1], "Where it stands")[1][3] == "20 of 20"
        add_lines(run, {"step": 30, "train/mlm_loss": 6.25})
        # Within ten times what the page takes to be made.
        deadline = time.monotonic() + 60
        while rows(ask(url)[1], "Where it stands")[1][3] != "30 of 20":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, stdout, stderr) == (130, "", "interrupted\n")
    assert not (run / "report.html").exists()
