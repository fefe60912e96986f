"""Stages that are done once: each leaves a record, so that a demo that was stopped goes on."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from zerobert.manifest import write_json

LAUNCHER = Path(__file__).resolve().parents[1] / "launch.sh"
_STEP = re.compile(r"global step:? (\d+)")
_TELL_EVERY_S = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the demo.

    Attributes:
        output: the folder or file that it fills; nobody else writes there.
        settings: what its result depends on, apart from the stages before it.
        run: does the work, and returns an exit code.
        summarize: one line about the result, read from what was written.
    """

    name: str
    output: Path
    settings: Sequence[str]
    run: Callable[[], int]
    summarize: Callable[[], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a stage: `line` is None until it is done, `fingerprint` empty until it has
    begun.
    """

    fingerprint: str
    line: str | None = None
    seconds: float = 0.0


def run_stages(stages: Sequence[Stage], records: Path) -> tuple[int, list[Record]]:
    """Run what is not done yet, in order; stops at the first failure.

    Whatever a stage left for other settings, or before a stage that had to be run again, is removed
    first. What it left for the same settings stays, and its program goes on from there; what no
    record tells of stays too.

    Returns:
        The exit code, and the records of the stages that are done.
    """
    done: list[Record] = []
    fingerprint = ""
    for number, stage in enumerate(stages, start=1):
        fingerprint = _fingerprint(fingerprint, stage.settings)
        path = records / f"{number}-{stage.name}.json"
        record = _read_record(path)
        is_known = record.fingerprint == fingerprint
        was_done = is_known and record.line is not None and stage.output.exists()
        if not was_done:
            if record.fingerprint and not is_known:
                remove(stage.output)
            record, code = _run_stage(stage, path, fingerprint)
            if code:
                return code, done
        done.append(record)
        note = "done before" if was_done else f"{record.seconds:.0f} s"
        print(f"[{number}/{len(stages)}] {stage.name}: {record.line} ({note}) -> {stage.output}")
        sys.stdout.flush()
    return 0, done


def _run_stage(stage: Stage, path: Path, fingerprint: str) -> tuple[Record, int]:
    record = Record(fingerprint=fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dataclasses.asdict(record))
    started = time.monotonic()
    code = stage.run()
    if code == 0:
        seconds = time.monotonic() - started
        record = dataclasses.replace(record, line=stage.summarize(), seconds=seconds)
        write_json(path, dataclasses.asdict(record))
    return record, code


def _fingerprint(before: str, settings: Sequence[str]) -> str:
    return hashlib.sha256("\0".join([before, *settings]).encode()).hexdigest()


def _read_record(path: Path) -> Record:
    return Record(**json.loads(path.read_text())) if path.is_file() else Record(fingerprint="")


def remove(path: Path) -> None:
    """Remove a folder or a file, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def launch(*flags: str) -> list[str]:
    """A command of `launch.sh`, as a user would type it from where they stand."""
    return ["bash", os.path.relpath(LAUNCHER), *flags]


def run_command(command: Sequence[str], log: Path, *, num_steps: int | None = None) -> int:
    """Show a command and run it; its output goes to a file, its errors to the terminal.

    Args:
        num_steps: how many steps it trains; draws a progress bar from the steps that it reports,
            or prints a line now and then where there is no terminal.

    Returns:
        Its exit code.
    """
    print(f"$ {' '.join(command)}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    told_s = time.monotonic()
    end = f" of {num_steps}" if num_steps else ""
    bar = tqdm(
        total=num_steps,
        unit="step",
        leave=False,
        disable=num_steps is None or not sys.stderr.isatty(),
    )
    with (
        bar,
        open(log, "w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "ZEROBERT_PYTHON": sys.executable},
        ) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                file.write(line)
                file.flush()
                if step := _STEP.search(line):
                    bar.update(int(step[1]) - bar.n)
                    if bar.disable and time.monotonic() - told_s > _TELL_EVERY_S:
                        told_s = time.monotonic()
                        print(f"  step {step[1]}{end}", flush=True)
        except BaseException:
            # Ctrl-C may have reached only us; a training run saves its state before it ends.
            child.terminate()
            child.wait()
            raise
    if child.returncode:
        print(f"failed with exit code {child.returncode}; what it printed is in {log}")
    return child.returncode
