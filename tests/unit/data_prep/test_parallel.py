import itertools
import multiprocessing
import os
from collections.abc import Iterator

import pytest

from data_prep.parallel import ordered_map
from zerobert.errors import DataError


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
