"""Build the C sources of this folder with the machine's compiler, once, and load them."""

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path

from zerobert import compiled

LIBRARY = compiled.Library(
    name="data_prep",
    folder=Path(__file__).resolve().parent,
    sources=("words.c", "instances.c"),
    flags=("-std=c11",),
)
# Processes that this one starts inherit it: the user is told once.
_TOLD = "ZEROBERT_TOLD_OF_COMPILER"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library; None, with a line on stderr, where it can't be built."""
    try:
        return compiled.load(LIBRARY)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        if _TOLD not in os.environ:
            os.environ[_TOLD] = "1"
            _tell(compiled.reason(error))
        return None


def _tell(reason: str) -> None:
    print(
        f"note: the compiled parts of data_prep can't be built ({reason}); plain Python does "
        "the same, many times slower. All it needs is a C compiler: apt-get install gcc, or "
        "on a Mac xcode-select --install",
        file=sys.stderr,
    )
