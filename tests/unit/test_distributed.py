"""The small collectives, alone and on two ranks."""

import contextlib

import pytest

from tests.conftest import REPOSITORY
from tests.ranks import run_ranks
from zerobert import distributed
from zerobert.errors import DataError


def test_without_a_group_one_process_is_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests of this process may have made one.
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    assert not distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.is_main()
    distributed.barrier()
    assert distributed.all_reduce_sum([1, 2.5]) == [1.0, 2.5]
    assert distributed.broadcast_object("mine") == "mine"


def test_alone_an_error_is_one_s_own() -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(DataError, match="mine"))
        stack.enter_context(distributed.one_voice())
        raise DataError("mine")


def test_two_ranks() -> None:
    run_ranks(REPOSITORY / "tests" / "workers" / "collectives.py", 2)
