"""Scripts in processes that are forked from one which has imported torch and DeepSpeed: new ones
take longer for these imports than for most of what the tests ask of them.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import (
    ForkServerContext,
    ForkServerProcess,
    SpawnContext,
    SpawnProcess,
)
from pathlib import Path

import pytest

# What a script imports by itself is cheap beside these.
_IMPORTED = ["tests.forked", "torch._dynamo", "deepspeed", "zerobert.engine", "zerobert.checkpoint"]


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    cwd: str | Path = ".",
    timeout_s: float,
) -> "subprocess.CompletedProcess[str]":
    """`python script flags` to its end; what is no script, or has not one thread, is not forked.

    Raises:
        subprocess.TimeoutExpired: it has been killed.
    """
    python, script, *flags = command
    assert python == sys.executable
    if Path(script).suffix != ".py" or environment.get("OMP_NUM_THREADS") != "1":
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s
        )
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = start(script, flags, environment, cwd=cwd, stdout=stdout, stderr=stderr)
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout_s)
        return subprocess.CompletedProcess(
            command, process.exitcode, stdout.read_text(), stderr.read_text()
        )


def start(
    script: str | Path,
    flags: Sequence[str],
    environment: Mapping[str, str],
    *,
    cwd: str | Path = ".",
    stdout: Path,
    stderr: Path,
) -> ForkServerProcess | SpawnProcess:
    """Start `python script flags`; `join` waits for it, `exitcode` is what Popen calls returncode.

    Args:
        environment: with one thread, as all of these processes have.
        stdout, stderr: files that are added to.
    """
    assert environment["OMP_NUM_THREADS"] == "1", "torch has been imported with one"
    for path in (stdout, stderr):
        path.touch()
    context = _forking(environment)
    places = [str(Path(place).absolute()) for place in (script, cwd, stdout, stderr)]
    process = context.Process(target=_run, args=(*places, list(flags), dict(environment)))
    process.start()
    return process


def _forking(environment: Mapping[str, str]) -> ForkServerContext | SpawnContext:
    """What starts processes. One that may use CUDA can't be forked: DeepSpeed asks for devices as
    it is imported, and CUDA refuses to start in what is forked afterwards.
    """
    import torch

    if environment.get("CUDA_VISIBLE_DEVICES") != "" and torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def _run(
    script: str, cwd: str, stdout: str, stderr: str, flags: list[str], environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = [script, *flags]
    sys.path.insert(0, str(Path(script).parent))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without
