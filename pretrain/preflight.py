"""Before the first step of several processes: do they run the same code, on the same data, with the
same configuration, into one folder, and how fast do they reach each other?
"""

import hashlib
import json
import platform
import socket
import time
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zerobert import distributed, engine
from zerobert.errors import ConfigError
from zerobert.manifest import write_text
from zerobert.tracking import code_version

# A file that one machine writes shows on another after the file system's cache ends, on NFS.
_SHARED_FOLDER_S = 60.0
_BANDWIDTH_BYTES = 16 << 20
# A rank that is so many times slower than the fastest is worth a line.
_SLOW_FACTOR = 3.0


def check(folder: Path, config: Mapping[str, Any], data: Mapping[str, Any]) -> str | None:
    """Hold all processes against rank 0; collective.

    Args:
        folder: the run's, which rank 0 has made.
        config: the resolved experiment.
        data: the shards' fingerprint.

    Returns:
        A line about the connection; None for one process.

    Raises:
        ConfigError: names the processes that differ, and in what; rank 0 raises it, the others end
            quietly.
    """
    if distributed.world_size() == 1:
        return None
    facts = {
        "zerobert": code_version(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "configuration": _digest(config),
        "data": _digest(data),
    }
    of_ranks = distributed.gather_object((socket.gethostname(), facts))
    with distributed.one_voice():
        if distributed.is_main():
            _check_alike(of_ranks)
    _check_shared(folder, [host for host, _ in of_ranks])
    return _measure([host for host, _ in of_ranks])


def _digest(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_alike(of_ranks: list[tuple[str, dict[str, str]]]) -> None:
    first_host, wanted = of_ranks[0]
    for name, value in wanted.items():
        others = {
            rank: (host, facts[name])
            for rank, (host, facts) in enumerate(of_ranks)
            if facts[name] != value
        }
        if others:
            rank, (host, got) = next(iter(others.items()))
            more = f", and {len(others) - 1} more differ" if len(others) > 1 else ""
            raise ConfigError(
                f"the processes are not alike: {name} is {value} on rank 0 ({first_host}), {got} "
                f"on rank {rank} ({host}){more}; give all machines the same clone, environment, "
                "experiment and shards"
            )


def _check_shared(folder: Path, hosts: list[str]) -> None:
    """All ranks write their part of a state into one folder."""
    name = distributed.broadcast_object(f".preflight-{uuid.uuid4().hex}")
    with distributed.one_voice():
        if distributed.is_main():
            write_text(folder / name, "")
    deadline = time.monotonic() + _SHARED_FOLDER_S
    while not (is_there := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    of_ranks = distributed.gather_object(is_there)
    with distributed.one_voice():
        if distributed.is_main():
            (folder / name).unlink()
            blind = [hosts[rank] for rank, sees in enumerate(of_ranks) if not sees]
            if blind:
                raise ConfigError(
                    f"{', '.join(sorted(set(blind)))} can't see {folder / name}, which rank 0 has "
                    f"written on {hosts[0]}: --output_dir must lie on a file system that all "
                    "machines share"
                )


def _measure(hosts: list[str]) -> str:
    """The rate of a sum over all ranks as training makes it, and who is late for it."""
    engine.time_all_reduce(1)  # the connections are made now
    latency_s = min(engine.time_all_reduce(1) for _ in range(5))
    seconds = min(engine.time_all_reduce(_BANDWIDTH_BYTES) for _ in range(3))
    # What a ring sends and receives of it, on each rank.
    ranks = distributed.world_size()
    rate = 2 * (ranks - 1) / ranks * _BANDWIDTH_BYTES / seconds
    line = (
        f"connection: {ranks} processes on {len(set(hosts))} machines, {rate / 1e9:.2f} GB/s a "
        f"process in a sum of {_BANDWIDTH_BYTES >> 20} MiB, {1e3 * latency_s:.2f} ms for a number"
    )
    busy_s = distributed.gather_object(_work_s())
    fastest = min(busy_s)
    late = sorted({hosts[rank] for rank, s in enumerate(busy_s) if s > _SLOW_FACTOR * fastest})
    if late:
        line += (
            f"; warning: {', '.join(late)} computes more than {_SLOW_FACTOR:g} times slower than "
            "the fastest, and all wait for it"
        )
    return line


def _work_s() -> float:
    """A few milliseconds of the work that training consists of."""
    return min(engine.time_product() for _ in range(5))
