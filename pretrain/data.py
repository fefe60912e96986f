"""The order of samples as a pure function of (shards, seed, position), and batches cut from it.

Sample number `i` of a run is row `i % rows` of epoch `i // rows`; an epoch visits every row once,
shard by shard in an order drawn for that epoch, with the rows of each shard shuffled. No rank,
worker or event has a say in it, so a run is resumed by knowing how many samples it has seen.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zerobert.errors import ConfigError
from zerobert.shards import DTYPES, ShardInfo, check_values, read_shard

Arrays = dict[str, npt.NDArray[Any]]
_PURPOSE_SHARDS, _PURPOSE_ROWS, _PURPOSE_DROPOUT = 1, 2, 3
_CACHED_SHARDS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """Which row of which shard each sample of a run is."""

    rows_of_shards: tuple[int, ...]
    seed: int

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return sum(self.rows_of_shards)

    def locate(self, first: int, count: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
        """The samples `first` to `first + count` as runs of (shard number, its rows), in order."""
        runs = []
        while count > 0:
            epoch, position = divmod(first, self.num_rows)
            shard, row, left = self._seek(epoch, position)
            taken = min(count, left)
            runs.append((shard, self._rows(epoch, shard)[row : row + taken]))
            first, count = first + taken, count - taken
        return runs

    def _seek(self, epoch: int, position: int) -> tuple[int, int, int]:
        """The shard at a position of an epoch, the position inside it, and what follows there."""
        shards, ends = self._epoch(epoch)
        index = int(np.searchsorted(ends, position, side="right"))
        num_rows = self.rows_of_shards[shards[index]]
        row = position - int(ends[index]) + num_rows
        return int(shards[index]), row, num_rows - row

    @functools.lru_cache(maxsize=2)  # noqa: B019 - two epochs' worth; orders live as long as the run
    def _epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        generator = np.random.default_rng([self.seed, _PURPOSE_SHARDS, epoch])
        shards = generator.permutation(len(self.rows_of_shards))
        return shards, np.cumsum(np.array(self.rows_of_shards)[shards])

    @functools.lru_cache(maxsize=_CACHED_SHARDS)  # noqa: B019
    def _rows(self, epoch: int, shard: int) -> npt.NDArray[np.int64]:
        generator = np.random.default_rng([self.seed, _PURPOSE_ROWS, epoch, shard])
        return generator.permutation(self.rows_of_shards[shard])


class ShardReader:
    """Rows of shards, with the last few shards kept decoded (and checked) in memory."""

    def __init__(self, shards: Sequence[ShardInfo], vocab_size: int) -> None:
        self._shards = shards
        self._vocab_size = vocab_size
        self._decoded: collections.OrderedDict[int, Arrays] = collections.OrderedDict()

    def gather(self, runs: Sequence[tuple[int, npt.NDArray[np.int64]]]) -> Arrays:
        """The rows of several runs, one after another.

        Raises:
            ShardFormatError: a shard can't be decoded or holds values out of range.
        """
        parts = [
            {name: array[rows] for name, array in self._shard(shard).items()}
            for shard, rows in runs
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in DTYPES}

    def _shard(self, index: int) -> Arrays:
        if index not in self._decoded:
            while len(self._decoded) >= _CACHED_SHARDS:
                self._decoded.popitem(last=False)
            path = self._shards[index].path
            arrays = read_shard(path)
            check_values(arrays, vocab_size=self._vocab_size, where=str(path))
            self._decoded[index] = arrays
        self._decoded.move_to_end(index)
        return self._decoded[index]


def to_tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    """Rows as int64 tensors, under the datasets' names."""
    return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBatch:
    """One rank's share of a global batch.

    Attributes:
        micro_batches: one dict of tensors for each micro-step.
        first_samples: the number of the first sample of each, which seeds its dropout.
        num_masked: masked positions in this share.
    """

    micro_batches: tuple[dict[str, Tensor], ...]
    first_samples: tuple[int, ...]
    num_masked: int


class StepLoader:
    """Makes this rank's batches of a run, the next one while the present one is trained on.

    A global batch is cut into consecutive slices by rank, then by micro-step, so that any number of
    ranks sees the same micro-batches as one.
    """

    def __init__(
        self,
        shards: Sequence[ShardInfo],
        *,
        seed: int,
        vocab_size: int,
        global_samples: int,
        micro_samples: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.order = SampleOrder(
            rows_of_shards=tuple(shard.num_rows for shard in shards), seed=seed
        )
        self._reader = ShardReader(shards, vocab_size)
        self._global_samples = global_samples
        self._micro_samples = micro_samples
        self._rank_samples = global_samples // world_size
        self._rank = rank

    def steps(self, first_sample: int) -> Iterator[StepBatch]:
        """The batches from a position on, without end.

        Raises:
            ShardFormatError: a shard can't be decoded or holds values out of range.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
            ahead: Future[StepBatch] = pool.submit(self.load, first_sample)
            while True:
                batch = ahead.result()
                first_sample += self._global_samples
                ahead = pool.submit(self.load, first_sample)
                yield batch

    def load(self, first_sample: int) -> StepBatch:
        """This rank's share of the global batch that starts at a sample."""
        start = first_sample + self._rank * self._rank_samples
        rows = self._reader.gather(self.order.locate(start, self._rank_samples))
        tensors = to_tensors(rows)
        offsets = range(0, self._rank_samples, self._micro_samples)
        return StepBatch(
            micro_batches=tuple(
                {name: tensor[i : i + self._micro_samples] for name, tensor in tensors.items()}
                for i in offsets
            ),
            first_samples=tuple(start + i for i in offsets),
            num_masked=int(np.count_nonzero(rows["masked_lm_positions"])),
        )


def dropout_seed(seed: int, first_sample: int) -> int:
    """The seed of the dropout of the micro-batch that starts with a sample: equal on any rank."""
    key = f"{seed}/{_PURPOSE_DROPOUT}/{first_sample}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def evaluation_batches(
    shards: Sequence[ShardInfo],
    *,
    num_rows: int,
    batch_samples: int,
    vocab_size: int,
    rank: int,
    world_size: int,
) -> Iterator[dict[str, Tensor]]:
    """This rank's share of held-out rows, spread evenly over all shards; shares may differ.

    Args:
        num_rows: rows on all ranks together; 0 for all there are.
    """
    order = SampleOrder(rows_of_shards=tuple(shard.num_rows for shard in shards), seed=0)
    reader = ShardReader(shards, vocab_size)
    total = order.num_rows
    wanted = min(num_rows, total) if num_rows else total
    chosen = np.linspace(0, total, wanted, endpoint=False).astype(np.int64)
    starts = np.cumsum([0, *order.rows_of_shards])
    for index, first in enumerate(range(0, wanted, batch_samples)):
        if index % world_size == rank:
            rows = chosen[first : first + batch_samples]
            owners = np.searchsorted(starts, rows, side="right") - 1
            runs = [(int(k), rows[owners == k] - starts[k]) for k in np.unique(owners)]
            yield to_tensors(reader.gather(runs))


def fingerprint(shards: Sequence[ShardInfo]) -> dict[str, Any]:
    """What a resumed run must find unchanged in its data: the shards' names, rows and shape.

    Raises:
        ConfigError: there is no row at all.
    """
    if not sum(shard.num_rows for shard in shards):
        raise ConfigError("the training shards have no rows; make them again")
    names = "\n".join(f"{shard.path.name} {shard.num_rows}" for shard in shards)
    return {
        "shards": len(shards),
        "rows": sum(shard.num_rows for shard in shards),
        "seq_length": shards[0].seq_length,
        "max_predictions": shards[0].max_predictions,
        "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }
