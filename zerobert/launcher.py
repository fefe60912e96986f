"""Start DeepSpeed's launcher, and do what it does not: signals that come in here reach the ranks,
their exit code goes out, and no process stays behind. `run_rank` is the ranks' end of it.

`python zerobert/launcher.py SCRIPT [--n_gpu N | --hostfile FILE ...] [flags of SCRIPT]`

On several machines the signals go to the ranks of this one, which tell the others.
"""

import atexit
import contextlib
import itertools
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from types import FrameType

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from zerobert.errors import (
    ConfigError,
    ConnectionLostError,
    ZerobertError,
    exit_code,
    print_error,
    run_script,
)
from zerobert.signals import RANK_FOLDER, StopRequest, report_exit
from zerobert.slurm import adopt_slurm

_POLL_S = 0.2
# Flags of DeepSpeed's launcher for several machines.
_WITHOUT_VALUE = ("--no_ssh", "--no_ssh_check", "--force_multi", "--bind_cores_to_rank")
_MACHINES = (
    *("--hostfile", "--include", "--exclude", "--num_nodes", "--num_gpus", "--num_accelerators"),
    *("-H", "-i", "-e", "--master_addr", "--master_port", "--node_rank", "--launcher"),
    *("--launcher_args", "--ssh_port", "--slurm_comment", "--venv_script", "--bind_core_list"),
    *_WITHOUT_VALUE,
)
_HOST_LINE = re.compile(r"\s*(#.*|\S+\s+slots=[1-9]\d*\s*(#.*)?)?")
# The devices that the user chose, for the ranks: DeepSpeed's launcher would count from the first.
_DEVICES = "ZEROBERT_CUDA_VISIBLE_DEVICES"
_DEEPSPEED_ENVIRONMENT = ".deepspeed_env"


def launch(
    script: Path, argv: Sequence[str], num_ranks: int | None, machines: Sequence[str] = ()
) -> int:
    """Run a script on some ranks of this machine, or on several machines, to its end.

    Args:
        argv: the script's flags.
        num_ranks: on this machine; None where `machines` says how many.
        machines: the flags of DeepSpeed's launcher.

    Returns:
        The ranks' exit code.
    """
    environment = dict(os.environ)
    choose_accelerator(environment)
    with tempfile.TemporaryDirectory(prefix="zerobert-") as folder:
        environment[RANK_FOLDER] = folder
        _pass_on(environment, Path(folder))
        # What it would say of a failing rank, the rank has said.
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
        if num_ranks is not None:
            if environment.get("CUDA_VISIBLE_DEVICES"):  # an empty one means the CPU
                environment[_DEVICES] = environment.pop("CUDA_VISIBLE_DEVICES")
            command += ["--num_gpus", str(num_ranks), "--master_port", str(_free_port())]
        command += [*machines, str(script), *argv]
        received: list[signal.Signals] = []

        def receive(number: int, frame: FrameType | None) -> None:
            received.append(signal.Signals(number))

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, receive)
        # A session of its own: the terminal's Ctrl-C comes to us alone, and we choose who gets it.
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            _forward(child, received, Path(folder))
        finally:
            _end_group(child.pid)
        return _exit_code(child.returncode, Path(folder))


def _pass_on(environment: MutableMapping[str, str], folder: Path) -> None:
    """Let DeepSpeed's launcher give the ranks' folder to ranks that it starts over ssh: it hands on
    what a file lists, in which the user's own lines stay.
    """
    name = environment.get("DS_ENV_FILE", _DEEPSPEED_ENVIRONMENT)
    own = [path for path in (Path.home() / name, Path(name)) if path.is_file()]
    lines = [line for path in own for line in path.read_text(encoding="utf-8").splitlines()]
    names = (RANK_FOLDER, "DS_ACCELERATOR", "OMP_NUM_THREADS")
    lines += [f"{name}={environment[name]}" for name in names if name in environment]
    path = folder / "environment"
    path.write_text("".join(f"{line}\n" for line in lines if line.strip()), encoding="utf-8")
    environment["DS_ENV_FILE"] = str(path)


def _forward(
    child: "subprocess.Popen[bytes]", received: list[signal.Signals], folder: Path
) -> None:
    """Wait for the launcher's end; what was received goes to every rank, once each has started."""
    sent: dict[Path, int] = {}
    while child.poll() is None:
        for path in folder.glob("*.pid"):
            for number in received[sent.get(path, 0) :]:
                _kill(int(path.read_text()), number)
            sent[path] = len(received)
        if len(received) > 2:  # the user insists
            return
        time.sleep(_POLL_S)


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(pid, number)


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _exit_code(launcher_code: int | None, folder: Path) -> int:
    codes = [int(path.read_text()) for path in sorted(folder.glob("*.code"))]
    if failed := [code for code in codes if code]:
        return failed[0]
    if launcher_code is None:
        return 128 + signal.SIGKILL
    return 128 - launcher_code if launcher_code < 0 else launcher_code


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def default_ranks() -> int:
    """One rank for each CUDA device; one on a machine without."""
    import torch  # takes seconds: a wrong flag is told before

    return max(1, torch.cuda.device_count())


def choose_accelerator(environment: MutableMapping[str, str]) -> None:
    """Tell DeepSpeed, by the environment, where there is no GPU: else it warns of finding none."""
    import torch

    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")


def split_ranks(argv: Sequence[str]) -> tuple[list[str], int | None]:
    """Take `--n_gpu N`, or `--n_cards N`, out of the flags.

    Raises:
        ConfigError: N is not a whole number; 0 stands for one process on the CPU.
    """
    rest, ranks = [], None
    flags = iter(argv)
    for flag in flags:
        name, _, value = flag.partition("=")
        if name not in ("--n_gpu", "--n_cards"):
            rest.append(flag)
            continue
        text = value or next(flags, "")
        if not text.isdecimal():
            raise ConfigError(f"{name}: wanted a whole number, got {text!r}")
        ranks = int(text)
    return rest, ranks


def _asks_for_cpu(argv: Sequence[str]) -> bool:
    joined = {f"{flag}={value}" for flag, value in itertools.pairwise(argv)} | set(argv)
    return not joined.isdisjoint(("--device=cpu", "--select_device=cpu"))


def split_machines(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the flags of DeepSpeed's launcher out of the others.

    Raises:
        ConfigError: one has no value.
    """
    rest, machines = [], []
    flags = iter(argv)
    for flag in flags:
        name, equals, value = flag.partition("=")
        if name not in _MACHINES:
            rest.append(flag)
            continue
        machines.append(flag)
        if name in _WITHOUT_VALUE:
            continue
        if not equals:
            value = next(flags, "")
            machines.append(value)
        if not value:
            raise ConfigError(f"{name}: wanted a value; see `deepspeed --help`")
    return rest, machines


def check_hostfile(
    machines: Sequence[str], find_program: Callable[[str], str | None] = shutil.which
) -> None:
    """Refuse a hostfile that DeepSpeed's launcher would pass over, or stumble on.

    Raises:
        ConfigError: it is missing, a line is no `NAME slots=N`, it names no machine or one twice;
            or what reaches several machines is not installed.
    """
    given = {word.partition("=")[0] for word in machines}
    words = iter(machines)
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("--hostfile", "-H"):
            continue
        path = Path(value or next(words))
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name} {path} can't be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            if not _HOST_LINE.fullmatch(line):
                raise ConfigError(f"{path} line {number}: wanted 'NAME slots=N', got {line!r}")
        names = [found[0] for line in lines if (found := line.partition("#")[0].split())]
        if not names:
            raise ConfigError(f"{path} names no machine; wanted lines 'NAME slots=N'")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"{path} names {twice[0]} twice")
        by_pdsh = given.isdisjoint(("--launcher", "--no_ssh", "--include", "-i", "--num_nodes"))
        if len(names) > 1 and by_pdsh and find_program("pdsh") is None:
            raise ConfigError(
                "several machines are reached by pdsh, which is not installed: apt-get install "
                "pdsh; or start the command on each machine, with --no_ssh and its --node_rank"
            )


def start(
    script: Path, argv: Sequence[str], num_ranks: int | None, work: Callable[[StopRequest], int]
) -> int:
    """Do a script's work, or start the launcher where several processes are asked for.

    Args:
        argv: the script's flags.
        num_ranks: of `--n_gpu`; 0 is one process on the CPU.
        work: see `run_rank`.

    Returns:
        The exit code.
    """
    adopt_slurm(os.environ)
    if num_ranks == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if (num_ranks or 0) > 1 and "RANK" not in os.environ:
        return launch(script.resolve(), argv, num_ranks)
    return run_rank(work)


def run_rank(work: Callable[[StopRequest], int]) -> int:
    """Be one of a script's processes: join the others, work, and tell the launcher how it ended.

    Args:
        work: gets what a signal is remembered in, and returns the exit code.
    """
    chosen = os.environ.pop(_DEVICES, "")
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where DeepSpeed's launcher has counted the ranks
    elif chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = chosen  # LOCAL_RANK counts in it
    stop = StopRequest()
    try:
        code = _joined(work, stop)
    except ConnectionLostError as error:
        report_exit(exit_code(error))
        print_error(error)
        sys.stdout.flush()
        os._exit(exit_code(error))  # threads that wait for the other side would hold the exit up
    except BaseException as error:
        report_exit(exit_code(error))
        raise
    report_exit(code)
    return code


def _joined(work: Callable[[StopRequest], int], stop: StopRequest) -> int:
    _quiet()
    # These take seconds to import: a wrong flag is told before.
    import torch

    from zerobert import device, distributed, engine

    device.set_threads()
    if not torch.cuda.is_available():
        device.keep_memory()
    engine.init_distributed()
    try:
        with distributed.connected():
            code = work(stop)
    except ZerobertError:
        atexit.register(engine.leave_distributed)
        raise
    # Not now: DeepSpeed keeps the group for whatever else this process may start. And not after a
    # bug in one process, in which others may never hear of what it waits for.
    atexit.register(engine.leave_distributed)
    return code


def _quiet() -> None:
    """Keep DeepSpeed's chatter and what is not true here out of a run's output."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    # Our LAMB under ZeRO is tested, which DeepSpeed can't know.
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    warnings.filterwarnings("ignore", category=FutureWarning)  # one a collective, on new torch
    choose_accelerator(os.environ)


def main() -> int:
    """Launch the script that this command line begins with."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        raise ConfigError("wanted the path of a script; see the head of zerobert/launcher.py")
    script = Path(sys.argv[1])
    argv, ranks = split_ranks(sys.argv[2:])
    argv, machines = split_machines(argv)
    if ranks == 0 or _asks_for_cpu(argv):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if {"-h", "--help"} & set(argv):
        return subprocess.call([sys.executable, str(script), "--help"])
    if machines:
        if ranks:
            raise ConfigError(f"--n_gpu is for one machine; with {machines[0]} use --num_gpus")
        check_hostfile(machines)
        return launch(script, argv, None, machines)
    return launch(script, argv, ranks or default_ranks())


if __name__ == "__main__":
    run_script(main)
