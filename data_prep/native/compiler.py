"""Build the C sources of this folder with the machine's compiler, once, and load them."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCES = ("words.c", "instances.c")
FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")
_COMPILERS = ("cc", "gcc", "clang")
# Processes that this one starts inherit it: the user is told once.
_TOLD = "ZEROBERT_TOLD_OF_COMPILER"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library; None, with a line on stderr, where it can't be built."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        reason = next(reversed(str(detail).strip().splitlines()), "the compiler failed")
        if _TOLD not in os.environ:
            os.environ[_TOLD] = "1"
            _tell(reason)
        return None


def _tell(reason: str) -> None:
    print(
        f"note: the compiled parts of data_prep can't be built ({reason}); plain Python does "
        "the same, many times slower. All it needs is a C compiler: apt-get install gcc, or "
        "on a Mac xcode-select --install",
        file=sys.stderr,
    )


def _built() -> Path:
    """The path of the library, built now if no earlier process has done it.

    Raises:
        OSError: there is no compiler, or no place to write to.
        CalledProcessError: the compiler refused the sources.
    """
    problems = []
    for folder in (_cache_folder(), _private_folder()):
        library = folder / f"data_prep-{_fingerprint()}.so"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_foreign(folder)
            if library.is_file() and _can_be_loaded(library):
                return library
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                finished = Path(scratch, library.name)
                compile_library(finished)
                ctypes.CDLL(str(finished))
                return finished.replace(library)
        except OSError as error:  # no permission, a read-only disk, a full one
            problems.append(error)
    raise problems[0]


def _can_be_loaded(library: Path) -> bool:
    try:
        ctypes.CDLL(str(library))
    except OSError:  # cut short, or of another machine
        return False
    return True


def _refuse_foreign(folder: Path) -> None:
    """Load nothing that another user may have put into a folder that all can write to.

    Raises:
        PermissionError: the folder belongs to somebody else.
    """
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")


def compile_library(library: Path, *flags: str) -> None:
    """Compile the sources, with more flags than usual where some are given.

    Raises:
        OSError: there is no compiler.
        CalledProcessError: the compiler refused the sources.
    """
    command = [*_compiler(), *FLAGS, *flags, "-o", str(library)]
    command += [str(FOLDER / source) for source in SOURCES]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _compiler() -> list[str]:
    for name in (os.environ.get("CC", ""), *_COMPILERS):
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return words
    raise FileNotFoundError("there is no C compiler")


def _cache_folder() -> Path:
    if configured := os.environ.get("XDG_CACHE_HOME"):
        return Path(configured, "zerobert")
    try:
        return Path.home() / ".cache" / "zerobert"
    except RuntimeError:  # a user without a home, as in some containers
        return _private_folder()


def _private_folder() -> Path:
    """A folder of this user's for machines where the home can't be written."""
    return Path(tempfile.gettempdir(), f"zerobert-{os.getuid()}")


@functools.cache
def _fingerprint() -> str:
    """Changes with the sources and with all that a library must fit."""
    machine = [sys.platform, platform.machine(), *platform.libc_ver(), *FLAGS]
    digest = hashlib.sha256("\0".join(machine).encode())
    for source in sorted(FOLDER.glob("*.[ch]")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
