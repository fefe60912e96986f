import itertools
import multiprocessing
import os
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from data_prep import parallel
from data_prep.parallel import pool
from zerobert.errors import ConfigError, DataError


def ordered_map(function: Any, tasks: Iterable[Any], *, workers: int) -> Iterator[Any]:
    with pool(workers) as started:
        yield from started.map(function, tasks)


def square(number: int) -> int:
    return number * number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise DataError("three")
    return number


def die(number: int) -> int:
    os._exit(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    assert list(ordered_map(square, range(20), workers=workers)) == [n * n for n in range(20)]


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_are_drawn_as_they_are_needed(workers: int) -> None:
    drawn = itertools.count()

    def endless() -> Iterator[int]:
        while True:
            yield next(drawn)

    results = ordered_map(square, endless(), workers=workers)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    results.close()  # type: ignore[attr-defined]
    assert next(drawn) < 20
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_through_and_leaves_no_process(workers: int) -> None:
    with pytest.raises(DataError, match="three"):
        list(ordered_map(fail_at_three, range(20), workers=workers))
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_named() -> None:
    with pytest.raises(DataError, match=r"a worker process was killed, .* lower --workers"):
        list(ordered_map(die, range(4), workers=2))
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_between_results_is_named_too() -> None:
    class Broken:
        def submit(self, *_: object) -> None:
            raise BrokenProcessPool("gone")

    with pytest.raises(DataError, match="a worker process was killed"):
        parallel._submit(Broken(), square, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("nonsense://x:1", "unknown address scheme 'nonsense'"),
        ("127.0.0.1", "missing port number"),
        ("", "missing port number"),
        ("tcp://127.0.0.1:1", "(Timed out trying|none within)"),
    ],
)
def test_an_address_without_a_scheduler_is_refused(
    monkeypatch: pytest.MonkeyPatch, address: str, reason: str
) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(parallel, "_CONNECT_S", 0.5)
    with pytest.raises(ConfigError, match=f"no scheduler answers at '{address}' .{reason}"):
        with pool(1, address):
            pass


def test_something_else_at_the_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accepts the connection and says nothing, as a web server does."""
    pytest.importorskip("distributed")
    monkeypatch.setattr(parallel, "_CONNECT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"no scheduler answers at .* \(none within 0.5 s\)"):
            with pool(1, address):
                pass


def large(task: tuple[int, bytes]) -> bytes:
    return bytes(1 << 20)


@pytest.mark.timeout(120)
def test_workers_that_are_ended_in_the_middle_of_a_message_stop_nothing() -> None:
    """Both pipes are full of long messages when the parent gives up."""
    tasks = [(number, bytes(1 << 20)) for number in range(40)]

    def give_up(after: int) -> None:
        for number, _ in enumerate(ordered_map(large, tasks, workers=2)):
            if number == after:
                raise DataError("enough")

    for after in range(6):
        with pytest.raises(DataError, match="enough"):
            give_up(after)
        assert not multiprocessing.active_children()
