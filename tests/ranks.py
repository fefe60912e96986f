"""Run a worker script as several processes that form a gloo group, as a launcher would."""

import os
import socket
import tempfile
import time
from pathlib import Path

from tests import forked

REPOSITORY = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 240


def run_ranks(worker: Path, num_ranks: int, *args: str, timeout_s: float = _TIMEOUT_S) -> None:
    """Start the processes and wait for all; the first that fails fails the test with its stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        # Files, not pipes: a rank whose pipe is full would stop, and the others wait for it.
        logs = [Path(folder, f"{rank}.log") for rank in range(num_ranks)]
        processes = [
            forked.start(
                worker,
                args,
                {
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(num_ranks),
                    "LOCAL_WORLD_SIZE": str(num_ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(REPOSITORY),
                },
                stdout=log,
                stderr=log,
            )
            for rank, log in enumerate(logs)
        ]
        deadline = time.monotonic() + timeout_s
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
                process.join()
        for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
            code = process.exitcode
            assert code == 0, f"rank {rank} exits with {code}:\n{log.read_text()[-8000:]}"


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
