"""What happens to runs of weeks, in minutes: kills, damaged states, another number of ranks."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import toy_runs as toy
from zerobert.errors import DataError
from zerobert.tracking import read_metrics

STEPS, KILLS = 200, 20
Phase = tuple[int, int]  # ranks, ZeRO stage


def _command(data: Path, output: Path, phase: Phase) -> list[str]:
    """A run of small steps with dropout, on one or more ranks."""
    ranks, stage = phase
    text = (data / "toy.json").read_text().replace('"stage": 1', f'"stage": {stage}')
    config = output.parent / f"toy_{stage}.json"
    config.write_text(text)
    launcher = [sys.executable, str(toy.RUN)]
    if ranks > 1:
        launcher += ["--n_gpu", str(ranks)]
    flags = ["--max_steps", str(STEPS), "--save_steps", "5", "--eval_steps", "50"]
    folders = ["--input_dir", str(data), "--output_dir", str(output)]
    return [*launcher, "--deepspeed_config", str(config), *folders, *flags]


def _last_step(output: Path) -> int:
    try:
        lines = read_metrics(output / "metrics.jsonl")
    except DataError:  # not there yet
        return 0
    return max((line["step"] for line in lines), default=0)


def _run_and_kill(command: list[str], output: Path, step: int, delay_s: float) -> None:
    """Kill all processes of a run some time after it has made a step."""
    log = output.parent / "killed.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=toy.environment(), stdout=file, stderr=file, start_new_session=True
        )
    deadline = time.monotonic() + toy.TIMEOUT_S
    while _last_step(output) < step:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    time.sleep(delay_s)
    _kill_session(process.pid)
    process.wait()


def _kill_session(leader: int) -> None:
    """The launcher gives its ranks a session of their own: find all that descend from it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    doomed = [leader]
    for pid in doomed:
        doomed += children.get(pid, [])
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _truncate_newest(output: Path) -> Path:
    newest = max(output.glob("state_*"), key=lambda path: int(path.name.partition("_")[2]))
    pieces = newest / "pieces_0.safetensors"
    os.truncate(pieces, pieces.stat().st_size // 2)
    return newest


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "phases",
    [((1, 1),), ((2, 1), (1, 3), (2, 2))],
    ids=["one rank", "two ranks, one, two, at other stages"],
)
def test_a_run_that_is_killed_over_and_over_ends_as_an_unbroken_one(
    phases: tuple[Phase, ...],
    data: Path,
    tmp_path: Path,
) -> None:
    whole = tmp_path / "whole"
    done = toy.run(_command(data, whole, phases[0]))
    assert done.returncode == 0, done.stderr

    generator = random.Random(3)
    broken = tmp_path / "broken"
    steps = sorted(generator.sample(range(8, STEPS - 5), KILLS))
    truncated = None
    for number, step in enumerate(steps):
        phase = phases[number * len(phases) // KILLS]
        _run_and_kill(_command(data, broken, phase), broken, step, generator.uniform(0, 0.2))
        log = (tmp_path / "killed.log").read_text()
        if truncated is not None:
            assert f"{truncated} is not used: " in log
        truncated = _truncate_newest(broken) if number in (KILLS // 3, KILLS - 2) else None
    done = toy.run(_command(data, broken, phases[-1]))
    assert done.returncode == 0, done.stderr

    wanted, got = toy.losses(whole), toy.losses(broken)
    assert list(got) == list(wanted) == list(range(1, STEPS + 1))
    if len(phases) == 1:
        assert got == wanted
    else:
        assert got == pytest.approx(wanted, abs=1e-3)
    weights = toy.weights(broken, STEPS)
    for name, weight in toy.weights(whole, STEPS).items():
        if len(phases) == 1:
            assert torch.equal(weights[name], weight), name
    leftovers = [path.name for path in broken.iterdir() if path.name.startswith(".")]
    assert not leftovers
