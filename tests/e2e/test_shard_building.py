"""The `shards` command under what happens to long jobs: kills, Ctrl-C, full disks, clusters."""

import hashlib
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPOSITORY
from zerobert.manifest import MANIFEST_NAME, read_manifest, verify_folder
from zerobert.tokenizer import train_vocabulary

# The command with pieces of other than their usual size: a few MB of text then have many.
OTHER_PIECES = """
import runpy, sys
from data_prep import tokens
tokens._PIECE_BYTES = int(sys.argv.pop(1))
sys.argv[0] = "data_prep"
runpy.run_module("data_prep", run_name="__main__", alter_sys=True)
"""


def sentence_pool(rng: random.Random) -> list[str]:
    """Sentences whose words are as unevenly frequent as those of a language (Zipf's law)."""
    syllables = ["ka", "to", "ri", "men", "sol", "ba", "ti", "on", "er", "al", "is", "an", "de"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(8000)]
    weights = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(words))))
    return [
        " ".join(rng.choices(words, cum_weights=weights, k=rng.randint(3, 40))).capitalize() + ".\n"
        for _ in range(5000)
    ]


def write_corpus(folder: Path, num_bytes: int) -> Path:
    """Text in four files; documents differ in length as articles do."""
    rng = random.Random(0)
    pool = sentence_pool(rng)
    folder.mkdir(parents=True)
    for number in range(4):
        with (folder / f"part_{number:05d}.txt").open("w") as file:
            while file.tell() < num_bytes / 4:
                file.writelines(rng.choices(pool, k=min(200, int(rng.paretovariate(1.2) * 4))))
                file.write("\n")
    return folder


STARTED: list["subprocess.Popen[str]"] = []


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    """Not even by a test that fails."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


class Job(NamedTuple):
    """A `shards` command."""

    texts: Path
    vocab: Path
    output: Path
    flags: list[object] = []  # noqa: RUF012

    def command(self, *more: object, piece_bytes: int) -> list[str]:
        arguments = [
            *("shards", "--input_dir", self.texts, "--vocab_file", self.vocab),
            *("--output_dir", self.output, "--name", "toy", *self.flags, *more),
        ]
        return [sys.executable, "-c", OTHER_PIECES, *map(str, [piece_bytes, *arguments])]

    def start(
        self,
        *more: object,
        piece_bytes: int = 100_000,
        preexec_fn: Callable[[], None] | None = None,
    ) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            self.command(*more, piece_bytes=piece_bytes),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=preexec_fn,
        )
        STARTED.append(process)
        return process

    def run(
        self, *more: object, code: int = 0, preexec_fn: Callable[[], None] | None = None
    ) -> str:
        """Run to the end; its stderr, of which a user sees one line."""
        process = self.start(*more, preexec_fn=preexec_fn)
        _, errors = process.communicate(timeout=280)
        assert process.returncode == code, errors
        assert len(errors.splitlines()) == 1, errors
        assert not group_members(process.pid)
        return errors

    def results(self) -> dict[str, str]:
        """The hash of every file of the outcome, which must be all that there is and be right."""
        (folder,) = self.output.glob("hdf5_*/toy")
        (tokens,) = self.output.glob("tokens_*/toy")
        verify_folder(folder)
        verify_folder(tokens)
        paths = [path for path in self.output.rglob("*") if path.is_file()]
        assert not [
            path for path in paths if path.name.startswith(".") or not under(path, folder, tokens)
        ]
        hashes = {
            str(path.relative_to(self.output)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths
            if path.name != MANIFEST_NAME
        }
        for made in (folder, tokens):
            manifest = read_manifest(made)
            summary = {key: manifest.summary[key] for key in manifest.summary if key != "seconds"}
            hashes[f"{manifest.kind} manifest"] = json.dumps([summary, manifest.inputs])
        return hashes

    def done(self) -> dict[str, int]:
        """The shards that a broken-off run has kept, by their inodes."""
        receipts = self.output.glob("hdf5_*/.incomplete-toy/.toy_*.json")
        shards = [path.with_name(path.name[1:].removesuffix(".json")) for path in receipts]
        return {path.name: path.stat().st_ino for path in shards}

    def wait_for_shards(self, count: int) -> None:
        deadline = time.monotonic() + 60
        while len(list(self.output.glob("hdf5_*/.incomplete-toy/.toy_*.json"))) < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def check_kept(self) -> dict[str, int]:
        """Nothing under its final name, and some work in the hidden folder."""
        assert not list(self.output.glob("hdf5_*/toy"))
        done = self.done()
        assert done
        return done

    def check_goes_on(self, done: dict[str, int], wanted: dict[str, str]) -> None:
        """The same command ends as an unbroken run does, and makes nothing twice."""
        self.run()
        assert self.results() == wanted
        (folder,) = self.output.glob("hdf5_*/toy")
        assert done.items() <= {path.name: path.stat().st_ino for path in folder.iterdir()}.items()


def under(path: Path, *folders: Path) -> bool:
    return any(folder in path.parents for folder in folders)


def group_members(group: int) -> dict[int, str]:
    """The living processes of a group with their command lines, 10 s after they could have ended.

    Python's resource tracker, and a worker in the middle of starting, see a moment later than we do
    that the parent is gone.
    """
    deadline = time.monotonic() + 10
    while (members := processes(group)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return members


def processes(group: int) -> dict[int, str]:
    members = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, its_group = (path / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                members[int(path.name)] = (path / "cmdline").read_bytes().decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return members


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = write_corpus(folder / "text", 800_000)
    vocab = train_vocabulary(sorted(texts.iterdir()), vocab_size=1500, do_lower_case=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab))
    return folder


def job_in(folder: Path, corpus: Path) -> Job:
    """A job of some seconds, of which it spends each half second on one shard."""
    flags = ["--n_training_shards", 8, "--n_test_shards", 2, "--dupe_factor", 25]
    return Job(corpus / "text", corpus / "vocab.txt", folder, flags)


@pytest.fixture
def job(tmp_path: Path, corpus: Path) -> Job:
    return job_in(tmp_path / "out", corpus)


@pytest.fixture(scope="module")
def unbroken(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The results of `job` where nothing happens to it."""
    job = job_in(tmp_path_factory.mktemp("unbroken"), corpus)
    job.run("--workers", 2)
    results = job.results()
    assert len([name for name in results if name.endswith(".bin")]) > 5
    assert len([name for name in results if name.endswith(".hdf5")]) == 10
    return results


def default_signals() -> None:
    """A background job of a shell ignores Ctrl-C; the user's terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("workers", "whole_group"),
    [
        pytest.param(1, False, id="one process"),
        pytest.param(2, True, id="two workers at a terminal"),
        pytest.param(1, True, id="one process at a terminal", marks=pytest.mark.slow),
        pytest.param(2, False, id="two workers", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_ends_every_process_and_keeps_what_is_done(
    job: Job, unbroken: dict[str, str], workers: int, whole_group: bool
) -> None:
    process = job.start("--workers", workers, preexec_fn=default_signals)
    job.wait_for_shards(2)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")
    assert not group_members(process.pid)
    job.check_goes_on(job.check_kept(), unbroken)


def test_ctrl_c_while_workers_start_is_one_line(job: Job) -> None:
    process = job.start("--workers", 2, preexec_fn=default_signals)
    deadline = time.monotonic() + 60
    while not any("spawn_main" in line for line in processes(process.pid).values()):
        assert time.monotonic() < deadline
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")
    assert not group_members(process.pid)


def test_a_killed_worker_is_one_line_and_others_are_kept_out_meanwhile(
    job: Job, unbroken: dict[str, str]
) -> None:
    process = job.start("--workers", 2)
    job.wait_for_shards(1)
    os.killpg(process.pid, signal.SIGSTOP)
    line = job.run("--workers", 2, code=2)
    assert line.startswith("error: another process is filling ")
    workers = [pid for pid, line in processes(process.pid).items() if "spawn_main" in line]
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    os.killpg(process.pid, signal.SIGCONT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (2, ""), errors
    assert errors == (
        "error: a worker process was killed, most often because memory ran out; run the same "
        "command again with a lower --workers\n"
    )
    assert not group_members(process.pid)
    job.check_goes_on(job.check_kept(), unbroken)


def limited(num_bytes: int) -> Callable[[], None]:
    """As good as a full disk: no file grows any further."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@pytest.mark.parametrize(
    ("num_bytes", "name"),
    [(20_000, "piece_00000.bin"), (300_000, "toy_training_0.hdf5")],
    ids=["tokens", "shards"],
)
def test_a_full_disk_is_one_line_and_the_work_goes_on_when_there_is_space(
    job: Job, unbroken: dict[str, str], num_bytes: int, name: str
) -> None:
    line = job.run(code=2, preexec_fn=limited(num_bytes))
    assert "cannot write " in line
    assert f"{name}: File too large; free space or" in line
    assert not list(job.output.rglob(MANIFEST_NAME if name.startswith("piece") else "toy/*.hdf5"))
    # Nothing half written stays to fill the disk further.
    assert not [path for path in job.output.rglob(".*") if not path.name.endswith((".json", "toy"))]
    job.run("--workers", 2)
    assert job.results() == unbroken


def run_killed(job: Job, workers: int, whole_group: bool, seconds: float) -> bool:
    """Kill the command some time after its start; whether it was still at work."""
    process = job.start("--workers", workers)
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.communicate()
        assert not group_members(process.pid)
        return True
    assert process.returncode == 0, errors
    assert not group_members(process.pid)
    return False


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_at_any_moment_change_nothing(
    corpus: Path, unbroken: dict[str, str], tmp_path: Path
) -> None:
    """SIGKILL 20 times; what comes to an end in between is checked, and begun anew."""
    rng = random.Random(12345)
    started = time.monotonic()
    job_in(tmp_path / "timed", corpus).run()
    duration = time.monotonic() - started
    kills, kills_of_job, most_kills = 0, 0, 0
    job = job_in(tmp_path / "0", corpus)
    while kills < 20:
        workers, whole_group = rng.choice([1, 2]), rng.random() < 0.5
        if run_killed(job, workers, whole_group, rng.uniform(0.2, 1) * duration):
            kills, kills_of_job = kills + 1, kills_of_job + 1
            most_kills = max(most_kills, kills_of_job)
        else:
            assert job.results() == unbroken
            job, kills_of_job = job_in(tmp_path / str(kills), corpus), 0
    job.run("--workers", 2)
    assert job.results() == unbroken
    assert most_kills >= 2


def test_a_killed_parent_takes_its_workers_along(job: Job, unbroken: dict[str, str]) -> None:
    process = job.start("--workers", 2)
    job.wait_for_shards(1)
    process.kill()
    process.communicate()
    assert not group_members(process.pid)
    job.check_goes_on(job.check_kept(), unbroken)


def peak_memory(process: "subprocess.Popen[str]") -> int:
    """The most bytes that a process and its children held at a time; shared ones count once."""
    peak = 0
    while process.poll() is None:
        total = 0
        for pid in processes(process.pid):
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
        peak = max(peak, total)
        time.sleep(0.03)
    return peak


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_is_the_same_for_any_size_of_text(corpus: Path, tmp_path: Path) -> None:
    peaks = {}
    for megabytes in (10, 40, 160):
        texts = write_corpus(tmp_path / f"{megabytes}", megabytes * 1_000_000)
        # Shards of equal size, all of them.
        flags = ["--n_training_shards", megabytes * 9 // 10, "--n_test_shards", megabytes // 10]
        job = Job(texts, corpus / "vocab.txt", tmp_path / "out" / f"{megabytes}", flags)
        process = job.start("--workers", 2, "--dupe_factor", 2, piece_bytes=1 << 20)
        peaks[megabytes] = peak_memory(process)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert max(peaks.values()) < 1.25 * min(peaks.values()), peaks


@pytest.mark.slow
def test_a_line_of_100_mb_is_read(corpus: Path, tmp_path: Path) -> None:
    pool = sentence_pool(random.Random(0))
    line = " ".join(sentence.strip() for sentence in pool)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(
        f"Soltoka.\nRimen.\n\n{' '.join(itertools.repeat(line, 1 + 100_000_000 // len(line)))}\n\n"
        "Baton.\nDean.\n"
    )
    flags = ["--n_training_shards", 1, "--n_test_shards", 0]
    job = Job(tmp_path / "text", corpus / "vocab.txt", tmp_path / "out", flags)
    process = job.start()
    peak = peak_memory(process)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "documents 3, sentences 5" in errors
    assert peak < 1 << 30


class Cluster:
    """A Dask scheduler of this machine and workers of one thread each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.workers: list[subprocess.Popen[str]] = []
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", 0)
        self.address = json.loads(self._wait_for(folder / "scheduler.json"))["address"]

    def _start(self, role: str, *flags: object) -> "subprocess.Popen[str]":
        file = self._folder / "scheduler.json"
        command = [sys.executable, "-m", "dask", role, "--scheduler-file", str(file)]
        with (self._folder / f"{role}{len(self.workers)}.log").open("w") as log:
            return subprocess.Popen(
                [*command, "--no-dashboard", *map(str, flags)],
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
                text=True,
            )

    def _wait_for(self, file: Path, content: str = "") -> str:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if file.is_file() and (text := file.read_text()) and content in text:
                return text
            time.sleep(0.05)
        raise TimeoutError(f"{content!r} never came in {file}")

    def add_workers(self, count: int) -> None:
        first = len(self.workers)
        for _ in range(count):
            flags = ("--nthreads", 1, "--no-nanny", "--local-directory", self._folder)
            self.workers.append(self._start("worker", *flags))
        for number in range(first, first + count):
            self._wait_for(self._folder / f"worker{number}.log", "Registered to:")

    def stop(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    pytest.importorskip("distributed")
    (tmp_path / "dask").mkdir()
    started = Cluster(tmp_path / "dask")
    yield started
    started.stop()


def test_a_cluster_gives_the_same_bytes(
    cluster: Cluster, job: Job, unbroken: dict[str, str]
) -> None:
    line = job.run("--dask_scheduler", cluster.address, code=2)
    assert "has no workers; start some with `dask worker tcp://127.0.0.1" in line
    assert not job.output.exists()
    cluster.add_workers(2)
    line = job.run("--dask_scheduler", cluster.address)
    assert line.startswith("shards: documents ")
    assert job.results() == unbroken


@pytest.mark.slow
def test_where_no_scheduler_is_the_user_is_told_soon(job: Job) -> None:
    pytest.importorskip("distributed")
    started = time.monotonic()
    line = job.run("--dask_scheduler", "tcp://127.0.0.1:9", code=2)
    assert "--dask_scheduler: no scheduler answers at 'tcp://127.0.0.1:9'" in line
    assert time.monotonic() - started < 15
    assert not job.output.exists()


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_finishes(
    cluster: Cluster, job: Job, unbroken: dict[str, str]
) -> None:
    cluster.add_workers(2)
    process = job.start("--dask_scheduler", cluster.address)
    job.wait_for_shards(1)
    cluster.workers[0].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert len(errors.splitlines()) == 1, errors
    assert job.results() == unbroken


@pytest.mark.slow
def test_a_cluster_that_goes_is_one_line_and_the_work_goes_on_elsewhere(
    cluster: Cluster, job: Job, unbroken: dict[str, str]
) -> None:
    cluster.add_workers(2)
    process = job.start("--dask_scheduler", cluster.address)
    job.wait_for_shards(1)
    cluster.stop()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert errors.startswith("error: the Dask cluster gave the work up: the scheduler is gone, or")
    assert len(errors.splitlines()) == 1, errors
    job.check_goes_on(job.check_kept(), unbroken)


@pytest.mark.slow
def test_ctrl_c_leaves_a_cluster_alone(
    cluster: Cluster, job: Job, unbroken: dict[str, str]
) -> None:
    cluster.add_workers(2)
    process = job.start("--dask_scheduler", cluster.address, preexec_fn=default_signals)
    job.wait_for_shards(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert not list(job.output.glob("hdf5_*/toy"))
    job.run("--dask_scheduler", cluster.address)
    assert job.results() == unbroken
