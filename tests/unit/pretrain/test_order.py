"""The order of samples: every row once an epoch, whoever asks for it and from wherever."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.order import Run, SampleOrder, Window, rows_of_block, sample_order
from zerobert.shards import ShardInfo

NUM_ROWS = (1, 13, 2, 40, 5)  # very uneven
TOTAL = sum(NUM_ROWS)


def make_order(rows_of_shards: tuple[int, ...] = NUM_ROWS, **options: Any) -> SampleOrder:
    chosen = {
        "rows_of_blocks": (4,) * len(rows_of_shards),
        "seed": 3,
        "global_samples": 16,
        "num_lanes": 4,
        "window_rows": 8,
        **options,
    }
    return SampleOrder(rows_of_shards=rows_of_shards, **chosen)


def make_shard(
    number: int = 0, *, rows: int = 100_000, seq_length: int = 128, chunk_rows: int | None = 256
) -> ShardInfo:
    return ShardInfo(
        path=Path(f"{number}_training.hdf5"),
        num_rows=rows,
        seq_length=seq_length,
        max_predictions=20,
        chunks=((chunk_rows, seq_length) if chunk_rows else None,) * 6,
    )


def windows_of(order: SampleOrder, lane: int, first: int, end: int) -> list[Window]:
    """The windows of a lane's samples."""
    windows = [order.window(lane, first)]
    while windows[-1].first + windows[-1].num_rows < end:
        windows.append(order.window(lane, windows[-1].first + windows[-1].num_rows))
    return windows


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    rows = draw(st.lists(st.integers(1, 60), min_size=1, max_size=8))
    blocks = draw(st.lists(st.integers(1, 20), min_size=len(rows), max_size=len(rows)))
    global_samples = draw(st.integers(1, 40))
    return SampleOrder(
        rows_of_shards=tuple(rows),
        rows_of_blocks=tuple(blocks),
        seed=draw(st.integers(0, 5)),
        global_samples=global_samples,
        num_lanes=draw(st.integers(1, global_samples)),
        window_rows=draw(st.integers(1, 50)),
    )


@settings(max_examples=60, deadline=None)
@given(order=orders(), epoch=st.integers(0, 4))
def test_an_epoch_visits_every_row_once(order: SampleOrder, epoch: int) -> None:
    rows = order.locate(epoch * order.num_rows, order.num_rows)
    np.testing.assert_array_equal(np.sort(rows), np.arange(order.num_rows))


@settings(max_examples=60, deadline=None)
@given(order=orders(), first=st.integers(0, 300), count=st.integers(0, 100))
def test_any_stretch_is_part_of_one_long_walk(order: SampleOrder, first: int, count: int) -> None:
    walked = [int(row) for sample in range(first, first + count) for row in order.locate(sample, 1)]
    assert order.locate(first, count).tolist() == walked


@settings(max_examples=50, deadline=None)
@given(order=orders(), first=st.integers(0, 300), count=st.integers(1, 100))
def test_lanes_follow_a_pattern_and_leave_nothing_out(
    order: SampleOrder, first: int, count: int
) -> None:
    """A sample's place in its batch says its lane, and lanes are walked without a gap."""
    seen: dict[int, int] = {}
    at = first
    for lane, index, length in order.runs(first, count):
        slots = (at + np.arange(length)) % order.global_samples
        assert set(slots * order.num_lanes // order.global_samples) == {lane}
        assert seen.setdefault(lane, index) == index
        seen[lane] += length
        at += length
    assert at == first + count


@settings(max_examples=50, deadline=None)
@given(order=orders(), epoch=st.integers(0, 2))
def test_windows_cover_a_lane_and_their_pieces_the_shards(order: SampleOrder, epoch: int) -> None:
    largest = max(map(min, zip(order.rows_of_blocks, order.rows_of_shards, strict=True)))
    rows = []
    for lane in range(order.num_lanes):
        _, index, _ = next(order.runs(order._lane_slot(lane), 1))
        assert index == 0
        windows = windows_of(order, lane, 0, 3 * order.num_rows)
        assert [a.first + a.num_rows for a in windows[:-1]] == [b.first for b in windows[1:]]
        for window in windows:
            assert 1 <= window.num_rows < order.window_rows + largest
            pieces = order.pieces(window)
            assert sum(piece.num_rows for piece in pieces) == window.num_rows
            assert sorted(order.shuffle(window)) == list(range(window.num_rows))
            if window.epoch == epoch:
                rows += [
                    (piece.shard, piece.first_row + i)
                    for piece in pieces
                    for i in range(piece.num_rows)
                ]
    shards = enumerate(order.rows_of_shards)
    assert sorted(rows) == [(shard, row) for shard, size in shards for row in range(size)]


@pytest.mark.parametrize(("world_size", "num_shared"), [(1, 0), (2, 0), (4, 0), (8, 0), (3, 2)])
def test_ranks_have_lanes_of_their_own(world_size: int, num_shared: int) -> None:
    """Where the lanes can't be dealt out evenly, neighbours share one."""
    order = make_order(global_samples=48, num_lanes=8)
    share = 48 // world_size
    lanes = [
        {run.lane for step in range(9) for run in order.runs(48 * step + share * rank, share)}
        for rank in range(world_size)
    ]
    assert set().union(*lanes) == set(range(8))
    assert sum(map(len, lanes)) == 8 + num_shared


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    walks = [make_order().locate(epoch * TOTAL, TOTAL).tolist() for epoch in range(3)]
    walks.append(make_order(seed=4).locate(0, TOTAL).tolist())
    assert all(a != b for a, b in itertools.combinations(walks, 2))
    within = [[row for row in walk if 16 <= row < 56] for walk in walks]  # the largest shard
    assert all(a != b for a, b in itertools.combinations(within, 2))


def test_the_order_is_this_one() -> None:
    """Exact numbers: a run that is resumed by a later version must find the same order."""
    order = make_order((2, 3, 7), global_samples=4, num_lanes=2, window_rows=3)
    assert order.locate(0, 12).tolist() == [0, 1, 7, 6, 4, 2, 8, 10, 3, 5, 9, 11]
    assert order.locate(12, 12).tolist() == [1, 0, 2, 3, 5, 6, 4, 10, 8, 7, 9, 11]


def test_lanes_and_windows_by_the_size_of_the_batch() -> None:
    shapes = {
        samples: (order.num_lanes, order.window_rows)
        for samples in (1, 16, 48, 256, 4096, 65536)
        for order in [sample_order([make_shard()] * 3, seed=1, global_samples=samples)]
    }
    assert shapes == {
        1: (1, 131072),
        16: (1, 131072),
        48: (2, 65536),
        256: (16, 8192),
        4096: (64, 2048),
        65536: (64, 2048),
    }
    longer = sample_order([make_shard(seq_length=512)], seed=1, global_samples=4096)
    assert (longer.num_lanes, longer.window_rows) == (64, 512)
    few = sample_order([make_shard(rows=2000)] * 10, seed=1, global_samples=4096)
    assert (few.num_lanes, few.window_rows) == (4, 32768)


def test_blocks_are_whole_chunks_within_limits() -> None:
    sizes = {rows: rows_of_block(make_shard(chunk_rows=rows)) for rows in (256, 300, 3125, 90_000)}
    assert sizes == {256: 1024, 300: 1200, 3125: 3125, 90_000: 8192}
    assert rows_of_block(make_shard(chunk_rows=None)) == 1024
    assert rows_of_block(make_shard(seq_length=512)) == 256
    assert rows_of_block(make_shard(rows=5, chunk_rows=256)) == 1025  # chunks of five rows


def test_a_batch_is_of_many_places_and_mixed_by_size() -> None:
    """Two folders, one three times the other: of 384 blocks, 128 are shuffled together."""
    shards = [make_shard(i, rows=32 * 1024) for i in range(12)]
    order = sample_order(shards, seed=1, global_samples=1024)
    shares = []
    for step in range(order.num_rows // 1024):
        rows = order.locate(1024 * step, 1024)
        blocks, counts = np.unique(rows // 1024, return_counts=True)
        assert len(blocks) > 80
        assert (counts * (counts - 1)).sum() / (1024 * 1023) < 0.02  # pairs of one block
        shares.append(np.mean(rows < 9 * 32 * 1024))
    assert np.mean(shares) == 0.75
    # Drawn without putting back.
    deviation = np.sqrt(0.75 * 0.25 / 128 * (384 - 128) / 383)
    assert max(np.abs(np.array(shares) - 0.75)) < 4 * deviation


def test_far_into_ten_thousand_large_shards() -> None:
    """A thousand million rows: the window of any sample is a few pieces."""
    order = sample_order([make_shard()] * 10_000, seed=1, global_samples=4096)
    (run, *_) = order.runs(123_456 * 4096, 4096)
    assert run == Run(0, 123_456 * 64, 64)
    window = order.window(run.lane, run.first)
    assert window.first <= run.first < window.first + window.num_rows < run.first + 2048 + 1024
    assert 1 <= len(order.pieces(window)) <= 4
    assert order.num_rows == 10**9


def test_nothing_of_it_depends_on_when_it_is_asked() -> None:
    """Caches are of one order, and orders that differ in one value differ."""
    order = make_order()
    wanted = order.locate(0, 200).tolist()
    for name, value in {"seed": 9, "window_rows": 20, "num_lanes": 2, "global_samples": 32}.items():
        other = dataclasses.replace(order, **{name: value})
        assert other.locate(0, 200).tolist() != wanted
    assert order.locate(100, 100).tolist() == wanted[100:]
