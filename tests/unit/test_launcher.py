"""The launcher around a stub of DeepSpeed's: signals go in, exit codes come out, nothing stays."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.ranks import is_alive
from zerobert.errors import ConfigError
from zerobert.launcher import check_hostfile, split_machines, split_ranks

# As DeepSpeed's: starts the ranks, waits for all, ends with 1 when a rank fails, is deaf itself.
STUB_RUNNER = """
import os, signal, subprocess, sys
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
flags = sys.argv[1:]
num_ranks = int(flags[flags.index("--num_gpus") + 1])
start = flags.index(os.environ["STUB_SCRIPT"])
ranks = [
    subprocess.Popen([sys.executable, *flags[start:]], env={**os.environ, "RANK": str(rank)})
    for rank in range(num_ranks)
]
sys.exit(1 if any([rank.wait() for rank in ranks]) else 0)
"""
RANK_START = """
import os, sys, time
from pathlib import Path
from zerobert.signals import StopRequest, report_exit
out, rank = Path(sys.argv[1]), os.environ["RANK"]
stop = StopRequest()
(out / f"{rank}.up").write_text(str(os.getpid()))
"""
UNTIL_STOPPED = """
deadline = time.monotonic() + 60
while not stop.exit_code and time.monotonic() < deadline:
    time.sleep(0.02)
report_exit(stop.exit_code)
sys.exit(stop.exit_code)
"""


class Launch:
    """A launcher in a process of its own, with a rank's body of the test's choice."""

    def __init__(self, folder: Path, body: str, num_ranks: int = 2) -> None:
        self.out = folder / "out"
        self.out.mkdir()
        (folder / "temporary").mkdir()
        stub = folder / "deepspeed" / "launcher"
        stub.mkdir(parents=True)
        (stub / "__init__.py").touch()
        (folder / "deepspeed" / "__init__.py").touch()
        (stub / "runner.py").write_text(STUB_RUNNER)
        rank = folder / "rank.py"
        rank.write_text(RANK_START + textwrap.dedent(body))
        driver = (
            "import sys\nfrom pathlib import Path\nfrom zerobert.launcher import launch\n"
            f"sys.exit(launch(Path({str(rank)!r}), [{str(self.out)!r}], {num_ranks}))\n"
        )
        self.num_ranks = num_ranks
        self.temporary = folder / "temporary"
        self.process = subprocess.Popen(
            [sys.executable, "-c", driver],
            env={
                **os.environ,
                "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}",
                "STUB_SCRIPT": str(rank),
                "TMPDIR": str(self.temporary),
            },
        )

    def pids(self) -> list[int]:
        """The ranks' process numbers, once all are up."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            texts = [path.read_text() for path in self.out.glob("*.up")]
            if len(texts) == self.num_ranks and all(texts):
                return [int(text) for text in texts]
            time.sleep(0.02)
        raise AssertionError("the ranks do not come up")

    def end(self) -> int:
        """The exit code; no rank and no file may be left."""
        code = self.process.wait(timeout=30)
        deadline = time.monotonic() + 10
        while (alive := [pid for pid in self.pids() if is_alive(pid)]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.05)
        assert not alive
        assert list(self.temporary.iterdir()) == []
        return code


@pytest.mark.parametrize(
    ("argv", "rest", "ranks"),
    [
        ([], [], None),
        (["--n_gpu", "2", "--seed", "3"], ["--seed", "3"], 2),
        (["--seed=3", "--n_gpu=4"], ["--seed=3"], 4),
        (["--n_gpu", "0"], [], 0),
        (["--n_cards=2", "--device", "cpu"], ["--device", "cpu"], 2),
        (["--max_steps", "5"], ["--max_steps", "5"], None),
    ],
)
def test_the_number_of_ranks_is_taken_out_of_the_flags(
    argv: list[str], rest: list[str], ranks: int | None
) -> None:
    assert split_ranks(argv) == (rest, ranks)


@pytest.mark.parametrize("argv", [["--n_gpu", "two"], ["--n_gpu", "-1"], ["--n_gpu"]])
def test_a_number_of_ranks_that_is_none_is_refused(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="--n_gpu: wanted a whole number, got"):
        split_ranks(argv)


def test_success_is_zero(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "report_exit(0)\n")
    assert launch.end() == 0


def test_the_code_of_the_rank_that_failed_comes_out(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "code = 2 * int(rank)\nreport_exit(code)\nsys.exit(code)\n")
    assert launch.end() == 2  # the runner itself says 1


def test_a_rank_that_dies_without_a_word_is_no_success(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "import signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert launch.end() == 1


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]
)
def test_a_signal_reaches_every_rank_and_their_code_comes_out(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    launch = Launch(tmp_path, UNTIL_STOPPED)
    launch.pids()
    launch.process.send_signal(number)
    assert launch.end() == code


def test_a_signal_before_the_ranks_are_up_is_not_lost(tmp_path: Path) -> None:
    launch = Launch(tmp_path, UNTIL_STOPPED)
    while not _catches(launch.process.pid, signal.SIGTERM):
        time.sleep(0.005)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.end() == 143


def _catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_who_insists_ends_ranks_that_do_not_listen(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "time.sleep(60)\n")
    launch.pids()
    for _ in range(3):
        launch.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert launch.end() == 128 + signal.SIGKILL


@pytest.mark.parametrize(("accelerator", "devices"), [("cuda", "2,3"), ("cpu", "")])
def test_the_devices_that_the_user_chose_are_the_ranks(
    accelerator: str, devices: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES for its ranks, counting from the first device.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    body = f"""
        os.environ["DS_ACCELERATOR"] = "{accelerator}"  # where the launcher found GPUs, none is set
        from zerobert import launcher
        launcher._joined = lambda work, stop: work(stop)
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
        os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
        def work(stop):
            (out / f"{{rank}}.devices").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
            return 0
        sys.exit(launcher.run_rank(work))
    """
    launch = Launch(tmp_path, body)
    assert launch.end() == 0
    assert [path.read_text() for path in launch.out.glob("*.devices")] == [devices, devices]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "hosts can't be read: .*No such file"),
        ("a slots=2\nb slots=two\n", r"hosts line 2: wanted 'NAME slots=N', got 'b slots=two'"),
        ("a\n", "hosts line 1: wanted"),
        ("a slots=0\n", "hosts line 1: wanted"),
        ("# a slots=2\n", "hosts names no machine"),
        ("a slots=2\nb slots=2\na slots=2\n", "hosts names a twice"),
        ("a slots=2\nb slots=2\n", "reached by pdsh, which is not installed"),
    ],
)
def test_a_hostfile_that_deepspeed_s_launcher_would_pass_over_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    for flags in (["--hostfile", str(path)], [f"-H={path}"]):
        with pytest.raises(ConfigError, match=message):
            check_hostfile(flags, lambda name: None)


def test_machines_are_reached_by_pdsh_where_nothing_else_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    flags = ["--hostfile", str(tmp_path / "hosts")]
    check_hostfile(flags, lambda name: f"/usr/bin/{name}")
    check_hostfile([*flags, "--launcher=openmpi"], lambda name: None)
    check_hostfile([*flags, "--include", "a"], lambda name: None)


def test_a_hostfile_may_have_comments(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# two machines\n\nworker-1 slots=8\n10.0.0.2 slots=16 # big\n")
    check_hostfile(["--no_ssh", "--hostfile", str(tmp_path / "hosts"), "--num_nodes", "2"])


def test_flags_of_deepspeed_s_launcher_are_handed_to_it() -> None:
    flags = ["--seed", "1", "--hostfile", "H", "--no_ssh", "--num_nodes=2", "--max_steps", "4"]
    assert split_machines(flags) == (
        ["--seed", "1", "--max_steps", "4"],
        ["--hostfile", "H", "--no_ssh", "--num_nodes=2"],
    )
    short = ["-H", "H", "-i", "a", "--force_multi", "--bind_cores_to_rank", "--seed", "1"]
    assert split_machines(short) == (["--seed", "1"], short[:6])
    with pytest.raises(ConfigError, match="--hostfile: wanted a value"):
        split_machines(["--hostfile"])


LEAVES = """
import atexit, sys
from zerobert import distributed, launcher
from zerobert.errors import ConfigError

def work(stop):
    if sys.argv[1] == "refused":
        raise ConfigError("no")
    return 0

atexit.register(lambda: print("is in" if distributed.is_initialized() else "has left"))
try:
    launcher.run_rank(work)
except ConfigError:
    print("refused")
assert distributed.is_initialized()
if sys.argv[1] == "twice":
    launcher.run_rank(work)
"""


@pytest.mark.parametrize(("how", "said"), [("twice", ""), ("refused", "refused\n")])
def test_a_process_leaves_its_group_before_python_ends(how: str, said: str) -> None:
    """Gloo's threads, where they are left, may end it by SIGABRT."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVES, how], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout == f"{said}has left\n", done.stderr
