"""The order of samples and the cutting of batches: alike for any ranks, from any position."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.data import (
    SampleOrder,
    StepBatch,
    StepLoader,
    dropout_seed,
    evaluation_batches,
    fingerprint,
)
from zerobert.errors import ConfigError, ShardFormatError
from zerobert.shards import DTYPES, ShardInfo, describe_shard, write_shard

VOCAB_SIZE = 100
NUM_ROWS = (1, 13, 2, 40, 5)  # very uneven
TOTAL = sum(NUM_ROWS)
SEQ_LENGTH, NUM_PREDICTIONS = 12, 3


def make_shard(path: Path, num_rows: int, first_row: int) -> ShardInfo:
    """Rows that can be told apart: the row's number is written into its pieces."""
    arrays = {
        name: np.zeros((num_rows, SEQ_LENGTH), dtype)
        for name, dtype in DTYPES.items()
        if name in ("input_ids", "input_mask", "segment_ids")
    }
    numbers = first_row + np.arange(num_rows)
    arrays["input_ids"][:, 1] = numbers % 10
    arrays["input_ids"][:, 2] = numbers // 10
    arrays["input_mask"][:, :6] = 1
    for name in ("masked_lm_positions", "masked_lm_ids"):
        arrays[name] = np.zeros((num_rows, NUM_PREDICTIONS), DTYPES[name])
    for column in range(NUM_PREDICTIONS):  # one to three masks a row
        arrays["masked_lm_positions"][:, column] = np.where(numbers % 3 >= column, column + 1, 0)
    arrays["next_sentence_labels"] = (numbers % 2).astype("i1")
    write_shard(path, arrays)
    return describe_shard(path)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[ShardInfo]:
    folder = tmp_path_factory.mktemp("shards")
    starts = np.cumsum([0, *NUM_ROWS])
    return [
        make_shard(folder / f"a_training_{i}.hdf5", rows, int(starts[i]))
        for i, rows in enumerate(NUM_ROWS)
    ]


def make_loader(
    shards: list[ShardInfo], *, rank: int = 0, world_size: int = 1, **options: int
) -> StepLoader:
    return StepLoader(
        shards,
        **{
            "seed": 7,
            "vocab_size": VOCAB_SIZE,
            "global_samples": 16,
            "micro_samples": 4,
            **options,
        },
        rank=rank,
        world_size=world_size,
    )


def row_numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    ids = batch["input_ids"]
    return (ids[:, 1] + 10 * ids[:, 2]).tolist()


def step_rows(batch: StepBatch) -> list[int]:
    return [row for micro in batch.micro_batches for row in row_numbers(micro)]


def walk(order: SampleOrder, first: int, count: int) -> list[tuple[int, int]]:
    """The samples as (shard, row)."""
    starts = np.cumsum([0, *order.rows_of_shards])
    rows = order.locate(first, count)
    owners = np.searchsorted(starts, rows, side="right") - 1
    return [(int(k), int(row - starts[k])) for k, row in zip(owners, rows, strict=True)]


def test_an_epoch_visits_every_row_once() -> None:
    order = SampleOrder(rows_of_shards=NUM_ROWS, seed=3)
    every_row = sorted((shard, row) for shard, rows in enumerate(NUM_ROWS) for row in range(rows))
    for epoch in range(4):
        assert sorted(walk(order, epoch * TOTAL, TOTAL)) == every_row


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order = SampleOrder(rows_of_shards=NUM_ROWS, seed=3)
    orders = [walk(order, epoch * TOTAL, TOTAL) for epoch in range(3)]
    orders.append(walk(SampleOrder(rows_of_shards=NUM_ROWS, seed=4), 0, TOTAL))
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    within = [[row for shard, row in one if shard == 3] for one in orders]  # the largest shard
    assert all(a != b for a, b in itertools.combinations(within, 2))


def test_shards_are_shuffled_together_window_by_window() -> None:
    order = SampleOrder(rows_of_shards=(10, 10, 10, 10, 3), seed=1, window_rows=20)
    for epoch in range(3):
        shards = [shard for shard, _ in walk(order, 43 * epoch, 43)]
        *windows, last = [set(shards[start : start + 20]) for start in (0, 20, 40)]
        if 4 in shards[:40]:  # the small shard came early, and with it a window of three
            assert len(set(shards)) == 5
            continue
        assert [len(window) for window in windows] == [2, 2]
        assert last == {4}
        assert shards[:20] != sorted(shards[:20])  # mixed, not one after the other
    together = SampleOrder(rows_of_shards=(10, 10, 10, 10, 3), seed=1)
    assert len({shard for shard, _ in walk(together, 0, 12)}) > 2


def test_any_stretch_is_part_of_one_long_walk() -> None:
    order = SampleOrder(rows_of_shards=NUM_ROWS, seed=3)
    whole = walk(order, 0, 3 * TOTAL)
    for first, count in [(0, 1), (5, 17), (TOTAL - 1, 2), (TOTAL + 3, TOTAL + 9), (60, 0)]:
        assert (
            walk(SampleOrder(rows_of_shards=NUM_ROWS, seed=3), first, count)
            == (whole[first : first + count])
        )


def test_the_order_is_this_one() -> None:
    """Exact numbers: a run that is resumed by a later version must find the same order."""
    order = SampleOrder(rows_of_shards=(2, 3), seed=42)
    assert order.locate(0, 10).tolist() == [0, 3, 4, 1, 2, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_micro_batches(shards: list[ShardInfo], world_size: int) -> None:
    alone = make_loader(shards)
    loaders = [make_loader(shards, rank=r, world_size=world_size) for r in range(world_size)]
    for first in (0, 16, 48, 64):  # an epoch has 61 rows: 48 straddles two
        wanted = alone.load(first)
        parts = [loader.load(first) for loader in loaders]
        micros = [micro for part in parts for micro in part.micro_batches]
        assert len(micros) == len(wanted.micro_batches) == 4
        for got, one in zip(micros, wanted.micro_batches, strict=True):
            assert list(got) == list(DTYPES)
            for name in DTYPES:
                assert got[name].dtype == torch.int64
                assert torch.equal(got[name], one[name])
        assert [n for part in parts for n in part.first_samples] == list(wanted.first_samples)
        assert sum(part.num_masked for part in parts) == wanted.num_masked
        assert sum(part.num_tokens for part in parts) == wanted.num_tokens
        assert wanted.num_tokens == sum(int(m["input_mask"].sum()) for m in wanted.micro_batches)


def test_a_batch_is_what_the_order_says(shards: list[ShardInfo]) -> None:
    starts = np.cumsum([0, *NUM_ROWS])
    order = SampleOrder(rows_of_shards=NUM_ROWS, seed=7)
    numbers = [int(starts[shard]) + row for shard, row in walk(order, 0, 2 * TOTAL)]
    loader = make_loader(shards)
    straddling = loader.load(48)
    assert step_rows(straddling) == numbers[48:64]
    assert straddling.first_samples == (48, 52, 56, 60)
    assert straddling.num_masked == sum(1 + number % 3 for number in numbers[48:64])
    epoch = make_loader(shards, global_samples=TOTAL, micro_samples=TOTAL).load(0)
    assert sorted(step_rows(epoch)) == list(range(TOTAL))


def test_starting_in_the_middle_equals_walking_there(shards: list[ShardInfo]) -> None:
    from_start, from_middle = make_loader(shards).steps(0), make_loader(shards).steps(16 * 5)
    walked = [step_rows(next(from_start)) for _ in range(8)]
    assert [step_rows(next(from_middle)) for _ in range(3)] == walked[5:]
    assert len({tuple(rows) for rows in walked}) == 8
    from_start.close(), from_middle.close()  # type: ignore[attr-defined]


def test_a_damaged_shard_is_reported_by_the_step_that_needs_it(tmp_path: Path) -> None:
    infos = [make_shard(tmp_path / f"a_training_{i}.hdf5", 20, 20 * i) for i in range(2)]
    second = infos[1].path
    second.write_bytes(second.read_bytes()[:-2000])
    steps = make_loader(infos).steps(0)
    with pytest.raises(ShardFormatError, match=rf"{second.name} is not HDF5 or is damaged"):
        next(steps)


def test_ids_beyond_the_vocabulary_are_reported(shards: list[ShardInfo]) -> None:
    with pytest.raises(ShardFormatError, match="input_ids wanted 0 to 4"):
        next(make_loader(shards, vocab_size=5).steps(0))


def test_dropout_depends_on_seed_and_sample_alone() -> None:
    assert dropout_seed(42, 0) == 934947203411512139
    seeds = {dropout_seed(seed, sample) for seed in (1, 2) for sample in range(1000)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(max(seeds))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 60, 61, 500])
def test_ranks_evaluate_the_same_rows_together(
    shards: list[ShardInfo], world_size: int, num_rows: int
) -> None:
    def rows(rank: int, world: int) -> list[int]:
        options: dict[str, Any] = {"num_rows": num_rows, "batch_samples": 4, "rank": rank}
        batches = evaluation_batches(shards, vocab_size=VOCAB_SIZE, world_size=world, **options)
        return [row for batch in batches for row in row_numbers(batch)]

    alone = rows(0, 1)
    shares = [rows(rank, world_size) for rank in range(world_size)]
    assert sorted(row for share in shares for row in share) == alone
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 4  # one batch
    assert len(set(alone)) == len(alone) == (min(num_rows, TOTAL) or TOTAL)


def test_few_held_out_rows_are_spread_over_all_shards(shards: list[ShardInfo]) -> None:
    batches = evaluation_batches(
        shards, num_rows=10, batch_samples=16, vocab_size=VOCAB_SIZE, rank=0, world_size=1
    )
    assert [row_numbers(batch) for batch in batches] == [[0, 6, 12, 18, 24, 30, 36, 42, 48, 54]]


def test_a_fingerprint_tells_other_data(shards: list[ShardInfo]) -> None:
    got = fingerprint(shards)
    assert {name: got[name] for name in ("shards", "rows", "seq_length", "max_predictions")} == {
        "shards": 5,
        "rows": TOTAL,
        "seq_length": SEQ_LENGTH,
        "max_predictions": NUM_PREDICTIONS,
    }
    assert fingerprint(shards) == got
    assert fingerprint(shards[::-1])["names_sha256"] != got["names_sha256"]
    with pytest.raises(ConfigError, match="no rows"):
        fingerprint([])
