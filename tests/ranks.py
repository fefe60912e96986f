"""Run a worker script as several processes that form a gloo group, as a launcher would."""

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 240


def run_ranks(worker: Path, num_ranks: int, *args: str) -> None:
    """Start the processes and wait for all; the first that fails fails the test with its stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(num_ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
        }
        command = [sys.executable, str(worker), *args]
        processes.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    try:
        results = [process.communicate(timeout=_TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, (_, stderr)) in enumerate(zip(processes, results, strict=True)):
        assert process.returncode == 0, f"rank {rank} exits with {process.returncode}:\n{stderr}"
