"""What a run says of itself: `metrics.jsonl` always, W&B when asked, `status.json` for scripts.

`metrics.jsonl` has one JSON object a line, `{"step": n, "<name>": number or null, ...}`; lines are
appended as the run goes, and two lines may share a step; a line with an `"event"` tells what
happened in between. Only the main process opens a tracker.
"""

import json
import math
import os
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zerobert import __version__
from zerobert.errors import ConfigError, DataError, MissingDependencyError
from zerobert.manifest import write_json, write_text, writing

if TYPE_CHECKING:
    from wandb import Run

METRICS_NAME = "metrics.jsonl"
STATUS_NAME = "status.json"
WANDB_ID_NAME = "wandb_run_id"
EVENT_KEY = "event"
ROLLBACK = "rollback"

State = Literal["running", "done", "preempted", "failed"]


class Tracker:
    """A run's `metrics.jsonl` and, when asked for, its W&B run; made by `open_tracker`."""

    def __init__(
        self, path: Path, run: "Run | None", before: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._path = path
        self._run = run
        self._num_lines = len(before)
        self._latest = {name: value for line in before for name, value in line.items()}

    def latest(self, name: str) -> float | int | None:
        """The last value of a metric, from before a resumption too; None where there is none."""
        return self._latest.get(name)

    def log(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Append one line, which is in the file when this returns.

        Args:
            metrics: None, and what is not finite, becomes null in the file: JSON has no NaN.

        Raises:
            DataError: the line can't be written.
        """
        self._append({"step": step, **{k: _finite(v) for k, v in metrics.items()}})
        self._latest.update(metrics)
        # What a resumed run makes again is in W&B already, and W&B would complain of each line.
        if self._run is not None and self._num_lines >= self._run.starting_step:
            row = {"step": step, **{k: v for k, v in metrics.items() if v is not None}}
            self._run.log(row, step=self._num_lines)

    def event(self, step: int, event: str, **facts: str | int) -> None:
        """Append a line `{"step": n, "event": "<name>", ...}` of something that happened.

        Raises:
            DataError: the line can't be written.
        """
        self._append({"step": step, EVENT_KEY: event, **facts})

    def _append(self, line: Mapping[str, Any]) -> None:
        # Opened for each line: nothing stays in a buffer, not even what a full disk refused.
        with writing(self._path), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._num_lines += 1

    def close(self, exit_code: int) -> None:
        """Finish the W&B run, waiting for its upload; twice is harmless.

        Args:
            exit_code: what the process is about to exit with; W&B shows all but 0 as failed.
        """
        if self._run is not None:
            self._run.finish(exit_code=exit_code)
            self._run = None


def open_tracker(
    output_dir: Path,
    *,
    wandb: bool,
    project: str,
    run_name: str,
    config: Mapping[str, Any],
    resume_step: int,
) -> Tracker:
    """Open the metrics of a run that starts (`resume_step` 0) or goes on after `resume_step`.

    A run that starts leaves no line of an earlier run in the folder. A run that goes on keeps the
    lines up to `resume_step`, because the later ones will be made again, and stays the same run in
    W&B.

    Raises:
        ConfigError: W&B is asked to work online and has no key, or refuses to start.
        MissingDependencyError: W&B is asked for and is not installed.
        DataError: the folder can't be written, or its metrics can't be read.
    """
    path = output_dir / METRICS_NAME
    with writing(path):
        output_dir.mkdir(parents=True, exist_ok=True)
    run = (
        _open_wandb(output_dir, project, run_name, config, is_resumed=resume_step > 0)
        if wandb
        else None
    )
    lines = read_metrics(path) if resume_step > 0 and path.exists() else []
    kept = lines_before(lines, resume_step)
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return Tracker(path, run, kept)


def lines_before(lines: Sequence[Mapping[str, Any]], step: int) -> list[Mapping[str, Any]]:
    """The lines that a run which goes on from a state at `step` stands on.

    What led to a rollback stays as it was, beyond `step` too, as long as the run stands on that
    rollback.
    """
    after_rollback: list[Mapping[str, Any]] = []
    for number in reversed(range(len(lines))):
        line = lines[number]
        if line.get(EVENT_KEY) == ROLLBACK and line.get("to_step", math.inf) <= step:
            return [*lines[: number + 1], *reversed(after_rollback)]
        if line["step"] <= step:
            after_rollback.append(line)
    return after_rollback[::-1]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, in the file's order; a torn last line is left out.

    Raises:
        DataError: the file can't be read, or a line other than the last is not such an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} can't be read ({error}); wanted the metrics of a training run"
        ) from error
    *whole, _torn = text.split("\n")  # every complete line ends in a newline
    return [_parse_line(line, f"{path}:{number}") for number, line in enumerate(whole, start=1)]


def write_status(output_dir: Path, state: State, exit_code: int | None, **extra: Any) -> None:
    """Write `status.json` atomically: where a script looks to see whether the run still lives.

    Args:
        exit_code: what the process exits with; None while it runs.
        extra: further keys: the step, the folder of the last model, which kind of run it is.

    Raises:
        DataError: the file can't be written.
    """
    updated_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    status = {"state": state, "exit_code": exit_code, "updated_at": updated_at, **extra}
    write_json(output_dir / STATUS_NAME, status)


def code_version() -> str:
    """The package's version and, in a checkout with git, its commit: `0.1.0 (a1fa8a6, changed)`."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:  # installed into another checkout
            return __version__
        commit = git("rev-parse", "--short=12", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return f"{__version__} ({commit}{', changed' if changes else ''})"


def read_status(output_dir: Path) -> dict[str, Any]:
    """What `write_status` wrote last; empty where there is nothing that can be read."""
    try:
        status = json.loads((output_dir / STATUS_NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return status if isinstance(status, dict) else {}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: wanted a JSON object, got {line[:40]!r} ({error}); delete the line"
        ) from error
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        raise DataError(
            f"{where}: wanted an object with a whole number 'step', got {line[:40]!r}; "
            "delete the line"
        )
    return value


def _open_wandb(
    output_dir: Path, project: str, run_name: str, config: Mapping[str, Any], *, is_resumed: bool
) -> "Run":
    """Start a W&B run whose files lie under `output_dir/wandb`."""
    try:
        import wandb
    except ImportError as error:
        raise MissingDependencyError(
            "--tracker wandb needs the package wandb, which is not installed: pip install wandb"
        ) from error
    try:
        _check_login(wandb)
        run = wandb.init(
            project=project,
            name=run_name,
            id=_wandb_id(output_dir, is_resumed=is_resumed),
            dir=output_dir,
            config=dict(config),
            resume=None if wandb.setup().settings.mode == "offline" else "allow",
            # The console belongs to us: W&B would wrap stdout and copy it.
            settings=wandb.Settings(console="off", quiet=True, disable_git=True),
        )
    except ConfigError:
        raise
    except (wandb.Error, ValueError) as error:  # the latter: a variable has no such value
        reason = str(error).replace(os.environ.get("WANDB_API_KEY") or "\0", "***")
        raise ConfigError(
            f"--tracker wandb: W&B did not start: {reason}; mend that, or set WANDB_MODE=offline"
        ) from error
    # Our step is the x axis of every chart. W&B's own counter may not go back, as a rollback does:
    # it gets the number of our line, by which it also knows the lines that it has.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _check_login(wandb: Any) -> None:
    """Ask first, which keeps W&B from prompting on a terminal, where a job would wait for ever. The
    key itself never passes through here: W&B finds it.
    """
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "--tracker wandb: W&B is online and has no API key; run `wandb login`, set "
            "WANDB_API_KEY, or set WANDB_MODE=offline, which needs no account"
        )


def _wandb_id(output_dir: Path, *, is_resumed: bool) -> str:
    """The id of this folder's run; a run that starts afresh gets a new one."""
    path = output_dir / WANDB_ID_NAME
    if is_resumed and path.is_file() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    fresh = uuid.uuid4().hex[:16]
    write_text(path, fresh + "\n")
    return fresh
