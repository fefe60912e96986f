"""The order of samples and the cutting of batches: alike for any ranks, from any position."""

import contextlib
import dataclasses
import itertools
import threading
import weakref
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pretrain import data
from pretrain.data import (
    StepBatch,
    StepLoader,
    dropout_seed,
    evaluation_batches,
    fingerprint,
)
from pretrain.masking import Masking, unmasked
from pretrain.order import SampleOrder
from zerobert import manifest
from zerobert import shards as shards_module
from zerobert.errors import ConfigError, ShardFormatError
from zerobert.shards import DTYPES, ShardInfo, describe_shard, read_shard, write_shard

plain_read_window = data.read_window

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
    arrays["input_ids"][:, 1] = numbers % 100
    arrays["input_ids"][:, 2] = numbers // 100
    arrays["input_mask"][:, :6] = 1
    for name in ("masked_lm_positions", "masked_lm_ids"):
        arrays[name] = np.zeros((num_rows, NUM_PREDICTIONS), DTYPES[name])
    for column in range(NUM_PREDICTIONS):  # one to three masks a row
        arrays["masked_lm_positions"][:, column] = np.where(numbers % 3 >= column, column + 1, 0)
    stood = np.take_along_axis(arrays["input_ids"], arrays["masked_lm_positions"], axis=1)
    arrays["masked_lm_ids"] = np.where(arrays["masked_lm_positions"] > 0, stood, 0)
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
    shards: list[ShardInfo],
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 7,
    vocab_size: int = VOCAB_SIZE,
    global_samples: int = 16,
    micro_samples: int = 4,
    rows_of_block: int = 4,
    num_lanes: int = 4,
    window_rows: int = 8,
    masking: Masking | None = None,
) -> StepLoader:
    order = SampleOrder(
        rows_of_shards=tuple(shard.num_rows for shard in shards),
        rows_of_blocks=(rows_of_block,) * len(shards),
        seed=seed,
        global_samples=global_samples,
        num_lanes=num_lanes,
        window_rows=window_rows,
    )
    return StepLoader(
        shards,
        order,
        vocab_size=vocab_size,
        micro_samples=micro_samples,
        rank=rank,
        world_size=world_size,
        masking=masking,
    )


def load(loader: StepLoader, first_sample: int, num_steps: int = 1) -> list[StepBatch]:
    """The batches from a sample on."""
    steps = loader.steps(first_sample)
    with contextlib.closing(steps):  # type: ignore[type-var]
        return list(itertools.islice(steps, num_steps))


def row_numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    ids = batch["input_ids"]
    return (ids[:, 1] + 100 * ids[:, 2]).tolist()


def step_rows(batch: StepBatch) -> list[int]:
    return [row for micro in batch.micro_batches for row in row_numbers(micro)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_micro_batches(shards: list[ShardInfo], world_size: int) -> None:
    alone = make_loader(shards)
    loaders = [make_loader(shards, rank=r, world_size=world_size) for r in range(world_size)]
    for first in (0, 16, 48, 64, 7):  # an epoch has 61 rows: 48 straddles two
        (wanted,) = load(alone, first)
        parts = [load(loader, first)[0] for loader in loaders]
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
    loader = make_loader(shards)
    numbers = loader.order.locate(0, 2 * TOTAL).tolist()
    (straddling,) = load(loader, 48)
    assert step_rows(straddling) == numbers[48:64]
    assert straddling.first_samples == (48, 52, 56, 60)
    assert straddling.num_masked == sum(1 + number % 3 for number in numbers[48:64])
    (epoch,) = load(make_loader(shards, global_samples=TOTAL, micro_samples=TOTAL), 0)
    assert sorted(step_rows(epoch)) == list(range(TOTAL))


def test_starting_in_the_middle_equals_walking_there(shards: list[ShardInfo]) -> None:
    walked = [step_rows(batch) for batch in load(make_loader(shards), 0, 8)]
    assert [step_rows(batch) for batch in load(make_loader(shards), 16 * 5, 3)] == walked[5:]
    assert len({tuple(rows) for rows in walked}) == 8


UNEVEN = (1, 7, 5000, 3, 640, 2, 1, 1024)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> list[ShardInfo]:
    folder = tmp_path_factory.mktemp("uneven")
    starts = np.cumsum([0, *UNEVEN])
    return [
        make_shard(folder / f"a_training_{i}.hdf5", rows, int(starts[i]))
        for i, rows in enumerate(UNEVEN)
    ]


class Reads:
    """Stands before `read_rows` and `read_window` and keeps account of what they give out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lock = threading.Lock()
        self.rows_read = self.rows_alive = self.most_alive = 0
        monkeypatch.setattr(data, "read_rows", self.read_rows)
        monkeypatch.setattr(data, "read_window", self.read_window)

    def read_rows(self, shard: ShardInfo, wanted: Any) -> None:
        with self.lock:
            self.rows_read += sum(len(arrays["input_ids"]) for arrays in wanted.values())
        shards_module.read_rows(shard, wanted)

    def read_window(self, *args: Any) -> Any:
        arrays = plain_read_window(*args)
        num_rows = len(arrays["input_ids"])
        self._count(num_rows)
        weakref.finalize(arrays["input_ids"], self._count, -num_rows)
        return arrays

    def _count(self, num_rows: int) -> None:
        with self.lock:
            self.rows_alive += num_rows
            self.most_alive = max(self.most_alive, self.rows_alive)


def test_an_epoch_over_very_uneven_shards_is_the_same_for_any_ranks(
    uneven: list[ShardInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal global batches, every row once, each rank with its own share to decode, and little of
    it at a time.
    """
    total = sum(UNEVEN)
    num_steps = -(-total // 48)
    options = {"global_samples": 48, "micro_samples": 2, "num_lanes": 8, "window_rows": 96}
    ahead_rows = 8 * 2 * (96 + 32)  # two windows a lane
    wanted: list[dict[str, torch.Tensor]] = []
    for world_size in (1, 2, 3, 4, 8):
        ranks = []
        for rank in range(world_size):
            with monkeypatch.context() as patch:
                reads = Reads(patch)
                loader = make_loader(
                    uneven, rank=rank, world_size=world_size, rows_of_block=32, **options
                )
                ranks.append(load(loader, 0, num_steps))
            lanes = 8 / world_size if 8 % world_size == 0 else 4  # at most, of three ranks
            share = lanes / 8 * (48 * num_steps)
            assert reads.rows_read <= share + ahead_rows * lanes / 8
            assert reads.most_alive <= ahead_rows * lanes / 8
        batches = [
            {
                name: torch.cat([micro[name] for part in parts for micro in part.micro_batches])
                for name in DTYPES
            }
            for parts in zip(*ranks, strict=True)  # every rank has the same number of steps
        ]
        wanted = wanted or batches
        for got, one in zip(batches, wanted, strict=True):
            assert all(torch.equal(got[name], one[name]) for name in DTYPES)
    rows = [row for batch in wanted for row in row_numbers(batch)]
    assert sorted(rows[:total]) == list(range(total))


def test_what_is_in_memory_does_not_grow_with_the_shards(
    uneven: list[ShardInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start far into an epoch of five shards or of ten thousand reads the windows that it is in,
    and a walk keeps those and the next ones.
    """
    for shards in (uneven[2:7], uneven[2:4] * 5000):
        with monkeypatch.context() as patch:
            reads = Reads(patch)
            loader = make_loader(
                shards, global_samples=64, num_lanes=4, window_rows=200, rows_of_block=64
            )
            start = 64 * (loader.order.num_rows // 128)
            load(loader, start)
            at_start = reads.rows_read
            load(loader, start, 60)
        assert at_start <= 4 * 2 * (200 + 64)
        assert reads.rows_read - at_start <= 60 * 64 + 4 * 3 * (200 + 64)
        assert reads.most_alive <= 4 * 2 * (200 + 64)


def test_few_rows_are_not_decoded_for_epochs_to_come(
    shards: list[ShardInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    loader = make_loader(shards, num_lanes=1, window_rows=10**6)
    (batch,) = load(loader, 0)
    assert step_rows(batch) == loader.order.locate(0, 16).tolist()
    assert reads.rows_read <= 2 * TOTAL


def test_fresh_masks_belong_to_the_samples(shards: list[ShardInfo]) -> None:
    """The same ones for any ranks and from any start, others in each epoch, over the same text."""
    masking = Masking(
        seed=7,
        masked_lm_prob=0.9,
        max_predictions=5,
        vocab_size=VOCAB_SIZE,
        cls_id=0,
        sep_id=VOCAB_SIZE - 1,
        mask_id=50,
        continues_V=None,
    )
    plain = load(make_loader(shards), 0, 8)
    wanted = load(make_loader(shards, masking=masking), 0, 8)
    for world_size in (2, 4):
        loaders = [
            make_loader(shards, rank=rank, world_size=world_size, masking=masking)
            for rank in range(world_size)
        ]
        parts = [load(loader, 16 * 3, 5) for loader in loaders]
        for step, one in zip(zip(*parts, strict=True), wanted[3:], strict=True):
            micros = [micro for part in step for micro in part.micro_batches]
            for got, micro in zip(micros, one.micro_batches, strict=True):
                assert all(torch.equal(got[name], micro[name]) for name in DTYPES)
            assert sum(part.num_masked for part in step) == one.num_masked
    masks_of_rows: dict[int, list[list[int]]] = {}
    for one, step in zip(wanted, plain, strict=True):
        for micro, as_stored in zip(one.micro_batches, step.micro_batches, strict=True):
            arrays = {name: tensor.numpy() for name, tensor in micro.items()}
            assert arrays["masked_lm_positions"].shape == (4, 5)
            text = {"input_ids": torch.from_numpy(unmasked(arrays))}
            assert row_numbers(text) == row_numbers(as_stored)
            for row, ids in zip(row_numbers(text), arrays["input_ids"].tolist(), strict=True):
                masks_of_rows.setdefault(row, []).append(ids)
    again = [ids for ids in masks_of_rows.values() if len(ids) > 1]
    assert len(again) > 60
    assert sum(one != other for one, other, *_ in again) > 10


def test_a_damaged_shard_is_reported_by_the_step_that_needs_it(tmp_path: Path) -> None:
    infos = [make_shard(tmp_path / f"a_training_{i}.hdf5", 20, 20 * i) for i in range(2)]
    second = infos[1].path
    second.write_bytes(second.read_bytes()[:-2000])
    with pytest.raises(ShardFormatError, match=rf"{second.name} is not HDF5 or is damaged"):
        load(make_loader(infos), 0, 3)


def test_a_damaged_chunk_is_reported_and_the_threads_end(tmp_path: Path) -> None:
    infos = [make_shard(tmp_path / f"a_training_{i}.hdf5", 600, 600 * i) for i in range(2)]
    raw = bytearray(infos[1].path.read_bytes())
    with h5py.File(infos[1].path) as file:
        chunk = file["input_ids"].id.get_chunk_info(0)
    raw[chunk.byte_offset + 20 : chunk.byte_offset + chunk.size] = bytes(chunk.size - 20)
    infos[1].path.write_bytes(raw)
    with pytest.raises(ShardFormatError, match=r"a_training_1.*damaged.*make or copy it again"):
        load(make_loader(infos), 0, 80)
    assert not [thread for thread in threading.enumerate() if "decoder" in thread.name]


def test_a_shard_that_changes_under_a_run_is_reported(tmp_path: Path) -> None:
    infos = [make_shard(tmp_path / "a_training_0.hdf5", 20, 0)]
    make_shard(tmp_path / "a_training_0.hdf5", 10, 0)
    with pytest.raises(ShardFormatError, match="had 20 rows and now has 10"):
        load(make_loader(infos), 0)


def test_a_wrong_value_is_told_by_its_row_in_the_file(tmp_path: Path) -> None:
    info = make_shard(tmp_path / "a_training_0.hdf5", 600, 0)
    arrays = read_shard(info.path)
    arrays["input_ids"][431, 3] = VOCAB_SIZE
    write_shard(info.path, arrays)
    message = rf"a_training_0.hdf5: input_ids wanted 0 to {VOCAB_SIZE - 1}, got 100 in row 431 \(1 "
    with pytest.raises(ShardFormatError, match=message):
        load(make_loader([info]), 0, 40)


def test_ids_beyond_the_vocabulary_are_reported(shards: list[ShardInfo]) -> None:
    with pytest.raises(ShardFormatError, match="input_ids wanted 0 to 4"):
        load(make_loader(shards, vocab_size=5), 0)


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
    def batches(rank: int, world: int) -> list[tuple[dict[str, torch.Tensor], bool]]:
        options: dict[str, Any] = {"num_rows": num_rows, "batch_samples": 4, "rank": rank}
        return list(evaluation_batches(shards, vocab_size=VOCAB_SIZE, world_size=world, **options))

    def counted(share: list[tuple[dict[str, torch.Tensor], bool]]) -> list[int]:
        return [row for batch, counts in share if counts for row in row_numbers(batch)]

    alone = counted(batches(0, 1))
    shares = [batches(rank, world_size) for rank in range(world_size)]
    assert sorted(row for share in shares for row in counted(share)) == alone
    assert len(set(alone)) == len(alone) == (min(num_rows, TOTAL) or TOTAL)
    # No rank waits for one that has no more to do, and none does more than one for nothing.
    assert len({len(share) for share in shares}) == 1
    assert all(sum(not counts for _, counts in share) <= 1 for share in shares)


def test_few_held_out_rows_are_spread_over_all_shards(shards: list[ShardInfo]) -> None:
    batches = evaluation_batches(
        shards, num_rows=10, batch_samples=16, vocab_size=VOCAB_SIZE, rank=0, world_size=1
    )
    assert [row_numbers(batch) for batch, _ in batches] == [[0, 6, 12, 18, 24, 30, 36, 42, 48, 54]]


def test_a_fingerprint_tells_other_data(shards: list[ShardInfo]) -> None:
    got = fingerprint(shards)
    assert {name: got[name] for name in ("shards", "rows", "seq_length", "max_predictions")} == {
        "shards": 5,
        "rows": TOTAL,
        "seq_length": SEQ_LENGTH,
        "max_predictions": NUM_PREDICTIONS,
    }
    assert fingerprint(shards) == got
    assert got["order"] == 2
    assert fingerprint(shards[::-1])["names_sha256"] != got["names_sha256"]
    repacked = dataclasses.replace(shards[0], chunks=((5000, 1),) * 6, num_rows=9000)
    other = dataclasses.replace(repacked, chunks=((3000, 1),) * 6)
    assert fingerprint([repacked])["names_sha256"] != fingerprint([other])["names_sha256"]
    with pytest.raises(ConfigError, match="no rows"):
        fingerprint([])


def test_a_fingerprint_tells_data_that_was_made_anew_under_the_same_names(tmp_path: Path) -> None:
    def made(folder: Path, seed: int) -> dict[str, Any]:
        folder.mkdir()
        shard = make_shard(folder / "a_training_0.hdf5", 5, 0)
        manifest.write_json(folder / manifest.MANIFEST_NAME, {"seed": seed})
        return fingerprint([shard])

    first = made(tmp_path / "one", 1)
    assert made(tmp_path / "moved", 1) == first
    other = made(tmp_path / "two", 2)
    assert {name for name in first if first[name] != other[name]} == {"manifests_sha256"}
