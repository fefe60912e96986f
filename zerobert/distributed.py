"""Rank, world size and the few small collectives outside the engine; all work with no group.

They carry counts, flags and names between the processes' CPUs, over gloo, so that none of them
waits for a GPU.
"""

import contextlib
import datetime
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from zerobert.errors import EXIT_USER, ConnectionLostError, ZerobertError

# What a thread of its own may wait for: another rank that writes large files.
_PATIENCE = datetime.timedelta(hours=1)
# How torch's gloo and nccl tell, in RuntimeErrors of no class of their own, that a peer is gone.
_LOST = re.compile(
    r"gloo/transport|Connection (closed|reset|refused)|connectFullMesh|Timed out waiting|"
    r"wait timeout|Socket Timeout|NCCL.*(timeout|communicator was aborted|system error)|"
    r"Broken pipe|No route to host|Network is unreachable",
    re.IGNORECASE,
)


def is_initialized() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 where there is no process group."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """The number of processes, 1 where there is no process group."""
    return dist.get_world_size() if is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def new_group() -> dist.ProcessGroup | None:
    """One more gloo group of all processes, for a thread of its own; None where there is one
    process. Collective.
    """
    return dist.new_group(backend="gloo", timeout=_PATIENCE) if world_size() > 1 else None


def set_timeout(seconds: float) -> None:
    """How long a collective of any group there is may take, until the connection counts as lost."""
    if world_size() > 1:
        _cpu_group()
        for group in list(dist.distributed_c10d._world.pg_map):
            timeout = datetime.timedelta(seconds=seconds)
            dist.distributed_c10d._set_pg_timeout(timeout, group)


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Turn the failure of a collective into an error that says so.

    Raises:
        ConnectionLostError: another process, or the way to it, is gone.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if world_size() == 1 or not (isinstance(error, dist.DistError) or _LOST.search(reason)):
            raise
        raise ConnectionLostError(
            f"the connection to another process is lost ({reason[:160]}): look for that process's "
            "own error, else for the network between the machines; the same command goes on from "
            "the newest state"
        ) from error


@functools.lru_cache(maxsize=1)
def _cpu_group() -> dist.ProcessGroup | None:
    """A gloo group of all processes; None for the default group where that is gloo already."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def barrier() -> None:
    """Wait for every process."""
    all_reduce_sum([0.0])


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """The sum over all processes of each value, in float64: counts stay exact up to 2^53."""
    if world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=_cpu_group())
    return [float(value) for value in total.tolist()]


def all_reduce_min(value: int) -> int:
    """The least of all processes' values."""
    if world_size() == 1:
        return value
    least = torch.tensor(value)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=_cpu_group())
    return int(least)


def gather_object(value: Any) -> list[Any]:
    """Every process's value in the order of ranks, on every process."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=_cpu_group())
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_cpu_group())
    return box[0]


@contextlib.contextmanager
def one_voice(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Let one process speak for all when something fails that only some may notice.

    The first failing rank's error is raised there, and the others exit quietly with the same code.
    Every process must pass through.

    Args:
        group: of `new_group`, in another thread than the main one.

    Raises:
        ZerobertError: this process's own, if no lower rank has failed.
        SystemExit: another process has failed.
    """
    error: ZerobertError | None = None
    try:
        yield
    except ZerobertError as caught:
        error = caught
    failed = [error is not None]
    if world_size() > 1:
        failed = [False] * world_size()
        dist.all_gather_object(failed, error is not None, group=group or _cpu_group())
    if True not in failed:
        return
    if error is not None and failed.index(True) == rank():
        raise error
    raise SystemExit(EXIT_USER)
