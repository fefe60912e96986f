"""The exceptions that users see, and the exit codes they become.

ZerobertError
├── ConfigError(ValueError)            a flag, a JSON key or a combination that can't be served
├── DataError                          text, shards or labels that are not what they should be
│   ├── ShardFormatError               an HDF5 file that is not in NVIDIA's layout
│   └── ManifestError                  a folder that is incomplete or was changed since
├── CheckpointError                    a model folder or state that can't be loaded or written
├── MissingDependencyError(ImportError) an optional package that this request needs
├── ConnectionLostError                another process of the run, or the way to it, is gone
└── TrainingDivergedError              the loss is no longer a finite number

A message says where, what was wanted, what was got, and what to do.
"""

import argparse
import os
import select
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_USER = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class ZerobertError(Exception):
    """The user can mend it. Scripts print it as one line on stderr and exit with `EXIT_USER`."""


class ConfigError(ZerobertError, ValueError):
    """A flag, a JSON key or a combination of them that can't be served."""


class DataError(ZerobertError):
    """Text, shards or labels that are not what they should be."""


class ShardFormatError(DataError):
    """An HDF5 file that is not in NVIDIA's layout."""


class ManifestError(DataError):
    """A folder that is incomplete, or was changed after its manifest was written."""


class CheckpointError(ZerobertError):
    """A model folder or a training state that can't be loaded or written."""


class MissingDependencyError(ZerobertError, ImportError):
    """An optional package that this request needs; the message has the command that installs it."""


class ConnectionLostError(ZerobertError):
    """Another process of the run does not answer any more."""


class TrainingDivergedError(ZerobertError):
    """The loss is no longer a finite number."""


def exit_code(error: BaseException) -> int:
    """What a script that ends by this exception exits with."""
    if isinstance(error, ZerobertError):
        return EXIT_USER
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    return 1


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line that says where to look, as all of ours, and which takes
    flags in full: what reads them before it, a launcher, knows no other form.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message}; see {self.prog} --help")


def truth(text: str) -> bool:
    """A flag's yes or no, in any of the ways that Python's strtobool knows.

    Raises:
        argparse.ArgumentTypeError: it is none of them.
    """
    if text.lower() in ("y", "yes", "t", "true", "on", "1"):
        return True
    if text.lower() in ("n", "no", "f", "false", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"wanted true or false, got {text!r}")


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script's `main` and exit with the code that its outcome means to the user.

    A `ZerobertError` becomes one line on stderr and `EXIT_USER`; Ctrl-C becomes `EXIT_INTERRUPTED`;
    every other exception is a bug and keeps its traceback.
    """
    try:
        code = _outcome(main)
        if sys.stdout is not None:  # closed by who started us
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        code = 0
    sys.exit(code)


def _outcome(main: Callable[[], int]) -> int:
    try:
        return main()
    except ZerobertError as error:
        print_error(error)
        return exit_code(error)
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return exit_code(error)


def _reader_is_gone() -> bool:
    """Whether what reads our output (head, less) went away; what it did not want is dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    is_gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_gone


def expect_interrupts() -> None:
    """Make Ctrl-C during a script's slow imports one line too; `run_script` serves what follows."""

    def hook(
        kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
    ) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(EXIT_INTERRUPTED)  # Python would end by the signal, which is no exit code
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def print_error(error: ZerobertError) -> None:
    """Print an error as one line on stderr, with the rank's number where it is not rank 0."""
    rank = os.environ.get("RANK", "0")
    where = f"[rank {rank}] " if rank != "0" else ""
    message = " ".join(str(error).split())
    print(f"{where}error: {message}", file=sys.stderr)


def print_aside(message: str) -> None:
    """Tell on stderr what does not stop a run, a warning for one; rank 0 tells it for all."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)
