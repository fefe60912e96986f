"""The small collectives on two ranks; every rank checks what it got."""

import torch.distributed as dist

from zerobert import distributed
from zerobert.errors import DataError


def prepare(failing: set[int]) -> None:
    if distributed.rank() in failing:
        raise DataError(f"rank {distributed.rank()} failed")


def outcome(failing: set[int]) -> str:
    """How a preparation ends on this rank if it fails on some."""
    try:
        with distributed.one_voice():
            prepare(failing)
    except DataError as error:
        return str(error)
    except SystemExit as error:
        return f"exit {error.code}"
    return "fine"


def main() -> None:
    dist.init_process_group("gloo")
    rank = distributed.rank()
    assert distributed.world_size() == 2
    assert distributed.is_main() == (rank == 0)
    distributed.barrier()
    # 2^53 - 1 and 1 add up exactly, which they do not in float32.
    assert distributed.all_reduce_sum([rank, 1.0, [2**53 - 1, 1][rank]]) == [1.0, 2.0, 2.0**53]
    assert distributed.broadcast_object({"from": rank}) == {"from": 0}
    assert outcome(set()) == "fine"
    assert outcome({0}) == ["rank 0 failed", "exit 2"][rank]
    assert outcome({1}) == ["exit 2", "rank 1 failed"][rank]
    assert outcome({0, 1}) == ["rank 0 failed", "exit 2"][rank]
    dist.destroy_process_group()


main()
