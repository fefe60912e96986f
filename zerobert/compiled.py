"""Libraries of C, built once with the machine's compiler and kept in the user's cache folder.

Whoever has a faster way in C has the same in Python or torch too, for machines without a compiler.
"""

import ctypes
import dataclasses
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_COMPILERS = ("cc", "gcc", "clang")
_COMMON_FLAGS = ("-O3", "-fPIC", "-fvisibility=hidden")
_CPUINFO = Path("/proc/cpuinfo")
_CPU_LINES = ("model name|CPU part", "flags|Features")  # of x86, then of Arm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Library:
    """C sources that make one library.

    Attributes:
        name: what its file begins with.
        folder: where the sources are.
        flags: of the compiler, beside the usual ones.
        is_for_this_cpu: built for the instructions of the processor at hand.
    """

    name: str
    folder: Path
    sources: tuple[str, ...]
    flags: tuple[str, ...] = ()
    is_for_this_cpu: bool = False


def load(library: Library) -> ctypes.CDLL:
    """The library, built now if no earlier process has done it.

    Raises:
        OSError: there is no compiler, no place to write to, or what was built can't be loaded.
        CalledProcessError: the compiler refused the sources.
    """
    return ctypes.CDLL(str(built(library)))


def reason(error: Exception) -> str:
    """What `load` failed for, in one line: the first that is called an error, or the last."""
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
    last = next(reversed(lines), "the compiler failed")
    return next((line for line in lines if "error:" in line), last)


def built(library: Library) -> Path:
    """The path of the library; see `load`."""
    problems: list[OSError | subprocess.CalledProcessError] = []
    for folder in (_cache_folder(), private_folder()):
        path = folder / file_name(library)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _refuse_foreign(folder)
            if path.is_file() and _can_be_loaded(path):
                return path
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                finished = Path(scratch, path.name)
                compile_to(finished, library)
                ctypes.CDLL(str(finished))
                return finished.replace(path)
        except (OSError, subprocess.CalledProcessError) as error:
            problems.append(error)  # no permission, a read-only disk, one too full for a compiler
    refusals = (error for error in problems if isinstance(error, subprocess.CalledProcessError))
    raise next(refusals, problems[0])


def _can_be_loaded(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path))
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


def compile_to(path: Path, library: Library, *flags: str) -> None:
    """Compile the sources, with more flags than usual where some are given.

    Raises:
        OSError: there is no compiler.
        CalledProcessError: the compiler refused the sources.
    """
    native = ("-march=native",) if library.is_for_this_cpu else ()
    compiler = _compiler()
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = []
        for source in library.sources:
            objects.append(str(Path(scratch, source).with_suffix(".o")))
            words = [*compiler, *_COMMON_FLAGS, *native, *library.flags, *flags]
            _run([*words, "-c", str(library.folder / source), "-o", objects[-1]])
        # Without the flags: that of OpenMP would name a library here, and torch has its own.
        sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
        _run([*compiler, *sanitizers, "-shared", *objects, "-lm", "-o", str(path)])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def has_compiler() -> bool:
    """Whether this machine can build libraries."""
    try:
        return bool(_compiler())
    except (FileNotFoundError, ValueError):  # ValueError: a CC that no shell would read
        return False


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
        return private_folder()


def private_folder() -> Path:
    """A folder of this user's for machines where the home can't be written."""
    return Path(tempfile.gettempdir(), f"zerobert-{os.getuid()}")


def file_name(library: Library) -> str:
    """The library's name; it changes with the sources and with all that a library must fit."""
    machine = [sys.platform, platform.machine(), *platform.libc_ver(), *library.flags]
    if library.is_for_this_cpu:  # a home may be shared by machines of several kinds
        machine.append(_cpu())
    digest = hashlib.sha256("\0".join(machine).encode())
    for source in sorted(library.folder.glob("*.[ch]")):
        digest.update(source.read_bytes())
    return f"{library.name}-{digest.hexdigest()[:16]}.so"


def _cpu() -> str:
    """The processor's model and instructions."""
    if not _CPUINFO.is_file():
        return platform.processor()
    text = _CPUINFO.read_text()
    lines = (re.search(rf"^(?:{words})\s*:(.*)$", text, re.MULTILINE) for words in _CPU_LINES)
    return "".join(line[1] for line in lines if line)
