"""Run commands of ours and of peers in turns, and write what they cost as a dated report."""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# What a trial run reports means nothing: git ignores it, and it overwrites no real figures.
QUICK = HERE.parent / "runs" / "quick"
PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "triton", "apex", "flash-attn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one run of a command took, start-up included."""

    cpu_s: float
    wall_s: float
    peak_mb: float  # of the largest of its processes


# A process counts the memory of the one that started it as its own: let a small one start it.
_STARTER = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump([used.ru_utime + used.ru_stime, used.ru_maxrss], file)
sys.exit(code)
"""


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        used = Path(folder, "used.json")
        started = time.monotonic()
        process = subprocess.run(
            [sys.executable, "-S", "-c", _STARTER, str(used), *map(str, command)],
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wall_s = time.monotonic() - started
        if process.returncode != 0:
            said = process.stdout[-2000:]
            raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{said}")
        cpu_s, peak = json.loads(used.read_text(encoding="utf-8"))
    return Cost(
        cpu_s=cpu_s, wall_s=wall_s, peak_mb=peak / (1024 if sys.platform == "linux" else 1 << 20)
    )


def interleaved(
    contenders: Mapping[str, Callable[[], Cost]], *, rounds: int
) -> dict[str, list[Cost]]:
    """Run each contender once a round, so that a noisy spell of the machine hits them all."""
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, contender in contenders.items():
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            costs[name].append(contender())
    return costs


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def ratio(mine: Sequence[float], other: Sequence[float]) -> float:
    """Of the medians, as whoever divides the two figures of a table gets it."""
    return median(mine) / median(other)


def spread(values: Sequence[float]) -> str:
    """The median, with the least and the largest."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def hardware() -> str:
    """The processor's name and the number of cores that this process may use."""
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        names = [line.split(":", 1)[1] for line in described.splitlines() if "model name" in line]
    except OSError:
        names = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = (names or [platform.processor()])[0].strip()
    return f"{name}, {cores} {'core' if cores == 1 else 'cores'}"


@contextlib.contextmanager
def noting(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Note what a contender fails with: a kernel that does not compile, or memory that runs out,
    must not cost the others' figures.
    """
    import torch  # which what only starts commands has no use for

    try:
        yield
    except Exception as error:  # noqa: BLE001 - Triton's and the compilers' have no other base
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        failed[name] = f"{type(error).__name__}: {lines[0]:.160}"
    if name in failed and torch.cuda.is_available():
        torch.cuda.empty_cache()


def tell_failed(failed: Mapping[str, str]) -> str:
    """What did not run, a paragraph each."""
    return "".join(f"\n\n{name} failed: {why}." for name, why in failed.items())


def versions() -> dict[str, str]:
    """Of Python and of the packages whose speed is measured."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def gpu() -> str | None:
    """The first GPU, its driver and CUDA; None for none."""
    import torch

    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = "driver unknown"
    with contextlib.suppress(OSError):
        said = subprocess.run(query, capture_output=True, text=True).stdout.split()
        driver = f"driver {said[0]}" if said else driver
    return f"{torch.cuda.get_device_name()}, {driver}, CUDA {torch.version.cuda}"


@functools.cache
def commit() -> str | None:
    """What is measured, with a word where the code differs from it; None without git."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *words], cwd=HERE.parent, capture_output=True, text=True, check=False
        )

    try:
        said = git("rev-parse", "--short", "HEAD").stdout.strip()
        is_changed = git("diff", "--quiet", "HEAD", "--", "*.py").returncode != 0
    except OSError:
        return None
    return f"{said}, changed" if said and is_changed else said or None


def command(script: str, words: Sequence[str] | None) -> str:
    """How a report is made again, with names instead of this machine's paths.

    Args:
        words: the flags; None for those of this process.
    """
    given = sys.argv[1:] if words is None else words
    return shlex.join(["python", f"benchmarks/{script}", *map(_named, given)])


def _named(value: Any) -> Any:
    """A value for a report: a path is no one else's business, its last part may say something."""
    if isinstance(value, (list, tuple)):
        return [_named(each) for each in value]
    is_path = isinstance(value, Path) or (isinstance(value, str) and value.startswith("/"))
    return Path(value).name if is_path else value


def device_flag(device: str) -> tuple[str, str]:
    """How the product's own commands are told a torch device."""
    return "--device", "cpu" if device == "cpu" else "gpu"


def write_report(
    theme: str,
    *,
    title: str,
    command: str,
    sections: Sequence[str],
    figures: Mapping[str, Any],
    slug: str,
    arguments: argparse.Namespace,
) -> Path:
    """Write `[theme]_[slug]_[yyyymm].md`, and the figures beside it as JSON.

    Scripts call it whenever there is more to tell, so that nothing is lost where one is cut off.

    Args:
        command: how to make it again, with names instead of this machine's paths.
        slug: the hardware in one word.
        arguments: all that was asked for; with `quick` the report goes to where git ignores it.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    folder = QUICK if vars(arguments).get("quick") else HERE
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{theme}_{slug}_{now:%Y%m}.md"
    on_gpu = gpu() if str(vars(arguments).get("device", "cpu")).startswith("cuda") else None
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    facts = [
        f"{now.date()}, {on_gpu + '; ' if on_gpu else ''}{hardware()}, {platform.system()}; "
        f"{packages}; commit {commit() or 'unknown'}; {_threads()}",
        f"`{command}`",
    ]
    _replace(path, "\n\n".join([f"# {title}", *facts, *sections]) + "\n")
    record = {
        "date": now.isoformat(timespec="seconds"),
        "hardware": hardware(),
        "gpu": on_gpu,
        "versions": versions(),
        "commit": commit(),
        "command": command,
        "arguments": {name: _named(value) for name, value in vars(arguments).items()},
        **figures,
    }
    _replace(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    return path


def _replace(path: Path, text: str) -> None:
    """Write a file whole: who is killed here leaves the one that was there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _threads() -> str:
    """How many threads torch has; commands that are run have their own number."""
    torch = sys.modules.get("torch")
    return f"{torch.get_num_threads()} threads" if torch else "threads as the commands choose"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
