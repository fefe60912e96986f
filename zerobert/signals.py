"""Ending a run from outside: SIGTERM and SIGUSR1 (preemption) and Ctrl-C save first.

The launcher of this project forwards the signals to the ranks, whose process numbers it reads from
a folder that it names in the environment.
"""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from zerobert.errors import EXIT_INTERRUPTED, EXIT_TERMINATED

RANK_FOLDER = "ZEROBERT_RANK_FOLDER"
_EXIT_CODES = {
    signal.SIGTERM: EXIT_TERMINATED,
    signal.SIGUSR1: EXIT_TERMINATED,
    signal.SIGINT: EXIT_INTERRUPTED,
}


class StopRequest:
    """Remembers that the process was asked to end; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.exit_code = 0
        for number in _EXIT_CODES:
            signal.signal(number, self._remember)
        _write_rank_file("pid", os.getpid())

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = _EXIT_CODES[signal.Signals(number)]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"stopping: the step is finished and saved first; Ctrl-C ends at once\n")


def flags(stop: StopRequest) -> list[float]:
    """What the ranks add up, to agree: 1 for each signal that this one has received."""
    return [float(stop.exit_code == code) for code in (EXIT_TERMINATED, EXIT_INTERRUPTED)]


def agreed_code(sums: Sequence[float]) -> int:
    """The exit code that all ranks' flags ask for, 0 for none."""
    terminated, interrupted = sums
    return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED if interrupted else 0


def report_exit(code: int) -> None:
    """Tell the launcher what this rank exits with: DeepSpeed's own does not always pass it on."""
    _write_rank_file("code", code)


def _write_rank_file(suffix: str, value: int) -> None:
    folder = Path(os.environ.get(RANK_FOLDER, "").strip())
    if folder.name and folder.is_dir():  # it is not on the other machines of a run
        path = folder / f"{os.environ.get('RANK', '0')}.{suffix}"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(str(value))
        temporary.rename(path)
