"""Run commands of ours and of peers in turns, and write what they cost as a dated report."""

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


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
) -> Path:
    """Write `[theme]_[slug]_[yyyymm].md`, and the figures beside it as JSON.

    Args:
        command: how to make it again, with names instead of this machine's paths.
        slug: the hardware in one word.
    """
    today = datetime.datetime.now(datetime.timezone.utc).date()
    path = HERE / f"{theme}_{slug}_{today:%Y%m}.md"
    facts = [
        f"{today}, {hardware()}, Python {platform.python_version()}, {platform.system()}",
        f"`{command}`",
    ]
    path.write_text("\n\n".join([f"# {title}", *facts, *sections]) + "\n", encoding="utf-8")
    record = {"date": str(today), "hardware": hardware(), "command": command, **figures}
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
