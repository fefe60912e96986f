"""Two machines, as two network namespaces with a cable between them."""

import json
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import toy_runs as toy

CUT_TIMEOUT_S = 30
SETTLING_S = 20


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Hosts:
    """Host 0 has the address 10.99.0.1, host 1 the next one; each has a process of a run."""

    def __init__(self) -> None:
        name = f"zb{uuid.uuid4().hex[:6]}"
        self.names = [f"{name}-{number}" for number in range(2)]
        self.cables = [f"{name}{number}" for number in range(2)]
        for namespace in self.names:
            _ip("netns", "add", namespace)
            self._inside(namespace, "link", "set", "lo", "up")
        _ip("link", "add", self.cables[0], "type", "veth", "peer", "name", self.cables[1])
        for number, (namespace, cable) in enumerate(zip(self.names, self.cables, strict=True)):
            _ip("link", "set", cable, "netns", namespace)
            self._inside(namespace, "addr", "add", f"10.99.0.{number + 1}/24", "dev", cable)
            self._inside(namespace, "link", "set", cable, "up")

    @staticmethod
    def _inside(namespace: str, *words: str) -> None:
        _ip("-n", namespace, *words)

    def start_rank(self, number: int, command: list[str], log: Path) -> "subprocess.Popen[str]":
        """A rank of a host."""
        rank = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        return self.start(
            *(number, command, log), **rank, MASTER_ADDR="10.99.0.1", MASTER_PORT="29500"
        )

    def start(
        self, number: int, command: list[str], log: Path, **extra: str
    ) -> "subprocess.Popen[str]":
        """A process on a host."""
        environment = toy.environment(GLOO_SOCKET_IFNAME=self.cables[number], **extra)
        with log.open("w") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[number], *command],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def cut(self) -> None:
        """Pull the cable."""
        self._inside(self.names[0], "link", "set", self.cables[0], "down")

    def mend(self) -> None:
        """Put it back."""
        self._inside(self.names[0], "link", "set", self.cables[0], "up")

    def remove(self) -> None:
        """Take both hosts away."""
        for namespace in self.names:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts, where this machine lets us make them."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip` (iproute2)")
    try:
        made = Hosts()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces can't be made here: {error.stderr.decode().strip()}")
    yield made
    made.remove()


def _command(folder: Path, data: Path, steps: int, seconds_a_step: float = 0.0) -> list[str]:
    """A run's command; with a delay where it is to be long enough to be met by an accident."""
    config = {**toy.EXPERIMENT, "bert": {**toy.EXPERIMENT["bert"]}}
    config["bert"]["run"] = {
        "max_steps": steps,
        "logging_steps": 1,
        "save_steps": 4,
        "eval_steps": 6,
        "collective_timeout_s": CUT_TIMEOUT_S,
    }
    path = folder / "toy.json"
    path.write_text(json.dumps(config))
    flags = ["--deepspeed_config", str(path), "--input_dir", str(data)]
    script = [str(toy.RUN)]
    if seconds_a_step:
        slow = folder / "slow.py"
        slow.write_text(
            "import runpy, sys, time\n"
            f"sys.path.insert(0, {str(toy.RUN.parents[1])!r})\n"
            "from pretrain import loop\n"
            "share = loop.share\n"
            f"loop.share = lambda *parts: (time.sleep({seconds_a_step}), share(*parts))[1]\n"
            f"sys.argv[0] = {str(toy.RUN)!r}\n"
            f"runpy.run_path({str(toy.RUN)!r}, run_name='__main__')\n"
        )
        script = [str(slow)]
    return [sys.executable, *script, *flags, "--output_dir", str(folder / "out")]


def _ends(process: "subprocess.Popen[str]", log: Path, timeout_s: float) -> int:
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it did not end:\n{log.read_text()[-3000:]}") from None


def test_two_hosts_train_as_one_process(
    hosts: Hosts, data: Path, unbroken: Path, tmp_path: Path
) -> None:
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    command = _command(tmp_path, data, 12)
    ranks = [hosts.start_rank(number, command, logs[number]) for number in range(2)]
    codes = [_ends(rank, log, toy.TIMEOUT_S) for rank, log in zip(ranks, logs, strict=True)]
    assert codes == [0, 0], logs[0].read_text() + logs[1].read_text()
    assert "connection: 2 processes on " in logs[0].read_text()
    for step, loss in toy.losses(unbroken).items():
        assert toy.losses(tmp_path / "out")[step] == pytest.approx(loss, abs=2e-6)


@pytest.mark.slow
def test_a_hostfile_starts_both_hosts_and_a_signal_to_one_stops_both(
    hosts: Hosts, data: Path, tmp_path: Path
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("10.99.0.1 slots=1\n10.99.0.2 slots=1\n")
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    _, run, *flags = _command(tmp_path, data, 400, seconds_a_step=0.2)
    launcher = str(toy.REPOSITORY / "zerobert" / "launcher.py")
    rendezvous = ["--no_ssh", "--master_addr", "10.99.0.1", "--master_port", "29501"]
    launchers = []
    for number, log in enumerate(logs):
        machines = ["--hostfile", str(hostfile), *rendezvous, "--node_rank", str(number)]
        command = [sys.executable, launcher, str(run), *machines, *flags]
        launchers.append(hosts.start(number, command, log))
    deadline = time.monotonic() + toy.TIMEOUT_S
    while not (tmp_path / "out" / "state_4").exists():
        assert all(each.poll() is None for each in launchers), logs[0].read_text()
        assert time.monotonic() < deadline, logs[0].read_text()
        time.sleep(0.1)
    launchers[1].terminate()
    codes = [_ends(each, log, toy.TIMEOUT_S) for each, log in zip(launchers, logs, strict=True)]
    assert codes == [143, 143], logs[0].read_text() + logs[1].read_text()
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 143)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cut_cable_ends_all_ranks_and_the_run_goes_on(
    hosts: Hosts, data: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    logs = [tmp_path / f"{number}.log" for number in range(2)]

    def start(folder: Path, seconds_a_step: float) -> list["subprocess.Popen[str]"]:
        command = _command(folder, data, 24, seconds_a_step)
        return [hosts.start_rank(number, command, logs[number]) for number in range(2)]

    for rank, log in zip(start(whole, 0.0), logs, strict=True):
        assert _ends(rank, log, toy.TIMEOUT_S) == 0, log.read_text()

    ranks = start(tmp_path, 0.5)
    deadline = time.monotonic() + toy.TIMEOUT_S
    while not (tmp_path / "out" / "state_8").exists():
        assert all(rank.poll() is None for rank in ranks), logs[0].read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    hosts.cut()
    cut_at = time.monotonic()
    for number, (rank, log) in enumerate(zip(ranks, logs, strict=True)):
        assert _ends(rank, log, CUT_TIMEOUT_S + SETTLING_S) == 2, log.read_text()
        where = "[rank 1] " if number else ""
        assert f"{where}error: the connection to another process is lost" in log.read_text()
    assert time.monotonic() - cut_at < CUT_TIMEOUT_S + SETTLING_S
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)

    hosts.mend()
    for rank, log in zip(start(tmp_path, 0.0), logs, strict=True):
        assert _ends(rank, log, toy.TIMEOUT_S) == 0, log.read_text()
    assert "resumed from" in logs[0].read_text()
    assert toy.losses(tmp_path / "out") == toy.losses(whole / "out")
    for name, weight in toy.weights(whole / "out", 24).items():
        assert torch.equal(weight, toy.weights(tmp_path / "out", 24)[name]), name
